# SPDX-License-Identifier: Apache-2.0
"""Ranges of every layer's input, from the full-precision model's own trajectories.

Dimension key:  B batch   H W latent   C channels   T trajectory steps   L layers
                F candidate ranges

The trajectories are walked twice: first for the least and the largest number that each layer reads
at each timestep, then for the squared error of a part of its inputs in a few ranges within those
(`core.activations`). The range of least error, summed over all batches, is kept. Memory beyond the
model's own is a few numbers per layer, timestep and candidate. Layers that see the class alone are
shown all classes instead, half of the rows having none, as under guidance.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.config import LatentDiffusionConfig
from vqjax.core import cores
from vqjax.core.activations import (
    TRIED,
    Activations,
    candidate_ranges,
    layer_bits,
    range_bytes,
    squared_errors,
)
from vqjax.core.host import to_device
from vqjax.core.model import Model
from vqjax.core.plan import kernel_shapes
from vqjax.errors import gathered
from vqjax.pipeline import calibrate
from vqjax.sampling.schedule import ddim_schedule
from vqjax.settings import Calibration


def calls(visited: Sequence[tuple]) -> int:
    """How often `observe` calls the U-Net, and its `on_step`."""
    return 2 * sum(len(t_T) for _, t_T, _ in visited)


def stored_bytes(
    config: LatentDiffusionConfig, shapes: Mapping[str, tuple[int, ...]], wanted: Calibration
) -> int:
    """Bytes of what `observe` will return.

    Args:
      shapes: of all parameters, by path.
      wanted: what the trajectories follow.
    """
    timesteps = len(ddim_schedule(config, wanted.steps).timesteps)
    return range_bytes(len(kernel_shapes(shapes)), timesteps)


def observe(
    model: Model, visited: Sequence[tuple], bits: int, on_step: Callable[[], None] = lambda: None
) -> Activations:
    """The ranges of least squared error for the inputs of every Dense and Conv of the U-Net.

    Args:
      model: in full precision, folded as the quantized one will be.
      visited: from `calibrate.trajectories`; the classes' inputs are those of both guidance
        branches.
      bits: of most layers; see `Activations.bits_of`.
      on_step: called after each U-Net call.

    Returns:
      One row per timestep of the trajectories, zero points whole. Layers that see the class alone
      have one range for all timesteps, and of all classes: trajectories show few of a thousand.

    Raises:
      VqjaxError: names layers whose inputs are NaN or infinite.
    """
    config, t_T = model.config, np.asarray(visited[0][1])
    sizes = calibrate.trace_layers(config, model.params)
    classed = sorted(calibrate.class_layers(config, sizes))
    others = sorted(sizes.keys() - classed)
    points = [
        _Point(step, x_BHWC, t, ids_B)
        for x_TBHWC, t_T, ids_B in visited
        for step, (x_BHWC, t) in enumerate(zip(x_TBHWC, t_T))
    ]
    found = _least_errors(model, others, points, len(t_T), bits, on_step)
    if classed:
        ids_B = jnp.arange(config.null_class, dtype=jnp.int32)
        nothing = np.zeros((len(ids_B), *config.latent_shape), np.float32)
        point = _Point(0, nothing, t_T[0], ids_B)
        for table, more in zip(found, _least_errors(model, classed, [point], 1, bits)):
            table |= {path: np.repeat(row_1, len(t_T)) for path, row_1 in more.items()}
    step, zero = found
    order_T = np.argsort(t_T)
    return Activations(
        timesteps_T=jnp.asarray(t_T[order_T], jnp.int32),
        log2_steps={path: to_device(np.log2(step[path][order_T])) for path in sorted(step)},
        zeros={path: to_device(zero[path][order_T]) for path in sorted(zero)},
        bits=bits,
    )


_Layers = tuple[tuple[str, int], ...]
"""Paths of layers and the bits of their inputs."""


class _Point(NamedTuple):
    """A call of the U-Net in both guidance branches; `step` is its row in the tables."""

    step: int
    x_BHWC: np.ndarray
    t: int
    ids_B: jax.Array | None


def _least_errors(
    model: Model,
    paths: Sequence[str],
    points: Sequence[_Point],
    steps: int,
    bits: int,
    on_step: Callable[[], None] = lambda: None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Steps and zero points of the layers `paths`, by path, float32 [T], T being `steps`."""
    config = model.config
    layers_bits = [layer_bits(path, bits) for path in paths]

    layers = tuple(zip(paths, layers_bits))

    low_TL = np.full((steps, len(paths)), np.inf, np.float32)
    high_TL = -low_TL
    for step, ends_L2 in _walk(model, points, lambda step, *call: _ends(config, layers, *call)):
        low_TL[step] = np.minimum(low_TL[step], ends_L2[:, 0])
        high_TL[step] = np.maximum(high_TL[step], ends_L2[:, 1])
        on_step()
    _check_finite(paths, low_TL, high_TL)

    ranges = [candidate_ranges(low_TL[:, i], high_TL[:, i], b) for i, b in enumerate(layers_bits)]
    step_FTL, zero_FTL = (np.stack(tables, axis=2) for tables in zip(*ranges))
    error_FTL = np.zeros_like(step_FTL, np.float64)

    def errors_at(step: int, *call: Any) -> jax.Array:
        return _errors(config, layers, *call, step_FTL[:, step], zero_FTL[:, step])

    for step, error_FL in _walk(model, points, errors_at):
        error_FTL[:, step] += error_FL
        on_step()
    best_1TL = np.argmin(error_FTL, axis=0)[None]
    step_TL, zero_TL = (
        np.take_along_axis(table_FTL, best_1TL, axis=0)[0].astype(np.float32)
        for table_FTL in (step_FTL, zero_FTL)
    )
    return dict(zip(paths, step_TL.T)), dict(zip(paths, zero_TL.T))


