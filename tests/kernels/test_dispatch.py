# SPDX-License-Identifier: Apache-2.0
"""The dispatcher: which path, why, and what it says."""

import dataclasses
import functools
import importlib.resources
import json
import logging

import jax.numpy as jnp
import pytest

from vqjax.errors import VqjaxError
from vqjax.kernels import dispatch, specs, tuned
from vqjax.kernels.device import Device
from vqjax.kernels.problem import Prepared, Problem
from vqjax.kernels.schedule import FUSED_ROWS, Schedule, Tiles, by_rule
from vqjax.kernels.vq_conv.api import vq_conv
from vqjax.kernels.vq_conv.specs import LAYERS as CONV_LAYERS
from vqjax.kernels.vq_matmul.api import choice, vq_matmul
from vqjax.kernels.vq_matmul.specs import LAYERS as MATMUL_LAYERS

PROBLEM = Problem("vq_matmul", 1, 960, 960, 4, 16, 8, "bfloat16", "float16")
INTEGERS = dataclasses.replace(PROBLEM, dtype="int8", codebook_dtype="int8")
T4 = Device("gpu", "Tesla T4", (7, 5))
A100 = Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0))
H200 = Device("gpu", "NVIDIA H200", (9, 0))
CPU = Device("cpu", "cpu")


@pytest.fixture(autouse=True)
def _nothing_asked_for(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    dispatch._log_once.cache_clear()


def refusals(device: Device, *unsupported: str) -> dispatch.Refusals:
    found = dispatch.refusals_of("pallas", list(unsupported), device)
    return {"pallas": found, "triton": [dispatch.UNMEASURED]}


@pytest.mark.parametrize(
    ("device", "path", "why"),
    [
        (CPU, "xla", "no pallas: cpu is no CUDA device; no triton: it is taken by"),
        (T4, "xla", "Tesla T4, compute capability 7.5, and XLA compiles Triton code from 8.0 on"),
        (Device("gpu", "AMD Instinct MI300X"), "xla", "AMD Instinct MI300X is no CUDA device"),
        (H200, "pallas", "it can run here"),
    ],
)
def test_the_device_decides(device, path, why):
    choice = dispatch.choose(PROBLEM, refusals(device), device)
    assert choice.path == path
    assert why in choice.why
    assert (choice.schedule is None) == (path == "xla")


def test_the_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, "vqjax.kernels"):
        for _ in range(2):
            dispatch.choose(PROBLEM, refusals(H200), H200)
    assert caplog.messages == [
        "vq_matmul on NVIDIA H200, compute capability 9.0: pallas (fused): it can run here"
    ]


def test_a_named_path_that_cannot_run_says_all_reasons(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "pallas")
    problem = dataclasses.replace(PROBLEM, entries=15)
    with pytest.raises(VqjaxError) as caught:
        dispatch.choose(problem, refusals(CPU, "K = 15, kernels read codes of 4 bits"), CPU)
    assert str(caught.value) == (
        "VQJAX_KERNELS=pallas, but vq_matmul (1x960x960 bfloat16 4x15x8 float16) cannot run there: "
        "K = 15, kernels read codes of 4 bits; cpu is no CUDA device. "
        "Unset VQJAX_KERNELS, or set it to auto or xla"
    )


@pytest.mark.parametrize("path", ["pallas", "triton"])
def test_a_layer_whose_codes_kernels_do_not_read_is_decoded(path, caplog):
    """One such layer would keep the whole model from a path that was named."""
    problem, why = (
        dataclasses.replace(PROBLEM, books=1, entries=48, group=1),
        "K = 48, kernels read",
    )
    for device in (H200, T4):
        with dispatch.asking(path):
            refused = {path: dispatch.refusals_of(path, [why], device)}
            if device.refuses(path):
                with pytest.raises(VqjaxError, match=r"K = 48.*compute capability 7\.5"):
                    dispatch.choose(problem, refused, device)
                continue
            with caplog.at_level(logging.INFO, "vqjax.kernels"):
                choice = dispatch.choose(problem, refused, device)
        assert (choice.path, choice.keeps) == ("xla", False)
        assert "xla (decode, then multiply): K = 48" in caplog.messages[-1]


def test_names_are_obeyed(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "xla")
    assert dispatch.choose(PROBLEM, refusals(H200), H200).path == "xla"
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(VqjaxError, match=r"VQJAX_KERNELS=triton, but .* taken by name"):
        dispatch.choose(PROBLEM, refusals(H200), H200)
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(VqjaxError, match="VQJAX_KERNELS=cuda, expected one of auto, xla, pallas"):
        dispatch.wanted()


