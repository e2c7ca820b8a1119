# SPDX-License-Identifier: Apache-2.0
"""Sums of x x^T over all 3x3 windows of images, from products of whole images.

What two places k and k' of a window add up to over all windows is a sum over the pixels q that a
window reads at k and of which it reads q + k' - k at k'. There are 81 pairs of places but, up to
transposition, 13 displacements k' - k. Along an axis in which a displacement leads anywhere, all
its pairs read the same pixels; along one in which it does not, a pair misses the last pixels where
k is a window's first place, and the first ones where it is its last. So 13/81 of the products are
enough, and some of the image's edges: 29 matrices of channels by channels, not 81, from which
`moments` makes the whole.

Edges run round the image, each from one corner to the next: the first row, the last column, the
last row backwards, the first column backwards.

Dimension key:  B images   H W pixels   R pixels of all images   C channels   N fan-in (9 C)
                D displacements   E displacements along an edge, and its first pixel
                S edges   L pixels of an edge
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SIDE = 3

_OFFSETS = [(dy, dx) for dy in range(SIDE) for dx in range(1 - SIDE, SIDE) if (dy, dx) >= (0, 0)]

_ALONG = [(e, False) for e in range(SIDE)] + [(0, True)]
"""Displacements along an edge, and whether its first pixel counts alone."""

_READ = (slice(None, -1), slice(None), slice(1, None))
"""Of the pixels along an axis, those that windows read at their first, middle and last place."""

_MISSED = ((2, 1), (None, None), (0, 3))
"""And the edges that they do not: of rows, of columns."""

_CORNERS = {(0, 3): 0, (0, 1): 1, (2, 1): 2, (2, 3): 3}
"""Where a row's edge and a column's meet: the edge that begins there."""


class WindowSums(NamedTuple):
    """Sums of x(q) x(q + d)^T over pixels q, x being zero outside of its image, and of x.

    Attributes:
      all_DCC: over all pixels, for all displacements.
      edges_ESCC: over the pixels of one edge, for displacements along it of 0, 1 and 2; and over
        its first pixel, for none.
      image_HWC: of x over the images.
    """

    all_DCC: Any
    edges_ESCC: Any
    image_HWC: Any


def fit(
    shape: tuple[int, ...], window: int = 1, stride: int = 1, padding: tuple[int, int] = (0, 0)
) -> bool:
    """Whether windows are those that are added up here: 3x3, one around each pixel.

    Args:
      shape: of the images, [B, H, W, C].
    """
    return window == SIDE and stride == 1 and padding == (1, 1) and min(shape[1:3]) > 1


def shapes(image: tuple[int, int], channels: int) -> WindowSums:
    """Returns the shapes of the sums, for images of (H, W) pixels."""
    square = (channels, channels)
    edges = (len(_ALONG), len(_CORNERS), *square)
    return WindowSums((len(_OFFSETS), *square), edges, (*image, channels))


def flops(image: tuple[int, int], channels: int) -> int:
    """Operations of `add` for one image of (H, W) pixels, in products of matrices."""
    rows = len(_OFFSETS) * image[0] * image[1] + len(_ALONG) * len(_CORNERS) * max(image)
    return 2 * rows * channels**2


def add(sums: WindowSums, x_BHWC: jax.Array, weight: jax.Array) -> WindowSums:
    """Adds all windows of some images, each weighed by `weight`."""
    x_BHWC = x_BHWC.astype(jnp.float32)
    channels, side, reach = x_BHWC.shape[-1], max(x_BHWC.shape[1:3]), SIDE - 1
    padded_BHWC = jnp.pad(x_BHWC, ((0, 0), (0, reach), (reach, reach), (0, 0)))
    edges = x_BHWC[:, 0], x_BHWC[:, :, -1], x_BHWC[:, -1, ::-1], x_BHWC[:, ::-1, 0]
    # The shorter ones end in zeros, which add nothing.
    edges = [jnp.pad(edge, ((0, 0), (0, side - edge.shape[1]), (0, 0))) for edge in edges]
    edges_SBLC = jnp.stack(edges)
    padded_SBLC = jnp.pad(edges_SBLC, ((0, 0), (0, 0), (0, reach), (0, 0)))
    x_CR = x_BHWC.reshape(-1, channels).T
    edges_SCR = edges_SBLC.reshape(len(edges), -1, channels).swapaxes(1, 2)

    def plus(products, place, one, other) -> jax.Array:
        product = weight * jnp.matmul(one, other, precision=jax.lax.Precision.HIGHEST)
        return products.at[place].add(product, mode="promise_in_bounds")

    # One displacement after the other, in place: together they would be 13 times the images.
    def displaced(all_DCC, step):
        place, (dy, dx) = step
        moved_BHWC = jax.lax.dynamic_slice(padded_BHWC, (0, dy, reach + dx, 0), x_BHWC.shape)
        return plus(all_DCC, place, x_CR, moved_BHWC.reshape(-1, channels)), None

    def along(edges_ESCC, step):
        place, offset, counts_11L1 = step
        moved_SBLC = jax.lax.dynamic_slice_in_dim(padded_SBLC, offset, side, axis=2) * counts_11L1
        return plus(
            edges_ESCC, place, edges_SCR, moved_SBLC.reshape(len(edges), -1, channels)
        ), None

    offsets, firsts = np.array(_ALONG).T
    counts_EL = jnp.asarray((np.arange(side) == 0) | (firsts[:, None] == 0), jnp.float32)
    steps = jnp.arange(len(_OFFSETS)), jnp.asarray(_OFFSETS)
    edge_steps = jnp.arange(len(_ALONG)), jnp.asarray(offsets), counts_EL[:, None, None, :, None]
    return WindowSums(
        jax.lax.scan(displaced, sums.all_DCC, steps)[0],
        jax.lax.scan(along, sums.edges_ESCC, edge_steps)[0],
        sums.image_HWC + weight * jnp.sum(x_BHWC, axis=0),
    )


def moments(sums: WindowSums) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sums of x x^T and of x over all windows, float32 [N, N] and [N], their columns
    ordered (channel, ky, kx).

    Args:
      sums: NumPy arrays.
    """
    channels = sums.image_HWC.shape[-1]
    second_CYXCYX = np.empty((channels, SIDE, SIDE) * 2, np.float32)
    sum_CYX = np.empty((channels, SIDE, SIDE), np.float32)
    for y, x in np.ndindex(SIDE, SIDE):
        sum_CYX[:, y, x] = sums.image_HWC[_READ[y], _READ[x]].sum(axis=(0, 1), dtype=np.float64)
        for d, (dy, dx) in enumerate(_OFFSETS):
            if y + dy < SIDE and 0 <= x + dx < SIDE:
                row, column = None if dy else _MISSED[y][0], None if dx else _MISSED[x][1]
                found_CC = _read(sums, d, dy or dx, row, column)
                second_CYXCYX[:, y + dy, x + dx, :, y, x] = found_CC.T
                second_CYXCYX[:, y, x, :, y + dy, x + dx] = found_CC
    fan_in = channels * SIDE**2
    second_NN = second_CYXCYX.reshape(fan_in, fan_in)
    # A channel that lives at the edges alone is a difference of equal sums elsewhere.
    np.fill_diagonal(second_NN, np.maximum(np.diagonal(second_NN), 0))
    return second_NN, sum_CYX.reshape(fan_in)


def _read(sums: WindowSums, d: int, along: int, row: int | None, column: int | None) -> np.ndarray:
    """The sum over all pixels but those of two edges, which meet in a corner."""
    if row is None and column is None:
        return sums.all_DCC[d]
    found_CC = sums.all_DCC[d].astype(np.float64)
    for edge in (row, column):
        if edge is not None:
            missed_CC = sums.edges_ESCC[along, edge]
            found_CC -= missed_CC.T if edge >= 2 else missed_CC  # two run backwards
    if row is not None and column is not None:
        found_CC += sums.edges_ESCC[-1, _CORNERS[row, column]]
    return found_CC
