# SPDX-License-Identifier: Apache-2.0
"""The table from checkpoint keys to paths, against counts and key lists measured elsewhere."""

import json
import math

import numpy as np
import pytest

from tests import recipe
from tests.conftest import GOLDEN_ROOT, golden_files, golden_params
from vqjax.config import PRESETS, LatentDiffusionConfig
from vqjax.io import keys


def shapes(entries) -> dict[str, tuple[int, ...]]:
    return {entry.key: entry.shape for entry in entries}


@pytest.mark.parametrize("name", PRESETS)
def test_every_key_and_path_occurs_once(name):
    entries = keys.table(PRESETS[name]())
    assert len({entry.key for entry in entries}) == len(entries)
    assert len({entry.path for entry in entries}) == len(entries)
    ema = [entry.ema_key for entry in entries if entry.ema_key]
    assert len(set(ema)) == len(ema) == len(keys.unet_entries(PRESETS[name]().unet))


def test_cin256_counts():
    config = LatentDiffusionConfig.cin256_v2()
    unet = keys.unet_entries(config.unet)
    assert len(unet) == 688
    assert sum(math.prod(entry.shape) for entry in unet) == 400_920_579
    stage = keys.first_stage_entries(config.first_stage)
    assert len(stage) == 205
    assert sum(math.prod(entry.shape) for entry in stage) == 55_322_782
    assert (
        sum(math.prod(entry.shape) for entry in keys.table(config))
        == 400_920_579 + 55_322_782 + 512_512
    )


@pytest.mark.parametrize(
    ("name", "unet"),
    # In millions, digits cut, as the paper gives them (arXiv:2112.10752, table 12).
    [("celebahq", 274), ("ffhq", 274), ("lsun_bedrooms", 274), ("lsun_churches", 294)],
)
def test_unconditional_unet_sizes(name, unet):
    entries = keys.unet_entries(PRESETS[name]().unet)
    assert sum(math.prod(entry.shape) for entry in entries) // 1_000_000 == unet


def test_full_key_list():
    files = golden_files("specs", "*_keys.json")
    if not files:
        pytest.skip(f"no *_keys.json under {GOLDEN_ROOT / 'specs'}")
    listed = {key: tuple(shape) for key, shape in json.loads(files[0].read_text()).items()}
    entries = keys.table(LatentDiffusionConfig.cin256_v2())
    expected = shapes(entries) | {e.ema_key: e.shape for e in entries if e.ema_key}
    known = {key: shape for key, shape in listed.items() if "." in key}
    known = {key: shape for key, shape in known.items() if key.count("_ema.") == 0 or shape}
    assert known == expected


@pytest.mark.parametrize("path", golden_params("golden", "*.npz"))
def test_key_lists_of_the_reference_fixtures(path):
    with np.load(path) as data:
        if "keys_json" not in data:
            pytest.skip(f"{path.name} has no key list")
        listed = {key: tuple(shape) for key, shape in json.loads(str(data["keys_json"])).items()}
        texts = {name: json.loads(str(data[name])) for name in data if name.endswith("config_json")}
        n_classes = int(data["n_classes"]) if "n_classes" in data else 0
    found = {}
    for text in texts.values():
        if "ddconfig" in text:
            found |= shapes(keys.first_stage_entries(recipe.autoencoder_config(text)))
        else:
            found |= shapes(keys.unet_entries(recipe.unet_config(text)))
            if n_classes:
                found[keys.CLASS_KEY] = (n_classes, text["context_dim"])
    assert found == listed


@pytest.mark.parametrize("name", ["lsun_churches", "digits", "celebahq"])
def test_layout_round_trip(name):
    done = set()
    for entry in keys.table(PRESETS[name]()):
        if entry.layout in done or math.prod(entry.shape) > 1_000_000:
            continue
        done.add(entry.layout)
        array = np.arange(math.prod(entry.shape), dtype=np.float32).reshape(entry.shape)
        param = entry.to_param(array)
        assert param.shape == entry.param_shape
        assert param.flags.c_contiguous
        back = {"conv": (3, 2, 0, 1), "linear": (1, 0), "conv1d": (1, 0)}.get(entry.layout)
        restored = param if back is None else param.transpose(back).reshape(entry.shape)
        np.testing.assert_array_equal(restored, array)
    assert {"conv", "linear", "plain"} <= done


def test_updown_blocks_and_their_position():
    found = {e.path: e for e in keys.table(LatentDiffusionConfig.lsun_churches())}
    down = found["unet/input_blocks_3/downsample/conv1/kernel"]
    assert down.key == "model.diffusion_model.input_blocks.3.0.in_layers.2.weight"
    up = found["unet/output_blocks_2/upsample/conv1/kernel"]
    # Attention runs at every level but the coarsest (factor 16), so part 1 there and 2 elsewhere.
    assert up.key == "model.diffusion_model.output_blocks.2.1.in_layers.2.weight"
    assert "output_blocks.5.2.in_layers" in found["unet/output_blocks_5/upsample/conv1/kernel"].key
    assert found["unet/input_blocks_1/attn/qkv/kernel"].shape == (3 * 192, 192, 1)
    assert found["unet/input_blocks_1/res/emb/kernel"].shape == (2 * 192, 768)
    assert found["first_stage/quant_conv/kernel"].shape == (8, 8, 1, 1)
    assert "first_stage/quantize/embedding" not in found
