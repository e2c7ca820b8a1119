# SPDX-License-Identifier: Apache-2.0
"""`bench --gpu`: parts that fail or take too long cost the others nothing."""

import json
import signal
import subprocess
import sys
import time
import types

import pytest

from vqjax import settings
from vqjax.bench import __main__ as bench
from vqjax.bench import gpu, sample
from vqjax.errors import VqjaxError
from vqjax.kernels import device as devices
from vqjax.kernels import dispatch, tuned
from vqjax.kernels.device import Device
from vqjax.settings import BenchGpuSettings

HOPPER = gpu.Here("gpu", "bfloat16", "auto")


def python(name: str, code: str, share: float = 1.0) -> gpu.Part:
    return gpu.Part(name, share, (sys.executable, "-c", code))


def test_without_a_gpu_nothing_starts(tmp_path, capsys):
    out = tmp_path / "out"
    assert bench.main(["--gpu", "--out", str(out)]) == 2
    assert "expected a GPU, found JAX's backend 'cpu'" in capsys.readouterr().err
    assert not out.exists()


def test_every_part_is_a_command_that_can_be_read(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "_work", seen.append)
    parts = gpu.parts(BenchGpuSettings(out=tmp_path, seed=7), HOPPER)
    assert [part.name for part in parts] == list(BenchGpuSettings().parts)
    for part in parts:
        assert part.words[:3] == (sys.executable, "-m", "vqjax.bench")
        assert bench.main(list(part.words[3:])) == 0
        assert seen[-1].json == tmp_path / f"{part.name}.json"
        assert seen[-1].seed == 7
    some = gpu.parts(BenchGpuSettings(parts=("evaluate", "kernels")), HOPPER)
    assert [part.name for part in some] == ["kernels", "evaluate"]


def read(found: gpu.Here, tmp_path, monkeypatch) -> dict:
    """Settings of all parts by name."""
    seen = {}
    monkeypatch.setattr(bench, "_work", lambda found: seen.update({found.json.stem: found}))
    for part in gpu.parts(BenchGpuSettings(out=tmp_path), found):
        assert bench.main(list(part.words[3:])) == 0
    return seen


def test_layers_come_first_and_are_those_that_sampling_has(tmp_path, monkeypatch):
    seen, usual = read(HOPPER, tmp_path, monkeypatch), settings.SampleSettings()
    layers = {name: found for name, found in seen.items() if name.startswith("kernels")}
    assert list(seen)[: len(layers)] == list(layers)
    shares = {part.name: part.share for part in gpu.parts(BenchGpuSettings(), HOPPER)}
    assert sum(shares[name] for name in layers) > sum(shares.values()) / 2
    for found in layers.values():
        assert found.bits == 2.0
    assert {name: found.dtype for name, found in layers.items()} == {
        **dict.fromkeys(layers, seen["sample"].dtype),
        "kernels_int8": "int8",
    }
    assert seen["sample"].dtype == "bfloat16"
    assert layers["kernels"].batch == (2, 1)
    rows = layers["kernels_rows"]
    assert (rows.most_rows, max(rows.batch)) == (16, 16)
    table = layers["kernels_tuned"]
    assert table.tune
    assert table.table is None  # what sampling reads
    assert table.batch == (2, 2 * usual.count)  # guidance doubles them
    integers = layers["kernels_int8"]
    assert (integers.tune, integers.table) == (True, None)
    assert integers.batch == (2 * min(seen["sample_int8"].batch),)
    assert sorted(seen["sample"].batch) == [1, 4, 16, 64]
    integers = seen["sample_int8"]
    assert (integers.paths, integers.act_bits, integers.dtype) == (("integer",), 8, "bfloat16")
    assert sample.ways_here(integers.paths, eight_bits=True) == [sample.WAYS["integer"]]


T4, A100 = (
    Device("gpu", "Tesla T4", (7, 5)),
    Device("gpu", "NVIDIA A100-SXM4-40GB", (8, 0)),
)


