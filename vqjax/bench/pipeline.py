# SPDX-License-Identifier: Apache-2.0
"""`bench pipeline`: a whole quantization by the clock, and what one that tunes for longer takes.

The model has random weights; every stage runs as `python -m vqjax.quantize` runs it. Only tuning is
cut short: its steps are alike. Those that are timed hold one round of the teacher, of as many
trajectories as a batch has pairs, and so cost it as much per step as any number of rounds does.
"""

import dataclasses
import json
import math
import pathlib
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from vqjax import config as config_lib
from vqjax import progress
from vqjax.bench import random_weights, work
from vqjax.bench.clock import CompileClock
from vqjax.config import LatentDiffusionConfig
from vqjax.errors import VqjaxError
from vqjax.io import native
from vqjax.pipeline import environment, journal, quantize, refusals
from vqjax.sampling.schedule import ddim_schedule
from vqjax.settings import BenchPipelineSettings, QuantizeSettings, command_line
from vqjax.train import loop

LARGE_MODEL_STEPS = 3200
"""Those of the runs of `cin256-v2` in eval/runs."""
_TUNE = "tune"  # names the stage in the record of a run, and its progress
_REST = "load, plan and all else"


def run(wanted: BenchPipelineSettings) -> None:
    """Quantizes, prints and writes; continues what was interrupted.

    Raises:
      VqjaxError: for settings that `quantize` refuses, or where --out holds another measurement.
    """
    if wanted.tune_steps is not None and wanted.tune_steps < 1:
        raise VqjaxError(f"--tune-steps {wanted.tune_steps}: expected 1 or more")
    config = config_lib.PRESETS[wanted.model]()
    asked = quantize_settings(config, wanted)
    journal.check_folder(wanted.out)
    wanted.out.mkdir(parents=True, exist_ok=True)
    source, record_file = pathlib.Path(asked.source), asked.out / "run.json"
    if not source.exists():
        native.save_model(source, random_weights.dense_model(config, wanted.seed))
    whole = not record_file.exists()
    if not journal.is_done(record_file):
        for begun in asked.out.glob("work/tune-*"):  # its first steps would be missing
            shutil.rmtree(begun)
    assert asked.tune_steps is not None
    steps = _Steps(asked.tune_steps, wanted.out / "steps.json")
    clock, start = CompileClock(), time.monotonic()
    with progress.watched(steps.see):
        quantize.run(asked)
    elapsed = time.monotonic() - start
    record = json.loads(record_file.read_text())
    tuning = of_steps(json.loads(steps.file.read_text()))
    seconds = dict(record["seconds"])
    if whole:  # an earlier attempt's is not known
        seconds[_REST] = round(elapsed - sum(seconds.values()), 3)
    found = {
        "command": command_line("vqjax.bench", wanted, "pipeline"),
        "environment": environment.describe(),
        "quantize": record["command"],
        "seconds": seconds,
        "compile_seconds": round(clock.seconds, 1) if whole else None,
        "peak_memory_bytes": record["peak_memory_bytes"],
        "accelerator_memory_bytes": work.accelerator_peak_bytes() if whole else None,
        "tuning": tuning,
        "complete": complete(seconds, tuning, complete_steps(config, wanted)),
    }
    if wanted.json is not None:
        native.write_atomically(wanted.json, (json.dumps(found, indent=2) + "\n").encode())
    show(found)


def quantize_settings(
    config: LatentDiffusionConfig, wanted: BenchPipelineSettings
) -> QuantizeSettings:
    """What is quantized: the weights' own file, and as many steps as a round of the teacher has,
    one before them that compiles and one after them that saves.

    Raises:
      VqjaxError: for what `quantize` would refuse of it.
    """
    asked = QuantizeSettings(
        source=str(wanted.out / f"random-{wanted.model}-{wanted.seed}.safetensors"),
        bits=wanted.bits,
        out=wanted.out / "run",
        samples=wanted.samples,
        calibration=wanted.calibration,
        tuning=dataclasses.replace(wanted.tuning, trajectories=wanted.tuning.batch),
        memory=wanted.memory,
        seed=wanted.seed,
    )
    refusals.check(asked)
    refusals.check_steps(config, asked, tune_steps=1)
    per_round = len(ddim_schedule(config, asked.calibration.steps).timesteps)
    return dataclasses.replace(asked, tune_steps=1 + per_round + 1)


