# SPDX-License-Identifier: Apache-2.0
"""FID, sFID, inception score, precision and recall as guided-diffusion's evaluator defines them.

The evaluator ("ADM") is `evaluations/evaluator.py` of openai/guided-diffusion, commit 22e0df8;
docs/evaluation.md states every definition. Pictures pass once, batch by batch; what is kept of them
is sums and the pooled features (8 KB a picture).

Dimension key:  N samples   B batch   H W C picture   F pooled features (2048)   K classes (1008)
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from vqjax.core import cores
from vqjax.errors import VqjaxError
from vqjax.eval import metrics
from vqjax.io.image_set import ImageSet
from vqjax.io.inception import Weights
from vqjax.models import inception
from vqjax.models.inception import Params

NAME = "ADM evaluator"
SCORES = ("fid", "sfid", "is", "precision", "recall")
PUBLISHED_COUNT = 50_000
BATCH = 64
CPU_BATCH = 8
"""Pictures in one call on a CPU, which makes several calls at a time: faster than one call of 64,
part of which keeps a single core busy."""
FLUSH = 4096  # rows at once into the moments; each call visits matrices of 2048 x 2048, too


class Rows(NamedTuple):
    """`vqjax.models.inception.Features` of one batch, as numpy float32."""

    pooled: np.ndarray
    spatial: np.ndarray
    logits: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """What the scores need of a set of pictures.

    Attributes:
      pooled: moments of the pooled features (FID).
      spatial: moments of the spatial features (sFID).
      rows_NF: the pooled features, float32 (precision and recall); the first ones, where the set
        has more than precision and recall look at.
      splits: sums of the class probabilities (inception score).
      classes_N: the most probable class of each picture, int32.
    """

    pooled: metrics.Moments
    spatial: metrics.Moments
    rows_NF: np.ndarray
    splits: metrics.SplitScores
    classes_N: np.ndarray


def evaluate(
    samples: ImageSet,
    reference: ImageSet,
    weights: Weights,
    *,
    advance: Callable[[int], Any] = lambda count: None,
) -> dict[str, Any]:
    """Scores samples against a reference set.

    Statistics that a file holds go before those of its pictures; precision and recall always use
    the pictures, all of both sets unless a set says how many.

    Args:
      samples: in random class order; the inception score is taken in splits of 5,000.
      reference: such as `VIRTUAL_imagenet256_labeled.npz`.
      advance: called with the number of pictures after every batch of either set.

    Returns:
      What `scores` does.

    Raises:
      VqjaxError: before any work as `check` says; if a file is damaged.
    """
    check(samples, reference)
    real, found = (look(s, weights, advance=advance) for s in (reference, samples))
    return scores(samples, found, weights, reference, real)


def scores(
    samples: ImageSet,
    found: Seen,
    weights: Weights,
    reference: ImageSet | None = None,
    real: Seen | None = None,
) -> dict[str, Any]:
    """Scores of what the network saw.

    Args:
      samples, found: the set and what `look` returned for it.
      reference, real: the same for real pictures; None leaves only the inception score.

    Returns:
      `fid, sfid, is, precision, recall`; how far they spread: `fid_se` (standard error by the
      delta method, None where N <= 2048 or the samples' file has statistics), `is_sd` (over
      splits, None for one split), `precision_se` and `recall_se` (binomial); `n`, `reference_n`,
      `reference_manifold_n` (pictures that precision and recall saw), `reference_statistics`
      ("stored" or "pictures"), `inception_sha256`, `published_weights`, `name`, and `notes`:
      sentences that belong beside the numbers. Without a reference, what needs one is absent.
    """
    splits = found.splits.scores()
    content = {
        "is": float(splits.mean()),
        "is_sd": float(splits.std(ddof=1)) if len(splits) > 1 else None,
        "n": samples.count,
        "inception_sha256": weights.sha256,
        "published_weights": weights.published,
        "name": NAME,
        "notes": _notes(samples, reference, weights, found.classes_N),
    }
    if reference is None or real is None:
        return content
    real_pooled, real_spatial = _moments(reference, real)
    pooled, spatial = _moments(samples, found)
    precision, recall = metrics.precision_recall(real.rows_NF, found.rows_NF)
    return content | {
        "fid": metrics.frechet_distance(real_pooled, pooled),
        "sfid": metrics.frechet_distance(real_spatial, spatial),
        "precision": precision,
        "recall": recall,
        "fid_se": None
        if samples.statistics
        else metrics.frechet_error(found.rows_NF, found.pooled, real_pooled),
        "precision_se": float(np.sqrt(precision * (1 - precision) / samples.count)),
        "recall_se": float(np.sqrt(recall * (1 - recall) / len(real.rows_NF))),
        "reference_n": reference.count,
        "reference_manifold_n": len(real.rows_NF),
        "reference_statistics": "stored" if reference.statistics else "pictures",
    }


def look(
    images: ImageSet,
    weights: Weights,
    *,
    advance: Callable[[int], Any] = lambda count: None,
) -> Seen:
    """Runs the network over all pictures, in one compiled shape per picture size.

    Raises:
      VqjaxError: if the pictures cannot be read or are fewer than two.
    """

    places = cores.placed(weights.params)

    def seen() -> Iterator[Rows]:
        for batch in images.batches(BATCH * len(places)):  # one for each device
            yield rows_of(batch, places)
            advance(len(batch))

    return gather(seen(), images)


def gather(rows: Iterable[Rows], images: ImageSet) -> Seen:
    """Reduces features to what scores need.

    Args:
      rows: features of batches of any size, of all pictures. Sums do not depend on the sizes
        beyond rounding.
      images: the set they are of; its pictures are not looked at.

    Raises:
      VqjaxError: if there are fewer than two pictures, or not as many as the set says.
    """
    count, kept = images.count, images.manifold or images.count
    pooled, spatial = metrics.Accumulator(), metrics.Accumulator()
    splits = metrics.SplitScores()
    rows_NF = np.empty((kept, inception.POOLED), np.float32)
    classes_N = np.empty(count, np.int32)
    waiting: list[Rows] = []
    done = flushed = 0
    for seen in rows:
        size = len(seen.pooled)
        if done + size > count:
            raise _other_count(images, f"{done + size} or more")
        rows_NF[done : done + size] = seen.pooled[: max(0, kept - done)]
        classes_N[done : done + size] = np.argmax(seen.logits, 1)
        splits.add(seen.logits)
        waiting.append(seen)
        done += size
        if done - flushed >= FLUSH or done == count:
            spatial.add(np.concatenate([batch.spatial for batch in waiting]))
            pooled.add(np.concatenate([batch.pooled for batch in waiting]))
            waiting, flushed = [], done
    if done != count:
        raise _other_count(images, str(done))
    return Seen(pooled.moments(), spatial.moments(), rows_NF, splits, classes_N)


def _other_count(images: ImageSet, found: str) -> VqjaxError:
    return VqjaxError(
        f"{images.where}: features of {found} pictures came, {images.count} were announced; the "
        f"pictures, or features that were kept of them, have changed"
    )


def rows_of(images_NHWC: np.ndarray, places: Mapping[Any, Params]) -> Rows:
    """Features of pictures, a batch at a time on each device, on a CPU one for each core.

    Args:
      images_NHWC: uint8 [N, H, W, 3].
      places: the network's parameters, as `cores.placed` returns them.
    """
    size = _batch()

    def of_batch(params: Params, start: int) -> Rows:
        return _features(params, images_NHWC[start : start + size])

    parts = cores.over_devices(of_batch, range(0, len(images_NHWC), size), places)
    return Rows(*(np.concatenate(arrays) for arrays in zip(*parts)))


def _batch() -> int:
    return min(BATCH, CPU_BATCH) if jax.default_backend() == "cpu" else BATCH


def _features(params: Params, images_BHWC: np.ndarray) -> Rows:
    """Features of one batch; a short one is filled up with black and cut off."""
    count = len(images_BHWC)
    filler = np.zeros((_batch() - count, *images_BHWC.shape[1:]), np.uint8)
    resized = _resize(np.concatenate([images_BHWC, filler]))
    return Rows(*(np.asarray(rows)[:count] for rows in _network(params, resized)))


# Two programs, so that the large one is compiled once for pictures of any size.
_resize = jax.jit(inception.resize)
_network = jax.jit(inception.features)


def _moments(images: ImageSet, seen: Seen) -> tuple[metrics.Moments, metrics.Moments]:
    """Those of the file where it has some, as in the evaluator, else those of the pictures."""
    if images.statistics is None:
        return seen.pooled, seen.spatial
    mu, sigma, mu_s, sigma_s = images.statistics
    return metrics.Moments(mu, sigma, 0), metrics.Moments(mu_s, sigma_s, 0)


def check(samples: ImageSet, reference: ImageSet | None) -> None:
    """Refuses what would make scores meaningless, before any work.

    Raises:
      VqjaxError: if a set is too small, stored statistics have other dimensions than the features,
        or the samples' labels are sorted by class.
    """
    for images in [samples] if reference is None else [samples, reference]:
        check_set(images)
    if samples.labels is not None and metrics.sorted_by_class(samples.labels):
        raise VqjaxError(
            f"{samples.where}: the samples are sorted by class, so each split of "
            f"{metrics.INCEPTION_SPLIT:,} holds few classes and the inception score means nothing; "
            f"shuffle pictures and labels before they are saved"
        )


def check_set(images: ImageSet) -> None:
    """What `check` says of either set alone, so that a reference is looked at before samples are
    there.

    Raises:
      VqjaxError: if it is too small, or stored statistics have other dimensions than the features.
    """
    if images.count <= metrics.NEIGHBOURS:
        raise VqjaxError(
            f"{images.where}: {images.count} pictures are too few: a covariance needs 2, "
            f"precision and recall {metrics.NEIGHBOURS + 1}, comparable scores "
            f"{PUBLISHED_COUNT:,}"
        )
    if images.statistics is None:
        return
    found = images.statistics.mu.size, images.statistics.mu_s.size
    if found != (inception.POOLED, inception.SPATIAL):
        raise VqjaxError(
            f"{images.where}: statistics of {found[0]} and {found[1]} dimensions, the FID "
            f"network's features have {inception.POOLED} and {inception.SPATIAL}; they were "
            f"made with another network"
        )


def _notes(
    samples: ImageSet, reference: ImageSet | None, weights: Weights, classes_N: np.ndarray
) -> list[str]:
    notes, count = [], samples.count
    if reference is not None and count != PUBLISHED_COUNT:
        notes.append(
            f"N = {count:,}: FID and sFID are biased upwards by about 1/N, so they compare only "
            f"with values of the same N; published ones have {PUBLISHED_COUNT:,}"
        )
    if reference is not None and count <= inception.POOLED:
        notes.append(
            f"{count:,} samples do not fill {inception.POOLED:,} dimensions: the covariance is "
            f"singular, FID and sFID are mostly bias"
        )
    if reference is not None and samples.statistics is not None:
        notes.append("FID and sFID are of the statistics that the samples' file stores")
    if reference is not None and reference.statistics is None:
        notes.append(
            f"the reference holds no stored statistics: FID and sFID are against its "
            f"{reference.count:,} pictures"
        )
    if reference is not None and reference.manifold is not None:
        notes.append(
            f"precision and recall are against the first {reference.manifold:,} of the "
            f"reference's {reference.count:,} pictures, as many as the published reference batch "
            f"holds"
        )
    if not weights.published:
        notes.append("the FID network's file is not the published one (see its sha256)")
    if metrics.sorted_by_class(classes_N):
        notes.append("the samples look sorted by class: the inception score is too low")
    return notes
