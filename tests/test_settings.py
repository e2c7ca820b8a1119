# SPDX-License-Identifier: Apache-2.0
"""A recorded command gives the same settings again."""

import pathlib
import shlex
from typing import Any, cast

import numpy as np
import pytest
import tyro

import vqjax
from vqjax import settings as lib
from vqjax.errors import VqjaxError

CASES = [
    lib.QuantizeSettings(),
    lib.QuantizeSettings(
        source="my model.ckpt",
        bits=1.5,
        plan=pathlib.Path("plan.json"),
        samples=8,
        dry_run=True,
        calibration=lib.Calibration(images=4, guidance=1.5),
    ),
    lib.SampleSettings(source="run", classes=(3, 7), count=4, eta=0.5, integer=True),
    lib.EvaluateSettings(
        against="digits", guidance=2.0, lpips=(pathlib.Path("vgg16.pth"), pathlib.Path("vgg.pth"))
    ),
]


@pytest.mark.parametrize("settings", CASES, ids=lambda s: type(s).__name__)
def test_the_command_line_round_trips(settings):
    words = shlex.split(lib.command_line("module", settings))
    assert words[:3] == ["python", "-m", "module"]
    assert tyro.cli(type(settings), args=words[3:]) == settings


def test_equal_calls_make_equal_settings():
    wanted = lib.QuantizeSettings(bits=2.0, seed=1, out=pathlib.Path("a"), memory=8.0)
    spelled = {"bits": np.float32(2), "seed": np.int64(1), "out": "a", "memory": 8}
    found = lib.of_call(lib.QuantizeSettings, spelled, "here")
    assert found == wanted
    assert lib.command_line("m", found) == lib.command_line("m", wanted)
    assert [type(v) for v in (found.bits, found.seed, found.memory)] == [float, int, float]
    nested = lib.of_call(lib.QuantizeSettings, {"calibration": {"images": 4}}, "here")
    assert nested.calibration == lib.Calibration(images=4)
    same = lib.of_call(lib.QuantizeSettings, {"calibration": lib.Calibration(images=4)}, "here")
    assert same == nested


def test_arguments_that_do_not_fit_are_named_at_once():
    with pytest.raises(
        VqjaxError, match=r"(?s)^vqjax.quantize: arguments .*bit: unknown"
    ) as caught:
        vqjax.quantize(cast(Any, object()), bits="2", bit=3)
    assert 'bits: found "2", expected a number' in str(caught.value)
    assert "source: found " in str(caught.value)


def test_a_subcommand_comes_before_its_options():
    settings = lib.BenchAqSettings(inputs=pathlib.Path("my files"), seed=3)
    line = lib.command_line("vqjax.bench", settings, "aq")
    assert line == "python -m vqjax.bench aq --inputs 'my files' --seed 3"
    assert tyro.cli(lib.BenchAqSettings, args=shlex.split(line)[4:]) == settings


def test_defaults_are_left_out():
    assert lib.command_line("m", lib.QuantizeSettings(bits=3.0)) == "python -m m digits --bits 3.0"
