# SPDX-License-Identifier: Apache-2.0
"""Scores of a set of samples from features, in numpy: the part that is the same for any extractor.
Distances between rows are left to a GPU where programs run on one (`vqjax.eval.nearest`).

Frechet distance (Heusel et al. 2017, arXiv 1706.08500), inception score (Salimans et al. 2016,
1606.03498), precision and recall (Kynkaanniemi et al. 2019, 1904.06991). Definitions follow the
evaluator of guided-diffusion (docs/evaluation.md); everything after the features is float64,
distances float32.

Dimension key:  N samples   R reference samples   F features   K classes   B rows of a block
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from scipy.linalg.blas import dsyrk  # pyright: ignore[reportAttributeAccessIssue]

from vqjax.errors import VqjaxError
from vqjax.eval import nearest

NEIGHBOURS = 3
INCEPTION_SPLIT = 5000
_BLOCK_VALUES = 1 << 25  # distances in memory at once: 128 MB
_INFLUENCE_ROWS = 2048
_SORTED_SHARE = 0.9  # of the classes that a split of shuffled rows would hold


class Moments(NamedTuple):
    """Mean float64 [F] and unbiased covariance float64 [F, F] of `count` feature rows.

    `count` is 0 where stored statistics do not say how many rows they were made of.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int


@dataclasses.dataclass
class Accumulator:
    """Mean and covariance of feature rows that arrive in batches.

    Batches are merged by their means and centred products (Chan et al. 1979), so large means do
    not cancel and the result does not depend on the batch size beyond rounding.
    """

    count: int = 0
    mean: np.ndarray | float = 0.0
    _upper: np.ndarray | None = dataclasses.field(default=None, init=False, repr=False)

    def add(self, rows_NF: np.ndarray) -> None:
        """Takes one batch, any float dtype, at least one row."""
        rows = _rows(rows_NF, "features")
        mean_F = rows.mean(0, dtype=np.float64)
        total = self.count + len(rows)
        step = mean_F - self.mean
        centred = np.empty((len(rows) + 1, rows.shape[1]))
        np.subtract(rows, mean_F, out=centred[:-1])
        # What lies between the means is one more row of the same product.
        centred[-1] = step * (self.count * len(rows) / total) ** 0.5
        if self._upper is None:
            self._upper = np.zeros((rows.shape[1],) * 2, order="F")
        # Half of a symmetric product, added in place: with NumPy's every batch would be mirrored.
        self._upper = dsyrk(1.0, centred.T, 1.0, self._upper, overwrite_c=True)
        self.mean = self.mean + step * (len(rows) / total)
        self.count = total

    def moments(self) -> Moments:
        """Raises VqjaxError below two rows, where a covariance does not exist."""
        if self._upper is None or self.count < 2:
            raise VqjaxError(f"covariance needs at least 2 feature rows, found {self.count}")
        covariance = self._upper + self._upper.T
        covariance[np.diag_indices_from(covariance)] /= 2
        covariance /= self.count - 1
        return Moments(np.asarray(self.mean), covariance, self.count)


def moments(rows_NF: np.ndarray) -> Moments:
    """Mean and unbiased covariance of all rows at once."""
    accumulator = Accumulator()
    accumulator.add(rows_NF)
    return accumulator.moments()


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean difference|^2 + tr(A) + tr(B) - 2 tr((A B)^1/2).

    The last trace is the sum of the roots of the eigenvalues of A^1/2 B A^1/2, which is symmetric:
    no complex parts appear, and rank-deficient covariances need no added diagonal.

    Raises:
      VqjaxError: if the feature dimensions differ or a value is not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise VqjaxError(f"features of {a.mean.size} and {b.mean.size} dimensions do not compare")
    if not all(np.isfinite(array).all() for array in (*a[:2], *b[:2])):
        raise VqjaxError("feature statistics hold NaN or infinity: the samples are broken")
    product = _between_roots(_root(a.covariance), b.covariance)
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(product), 0)).sum()
    step = a.mean - b.mean
    return float(step @ step + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared)


