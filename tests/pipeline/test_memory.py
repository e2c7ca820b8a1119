# SPDX-License-Identifier: Apache-2.0
"""One number limits a run's memory: what follows from it, and what does not fit."""

import math

import pytest

from vqjax.config import PRESETS
from vqjax.core.plan import kernel_shapes
from vqjax.errors import DoesNotFitError
from vqjax.io import keys
from vqjax.pipeline import calibrate, estimate, memory
from vqjax.pipeline.calibrate import LayerInput
from vqjax.settings import Calibration

SHAPES = {f"unet/{i}/kernel": (4000, 400) for i in range(12)}
SIZES = {path: LayerInput(4000, 64) for path in SHAPES}


def divide(limit, workers=4) -> memory.Division:
    return memory.divide(
        PRESETS["digits"](), SHAPES, SIZES, Calibration(), limit=limit, workers=workers
    )


def test_without_a_limit_everything_goes_side_by_side():
    found = divide(None)
    assert found.workers == 4
    assert calibrate.batches(SIZES, found.moments) == [list(SIZES)]
    assert found.peak == sum(found.parts.values())


def test_less_memory_means_more_passes_and_fewer_layers_at_a_time():
    plenty, passes, workers = divide(None).peak, [], []
    for share in (1.1, 0.8, 0.6, 0.5):
        found = divide(share * plenty)
        assert found.peak <= share * plenty
        passes.append(len(calibrate.batches(SIZES, found.moments)))
        workers.append(found.workers)
    assert passes == sorted(passes)
    assert workers == sorted(workers, reverse=True)
    assert (passes[0], workers[0]) == (1, 4)
    assert passes[-1] > 4
    assert workers[-1] == 1


def test_passes_do_not_depend_on_the_cores_of_the_machine():
    limit = 0.8 * divide(None, workers=8).peak
    assert divide(limit, workers=8).moments == divide(limit, workers=1).moments


def test_what_cannot_fit_says_what_would():
    with pytest.raises(DoesNotFitError, match=r"--memory 1: one layer at a time takes") as error:
        divide(1e9)
    asked = float(str(error.value).rsplit("ask for ")[1].split()[0])
    assert divide(asked * 1e9).workers == 1
    assert error.value.exit_code == 3


def test_the_published_model_fits_a_workstation():
    config = PRESETS["cin256-v2"]()
    shapes = {entry.path: entry.param_shape for entry in keys.table(config)}
    sizes = {
        path: LayerInput(math.prod(shape[:-1]), 64, shape[0] if len(shape) == 4 else 1)
        for path, shape in kernel_shapes(shapes).items()
    }
    found = memory.divide(config, shapes, sizes, Calibration(), limit=32e9, workers=4)
    assert found.peak <= 32e9


def test_what_a_run_holds_already_counts_as_available(monkeypatch, tmp_path):
    system = tmp_path / "meminfo"
    system.write_text("MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:  4000 kB\n")
    own = tmp_path / "status"
    own.write_text("VmHWM:  2000 kB\nVmRSS:  1000 kB\n")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(estimate, "MEMORY_FILES", (own, system, limit))
    assert estimate.available_memory() == 5000 * 1024
    limit.write_text("max\n")
    assert estimate.available_memory() == 5000 * 1024
    limit.write_text("3000000\n")
    assert estimate.available_memory() == 3_000_000
    system.unlink()
    assert estimate.available_memory() is None
