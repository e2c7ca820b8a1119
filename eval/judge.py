# SPDX-License-Identifier: Apache-2.0
"""How near samples of a small model are to real pictures, seen by classifiers of its own data.

Three classifiers that the package carries look at the pictures; `vqjax.eval.metrics` scores what
they see. The numbers rank models of one data set at one sample count. They say nothing about
ImageNet, and are no FID, sFID or IS in the sense of the literature.

Dimension key:  N samples   R reference pictures   H W C picture   F 64   S 128   K classes
"""

import dataclasses
import functools
import hashlib
import importlib.resources
import json
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from vqjax.errors import VqjaxError
from vqjax.eval import metrics
from vqjax.io.halves import Halves
from vqjax.models import extractor

SCORES = ("fd", "sfd", "is", "precision", "recall", "accuracy")
Reference = Literal["all", "train", "held"]
_BATCH = 256
SIDE = 32  # pixels


@dataclasses.dataclass(frozen=True)
class Extractors:
    """The classifiers of one data set.

    Attributes:
      params: one dict of float32 arrays each, as `vqjax.models.extractor.init` names them.
      accuracies: what their training measured: seed, train_accuracy, held_accuracy.
      sha256: of the weight file; scores of different files must not be compared.
    """

    params: tuple[dict[str, jax.Array], ...]
    accuracies: tuple[dict[str, float], ...]
    sha256: str


