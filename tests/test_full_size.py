# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as the authors publish it, through all commands: quantize, sample, evaluate.

A small model goes that way here. So does cin256-v2 at its full size where VQJAX_FULL_SIZE=1 asks
for it: over an hour on two cores, 24 GB of memory, 8 GB of disk (`docs/scale.md`).
"""

import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
import pathlib
import subprocess
import sys
import zlib
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.io import models, torch_writer
from vqjax import evaluate
from vqjax.config import PRESETS, LatentDiffusionConfig
from vqjax.io import keys
from vqjax.quantize.__main__ import main as quantize
from vqjax.sample.__main__ import main as sample

pytestmark = pytest.mark.xdist_group("quantize tiny")

NAME = "cin256-v2"
COMMANDS = {"quantize": quantize, "sample": sample, "evaluate": evaluate.main}
FULL_SIZE = pytest.mark.skipif(
    os.environ.get("VQJAX_FULL_SIZE") != "1",
    reason="takes over an hour and 24 GB of memory; set VQJAX_FULL_SIZE=1 to run it",
)


class Size(NamedTuple):
    """What goes through: weights of the U-Net at least, and what is asked of the commands."""

    config: LatentDiffusionConfig
    weights: int
    bits: float
    memory: float  # GB
    pictures: int


SMALL = Size(models.TINY, 100_000, 1.2, 12.0, 4)
# At half a bit the search takes a fifth of what it takes at two; all else is the same.
LARGE = Size(PRESETS[NAME](), 400_000_000, 0.5, 24.0, 4)


def checkpoint(path: pathlib.Path, config: LatentDiffusionConfig) -> pathlib.Path:
    """Writes random weights of usual size as `torch.save` would; returns the path."""
    state = {entry.key: weights(entry.key, entry.shape) for entry in keys.table(config)}
    torch_writer.save_zip(path, {"global_step": 178000, "state_dict": state})
    return path


def weights(key: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1 and key.endswith(".weight"):  # of a norm
        return np.ones(shape, np.float32)
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    spread = 0.01 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
    return (rng.standard_normal(shape, np.float32) * np.float32(spread)).astype(np.float32)


def written(path: pathlib.Path, config: LatentDiffusionConfig) -> pathlib.Path:
    """`checkpoint`, by a process that takes its memory with it."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(checkpoint, path, config).result()


def in_process(command: str, *words: object) -> None:
    """A command beside the tests, whose programs compile in the least time."""
    assert COMMANDS[command]([str(word) for word in words]) == 0


def alone(command: str, *words: object) -> None:
    """A command as users run it: its own process and memory, programs optimized."""
    kept = {name: value for name, value in os.environ.items() if name[:4] not in ("JAX_", "XLA_")}
    argv = [sys.executable, "-m", f"vqjax.{command}", *map(str, words)]
    subprocess.run(argv, env=kept, check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "call"),
    [
        pytest.param(SMALL, in_process, id="small"),
        pytest.param(LARGE, alone, id="full", marks=FULL_SIZE),
    ],
)
def test_a_checkpoint_goes_all_the_way(size, call, tmp_path, monkeypatch, quick_search, capfd):
    monkeypatch.setitem(PRESETS, NAME, lambda: size.config)
    write = written if call is alone else checkpoint
    source, run = write(tmp_path / "model.ckpt", size.config), tmp_path / "run"
    grid, scores = tmp_path / "grid.png", tmp_path / "scores"
    calibration = ("--calibration.images", 2, "--calibration.steps", 3, "--calibration.batch", 2)
    of_model = ("--config", NAME, "--bits", size.bits, "--memory", size.memory, "--tune-steps", 0)
    few_steps = ("--steps", 2, "--batch", 2)
    with capfd.disabled() if call is alone else contextlib.nullcontext():  # not an hour of silence
        call("quantize", source, *of_model, *calibration, "--samples", 4, "--out", run)
        call("sample", run, "--count", 2, "--columns", 2, *few_steps, "--out", grid)
        against = ("--against", source, "--config", NAME, "--count", size.pictures)
        call("evaluate", run, *against, *few_steps, "--out", scores)

    report = json.loads((run / "report.json").read_text())
    assert report["model"]["parameters"] > size.weights
    assert 0 < report["weights"]["bits_per_weight"] <= size.bits
    assert all(0 < layer["rel_output_mse"] < 1 for layer in report["layers"])
    side = size.config.first_stage.resolution
    assert np.asarray(Image.open(grid)).shape[0] >= side
    found = json.loads((scores / "evaluation.json").read_text())
    assert found["models"]["source"]["n"] == size.pictures
    assert found["difference"]["psnr"] > 5
    record = json.loads((run / "run.json").read_text())
    after = record["peak_memory_after"]
    assert {"calibrate", "compress", "scalar baseline", "ranges", "sample"} <= after.keys()
    peak = max(*after.values(), found["peak_memory_bytes"])
    assert peak < 1e9 * size.memory
    with capfd.disabled():
        shown = ", ".join(f"{stage} {value / 1e9:.2f}" for stage, value in after.items())
        print(f"\n{size.config.name}: peak memory in GB after {shown}; all {peak / 1e9:.2f}")
        print(f"seconds: {record['seconds']}")
