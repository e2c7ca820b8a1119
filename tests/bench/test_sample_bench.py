# SPDX-License-Identifier: Apache-2.0
"""`bench sample`: every path runs, is named, and gives the images of dense weights."""

import dataclasses
import json
import threading

import jax
import jax.numpy as jnp
import pytest

from tests.io import models as small
from vqjax import config as config_lib
from vqjax.bench import sample
from vqjax.bench.__main__ import main
from vqjax.errors import VqjaxError
from vqjax.kernels import device, dispatch, tuned
from vqjax.kernels.device import Device
from vqjax.kernels.lut_matmul import native

CONFIG = dataclasses.replace(
    small.TINY, first_stage=dataclasses.replace(small.STAGE, resolution=8, ch_mult=(1,))
)


@pytest.mark.slow
def test_every_path_of_a_cpu(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setitem(config_lib.PRESETS, "digits", lambda: CONFIG)
    file = tmp_path / "sample.json"
    words = ["sample", "--bits", "3.5", "--batch", "1", "--steps", "1", "--guidance", "1"]
    assert main([*words, "--repeat", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    records = {record["path"]: record for record in found["records"]}
    tables = ["native tables"] if native.missing() is None else []
    packed = ["decoded at load", "decoded in the step", "lookup tables", *tables]
    assert list(records) == ["dense", *packed]
    assert found["environment"]["jax"] == jax.__version__
    assert found["bits_per_weight"] < 3.5
    count = sum(records["decoded at load"]["layers"].values())
    assert records["decoded at load"]["layers"] == {"decoded at load": count}
    assert records["decoded in the step"]["layers"] == {"xla": count}
    assert "lut" in records["lookup tables"]["layers"]
    assert all("native" in records[name]["layers"] for name in tables)
    assert records["decoded in the step"]["weight_bytes"] < records["dense"]["weight_bytes"] / 3
    for record in records.values():
        assert record["images_per_second"] > 0
        assert record["roofline_share"] > 0
        assert record["latent_error"] < 1e-4
    assert "decoded in the step" in capsys.readouterr().out
    assert not caplog.messages  # no warning of what was asked for here


@pytest.mark.slow
def test_integers_beside_the_same_rounded_inputs(tmp_path, monkeypatch):
    monkeypatch.setitem(config_lib.PRESETS, "digits", lambda: CONFIG)
    file = tmp_path / "sample.json"
    words = ["sample", "--bits", "3.5", "--act-bits", "8", "--batch", "1", "--steps", "1"]
    words += ["--guidance", "1", "--repeat", "1", "--paths", "integer"]
    assert main([*words, "--json", str(file)]) == 0
    records = {r["path"]: r for r in json.loads(file.read_text())["records"]}
    assert list(records) == ["dense", "inputs rounded", "integers"]
    assert records["inputs rounded"]["latent_error"] == 0
    assert records["integers"]["latent_error"] < 0.1 * records["dense"]["latent_error"]
    assert records["integers"]["weight_bytes"] < records["dense"]["weight_bytes"] / 3
    assert records["integers"]["layers"].keys() == {"decoded at load"}


def test_programs_of_several_batches_are_compiled_side_by_side(tmp_path, monkeypatch):
    """Where there are cores; what is measured is written after each batch size."""
    monkeypatch.setattr(sample.os, "cpu_count", lambda: 16)
    monkeypatch.setitem(config_lib.PRESETS, "digits", lambda: CONFIG)
    file, made, written = tmp_path / "sample.json", [], []
    all_four = threading.Barrier(4, timeout=60)

    def program_of(wanted, config, guidance, work):
        made.append((work.batch, work.name))
        all_four.wait()
        zeros = jnp.ones((work.batch, 2))
        return lambda: (zeros, zeros)

    def costs(works, repeat):
        written.append(json.loads(file.read_text())["records"] if file.exists() else [])
        return dict.fromkeys(works, 1.0)

    monkeypatch.setattr(sample, "program_of", program_of)
    monkeypatch.setattr(sample, "medians_in_turn", costs)
    words = ["sample", "--bits", "3.5", "--batch", "1", "4", "--paths", "load"]
    assert main([*words, "--json", str(file)]) == 0
    assert sorted(made) == [
        (1, "decoded at load"),
        (1, "dense"),
        (4, "decoded at load"),
        (4, "dense"),
    ]
    assert [[record["batch"] for record in records] for records in written] == [[], [1, 1]]
    found = json.loads(file.read_text())["records"]
    assert [record["images_per_second"] for record in found] == [1.0, 1.0, 4.0, 4.0]


def test_kernels_are_a_path_where_a_gpu_is(monkeypatch):
    for module in (dispatch, device):
        monkeypatch.setattr(module, "current", lambda: Device("gpu", "NVIDIA H200", (9, 0)))
    assert [way.title for way in sample.ways_here()][-1] == "kernels"
    assert sample.ways_here(["load"]) == [sample.WAYS["load"]]
    with pytest.raises(VqjaxError, match=r"no native: NVIDIA H200, .* is no CPU"):
        sample.ways_here(["native"])


def test_what_was_measured_is_a_path_of_a_cpu(monkeypatch):
    with pytest.raises(VqjaxError, match="no auto: it decodes at load here, as load does"):
        sample.ways_here(["auto"])
    monkeypatch.setattr(tuned, "knows", lambda kind: True)
    (way,) = sample.ways_here(["auto"])
    assert (way.title, way.limit) == ("measured best", None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "0"], "--batch (0,), --repeat 5: expected 1 or more"),
        (["nothing"], "nothing: no such file or folder"),
        (["run", "--bits", "3"], "--bits 3: run is no preset and has the bits that it was"),
        (["run", "--act-bits", "8"], "--act-bits 8: run is no preset and has the bits that it was"),
        (["--act-bits", "9"], "--act-bits 9: expected 1 to 8, or none"),
        (["--paths", "integer"], "no integer: inputs have over 8 bits (--act-bits 8"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert main(["sample", *words]) == 2
    assert message in capsys.readouterr().err
