# SPDX-License-Identifier: Apache-2.0
"""Configurations by name and from JSON files, and files that hold none."""

import json

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
    ],
)
def test_files_without_a_configuration_say_what_is_wrong(content, said, tmp_path):
    path = tmp_path / "model.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(VqjaxError, match=said) as caught:
        lib.find(path)
    assert str(caught.value).startswith(f"--config {path}: ")
