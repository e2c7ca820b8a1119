# SPDX-License-Identifier: Apache-2.0
"""Keys of the table of measured choices."""

import dataclasses
import json

import pytest

from vqjax.errors import VqjaxError
from vqjax.kernels import tuned
from vqjax.kernels.problem import Problem

CONV = Problem("vq_conv", 128, 960, 960, 4, 16, 9, "bfloat16", "int8", 3)


def test_keys_tell_windows_apart():
    wide = dataclasses.replace(CONV, window=5)
    assert tuned.key(wide) == tuned.key(CONV) + " window 5x5"
    assert tuned.key(dataclasses.replace(CONV, window=1)) != tuned.key(CONV)


def test_keys_of_tables_that_did_not_tell_windows_are_those_of_usual_layers():
    assert tuned.key(CONV) == "128x960x960 bfloat16 4x16x9 int8"
    strided = dataclasses.replace(CONV, strides=(2, 2))
    assert tuned.key(strided) == "128x960x960 bfloat16 4x16x9 int8 stride 2x2"
    linear = Problem("vq_matmul", 3, 960, 960, 4, 16, 8, "float32", "int8")
    assert tuned.key(linear) == "4x960x960 float32 4x16x8 int8"


def table(fields: dict[str, str]) -> str:
    return json.dumps({"version": 1, "devices": {"a CPU": {"vq_conv": {"a key": fields}}}})


@pytest.mark.parametrize(
    "entry", [tuned.DECODED, tuned.Entry("native"), tuned.Entry("xla", packed="native")]
)
def test_entries_of_a_cpu_are_read_as_they_were_written(entry):
    assert tuned.read(table(tuned.plain(entry))) == {("a CPU", "vq_conv", "a key"): entry}


@pytest.mark.parametrize(
    "fields", [{"path": "xla", "packed": "pallas"}, {"path": "native", "packed": "native"}]
)
def test_what_stays_packed_is_native_code_beside_weights_decoded_at_load(fields):
    with pytest.raises(VqjaxError, match=r"a key: packed '.*' with path '.*', expected native"):
        tuned.read(table(fields))
