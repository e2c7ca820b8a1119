# SPDX-License-Identifier: Apache-2.0
"""`bench kernels`: every layer shape is timed; the table of measured choices."""

import dataclasses
import json
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.io import models as small
from vqjax.bench import cases, kernels, random_weights, roofline, sums
from vqjax.bench.__main__ import main
from vqjax.core import tree
from vqjax.core.plan import make_plan
from vqjax.core.tensor import VQTensor
from vqjax.errors import DoesNotFitError
from vqjax.kernels import device, dispatch, specs, triton_gpu, tuned
from vqjax.kernels.device import Device
from vqjax.kernels.lut_matmul import counts, native
from vqjax.kernels.schedule import Schedule, Tiles
from vqjax.settings import BenchKernelsSettings

H200 = Device("gpu", "NVIDIA H200", (9, 0))
T4 = Device("gpu", "Tesla T4", (7, 5))
OPS = ("vq_conv", "vq_matmul")


@pytest.fixture(autouse=True)
def _two_small_layers(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    found = specs.layers
    monkeypatch.setattr(
        specs, "layers", lambda op: [one for one in found(op) if one.model == "digits"][1:2]
    )


def test_layers_are_timed_and_there_may_be_nothing_to_tune(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels.native_tables, "missing", lambda: "no C++ compiler")
    file, table = tmp_path / "kernels.json", tmp_path / "tiles.json"
    words = ["kernels", "--model", "digits", "--repeat", "1", "--json", str(file)]
    assert main([*words, "--path", "lut"]) == 0
    found = json.loads(file.read_text())
    assert [record["op"] for record in found["records"]] == ["vq_conv", "vq_matmul"]
    assert found["environment"]["jax"] == jax.__version__
    for record in found["records"]:
        assert record["seconds"] > 0
        assert record["dense_seconds"] > 0
        assert record["packed_bytes"] < record["dense_bytes"]
        assert record["error"] < 1e-5
        assert record["path"] in ("lut", "xla")
        # A CPU is compared with what it reached itself, never with a GPU's peaks.
        assert record["roofline_share"] > 0
        assert record["operations"] <= record["dense_operations"]
        assert record["moved_bytes"] < record["dense_moved_bytes"]
    assert found["peaks"]["source"].startswith("measured on this CPU")
    assert [record["in_each_step"] for record in found["records"]] == [True, False]
    out = capsys.readouterr().out
    assert "Layers of a step, batch 2:" in out
    assert "Layers before the first step, batch 2:" in out
    assert "Layers of 1 to 16 rows, batch 2:" in out
    assert "target" not in out  # those are for GPUs
    assert {one["target"] for one in found["sums"]} == {None}
    assert main([*words, "--tune", "--table", str(table)]) == 0
    out, here = capsys.readouterr().out, device.current()
    assert f"--tune: nothing to tune: no pallas: {here} is no CUDA device; no triton" in out
    assert f"no native: no C++ compiler; {table} stays as it is" in out
    assert not table.exists()


def test_layers_are_added_up_beside_the_targets_of_a_gpu():
    def record(x, rows, count, seconds):
        times = {"seconds": seconds, "dense_seconds": 1.0, "packed_bytes": 1, "dense_bytes": 8}
        known = {"x": x, "batch": x[0], "rows": rows, "count": count, "in_each_step": len(x) > 2}
        return known | times

    records = [
        record([2, 64, 64, 8], 8192, 1, 1.0),
        record([2, 8, 8, 8], 128, 2, 0.5),
        record([2, 64, 8], 128, 2, 1.5),  # tokens of the same level
        record([2, 8], 2, 3, 0.25),
        record([32, 8], 32, 3, 0.25),
    ]
    found = sums.of(records, targets=True)
    assert [
        (one["layers"], one["batch"], one["ratio_to_dense"], one["target"]) for one in found
    ] == [
        ("Layers of a step", 2, 1.0, None),
        ("Layers before the first step", 2, 4.0, None),
        ("Layers that see 64x64", 2, 1.0, 0.95),
        ("Layers that see 8x8", 2, 1.0, 1.0),
        ("Layers of 1 to 16 rows", 2, 4.0, 3.0),
        ("Layers before the first step", 32, 4.0, None),
    ]
    assert found[3]["packed_bytes"] == 4
    assert {one["target"] for one in sums.of(records, targets=False)} == {None}


def layers_of(wanted: BenchKernelsSettings) -> list[cases.Case]:
    return [cases.case_of(*place, wanted.dtype) for place in kernels.places(wanted)]


@pytest.mark.skipif(native.missing() is not None, reason=f"no native code: {native.missing()}")
def test_a_cpu_compares_native_code_with_decoded_weights(tmp_path, monkeypatch, capsys):
    def made_up(works, repeat):
        for work in works.values():
            jax.block_until_ready(work())
        known = {kernels.NATIVE: 1.0, tuned.DECODED: 2.0, kernels.IN_EVERY_CALL: 3.0}
        if seen:  # of the two layers, the second
            known = {tuned.DECODED: 1.0, kernels.NATIVE: 2.0, kernels.IN_EVERY_CALL: 3.0}
        seen.append(works.keys())
        assert works.keys() == known.keys()
        return known

    seen = []
    monkeypatch.setattr(kernels, "medians_in_turn", made_up)
    monkeypatch.setattr(tuned, "own_file", lambda: tmp_path / "tiles.json")
    wanted = BenchKernelsSettings(model="digits", batch=(1,))
    kernels.tune(wanted)
    assert f"2 shapes on {device.current()} written to {tmp_path}" in capsys.readouterr().out
    tuned._tables.cache_clear()
    found = {
        case.problem.op: tuned.find(device.current().kind, case.problem)
        for case in layers_of(wanted)
    }
    tuned._tables.cache_clear()
    assert found == {
        "vq_conv": tuned.Entry("native"),
        "vq_matmul": tuned.Entry("xla", packed="native"),
    }


def test_what_loses_to_decoding_in_every_call_is_not_taken_for_packed_weights():
    def chosen(**seconds: float) -> tuned.Entry:
        entries = {
            "native": kernels.NATIVE,
            "load": tuned.DECODED,
            "call": kernels.IN_EVERY_CALL,
        }
        return kernels.best([kernels.Trial(entries[n], s, 0.0, None) for n, s in seconds.items()])

    assert chosen(load=1.0, native=3.0, call=2.0) == tuned.DECODED
    assert chosen(load=2.0, native=3.0, call=1.0) == tuned.DECODED
    assert chosen(load=1.0, call=1.0) == tuned.DECODED


def test_a_quantized_model_has_its_own_codes(monkeypatch):
    model = small.integer(small.TINY)
    monkeypatch.setattr(kernels, "quantized_model", lambda source, bits, seed: model)
    layers = kernels.layers(BenchKernelsSettings(model="a run"))
    flat = tree.flatten(model.params)
    tensors = [leaf for leaf in flat.values() if isinstance(leaf, VQTensor)]
    assert sum(layer.count for layer in layers) == len(tensors)
    assert {layer.code[:3] for layer in layers if layer.code} == {
        tensor.codebooks.shape for tensor in tensors
    }
    problem = layers[0].problem(2, "float32")
    assert (problem.books, problem.entries, problem.group, problem.codebook_dtype) == layers[0].code


def test_presets_without_a_list_of_layers_are_planned():
    found = kernels.layers(BenchKernelsSettings(model="textures"))
    assert len(found) > 10
    assert {layer.op for layer in found} == {"vq_matmul", "vq_conv"}


def test_a_preset_has_the_codes_of_its_plan():
    """Without drawing any: those of a large model take minutes."""
    layers = kernels.layers(BenchKernelsSettings(model="digits", bits=2.0))
    assert {layer.code[3] for layer in layers if layer.code} == {"int8"}
    assert {layer.code[2] for layer in layers if layer.code} - {1, 8, 9}
    flat = tree.flatten(random_weights.quantized_shapes(small.TINY, 4.0))
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    plan = make_plan(shapes, bits=4.0, integer=True).layers
    for kind in ("conv3x3", "linear", "scalar"):
        path = next(path for path, spec in plan.items() if spec.grouping == kind)
        drawn = random_weights.random_tensor(shapes[path], plan[path], (0,))
        same = jax.tree.map(
            lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), flat[path], drawn
        )
        assert jax.tree.all(same)