def test_lookup_tables_run_where_they_save(monkeypatch, caplog):
    """K = 256 takes more operations than the dense product with 500 outputs, K = 16 takes fewer."""
    monkeypatch.setenv(dispatch.VARIABLE, "lut")
    wide = dataclasses.replace(PROBLEM, books=2, entries=256, outputs=500)
    with caplog.at_level(logging.INFO, "vqjax.kernels"):
        paths = [dispatch.choose(problem, refusals(CPU), CPU).path for problem in (PROBLEM, wide)]
    assert paths == ["lut", "xla"]
    assert caplog.messages == [
        "vq_matmul on cpu: lut (tables, then sums): VQJAX_KERNELS=lut",
        "vq_matmul on cpu: xla (decode, then multiply): lookup tables take 1.15 times the "
        "operations of the dense product",
    ]


def test_a_path_can_be_asked_for_in_code(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "xla")
    with dispatch.asking("lut"):
        assert dispatch.wanted() == "lut"
        assert not dispatch.keeps_none()
    assert dispatch.keeps_none()
    with pytest.raises(VqjaxError, match="expected one of"), dispatch.asking("table"):
        pass
    assert dispatch.wanted() == "xla"


@pytest.mark.parametrize("path", ["pallas", "triton"])
def test_what_a_named_path_does_not_read_is_for_xla(path, monkeypatch):
    """Those are layers of a network whose others it reads."""
    monkeypatch.setenv(dispatch.VARIABLE, path)
    convolution = dataclasses.replace(PROBLEM, op="vq_conv", window=3)
    for problem in (
        dataclasses.replace(PROBLEM, books=12),
        dataclasses.replace(PROBLEM, entries=12),
        dataclasses.replace(convolution, group=18),
        dataclasses.replace(convolution, group=8),
    ):
        choice = dispatch.choose(problem, {path: ["not read"]}, H200)
        assert (choice.path, choice.keeps) == ("xla", False)


def test_devices_without_kernels_give_everything_to_xla(monkeypatch):
    for device, expected in ((CPU, True), (T4, True), (H200, False)):
        monkeypatch.setattr(dispatch, "current", lambda device=device: device)
        assert dispatch.keeps_none() == expected
    monkeypatch.setattr(dispatch, "current", lambda: CPU)
    monkeypatch.setenv(dispatch.VARIABLE, "pallas")
    assert not dispatch.keeps_none()  # what cannot run is then an error, where it is traced


def entry(**fields) -> dict:
    tiles = dataclasses.asdict(Tiles(16, 32, 64))
    return {"path": "pallas", "kind": "fused", "tiles": tiles, **fields}


def table(fields: dict, problem: Problem = PROBLEM) -> str:
    entries = {H200.kind: {"vq_matmul": {tuned.key(problem): fields}}}
    return json.dumps({"version": 1, "devices": entries})


@pytest.mark.parametrize(
    ("fields", "path", "schedule"),
    [
        ({"path": "xla"}, "pallas", by_rule(PROBLEM)),  # where it stays packed all the same
        (entry(kind="staged"), "pallas", Schedule("staged", Tiles(16, 32, 64))),
        (entry(path="triton"), "pallas", by_rule(PROBLEM)),  # measured, but cannot run
    ],
)
def test_measurements_come_before_rules(fields, path, schedule, monkeypatch):
    monkeypatch.setattr(tuned, "_tables", lambda: tuned.read(table(fields)))
    choice = dispatch.choose(PROBLEM, refusals(H200), H200)
    assert (choice.path, choice.schedule) == (path, schedule)
    assert choice.keeps == (fields != {"path": "xla"})  # decoded at load is faster


