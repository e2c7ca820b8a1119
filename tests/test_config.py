# SPDX-License-Identifier: Apache-2.0
"""Configurations by name and from JSON files, and files that hold none."""

import dataclasses
import json
import math

import pytest

from vqjax import config as lib
from vqjax.errors import VqjaxError


@pytest.mark.parametrize("name", lib.PRESETS)
def test_names_and_their_files_are_the_same(name, tmp_path):
    config = lib.PRESETS[name]()
    path = tmp_path / "model.json"
    path.write_text(json.dumps(config.to_dict()))
    assert lib.find(name) == lib.find(path) == lib.find(str(path)) == lib.find(config) == config


def test_the_example_of_the_documents_is_one(pytestconfig, tmp_path):
    text = (pytestconfig.rootpath / "docs" / "import.md").read_text()
    (tmp_path / "mine.json").write_text(text.split("```json")[1].split("```")[0])
    found = lib.find(tmp_path / "mine.json")
    assert found.unet.channel_mult == (1, 2, 4)
    assert found.null_class == 100
    assert found.latent_shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"No such file or directory; expected one of cin256-v2, celebahq, .*JSON file"),
        ("{", r"no JSON \(.*\); see docs/import.md"),
        ("[]", "found list, expected an object"),
        ('{"nam": "a"}', r"unknown fields \['nam'\], missing fields \['name'\]; expected"),
        ('{"name": "a", "unet": 3}', "unet: found 3, expected an object"),
        ('{"name": "a", "n_classes": true}', "n_classes: found True, expected int"),
        ('{"name": "a", "linear_end": "x"}', "linear_end: found 'x', expected float"),
        (
            '{"name": "a", "unet": {"channel_mult": [1, "2"], "context_dim": 1.5}}',
            r"(?s)channel_mult: found \(1, '2'\), expected tuple\[int.*context_dim: found 1.5, exp",
        ),
        ('{"name": "a", "first_stage": {"kind": "vae"}}', "found 'vae', expected 'vq' or 'kl'"),
        ('{"name": "a", "timesteps": -1}', "timesteps: found -1, expected 2 to 100,000"),
    ],
)
def test_files_without_a_configuration_say_what_is_wrong(content, said, tmp_path):
    path = tmp_path / "model.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(VqjaxError, match=said) as caught:
        lib.find(path)
    assert str(caught.value).startswith(f"--config {path}: ")


def data(**fields):
    """Of a configuration; `part__field` is one of a part."""
    found = {"name": "a", "unet": {}, "first_stage": {}}
    for name, value in fields.items():
        part, _, field = name.rpartition("__")
        (found[part] if part else found)[field] = value
    return found


BIG = 10**400  # JSON has it, floats do not


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"first_stage__ch_mult": []}, r"ch_mult: found \(\), expected whole numbers .* least one"),
        ({"unet__channel_mult": [1, 0]}, r"channel_mult: found \(1, 0\), expected whole numbers"),
        ({"unet__attention_resolutions": [-2]}, r"found \(-2,\), expected .* 1 or more, or none"),
        ({"unet__model_channels": 0}, "unet.model_channels: found 0, expected 1 or more$"),
        ({"unet__num_res_blocks": -1}, "unet.num_res_blocks: found -1, expected 0 to 100"),
        ({"unet__num_heads": -1}, "unet.num_heads: found -1, expected 1 or more"),
        (
            {"unet__num_head_channels": -1},
            "num_head_channels: found -1, expected 1 or more, or null",
        ),
        ({"unet__context_dim": 0}, "unet.context_dim: found 0, expected 1 or more, or null"),
        ({"first_stage__resolution": 0}, "first_stage.resolution: found 0, expected 1 or more"),
        ({"first_stage__n_embed": 0}, "first_stage.n_embed: found 0, expected 1 or more"),
        ({"n_classes": -1}, "n_classes: found -1, expected 0 or more"),
        ({"timesteps": 1}, "timesteps: found 1, expected 2 to 100,000"),
        ({"timesteps": 10**12}, "timesteps: found 10+, expected 2 to 100,000"),
        ({"unet__channel_mult": [1] * 17}, "expected whole numbers of 1 or more, .* at most 16"),
        ({"linear_start": -0.0015}, "found -0.0015, 0.0195, expected 0 < linear_start <= linear"),
        ({"linear_start": 0.5}, "found 0.5, 0.0195, expected 0 < linear_start <= linear_end < 1"),
        ({"linear_end": 1}, "linear_start, linear_end: found 0.0015, 1, expected"),
        ({"linear_end": math.nan}, "linear_start, linear_end: found 0.0015, nan, expected"),
        ({"scale_factor": 0}, "scale_factor: found 0, expected a number above 0"),
        ({"scale_factor": BIG}, "scale_factor: found 10+, expected a number above 0"),
        ({"guidance": math.inf}, "guidance: found inf, expected a finite number"),
        ({"guidance": -BIG}, "guidance: found -10+, expected a finite number"),
    ],
)
def test_values_that_no_model_has(fields, said):
    with pytest.raises(VqjaxError, match=said):
        lib.LatentDiffusionConfig.from_dict(data(**fields))


def test_all_values_are_named_at_once():
    wrong = data(unet__channel_mult=[], first_stage__ch=0, timesteps=0)
    with pytest.raises(VqjaxError) as caught:
        lib.LatentDiffusionConfig.from_dict(wrong)
    heading, *lines = str(caught.value).splitlines()
    assert heading == "model config: values that do not fit:"
    fields = ["unet.channel_mult", "first_stage.ch", "timesteps"]
    assert [line.strip(" -").split(":")[0] for line in lines] == fields


@pytest.mark.parametrize(
    "fields",
    [
        {"unet__num_res_blocks": 0, "first_stage__num_res_blocks": 0},
        {"unet__attention_resolutions": [], "first_stage__attn_resolutions": []},
        {"unet__transformer_depth": 0, "unet__num_head_channels": 32, "unet__num_heads": -1},
        {"first_stage__kind": "kl", "first_stage__n_embed": 0},
        {"linear_start": 0.01, "linear_end": 0.01, "guidance": 0, "scale_factor": 1},
    ],
)
def test_unusual_values_that_models_may_have(fields):
    found = lib.LatentDiffusionConfig.from_dict(data(**fields))
    assert lib.LatentDiffusionConfig.from_dict(found.to_dict()) == found


def test_a_configuration_itself_is_looked_at():
    config = dataclasses.replace(lib.LatentDiffusionConfig.digits(), linear_start=-1.0)
    with pytest.raises(VqjaxError, match=r"found -1\.0, 0\.0195"):
        lib.find(config)
