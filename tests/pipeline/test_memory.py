# SPDX-License-Identifier: Apache-2.0
"""One number limits a run's memory: what follows from it, and what does not fit."""

import functools
import pathlib
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.io import models as small
from vqjax import models
from vqjax.config import PRESETS
from vqjax.core import folding, tree
from vqjax.core.plan import kernel_shapes
from vqjax.errors import DoesNotFitError
from vqjax.pipeline import calibrate, estimate, memory, quantize
from vqjax.pipeline.calibrate import LayerInput
from vqjax.settings import Calibration, QuantizeSettings
from vqjax.train import distill

DOCS = pathlib.Path(__file__).parents[2] / "docs"
SHAPES = {f"unet/{i}/kernel": (4000, 400) for i in range(12)}
SIZES = {path: LayerInput(4000, 64) for path in SHAPES}


def divide(limit, workers=4) -> memory.Division:
    return memory.divide(
        PRESETS["digits"](), SHAPES, SIZES, Calibration(), limit=limit, workers=workers
    )


@functools.cache
def published() -> tuple[Any, Any, Any]:
    """Configuration, shapes and layers of cin256-v2, folded as runs do it."""
    config = PRESETS["cin256-v2"]()
    params = folding.fold(config, models.param_shapes(config)).params
    shapes = {path: tuple(leaf.shape) for path, leaf in tree.flatten(params).items()}
    sizes = calibrate.trace_layers(config, params)
    return config, shapes, {path: sizes[path] for path in kernel_shapes(shapes)}


def divided(workers=1, batch=16, **more) -> memory.Division:
    return memory.divide(*published(), Calibration(batch=batch), workers=workers, **more)


def test_without_a_limit_everything_goes_side_by_side():
    found = divide(None)
    assert found.workers == 4
    assert calibrate.batches(SIZES, found.moments) == [list(SIZES)]
    assert found.peak == sum(found.parts.values())


def test_less_memory_means_fewer_layers_at_a_time_and_more_passes():
    plenty = divide(None).peak
    found = []
    for share in (1.1, 0.8, 0.6, 0.5, 0.45):
        division = divide(share * plenty)
        assert division.peak <= share * plenty
        found.append((-division.workers, len(calibrate.batches(SIZES, division.moments))))
    assert found == sorted(found)  # where two layers do not fit, moments have the room of one
    assert found[0] == (-4, 1)
    assert found[-1][0] == -1
    assert found[-1][1] > 2


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
    assert divided(limit=32e9).peak <= 32e9


def test_less_memory_means_smaller_parts_of_a_batch_of_tuning():
    plenty = divided(limit=None, tuned=32)
    assert plenty.at_once == 32
    assert "tuning" in plenty.parts
    found = [divided(limit=limit, tuned=32) for limit in (100e9, 60e9, 40e9, 32e9)]
    pairs = [division.at_once for division in found]
    assert pairs == sorted(pairs, reverse=True)
    assert pairs[0] == 32 > pairs[1] > pairs[2]
    assert all(32 % n == 0 for n in pairs)
    assert divided(limit=32e9).at_once == 0


def test_the_published_model_is_tuned_on_a_gpu_of_16_gb():
    found = divided(limit=16e9, tuned=32, accelerated=True)
    assert found.peak <= 16e9
    assert found.at_once >= 2
    with pytest.raises(DoesNotFitError, match=r"--memory 12.2: a step of tuning takes"):
        divided(limit=12.2e9, tuned=32, accelerated=True)


@pytest.mark.parametrize(
    ("limit", "workers", "tuned", "accelerated", "pairs", "peak"),
    [
        (None, 2, 32, False, 32, 90.1),
        (None, 2, 0, False, 0, 39.2),
        (None, 1, 32, True, 32, 27.8),
        (None, 1, 0, True, 0, 12.0),
        (16e9, 1, 32, True, 4, 14.0),
    ],
)
def test_the_published_model_takes_what_the_documentation_says(
    limit, workers, tuned, accelerated, pairs, peak
):
    taught = 128 * 25  # pairs that the teacher makes together, by default
    found = divided(
        limit=limit, workers=workers, tuned=tuned, taught=taught, accelerated=accelerated
    )
    documented = "".join((DOCS / name).read_text() for name in ("evaluation.md", "scale.md"))
    assert f"{peak} GB" in documented
    assert (found.at_once, round(found.peak / 1e9, 1)) == (pairs, peak)


