# SPDX-License-Identifier: Apache-2.0
"""Integer products with packed weights: equal to sums of Python's integers, to the last one."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.io import models as small
from tests.kernels.machine_code import CAPABILITIES, assembled, kept_modules
from tests.kernels.test_lowering import lowered
from tests.kernels.test_pallas import INTERPRET
from vqjax.core.activations import InputRange
from vqjax.core.integer import integer_kernel, integerize
from vqjax.errors import VqjaxError
from vqjax.kernels import decode, dispatch
from vqjax.kernels.problem import IntegerOperands, Problem
from vqjax.kernels.schedule import Schedule, Tiles, smallest
from vqjax.kernels.vq_conv import pallas as conv_pallas
from vqjax.kernels.vq_conv import ref as conv_ref
from vqjax.kernels.vq_conv.window import Window
from vqjax.kernels.vq_matmul import api
from vqjax.kernels.vq_matmul import pallas as matmul_pallas
from vqjax.kernels.vq_matmul import ref as matmul_ref
from vqjax.models import packed

FUSED, STAGED = smallest()
SPLIT = Schedule("fused", Tiles(16, 16, 32, splits=2))

EXAMPLES = [  # M and K; G of a product and of a convolution; stride
    ((1, 256), (6, 1), 1, STAGED),
    ((1, 4096), (4, 3), 2, FUSED),
    ((2, 16), (4, 3), 1, FUSED),
    ((2, 4096), (8, 9), 2, SPLIT),
    ((3, 16), (8, 3), 1, SPLIT),
    ((4, 16), (8, 9), 2, STAGED),
    ((4, 16), (8, 9), 1, FUSED),
    ((8, 16), (4, 1), 2, FUSED),
    ((8, 256), (6, 3), 2, STAGED),
]
POINT = ((0, 0), (0, 0))


def problem_of(op, rows, sizes, code, group, **window) -> Problem:
    (inputs, outputs), (books, entries) = sizes, code
    return Problem(op, rows, inputs, outputs, books, entries, group, "int8", "int8", **window)


def random_operands(problem: Problem, x_shape, *, unit: bool) -> IntegerOperands:
    """All of int8 in the levels; no sum of entries exceeds it.

    Args:
      unit: scales of 1, zero points of 0 and no bias: the output is the sums themselves, which
        float32 holds exactly.
    """
    rng = np.random.default_rng(0)
    most = 127 // problem.books
    size = (problem.books, problem.entries, problem.group)
    codes = rng.integers(0, problem.entries, (problem.outputs, problem.groups * problem.books))
    books_MKG: Any = rng.integers(-most, most + 1, size).astype(np.int8)
    packed_OY: Any = decode.pack(codes, problem.entries)
    w_ON = decode.decode_integers(packed_OY, books_MKG, groups=problem.groups)
    rows, outputs = problem.rows, problem.outputs
    scales = np.ones(outputs) if unit else rng.uniform(1, 2, outputs)
    bias = None if unit else jax.device_put(rng.normal(size=outputs).astype(np.float32))
    steps = np.ones(rows) if unit else rng.uniform(1, 2, rows)
    zeros = np.zeros(rows) if unit else rng.integers(-9, 9, rows)
    put = jax.device_put  # which compiles nothing
    return IntegerOperands(
        x=put(rng.integers(-128, 128, x_shape).astype(np.int8)),
        packed_OY=put(packed_OY),
        codebooks_MKG=put(books_MKG),
        scales_O=put(scales.astype(np.float32)),
        codebook_scale=put(np.float32(1 if unit else 0.01)),
        bias_O=bias,
        steps_P=put(steps.astype(np.float32)),
        zeros_P=put(zeros.astype(np.int32)),
        totals_O=put(np.asarray(w_ON)[:, : problem.fan_in].sum(axis=1).astype(np.int32)),
    )


def exact_sums(operands: IntegerOperands, problem: Problem, window: Window | None) -> np.ndarray:
    """In 64 bits, [P, O]."""
    stored = jax.device_get((operands.packed_OY, operands.codebooks_MKG))
    w_OP = decode.decode_integers(*stored, groups=problem.groups)
    w_ON = np.asarray(w_OP, np.int64)[:, : problem.fan_in]
    x = np.asarray(operands.x, np.int64)
    if window is None:
        return x @ w_ON.T
    lines, columns = window.outputs(x.shape[1:3])
    w_OIyx = w_ON.reshape(problem.outputs, problem.inputs, 3, 3)
    down, right = window.strides
    sums = sum(
        x[:, ky::down, kx::right][:, :lines, :columns] @ w_OIyx[:, :, ky, kx].T
        for ky in range(3)
        for kx in range(3)
    )
    return np.asarray(sums).reshape(problem.rows, problem.outputs)


def assert_exact(run, problem: Problem, x_shape, window: Window | None = None) -> None:
    """The sums to the last integer; scaled, to the rounding of float32."""
    operands = random_operands(problem, x_shape, unit=True)
    sums = exact_sums(operands, problem, window)
    assert 100 < np.abs(sums).max() < 2**24
    run = jax.jit(run)
    found = run(operands)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(found, np.int64).reshape(sums.shape), sums)

    operands = random_operands(problem, x_shape, unit=False)
    scaling = [np.asarray(a, np.float64) for a in operands.scaling()]
    factors_O, biases_O, steps_P, zeros_P, totals_O = scaling
    shifted = exact_sums(operands, problem, window) - zeros_P[:, None] * totals_O
    expected = shifted * steps_P[:, None] * factors_O + biases_O
    np.testing.assert_allclose(run(operands).reshape(sums.shape), expected, rtol=1e-5, atol=1e-3)


def test_examples_hold_every_kind():
    codes, groups, strides, schedules = zip(*EXAMPLES)
    assert {books for books, _ in codes} >= {1, 2, 4, 8}
    assert {entries for _, entries in codes} == {16, 256, 4096}
    assert {group for group, _ in groups} >= {8, 4}
    assert {group for _, group in groups} == {9, 3, 1}
    kinds = set(itertools.product((FUSED, SPLIT, STAGED), (1, 2)))
    assert set(zip(schedules, strides)) == kinds


@INTERPRET
@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_products_are_exact(interpret, index):
    code, (group, _), _, schedule = EXAMPLES[index]
    rows, sizes = ((1, (40, 3)), (7, (37, 18)), (21, (100, 16)))[index % 3]
    problem = problem_of("vq_matmul", rows, sizes, code, group)
    assert not matmul_pallas.unsupported(problem)
    options = {"problem": problem, "schedule": schedule, "interpret": interpret}
    run = functools.partial(matmul_pallas.vq_matmul, **options)
    assert_exact(run, problem, (rows, sizes[0]))
    assert_exact(matmul_ref.vq_matmul_int8, problem, (rows, sizes[0]))


@INTERPRET
@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_convolutions_are_exact(interpret, index):
    code, (_, group), stride, schedule = EXAMPLES[index]
    image, sizes = (((1, 7, 6), (3, 17)), ((2, 5, 5), (40, 3)))[index % 2]
    window = Window(3, (stride, stride), POINT)
    lines, columns = window.outputs(image[1:])
    rows, strides = image[0] * lines * columns, window.strides
    problem = problem_of("vq_conv", rows, sizes, code, group, window=3, strides=strides)
    assert not conv_pallas.unsupported(problem)
    options = {"problem": problem, "schedule": schedule, "interpret": interpret}
    run = functools.partial(conv_pallas.vq_conv, window=window, **options)
    x_shape = (*image, sizes[0])
    assert_exact(run, problem, x_shape, window)
    assert_exact(functools.partial(conv_ref.vq_conv_int8, window=window), problem, x_shape, window)


def test_a_convolution_of_integers_is_one_product():
    """Nine would pass nine sets of sums through memory."""
    q_BHWI, w_HWIO = jnp.ones((1, 5, 5, 4), jnp.int8), jnp.ones((3, 3, 4, 6), jnp.int8)
    program = str(jax.make_jaxpr(lambda: conv_ref.integer_sums(q_BHWI, w_HWIO, (2, 2)))())
    assert program.count("dot_general[") == 1


LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "vector": ((20, 6), (2, 20), {}),
    "tokens": ((20, 6), (2, 5, 20), {}),
    "1x1": ((1, 1, 12, 3), (2, 4, 3, 12), {"stride": 1, "padding": (0, 0)}),
    "3x3": ((3, 3, 4, 5), (2, 6, 5, 4), {"stride": 1, "padding": (1, 1)}),
    "3x3 stride 2": ((3, 3, 4, 5), (2, 6, 5, 4), {"stride": 2, "padding": (0, 1)}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_packed_and_decoded_integers_are_equal(name):
    """As layers call them: ranges that differ from example to example, and so does the padding."""
    shape, x_shape, geometry = LAYERS[name]
    rng = np.random.default_rng(0)
    tensor = small.integer_tensor(rng, shape)
    read = InputRange(step_B=jnp.array([0.02, 0.03]), zero_B=jnp.array([100.0, 31.0]), bits=8)
    x = jnp.asarray(rng.standard_normal(x_shape), jnp.float32)
    decoded = integer_kernel(tensor)
    kept = integerize({"kernel": tensor}, stay_packed=["kernel"])["kernel"]
    if geometry:
        expected = decoded.convolution(x, read, **geometry)
        found = packed.integer_convolution(x, kept, read, None, **geometry)
    else:
        expected = decoded.product(x, read)
        found = packed.integer_product(x, kept, read, None)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_integers_lower():
    for device_kind in CAPABILITIES:
        for schedule in smallest():
            problem = problem_of("vq_matmul", 16, (40, 24), (4, 16), 8)
            run = functools.partial(matmul_pallas.vq_matmul, problem=problem, schedule=schedule)
            text = lowered(device_kind, run, problem.abstract((16, 40)))
            assert text.count("__gpu$xla.gpu.triton") == 1
        window = Window(3, (1, 1), POINT)
        problem = problem_of("vq_conv", 16, (40, 24), (4, 16), 9, window=3)
        options: dict[str, Any] = {"problem": problem, "schedule": smallest()[0], "window": window}
        run = functools.partial(conv_pallas.vq_conv, **options)
        text = lowered(device_kind, run, problem.abstract((1, 6, 6, 40)))
        assert text.count("__gpu$xla.gpu.triton") == 1


def test_paths_without_integers_say_so():
    problem = problem_of("vq_matmul", 2, (20, 3), (4, 16), 8)
    operands = random_operands(problem, (2, 20), unit=False)
    ways = api.ways(problem)
    with dispatch.asking("lut"):
        found = dispatch.decide(problem, ways)
    assert found.path == "xla"
    assert "this is one of integers" in found.why
    with dispatch.asking("triton"), pytest.raises(VqjaxError, match="activations are int8, kernel"):
        dispatch.run(problem, operands, ways)


def test_misfits_are_said_before_anything_runs():
    problem = problem_of("vq_matmul", 2, (20, 3), (4, 16), 8)
    operands = random_operands(problem, (2, 20), unit=False)
    arguments = (operands.packed_OY, operands.codebooks_MKG.astype(jnp.float32), operands.scales_O)
    with pytest.raises(VqjaxError) as caught:
        api.vq_matmul_int8(
            operands.x.astype(jnp.float32),
            operands.steps_P,
            operands.zeros_P,
            *arguments,
            operands.codebook_scale,
            operands.totals_O[:2],
        )
    text = str(caught.value)
    assert "activations are float32, expected int8" in text
    assert "codebooks are float32, expected int8" in text
    assert "totals_O int32 (2,), expected int32 (3,)" in text


@pytest.mark.slow
@pytest.mark.parametrize("device_kind", CAPABILITIES)
def test_tensor_cores_multiply_integers(device_kind, tmp_path, monkeypatch):
    made = kept_modules(monkeypatch, tmp_path)
    problem = problem_of("vq_matmul", 16, (960, 64), (4, 16), 8)
    run = functools.partial(matmul_pallas.vq_matmul, problem=problem, schedule=smallest()[0])
    lowered(device_kind, run, problem.abstract((16, 960)))
    window = Window(3, (1, 1), POINT)
    problem = problem_of("vq_conv", 16, (96, 64), (4, 16), 9, window=3)
    options: dict[str, Any] = {"problem": problem, "schedule": smallest()[0], "window": window}
    conv = functools.partial(conv_pallas.vq_conv, **options)
    lowered(device_kind, conv, problem.abstract((1, 6, 6, 96)))
    for text in made:
        found = assembled(text, device_kind, tmp_path, {"num_warps": 4, "num_stages": 2})
        assert found["cubin"]
        assert "mma.sync" in found["ptx"]
        assert ".s8.s8.s32" in found["ptx"]
