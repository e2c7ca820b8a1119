# SPDX-License-Identifier: Apache-2.0
"""Pallas kernels against the definition in float64: in interpret mode, and compiled where a GPU is.

Errors are relative to the largest output.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.kernels import books as code_books
from vqjax.kernels import decode, device, gpu_arrays, pallas_decode, specs
from vqjax.kernels.problem import Operands, Problem
from vqjax.kernels.schedule import Schedule, Tiles, by_rule, one_tile, smallest
from vqjax.kernels.vq_conv import pallas as conv_pallas
from vqjax.kernels.vq_conv import ref as conv_ref
from vqjax.kernels.vq_conv.specs import LAYERS as CONV_LAYERS
from vqjax.kernels.vq_conv.window import Window, for_trial
from vqjax.kernels.vq_matmul import pallas as matmul_pallas
from vqjax.kernels.vq_matmul import ref as matmul_ref
from vqjax.kernels.vq_matmul.specs import LAYERS as MATMUL_LAYERS

# Three to four times what was measured; half precision loses most where weights are rounded.
TOL = {"float32": 2e-6, "float16": 1.5e-3, "bfloat16": 1e-2}

NO_GPU = device.current().refuses("pallas")
INTERPRET = pytest.mark.parametrize(
    "interpret",
    [
        pytest.param(True, id="interpret"),
        pytest.param(
            False,
            id="compiled",
            marks=[pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=str(NO_GPU))],
        ),
    ],
)

FUSED, SPLIT, STAGED = SCHEDULES = (
    Schedule("fused", Tiles(16, 16, 16)),
    Schedule("fused", Tiles(16, 16, 16, splits=2)),
    Schedule("staged", Tiles(16, 16, 16)),
)

# Stride and padding: as the U-Net pads, and as its first stage does with stride 2.
SAME, DOWN, LATE = MOVES = (1, (1, 1)), (2, (1, 1)), (2, (0, 1))

EXAMPLES = [  # M, K and how codebooks are stored; G of a product and of a convolution
    ((1, 16, "bfloat16"), (4, 3), DOWN, "float32", STAGED),
    ((1, 256, "bfloat16"), (8, 9), SAME, "float16", FUSED),
    ((1, 4096, "bfloat16"), (6, 1), LATE, "bfloat16", SPLIT),
    ((2, 16, "int8"), (4, 3), LATE, "bfloat16", FUSED),
    ((2, 256, "float16"), (8, 9), SAME, "float32", SPLIT),
    ((2, 4096, "float32"), (6, 1), DOWN, "float16", STAGED),
    ((4, 16, "float16"), (8, 9), DOWN, "float16", SPLIT),
    ((4, 256, "float32"), (6, 1), LATE, "bfloat16", STAGED),
    ((4, 4096, "float32"), (4, 3), SAME, "float32", FUSED),
    ((8, 16, "int8"), (6, 1), LATE, "float32", FUSED),
    ((8, 256, "int8"), (4, 3), DOWN, "float16", SPLIT),
    ((8, 4096, "float16"), (8, 9), SAME, "bfloat16", STAGED),
    # Single weights, as the first and the last convolution have them; three codes read as one.
    ((1, 256, "int8"), (8, 1), SAME, "bfloat16", SPLIT),
    ((3, 16, "int8"), (8, 9), DOWN, "bfloat16", FUSED),
]


def weight(operands: Operands, problem: Problem) -> np.ndarray:
    """The decoded matrix in float64, [O, N]."""
    w_OP = decode.decode(*jax.device_get(operands[1:5]), groups=problem.groups)
    return np.asarray(w_OP, np.float64)[:, : problem.fan_in]


def assert_near(found: jax.Array, expected: np.ndarray, dtype: str) -> None:
    assert found.dtype == dtype
    error = np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()
    assert error < TOL[dtype]


def test_examples_hold_all_pairs():
    """Of types, sizes of a code and schedules; every way to store codebooks meets every type."""
    every = [
        (code[0], code[1], group, dtype, schedule) for code, group, _, dtype, schedule in EXAMPLES
    ]
    levels = [(1, 2, 4, 8), (16, 256, 4096), ((8, 9), (4, 3), (6, 1)), tuple(TOL), SCHEDULES]
    for (i, first), (j, second) in itertools.combinations(enumerate(levels), 2):
        assert {(one[i], one[j]) for one in every} >= set(itertools.product(first, second))
    stored = {(code[2], dtype) for code, *_, dtype, _ in EXAMPLES}
    assert stored == set(itertools.product((*TOL, "int8"), TOL))
    moved = {(move, schedule) for *_, move, _, schedule in EXAMPLES}
    assert moved == set(itertools.product(MOVES, SCHEDULES))


@INTERPRET
@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_products_agree(interpret, index):
    (books, entries, stored), (group, _), _, dtype, schedule = EXAMPLES[index]
    # Sizes beside the tiles' on both sides.
    rows, inputs, outputs = ((21, 37, 18), (7, 40, 3), (1, 3, 16), (16, 16, 32))[index % 4]
    problem = Problem("vq_matmul", rows, inputs, outputs, books, entries, group, dtype, stored)
    assert not matmul_pallas.unsupported(problem)
    operands = specs.random_operands(problem, (rows, inputs))
    run = functools.partial(matmul_pallas.vq_matmul, problem=problem, schedule=schedule)
    found = jax.jit(functools.partial(run, interpret=interpret))(operands)
    x_BI, bias_O = (np.asarray(a, np.float64) for a in (operands.x, operands.bias_O))
    assert_near(found, x_BI @ weight(operands, problem).T + bias_O, dtype)


@INTERPRET
@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_convolutions_agree(interpret, index):
    code, (_, group), moves, dtype, schedule = EXAMPLES[index]
    image, sizes = (((1, 5, 4), (3, 17)), ((2, 3, 3), (18, 3)))[index % 2]
    problem, window = conv_problem(image, sizes, code, group, moves, dtype)
    assert not conv_pallas.unsupported(problem)
    operands = specs.random_operands(problem, (*image, sizes[0]))
    options = {"problem": problem, "schedule": schedule, "window": window}
    run = functools.partial(conv_pallas.vq_conv, **options, interpret=interpret)
    found = jax.jit(run)(operands)
    assert_near(found, convolved(operands, problem, window), dtype)


def test_a_convolution_agrees_where_numbers_have_64_bits():
    code, image, sizes = (2, 16, "int8"), (1, 3, 3), (18, 3)
    problem, window = conv_problem(image, sizes, code, 9, SAME, "float32")
    operands = specs.random_operands(problem, (*image, sizes[0]))
    with jax.enable_x64(True):
        found = conv_pallas.vq_conv(operands, problem, FUSED, window, interpret=True)
    assert_near(found, convolved(operands, problem, window), "float32")


@INTERPRET
@pytest.mark.parametrize(
    ("bits", "books"), [(bits, (4, 3, 1)[bits % 3]) for bits in code_books.CODE_BITS]
)
def test_codes_of_every_width_are_read(interpret, bits, books):
    """Exactly; the last code of a row ends where its bytes end, or within them."""
    problem = Problem("vq_matmul", 1, 21, 18, books, 2**bits, 1, "float32", "int8")
    operands = specs.random_operands(problem, (1, 21))
    operands = operands._replace(scales_O=np.ones(18, np.float32), codebook_scale=np.float32(1))
    options = {"problem": problem, "tiles": Tiles(16, 16, 16), "interpret": interpret}
    found = jax.jit(functools.partial(pallas_decode.decode, **options))(operands)
    np.testing.assert_array_equal(found, weight(operands, problem))


def conv_problem(image, sizes, code, group, moves, dtype) -> tuple[Problem, Window]:
    stride, padding = moves
    window = Window.of(3, (stride, stride), (padding, padding), image[1:])
    height, width = window.outputs(image[1:])
    books, entries, stored = code
    rows = image[0] * height * width
    inputs, outputs = sizes
    sized = dataclasses.replace(
        Problem("vq_conv", rows, inputs, outputs, books, entries, group, dtype, stored),
        window=3,
        strides=window.strides,
    )
    return sized, window


def convolved(operands: Operands, problem: Problem, window: Window) -> np.ndarray:
    """The convolution as nine products in float64."""
    x_BHWI = np.asarray(operands.x, np.float64)
    padded_BHWI = np.pad(x_BHWI, ((0, 0), *window.padding, (0, 0)))
    w_OIyx = weight(operands, problem).reshape(problem.outputs, problem.inputs, 3, 3)
    height, width = window.outputs(x_BHWI.shape[1:3])
    down, right = window.strides
    y_BHWO = np.zeros((len(x_BHWI), height, width, problem.outputs))
    for ky in range(3):
        for kx in range(3):
            seen = padded_BHWI[:, ky::down, kx::right][:, :height, :width]
            y_BHWO += seen @ w_OIyx[:, :, ky, kx].T
    return y_BHWO + np.asarray(operands.bias_O, np.float64)


def test_what_kernels_cannot_do_is_said():
    problem = Problem("vq_conv", 16, 16, 16, 9, 15, 18, "float64", "float16", window=5)
    assert conv_pallas.unsupported(problem) == [
        "K = 15, kernels read powers of two up to 1024, and 4096",
        "M = 9, kernels add up 1 to 8 codebooks",
        "activations are float64, kernels take float32, float16, bfloat16, int8",
        "window of 5, the kernel has 3x3 weights",
        "vectors of 18, kernels read one weight, a row of 3 or all 9",
    ]
    large = Problem("vq_matmul", 2**20, 4096, 16, 4, 16, 8, "float16", "float16")
    (reason,) = matmul_pallas.unsupported(large)
    assert reason == "an array of 4294967296 elements, kernels count with 32 bits"


@pytest.mark.gpu
@pytest.mark.skipif(bool(NO_GPU), reason=str(NO_GPU))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("batch", [1, 16])
def test_full_size_layers_agree(dtype, batch):
    """Every layer of the large U-Net, tiled by the rules."""
    for layer in MATMUL_LAYERS:
        problem = layer.problem(batch, dtype)
        operands = specs.random_operands(problem, layer.operands_shape(batch))
        found = matmul_pallas.vq_matmul(operands, problem, by_rule(problem))
        x_BI, bias_O = (np.asarray(a, np.float64) for a in (operands.x, operands.bias_O))
        assert_near(found, x_BI @ weight(operands, problem).T + bias_O, dtype)
    for layer in CONV_LAYERS:
        problem = layer.problem(batch, dtype)
        operands = specs.random_operands(problem, layer.operands_shape(batch))
        window = Window.of(3, problem.strides, (layer.padding, layer.padding), layer.image)
        found = conv_pallas.vq_conv(operands, problem, by_rule(problem), window)
        assert_near(found, convolved(operands, problem, window), dtype)


def test_int8_codebooks_meet_their_scale():
    problem = Problem("vq_matmul", 2, 8, 4, 1, 16, 8, "float32", "int8")
    operands = specs.random_operands(problem, (2, 8), bias=False)
    assert operands.codebook_scale is not None
    np.testing.assert_allclose(
        operands.factors(), operands.scales_O * operands.codebook_scale, rtol=1e-6
    )
    assert operands.scaling().biases_O.dtype == jnp.float32


@pytest.mark.parametrize("schedule", smallest(), ids=lambda schedule: schedule.kind)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_trials_compare_numbers(dtype, schedule):
    """What the dispatcher asks of a kernel before a model depends on it, also while tracing."""
    whole = Problem("vq_matmul", 40, 60, 70, 4, 16, 8, dtype, "int8")
    product, tile = one_tile(whole, schedule)
    window = dataclasses.replace(whole, op="vq_conv", books=3, group=9, window=3)
    patches, _ = one_tile(window, schedule)
    window, image = for_trial(patches)
    run_product = functools.partial(matmul_pallas.vq_matmul, interpret=True)
    run_patches = functools.partial(conv_pallas.vq_conv, window=window, interpret=True)
    shapes = [(product.rows, product.inputs), (1, *image, patches.inputs)]
    cases: list[tuple[Any, ...]] = [
        (run_product, matmul_ref.definition(product), product, tile, shapes[0]),
        (run_patches, conv_ref.definition(patches, window), patches, tile, shapes[1]),
    ]

    def trials(x):
        for case in cases:
            gpu_arrays.try_out(*case)
        return x

    x = jnp.float32(1)
    with jax.transfer_guard("disallow"):
        assert jax.jit(trials)(x) is not None
    for run, *rest in cases:

        def wrong(operands, *, problem, schedule, run=run):
            return 1.1 * run(operands, problem=problem, schedule=schedule)

        with pytest.raises(ArithmeticError, match=r"differ from the definition by 0\.(1|09)"):
            gpu_arrays.try_out(wrong, *rest)
