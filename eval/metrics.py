# SPDX-License-Identifier: Apache-2.0
"""Scores of a set of samples from features, in numpy: the part that is the same for any extractor.

Frechet distance (Heusel et al. 2017, arXiv 1706.08500), inception score (Salimans et al. 2016,
1606.03498), precision and recall (Kynkaanniemi et al. 2019, 1904.06991). Definitions follow the
evaluator of guided-diffusion; everything after the features is float64, distances float32.

Dimension key:  N samples   R reference samples   F features   K classes   B rows of a block
"""

import dataclasses
from typing import NamedTuple

import numpy as np

NEIGHBOURS = 3
INCEPTION_SPLIT = 5000
_BLOCK_ROWS = 2048


class Moments(NamedTuple):
    """Mean float64 [F] and unbiased covariance float64 [F, F] of `count` feature rows."""

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
    scatter: np.ndarray | float = 0.0

    def add(self, rows_NF: np.ndarray) -> None:
        """Takes one batch, any float dtype, at least one row."""
        rows = _matrix(rows_NF, "features")
        mean_F = rows.mean(0)
        centred = rows - mean_F
        total = self.count + len(rows)
        step = mean_F - self.mean
        between = np.outer(step, step) * (self.count * len(rows) / total)
        self.scatter = self.scatter + centred.T @ centred + between
        self.mean = self.mean + step * (len(rows) / total)
        self.count = total

    def moments(self) -> Moments:
        """Raises ValueError below two rows, where a covariance does not exist."""
        if self.count < 2:
            raise ValueError(f"covariance needs at least 2 feature rows, found {self.count}")
        covariance = np.asarray(self.scatter) / (self.count - 1)
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
      ValueError: if the feature dimensions differ or a value is not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {a.mean.size} and {b.mean.size} dimensions do not compare")
    if not all(np.isfinite(array).all() for array in (*a[:2], *b[:2])):
        raise ValueError("feature statistics hold NaN or infinity: the samples are broken")
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    product = root @ b.covariance @ root
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)).sum()
    step = a.mean - b.mean
    return float(step @ step + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared)


def inception_score(logits_NK: np.ndarray, *, split: int = INCEPTION_SPLIT) -> float:
    """Mean over consecutive splits of exp(mean KL(p(class | x) || p(class))).

    Args:
      logits_NK: before the softmax; rows in random class order (each split is scored alone).
      split: rows per split; the last one may be shorter.
    """
    logits = _matrix(logits_NK, "logits")
    log_p_NK = logits - logits.max(1, keepdims=True)
    log_p_NK = log_p_NK - np.log(np.exp(log_p_NK).sum(1, keepdims=True))
    scores = []
    for start in range(0, len(log_p_NK), split):
        part = log_p_NK[start : start + split]
        p = np.exp(part)
        # A class that no sample has gives 0 * log 0; its p is 0 as well, so any finite log serves.
        log_mean_K = np.log(np.maximum(p.mean(0), np.finfo(np.float64).tiny))
        scores.append(np.exp((p * (part - log_mean_K)).sum(1).mean()))
    return float(np.mean(scores))


def precision_recall(
    reference_RF: np.ndarray, samples_NF: np.ndarray, *, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Shares of samples inside the reference manifold, and of references inside the samples' one.

    A set's manifold is the union of balls about its points that reach to the third neighbour.
    Squared distances are float32; the evaluator's float16 differs by a sample or two.

    Returns:
      (precision, recall), both in [0, 1].

    Raises:
      ValueError: if a set has no more than `neighbours` rows or the dimensions differ.
    """
    reference = np.asarray(reference_RF, np.float32)
    samples = np.asarray(samples_NF, np.float32)
    if reference.shape[1:] != samples.shape[1:]:
        raise ValueError(f"features {reference.shape} and {samples.shape} do not compare")
    precision = inside(samples, reference, radii(reference, neighbours=neighbours))
    recall = inside(reference, samples, radii(samples, neighbours=neighbours))
    return float(precision.mean()), float(recall.mean())


def radii(rows_NF: np.ndarray, *, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """Squared distance float32 [N] from each row to its n-th neighbour in the same set."""
    if len(rows_NF) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more than {len(rows_NF)} rows of features")
    # Each row is its own nearest neighbour at distance 0, hence index n and not n - 1.
    parts = [
        np.partition(block, neighbours, axis=1)[:, neighbours]
        for block in _distance_blocks(rows_NF, rows_NF)
    ]
    return np.concatenate(parts)


def inside(rows_NF: np.ndarray, centres_RF: np.ndarray, radii_R: np.ndarray) -> np.ndarray:
    """Bool [N]: whether a row is within the ball of at least one centre."""
    blocks = _distance_blocks(rows_NF, centres_RF)
    return np.concatenate([(block <= radii_R).any(1) for block in blocks])


def accuracy(logits_NK: np.ndarray, labels_N: np.ndarray) -> float:
    """Share of samples whose largest logit is the class that was asked for."""
    if len(logits_NK) != len(labels_N):
        raise ValueError(f"{len(logits_NK)} rows of logits, {len(labels_N)} labels")
    return float(np.mean(np.argmax(logits_NK, 1) == np.asarray(labels_N)))


def nearest_distance(
    rows_NF: np.ndarray, others_RF: np.ndarray, *, skip_itself: bool = False
) -> np.ndarray:
    """Euclidean distance float32 [N] to the nearest of the others.

    Args:
      skip_itself: both arguments are one set, and a row does not count as its own neighbour.
    """
    index = 1 if skip_itself else 0
    blocks = _distance_blocks(rows_NF, others_RF)
    nearest = [np.partition(block, index, axis=1)[:, index] for block in blocks]
    return np.sqrt(np.concatenate(nearest))


def _distance_blocks(rows_NF: np.ndarray, others_RF: np.ndarray):
    """Yields squared distances float32 [B, R]; one block at a time bounds the memory."""
    others = np.asarray(others_RF, np.float32)
    norms_R = np.einsum("rf,rf->r", others, others)
    for start in range(0, len(rows_NF), _BLOCK_ROWS):
        rows = np.asarray(rows_NF[start : start + _BLOCK_ROWS], np.float32)
        norms_B = np.einsum("bf,bf->b", rows, rows)
        block_BR = rows @ others.T
        block_BR *= -2  # in place: at 10,000 by 10,000 the temporaries cost more than the product
        block_BR += norms_B[:, None]
        block_BR += norms_R
        yield np.maximum(block_BR, 0, out=block_BR)


def _matrix(rows: np.ndarray, what: str) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    if rows.ndim != 2 or rows.size == 0:
        raise ValueError(f"{what} must be rows of a matrix, found shape {rows.shape}")
    return rows
