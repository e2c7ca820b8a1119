# SPDX-License-Identifier: Apache-2.0
"""Bit packing against Python integers, and the ops defined by decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqjax.core.tensor import VQTensor
from vqjax.kernels import decode
from vqjax.kernels.vq_conv.ref import convolve, vq_conv
from vqjax.kernels.vq_conv.window import Window
from vqjax.kernels.vq_matmul.ref import product, vq_matmul


@settings(max_examples=16, deadline=None)
@given(
    entries=st.sampled_from([2, 3, 8, 14, 15, 16, 24, 100, 256, 300, 4096]),
    count=st.integers(1, 19),
    rows=st.integers(1, 3),
    seed=st.integers(0, 9),
    module=st.sampled_from([np, jnp]),
)
def test_packed_rows_are_little_endian_bit_strings(entries, count, rows, seed, module):
    codes = np.random.default_rng(seed).integers(0, entries, (rows, count))
    pack, unpack = decode.pack, decode.unpack
    if module is jnp:
        pack, unpack = jax.jit(pack, static_argnums=1), jax.jit(unpack, static_argnums=(1, 2))
    packed = pack(module.asarray(codes), entries)
    assert packed.shape == (rows, decode.packed_bytes(count, entries))
    size, bits = decode.code_word(entries)
    for row, stored in zip(codes, np.asarray(packed)):
        words = [row[first : first + size] for first in range(0, count, size)]
        numbers = [
            sum(int(code) * entries**place for place, code in enumerate(word)) for word in words
        ]
        number = sum(word << (bits * place) for place, word in enumerate(numbers))
        assert bytes(stored) == number.to_bytes(len(stored), "little")
    np.testing.assert_array_equal(unpack(packed, count, entries), codes)


@pytest.mark.parametrize(
    ("entries", "word"),
    [(2, (1, 1)), (16, (1, 4)), (256, (1, 8)), (4096, (1, 12)), (15, (16, 63)), (3, (12, 20))],
)
def test_words_take_the_fewest_bits(entries, word):
    size, bits = decode.code_word(entries)
    assert bits / size <= word[1] / word[0]
    assert entries**size <= 2**bits
    assert bits <= 64


def _tensor(shape, group, name):
    rng = np.random.default_rng(1)
    outputs, fan_in = shape[-1], int(np.prod(shape[:-1]))
    codes = rng.integers(0, 16, (outputs, -(-fan_in // group), 2))
    books = rng.normal(size=(2, 16, group)).astype(np.float16)
    scales = rng.uniform(1, 2, outputs).astype(np.float16)
    return VQTensor.pack(
        jnp.asarray(codes), jnp.asarray(books), jnp.asarray(scales), shape=shape, grouping=name
    )


def _parts(tensor):
    return tensor.codes, tensor.codebooks, tensor.scales.values()


def test_vq_matmul_equals_the_decoded_product():
    tensor = _tensor((13, 6), 8, "linear")
    x = jax.random.normal(jax.random.key(0), (4, 13))
    np.testing.assert_allclose(
        vq_matmul(x, *_parts(tensor)), x @ tensor.decode(), rtol=1e-5, atol=1e-5
    )
    assert vq_matmul(x.astype(jnp.bfloat16), *_parts(tensor)).dtype == jnp.bfloat16


@pytest.mark.parametrize(("window", "group", "name"), [(3, 9, "conv3x3"), (1, 8, "linear")])
def test_vq_conv_equals_the_decoded_convolution(window, group, name):
    tensor = _tensor((window, window, 5, 6), group, name)
    x = jax.random.normal(jax.random.key(0), (2, 7, 7, 5))
    found = vq_conv(x, *_parts(tensor), window=window, strides=(2, 2), padding=[(1, 1), (1, 1)])
    expected = jax.lax.conv_general_dilated(
        x, tensor.decode(), (2, 2), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "precise"), [("float32", True), ("bfloat16", False)])
def test_float32_is_never_shortened(dtype, precise):
    """GPUs would compute products of float32 in TF32, with three digits."""
    x_BI, w_OI = jnp.ones((4, 8), dtype), jnp.ones((6, 8), dtype)
    x_BHWI, w_ON = jnp.ones((1, 4, 4, 2), dtype), jnp.ones((6, 18), dtype)
    window = Window.of(3, (1, 1), "SAME", (4, 4))
    with jax.default_matmul_precision("default"):
        products = str(jax.make_jaxpr(lambda: product(x_BI, w_OI, None))())
        patches = str(jax.make_jaxpr(lambda: convolve(x_BHWI, w_ON, None, window))())
    assert ("HIGHEST" in products) == ("HIGHEST" in patches) == precise


def test_convolutions_add_their_bias_in_the_type_of_x():
    """As dense layers do, and as libraries of GPUs do in the same call: 1 + 2^-8 is 1 there."""
    x_BHWI, w_ON = jnp.ones((1, 3, 3, 1), jnp.bfloat16), jnp.eye(1, 9, 4, dtype=jnp.bfloat16)
    window = Window.of(3, (1, 1), "SAME", (3, 3))
    bias_O = jnp.array([2**-8 + 2**-20], jnp.float32)
    y_BHWO = convolve(x_BHWI, w_ON, bias_O, window)
    assert y_BHWO.dtype == jnp.bfloat16
    assert float(y_BHWO[0, 1, 1, 0]) == 1