# Of both programs the compiler leaves out what no layer reads.
@functools.partial(jax.jit, static_argnames=("config", "layers"))
def _ends(config: LatentDiffusionConfig, layers: _Layers, params, x_BHWC, t, ids_B) -> jax.Array:
    """Least and largest input of each layer in one call of the U-Net, [L, 2]."""

    def reduce(path, x, window):
        del window
        if path not in dict(layers):
            return None
        return jnp.stack([jnp.min(x), jnp.max(x)]).astype(jnp.float32)

    found = calibrate.capture_branches(config, params, x_BHWC, t, ids_B, reduce)
    return jnp.stack([found[path] for path, _ in layers])


@functools.partial(jax.jit, static_argnames=("config", "layers"))
def _errors(
    config: LatentDiffusionConfig, layers: _Layers, params, x_BHWC, t, ids_B, step_FL, zero_FL
) -> jax.Array:
    """Squared errors of the layers' inputs in one call of the U-Net, for F ranges each, [F, L]."""

    def reduce(path, x, window):
        del window
        return _part(x).astype(jnp.float32) if path in dict(layers) else None

    found = calibrate.capture_branches(config, params, x_BHWC, t, ids_B, reduce)
    order, errors = [], []
    for bits in sorted({bits for _, bits in layers}):
        rows = [row for row, (_, own) in enumerate(layers) if own == bits]
        inputs = [found[layers[row][0]] for row in rows]
        ranges = step_FL.T[np.array(rows)], zero_FL.T[np.array(rows)]
        errors.append(_errors_of(inputs, *ranges, bits))
        order += rows
    return jnp.concatenate(errors)[np.argsort(order)].T


def _errors_of(
    inputs: Sequence[jax.Array], step_LF: jax.Array, zero_LF: jax.Array, bits: int
) -> jax.Array:
    """Squared errors of the inputs [N] of some layers, [L, F].

    One loop over all of them: a loop for each would take several times as long to compile. Zeros,
    which have no error in any range, fill the shorter ones.
    """
    longest = max(part.size for part in inputs)
    x_LN = jnp.stack([jnp.pad(part, (0, longest - part.size)) for part in inputs])

    def of_layer(layer: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        x_N, step_F, zero_F = layer
        return squared_errors(x_N, step_F, zero_F, bits)

    return jax.lax.map(of_layer, (x_LN, step_LF, zero_LF))


def _part(x: jax.Array) -> jax.Array:
    """At most `TRIED` numbers of x at equal distances, of all channels and pixels alike."""
    stride = -(-x.size // TRIED)
    while math.gcd(stride, x.size) > 1:
        stride += 1
    return x.reshape(-1)[::stride]


def _walk(
    model: Model, points: Sequence[_Point], compute: Callable[..., jax.Array]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the row and `compute(row, params, x, t, ids)`, for all points."""

    def work(point: _Point) -> tuple[int, np.ndarray]:
        step, x_BHWC, t, ids_B = point
        return step, np.asarray(compute(step, model.params, x_BHWC, jnp.int32(t), ids_B))

    yield from cores.in_order(work, points, together=model.config.small)


def _check_finite(paths: Sequence[str], low_TL: np.ndarray, high_TL: np.ndarray) -> None:
    finite_TL = np.isfinite(low_TL) & np.isfinite(high_TL)
    bad = [
        f"{path}: inputs are NaN or infinite"
        for layer, path in enumerate(paths)
        if not finite_TL[:, layer].all()
    ]
    if bad:
        raise gathered(bad, "activations cannot be calibrated; check the model's weights:")
