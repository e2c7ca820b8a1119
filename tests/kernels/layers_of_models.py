# SPDX-License-Identifier: Apache-2.0
"""Makes `kernels/layers.json` from the models: `python tests/kernels/layers_of_models.py`.

The kernels may not import the models; what they are tested and measured on comes from them all the
same, and a test compares the two.
"""

import json
import pathlib
from collections import Counter

import jax
import jax.numpy as jnp

from vqjax import config as config_lib
from vqjax import models
from vqjax.core import folding, tree
from vqjax.core.plan import RULES, kind_of

FILE = pathlib.Path(__file__).parents[2] / "kernels" / "layers.json"
MODELS = ("digits", "cin256-v2")


def layers(name: str) -> list[dict]:
    """Returns every distinct layer of a folded U-Net as one image passes through it."""
    config = config_lib.PRESETS[name]()
    params = folding.fold(config, models.param_shapes(config)).params
    shapes = {path: tuple(leaf.shape) for path, leaf in tree.flatten(params).items()}
    found: Counter[str] = Counter()

    def note(path: str, x: jax.Array, window: dict) -> None:
        kind = kind_of(path, shapes[path], RULES)
        size = window.get("window", 1)
        fields = {
            "op": "vq_conv" if size > 1 else "vq_matmul",
            "x": list(x.shape),
            "outputs": shapes[path][-1],
            "window": size,
            "stride": window.get("stride", 1),
            "padding": list(window.get("padding", (0, 0))),
            "scalar": kind == "first_last",
        }
        found[json.dumps({"model": name, **fields})] += 1

    def run(params, x, t, ids):
        context = models.embed_classes(config, params, ids)
        return models.capture_inputs(config, params, x, t, context, note)[0]

    x_BHWC = jax.ShapeDtypeStruct((1, *config.latent_shape), jnp.float32)
    one_B = jax.ShapeDtypeStruct((1,), jnp.int32)
    jax.eval_shape(run, params, x_BHWC, one_B, one_B)
    return [{**json.loads(key), "count": count} for key, count in found.items()]


def text() -> str:
    """Returns the file: one line per layer."""
    lines = [json.dumps(layer) for name in MODELS for layer in layers(name)]
    return "[\n" + ",\n".join(lines) + "\n]\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