SCHEDULES = (
    Schedule("fused", Tiles(16, 16, 16, splits=2)),
    Schedule("staged", Tiles(16, 16, 16)),
    Schedule("fused", Tiles(16, 16, 16)),
    Schedule("fused", Tiles(32, 16, 16)),
)


@pytest.fixture
def gpu(monkeypatch):
    """As if this were one; schedules do not run, and their times are made up."""
    monkeypatch.setattr(device, "current", lambda: H200)
    monkeypatch.setattr(triton_gpu, "missing", lambda: "triton is not installed")
    monkeypatch.setitem(kernels.LIMITS, "gpu", kernels.Limits(2, 3, 1e12))
    monkeypatch.setattr(kernels, "candidates", lambda problem, tensor_cores: SCHEDULES)

    def scheduled(case, operands, *, path, schedule):
        assert path == "pallas"
        if schedule.tiles.splits > 1:
            raise RuntimeError("out of shared memory")
        return case.packed(operands) * (1.5 if schedule.tiles.rows == 32 else 1.0)

    def made_up(works, repeat):
        seconds = {"xla": 2.0, "staged": 0.5, "fused": 1.0}
        return {one: seconds[one.schedule.kind if one.schedule else one.path] for one in works}

    monkeypatch.setattr(cases.Case, "scheduled", scheduled)
    monkeypatch.setattr(kernels, "medians_in_turn", made_up)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_best_schedules_are_written(dtype, tmp_path, gpu, capsys, caplog):
    table, file = tmp_path / "tiles.json", tmp_path / "tuned.json"
    other = {"NVIDIA L4": {"vq_matmul": {"any": {"path": "xla"}}}}
    table.write_text(json.dumps({"version": 1, "devices": other}))
    wanted = BenchKernelsSettings(model="digits", table=table, json=file, tune=True, dtype=dtype)
    kernels.run(wanted)
    entries = tuned.read(table.read_text())
    for case in layers_of(wanted):
        entry = entries[H200.kind, case.problem.op, tuned.key(case.problem)]
        assert entry == tuned.Entry("pallas", SCHEDULES[1])
    assert entries["NVIDIA L4", "vq_matmul", "any"] == tuned.DECODED
    assert "2 shapes on NVIDIA H200, compute capability 9.0 written to" in capsys.readouterr().out
    for record in json.loads(file.read_text())["records"]:
        assert (record["path"], record["kind"]) == ("pallas", "staged")
        tried = record["tried"]
        assert [one["path"] for one in tried] == ["xla", *["pallas"] * 4]
        assert [one["seconds"] for one in tried] == [2 / 6, 0.5 / 6, 1 / 6, None, None]
        assert tried[3]["why"] == "RuntimeError: out of shared memory"
        limit = {"float32": "0.0001", "int8": "1e-05"}[dtype]
        assert tried[4]["why"] == f"result differs from a decoded weight's by 0.5, limit {limit}"
        assert tried[4]["tiles"]["rows"] == 32
    warnings = [line.message for line in caplog.records if line.levelname == "WARNING"]
    assert len(warnings) == 2
    assert all("tiles 32x16x16, 1 splits is passed over: result differs" in w for w in warnings)


