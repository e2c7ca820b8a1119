# SPDX-License-Identifier: Apache-2.0
"""A recorded command gives the same settings again."""

import pathlib
import shlex

import pytest
import tyro

from vqjax import settings as lib

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


def test_a_subcommand_comes_before_its_options():
    settings = lib.BenchAqSettings(inputs=pathlib.Path("my files"), seed=3)
    line = lib.command_line("vqjax.bench", settings, "aq")
    assert line == "python -m vqjax.bench aq --inputs 'my files' --seed 3"
    assert tyro.cli(lib.BenchAqSettings, args=shlex.split(line)[4:]) == settings


def test_defaults_are_left_out():
    assert lib.command_line("m", lib.QuantizeSettings(bits=3.0)) == "python -m m digits --bits 3.0"
