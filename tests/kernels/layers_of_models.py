# SPDX-License-Identifier: Apache-2.0
"""Makes `kernels/layers.json` from the models: `python tests/kernels/layers_of_models.py`.

The kernels may not import the models; what they are tested and measured on comes from them all the
same, and a test compares the two.
"""

import dataclasses
import json
import pathlib

from vqjax import config as config_lib
from vqjax import models
from vqjax.bench.layers import layers_of
from vqjax.core import folding

FILE = pathlib.Path(__file__).parents[2] / "kernels" / "layers.json"
MODELS = ("digits", "cin256-v2")


def layers(name: str) -> list[dict]:
    """Returns every distinct layer of a folded U-Net as one image passes through it."""
    config = config_lib.PRESETS[name]()
    params = folding.fold(config, models.param_shapes(config)).params
    return [_record(dataclasses.asdict(layer)) for layer in layers_of(name, config, params)]


def _record(fields: dict) -> dict:
    names = ("model", "op", "x_shape", "outputs", "window", "stride", "padding", "scalar", "count")
    return {
        name.removesuffix("_shape"): list(fields[name])
        if name in ("x_shape", "padding")
        else fields[name]
        for name in names
    }


def text() -> str:
    """Returns the file: one line per layer."""
    lines = [json.dumps(layer) for name in MODELS for layer in layers(name)]
    return "[\n" + ",\n".join(lines) + "\n]\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
