# SPDX-License-Identifier: Apache-2.0
"""The Colab notebook runs from the first cell to the last, on few samples.

VQJAX_FULL_SIZE=1 has it compiled as users do, which takes twice the time.
"""

import dataclasses
import os
import pathlib

import jax
import nbclient
import nbformat
import numpy as np
import pytest

import vqjax
from tests.io import models
from vqjax.core.plan import LayerSpec, Plan, kernel_shapes
from vqjax.io import native
from vqjax.pipeline import quantize
from vqjax.settings import QuantizeSettings

ROOT = pathlib.Path(__file__).parents[1]


def outputs(cell, kind: str) -> list[str]:
    """The cell's displayed data of one MIME type."""
    data = (output.get("data", {}) for output in cell.get("outputs", []))
    return [found[kind] for found in data if kind in found]


def plan(source: pathlib.Path) -> Plan:
    """Searches two layers and rounds the others: all that the notebook needs to go on."""
    kernels = kernel_shapes(quantize.prepare(QuantizeSettings(source=str(source))).shapes)
    layers = dict.fromkeys(kernels, LayerSpec("first_last", "scalar", 1, 1, 256, 8))
    layers["unet/middle_block/res1/conv1/kernel"] = LayerSpec("conv3x3", "conv3x3", 9, 2, 16, 8)
    layers["unet/time_embed/dense2/kernel"] = LayerSpec("time", "linear", 8, 2, 16, 8)
    assert layers.keys() == kernels.keys()
    return Plan(layers)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    # Random weights of another size, under the name that its evaluation networks go by.
    source = tmp_path / "small.safetensors"
    small = dataclasses.replace(models.LIKE_DIGITS, name="digits")
    native.save_model(source, models.dense(small))
    (tmp_path / "plan.json").write_text(plan(source).to_json())
    for name, value in {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "VQJAX_NOTEBOOK_SOURCE": str(source),
        "VQJAX_NOTEBOOK_SAMPLES": "8",
        "VQJAX_NOTEBOOK_CALIBRATION": "2",
        "VQJAX_NOTEBOOK_CALIBRATION_STEPS": "3",
        "VQJAX_NOTEBOOK_TUNE_STEPS": "0",
        "VQJAX_NOTEBOOK_PLAN": str(tmp_path / "plan.json"),
    }.items():
        monkeypatch.setenv(name, value)
    if os.environ.get("VQJAX_FULL_SIZE") == "1":
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        monkeypatch.setenv("XLA_FLAGS", "")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()  # raises with the traceback of the first cell that fails
    assert sum(len(outputs(cell, "image/png")) for cell in notebook.cells) == 3
    (table,) = (text for cell in notebook.cells for text in outputs(cell, "text/markdown"))
    assert "| vqjax |" in table
    assert "bits per weight" in table
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "PASS" in printed  # the doctor's


class _Gpu:
    """A device with the memory that JAX may take of a T4."""

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": 14_900_000_000}


def asked(monkeypatch, source: str) -> tuple[QuantizeSettings, int]:
    """What the notebook asks of `vqjax.quantize`, and how many pictures of `vqjax.sample`."""
    cells = nbformat.read(ROOT / "notebooks" / "colab.ipynb", as_version=4).cells
    counts, found = [], []

    def sample(source, classes, **options):
        counts.append(len(classes))
        assert "guidance" not in options  # the model's own, as in the report
        return np.zeros((len(classes), 32, 32, 3), np.uint8)

    monkeypatch.setenv("VQJAX_NOTEBOOK_SOURCE", source)
    monkeypatch.setattr(vqjax, "sample", sample)
    monkeypatch.setattr(vqjax, "quantize", lambda source, **config: found.append((source, config)))
    names: dict[str, object] = {"os": os}  # which the first cell imports, and installs
    for cell in cells:
        if cell.cell_type == "code" and (
            "vqjax.sample(SOURCE" in cell.source or "vqjax.quantize(" in cell.source
        ):
            exec(cell.source, names)
    ((source, config),) = found
    return QuantizeSettings(source=source, **config), counts[0]


def test_other_models_are_compressed_as_large_ones_are_by_default(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [_Gpu()])
    wanted, shown = asked(monkeypatch, "model.ckpt")
    assert (wanted.samples, wanted.tune_steps, shown) == (None, None, 4)
    assert wanted.memory == 14  # GB: enough for one layer of cin256-v2 after the other
    wanted, shown = asked(monkeypatch, "digits")
    assert (wanted.samples, wanted.tune_steps, shown) == (40, 100, 40)


def test_each_source_has_a_folder_of_its_own(monkeypatch):
    """Not under its own name: an existing folder goes before the name "digits"."""
    sources = "digits", "files/model.ckpt", "files/other.ckpt"
    folders = [str(asked(monkeypatch, source)[0].out) for source in sources]
    assert folders == ["vqjax-digits", "vqjax-model", "vqjax-other"]


def test_a_cpu_has_no_memory_of_its_own(monkeypatch):
    assert asked(monkeypatch, "digits")[0].memory is None


def test_notebooks_are_stored_without_outputs():
    for path in ROOT.glob("notebooks/*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        assert not any(cell.get("outputs") for cell in notebook.cells), path
