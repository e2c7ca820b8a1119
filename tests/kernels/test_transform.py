# SPDX-License-Identifier: Apache-2.0
"""Gradients, `vmap` and `shard_map` of kernels: those of the definition."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec

from vqjax.kernels import specs
from vqjax.kernels.problem import Operands, Problem
from vqjax.kernels.schedule import smallest
from vqjax.kernels.transform import transformable
from vqjax.kernels.vq_conv import api as conv
from vqjax.kernels.vq_conv import pallas as conv_pallas
from vqjax.kernels.vq_conv import ref as conv_ref
from vqjax.kernels.vq_conv.api import vq_conv
from vqjax.kernels.vq_conv.window import Window
from vqjax.kernels.vq_matmul import pallas, ref
from vqjax.kernels.vq_matmul.api import problem_of, vq_matmul

PROBLEM = Problem("vq_matmul", 4, 16, 12, 2, 16, 8, "float32", "float16")
PATCHES = Problem("vq_conv", 8, 5, 12, 2, 16, 9, "float32", "float16", 3, (2, 2))
WINDOW = Window(3, (2, 2), ((0, 1), (0, 1)))


def axes(**mapped: int) -> Any:
    """The axes that `vmap` maps, by operand."""
    return Operands(*(mapped.get(name) for name in Operands._fields))  # pyright: ignore


def reference(operands: Operands) -> jax.Array:
    return ref.vq_matmul(*operands.defining)


def kernel(operands: Operands, *, interpret: bool = True) -> jax.Array:
    return pallas.vq_matmul(operands, problem_of(operands), smallest()[0], interpret=interpret)


def convolution_reference(operands: Operands) -> jax.Array:
    return conv_ref.definition(PATCHES, WINDOW)(operands)


def convolution_kernel(operands: Operands, *, interpret: bool = True) -> jax.Array:
    problem = conv.problem_of(operands, WINDOW)
    return conv_pallas.vq_conv(operands, problem, smallest()[0], WINDOW, interpret=interpret)


operation = transformable(kernel, reference)

BOTH = {
    "product": (kernel, reference, PROBLEM, (4, 16)),
    "convolution": (convolution_kernel, convolution_reference, PATCHES, (2, 4, 4, 5)),
}


def operands() -> Operands:
    return specs.random_operands(PROBLEM, (4, 16))


def near(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("op", BOTH)
def test_gradients_are_those_of_the_definition(op):
    run, definition, problem, x_shape = BOTH[op]
    arrays = specs.random_operands(problem, x_shape)

    def loss(run, operands):
        return jnp.sum(run(operands) ** 2)

    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, run), allow_int=True))(arrays)
        for run in (transformable(run, definition), definition)
    )
    for name in ("x", "codebooks_MKG", "scales_O", "bias_O"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3, err_msg=name)
        assert np.abs(np.asarray(theirs, np.float32)).max() > 0.1


def test_vmap_over_x_becomes_rows():
    rows: list[int] = []

    def counted(operands: Operands) -> jax.Array:
        rows.append(operands.x.shape[0])
        return reference(operands)

    one = operands()
    x_ABI = jnp.stack([one.x, 2 * one.x, one.x - 1])
    run = jax.vmap(transformable(counted, reference), in_axes=(axes(x=0),))
    near(run(one._replace(x=x_ABI)), jnp.stack([reference(one._replace(x=x)) for x in x_ABI]))
    assert rows[-1] == 3 * 4


def test_vmap_over_the_kernel_and_its_gradient():
    one = operands()
    x_ABI = jnp.stack([one.x, 2 * one.x])

    def gradient(x_BI):
        return jax.grad(lambda x: jnp.sum(operation(one._replace(x=x)) ** 2))(x_BI)

    def expected(x_BI):
        return jax.grad(lambda x: jnp.sum(reference(one._replace(x=x)) ** 2))(x_BI)

    found = jax.jit(jax.vmap(gradient))(x_ABI)
    np.testing.assert_allclose(found, jax.vmap(expected)(x_ABI), rtol=1e-4, atol=1e-3)


def test_vmap_over_weights_takes_them_in_turn():
    one = operands()
    scales_AO = jnp.stack([one.scales_O, 2 * one.scales_O])
    many = one._replace(scales_O=scales_AO)
    found, expected = (
        jax.vmap(run, in_axes=(axes(scales_O=0),))(many)
        for run in (transformable(reference, reference), reference)
    )
    near(found, expected)


def test_shard_map_over_rows_and_its_gradient():
    """As on any device without kernels; axes are typed as they would be on many devices."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    one = operands()
    whole: Any = PartitionSpec()
    parts: Any = PartitionSpec("data")
    in_specs = (Operands(parts, whole, whole, whole, None, whole),)

    def loss(run, codebooks_MKG):
        def share(operands):
            return jax.lax.psum(jnp.sum(run(*operands.defining) ** 2), "data")

        share = jax.shard_map(share, mesh=mesh, in_specs=in_specs, out_specs=whole)
        return share(one._replace(codebooks_MKG=codebooks_MKG))

    books_MKG = one.codebooks_MKG.astype(jnp.float32)
    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, run)))(books_MKG)
        for run in (vq_matmul, ref.vq_matmul)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("op", BOTH)
@pytest.mark.parametrize("split", ["rows", "outputs"])
def test_kernels_lower_under_shard_map(split, op):
    run, definition, problem, x_shape = BOTH[op]
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = AbstractMesh((2,), ("data",), axis_types=auto, abstract_device=device)
    parts: Any = PartitionSpec("data")
    whole: Any = PartitionSpec()
    if split == "rows":
        in_specs, out_specs = Operands(parts, whole, whole, whole), parts
    else:
        in_specs = Operands(whole, parts, whole, parts)
        out_specs = PartitionSpec(*[None] * (len(x_shape) - 1), "data")
    run = transformable(functools.partial(run, interpret=False), definition)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(in_specs,), out_specs=out_specs)
    lowered = jax.jit(sharded).trace(problem.abstract(x_shape)).lower(lowering_platforms=("cuda",))
    assert "__gpu$xla.gpu.triton" in lowered.as_text()


def test_leading_axes_are_rows_and_1x1_convolutions_are_products():
    one = operands()
    x_BHWI = one.x.reshape(2, 1, 2, 16)
    expected = reference(one)
    near(vq_matmul(x_BHWI, *one[1:]).reshape(4, 12), expected)
    near(vq_conv(x_BHWI, *one[1:], window=1).reshape(4, 12), expected)


def test_a_convolution_runs_under_vmap():
    problem = Problem("vq_conv", 18, 3, 5, 1, 16, 9, "float32", "float16", 3)
    one = specs.random_operands(problem, (2, 3, 3, 3))
    x_ABHWI = jnp.stack([one.x, -one.x])
    found = jax.vmap(lambda x: vq_conv(x, *one[1:], window=3))(x_ABHWI)
    assert found.shape == (2, 2, 3, 3, 5)
    near(found[1], vq_conv(-one.x, *one[1:], window=3))
