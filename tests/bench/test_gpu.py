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
from vqjax.bench import gpu
from vqjax.errors import VqjaxError
from vqjax.settings import BenchGpuSettings


def python(name: str, code: str) -> gpu.Part:
    return gpu.Part(name, (sys.executable, "-c", code))


def test_without_a_gpu_nothing_starts(tmp_path, capsys):
    out = tmp_path / "out"
    assert bench.main(["--gpu", "--out", str(out)]) == 2
    assert "expected a GPU, found JAX's backend 'cpu'" in capsys.readouterr().err
    assert not out.exists()


def test_every_part_is_a_command_that_can_be_read(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "_work", seen.append)
    parts = gpu.parts(BenchGpuSettings(out=tmp_path, seed=7))
    assert [part.name for part in parts] == list(BenchGpuSettings().parts)
    for part in parts:
        assert part.words[:3] == (sys.executable, "-m", "vqjax.bench")
        assert bench.main(list(part.words[3:])) == 0
        assert seen[-1].json == tmp_path / f"{part.name}.json"
        assert seen[-1].seed == 7
    some = gpu.parts(BenchGpuSettings(parts=("evaluate", "kernels")))
    assert [part.name for part in some] == ["kernels", "evaluate"]


def test_layers_are_those_of_a_plan_and_the_table_is_what_sampling_asks_for(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(bench, "_work", lambda found: seen.update({found.json.stem: found}))
    for part in gpu.parts(BenchGpuSettings(out=tmp_path)):
        assert bench.main(list(part.words[3:])) == 0
    layers, table, usual = seen["kernels"], seen["kernels_tuned"], settings.SampleSettings()
    assert (layers.bits, table.bits) == (2.0, 2.0)
    assert table.tune
    assert table.dtype == usual.dtype
    assert table.batch == (2, 2 * usual.count)  # guidance doubles them


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
import sys
from vqjax.bench import gpu
with gpu._told_to_end():
    list(gpu.each([gpu.Part("slow", (sys.executable, "-c", {slow!r}))], 60.0))
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
    there = types.SimpleNamespace(stdout="gpu\n")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *words, **more: there)
    monkeypatch.setattr(gpu, "parts", lambda wanted: [python("kernels", "raise SystemExit(1)")])
    wanted = settings.BenchGpuSettings(out=tmp_path / "out")
    with pytest.raises(VqjaxError, match="kernels failed"):
        gpu.run(wanted)
    (record,) = json.loads((wanted.out / "summary.json").read_text())["parts"]
    assert (record["part"], record["state"]) == ("kernels", "failed")
    assert "kernels" in capsys.readouterr().out
    with pytest.raises(VqjaxError, match="--minutes 0"):
        gpu.run(settings.BenchGpuSettings(minutes=0.0))
