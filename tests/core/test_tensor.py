# SPDX-License-Identifier: Apache-2.0
"""VQTensor: exact inverses, exact bytes, and life as a leaf of a pytree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from vqjax.core import grouping
from vqjax.core.scales import LogScales
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError
from vqjax.kernels import decode


def _tensor(shape=(20, 6), group=8, books=3, entries=16, name="linear", seed=0, int8=False):
    rng = np.random.default_rng(seed)
    outputs, fan_in = grouping.matrix_shape(shape)
    groups = grouping.groups_per_row(fan_in, group)
    codes = rng.integers(0, entries, (outputs, groups, books))
    values = rng.normal(size=(books, entries, group))
    codebooks = np.round(values * 20).astype(np.int8) if int8 else values.astype(np.float16)
    scales = rng.uniform(0.5, 2, outputs).astype(np.float16)
    scale = jnp.float32(0.05) if int8 else None
    tensor = VQTensor.pack(
        codes,
        jax.device_put(codebooks),
        scales,
        shape=shape,
        grouping=name,
        codebook_scale=scale,
    )
    stored = np.asarray(tensor.scales.values())
    return tensor, codes, codebooks.astype(np.float32) * (0.05 if int8 else 1), stored


def _decode_by_loops(codes, codebooks, scales, fan_in):
    rows = []
    for o in range(codes.shape[0]):
        vectors = [sum(codebooks[m, c] for m, c in enumerate(code)) for code in codes[o]]
        rows.append(np.concatenate(vectors)[:fan_in] * np.float32(scales[o]))
    return np.stack(rows)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("shape", "group", "name"),
    [((20, 6), 8, "linear"), ((3, 3, 4, 5), 9, "conv3x3"), ((1, 1, 7, 3), 8, "linear")],
)
def test_decode_is_the_sum_of_entries(shape, group, name, int8):
    tensor, codes, codebooks, scales = _tensor(shape, group, name=name, int8=int8)
    expected = _decode_by_loops(codes, codebooks, scales, grouping.matrix_shape(shape)[1])
    np.testing.assert_allclose(tensor.decode_matrix(), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(grouping.to_matrix(tensor.decode()), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(tensor.unpack(), codes)


@settings(max_examples=8, deadline=None)
@given(
    shape=st.sampled_from([(1, 1), (5, 3), (17, 2), (3, 3, 1, 2), (3, 3, 5, 3), (1, 1, 9, 2)]),
    books=st.integers(1, 8),
    entries=st.integers(2, 4096),
)
def test_pack_and_unpack_are_inverses_and_bytes_are_exact(shape, books, entries):
    group = 9 if shape[0] == 3 else 8
    tensor, codes, _, _ = _tensor(shape, group, books, entries, "linear", seed=books)
    np.testing.assert_array_equal(jax.jit(VQTensor.unpack)(tensor), codes)
    outputs, fan_in = grouping.matrix_shape(shape)
    groups = -(-fan_in // group)
    expected = (
        outputs * decode.packed_bytes(groups * books, entries)
        + 2 * books * entries * group
        + -(-5 * outputs // 8)
        + 8
    )
    assert tensor.nbytes == expected
    assert tensor.bits_per_weight == 8 * expected / (outputs * fan_in)


@pytest.mark.parametrize("shape", [(5, 3), (3, 3, 4, 5)])
def test_input_scales_multiply_what_a_channel_feeds(shape):
    tensor, *_ = _tensor(shape, 9, name="linear")
    inputs = LogScales.of(np.array([0.5, 2.0, 0.0, 1.0, 3.0])[: shape[-2]])
    scaled = dataclasses.replace(tensor, input_scales=inputs)
    factors = np.asarray(inputs.values())[:, None]
    np.testing.assert_allclose(scaled.decode(), np.asarray(tensor.decode()) * factors, rtol=1e-6)
    assert scaled.nbytes == tensor.nbytes + -(-5 * shape[-2] // 8) + 8


def test_works_under_jit_vmap_and_eval_shape():
    tensors = [_tensor(seed=seed)[0] for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tensors)
    batched = jax.jit(jax.vmap(lambda tensor: tensor.decode()))(stacked)
    alone = jnp.stack([tensor.decode() for tensor in tensors])
    np.testing.assert_allclose(batched, alone, rtol=1e-6)
    abstract = jax.eval_shape(lambda tensor: tensor, tensors[0])
    assert abstract.nbytes == tensors[0].nbytes
    assert jax.eval_shape(lambda tensor: tensor.decode(), abstract).shape == tensors[0].shape


def test_gradients_reach_codebooks_and_scales():
    tensor, *_ = _tensor(entries=4)
    floats = (tensor.codebooks.astype(jnp.float32), tensor.scales.values())

    def loss(codebooks, scales):
        matrix = decode.decode(tensor.codes, codebooks, scales, groups=tensor.groups)
        return jnp.sum(jnp.sin(matrix))

    books_grad, scales_grad = jax.grad(loss, argnums=(0, 1))(*floats)
    step = 1e-2
    bumped = floats[0].at[1, 2, 3].add(step), floats[0].at[1, 2, 3].add(-step)
    numeric = (loss(bumped[0], floats[1]) - loss(bumped[1], floats[1])) / (2 * step)
    np.testing.assert_allclose(books_grad[1, 2, 3], numeric, rtol=2e-2, atol=1e-3)
    assert np.all(np.asarray(scales_grad) != 0)


def test_is_accepted_as_a_leaf_of_linen_params():
    tensor, *_ = _tensor(shape=(8, 4))

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            assert self.has_variable("params", "kernel")
            return x @ self.get_variable("params", "kernel").decode()

    x = jnp.ones((2, 8))
    found = jax.jit(Layer().apply)({"params": {"kernel": tensor}}, x)
    np.testing.assert_allclose(found, x @ tensor.decode(), rtol=1e-5)


def test_misfits_are_named_together():
    codes, books, scales = jnp.zeros((6, 3, 2), int), jnp.zeros((3, 4, 8)), np.zeros(5)
    with pytest.raises(VqjaxError) as caught:
        VQTensor.pack(codes, books, scales, shape=(20, 6), grouping="rows")
    text = str(caught.value)
    assert "grouping 'rows', expected one of ['conv3x3', 'linear', 'scalar']" in text
    assert "codes (6, 3, 2), expected (6, 3, 3)" in text
    assert "scales (5,), expected (6,)" in text
    with pytest.raises(VqjaxError, match="int8 and codebook_scale go together"):
        VQTensor.pack(
            jnp.zeros((6, 3, 3), int),
            books.astype(jnp.int8),
            jnp.zeros(6),
            shape=(20, 6),
            grouping="linear",
        )


def test_codes_that_no_codebook_has_are_refused():
    _, codes, codebooks, scales = _tensor(entries=5)
    parts = (jnp.asarray(codebooks), jnp.asarray(scales))
    for wrong in (-1, 5):
        codes[0, 0, 0] = wrong
        for array in (codes, jnp.asarray(codes)):
            with pytest.raises(VqjaxError, match=r"codes from -?\d to \d, expected 0 to 4"):
                VQTensor.pack(array, *parts, shape=(20, 6), grouping="linear")