def frechet_error(rows_NF: np.ndarray, samples: Moments, reference: Moments) -> float | None:
    """Standard error of the Frechet distance that sampling N rows leaves, the reference fixed.

    Delta method: the sd over rows of the distance's first-order response to one row, over sqrt(N).
    With m, S the samples' moments, R the root of the reference's covariance and step d,
    row x moves the distance by 2 d (x - m) + (x - m)' G (x - m) - tr(G S), where
    G = 1 - R (R S R)^-1/2 R. The bias, which falls like 1/N, is not part of it.

    Args:
      rows_NF: the samples' features, any float dtype.
      samples: their moments.
      reference: what the distance is taken to.

    Returns:
      None where N <= F (the covariance has no inverse) or no feature varies in both sets.
    """
    if samples.count <= samples.mean.size:
        return None
    root = _root(reference.covariance)
    values, vectors = np.linalg.eigh(_between_roots(root, samples.covariance))
    if values[-1] <= 0:
        return None
    # Below rounding a direction hardly varies in either set, so whatever stands there is harmless.
    values = np.maximum(values, values[-1] * samples.mean.size * np.finfo(np.float64).eps)
    half = root @ vectors
    response_FF = np.eye(samples.mean.size) - half / np.sqrt(values) @ half.T
    step = samples.mean - reference.mean
    parts = []
    for start in range(0, samples.count, _INFLUENCE_ROWS):
        centred = np.asarray(rows_NF[start : start + _INFLUENCE_ROWS], np.float64) - samples.mean
        parts.append(2 * centred @ step + np.einsum("nf,nf->n", centred @ response_FF, centred))
    return float(np.concatenate(parts).std() / np.sqrt(samples.count))


@dataclasses.dataclass
class SplitScores:
    """Inception score of logits that arrive in batches; consecutive splits of `split` rows."""

    split: int = INCEPTION_SPLIT
    _counts: list[int] = dataclasses.field(default_factory=list, init=False, repr=False)
    _sums: list[np.ndarray] = dataclasses.field(default_factory=list, init=False, repr=False)
    _negentropies: list[float] = dataclasses.field(default_factory=list, init=False, repr=False)

    def add(self, logits_NK: np.ndarray) -> None:
        """Takes one batch of rows before the softmax, any float dtype."""
        logits = _matrix(logits_NK, "logits")
        log_p_NK = logits - logits.max(1, keepdims=True)
        log_p_NK = log_p_NK - np.log(np.exp(log_p_NK).sum(1, keepdims=True))
        while len(log_p_NK):
            if not self._counts or self._counts[-1] == self.split:
                self._counts.append(0)
                self._sums.append(np.zeros(log_p_NK.shape[1]))
                self._negentropies.append(0.0)
            part = log_p_NK[: self.split - self._counts[-1]]
            p = np.exp(part)
            self._counts[-1] += len(part)
            self._sums[-1] += p.sum(0)
            self._negentropies[-1] += float((p * part).sum())  # log p is finite where p is 0
            log_p_NK = log_p_NK[len(part) :]

    def scores(self) -> np.ndarray:
        """exp(mean KL(p(class | x) || p(class))) of every split, float64 [splits]."""
        scores = []
        for count, sum_K, negentropy in zip(self._counts, self._sums, self._negentropies):
            mean_K = sum_K / count
            # A class that no sample has gives 0 * log 0, which is 0.
            log_K = np.log(np.maximum(mean_K, np.finfo(np.float64).tiny))
            scores.append(np.exp(negentropy / count - (mean_K * log_K).sum()))
        return np.array(scores)


def inception_score(logits_NK: np.ndarray, *, split: int = INCEPTION_SPLIT) -> float:
    """Mean over consecutive splits of exp(mean KL(p(class | x) || p(class))).

    Args:
      logits_NK: before the softmax; rows in random class order (each split is scored alone).
      split: rows per split; the last one may be shorter.
    """
    collected = SplitScores(split)
    collected.add(logits_NK)
    return float(collected.scores().mean())


def sorted_by_class(labels_N: np.ndarray, *, split: int = INCEPTION_SPLIT) -> bool:
    """Whether splits of consecutive rows hold clearly fewer classes than splits of shuffled rows.

    Compared are exp(entropy of the labels within a split), the number of classes where all are
    equally frequent. An inception score in such splits says nothing about the samples.
    """
    labels = np.unique(np.asarray(labels_N), return_inverse=True)[1]
    if len(labels) <= split:
        return False
    shuffled = np.random.default_rng(0).permutation(labels)
    share = _classes_in_splits(labels, split) / _classes_in_splits(shuffled, split)
    return bool(share < _SORTED_SHARE)