@pytest.mark.parametrize("problem", [PROBLEM, INTEGERS], ids=lambda problem: problem.dtype)
def test_triton_is_taken_where_it_was_measured(problem, monkeypatch):
    """Elsewhere `auto` does not even look whether it could run: that would import packages."""

    def untouched(problem: Problem) -> list[str]:
        pytest.fail("it was looked at")

    def kernel(unsupported) -> dispatch.Kernel:
        return dispatch.Kernel(unsupported, lambda *of: None, lambda operands, made: operands.x)

    def choice(device: Device, triton=untouched) -> dispatch.Choice:
        monkeypatch.setattr(dispatch, "current", lambda: device)
        kernels = {"pallas": kernel(lambda problem: []), "triton": kernel(triton)}
        ways = dispatch.Implementations(kernels, lambda operands: operands.x, lambda o: o.x)
        return dispatch.decide(problem, ways)

    assert choice(H200).path == "pallas"
    assert choice(T4).path == "xla"
    int8 = "Tesla T4, compute capability 7.5, and Triton compiles products of int8"
    refused = int8 if problem.integer else dispatch.UNMEASURED
    assert f"no triton: {refused}" in choice(T4).why
    assert choice(CPU).why.count("cpu is no CUDA device") == 2
    measured = entry(path="triton")
    for device in (A100 if problem.integer else T4, H200):
        text = table(measured, problem).replace(H200.kind, device.kind)
        monkeypatch.setattr(tuned, "_tables", lambda text=text: tuned.read(text))
        found = choice(device, lambda problem: [])
        assert (found.path, found.schedule) == ("triton", Schedule("fused", Tiles(16, 32, 64)))
        assert not dispatch.keeps_none()
        fallback = choice(device, lambda problem: ["jax_triton cannot be imported"])
        assert fallback.path == ("xla" if device is T4 else "pallas")


@pytest.mark.parametrize(
    ("measured", "path", "keeps"),
    [
        (None, "xla", False),
        ({"path": "xla"}, "xla", False),
        ({"path": "xla", "packed": "native"}, "native", False),
        ({"path": "native"}, "native", True),
    ],
)
def test_native_code_is_taken_where_it_was_measured_to_win(measured, path, keeps, monkeypatch):
    def tried(problem: Problem, made: None) -> None:
        assert path == "native", "it would be built, which takes seconds"

    text = table(measured).replace(H200.kind, CPU.kind) if measured else tuned.EMPTY
    monkeypatch.setattr(tuned, "_tables", lambda: tuned.read(text))
    monkeypatch.setattr(dispatch, "current", lambda: CPU)
    kernel = dispatch.Kernel(lambda problem: [], tried, lambda operands, made: operands.x)
    ways = dispatch.Implementations({"native": kernel}, lambda o: o.x, lambda o: o.x)
    choice = dispatch.decide(PROBLEM, ways)
    assert (choice.path, choice.keeps) == (path, keeps)
    with dispatch.asking("xla"):
        assert dispatch.decide(PROBLEM, ways).path == "xla"
    unable = ways._replace(kernels={"native": kernel._replace(unsupported=lambda problem: ["no"])})
    assert dispatch.decide(PROBLEM, unable).path == "xla"
    path = "native"
    with dispatch.asking("native"):
        assert dispatch.decide(PROBLEM, ways).keeps


def test_a_bad_table_lists_its_mistakes():
    text = table(entry(path="cuda", kind="quick", tiles={"rows": 8, "outputs": 32, "depth": 64}))
    with pytest.raises(VqjaxError) as caught:
        tuned.read(text)
    message = str(caught.value)
    assert "path 'cuda', expected one of xla, native, pallas, triton" in message
    assert "kind 'quick', expected fused or staged" in message
    assert "rows 8, expected a power of two from 16" in message
    with pytest.raises(VqjaxError, match='no "devices"'):
        tuned.read(json.dumps({"version": tuned.VERSION}))


def test_the_shipped_table_is_valid():
    tuned.read((importlib.resources.files("vqjax.kernels") / "tiles.json").read_text())


def test_rules_give_valid_tiles_to_every_layer():
    for layer in (*MATMUL_LAYERS, *CONV_LAYERS):
        for batch in (1, 2, 16):
            problem = layer.problem(batch, "bfloat16")
            made = by_rule(problem)
            assert not made.tiles.problems()
            assert (made.kind == "fused") == (problem.rows <= FUSED_ROWS)


