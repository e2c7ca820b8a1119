# SPDX-License-Identifier: Apache-2.0
"""Second moments of every layer's input, from the full-precision model's own trajectories, or from
all timesteps or classes where a layer sees nothing else.

Dimension key:  B batch   H W latent   C channels   T trajectory steps   R rows of a layer's input
                N fan-in of a layer   P features of its held-out moment

Timesteps count as their weights say, which have the mean 1 (`pipeline.timesteps`).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqjax import models, sampling
from vqjax.config import LatentDiffusionConfig
from vqjax.core import cores, plan, row_sums, window_sums
from vqjax.core import moments as moments_lib
from vqjax.core.model import Model
from vqjax.core.row_sums import RowSums
from vqjax.core.window_sums import WindowSums
from vqjax.pipeline import gathered
from vqjax.pipeline.gathered import Gathered, Moments, Sums
from vqjax.sampling.schedule import ddim_schedule
from vqjax.settings import Calibration

_TIME = re.compile(plan.TIME)

_CLASS = re.compile(r"/attn2/to_(k|v|out)/kernel$")
"""Layers that see the class alone, where they see one token: queries of one key do nothing."""

_CHUNK_BYTES = 1 << 26  # patches of a convolution that exist at a time, one image at least
_COPIES = 3  # of images, where windows are added up by displacements


@dataclasses.dataclass(frozen=True)
class LayerInput:
    """One layer as the U-Net calls it: `positions` outputs per image, `fan_in` inputs to each.

    Attributes:
      image: height and width of what it reads, where its windows are such as `window_sums` adds up.
    """

    fan_in: int
    positions: int
    window: int = 1
    image: tuple[int, int] | None = None

    @property
    def numbers(self) -> int:
        """What it reads of one image, about: positions of the output times input channels."""
        return self.positions * self.fan_in // self.window**2

    @property
    def moment_bytes(self) -> int:
        """Memory of what is gathered for its moments."""
        shapes = *self.sums(self.fan_in), *self.sums(self.held)
        return 4 * sum(math.prod(shape) for shape in shapes)

    @property
    def moment_flops(self) -> int:
        """Operations that gather what one image adds, in products of matrices."""
        if self.image is None:
            return 2 * self.positions * self.fan_in**2
        return window_sums.flops(self.image, self.fan_in // self.window**2)

    @property
    def held(self) -> int:
        """P."""
        return moments_lib.held_size(self.fan_in, self.window)

    def sums(self, features: int) -> Sums:
        """Shapes of the sums over rows of some features."""
        if self.image is None:
            return row_sums.shapes(features)
        return window_sums.shapes(self.image, features // self.window**2)


class _Both(NamedTuple):
    """Sums over a layer's rows, each image's divided by their number; `held` None for none."""

    whole: Sums
    held: Sums | None


def trace_layers(config: LatentDiffusionConfig, params: models.Params) -> dict[str, LayerInput]:
    """What each layer of the U-Net sees for one image; nothing is computed.

    Args:
      params: arrays or their shapes.
    """
    leaves, treedef = jax.tree.flatten(params)
    return dict(_traced(config, treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)))


@functools.cache  # a run asks several times
def _traced(config: LatentDiffusionConfig, treedef: Any, types: tuple) -> dict[str, LayerInput]:
    params = treedef.unflatten([jax.ShapeDtypeStruct(*one) for one in types])
    sizes: dict[str, LayerInput] = {}

    def measure(path: str, x: jax.Array, window: dict[str, Any]) -> None:
        rows = jax.eval_shape(functools.partial(row_sums.patches, **window), x)
        positions = int(np.prod(rows.shape[:-1]))
        image = (x.shape[1], x.shape[2]) if window_sums.fit(x.shape, **window) else None
        sizes[path] = LayerInput(rows.shape[-1], positions, window.get("window", 1), image)

    def run(params, x, t):
        context = models.embed_classes(config, params, jnp.zeros((1,), jnp.int32))
        return models.capture_inputs(config, params, x, t, context, measure)[0]

    x_BHWC = jax.ShapeDtypeStruct((1, *config.latent_shape), jnp.float32)
    jax.eval_shape(run, params, x_BHWC, jax.ShapeDtypeStruct((1,), jnp.int32))
    return sizes


def class_layers(config: LatentDiffusionConfig, sizes: Mapping[str, LayerInput]) -> set[str]:
    """Those of the layers that see the class alone; `sizes` is from `trace_layers`."""
    if not config.n_classes:
        return set()
    return {path for path, size in sizes.items() if _CLASS.search(path) and size.positions == 1}


def batches(sizes: dict[str, LayerInput], limit_bytes: int) -> list[list[str]]:
    """Splits layers into groups whose moments fit `limit_bytes` together (one layer at least)."""
    groups: list[list[str]] = [[]]
    used = 0
    for path, size in sizes.items():
        needed = size.moment_bytes
        if groups[-1] and used + needed > limit_bytes:
            groups.append([])
            used = 0
        groups[-1].append(path)
        used += needed
    return groups


def trajectories(
    model: Model, calibration: Calibration, seed: int, start: int = 0
) -> Iterator[tuple]:
    """Yields (x_TBHWC, t_T, ids_B) of full-precision sampling, one batch of images at a time.

    Args:
      start: number of the first image, which tells its class and noise.
    """
    config = model.config
    t_T = ddim_schedule(config, calibration.steps).timesteps[::-1]
    classes = max(config.null_class, 1)
    end = start + calibration.images

    def batch(first: int) -> tuple:
        index_B = np.arange(first, min(first + calibration.batch, end))
        ids_B = jnp.asarray(index_B % classes, jnp.int32) if config.n_classes else None
        drawn = jnp.uint32(seed % 2**32), jnp.asarray(index_B, jnp.uint32)
        how = calibration.steps, calibration.guidance
        return np.asarray(_visited(config, *how, model.params, ids_B, *drawn)), t_T, ids_B

    yield from cores.in_order(batch, range(start, end, calibration.batch), together=config.small)


@functools.partial(jax.jit, static_argnames=("config", "steps", "guidance"))
def _visited(config, steps: int, guidance: float, params, ids_B, seed, index_B) -> jax.Array:
    """The latents of a batch before each step, [T, B, H, W, C]."""
    schedule = ddim_schedule(config, steps)
    noise_BHWC = sampling.image_noise(seed, index_B, config.latent_shape)
    steps_of = sampling.sample_latents(
        config, params, schedule, ids_B, noise_BHWC, guidance=guidance
    )[1]
    return steps_of.x_SBHWC


def second_moments(
    model: Model,
    visited: Sequence[tuple],
    paths: Sequence[str],
    on_step: Callable[[], None] = lambda: None,
    *,
    weights_T: np.ndarray | None = None,
) -> Moments:
    """Means of x x^T and of x over everything that the layers `paths` see along the trajectories.

    Every image counts alike, whatever its batch; every `moments.held_every`-th is held out. Layers
    that see the timestep or the class alone are shown every one that the model has.

    Args:
      visited: from `trajectories`.
      paths: kernels to look at; memory grows with the sum of their squared fan-ins.
      on_step: called after each U-Net call, from any thread.
      weights_T: of the steps, mean 1; None: all alike.
    """
    steps = len(visited[0][1])
    weights_T = np.ones(steps) if weights_T is None else weights_T
    sizes = trace_layers(model.config, model.params)
    images = sum(x_TBHWC.shape[1] for x_TBHWC, _, _ in visited)
    found = _of_labels(model, paths, sizes, visited[0][1], weights_T)
    held = {
        path: moments_lib.held_every(sizes[path].fan_in, sizes[path].window, images)
        for path in paths
        if path not in found
    }
    add = functools.partial(_sums_and, model.config, tuple(held.items()), _CHUNK_BYTES)
    firsts = np.cumsum([0] + [x_TBHWC.shape[1] for x_TBHWC, _, _ in visited])

    def sums_of(batches: Sequence[int]) -> dict[str, _Both]:
        sums = {path: _empty(sizes[path], every) for path, every in held.items()}
        for number in batches:
            x_TBHWC, t_T, ids_B = visited[number]
            index_B = jnp.arange(firsts[number], firsts[number + 1])
            for step, (x_BHWC, t) in enumerate(zip(x_TBHWC, t_T)):
                weight = jnp.float32(weights_T[step])
                sums = add(sums, model.params, x_BHWC, jnp.int32(t), ids_B, index_B, weight)
                on_step()
        return sums

    # Sums of a large model are as large as memory allows: those of all batches are one. Of a small
    # one they are two on every machine, so that last bits do not depend on its cores.
    numbers = range(len(visited))
    halves = [part for part in (numbers[0::2], numbers[1::2]) if part]
    parts = halves if model.config.small else [numbers]
    sums = functools.reduce(_added, cores.in_order(sums_of, parts))
    rows = images * steps * (1 if visited[0][2] is None else 2)
    for path, every in held.items():
        both, share = sums.pop(path), images // every / images if every else 0.0
        of_held = None if both.held is None else gathered.mean(both.held, rows * share)
        found[path] = Gathered(gathered.mean(both.whole, rows), of_held, share)
    return Moments({path: found[path] for path in paths})


def _of_labels(
    model: Model,
    paths: Sequence[str],
    sizes: Mapping[str, LayerInput],
    t_T: np.ndarray,
    weights_T: np.ndarray,
) -> dict[str, Gathered]:
    """Of those of the layers that see the timestep or the class alone, over all there are.

    Trajectories would leave out timesteps that a sampler of other steps visits, and of a thousand
    classes nearly all.

    Args:
      t_T, weights_T: of the trajectories, descending; timesteps between them weigh what straight
        lines say. Half the weight of all classes is that of "no class", as under guidance.
    """
    config, found = model.config, {}
    timed = {path for path in paths if _TIME.search(path)}
    if timed:
        all_t = np.arange(1, config.timesteps, dtype=np.int32)
        weights = np.interp(all_t, t_T[::-1], weights_T[::-1])
        found |= _of_all(model, timed, all_t, np.zeros_like(all_t), weights)
    classed = class_layers(config, sizes) & set(paths)
    if classed:
        ids = np.arange(config.null_class + 1, dtype=np.int32)
        weights = np.where(ids == config.null_class, config.null_class, 1.0)
        found |= _of_all(model, classed, np.ones_like(ids), ids, weights)
    return found


def _of_all(
    model: Model, paths: Collection[str], t_R: np.ndarray, ids_R: np.ndarray, weight_R: np.ndarray
) -> dict[str, Gathered]:
    """Of layers that see no image, over inputs without others to come: held out is a half that
    equals the whole."""
    weight_R = (weight_R / weight_R.sum()).astype(np.float32)
    found = {}
    for path, (second_NN, mean_N) in jax.device_get(
        _sums_of_all(model.config, tuple(sorted(paths)), model.params, t_R, ids_R, weight_R)
    ).items():
        kept = moments_lib.held_columns(len(mean_N), moments_lib.held_size(len(mean_N), 1), 1)
        held_NN = second_NN[np.ix_(kept, kept)]
        found[path] = Gathered(RowSums(second_NN, mean_N), RowSums(held_NN, mean_N[kept]), 0.5)
    return found


@functools.partial(jax.jit, static_argnames=("config", "paths"))
def _sums_of_all(
    config: LatentDiffusionConfig, paths: tuple[str, ...], params, t_R, ids_R, weight_R
) -> dict[str, Any]:
    """Weighted sums of x x^T and x, by path, over one call with a row for each label."""

    def reduce(path: str, x: jax.Array, window: dict[str, Any]) -> Any:
        del window
        if path not in paths:
            return None
        x_RN = x.reshape(len(t_R), -1).astype(jnp.float32)
        weighed_RN = x_RN * weight_R[:, None]
        second_NN = jnp.matmul(x_RN.T, weighed_RN, precision=jax.lax.Precision.HIGHEST)
        return second_NN, jnp.sum(weighed_RN, axis=0)

    # The compiler keeps what depends on the labels alone.
    x_RHWC = jnp.zeros((len(t_R), *config.latent_shape), jnp.float32)
    context = models.embed_classes(config, params, ids_R)
    return models.capture_inputs(config, params, x_RHWC, t_R, context, reduce)[1]


def capture_branches(
    config: LatentDiffusionConfig,
    params: models.Params,
    x_BHWC: jax.Array,
    t: jax.Array,
    ids_B: jax.Array | None,
    reduce: Callable[[str, jax.Array, dict[str, Any]], Any],
) -> dict[str, Any]:
    """What `reduce` (see `models.capture_inputs`) makes of layer inputs in both guidance branches,
    which see the same latents at timestep t, unconditional first."""
    context = None
    if ids_B is not None:
        both = jnp.concatenate([jnp.full_like(ids_B, config.null_class), ids_B])
        context = models.embed_classes(config, params, both)
        x_BHWC = jnp.concatenate([x_BHWC, x_BHWC])
    t_B = jnp.broadcast_to(t, x_BHWC.shape[:1])
    return models.capture_inputs(config, params, x_BHWC, t_B, context, reduce)[1]


@functools.partial(
    jax.jit, static_argnames=("config", "held", "chunk_bytes"), donate_argnames="sums"
)
def _sums_and(
    config: LatentDiffusionConfig,
    held: tuple[tuple[str, int], ...],
    chunk_bytes: int,
    sums,
    params,
    x_BHWC,
    t,
    ids_B,
    index_B,
    weight,
):
    """Sums plus what the layers see in one call of the U-Net.

    Args:
      held: every how manieth image is held out, by path.
      chunk_bytes: `_CHUNK_BYTES`.
    """
    held_every = dict(held)

    def reduce(path, x, window):
        if path not in sums:
            return None
        add = functools.partial(_add, weight=weight, window=window, chunk_bytes=chunk_bytes)
        whole, held = sums[path]
        whole = add(whole, x)
        if held is not None:
            held = add(held, _held_out(x, index_B, held_every[path], held, window))
        return _Both(whole, held)

    return capture_branches(config, params, x_BHWC, t, ids_B, reduce)


def _empty(size: LayerInput, every: int) -> _Both:
    def zeros(features: int) -> Sums:
        shapes = size.sums(features)
        return type(shapes)(*(jnp.zeros(shape, jnp.float32) for shape in shapes))

    return _Both(zeros(size.fan_in), zeros(size.held) if every else None)


def _added(sums: dict[str, _Both], more: dict[str, _Both]) -> dict[str, _Both]:
    return jax.tree.map(np.add, *jax.device_get((sums, more)))


def _held_out(
    x: jax.Array, index_B: jax.Array, every: int, held: Sums, window: dict[str, Any]
) -> jax.Array:
    """What counts for a held-out moment of what a layer sees: some images, the others zero, and
    some channels."""
    batch = len(index_B)  # of images; x may hold both branches
    held_B = index_B % every == every - 1
    place_V = jnp.nonzero(held_B, size=-(-batch // every), fill_value=0)[0]
    real_V = jnp.arange(len(place_V)) < jnp.sum(held_B)
    side = window.get("window", 1)
    area = side**2
    columns = moments_lib.held_columns(x.shape[-1] * area, gathered.features(held), side)
    kept = x.reshape(-1, batch, *x.shape[1:])[:, place_V][..., columns[::area] // area]
    kept *= real_V.reshape(1, -1, *[1] * (x.ndim - 1))
    return kept.reshape(-1, *kept.shape[2:])


def _add(
    sums: Sums, x: jax.Array, *, weight: jax.Array, window: dict[str, Any], chunk_bytes: int
) -> Sums:
    """Adds what some images show a layer, a few of them at a time, so that copies stay small."""
    shape = jax.eval_shape(functools.partial(row_sums.patches, **window), x).shape
    positions = math.prod(shape[1:-1])
    weight = weight / positions

    def add(sums: Sums, x: jax.Array) -> tuple[Sums, None]:
        if isinstance(sums, WindowSums):
            return window_sums.add(sums, x, weight), None
        return row_sums.add(sums, row_sums.patches(x, **window), weight), None

    width = _COPIES * x.shape[-1] if isinstance(sums, WindowSums) else shape[-1]
    most = max(1, chunk_bytes // (4 * positions * width))
    together = max(n for n in range(1, len(x) + 1) if len(x) % n == 0 and n <= most)
    return jax.lax.scan(add, sums, x.reshape(-1, together, *x.shape[1:]))[0]