def test_what_was_measured_before_an_end_is_in_the_table_and_not_repeated(
    tmp_path, gpu, monkeypatch
):
    table, file = tmp_path / "tiles.json", tmp_path / "tuned.json"
    wanted = BenchKernelsSettings(model="digits", table=table, json=file)
    real, seen = kernels.trials, []

    def ended(case, programs, repeat):
        seen.append(case.problem.op)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(case, programs, repeat)

    monkeypatch.setattr(kernels, "trials", ended)
    with pytest.raises(KeyboardInterrupt):
        kernels.tune(wanted)
    assert [op for _, op, _ in tuned.read(table.read_text())] == ["vq_conv"]
    kernels.tune(wanted)
    assert seen == ["vq_conv", "vq_matmul", "vq_matmul"]
    assert {op for _, op, _ in tuned.read(table.read_text())} == {"vq_conv", "vq_matmul"}
    assert [r["op"] for r in json.loads(file.read_text())["records"]] == ["vq_conv", "vq_matmul"]
    table.unlink()
    kernels.tune(wanted)  # for another table, results of the same file are not enough
    assert seen[3:] == ["vq_conv", "vq_matmul"]


def test_too_little_memory_is_not_the_fault_of_a_schedule(tmp_path, gpu, monkeypatch):
    def scheduled(case, operands, *, path, schedule):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes")

    monkeypatch.setattr(cases.Case, "scheduled", scheduled)
    wanted = BenchKernelsSettings(model="digits", table=tmp_path / "tiles.json")
    with pytest.raises(DoesNotFitError, match=r"2 copies of vq_conv .* do not fit the memory of"):
        kernels.tune(wanted)


