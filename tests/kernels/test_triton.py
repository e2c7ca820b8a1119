# SPDX-License-Identifier: Apache-2.0
"""Kernels in Triton: on Triton's CPU interpreter against float64, lowered for CUDA, and compiled.

Errors are relative to the largest output; products of integers have none. The interpreter needs
triton, lowering jax-triton and a CUDA plugin of JAX too; none needs a GPU.
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from tests.kernels import integers, test_integer_kernels
from tests.kernels.interpreted_triton import TYPES, Case
from tests.kernels.test_pallas import TOL, convolved, weight
from vqjax.errors import VqjaxError
from vqjax.kernels import device, dispatch, specs, triton_gpu
from vqjax.kernels.problem import IntegerOperands, Operands, Problem
from vqjax.kernels.schedule import Schedule, Tiles, by_rule, smallest
from vqjax.kernels.transform import transformable
from vqjax.kernels.vq_conv.api import vq_conv_int8
from vqjax.kernels.vq_conv.specs import LAYERS as CONV_LAYERS
from vqjax.kernels.vq_matmul import api, ref
from vqjax.kernels.vq_matmul.specs import LAYERS as MATMUL_LAYERS

ROOT = pathlib.Path(__file__).parents[2]
CAPABILITIES = (75, 80, 90)
T4 = device.Device("gpu", "Tesla T4", (7, 5))
H200 = device.Device("gpu", "NVIDIA H200", (9, 0))

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


EXACT = test_integer_kernels.CASES
INTEGERS = [case for example in (2, 3, 5) for case in EXACT[2 * example :][:2]]
"""By each schedule."""
CASES = cases() + INTEGERS
TRIED = INTEGERS[:2]
"""Of which one tile is tried as the dispatcher does."""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, np.ndarray]:
    """Of all cases and trials, from one process in which kernels are interpreted."""
    file = tmp_path_factory.mktemp("triton") / "results.npz"
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted_triton", str(file)],
        input=json.dumps([[case.plain() for case in cases] for cases in (CASES, TRIED)]),
        text=True,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(file))


def expected(case: Case, operands: Any) -> np.ndarray:
    """In float64."""
    if case.problem.integer:
        return integers.exact(operands, case.problem, case.window)
    if case.problem.op == "vq_conv":
        return convolved(operands, case.problem, case.window)
    x_BI, bias_O = (np.asarray(a, np.float64) for a in (operands.x, operands.bias_O))
    return x_BI @ weight(operands, case.problem).T + bias_O


def assert_near(found: np.ndarray, exact: np.ndarray, dtype: str) -> None:
    found = np.asarray(found, np.float64).reshape(exact.shape)
    error = np.abs(found - exact).max() / np.abs(exact).max()
    assert error <= TOL.get(dtype, 0)


@interpreted
@pytest.mark.parametrize("index", range(len(CASES)))
def test_interpreted_kernels_agree(index, results):
    case = CASES[index]
    exact = expected(case, case.operands())
    assert_near(results[f"arr_{index}"], exact, case.problem.dtype)


@interpreted
@pytest.mark.parametrize("index", range(len(TRIED)))
def test_interpreted_trials_pass(index, results):
    assert not results["tried"][index]


def test_cases_hold_every_kind():
    seen = {(case.problem.op, case.schedule.kind) for case in CASES}
    assert seen == set(itertools.product(("vq_matmul", "vq_conv"), ("fused", "staged")))
    for op in ("vq_matmul", "vq_conv"):
        of_op = [case for case in CASES if case.problem.op == op]
        assert {case.problem.dtype for case in of_op} == {*TOL, "int8"}
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
    capability = 80 if CASES[index].problem.integer else 75
    assert lowered(*of_case(CASES[index], capability)).count("triton_kernel_call") == 1


@pytest.fixture
def as_if(monkeypatch):
    """Shows the dispatcher a GPU, and compiles kernels for it."""

    def shown(gpu: device.Device, capability: int) -> None:
        launch, there = triton_gpu.launch, {"capability": capability}
        monkeypatch.setattr(
            triton_gpu, "launch", lambda *args, **options: launch(*args, **options | there)
        )
        monkeypatch.setattr(dispatch, "current", lambda: gpu)
        monkeypatch.setattr(dispatch, "_failed_trial", lambda *args: ())

    return shown


@lowering
def test_the_named_path_is_taken(as_if):
    """As if this were a T4: through the dispatcher, with gradients and under `shard_map`."""
    as_if(T4, 75)
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


@lowering
@pytest.mark.parametrize("case", TRIED, ids=lambda case: case.problem.op)
def test_the_named_path_takes_integers(case, as_if):
    as_if(H200, 90)
    call = api.vq_matmul_int8
    if case.problem.op == "vq_conv":
        call = functools.partial(vq_conv_int8, **case.window.keywords())

    def run(operands: IntegerOperands) -> jax.Array:
        q = operands.x.reshape(1, *case.x_shape[-3:])  # one example
        steps_B, zeros_B = operands.steps_P[:1], operands.zeros_P[:1]
        return call(q, steps_B, zeros_B, *operands[1:5], operands.totals_O)

    operands = case.problem.abstract(case.x_shape)
    with dispatch.asking("triton"):
        assert lowered(run, operands).count("triton_kernel_call") == 1


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


def cases_of_layers(dtype: str) -> list[Case]:
    """A product and a convolution, each by the rules and decoded first."""
    layers = (MATMUL_LAYERS[0], CONV_LAYERS[1])
    return [of_layer(layer, 1, dtype, made) for layer in layers for made in (None, smallest()[1])]


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_to_machine_code(capability, dtype, tmp_path, monkeypatch):
    """By NVIDIA's assembler, which the triton wheel brings."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # jax-triton leaves triton without one
    compiler = pytest.importorskip("triton.compiler")
    backends = pytest.importorskip("triton.backends.compiler")
    made = []

    def launch(kernel, operands, *, grid, shape, dtype, tiles, name, constants, **unused):
        types = [operand.dtype for operand in operands] + [jnp.dtype(dtype)]
        pointers = [argument for argument in kernel.arg_names if argument not in constants]
        signature = {at: "*" + TYPES[of.name] for at, of in zip(pointers, types, strict=True)}
        signature |= dict.fromkeys(constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
        source = compiler.ASTSource(
            fn=kernel, signature=signature, constexprs=constants, attrs=aligned
        )
        compiled = compiler.compile(
            source,
            target=backends.GPUTarget("cuda", capability, 32),
            options={"num_warps": tiles.warps, "num_stages": tiles.stages},
        )
        made.append((name, compiled.asm))
        return jnp.zeros(shape, dtype)

    monkeypatch.setattr(triton_gpu, "launch", launch)
    cases = INTEGERS if dtype == "int8" else cases_of_layers(dtype)
    if (capability, dtype) == (75, "int8"):  # which is why `Device.refuses` them
        with pytest.raises(RuntimeError, match="PassManager::run failed"):
            jax.eval_shape(*of_case(TRIED[0]))
        return
    for case in cases:
        jax.eval_shape(*of_case(case))
    assert len(made) == len(cases)
    for name, asm in made:
        assert asm["cubin"]
        if capability >= 80 and name != "vq_decode":
            multiplied = {"bfloat16": ".bf16.bf16", "int8": ".s8.s8"}[dtype]
            assert re.search(rf"mma.*{re.escape(multiplied)}", asm["ptx"])


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
@pytest.mark.parametrize("index", range(len(EXACT)))
def test_integers_are_exact(index):
    run, _ = of_case(EXACT[index])
    operands = EXACT[index].operands()
    assert_near(np.asarray(run(operands)), expected(EXACT[index], operands), "int8")


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
