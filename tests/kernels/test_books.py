# SPDX-License-Identifier: Apache-2.0
"""Merged codebooks: the same bytes, fewer codes, the same weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.kernels import decode, specs
from vqjax.kernels.books import books_for, books_of
from vqjax.kernels.problem import Operands, Prepared, Problem
from vqjax.kernels.schedule import Schedule, Tiles
from vqjax.kernels.vq_conv import pallas as conv_pallas
from vqjax.kernels.vq_conv.window import for_trial
from vqjax.kernels.vq_matmul import pallas

CONVOLUTION = Problem("vq_conv", 16, 16, 16, 4, 16, 9, "float32", "int8", window=3)
EXTREMES = {4: -128, 5: 127}  # of all codebooks: the largest sums of every sign


def product(code: tuple[int, int], group: int, dtype: str, stored: str = "int8") -> Problem:
    books, entries = code
    return Problem("vq_matmul", 3, 40, 20, books, entries, group, dtype, stored)


def extreme_operands(problem: Problem) -> Operands:
    """Entries of all of int8."""
    operands = specs.random_operands(problem, (problem.rows, problem.inputs), bias=False)
    rng = np.random.default_rng(0)
    books_MKG = rng.integers(-128, 128, operands.codebooks_MKG.shape).astype(np.int8)
    for weight, value in EXTREMES.items():
        books_MKG[..., weight % problem.group] = value
    return operands._replace(codebooks_MKG=jnp.asarray(books_MKG))


@pytest.mark.parametrize(
    ("code", "merged"),
    [
        ((1, 256), (1, 256)),
        ((2, 16), (1, 256)),
        ((3, 16), (1, 4096)),
        ((4, 16), (2, 256)),
        ((5, 16), (5, 16)),
        ((6, 16), (3, 256)),  # two tables of 4096 would be too large
        ((2, 32), (1, 1024)),
        ((8, 4), (2, 256)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_merged_codebooks_hold_the_sums(code, merged, dtype):
    problem = product(code, 8, dtype)
    operands = extreme_operands(product(code, 8, "float32"))
    packed_OY, books_MKG = np.asarray(operands.packed_OY), np.asarray(operands.codebooks_MKG)

    def summed(books_MKG: np.ndarray) -> np.ndarray:
        count, entries, _ = books_MKG.shape
        codes_OC = decode.unpack(packed_OY, problem.groups * count, entries)
        codes_OJM = codes_OC.reshape(problem.outputs, problem.groups, count)
        return decode.sum_entries(codes_OJM, books_MKG)

    exact_OJG = summed(books_MKG.astype(np.int32))
    for rounded in (False, True):
        books = books_of(problem, rounded=rounded)
        if dtype != "int8":  # whose tables are smaller, and take more
            assert (books.problem.books, books.problem.entries) == merged
        assert books.problem.row_bytes == problem.row_bytes
        table_EP = np.asarray(jax.jit(books.table)(operands.codebooks_MKG))
        assert table_EP.dtype == books.problem.codebook_dtype
        table_BEG = table_EP.reshape(books.problem.books, books.problem.entries, 8)
        # int8 counts modulo 256; sums of the weights of a model are within it.
        expected_OJG = exact_OJG.astype(dtype if rounded or dtype == "int8" else np.float32)
        found_OJG = summed(table_BEG.astype(books.sums)).astype(expected_OJG.dtype)
        np.testing.assert_array_equal(found_OJG, expected_OJG)


def test_a_merged_codebook_may_have_to_be_small():
    """Where places are read one at a time, entries of all of a warp lie in as few lines."""
    for code, merged in (((3, 16), (3, 16)), ((4, 16), (2, 256)), ((1, 4096), (1, 4096))):
        found = books_of(product(code, 8, "bfloat16"), rounded=True, most=256).problem
        assert (found.books, found.entries) == merged


def test_other_codebooks_are_read_as_they_are():
    """Sums of them would be rounded; tables of large ones would not fit."""
    for problem in (
        product((4, 16), 8, "bfloat16", "float16"),
        product((2, 4096), 16, "bfloat16"),
    ):
        books = books_of(problem, rounded=True)
        assert books.problem == problem
        assert (books.count, books.sums) == (1, "float32")


@pytest.mark.parametrize("group", [8, 6])
def test_weights_of_products_are_sums_rounded_once(group):
    """In bfloat16, which holds no sum of four such entries: to the last bit."""
    problem = product((4, 16), group, "bfloat16")
    operands = extreme_operands(problem)
    operands = operands._replace(
        x=jnp.eye(3, 40, k=3, dtype=jnp.bfloat16),
        scales_O=jnp.ones(problem.outputs),
        codebook_scale=jnp.float32(1),
    )
    schedule = Schedule("fused", Tiles(16, 16, 16, splits=2))
    run = functools.partial(pallas.vq_matmul, problem=problem, schedule=schedule, interpret=True)
    found_BO = jax.jit(run)(operands)
    codes = jax.device_get((operands.packed_OY, operands.codebooks_MKG))
    exact_ON = decode.decode_integers(*codes, groups=problem.groups)
    expected_BO = exact_ON.astype(jnp.bfloat16).T[3:6]
    np.testing.assert_array_equal(found_BO, expected_BO)


@pytest.mark.parametrize("kind", ["fused", "staged"])
@pytest.mark.parametrize("op", ["vq_matmul", "vq_conv"])
def test_what_was_prepared_is_read(op, kind):
    """Not made again: twice the factors make twice the output, and of the table likewise."""
    schedule, window = Schedule(kind, Tiles(16, 16, 32)), for_trial(CONVOLUTION)[0]
    if op == "vq_conv":
        problem, shape = CONVOLUTION, (1, *for_trial(CONVOLUTION)[1], CONVOLUTION.inputs)
        run = functools.partial(conv_pallas.vq_conv, window=window)
    else:
        problem = product((4, 16), 8, "float32")
        shape, run = (problem.rows, problem.inputs), pallas.vq_matmul
    operands = specs.random_operands(problem, shape, bias=False)
    books = books_for(problem, staged=kind == "staged")
    prepared = books.prepare(*operands[2:5])

    compiled = jax.jit(functools.partial(run, problem=problem, schedule=schedule, interpret=True))

    def result(prepared: Prepared | None) -> np.ndarray:
        return np.asarray(compiled(operands._replace(prepared=prepared)))

    expected = result(None)
    np.testing.assert_array_equal(result(prepared), expected)
    for part in ("factors_O", "table"):
        doubled = dataclasses.replace(prepared, **{part: 2 * getattr(prepared, part)})
        np.testing.assert_allclose(result(doubled), 2 * expected, rtol=1e-6)
    # The table of another kernel is another one: this one makes its own.
    other = dataclasses.replace(prepared, table=jnp.zeros(1), kind=(7, "int8", True))
    np.testing.assert_array_equal(result(other), expected)