def test_what_takes_most_of_the_network_is_tuned_first(monkeypatch):
    few = dataclasses.replace(specs.layers("vq_matmul")[0], count=1, code=(4, 16, 6, "int8"))
    many = dataclasses.replace(few, outputs=2 * few.outputs, count=5)
    again = dataclasses.replace(few, count=10)  # the same key as the first
    monkeypatch.setattr(kernels, "layers", lambda wanted: [few, many, again])
    found = kernels.problems_of(BenchKernelsSettings(batch=(2, 32)))
    assert list(found.values()) == [(again, 2), (many, 2), (again, 32), (many, 32)]
    monkeypatch.setattr(kernels, "layers", lambda wanted: [few, many])
    found = kernels.problems_of(BenchKernelsSettings(batch=(2, 32)))
    assert list(found.values()) == [(many, 2), (few, 2), (many, 32), (few, 32)]


def test_what_takes_most_of_the_network_is_timed_first():
    """Convolutions among products: an ended run has both."""
    every = {(layer.op, layer.outputs): layer for op in OPS for layer in specs.layers(op)}
    wanted = BenchKernelsSettings(model="digits", batch=(2, 1))
    found = kernels.places(wanted)
    assert [batch for _, batch in found] == [2] * len(every) + [1] * len(every)
    work = [kernels.operations_of(layer, batch, wanted) for layer, batch in found]
    assert work[: len(every)] == sorted(work[: len(every)], reverse=True)
    assert [layer.op for layer, _ in found][:2] == ["vq_conv", "vq_matmul"]


def test_layers_of_few_rows_alone(capsys):
    wanted = BenchKernelsSettings(model="digits", batch=(1, 4, 16), most_rows=4)
    found = kernels.places(wanted)
    assert [(layer.op, batch) for layer, batch in found] == [("vq_matmul", 1), ("vq_matmul", 4)]
    assert main(["kernels", "--model", "digits", "--batch", "8", "--most-rows", "4"]) == 2
    assert "--most-rows 4: no layer has so few" in capsys.readouterr().err


IMAGE = specs.Layer("a", "vq_conv", (1, 4, 4, 8), 6, 3, 2, (0, 1), False, 1, (2, 16, 9, "int8"))
POINTS = dataclasses.replace(IMAGE, op="vq_matmul", window=1, stride=1, padding=(0, 0))
TOKENS = dataclasses.replace(POINTS, x_shape=(1, 5, 8))