@pytest.mark.parametrize(
    ("batch", "accelerated", "least"), [(16, False, 24.2), (2, False, 20.4), (16, True, 12.1)]
)
def test_the_published_model_does_with_what_the_documentation_says(batch, accelerated, least):
    assert f"{least} GB" in (DOCS / "scale.md").read_text(encoding="utf-8")
    found = divided(batch=batch, limit=least * 1e9, accelerated=accelerated)
    assert found.peak <= least * 1e9
    with pytest.raises(DoesNotFitError, match=f"ask for {least} or more"):
        divided(batch=batch, limit=(least - 0.1) * 1e9, accelerated=accelerated)


def test_lessons_of_a_teacher_wait_in_the_memory_of_the_host():
    taught = 100_000 * 25
    on_cpu, on_gpu = (
        [
            memory.divide(
                *published(), Calibration(), limit=None, workers=1, tuned=32, **more, **device
            ).parts["tuning"]
            for more in ({"taught": 0}, {"taught": taught})
        ]
        for device in ({"accelerated": False}, {"accelerated": True})
    )
    assert on_cpu[1] - on_cpu[0] == 2 * 3 * 4 * taught * 64 * 64 * 3
    assert on_gpu[0] == on_gpu[1]


@pytest.mark.parametrize(
    ("free", "advice"),
    [
        (32.06e9, "32.1 GB can be had; ask for --memory 32, or end other programs"),
        (22e9, "it needs at least --memory 24.2, or --memory 22 --calibration.batch 1, or end"),
        (16e9, "it needs at least --memory 24.2, or --memory 20.2 --calibration.batch 1, or end"),
    ],
)
def test_what_a_refused_run_is_told_to_ask_for_is_not_refused_next(monkeypatch, free, advice):
    config, shapes, sizes = published()
    wanted = QuantizeSettings(source="model.ckpt")
    job: Any = types.SimpleNamespace(settings=wanted, model=types.SimpleNamespace(config=config))
    job.shapes, job.plan, job.sizes, job.division = shapes, sizes, sizes, divided(2, limit=None)
    monkeypatch.setattr(estimate, "available_memory", lambda: free)
    with pytest.raises(DoesNotFitError) as refused:
        quantize._check_memory(job)
    assert f"takes about 39.2 GB of memory, {free / 1e9:.1f} GB can be had; " in str(refused.value)
    assert advice in str(refused.value)
    for gigabytes, batch in re.findall(r"--memory ([\d.]+)(?: --calibration.batch (\d+))?", advice):
        limit = 1e9 * float(gigabytes)
        assert divided(batch=int(batch or 16), limit=limit).peak <= limit
    for enough in (40e9, None):
        monkeypatch.setattr(estimate, "available_memory", lambda enough=enough: enough)
        quantize._check_memory(job)


def test_what_the_way_back_keeps_is_what_xla_sets_aside():
    config = small.TINY
    params = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
    student = distill.Student({name: params[name] for name in memory.TRAINED}, None)

    def set_aside(pairs: int) -> int:
        def rows(*shape: int, dtype: Any = np.float32) -> Any:
            return jax.ShapeDtypeStruct((pairs, *shape), dtype)

        latent, number = rows(*config.latent_shape), rows(dtype=np.int32)
        taught = distill.Taught(latent, number, number, latent, latent)
        program = distill.loss_and_gradients.lower(
            config,
            student,
            taught,
            activations=None,
            guidance=1.5,
            weight_T=jnp.ones(config.timesteps),
        ).compile()
        found: Any = program.memory_analysis()
        return found.temp_size_in_bytes

    predicted = 4 * memory._kept(config, calibrate.trace_layers(config, params))
    assert 0.7 * predicted < (set_aside(16) - set_aside(8)) / 8 < 1.1 * predicted


def test_an_accelerator_says_itself_what_it_has():
    gpu = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 12_000})
    assert estimate.available_memory(gpu) == 12_000
    silent = types.SimpleNamespace(platform="gpu", memory_stats=lambda: None)
    assert estimate.available_memory(silent) is None


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
