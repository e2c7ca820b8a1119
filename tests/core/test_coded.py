# SPDX-License-Identifier: Apache-2.0
"""Trainable weights: what is decoded is what will be stored, and gradients do not see rounding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import xla_flags
from vqjax.core import scalar
from vqjax.core.coded import CodedWeight, integer_codebooks
from vqjax.core.scales import LogScales
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError


def _tensor(bits, *, entries=12, shape=(21, 6), inputs=True, books=3, group=4, seed=0):
    """A weight whose vectors do not fill its rows; one row is zero."""
    rng = np.random.default_rng(seed)
    groups = -(-int(np.prod(shape[:-1])) // group)
    codes = rng.integers(0, entries, (shape[-1], groups, books))
    books_MKG = jnp.asarray(rng.normal(size=(books, entries, group)), jnp.float32)
    step = None
    if bits == 8:
        books_MKG, step = integer_codebooks(books_MKG, jnp.asarray(codes))
    elif bits == 16:
        books_MKG = books_MKG.astype(jnp.float16)
    return VQTensor.pack(
        codes.astype(np.int32),
        books_MKG,
        rng.uniform(0.2, 2, shape[-1]) * (np.arange(shape[-1]) != 2),
        shape=shape,
        grouping="linear",
        input_scales=LogScales.of(rng.uniform(0.5, 2, shape[-2]), up=True) if inputs else None,
        codebook_scale=step,
    )


def _trained(weight, seed=1):
    """As if training had moved all that it may."""
    rng = np.random.default_rng(seed)
    books, scales = weight.codebooks_MKG, weight.scales_O
    return dataclasses.replace(
        weight,
        codebooks_MKG=books * jnp.asarray(rng.uniform(0.6, 1.4, books.shape), jnp.float32),
        scales_O=scales * jnp.asarray(rng.uniform(0.7, 1.3, scales.shape), jnp.float32),
    )


def _equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@functools.partial(jax.jit, compiler_options=xla_flags.EMITTERS_OF_USERS)
def _decoded(weight):
    return weight.decode()


@pytest.mark.parametrize(("bits", "entries"), [(None, 12), (16, 300), (8, 12), (8, 256)])
def test_what_is_decoded_is_what_is_stored(bits, entries):
    tensor = _tensor(bits, entries=entries)
    weight = CodedWeight.of(tensor)
    assert weight.codes_OJM.dtype == (jnp.uint16 if entries > 256 else jnp.uint8)
    np.testing.assert_array_equal(_decoded(weight), _decoded(tensor))
    _equal(weight.to_tensor(), tensor)

    trained = _trained(weight)
    stored = trained.to_tensor()
    assert np.any(stored.decode() != tensor.decode())
    np.testing.assert_array_equal(_decoded(trained), _decoded(stored))
    again = CodedWeight.of(stored)
    np.testing.assert_array_equal(_decoded(again), _decoded(stored))
    _equal(CodedWeight.of(again.to_tensor()), again)


def test_the_grid_of_scalar_stays_as_it_is():
    rng = np.random.default_rng(0)
    tensor = scalar.round_to_grid(rng.normal(size=(5, 8)).astype(np.float32), (8, 5), 256)
    weight = CodedWeight.of(tensor)
    np.testing.assert_array_equal(_decoded(weight), _decoded(tensor))
    _equal(weight.to_tensor(), tensor)
    grad = jax.grad(lambda books: jnp.sum(_with(weight, books, weight.scales_O).matrix() ** 2))
    assert not np.any(grad(weight.codebooks_MKG))


def _with(weight, books_MKG, scales_O):
    return dataclasses.replace(weight, codebooks_MKG=books_MKG, scales_O=scales_O)


@pytest.mark.parametrize("bits", [16, 8])
def test_gradients_pass_the_rounding(bits):
    weight = CodedWeight.of(_tensor(bits))
    # Where rounding does nothing both decode the same numbers, and gradients must be equal.
    plain = dataclasses.replace(weight, codebook_bits=None, scale_range=None)
    seen = jax.random.normal(jax.random.key(0), plain.matrix().shape)
    for start in (weight, plain):
        np.testing.assert_array_equal(start.matrix(), weight.matrix())

    def gradients(weight):
        def output(books, scales):
            return jnp.sum(_with(weight, books, scales).matrix() * seen)

        return jax.grad(output, argnums=(0, 1))(weight.codebooks_MKG, weight.scales_O)

    for found, expected in zip(gradients(weight), gradients(plain), strict=True):
        assert np.any(expected)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    books=st.sampled_from([1, 4]),
    spread=st.floats(0, 3),
    seed=st.integers(0, 2**16),
)
def test_sums_of_integer_codebooks_fit_into_a_byte(books, spread, seed):
    # Entries of very different sizes, which cancel where spread is large.
    rng, entries = np.random.default_rng(seed), 5
    codes = jnp.asarray(rng.integers(0, entries, (3, 4, books)))
    values = rng.normal(size=(books, entries, 2)) * np.exp(spread * rng.normal(size=(books, 1, 1)))
    given_MKG = jnp.asarray(values, jnp.float32)
    rounded, step = jax.jit(integer_codebooks)(given_MKG, codes)
    integers = np.asarray(rounded, np.int32)
    sums = sum(integers[m][np.asarray(codes)[..., m]] for m in range(books))
    assert rounded.dtype == jnp.int8
    assert np.abs(sums).max() <= 127
    assert np.abs(integers).max() <= 127
    used = np.zeros((books, entries), bool)
    for m in range(books):
        used[m, np.asarray(codes)[..., m]] = True
    error = np.abs(integers * float(step) - values)[used]
    assert error.max() <= 0.5001 * float(step) + 1e-6 * np.abs(values).max()
    # As fine as sums and entries allow, up to what rounding can take from them.
    assert max(np.abs(sums).max() + books, np.abs(integers[used]).max()) >= 127

    again, same = jax.jit(integer_codebooks)(rounded.astype(jnp.float32) * step, codes, step)
    np.testing.assert_array_equal(again, rounded)
    assert same == step


def test_a_step_that_no_longer_fits_is_replaced():
    codes = jnp.zeros((1, 1, 2), jnp.int32)
    books = jnp.asarray([[[1.0]], [[1.0]]], jnp.float32)
    for step in (1 / 100, 1.0):  # 200 of these in the sum; 2 of these
        rounded, found = integer_codebooks(books, codes, jnp.float32(step))
        assert float(found) == pytest.approx(2 / 126)
        assert int(np.asarray(rounded, np.int32).sum()) == 126


def test_other_codebooks_are_refused():
    tensor = _tensor(16)
    tensor = dataclasses.replace(tensor, codebooks=tensor.codebooks.astype(jnp.bfloat16))
    with pytest.raises(VqjaxError, match="codebooks in bfloat16: only float32, float16, int8"):
        CodedWeight.of(tensor)


@pytest.mark.parametrize(("bits", "entries"), [(None, 12), (16, 300), (8, 12), (8, 256)])
def test_the_host_decodes_the_same(bits, entries):
    tensor = _tensor(bits, entries=entries)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    near(tensor.host_matrix(), tensor.decode_matrix())
    weight = _trained(CodedWeight.of(tensor))
    vectors = jax.jit(lambda weight: weight.vectors(), compiler_options=xla_flags.EMITTERS_OF_USERS)
    near(weight.host_vectors(), vectors(weight))


@settings(max_examples=25, deadline=None)
@given(
    books=st.integers(1, 6), spread=st.floats(0.1, 3), known=st.booleans(), seed=st.integers(0, 99)
)
def test_the_host_rounds_integer_codebooks_to_the_same_bits(books, spread, known, seed):
    rng = np.random.default_rng(seed)
    books_MKG = rng.normal(size=(books, 8, 4)).astype(np.float32)
    codes_OJM = rng.integers(0, 7, (5, 6, books))
    step = None
    if known:  # one that fits, or hardly, or not
        step = integer_codebooks(books_MKG, codes_OJM)[1] * np.float32(spread)
    host = integer_codebooks(books_MKG, codes_OJM, step)
    compiled = jax.jit(integer_codebooks, compiler_options=xla_flags.EMITTERS_OF_USERS)
    for ours, theirs in zip(host, compiled(books_MKG, codes_OJM, step), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