def complete_steps(config: LatentDiffusionConfig, wanted: BenchPipelineSettings) -> int:
    """Steps of tuning of the run that is predicted."""
    if wanted.tune_steps is not None:
        return wanted.tune_steps
    return quantize.SMALL_MODEL_STEPS if config.small else LARGE_MODEL_STEPS


class _Steps:
    """Writes the seconds of each step of tuning but the first, as soon as all are done.

    Attributes:
      file: what is written: a JSON list.
    """

    def __init__(self, count: int, file: pathlib.Path) -> None:
        self.file, self._count = file, count
        self._ends: list[float] = []

    def see(self, name: str) -> None:
        """A unit of this stage is done."""
        if name != _TUNE:
            return
        self._ends.append(time.perf_counter())
        if len(self._ends) == self._count:
            seconds = [after - before for before, after in zip(self._ends, self._ends[1:])]
            native.write_atomically(self.file, json.dumps(seconds).encode())


def of_steps(seconds: Sequence[float]) -> dict[str, float]:
    """What a step takes, from those after the first, of which the last one also saves.

    Returns:
      "steps" in all, mean "seconds_per_step", "checkpoint_seconds".
    """
    *alike, last = seconds
    saving = last - statistics.median(alike)
    return {
        "steps": len(seconds) + 1,
        "seconds_per_step": statistics.fmean(alike),
        "checkpoint_seconds": max(0.0, saving),
    }


def complete(
    seconds: Mapping[str, float], tuning: Mapping[str, float], steps: int
) -> dict[str, Any]:
    """Seconds by stage with `steps` of tuning, a checkpoint a minute, all else as measured.

    Args:
      seconds: by stage, as measured.
      tuning: from `of_steps`.
    """
    more = (steps - tuning["steps"]) * tuning["seconds_per_step"]
    # The steps that were timed have their own share of checkpoints where they took that long.
    timed = (tuning["steps"] - 2) * tuning["seconds_per_step"]
    saves = 0 if timed >= loop.SAVE_INTERVAL else max(0, math.floor(more / loop.SAVE_INTERVAL))
    tuned = seconds[_TUNE] + more + saves * tuning["checkpoint_seconds"]
    stages = {**seconds, _TUNE: tuned}
    return {"tune_steps": steps, "seconds": stages, "total_seconds": sum(stages.values())}


def show(found: Mapping[str, Any]) -> None:
    """Prints the stages, and what a complete run is predicted from."""
    measured, whole, tuning = found["seconds"], found["complete"], found["tuning"]
    table = Table(title=f"Stages of: {found['quantize']}", title_justify="left")
    for name in ("stage", "s", f"s, {whole['tune_steps']:,} steps"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage, seconds in measured.items():
        table.add_row(stage, f"{seconds:,.1f}", f"{whole['seconds'][stage]:,.1f}")
    table.add_row(
        "all", f"{sum(measured.values()):,.1f}", f"{whole['total_seconds']:,.1f}", style="bold"
    )
    console = progress.console()
    console.print(table)
    made = found["compile_seconds"]
    console.print(
        f"{tuning['steps']} steps of tuning were measured: {tuning['seconds_per_step']:.3f} s each "
        f"with the teacher's part, {tuning['checkpoint_seconds']:.1f} s a checkpoint. The last "
        "column assumes that further steps take as long, with a checkpoint a minute; all else is "
        "as measured.\n"
        + ("" if made is None else f"Programs were made in {made:,.1f} s of it. ")
        + f"Memory {found['peak_memory_bytes'] / 1e9:.2f} GB"
        + (
            ""
            if found["accelerator_memory_bytes"] is None
            else f", of the accelerator {found['accelerator_memory_bytes'] / 1e9:.2f} GB"
        )
    )