class Rows(NamedTuple):
    """`vqjax.models.extractor.Features` of all pictures, as numpy float32."""

    pooled: np.ndarray
    spatial: np.ndarray
    logits: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """Classifiers of one data set, and the data that they compare with.

    Attributes:
      kind: names the data set: "digits".
      name: of the Frechet distance; it is no FID.
      asset: file of the classifiers' weights in the package.
      data: reads the real pictures, both halves.
      about: what the scores do not say, one sentence.
    """

    kind: str
    name: str
    asset: str
    data: Callable[[], Halves]
    about: str

    def extractors(self) -> Extractors:
        """The classifiers of the package.

        Raises:
          VqjaxError: if the installation lacks them.
        """
        return _extractors(self.asset)

    def notes(self, count: int) -> list[str]:
        """Sentences that belong beside the scores of so many pictures."""
        return [
            self.about,
            f"N = {count:,}: {self.name} grows as N shrinks, by about 1/N, so it compares only "
            f"with values of the same N",
        ]

    def check(self) -> None:
        """Looks whether everything is here that scores need, before hours of work.

        Raises:
          VqjaxError: if the data or the classifiers are not.
        """
        self.data()
        self.extractors()

    def features(self, images_NHWC: np.ndarray) -> list[Rows]:
        """What each extractor sees, as numpy float32 rows.

        Args:
          images_NHWC: uint8 [N, 32, 32, 3].

        Raises:
          VqjaxError: for another shape or dtype.
        """
        if images_NHWC.dtype != np.uint8 or images_NHWC.shape[1:] != (SIDE, SIDE, 3):
            raise VqjaxError(
                f"{self.name} needs uint8 pictures [N, {SIDE}, {SIDE}, 3], found "
                f"{images_NHWC.dtype} {list(images_NHWC.shape)}; round and clip to 0..255 first"
            )
        return [_features(params, images_NHWC) for params in self.extractors().params]

    def evaluate_images(
        self, images_NHWC: np.ndarray, labels_N: np.ndarray, *, reference: Reference = "all"
    ) -> dict[str, Any]:
        """Scores samples against real pictures.

        Args:
          images_NHWC: uint8 [N, 32, 32, 3], N >= 4. Compare only equal N: the distance falls like
            1/N.
          labels_N: the classes that were asked for.
          reference: real pictures to compare with: all, or one half of them.

        Returns:
          `fd, sfd, is, precision, recall, accuracy` as means over the extractors, `accuracy_se`
          (standard error, of pictures), `n`, each extractor's own scores under `extractors`, and
          what is needed to read them: `name`,
          `feature_dimension`, `spatial_dimension`, `reference`, `reference_n`, `extractor_sha256`.
          The inception score takes all samples as one split, so the order of classes is free.
        """
        if len(images_NHWC) <= metrics.NEIGHBOURS or len(images_NHWC) != len(labels_N):
            raise VqjaxError(
                f"scores need at least {metrics.NEIGHBOURS + 1} pictures and one label each, found "
                f"{len(images_NHWC)} pictures and {len(labels_N)} labels"
            )
        real = _reference_features(self, reference)
        found = self.features(images_NHWC)
        each = [_scores(r, f, np.asarray(labels_N)) for r, f in zip(real, found)]
        right_N = np.mean([np.argmax(one.logits, 1) == labels_N for one in found], axis=0)
        return {
            **{score: float(np.mean([one[score] for one in each])) for score in SCORES},
            "accuracy_se": metrics.standard_error(right_N),
            "n": len(images_NHWC),
            "extractors": each,
            "name": self.name,
            "feature_dimension": found[0].pooled.shape[1],
            "spatial_dimension": found[0].spatial.shape[1],
            "reference": reference,
            "reference_n": len(real[0].pooled),
            "extractor_sha256": self.extractors().sha256,
        }

    def paired_difference(
        self,
        before_NHWC: np.ndarray,
        after_NHWC: np.ndarray,
        *,
        reference: Reference = "all",
        draws: int = 50,
        seed: int = 0,
    ) -> dict[str, Any]:
        """How much the distance changes between twins (same noise and classes), and how surely.

        The bootstrap draws the same rows of both sets, so what the twins share cancels.

        Returns:
          `fd_difference` (after - before, mean over extractors); of the draws the standard
          deviation `fd_difference_sd` and, as `fd_difference_interval`, the quantiles of 2.5 and
          97.5 %, [low, high]; `n`, `draws`.
        """
        if before_NHWC.shape != after_NHWC.shape:
            raise VqjaxError(f"twins differ in shape: {before_NHWC.shape} and {after_NHWC.shape}")
        real = [metrics.moments(one.pooled) for one in _reference_features(self, reference)]
        before = [one.pooled.astype(np.float64) for one in self.features(before_NHWC)]
        after = [one.pooled.astype(np.float64) for one in self.features(after_NHWC)]

        def difference(counts_N: np.ndarray) -> float:
            steps = [
                metrics.frechet_distance(_weighted(a, counts_N), r)
                - metrics.frechet_distance(_weighted(b, counts_N), r)
                for r, b, a in zip(real, before, after)
            ]
            return float(np.mean(steps))

        count = len(before_NHWC)
        rng = np.random.default_rng(seed)
        spread = [difference(rng.multinomial(count, [1 / count] * count)) for _ in range(draws)]
        return {
            "fd_difference": difference(np.ones(count)),
            "fd_difference_sd": float(np.std(spread, ddof=1)),
            "fd_difference_interval": np.quantile(spread, (0.025, 0.975)).tolist(),
            "n": count,
            "draws": draws,
        }

    def real_halves(self, splits: int = 20, seed: int = 0) -> dict[str, Any]:
        """The same scores between random halves of the real pictures: what a perfect model gets.

        Returns:
          Mean over `splits` and, as `<score>_sd`, the standard deviation of one split; both
          averaged over extractors, and per extractor under `extractors`; `n`, `reference_n`.
        """
        return _real_halves(self, splits, seed)

    def memorization(self, images_NHWC: np.ndarray) -> dict[str, Any]:
        """Whether samples lie nearer to the training pictures than real unseen ones do.

        Args:
          images_NHWC: uint8 [N, 32, 32, 3].

        Returns:
          For the samples and, under `held_out`, for the unseen half: `to_train`, `to_held` (median
          root-mean-square pixel distance on 0..1 to the nearest picture of that half, never
          itself), `closer_to_train` (share; one half is what no memory gives) and `copies` (share
          nearer to a training picture than all but one in a hundred of the unseen ones are).
        """
        data = self.data()
        train, held = _pixels(data.train_images), _pixels(data.held_images)
        samples = _pixels(images_NHWC)
        held_to_train = metrics.nearest_distance(held, train)
        limit = float(np.quantile(held_to_train, 0.01))

        def summary(to_train: np.ndarray, to_held: np.ndarray) -> dict[str, float]:
            return {
                "to_train": float(np.median(to_train)),
                "to_held": float(np.median(to_held)),
                "closer_to_train": float(np.mean(to_train < to_held)),
                "copies": float(np.mean(to_train < limit)),
            }

        found = (metrics.nearest_distance(samples, train), metrics.nearest_distance(samples, held))
        baseline = (held_to_train, metrics.nearest_distance(held, held, skip_itself=True))
        return {**summary(*found), "n": len(samples), "held_out": summary(*baseline)}


