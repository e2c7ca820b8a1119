# SPDX-License-Identifier: Apache-2.0
"""What the report says of each layer beyond its error on calibration inputs.

Held-out inputs come from trajectories of their own: other noise, other classes where there are
enough, and mostly other timesteps. They see the full-precision model, as calibration does. Layers
that see the timestep or the class alone have nothing that calibration has not seen.

Dimension key:  O outputs   N fan-in
"""

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from vqjax import progress
from vqjax.config import LatentDiffusionConfig
from vqjax.core import grouping, tree
from vqjax.core.bits import StoredBits, entropy_coded_bits
from vqjax.core.moments import Moment, output_energy
from vqjax.core.rate import relative_bound
from vqjax.core.tensor import VQTensor
from vqjax.pipeline import calibrate, timesteps
from vqjax.pipeline.journal import Journal
from vqjax.settings import Calibration

if TYPE_CHECKING:
    from vqjax.pipeline.quantize import Job, Layers

BOUND_FAN_IN = 4608
"""Widest layer whose eigenvalues are taken: half a minute on one core, and cubic from there."""

SMALL_MODEL_IMAGES, LARGE_MODEL_IMAGES = 16, 4
_SEED = 2_000_003  # added to the seed: neither calibration nor the report's pictures have it


class Search(NamedTuple):
    """What compressing a layer showed, kept with its tensor.

    Attributes:
      seconds: of the search, compilation included, beside what else ran.
      codes_entropy: stored bits per weight if the codes took their empirical entropy.
      bound: least relative output error of Gaussian weights at the layer's stored bits, on the
        moment that its error is measured with; None above `BOUND_FAN_IN`.
    """

    seconds: float
    codes_entropy: float
    bound: float | None


class LayerErrors(NamedTuple):
    """Relative output errors on some inputs: of the layer, and of the scalar baseline."""

    quantized: float
    scalar: float


def of_search(
    tensor: VQTensor,
    stored: StoredBits,
    moment_NN: np.ndarray,
    share: float,
    seconds: float,
) -> Search:
    """Figures of a finished search.

    Args:
      stored: what the tensor stores, by part.
      moment_NN: what the error of the layer is measured with.
      share: of the layer's output energy that `moment_NN` makes; below 1 where it is centred.
      seconds: of the search.
    """
    bound = None
    if len(moment_NN) <= BOUND_FAN_IN:
        spectrum_N = np.linalg.eigvalsh(np.asarray(moment_NN, np.float64))
        bound = share * relative_bound(spectrum_N, tensor.bits_per_weight)
    return Search(seconds, codes_entropy(tensor, stored), bound)


def codes_entropy(tensor: VQTensor, stored: StoredBits) -> float:
    """Stored bits per weight if the codes took their empirical entropy."""
    return entropy_coded_bits(jax.device_get(tensor).unpack(), stored)


def held_out_settings(config: LatentDiffusionConfig, calibration: Calibration) -> Calibration:
    """Trajectories to test on: few of them, half the steps, as many at a time as there are.

    A U-Net call of a large model takes seconds, and a mean over few images tells errors apart.
    """
    images = min(calibration.images, SMALL_MODEL_IMAGES if config.small else LARGE_MODEL_IMAGES)
    steps = calibration.steps // 2 + 1  # no divisor of the steps: these are mostly other timesteps
    return dataclasses.replace(calibration, images=images, steps=steps, batch=images)


def held_out(job: "Job", journal: Journal, done: "Layers") -> dict[str, LayerErrors]:
    """Errors of all layers on held-out inputs, in passes as long as memory allows; resumable."""
    visited = _trajectories(job, journal)
    weights_T = timesteps.at(journal, visited[1])
    weights_T /= weights_T.mean()  # moments are means where weights have the mean 1
    sizes = {path: job.sizes[path] for path in job.plan}
    groups = calibrate.batches(sizes, job.division.moments)
    calls = len(visited[1])
    found: dict[str, LayerErrors] = {}
    with progress.stage("held-out", calls * len(groups)) as advance:
        for index, paths in enumerate(groups):
            piece = f"held-out-{index}-{job.course}"
            kept = journal.load(piece)
            if kept is None:
                moments = calibrate.second_moments(
                    job.model, [visited], paths=paths, weights_T=weights_T, on_step=advance
                )
                made = {path: errors(job, done, path, moments[path]) for path in paths}
                journal.store(piece, {}, made)
                del moments
            else:
                made = {path: LayerErrors(*values) for path, values in kept[1].items()}
                advance(calls)
            found |= made
    return found


def _trajectories(job: "Job", journal: Journal) -> tuple:
    wanted = held_out_settings(job.model.config, job.settings.calibration)
    found = journal.load("held-out-trajectories")
    if found is None:
        seed = job.settings.seed + _SEED
        first = job.settings.calibration.images
        ((x, t, ids),) = calibrate.trajectories(job.model, wanted, seed, first)
        arrays = {"x": x, "t": t} | ({} if ids is None else {"ids": np.asarray(ids)})
        journal.store("held-out-trajectories", arrays, {})
        found = arrays, {}
    return found[0]["x"], found[0]["t"], found[0].get("ids")


def errors(job: "Job", done: "Layers", path: str, moment: Moment) -> LayerErrors:
    """Errors of a layer, its bias included, on the inputs of a moment."""
    flat = tree.flatten(job.model.params)
    w_ON = grouping.to_matrix(np.asarray(flat[path], np.float32))
    bias = f"{path.removesuffix('kernel')}bias"
    shift_O = 0.0
    if bias in done.biases:
        shift_O = np.asarray(flat[bias], np.float64) - done.biases[bias]
    quantized_ON = done.quantized[path].host_matrix()
    scalar_ON = grouping.to_matrix(np.asarray(done.scalar[path].kernel))
    whole, ours, scalar = (
        output_energy(matrix_ON, d_O, moment.second_NN, moment.mean_N)
        for matrix_ON, d_O in ((w_ON, 0.0), (w_ON - quantized_ON, shift_O), (w_ON - scalar_ON, 0.0))
    )
    scale = whole if whole > 0 else 1.0
    return LayerErrors(ours / scale, scalar / scale)
