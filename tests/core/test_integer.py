# SPDX-License-Identifier: Apache-2.0
"""Integer kernels hold what the packed codes decode to, and say why others cannot."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.io import models as small
from vqjax.core.integer import IntegerKernel, integer_kernel, integerize
from vqjax.core.scales import LogScales
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError


@pytest.mark.parametrize("shape", [(20, 6), (3, 3, 4, 5), (1, 1, 12, 3)])
def test_values_times_scales_are_the_kernel(shape):
    tensor = small.integer_tensor(np.random.default_rng(0), shape)
    kernel = integer_kernel(tensor)
    assert kernel.shape == shape
    assert (kernel.values.dtype, kernel.scales_O.dtype) == (jnp.int8, jnp.float32)
    product = np.asarray(kernel.values, np.float32) * np.asarray(kernel.scales_O)
    np.testing.assert_allclose(product, tensor.decode(), rtol=1e-6, atol=1e-7)


def _sums_to(low, high) -> VQTensor:
    """Two codebooks whose sums are `low` and `high`."""
    books_MKG = jnp.array([[[low - 27], [high - 27]], [[27], [27]]], jnp.int8)
    codes_OJM = np.array([[[0, 0], [1, 1]]])
    return VQTensor.pack(
        codes_OJM,
        books_MKG,
        np.ones(1),
        shape=(2, 1),
        grouping="linear",
        codebook_scale=jnp.float32(1),
    )


def test_sums_may_take_all_of_int8_and_no_more():
    assert integer_kernel(_sums_to(-101, 127)).values.ravel().tolist() == [-101, 127]
    with pytest.raises(VqjaxError, match="sums of codebook entries from -101 to 128 exceed int8"):
        integer_kernel(_sums_to(-101, 128))


def test_all_that_cannot_be_integers_is_named_at_once():
    rng = np.random.default_rng(0)
    fits = small.integer_tensor(rng, (16, 4))
    scaled = VQTensor.pack(
        fits.unpack(),
        fits.codebooks,
        fits.scales,
        shape=fits.shape,
        grouping=fits.grouping,
        input_scales=LogScales.of(np.ones(16)),
        codebook_scale=fits.codebook_scale,
    )
    params = {
        "a": {"kernel": small.random_tensor(rng, (16, 4), "linear", 16)},
        "b": {"kernel": scaled},
        "c": {"kernel": fits, "bias": jnp.zeros(4)},
        "d": {"kernel": _sums_to(-100, 150)},
    }
    with pytest.raises(VqjaxError) as caught:
        integerize(params)
    text = str(caught.value)
    assert "a/kernel: codebooks float16, expected int8" in text
    assert "b/kernel: has input scales" in text
    assert "d/kernel: sums of codebook entries from -100 to 150 exceed int8" in text
    assert "c/kernel" not in text

    found = integerize({"c": params["c"], "e": jnp.ones(3)})
    assert isinstance(found["c"]["kernel"], IntegerKernel)
    np.testing.assert_array_equal(found["e"], np.ones(3))


def test_a_tree_without_quantized_weights_is_refused():
    with pytest.raises(VqjaxError, match="no weight is quantized"):
        integerize({"a": {"kernel": jnp.ones((2, 2))}})