def precision_recall(
    reference_RF: np.ndarray, samples_NF: np.ndarray, *, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Shares of samples inside the reference manifold, and of references inside the samples' one.

    A set's manifold is the union of balls about its points that reach to the third neighbour.
    Squared distances are float32; the evaluator's are float16 and move a few samples. Memory
    beside the features does not grow with the sets: distances are made block by block.

    Returns:
      (precision, recall), both in [0, 1].

    Raises:
      VqjaxError: if a set has no more than `neighbours` rows or the dimensions differ.
    """
    reference = np.asarray(reference_RF, np.float32)
    samples = np.asarray(samples_NF, np.float32)
    if reference.shape[1:] != samples.shape[1:]:
        raise VqjaxError(f"features {reference.shape} and {samples.shape} do not compare")
    precision = inside(samples, reference, radii(reference, neighbours=neighbours))
    recall = inside(reference, samples, radii(samples, neighbours=neighbours))
    return float(precision.mean()), float(recall.mean())


def radii(rows_NF: np.ndarray, *, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """Squared distance float32 [N] from each row to its n-th neighbour in the same set."""
    if len(rows_NF) <= neighbours:
        raise VqjaxError(f"{neighbours} neighbours need more than {len(rows_NF)} rows of features")
    # Each row is its own nearest neighbour at distance 0, hence index n and not n - 1.
    return _nth_nearest(rows_NF, rows_NF, neighbours)


def inside(rows_NF: np.ndarray, centres_RF: np.ndarray, radii_R: np.ndarray) -> np.ndarray:
    """Bool [N]: whether a row is within the ball of at least one centre."""
    if _on_gpu():
        return nearest.inside(rows_NF, centres_RF, radii_R, block=_block_rows(centres_RF))
    blocks = _distance_blocks(rows_NF, centres_RF)
    return np.concatenate([(block <= radii_R).any(1) for block in blocks])


def accuracy(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Share of samples whose largest logit is the class that was asked for."""
    if len(logits_NK) != len(labels_N):
        raise VqjaxError(f"{len(logits_NK)} rows of logits, {len(labels_N)} labels")
    return float(np.mean(np.argmax(logits_NK, 1) == np.asarray(labels_N)))


def standard_error(values_N: np.ndarray) -> float:
    """Standard error of a mean, as a bootstrap of many draws has it; 0 of fewer than two values."""
    if values_N.size < 2:
        return 0.0
    return float(np.std(values_N, ddof=1) / values_N.size**0.5)


def nearest_distance(
    rows_NF: np.ndarray, others_RF: np.ndarray, *, skip_itself: bool = False
) -> np.ndarray:
    """Euclidean distance float32 [N] to the nearest of the others.

    Args:
      skip_itself: both arguments are one set, and a row does not count as its own neighbour.
    """
    return np.sqrt(_nth_nearest(rows_NF, others_RF, 1 if skip_itself else 0))


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _block_rows(others_RF: np.ndarray) -> int:
    return max(1, _BLOCK_VALUES // len(others_RF))


def _nth_nearest(rows_NF: np.ndarray, others_RF: np.ndarray, index: int) -> np.ndarray:
    """Squared distance float32 [N] to the others, the index-th smallest from 0 on."""
    if _on_gpu():
        return nearest.nth(rows_NF, others_RF, index, block=_block_rows(others_RF))
    parts = []
    for block_BR in _distance_blocks(rows_NF, others_RF):
        block_BR.partition(index, axis=1)  # in place: a block is the largest array there is
        parts.append(block_BR[:, index].copy())
    return np.concatenate(parts)


def _distance_blocks(rows_NF: np.ndarray, others_RF: np.ndarray) -> Iterator[np.ndarray]:
    """Yields squared distances float32 [B, R]; one block at a time bounds the memory."""
    others = np.asarray(others_RF, np.float32)
    norms_R = np.einsum("rf,rf->r", others, others)
    step = _block_rows(others)
    for start in range(0, len(rows_NF), step):
        rows = np.asarray(rows_NF[start : start + step], np.float32)
        norms_B = np.einsum("bf,bf->b", rows, rows)
        block_BR = rows @ others.T
        block_BR *= -2  # in place: at 10,000 by 10,000 the temporaries cost more than the product
        block_BR += norms_B[:, None]
        block_BR += norms_R
        yield np.maximum(block_BR, 0, out=block_BR)


def _root(covariance_FF: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance_FF)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def _between_roots(root_FF: np.ndarray, covariance_FF: np.ndarray) -> np.ndarray:
    product = root_FF @ covariance_FF @ root_FF
    return (product + product.T) / 2


def _classes_in_splits(labels_N: np.ndarray, split: int) -> float:
    """exp(mean entropy of the labels in a split), every row counting the same."""
    total = 0.0
    for start in range(0, len(labels_N), split):
        counts = np.bincount(labels_N[start : start + split])
        counts = counts[counts > 0]
        total -= float((counts * np.log(counts / counts.sum())).sum())
    return float(np.exp(total / len(labels_N)))


def _matrix(rows: np.ndarray, what: str) -> np.ndarray:
    return np.asarray(_rows(rows, what), np.float64)


def _rows(rows: np.ndarray, what: str) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.ndim != 2 or rows.size == 0:
        raise VqjaxError(f"{what} must be rows of a matrix, found shape {rows.shape}")
    return rows