@pytest.mark.parametrize("layer", [IMAGE, POINTS, TOKENS])
def test_the_dense_layer_is_what_sampling_runs(layer):
    """The model's own kernel and bias, of one type: rows of a matrix would be another program on a
    GPU, with a transposition for each convolution and a bias that is added apart."""
    case = cases.case_of(layer, 2, "bfloat16")
    image = len(layer.x_shape) == 4
    assert case.kernel.shape == (layer.window,) * 2 * image + (8, 6)
    text = str(jax.make_jaxpr(case.dense)(case.dense_operands))
    assert "transpose" not in text
    convolved = layer.window > 1
    assert ("conv_general_dilated" in text) == convolved
    assert "rhs_spec=(3, 2, 0, 1)" in text or not convolved  # height, width, inputs, outputs
    assert "f32" not in text
    found, packed = case.dense(case.dense_operands), case.packed(case.operands)
    assert found.shape == packed.shape
    numbers = (np.asarray(y, np.float64) for y in (packed, found))
    assert kernels.relative_rms(*numbers) < 1e-2


@pytest.mark.parametrize("layer", [IMAGE, POINTS, TOKENS])
def test_integers_are_those_of_a_weight_that_was_decoded_to_bytes(layer):
    case = cases.case_of(layer, 2, "int8")
    x, kernel, _ = case.dense_operands
    assert (x.dtype, kernel.dtype) == (jnp.int8, jnp.int8)
    found, packed = case.dense(case.dense_operands), case.packed(case.operands)
    assert found.shape == packed.reshape(found.shape).shape
    assert kernels.relative_rms(np.asarray(packed).reshape(found.shape), np.asarray(found)) < 1e-6


def test_products_of_integers_are_timed(tmp_path, monkeypatch, capsys):
    file, table = tmp_path / "kernels.json", tmp_path / "tiles.json"
    words = ["kernels", "--model", "digits", "--dtype", "int8", "--repeat", "1"]
    assert main([*words, "--json", str(file)]) == 0
    for record in json.loads(file.read_text())["records"]:
        assert record["error"] < 1e-6
        assert record["packed_bytes"] < record["dense_bytes"]
        assert record["roofline_share"] > 0
    capsys.readouterr()
    assert main([*words, "--tune", "--table", str(table)]) == 0
    assert "no native: it multiplies no integers" in capsys.readouterr().out
    codes = dataclasses.replace(IMAGE, code=(2, 16, 9, "float16"))
    monkeypatch.setattr(specs, "layers", lambda op: [dataclasses.replace(codes, model="digits")])
    assert main(words) == 2
    assert "--dtype int8: 2 of 2 layers of digits have codebooks of" in capsys.readouterr().err


def test_a_weight_is_decoded_by_one_program():
    """Step by step there would be more than twenty, and a GPU takes a while for each."""
    problem = dataclasses.replace(IMAGE, outputs=7).problem(2, "float16")  # of no other test
    operands = specs.random_operands(problem, IMAGE.operands_shape(2))
    made = []

    def hear(event, duration_secs, **kwargs):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            made.append(event)

    jax.monitoring.register_event_duration_secs_listener(hear)
    cases.decoded(operands, problem, image=True)
    assert len(made) == 1


def test_programs_are_compiled_side_by_side_and_nothing_beside_what_is_timed(monkeypatch):
    monkeypatch.setattr(kernels.os, "cpu_count", lambda: 4)
    both = threading.Barrier(2, timeout=60)

    def one_of_two(operands):
        both.wait()
        return operands.x

    def runs(case):
        return {name: kernels.Run(one_of_two, case.operands) for name in "ab"}

    wanted = BenchKernelsSettings(model="digits", batch=(1,))
    seen = []
    for case, programs in kernels.compiled(kernels.places(wanted), wanted, runs):
        seen.append(case.layer.op)
        assert all(not isinstance(program, Exception) for program in programs.values())
    assert seen == ["vq_conv", "vq_matmul"]


