# SPDX-License-Identifier: Apache-2.0
"""Results of a bench that could not be written are refused before anything is measured."""

import os
import pathlib

import pytest

from vqjax.bench.__main__ import main


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("aq", "--json"),
        ("kernels", "--json"),
        ("sample", "--json"),
        ("tune", "--json"),
        ("evaluate", "--json"),
        ("ablation", "--json"),
        ("ablation", "--figure"),
        ("pareto", "--json"),
        ("pareto", "--figure"),
    ],
)
def test_files_that_cannot_be_written_cost_no_work(command, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    needed = ["--model", "digits"] if command == "aq" else []
    assert main([command, *needed, option, "absent/a"]) == 2
    assert f"{option} absent/a: no folder absent; make it first" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert main([command, *needed, option, "a"]) == 2
    assert f"{option} a: {tmp_path} takes no new files" in capsys.readouterr().err
    if command in ("ablation", "pareto"):  # whose own folder may be new, and not where it is
        assert main([command, "--work", "new", option, "new/a"]) == 2
        assert f"{option} new/a: {tmp_path} takes no new files" in capsys.readouterr().err
    assert not list(pathlib.Path().iterdir())