@functools.cache
def _extractors(asset: str) -> Extractors:
    path = importlib.resources.files("vqjax.assets").joinpath(asset)
    if not path.is_file():
        raise VqjaxError(
            f"this installation has no vqjax/assets/{asset}; install the package again, or train "
            f"it: python -m vqjax.train.extractors"
        )
    content = path.read_bytes()
    header_size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + header_size])["__metadata__"]
    params: dict[str, dict[str, jax.Array]] = {}
    for name, array in safetensors.numpy.load(content).items():
        owner, _, rest = name.partition("/")
        params.setdefault(owner, {})[rest] = jnp.asarray(array, jnp.float32)
    return Extractors(
        params=tuple(params[owner] for owner in sorted(params)),
        accuracies=tuple(json.loads(metadata["extractors"])),
        sha256=hashlib.sha256(content).hexdigest(),
    )


@functools.cache
def _real_halves(judge: Judge, splits: int, seed: int) -> dict[str, Any]:
    real = _reference_features(judge, "all")
    labels_R = _reference(judge, "all")[1]
    rng = np.random.default_rng(seed)
    half = len(labels_R) // 2
    orders = [rng.permutation(len(labels_R)) for _ in range(splits)]
    each = []
    for one in real:
        rows = [
            _scores(_take(one, order[half:]), _take(one, order[:half]), labels_R[order[:half]])
            for order in orders
        ]
        means = {score: float(np.mean([row[score] for row in rows])) for score in SCORES}
        spread = {f"{score}_sd": float(np.std([row[score] for row in rows])) for score in SCORES}
        each.append(means | spread)
    return {
        **{key: float(np.mean([one[key] for one in each])) for key in each[0]},
        "n": half,
        "reference_n": len(labels_R) - half,
        "splits": splits,
        "extractors": each,
    }


def _scores(real: Rows, found: Rows, labels_N: np.ndarray) -> dict[str, float]:
    precision, recall = metrics.precision_recall(real.pooled, found.pooled)
    fd, sfd = (
        metrics.frechet_distance(metrics.moments(b), metrics.moments(a))
        for a, b in ((real.pooled, found.pooled), (real.spatial, found.spatial))
    )
    return {
        "fd": fd,
        "sfd": sfd,
        "is": metrics.inception_score(found.logits, split=len(found.logits)),
        "precision": precision,
        "recall": recall,
        "accuracy": metrics.accuracy(found.logits, labels_N),
    }


def _weighted(rows_NF: np.ndarray, counts_N: np.ndarray) -> metrics.Moments:
    """Moments of rows that occur `counts_N` times each, without repeating them."""
    total = counts_N.sum()
    mean = counts_N @ rows_NF / total
    centred = rows_NF - mean
    covariance = (centred * counts_N[:, None]).T @ centred / (total - 1)
    return metrics.Moments(mean, covariance, int(total))


def _take(rows: Rows, order: np.ndarray) -> Rows:
    return Rows(*(array[order] for array in rows))


def _pixels(images_NHWC: np.ndarray) -> np.ndarray:
    """Grey rows whose Euclidean distance is the root mean square difference on 0..1."""
    grey = images_NHWC.astype(np.float32).mean(-1).reshape(len(images_NHWC), -1) / 255
    return grey / np.float32(np.sqrt(grey.shape[1]))


def _reference(judge: Judge, reference: Reference) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the pictures that samples are compared with."""
    data = judge.data()
    halves = {
        "train": (data.train_images, data.train_labels),
        "held": (data.held_images, data.held_labels),
    }
    if reference == "all":
        images, labels = zip(*halves.values())
        return np.concatenate(images), np.concatenate(labels)
    if reference not in halves:
        raise VqjaxError(f"reference must be all, train or held, found {reference!r}")
    return halves[reference]


@functools.cache
def _reference_features(judge: Judge, reference: Reference) -> list[Rows]:
    return judge.features(_reference(judge, reference)[0])


@jax.jit
def _apply(params: dict[str, jax.Array], images_BHWC: jax.Array) -> extractor.Features:
    return extractor.apply(params, images_BHWC.astype(jnp.float32) / 127.5 - 1)


def _features(params: dict[str, jax.Array], images_NHWC: np.ndarray) -> Rows:
    """One compilation serves every N: the last batch is filled up with black and cut off."""
    parts = []
    for start in range(0, len(images_NHWC), _BATCH):
        batch = images_NHWC[start : start + _BATCH]
        filler = np.zeros((_BATCH - len(batch), *batch.shape[1:]), np.uint8)
        rows = _apply(params, np.concatenate([batch, filler]))
        parts.append([np.asarray(array)[: len(batch)] for array in rows])
    pooled, spatial, logits = (np.concatenate(arrays) for arrays in zip(*parts))
    return Rows(pooled, spatial, logits)
