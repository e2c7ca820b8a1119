# SPDX-License-Identifier: Apache-2.0
"""Lookup tables in native code: the definition's numbers, the same bits however work is cut."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.conftest import relative_rms
from vqjax.errors import VqjaxError
from vqjax.kernels import decode, device, dispatch, native_library, specs, tuned
from vqjax.kernels.lut_matmul import native
from vqjax.kernels.problem import Operands, Problem
from vqjax.kernels.vq_conv import ref as conv_ref
from vqjax.kernels.vq_conv.api import vq_conv
from vqjax.kernels.vq_conv.window import Window
from vqjax.kernels.vq_matmul import ref as matmul_ref
from vqjax.kernels.vq_matmul.api import problem_of, vq_matmul

needs_compiler = pytest.mark.skipif(
    native.missing() is not None, reason=f"no native code: {native.missing()}"
)
TOL = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""Relative RMS: of sums in another order, and of outputs rounded to the type."""


def matmul_operands(
    rows=13, inputs=50, outputs=37, books=3, group=8, dtype="float32", codebook_dtype="float16"
) -> Operands:
    types = dtype, codebook_dtype
    problem = Problem("vq_matmul", rows, inputs, outputs, books, 16, group, *types)
    return specs.random_operands(problem, (rows, inputs))


def conv_operands(shape=(2, 7, 5, 6), outputs=21, books=2, group=9) -> Operands:
    sizes = (shape[-1], outputs, books, 16, group)
    problem = Problem("vq_conv", 70, *sizes, "float32", "int8", 3)
    return specs.random_operands(problem, shape)


def exact(operands: Operands, reference) -> np.ndarray:
    """The definition on the same numbers in float32."""
    wide = operands._replace(x=np.asarray(operands.x, np.float32))
    return np.asarray(jax.jit(reference)(wide))


@needs_compiler
@pytest.mark.parametrize("codebook_dtype", ["float16", "int8"])
@pytest.mark.parametrize("dtype", TOL)
def test_products_agree_in_every_type(dtype, codebook_dtype):
    operands = matmul_operands(dtype=dtype, codebook_dtype=codebook_dtype)
    found = native.lut_matmul(operands)
    assert found.dtype == dtype
    expected = exact(operands, lambda operands: matmul_ref.vq_matmul(*operands.defining))
    assert relative_rms(np.asarray(found, np.float32), expected) < TOL[dtype]


@needs_compiler
@pytest.mark.parametrize("books", range(1, 9))
def test_products_agree_at_every_size(books):
    """Sizes on both sides of a block, a register and a task; drawn anew for each M."""
    rng = np.random.default_rng(books)
    for _ in range(6):
        rows, inputs, outputs, group = (int(rng.integers(1, top)) for top in (80, 700, 150, 13))
        operands = matmul_operands(rows, inputs, outputs, books, group)
        x_PI, *stored, bias_O = jax.device_get(operands.defining)
        weight_ON = decode.decode(*stored, groups=-(-inputs // group))[:, :inputs]
        found = np.asarray(native.lut_matmul(operands))
        where = f"{rows}x{inputs}x{outputs} {books}x16x{group}"
        assert relative_rms(found, x_PI @ weight_ON.T + bias_O) < TOL["float32"], where


@needs_compiler
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 1), (0, 1)), ((0, 0), (2, 0))])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("group", [9, 3, 8, 1])
def test_convolutions_agree(group, strides, padding):
    operands = conv_operands(group=group)
    geometry = {"window": 3, "strides": strides, "padding": padding}
    found = native.lut_conv(operands, Window(3, strides, padding))
    expected = jax.jit(functools.partial(conv_ref.vq_conv, **geometry))(*operands.defining)
    assert relative_rms(np.asarray(found), np.asarray(expected)) < TOL["float32"]


@needs_compiler
def test_bits_do_not_depend_on_what_is_computed_together():
    operands = matmul_operands(rows=47, inputs=300, outputs=90)
    whole = np.asarray(native.lut_matmul(operands))
    of_one = jax.jit(native.lut_matmul)
    alone = [of_one(operands._replace(x=x[None]))[0] for x in np.asarray(operands.x)]
    np.testing.assert_array_equal(whole, np.stack(alone))
    first = operands._replace(
        packed_OY=operands.packed_OY[:30],
        scales_O=operands.scales_O[:30],
        bias_O=None if operands.bias_O is None else operands.bias_O[:30],
    )
    np.testing.assert_array_equal(whole[:, :30], native.lut_matmul(first))


@needs_compiler
def test_both_kinds_of_vector_instructions_give_the_same_bits(monkeypatch):
    if native.instructions() != "AVX-512":
        pytest.skip(f"this machine has {native.instructions()} alone")
    operands, window = conv_operands(), Window(3, (1, 1), ((1, 1), (1, 1)))
    wide = native.lut_conv(operands, window)
    flags = tuple(flag for flag in native_library.FLAGS if not flag.startswith("-march"))
    narrow = native_library.load(native.PACKAGE, native.SOURCE, (*flags, "-mavx2", "-mfma"))
    handler = jax.ffi.pycapsule(narrow.vqjax_lut_conv)
    jax.ffi.register_ffi_target("vqjax_lut_conv_narrow", handler, platform="cpu")
    monkeypatch.setattr(native, "_TARGET", "vqjax_lut_conv_narrow")
    monkeypatch.setattr(native, "_library", lambda: narrow)
    assert native.instructions() == "AVX2"
    np.testing.assert_array_equal(wide, native.lut_conv(operands, window))