def test_inputs_go_past_the_cache_where_they_are_waited_for(monkeypatch):
    (layer,) = specs.layers("vq_matmul")
    few = cases.case_of(layer, 1, "float32")
    many = few._replace(problem=dataclasses.replace(few.problem, rows=10**6))
    read = kernels.tree_bytes(few.operands)
    assert kernels.copies(few, 4 * read) == 8  # twice the cache
    assert kernels.copies(few, 10**9) == kernels.LIMITS["cpu"][0]
    assert kernels.copies(many, 10**9) == 1
    monkeypatch.setattr(device, "current", lambda: H200)
    cache = roofline.of(H200, "bfloat16").cache
    assert cache == 60 * 2**20
    large = dataclasses.replace(few.problem, inputs=4096, outputs=2048)
    case = few._replace(problem=large, operands=specs.random_operands(large, (1, 4096)))
    assert kernels.copies(case, cache) * kernels.tree_bytes(case.operands) >= 2 * cache


def test_copies_are_of_their_own_and_all_run():
    def run(pair):
        traced.append(pair)
        return pair[0] * pair[1][None]

    traced = []
    several = kernels.in_places((jnp.ones((2, 3)), jnp.arange(3.0)), 3)
    assert len({x.unsafe_buffer_pointer() for x, _ in several}) == 3
    ys = kernels.repeated(run, 1)(several)
    assert len(ys) == 3
    for y in [*ys, kernels.repeated(run, 4)(several)[-1]]:
        assert y.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert len(traced) == 1  # not for each copy


@pytest.mark.usefixtures("optimized")
def test_rounds_compute_everything_again():
    """XLA takes out of loops what does not change in them, unless it is kept from it."""
    case = layers_of(BenchKernelsSettings(model="digits"))[0]
    with kernels.asked("xla"):
        program = kernels.repeated(case.packed, 3)
        text = program.lower(kernels.in_places(case.operands, 2)).compile().as_text()
    parts = {part.split(" ", 1)[0]: part for part in re.split(r"\n(?=%)|\nENTRY ", text)}
    found = re.findall(r"body=(%[\w.\-]+)", text)
    for name in found:  # and all that it calls
        found += re.findall(r"(?:calls|to_apply)=(%[\w.\-]+)", parts[name])
    decoding = {name for name, part in parts.items() if " gather(" in part}
    assert decoding
    assert decoding <= set(found)


def test_rounds_share_what_the_host_takes_but_for_much_arithmetic(monkeypatch):
    (layer,) = specs.layers("vq_matmul")
    case = cases.case_of(layer, 1, "float32")
    assert kernels.rounds_of(case, 16) == 1
    monkeypatch.setattr(device, "current", lambda: H200)
    limits = kernels.LIMITS["gpu"]
    assert kernels.rounds_of(case, 16) == limits.rounds
    many = case._replace(problem=dataclasses.replace(case.problem, rows=10**6))
    products = counts.operations(many.problem)[0]
    assert 10 * products * kernels.rounds_of(many, 10) <= limits.operations
    assert kernels.rounds_of(many, 10**9) == 1


def test_the_share_is_that_of_the_longer_of_both_times():
    machine = roofline.Machine(bandwidth=100.0, operations=1000.0, cache=0, source="made up")
    assert machine.least_seconds(moved=200, operations=1000) == 2
    assert machine.least_seconds(moved=50, operations=1000) == 1
    assert roofline.of(T4, "bfloat16").least_seconds(1, 1) is None
    assert "no peak for bfloat16" in roofline.of(T4, "bfloat16").source
    unknown = Device("gpu", "NVIDIA L4", (8, 9))
    assert roofline.of(unknown, "float16").source == "no published peaks of NVIDIA L4 at hand"
    # A row of a linear layer of 960 weights a side is bound by memory on every one of them.
    for kind in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "Tesla T4"):
        peaks = roofline.of(Device("gpu", kind), "float16")
        weights = 2 * 960 * 960
        assert peaks.bandwidth is not None
        assert peaks.least_seconds(weights, 2 * 960 * 960) == weights / peaks.bandwidth


def test_mistakes_are_one_line(capsys):
    assert main(["kernels", "--repeat", "0"]) == 2
    assert "--repeat 0: expected 1 or more" in capsys.readouterr().err
