# SPDX-License-Identifier: Apache-2.0
"""Kernels in Triton: on Triton's CPU interpreter against float64, lowered for CUDA, and compiled.

Errors are relative to the largest output. The interpreter needs triton, lowering jax-triton and a
CUDA plugin of JAX too; none needs a GPU.
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from tests.kernels.interpreted_triton import Case
from tests.kernels.test_pallas import TOL, convolved, weight
from vqjax.errors import VqjaxError
from vqjax.kernels import device, dispatch, specs, triton_gpu
from vqjax.kernels.problem import Operands, Problem
from vqjax.kernels.schedule import Schedule, Tiles, by_rule, smallest
from vqjax.kernels.transform import transformable
from vqjax.kernels.vq_conv.specs import LAYERS as CONV_LAYERS
from vqjax.kernels.vq_matmul import api, ref
from vqjax.kernels.vq_matmul.specs import LAYERS as MATMUL_LAYERS

ROOT = pathlib.Path(__file__).parents[2]
CAPABILITIES = (75, 80, 90)
T4 = device.Device("gpu", "Tesla T4", (7, 5))

interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
MISSING = triton_gpu.missing()
lowering = pytest.mark.skipif(bool(MISSING), reason=str(MISSING))
NO_GPU = MISSING or device.current().refuses("triton")


def cases() -> list[Case]:
    """Every code width, way to store codebooks, type and schedule; sizes beside the tiles'."""
    schedules = itertools.cycle((*smallest(), Schedule("fused", Tiles(16, 16, 16, splits=2))))
    dtypes = itertools.cycle(sorted(TOL))
    codes = [
        (1, 256, "int8"),
        (2, 4096, "float16"),
        (3, 16, "int8"),
        (3, 4096, "bfloat16"),
        (4, 16, "float16"),
        (8, 16, "float32"),
        (1, 64, "int8"),
        (3, 32, "float16"),
        (6, 16, "int8"),
        (4, 16, "int8"),
    ]
    found = []
    for index, (books, entries, stored) in enumerate(codes):
        rows, inputs, outputs = ((21, 40, 3), (7, 37, 18), (1, 3, 16))[index % 3]
        group = (8, 6, 4)[index // 2 % 3]
        dtype = next(dtypes)
        product = Problem("vq_matmul", rows, inputs, outputs, books, entries, group, dtype, stored)
        found.append(Case(product, next(schedules), (rows, inputs)))
        batch, height, width = ((1, 5, 4), (2, 3, 3))[index % 2]
        stride, padding = ((1, (1, 1)), (2, (1, 1)), (2, (0, 1)))[index % 3]
        channels, outputs = ((3, 17), (18, 3))[index % 2]
        conv = Problem(
            "vq_conv", 0, channels, outputs, books, entries, (9, 3, 1)[index // 2 % 3],
            next(dtypes), stored, window=3, strides=(stride, stride),
        )  # fmt: skip
        case = Case(conv, next(schedules), (batch, height, width, channels), padding)
        lines, columns = case.window.outputs((height, width))
        conv = dataclasses.replace(conv, rows=batch * lines * columns)
        found.append(dataclasses.replace(case, problem=conv))
    return found


CASES = cases()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, np.ndarray]:
    """Of all cases, from one process in which kernels are interpreted."""
    file = tmp_path_factory.mktemp("triton") / "results.npz"
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted_triton", str(file)],
        input=json.dumps([case.plain() for case in CASES]),
        text=True,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(file))


def expected(case: Case, operands: Operands) -> np.ndarray:
    """In float64."""
    if case.problem.op == "vq_conv":
        return convolved(operands, case.problem, case.window)
    x_BI, bias_O = (np.asarray(a, np.float64) for a in (operands.x, operands.bias_O))
    return x_BI @ weight(operands, case.problem).T + bias_O


def assert_near(found: np.ndarray, exact: np.ndarray, dtype: str) -> None:
    error = np.abs(np.asarray(found, np.float64) - exact).max() / np.abs(exact).max()
    assert error < TOL[dtype]


@interpreted
@pytest.mark.parametrize("index", range(len(CASES)))
def test_interpreted_kernels_agree(index, results):
    case = CASES[index]
    exact = expected(case, specs.random_operands(case.problem, case.x_shape))
    assert_near(results[f"arr_{index}"], exact, case.problem.dtype)


def test_cases_hold_every_kind():
    seen = {(case.problem.op, case.schedule.kind) for case in CASES}
    assert seen == set(itertools.product(("vq_matmul", "vq_conv"), ("fused", "staged")))
    for op in ("vq_matmul", "vq_conv"):
        of_op = [case for case in CASES if case.problem.op == op]
        assert {case.problem.dtype for case in of_op} == set(TOL)
        assert {case.problem.entries for case in of_op} == {16, 32, 64, 256, 4096}
        assert {case.schedule.tiles.splits for case in of_op} == {1, 2}


def of_case(case: Case, capability: int | None = None):
    """What runs a case, and the shapes of its operands."""
    operands = case.problem.abstract(case.x_shape)
    options: dict[str, Any] = {
        "problem": case.problem,
        "schedule": case.schedule,
        "capability": capability,
    }
    if case.problem.op == "vq_matmul":
        from vqjax.kernels.vq_matmul import triton as matmul

        return functools.partial(matmul.vq_matmul, **options), operands
    from vqjax.kernels.vq_conv import triton as conv

    return functools.partial(conv.vq_conv, **options, window=case.window), operands


def of_layer(layer: specs.Layer, batch: int, dtype: str, schedule: Schedule | None = None) -> Case:
    problem = layer.problem(batch, dtype)
    shape, padding = layer.operands_shape(batch), layer.padding
    return Case(problem, schedule or by_rule(problem), shape, padding)


