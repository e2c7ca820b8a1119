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
from tests.kernels.integers import exact, random_operands
from tests.kernels.interpreted_triton import Case
from tests.kernels.machine_code import CAPABILITIES, assembled, kept_modules
from tests.kernels.test_lowering import lowered
from tests.kernels.test_pallas import INTERPRET
from vqjax.core.activations import InputRange
from vqjax.core.integer import integer_kernel, integerize
from vqjax.errors import VqjaxError
from vqjax.kernels import dispatch
from vqjax.kernels.device import Device
from vqjax.kernels.problem import Problem
from vqjax.kernels.schedule import Schedule, Tiles, smallest
from vqjax.kernels.vq_conv import api as conv_api
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


def cases() -> list[Case]:
    """A product and a convolution, whose input was padded before, of each example."""
    found = []
    for index, (code, groups, stride, schedule) in enumerate(EXAMPLES):
        rows, sizes = ((1, (40, 3)), (7, (37, 18)), (21, (100, 16)))[index % 3]
        product = problem_of("vq_matmul", rows, sizes, code, groups[0])
        found.append(Case(product, schedule, (rows, sizes[0])))
        image, sizes = (((1, 7, 6), (3, 17)), ((2, 5, 5), (40, 3)))[index % 2]
        window = Window(3, (stride, stride), POINT)
        lines, columns = window.outputs(image[1:])
        rows, moves = image[0] * lines * columns, {"window": 3, "strides": window.strides}
        conv = problem_of("vq_conv", rows, sizes, code, groups[1], **moves)
        found.append(Case(conv, schedule, (*image, sizes[0])))
    return found


CASES = cases()


def test_examples_hold_every_kind():
    codes, groups, strides, schedules = zip(*EXAMPLES)
    assert {books for books, _ in codes} >= {1, 2, 4, 8}
    assert {entries for _, entries in codes} == {16, 256, 4096}
    assert {group for group, _ in groups} >= {8, 4}
    assert {group for _, group in groups} == {9, 3, 1}
    kinds = set(itertools.product((FUSED, SPLIT, STAGED), (1, 2)))
    assert set(zip(schedules, strides)) == kinds


@INTERPRET
@pytest.mark.parametrize("index", range(len(CASES)))
def test_sums_are_exact(interpret, index):
    """And so is what they are scaled to."""
    problem, window = CASES[index].problem, CASES[index].window
    options = {"problem": problem, "schedule": CASES[index].schedule, "interpret": interpret}
    if problem.op == "vq_matmul":
        refused = matmul_pallas.unsupported(problem)
        run = functools.partial(matmul_pallas.vq_matmul, **options)
        definition = matmul_ref.definition(problem)
    else:
        refused = conv_pallas.unsupported(problem)
        run = functools.partial(conv_pallas.vq_conv, **options, window=window)
        definition = conv_ref.definition(problem, window)
    assert not refused
    operands = random_operands(problem, CASES[index].x_shape)
    expected = exact(operands, problem, window)
    for one in (run, definition):
        found = jax.jit(one)(operands)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found.reshape(expected.shape), expected)


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


def test_paths_without_integers_say_so(monkeypatch):
    problem = problem_of("vq_matmul", 2, (20, 3), (4, 16), 8)
    operands = random_operands(problem, (2, 20))
    ways = api.ways(problem)
    with dispatch.asking("lut"):
        found = dispatch.decide(problem, ways)
    assert found.path == "xla"
    assert "this is one of integers" in found.why
    t4 = Device("gpu", "Tesla T4", (7, 5))
    monkeypatch.setattr(dispatch, "current", lambda: t4)
    why = r"VQJAX_KERNELS=triton, .* 7\.5, and Triton compiles products of int8 for tensor cores"
    with dispatch.asking("triton"), pytest.raises(VqjaxError, match=why):
        dispatch.run(problem, operands, ways)


def test_misfits_are_said_before_anything_runs():
    problem = problem_of("vq_matmul", 2, (20, 3), (4, 16), 8)
    operands = random_operands(problem, (2, 20))
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
    rest = (operands.steps_P, operands.zeros_P, *arguments, operands.codebook_scale)
    for q in (operands.x, operands.x.astype(jnp.uint8).reshape(1, 2, 1, 20)):
        with pytest.raises(VqjaxError, match=r"vq_conv_int8: q u?int8 .* expected int8 \[B"):
            conv_api.vq_conv_int8(q, *rest, operands.totals_O, window=3)


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