@needs_compiler
@pytest.mark.parametrize("asked", ["native", "auto"])
def test_gradients_vmap_and_shard_map_are_those_of_the_definition(asked):
    """By name, and beside what other platforms would run."""
    operands = matmul_operands(rows={"native": 20, "auto": 21}[asked])

    def loss(run, x_BI, books_MKG):
        return jnp.sum(run(*operands._replace(x=x_BI, codebooks_MKG=books_MKG).defining) ** 2)

    inputs = operands.x, operands.codebooks_MKG.astype(jnp.float32)
    x_ABI = jnp.stack([operands.x, -2 * operands.x])
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def by(run):
        def forward(x_BI):
            return run(x_BI, *operands.defining[1:])

        parts = PartitionSpec("data")
        sharded = jax.shard_map(forward, mesh=mesh, in_specs=parts, out_specs=parts)
        gradient = jax.jit(jax.grad(functools.partial(loss, run), argnums=(0, 1)))
        return *gradient(*inputs), jax.vmap(forward)(x_ABI), jax.jit(sharded)(operands.x)

    with dispatch.asking(asked):
        found = by(vq_matmul)
    for ours, theirs in zip(found, by(matmul_ref.vq_matmul), strict=True):
        assert relative_rms(np.asarray(ours), np.asarray(theirs)) < 1e-5


@needs_compiler
def test_layers_that_it_cannot_read_go_to_xla(caplog):
    operands = matmul_operands(rows=17)  # as in no other test: what was traced keeps its choice
    problem = Problem("vq_matmul", 17, 50, 37, 3, 256, 8, "float32", "float16")
    wide = specs.random_operands(problem, (17, 50))
    dispatch._log_once.cache_clear()
    with dispatch.asking("native"), caplog.at_level(logging.INFO, "vqjax.kernels"):
        vq_matmul(*operands)
        np.testing.assert_array_equal(vq_matmul(*wide), matmul_ref.vq_matmul(*wide.defining))
    start = f"vq_matmul on {device.current()}: "
    assert caplog.messages == [
        start + "native (tables, then sums): VQJAX_KERNELS=native",
        start + "xla (decode, then multiply): K = 256, a table in a register has 16 entries",
    ]


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("false", "false cannot build native code: no output"), (None, "no C\\+\\+ compiler")],
)
def test_without_a_compiler_the_reason_is_said(compiler, reason, monkeypatch, tmp_path):
    monkeypatch.setattr(native_library.platformdirs, "user_cache_path", lambda name: tmp_path)
    if compiler is None:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(native_library.shutil, "which", lambda name: None)
    else:
        monkeypatch.setenv("CXX", compiler)
    load = native_library.load.__wrapped__
    monkeypatch.setattr(native, "_library", lambda: load(native.PACKAGE, native.SOURCE))
    operands, others = (matmul_operands(rows=rows) for rows in (18, 19))
    dispatch._failed_trial.cache_clear()
    np.testing.assert_array_equal(vq_matmul(*operands), matmul_ref.vq_matmul(*operands.defining))
    with dispatch.asking("native"), pytest.raises(VqjaxError, match=reason):
        vq_matmul(*others)
    dispatch._failed_trial.cache_clear()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_cache_that_cannot_be_written_is_a_reason(monkeypatch, tmp_path):
    (tmp_path / "native").write_text("no folder")
    monkeypatch.setattr(native_library.platformdirs, "user_cache_path", lambda name: tmp_path)
    with pytest.raises(VqjaxError, match=r"cannot keep native code in .*native: "):
        native_library.load.__wrapped__(native.PACKAGE, native.SOURCE)


def test_convolutions_of_the_model_reach_it(monkeypatch):
    seen = []
    monkeypatch.setattr(native, "build", lambda problem, schedule: None)
    monkeypatch.setattr(
        native, "lut_conv", lambda operands, window: seen.append(window) or operands.x
    )
    operands = conv_operands()
    dispatch._failed_trial.cache_clear()
    with dispatch.asking("native"):
        vq_conv(*operands, window=3, strides=(2, 2), padding=((0, 1), (0, 1)))
    assert seen == [Window(3, (2, 2), ((0, 1), (0, 1)))]


def test_an_own_table_is_read_first_and_a_broken_one_is_named(monkeypatch, tmp_path):
    file = tmp_path / "tiles.json"
    monkeypatch.setattr(tuned, "own_file", lambda: file)
    problem = problem_of(matmul_operands())
    found = {("vq_matmul", tuned.key(problem)): tuned.Entry("native")}
    file.write_text(tuned.merged(tuned.EMPTY, "here", found))
    tuned._tables.cache_clear()
    assert tuned.find("here", problem) == tuned.Entry("native")
    assert tuned.knows("here")
    assert tuned.found_on("here") == [tuned.Entry("native")]
    file.write_text("{")
    tuned._tables.cache_clear()
    with pytest.raises(VqjaxError, match=r"tiles.json: .*; delete it, and measure again: python"):
        tuned.knows("here")
    tuned._tables.cache_clear()