def lowered(run, operands) -> str:
    return jax.jit(run).trace(operands).lower(lowering_platforms=("cuda",)).as_text()


@lowering
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("layer", [MATMUL_LAYERS[0], CONV_LAYERS[0]], ids=lambda layer: layer.op)
def test_kernels_lower(layer, capability):
    """Triton compiles them to PTX here."""
    for schedule in smallest():
        text = lowered(*of_case(of_layer(layer, 1, "bfloat16", schedule), capability))
        assert text.count("triton_kernel_call") == 1


@lowering
@pytest.mark.parametrize("index", range(len(CASES)))
def test_every_code_lowers(index):
    assert lowered(*of_case(CASES[index], 75)).count("triton_kernel_call") == 1


@lowering
def test_the_named_path_is_taken(monkeypatch):
    """As if this were a T4: through the dispatcher, with gradients and under `shard_map`."""
    launch = triton_gpu.launch
    monkeypatch.setattr(
        triton_gpu, "launch", lambda *args, **options: launch(*args, **options | {"capability": 75})
    )
    monkeypatch.setattr(dispatch, "current", lambda: T4)
    monkeypatch.setattr(dispatch, "_failed_trial", lambda *args: ())
    problem = Problem("vq_matmul", 4, 16, 12, 2, 16, 8, "float32", "float16")
    operands = problem.abstract((4, 16))

    def loss(operands: Operands) -> jax.Array:
        return jnp.sum(api.vq_matmul(*operands) ** 2)

    with dispatch.asking("triton"):
        assert api.choice(operands).path == "triton"
        text = lowered(jax.grad(loss, allow_int=True), operands)
        assert text.count("triton_kernel_call") == 1

        auto = (jax.sharding.AxisType.Auto,)
        mesh = AbstractMesh((2,), ("data",), axis_types=auto)
        parts: Any = PartitionSpec("data")
        whole: Any = PartitionSpec()
        sharded = jax.shard_map(
            lambda operands: api.vq_matmul(*operands),
            mesh=mesh,
            in_specs=(Operands(parts, whole, whole, whole),),
            out_specs=parts,
        )
        assert lowered(sharded, operands).count("triton_kernel_call") == 1


def test_without_the_packages_every_reason_is_said(monkeypatch):
    monkeypatch.setattr(triton_gpu, "missing", lambda: "triton cannot be imported")
    problem = Problem("vq_matmul", 4, 16, 12, 2, 15, 8, "float32", "float16")
    operands = specs.random_operands(problem, (4, 16))
    with (
        dispatch.asking("triton"),
        pytest.raises(
            VqjaxError,
            match=r"VQJAX_KERNELS=triton, but .* triton cannot be imported; K = 15, .* "
            r"is no CUDA device",
        ),
    ):
        api.vq_matmul(*operands)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_to_machine_code(capability, tmp_path, monkeypatch):
    """By NVIDIA's assembler, which the triton wheel brings."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # jax-triton leaves triton without one
    compiler = pytest.importorskip("triton.compiler")
    backends = pytest.importorskip("triton.backends.compiler")
    names = {"bfloat16": "bf16", "uint8": "u8", "float16": "fp16", "float32": "fp32"}
    made = []

    def launch(kernel, operands, *, grid, shape, dtype, tiles, name, constants, **unused):
        types = [operand.dtype for operand in operands] + [jnp.dtype(dtype)]
        pointers = [argument for argument in kernel.arg_names if argument not in constants]
        signature = {name: "*" + names[of.name] for name, of in zip(pointers, types)}
        signature |= dict.fromkeys(constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
        made.append(
            compiler.compile(
                compiler.ASTSource(
                    fn=kernel, signature=signature, constexprs=constants, attrs=aligned
                ),
                target=backends.GPUTarget("cuda", capability, 32),
                options={"num_warps": tiles.warps, "num_stages": tiles.stages},
            )
        )
        return jnp.zeros(shape, dtype)

    monkeypatch.setattr(triton_gpu, "launch", launch)
    for layer in (MATMUL_LAYERS[0], CONV_LAYERS[1]):
        for schedule in (by_rule(layer.problem(1, "bfloat16")), smallest()[1]):
            case = of_layer(layer, 1, "bfloat16", schedule)
            jax.eval_shape(*of_case(case))
    assert len(made) == 4
    for compiled in made:
        assert compiled.asm["cubin"]
    if capability >= 80:
        assert "mma" in made[0].asm["ptx"]


@pytest.mark.gpu
@pytest.mark.skipif(bool(NO_GPU), reason=str(NO_GPU))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("batch", [1, 16])
def test_full_size_layers_agree(dtype, batch):
    """Every layer of the large U-Net, tiled by the rules."""
    for layer in (*MATMUL_LAYERS, *CONV_LAYERS):
        case = of_layer(layer, batch, dtype)
        operands = specs.random_operands(case.problem, case.x_shape)
        run, _ = of_case(case)
        assert_near(np.asarray(run(operands), np.float64), expected(case, operands), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(bool(NO_GPU), reason=str(NO_GPU))
def test_gradients_are_those_of_the_definition():
    problem = Problem("vq_matmul", 4, 16, 12, 2, 16, 8, "float32", "float16")
    run, _ = of_case(Case(problem, smallest()[0], (4, 16)))
    operands = specs.random_operands(problem, (4, 16))

    def reference(operands: Operands) -> jax.Array:
        return ref.vq_matmul(*operands.defining)

    def loss(run, operands):
        return jnp.sum(run(operands) ** 2)

    found, exact = (
        jax.grad(functools.partial(loss, one), allow_int=True)(operands).x
        for one in (transformable(run, reference), reference)
    )
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-3)
