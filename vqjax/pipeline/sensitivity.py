# SPDX-License-Identifier: Apache-2.0
"""What an error in each layer does to the noise prediction: all layers at once.

Dimension key:  B batch   H W latent   C channels   O outputs of a layer   T trajectory steps

The prediction of one image moves by J_l e for an error e at the output of layer l. With a random
vector v of signs, the expected square of v^T J_l e is |J_l e|^2 (Hutchinson, Communications in
Statistics 19, 1990): one backward pass from v gives it for every layer, to first order in the
errors (Gauss-Newton). Errors at the positions of an image, and in both branches of guidance, come
from one wrong kernel and may add up, so each error is followed through the layer it belongs to.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqjax import models
from vqjax.config import LatentDiffusionConfig
from vqjax.core import cores, draw, grouping
from vqjax.core import moments as moments_lib
from vqjax.core.host import to_device
from vqjax.core.model import Model
from vqjax.core.moments import Moment
from vqjax.core.shrinkage import Metric
from vqjax.core.typical_error import typical_error

POSITIONS = 4096  # of the latents of one call: bounds the memory of the backward pass
LEAST_IMAGES = 8  # of large models, one by one; of small ones, what fits into one call
EVERY = 3  # of the timesteps that were stored


class Expected(NamedTuple):
    """What compression will do to one layer.

    Attributes:
      errors: by the paths of its kernel and, where the bias will be corrected, its bias.
      gain, scalar_gain: as in `TypicalError`.
    """

    errors: dict[str, np.ndarray]
    gain: float
    scalar_gain: float


def expected(
    path: str, kernel: jax.Array, moment: Moment, metric: Metric, rng: np.random.Generator
) -> Expected:
    """Draws the error that `responses` follows: one of relative output error 1."""
    second_NN = measured_with(moment, centred=metric.centred)
    found = typical_error(kernel, second_NN, metric.metric_NN, rng)
    errors = {path: found.error}
    if metric.centred:
        shift_O = -grouping.to_matrix(errors[path]) @ moment.mean_N
        errors[path.removesuffix("kernel") + "bias"] = shift_O
    return Expected(errors, found.gain, found.scalar_gain)


def measured_with(moment: Moment, *, centred: bool) -> np.ndarray:
    """The moment that a layer's error is measured with: around the mean where a bias has that."""
    return moments_lib.centred(moment.second_NN, moment.mean_N) if centred else moment.second_NN


def responses(
    model: Model,
    visited: Sequence[tuple],
    errors: Mapping[str, np.ndarray],
    guidance: float,
    key: jax.Array,
    on_step: Callable[[], None] = lambda: None,
    *,
    weights_T: np.ndarray | None = None,
) -> dict[str, float]:
    """Mean squared change of the guided noise prediction that the errors would make, one by one.

    Rows of a kernel are taken to have independent errors.

    Args:
      visited: from `calibrate.trajectories`.
      errors: of `expected`, all layers.
      guidance: weighs the branches as sampling does.
      key: of the random signs.
      on_step: called after each backward pass; there are `calls(visited)`.
      weights_T: of the steps in the mean, from `timesteps.weights`; None: all alike.
    """
    kernels = tuple(path for path in errors if path.endswith("/kernel"))
    on_device = {path: to_device(error) for path, error in errors.items()}
    sums, whole = dict.fromkeys(kernels, 0.0), 0.0

    def respond(numbered: tuple) -> tuple[float, dict[str, jax.Array]]:
        call, (step, *point) = numbered
        of_call = jax.random.fold_in(key, call)
        found = _changes(model.config, kernels, guidance, model.params, on_device, *point, of_call)
        return 1.0 if weights_T is None else float(weights_T[step]), found

    points = enumerate(_points(visited))
    for weight, found in cores.in_order(respond, points, together=model.config.small):
        sums = {path: sums[path] + weight * float(found[path]) for path in kernels}
        whole += weight
        on_step()
    return {path: total / whole for path, total in sums.items()}


def calls(visited: Sequence[tuple]) -> int:
    """Backward passes of `responses`."""
    return sum(1 for _ in _points(visited))


def portions(visited: Sequence[tuple]) -> Iterator[tuple]:
    """Yields (x_TBHWC, t_T, ids_B): images that one backward pass can hold, until they suffice."""
    images = 0
    for x_TBHWC, t_T, ids_B in visited:
        _, batch, height, width, _ = x_TBHWC.shape
        most = POSITIONS // (height * width)
        size = max(1, min(batch, most))
        for first in range(0, batch - size + 1, size):
            if images >= max(LEAST_IMAGES, most):
                return
            chosen = slice(first, first + size)
            yield x_TBHWC[:, chosen], t_T, None if ids_B is None else to_device(ids_B[chosen])
            images += size


def _points(visited: Sequence[tuple]) -> Iterator[tuple]:
    """Yields (step, x_BHWC, t, ids_B): every `EVERY`-th step, the first one moves with images."""
    for number, (x_TBHWC, t_T, ids_B) in enumerate(portions(visited)):
        for step in range(number % EVERY, len(t_T), EVERY):
            yield step, to_device(x_TBHWC[step]), jnp.int32(t_T[step]), ids_B


@functools.partial(jax.jit, static_argnames=("config", "kernels", "guidance"))
def _changes(
    config: LatentDiffusionConfig,
    kernels: tuple[str, ...],
    guidance: float,
    params,
    errors,
    x_BHWC,
    t,
    ids_B,
    key,
) -> dict[str, jax.Array]:
    """Mean squared change of the guided prediction in one call, by kernel."""

    def predict(amounts: dict[str, jax.Array]) -> jax.Array:
        if ids_B is None:
            t_B = jnp.broadcast_to(t, x_BHWC.shape[:1])
            return models.predict_noise_disturbed(
                config, params, x_BHWC, t_B, None, errors, amounts
            )
        both = jnp.concatenate([jnp.full_like(ids_B, config.null_class), ids_B])
        doubled = jax.tree.map(lambda a: jnp.concatenate([a, a]), (x_BHWC, amounts))
        uncond, cond = jnp.split(
            models.predict_noise_disturbed(
                config,
                params,
                doubled[0],
                jnp.broadcast_to(t, both.shape),
                models.embed_classes(config, params, both),
                errors,
                doubled[1],
            ),
            2,
        )
        return uncond + guidance * (cond - uncond)

    none = {path: jnp.zeros((len(x_BHWC), errors[path].shape[-1]), jnp.float32) for path in kernels}
    eps, back = jax.vjp(predict, none)
    (slopes,) = back(draw.signs(key, eps.shape))
    return {path: jnp.sum(slope_BO**2) / eps.size for path, slope_BO in slopes.items()}
