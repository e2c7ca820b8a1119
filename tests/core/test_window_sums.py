# SPDX-License-Identifier: Apache-2.0
"""Sums over windows by displacement are those over the windows themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.core import row_sums, window_sums

WINDOW = {"window": 3, "stride": 1, "padding": (1, 1)}


def summed(*batches: tuple[np.ndarray, float]) -> window_sums.WindowSums:
    _, height, width, channels = batches[0][0].shape
    shapes = window_sums.shapes((height, width), channels)
    sums = window_sums.WindowSums(*(jnp.zeros(shape) for shape in shapes))
    for x_BHWC, weight in batches:
        sums = jax.jit(window_sums.add)(sums, x_BHWC, jnp.float32(weight))
    return jax.device_get(sums)


def images(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Without symmetry of any kind."""
    return rng.standard_normal(shape).astype(np.float32) + np.arange(shape[2])[:, None] / 2


@pytest.mark.parametrize("shape", [(2, 2), (2, 3), (3, 2), (4, 4), (5, 3), (3, 8)], ids=str)
def test_every_window_counts_once(shape):
    rng = np.random.default_rng(0)
    first, second = images(rng, 3, *shape, 4), images(rng, 2, *shape, 4)
    second_NN, sum_N = window_sums.moments(summed((first, 1.0), (second, 0.25)))
    expected_NN, expected_N = np.zeros((36, 36)), np.zeros(36)
    for x_BHWC, weight in ((first, 1.0), (second, 0.25)):
        patches = row_sums.patches(jnp.asarray(x_BHWC), **WINDOW)
        rows_RN = np.asarray(patches, np.float64).reshape(-1, 36)
        expected_NN += weight * rows_RN.T @ rows_RN
        expected_N += weight * rows_RN.sum(axis=0)
    np.testing.assert_allclose(second_NN, expected_NN, atol=1e-6 * np.abs(expected_NN).max())
    np.testing.assert_allclose(sum_N, expected_N, atol=1e-6 * np.abs(expected_N).max())
    np.testing.assert_array_equal(second_NN, second_NN.T)


def test_places_that_no_window_reads_are_zero():
    """A pixel in the last row is never the upper one of a window's."""
    x_BHWC = np.zeros((2, 4, 4, 1), np.float32)
    x_BHWC[:, -1] = np.random.default_rng(0).standard_normal((2, 4, 1))
    second_NN, sum_N = window_sums.moments(summed((x_BHWC, 1.0)))
    np.testing.assert_array_equal(sum_N[:3], 0)
    assert np.abs(second_NN[:3]).max() < 1e-6 * second_NN.max()
    assert np.diagonal(second_NN).min() >= 0


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((2, 4, 4, 3), {}),
        ((2, 4, 4, 3), WINDOW | {"stride": 2}),
        ((2, 4, 4, 3), WINDOW | {"padding": (0, 1)}),
        ((2, 1, 4, 3), WINDOW),
    ],
)
def test_other_windows_do_not_fit(shape, window):
    assert window_sums.fit((2, 4, 4, 3), **WINDOW)
    assert not window_sums.fit(shape, **window)


def test_operations_are_those_of_the_products():
    """Products as traced, each as often as its loop runs."""
    image, channels = (8, 6), 16
    shapes = window_sums.shapes(image, channels)
    sums = window_sums.WindowSums(*(jnp.zeros(shape) for shape in shapes))
    x_BHWC = jnp.zeros((1, *image, channels))
    jaxpr = jax.make_jaxpr(window_sums.add)(sums, x_BHWC, jnp.float32(1))

    def products(jaxpr, times: int) -> int:
        found = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                depth = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
                found += times * 2 * int(depth) * equation.outvars[0].aval.size
            if "jaxpr" in equation.params:
                inner = equation.params["jaxpr"].jaxpr
                found += products(inner, times * equation.params.get("length", 1))
        return found

    assert products(jaxpr.jaxpr, 1) == window_sums.flops(image, channels)