def test_a_kernel_that_does_not_compile_is_passed_over(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "current", lambda: H200)

    def fails(problem: Problem, made: Schedule) -> None:
        assert (problem.rows, problem.outputs) == (made.tiles.rows, made.tiles.outputs)
        raise RuntimeError("out of shared memory\nmore lines")

    broken = dispatch.Kernel(
        unsupported=lambda problem: [],
        trial=fails,
        run=lambda operands, schedule: pytest.fail("the kernel ran"),
    )
    ways = dispatch.Implementations(
        kernels=dict.fromkeys(dispatch.KERNELS, broken),
        lookup=lambda operands: pytest.fail("the tables ran"),
        reference=lambda operands: operands.x,
    )
    operands = specs.random_operands(PROBLEM, (1, 960))
    with caplog.at_level(logging.INFO, "vqjax.kernels"):
        assert dispatch.run(PROBLEM, operands, ways) is operands.x
    warning, line = caplog.messages
    assert warning.startswith("kernels are passed over: a kernel (fused, tiles 16x32x64, 1 splits)")
    assert caplog.records[0].levelno == logging.WARNING  # which Python shows by itself
    assert "fails on NVIDIA H200" in line
    assert "(RuntimeError: out of shared memory)" in line
    monkeypatch.setenv(dispatch.VARIABLE, "pallas")
    with pytest.raises(VqjaxError, match="out of shared memory"):
        dispatch.run(PROBLEM, operands, ways)


def test_misfits_are_said_before_anything_runs():
    operands = specs.random_operands(PROBLEM, (1, 960))
    wrong = operands._replace(
        packed_OY=operands.packed_OY[:, :5].astype(jnp.int32),
        scales_O=operands.scales_O[:3],
        codebook_scale=jnp.float32(1),
        bias_O=jnp.zeros(4),
    )
    with pytest.raises(VqjaxError) as caught:
        vq_matmul(*wrong)
    assert str(caught.value) == (
        "vq_matmul of 960 inputs with 4 codebooks of 16 vectors of 8 does not fit: "
        "float16 codebooks; int8 and codebook_scale go together; "
        "packed codes are int32, expected uint8; packed codes (960, 5), expected (960, 240); "
        "scales (3,), expected (960,); bias (4,), expected (960,)"
    )
    with pytest.raises(VqjaxError, match=r"x \(1, 960\), .* expected \[B, H, W, I\]"):
        vq_conv(*operands, window=3)


def test_what_was_prepared_is_of_the_same_outputs():
    operands = specs.random_operands(PROBLEM, (1, 960))
    of_more = Prepared(jnp.ones(2 * 960), jnp.zeros(0), ())
    with pytest.raises(VqjaxError, match=r"factors of prepared \(1920,\), expected \(960,\)"):
        vq_matmul(*operands._replace(prepared=of_more))


def test_no_rows_are_for_xla(monkeypatch):
    operands = specs.random_operands(PROBLEM, (1, 960))
    nothing = operands._replace(x=operands.x[:0])
    for name in ("lut", "pallas", "auto"):
        with dispatch.asking(name):
            assert vq_matmul(*nothing).shape == (0, 960)
    monkeypatch.setattr(dispatch, "current", lambda: H200)
    assert choice(nothing).path == "xla"


@pytest.mark.parametrize(
    ("padding", "side"), [(((1, -1), (0, 0)), 5), ("VALID", 2), (((0, 0), (0, 0)), 1)]
)
def test_a_window_fits_into_its_image(padding, side):
    problem = Problem("vq_conv", 1, 4, 3, 2, 16, 9, "float32", "float16", window=3)
    operands = specs.random_operands(problem, (1, side, side, 4))
    with pytest.raises(VqjaxError, match=f"3x3 on an image of {side}x{side}, .* holds the window"):
        vq_conv(*operands, window=3, padding=padding)


@pytest.mark.parametrize("op", ["vq_matmul", "vq_conv"])
def test_scales_and_biases_are_floating_point_and_the_codebook_scale_is_a_scalar(op):
    problem = Problem(op, 4, 40, 16, 2, 16, 8, "float32", "int8", window=1 + 2 * (op == "vq_conv"))
    call, x_shape = vq_matmul, (4, 40)
    if op == "vq_conv":
        call, x_shape = functools.partial(vq_conv, window=3), (1, 2, 2, 40)
    operands = specs.random_operands(problem, x_shape)
    assert call(*operands).dtype == jnp.float32
    whole = {name: getattr(operands, name).astype(jnp.int32) for name in ("scales_O", "bias_O")}
    with pytest.raises(VqjaxError) as caught:
        call(*operands._replace(**whole, codebook_scale=jnp.ones(3, jnp.int8)))
    assert str(caught.value).endswith(
        "does not fit: scales of type int32, expected floating point; bias of type int32, expected "
        "floating point; codebook_scale of type int8, expected floating point; codebook_scale "
        "(3,), expected a scalar"
    )