@pytest.mark.parametrize(
    ("device", "dtype", "path"), [(T4, "float16", "load"), (A100, "bfloat16", "auto")]
)
def test_what_does_not_run_on_a_gpu_is_not_asked_for(device, dtype, path, tmp_path, monkeypatch):
    """A T4 imitates bfloat16, and has no kernels unless some were measured."""
    for module in (devices, dispatch):
        monkeypatch.setattr(module, "current", lambda: device)
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(tuned, "own_file", lambda: tmp_path / "none.json")
    tuned._tables.cache_clear()
    found = gpu.here()
    assert found == ("gpu", dtype, path)
    assert gpu.Here(*json.loads(json.dumps(found))) == found  # as it comes from a process
    seen = read(found, tmp_path, monkeypatch)
    assert seen["sample"].dtype == seen["kernels"].dtype == dtype
    assert sample.ways_here(seen["sample"].paths) == [sample.WAYS[path]]
    tuned._tables.cache_clear()


def test_time_is_shared_as_was_planned(monkeypatch):
    given = []
    monkeypatch.setattr(gpu, "_exit_code", lambda words, seconds: given.append(seconds) or 0)
    shares = (3.0, 1.0, 1.0)
    list(gpu.each([python("a", "pass", share) for share in shares], 500.0))
    assert given == pytest.approx([300, 250, 500], abs=1)  # what is not used is the others'


def test_a_part_that_fails_or_takes_too_long_costs_the_others_nothing(tmp_path, monkeypatch):
    trace = tmp_path / "trace"
    child = f"import time; time.sleep(4); open({str(trace)!r}, 'w')"
    slow = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    parts = [
        python("good", "pass"),
        python("bad", "raise SystemExit(3)"),
        python("slow", slow),
        python("next", "pass"),
    ]
    begun = time.monotonic()
    records = list(gpu.each(parts, 5.0))
    assert [record["state"] for record in records] == ["done", "failed", "ended", "done"]
    assert [record["exit_code"] for record in records] == [0, 3, None, 0]
    records = list(gpu.each([python("slow", slow), python("late", "pass")], 1.0))
    assert [record["state"] for record in records] == ["ended", "left out"]
    time.sleep(max(0.0, begun + 9 - time.monotonic()))
    assert not trace.exists()  # what it had started went with it


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_part_too(number):
    """Parts are in sessions of their own, which signals to the process do not reach."""
    slow = "import time; print('begun', flush=True); time.sleep(60)"
    code = f"""
import signal, sys
from vqjax.bench import gpu
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
with gpu._told_to_end():
    list(gpu.each([gpu.Part("slow", 1.0, (sys.executable, "-c", {slow!r}))], 60.0))
"""
    words = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        begun = time.monotonic()
        process.send_signal(number)
        assert process.stdout.read() == ""  # it ends once nobody can write any more
        assert time.monotonic() - begun < 30
        assert process.wait(30) != 0


def test_the_summary_says_what_became_of_the_parts(tmp_path, monkeypatch, capsys):
    there = types.SimpleNamespace(stdout=json.dumps(HOPPER))
    monkeypatch.setattr(gpu.subprocess, "run", lambda *words, **more: there)
    bad = python("kernels", "raise SystemExit(1)")
    monkeypatch.setattr(gpu, "parts", lambda wanted, found: [bad])
    wanted = settings.BenchGpuSettings(out=tmp_path / "out")
    with pytest.raises(VqjaxError, match="kernels failed"):
        gpu.run(wanted)
    (record,) = json.loads((wanted.out / "summary.json").read_text())["parts"]
    assert (record["part"], record["state"]) == ("kernels", "failed")
    assert "kernels" in capsys.readouterr().out
    with pytest.raises(VqjaxError, match="--minutes 0"):
        gpu.run(settings.BenchGpuSettings(minutes=0.0))
