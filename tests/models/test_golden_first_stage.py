# SPDX-License-Identifier: Apache-2.0
"""Encoder, vector quantizer and decoder against the original."""

import functools

import jax
import numpy as np
import pytest

from tests import recipe
from tests.conftest import relative_rms
from vqjax import models

pytestmark = pytest.mark.usefixtures("optimized")


@functools.cache
def load(path):
    """The fixture, and our four functions on its weights."""
    data = recipe.Fixture(path)
    text = data.text("config_json")
    config = recipe.whole_config(first_stage=recipe.autoencoder_config(text))
    rules = data.text("gain_rules_json", [])
    params = recipe.params(recipe.entries_of(text), int(data["seed"]), rules)

    def bind(function, **fixed):
        # The weights are an argument: as constants they would be compiled into the program.
        program = jax.jit(functools.partial(function, config, **fixed))
        return functools.partial(program, params)

    return data, {
        "encode": bind(models.encode),
        "nearest_codes": bind(models.nearest_codes),
        "decode": bind(models.decode),
        "decode_no_quant": bind(models.decode, quantize=False),
    }


@pytest.mark.parametrize("path", recipe.fixtures("first_stage"))
def test_encoder(path):
    data, ours = load(path)
    image = data["image_u8"].astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert relative_rms(recipe.nchw(ours["encode"](recipe.nhwc(image))), data["encoded"]) <= (
        recipe.LIMIT
    )


@pytest.mark.parametrize("path", recipe.fixtures("first_stage"))
def test_code_indices_are_exact(path):
    data, ours = load(path)
    rows, codes = ours["nearest_codes"](recipe.nhwc(data["z"]))
    np.testing.assert_array_equal(codes, data["code_indices"])
    # The original hands on z + (row - z), which is the row up to one rounding.
    np.testing.assert_allclose(recipe.nchw(rows), data["quantized"], atol=1e-6)
    if "roundtrip_indices" in data:
        _, codes = ours["nearest_codes"](recipe.nhwc(data["encoded"]))
        np.testing.assert_array_equal(codes, data["roundtrip_indices"])


@pytest.mark.parametrize("path", recipe.fixtures("first_stage"))
def test_decoder(path):
    data, ours = load(path)
    decoded = recipe.nchw(ours["decode"](recipe.nhwc(data["z"])))
    assert relative_rms(decoded, data["decoded"]) <= recipe.LIMIT
    if "roundtrip_decoded" in data:
        decoded = recipe.nchw(ours["decode"](recipe.nhwc(data["encoded"])))
        assert relative_rms(decoded, data["roundtrip_decoded"]) <= recipe.LIMIT


@pytest.mark.parametrize("path", recipe.fixtures("first_stage"))
def test_decoder_without_quantization(path):
    data, ours = load(path)
    decoded = recipe.nchw(ours["decode_no_quant"](recipe.nhwc(data["z"])))
    if "decoded_no_quant" in data:
        expected = data["decoded_no_quant"]
    else:  # a full-size fixture keeps the centre of the picture
        expected = data["decoded_no_quant_crop"]
        top = (decoded.shape[-1] - expected.shape[-1]) // 2
        decoded = decoded[..., top : top + expected.shape[-2], top : top + expected.shape[-1]]
    assert relative_rms(decoded, expected) <= recipe.LIMIT
