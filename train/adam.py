# SPDX-License-Identifier: Apache-2.0
"""Adam and LAMB as PV-Tuning uses them, with moments that can be forgotten in part.

Sources: Adam (arXiv:1412.6980), LAMB (arXiv:1904.00962), `ConfigurableAdam` of the PV-Tuning
reference. A moment is an average with weights that add up to 1 - beta^t, its mass. Adam computes
the mass from a step count that all numbers share. Here it is kept beside the moment, in numbers
that broadcast against it: whatever makes a part of a moment smaller makes its mass as much smaller,
and bias correction remains right. A mass of 0 is a step count of 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.core.host import to_device


class Moments(NamedTuple):
    """First and second moments of the gradient of one array.

    Attributes:
      first, second: float32, or float64 where the array is; of the array's shape.
      first_mass, second_mass: of any shape that broadcasts against them, in as many axes.
    """

    first: jax.Array
    second: jax.Array
    first_mass: jax.Array
    second_mass: jax.Array


def no_moments(array: jax.Array, mass_shape: tuple[int, ...] | None = None) -> Moments:
    """Returns the moments before the first step; by default one mass is shared by all numbers."""
    dtype = jnp.promote_types(array.dtype, jnp.float32)
    mass_shape = (1,) * array.ndim if mass_shape is None else mass_shape
    # Arrays of their own, to be donated.
    shapes = array.shape, array.shape, mass_shape, mass_shape
    return Moments(*(to_device(np.zeros(shape, dtype)) for shape in shapes))


def advanced(moments: Moments, grad: jax.Array, betas: tuple[float, float]) -> Moments:
    """Returns the moments with one more gradient in them."""
    grad = grad.astype(moments.first.dtype)
    (b1, b2), (first, second, first_mass, second_mass) = betas, moments
    return Moments(
        b1 * first + (1 - b1) * grad,
        b2 * second + (1 - b2) * grad**2,
        b1 * first_mass + (1 - b1),
        b2 * second_mass + (1 - b2),
    )


def forgotten(
    moments: Moments, first_share: jax.Array | float, second_share: jax.Array | float
) -> Moments:
    """Returns the moments multiplied by shares that broadcast against the masses."""
    return Moments(
        moments.first * first_share,
        moments.second * second_share,
        moments.first_mass * first_share,
        moments.second_mass * second_share,
    )


def step(
    moments: Moments,
    param: jax.Array,
    count: jax.Array,
    lr: jax.Array | float,
    betas: tuple[float, float],
    *,
    eps: float,
    lamb: bool,
) -> jax.Array:
    """Returns the update of `param`, after `advanced`.

    With u = first / (sqrt(second) + eps) it is -lr sqrt(1 - b2^t) / (1 - b1^t) u, t the age of each
    number's moments. LAMB multiplies by ||param|| / ||u||, by 1 where one of these is 0. There u is
    first brought to the size that it would have at the age of the whole run: moments that were just
    forgotten have a larger u, which would shorten the step of all others.

    Args:
      count: steps of the run, this one included.
    """
    b1, b2 = betas
    debias = jnp.sqrt(moments.second_mass) / moments.first_mass
    direction = debias * moments.first / (jnp.sqrt(moments.second) + eps)
    if not lamb:
        return -lr * direction
    dtype = moments.first.dtype
    common = jnp.sqrt(1 - jnp.asarray(b2, dtype) ** count) / (1 - jnp.asarray(b1, dtype) ** count)
    above = jnp.linalg.norm(param.astype(dtype).reshape(-1))
    below = jnp.linalg.norm(direction.reshape(-1)) / common
    sound = (above > 0) & (below > 0)
    return -lr * jnp.where(sound, above / jnp.where(sound, below, 1.0), 1.0) * direction
