# SPDX-License-Identifier: Apache-2.0
"""Tiles by rule, and which ones are worth timing."""

import dataclasses

import pytest

from vqjax.kernels import specs
from vqjax.kernels.problem import Problem, power_of_two
from vqjax.kernels.schedule import (
    FUSED_ROWS_FLOAT32,
    Schedule,
    by_rule,
    candidates,
    one_tile,
    vectors_of,
)

LINEAR = Problem("vq_matmul", 64, 960, 960, 4, 16, 6, "float32", "int8")
TYPES = ("float32", "float16", "bfloat16")
THREADS = 32  # of a warp
MOST = 16  # sums of a tile that a thread of float32 has registers for


@pytest.mark.parametrize("dtype", TYPES)
def test_schedules_worth_timing_are_valid_and_few(dtype):
    for op in ("vq_matmul", "vq_conv"):
        for layer in specs.layers(op):
            problem = layer.problem(2, dtype)
            found = candidates(problem)
            assert found[0] == by_rule(problem)
            assert len(set(found)) == len(found)
            assert not any(one.tiles.problems() for one in found)
            assert len(found) <= (1 if found[0].kind == "staged" else 17)


def test_float32_is_fused_for_few_rows_in_tiles_that_registers_hold():
    """Tensor cores hold the operands of half precision; here a thread holds its own. Triton's code
    for tiles of 64x64x64 and four warps spills 400 to 6,500 bytes of each thread."""
    assert by_rule(LINEAR).kind == "staged"
    assert by_rule(dataclasses.replace(LINEAR, dtype="bfloat16")).kind == "fused"
    for rows in (1, 2, 16, FUSED_ROWS_FLOAT32):
        for group, window in ((1, 1), (4, 1), (6, 1), (8, 1), (3, 3), (9, 3)):
            problem = dataclasses.replace(LINEAR, rows=rows, group=group, window=window)
            assert by_rule(problem).kind == "fused"
            for one in candidates(problem):
                assert one.tiles.rows * one.tiles.outputs <= MOST * THREADS * one.tiles.warps
                assert one.tiles.depth <= 32


def test_without_tensor_cores_all_types_have_the_tiles_of_float32():
    """On compute capability 7.5, tiles of 128x64x64 in float16 spill 2,000 bytes of each thread."""
    for rows in (1, 32, 33, 256):
        half, single = (
            dataclasses.replace(LINEAR, rows=rows, dtype=t) for t in ("float16", "float32")
        )
        assert by_rule(half, tensor_cores=False) == by_rule(single)
        assert candidates(half, tensor_cores=False) == candidates(single)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_trial_has_the_tiles_of_its_problem_and_runs_its_loop_twice(dtype):
    for op in ("vq_matmul", "vq_conv"):
        for layer in specs.layers(op):
            whole = layer.problem(2, dtype)
            made = by_rule(whole)
            small, tried = one_tile(whole, made)
            assert tried == Schedule(made.kind, dataclasses.replace(made.tiles, splits=1))
            assert (small.rows, small.outputs) == (made.tiles.rows, made.tiles.outputs)
            assert small.fan_in >= 2 * made.tiles.depth // power_of_two(whole.group) * whole.group
            code = ("op", "books", "entries", "group", "dtype", "codebook_dtype", "window")
            assert all(getattr(small, name) == getattr(whole, name) for name in code)


@pytest.mark.parametrize(("batch", "most"), [(2, 6), (32, 4)])
def test_layers_of_a_model_share_trials(batch, most):
    """As docs/kernels.md has it: each takes a compilation before the first image."""
    every = [layer for op in ("vq_matmul", "vq_conv") for layer in specs.layers(op)]
    whole = [one.problem(batch, "bfloat16") for one in every if one.model == "cin256-v2"]
    assert len({one_tile(problem, by_rule(problem)) for problem in whole}) == most


def test_vectors_that_are_read_place_by_place_are_fewer():
    """64x64x64 of them spill 600 bytes of each thread, in half precision too."""
    product = dataclasses.replace(LINEAR, dtype="bfloat16")
    assert by_rule(product).tiles.depth == 64
    convolution = dataclasses.replace(product, op="vq_conv", group=9, window=3)
    assert by_rule(convolution).tiles.depth == 32
    assert max(one.tiles.depth for one in candidates(convolution)) == 32


@pytest.mark.parametrize("dtype", TYPES)
def test_every_split_has_work(dtype):
    for op in ("vq_matmul", "vq_conv"):
        for layer in specs.layers(op):
            problem = layer.problem(2, dtype)
            for tiles in (one.tiles for one in candidates(problem) if one.kind == "fused"):
                units = problem.inputs if op == "vq_conv" else problem.groups
                of_step = tiles.depth if op == "vq_conv" else vectors_of(tiles.depth, problem)
                steps = -(-units // (of_step * tiles.splits))
                assert (tiles.splits - 1) * steps * of_step < units


def test_rows_of_sixteen_bytes_are_not_prefetched():
    """Triton copies them ahead by `cp.async.cg`, which has no use of the first cache."""
    half = dataclasses.replace(LINEAR, dtype="bfloat16")
    assert by_rule(half).tiles.stages == 1
    assert by_rule(dataclasses.replace(half, group=4)).tiles.stages == 2
    assert by_rule(dataclasses.replace(half, group=9, window=3)).tiles.stages == 2
    for problem in (half, dataclasses.replace(half, group=4)):
        assert {one.tiles.stages for one in candidates(problem)} == {1, 2}
