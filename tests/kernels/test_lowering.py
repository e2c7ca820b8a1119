# SPDX-License-Identifier: Apache-2.0
"""Kernels lowered for CUDA without a GPU: what JAX's Triton backend refuses is seen here."""

import functools

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from tests.kernels.machine_code import CAPABILITIES, assembled, kept_modules
from vqjax.kernels.problem import Problem
from vqjax.kernels.schedule import Schedule, by_rule, smallest
from vqjax.kernels.specs import Layer
from vqjax.kernels.vq_conv import pallas as conv_pallas
from vqjax.kernels.vq_conv.specs import LAYERS as CONV_LAYERS
from vqjax.kernels.vq_conv.window import Window
from vqjax.kernels.vq_matmul import pallas as matmul_pallas
from vqjax.kernels.vq_matmul.specs import LAYERS as MATMUL_LAYERS


def lowered(device_kind: str, run, operands) -> str:
    device = AbstractDevice(device_kind=device_kind, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(run).trace(operands).lower(lowering_platforms=("cuda",)).as_text()


def of_layer(layer: Layer, batch: int, dtype: str, schedule: Schedule | None = None):
    """What runs a layer, and the shapes of its operands."""
    problem = layer.problem(batch, dtype)
    arguments = {"problem": problem, "schedule": schedule or by_rule(problem)}
    operands = problem.abstract(layer.operands_shape(batch))
    if layer.op == "vq_matmul":
        return functools.partial(matmul_pallas.vq_matmul, **arguments), operands
    window = Window.of(3, problem.strides, (layer.padding, layer.padding), layer.image)
    return functools.partial(conv_pallas.vq_conv, **arguments, window=window), operands


@pytest.mark.parametrize("device_kind", CAPABILITIES)
@pytest.mark.parametrize("schedule", smallest(), ids=lambda schedule: schedule.kind)
@pytest.mark.parametrize("layer", [MATMUL_LAYERS[0], CONV_LAYERS[0]], ids=lambda layer: layer.op)
def test_kernels_lower(layer, schedule, device_kind):
    text = lowered(device_kind, *of_layer(layer, 1, "bfloat16", schedule))
    assert text.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize(
    "code", [(1, 64, "int8"), (1, 256, "int8"), (3, 4096, "float16"), (8, 16, "float32")]
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_code_lowers(code, dtype):
    books, entries, stored = code
    problem = Problem("vq_matmul", 16, 40, 24, books, entries, 6, dtype, stored)
    run = functools.partial(matmul_pallas.vq_matmul, problem=problem, schedule=smallest()[0])
    text = lowered("NVIDIA H200", run, problem.abstract((16, 40)))
    assert text.count("__gpu$xla.gpu.triton") == 1


@pytest.mark.slow
@pytest.mark.parametrize("device_kind", CAPABILITIES)
def test_every_layer_of_the_models_lowers(device_kind):
    batch = 1 if "A100" in device_kind else 16  # each once with few rows and once with many
    for layer in (*MATMUL_LAYERS, *CONV_LAYERS):
        assert "__gpu$xla.gpu.triton" in lowered(device_kind, *of_layer(layer, batch, "bfloat16"))


@pytest.mark.slow
@pytest.mark.parametrize("device_kind", CAPABILITIES)
@pytest.mark.parametrize("layer", [MATMUL_LAYERS[0], CONV_LAYERS[1]], ids=lambda layer: layer.op)
def test_kernels_compile_to_machine_code(layer, device_kind, tmp_path, monkeypatch):
    """Further than lowering goes."""
    made = kept_modules(monkeypatch, tmp_path)
    schedule = smallest()[0]
    lowered(device_kind, *of_layer(layer, 2, "bfloat16", schedule))
    options = {"num_warps": schedule.tiles.warps, "num_stages": schedule.tiles.stages}
    found = assembled(made[0], device_kind, tmp_path, options)
    assert found["cubin"]
    assert "mma" in found["ptx"]
