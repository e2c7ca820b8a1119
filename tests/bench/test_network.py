# SPDX-License-Identifier: Apache-2.0
"""`bench aq --model`: every layer once, time by stage, resume; the search itself is replaced."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from vqjax import config as config_lib
from vqjax.bench import network, results, work
from vqjax.bench.__main__ import main
from vqjax.core.compress import LayerStats
from vqjax.core.plan import LayerSpec, make_plan
from vqjax.core.tensor import VQTensor

STAGES = ("factor", "start", "feedback", "descent", "least_squares", "store")


def compress(kernel, moment, spec, *, key, effort, on_stage):
    """Goes through the stages at once and returns a layer of zeros."""
    for stage in STAGES[:-1] if spec.grouping != "scalar" else ():
        on_stage(stage)
    outputs, fan_in = kernel.shape[-1], kernel.size // kernel.shape[-1]
    tensor = VQTensor.pack(
        np.zeros((outputs, -(-fan_in // spec.group), spec.codebooks), np.int32),
        jnp.zeros((spec.codebooks, spec.entries, spec.group), jnp.float16),
        jnp.ones(outputs, jnp.float16),
        shape=kernel.shape,
        grouping=spec.grouping,
    )
    on_stage("store")
    return tensor, LayerStats(1.0, 1.0, tensor.bits_per_weight)


@pytest.fixture
def quick(monkeypatch):
    """No search, no large products."""
    searched = []

    def counted(*args, **kwargs):
        searched.append(kwargs["key"])
        return compress(*args, **kwargs)

    monkeypatch.setattr(network, "compress_layer", counted)
    monkeypatch.setattr(network, "ROWS", {"complete": 8, "reduced": 4})
    monkeypatch.setattr(network, "random_moment", lambda key, fan_in, rows: jnp.eye(fan_in))
    monkeypatch.setattr(results, "source_digest", lambda *packages: "as it is")
    monkeypatch.setattr(work, "matmul_peak", lambda: 1e9)
    pieces = network.pieces_of(config_lib.PRESETS["digits"]())[:9]
    monkeypatch.setattr(network, "pieces_of", lambda config: pieces)
    return searched


def test_a_model_is_timed_layer_by_layer_and_resumed(quick, tmp_path, capsys):
    file = tmp_path / "network.json"
    command = ["aq", "--model", "digits", "--effort", "reduced", "--json", str(file)]
    assert main(command) == 0
    content = json.loads(file.read_text())
    layers = [record for record in content["records"] if record["part"] == "layer"]
    pieces = network.pieces_of(config_lib.PRESETS["digits"]())
    assert len(layers) == 5
    assert [r["path"] for r in layers] == [p.path for p in pieces if p.part == "layer"]
    assert set(layers[1]["seconds"]) == {"moments", *STAGES}
    assert layers[1]["rounds"]["descent"] == 1
    assert content["summary"]["layers"] == len(layers)
    assert content["summary"]["seconds"] == pytest.approx(sum(r["total_seconds"] for r in layers))
    assert set(content["summary"]["stages"]) == {"moments", *STAGES}
    printed = capsys.readouterr().out
    for words in ("predicted", "cost grows as outputs^", "of peak", "compilation"):
        assert words in printed

    quick.clear()
    file.write_text(json.dumps(content | {"records": content["records"][:-3]}))
    assert main(command) == 0
    assert len(quick) == 3
    resumed = json.loads(file.read_text())["records"]
    assert resumed[:-3] == content["records"][:-3]
    assert len(resumed) == len(content["records"])


def test_every_layer_of_the_plan_is_there_and_one_fan_in_grows():
    pieces = network.pieces_of(config_lib.PRESETS["cin256-v2"]())
    scaling = [piece for piece in pieces if piece.part == "scaling"]
    assert len({piece.shape[:-1] for piece in scaling}) == 1
    assert [piece.shape[-1] for piece in scaling] == [512, 1024, 2048]
    (wide,) = [piece for piece in pieces if piece.part == "wide"]
    assert 2000 < np.prod(wide.shape[:-1]) <= 4608
    layers = {piece.path: piece.shape for piece in pieces if piece.part == "layer"}
    assert len(pieces) == len(scaling) + 1 + len(layers)
    assert max(np.prod(shape[:-1]) for shape in layers.values()) == 17_280
    assert set(make_plan(layers, bits=2.0)) == set(layers)


def test_random_moments_are_those_of_correlated_inputs():
    import jax

    moment = np.asarray(network.random_moment(jax.random.key(0), 24, 3000), np.float64)
    np.testing.assert_allclose(moment, moment.T, rtol=1e-5, atol=1e-5)
    spectrum = np.linalg.eigvalsh(moment)
    assert spectrum[0] > 0
    assert spectrum[-1] > 20 * spectrum[0]
    scale = np.sqrt(np.diagonal(moment))
    assert np.abs(moment / np.outer(scale, scale) - np.eye(24)).max() > 0.2


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(power):
    outputs = np.array([256, 512, 1024])
    assert network.exponent(outputs.tolist(), (3e-4 * outputs**power).tolist()) == pytest.approx(
        power
    )


def test_operations_are_counted_per_round():
    spec = LayerSpec("feed_forward", "linear", 8, 4, 16)
    counts = work.stage_flops((64, 32), spec, {"feedback": 1, "descent": 2, "moments": 1}, rows=100)
    assert counts["moments"] == 2 * 100 * 64**2
    assert counts["descent"] == 2 * (2 * 32 * 64**2 + 2 * 32 * 8 * 16**4)
    assert counts["feedback"] == 32 * 64**2 + 2 * 32 * 8 * 16**4
    assert counts["least_squares"] == 0
    fit = work.stage_flops((64, 32), spec, {"least_squares": 1}, rows=1)["least_squares"]
    assert fit == (3 + 8) * 2 * 32 * 64**2  # so small a layer is fitted to all its rows
    large = work.stage_flops((64, 32_000), spec, {"least_squares": 1}, rows=1)["least_squares"]
    assert large < 1000 * fit
    twice = work.stage_flops((64, 32), LayerSpec("time", "linear", 8, 8, 16), {"descent": 1}, 1)
    assert twice["store"] == 0
    assert twice["descent"] == 2 * 32 * 64**2 + 2 * 32 * 8 * 2 * 16**4
    scalar = LayerSpec("first_last", "scalar", 1, 1, 256, 8)
    assert set(work.stage_flops((64, 32), scalar, {"descent": 1}, 1)) == {"moments"}


def test_a_machine_of_constant_speed_is_predicted():
    spec = LayerSpec("feed_forward", "linear", 8, 4, 16)
    rounds = {
        "moments": 1,
        "factor": 1,
        "feedback": 2,
        "descent": 1,
        "least_squares": 3,
        "store": 1,
    }

    def record(fan_in, outputs):
        flops = work.stage_flops((fan_in, outputs), spec, rounds, 100)
        seconds = {stage: 0.01 + flops[stage] / 1e9 for stage in rounds} | {"start": 2.0}
        return {"seconds": seconds, "rounds": rounds, "flops": flops}

    found = network.Prediction.of([record(64, 32), record(64, 128), record(256, 32)])
    piece = network.Piece("layer", "unet/a/kernel", (640, 320), spec)
    expected = sum(record(640, 320)["seconds"].values())
    assert found.seconds(piece, 100) == pytest.approx(expected, rel=1e-6)


def test_rounds_on_a_part_are_predicted_for_all_rows_where_there_is_no_part():
    spec = LayerSpec("feed_forward", "linear", 8, 4, 16)
    parted = {"feedback": 1, "part feedback": 5}

    def record(outputs, rounds):
        flops = work.stage_flops((640, outputs), spec, rounds, 100)
        return {"seconds": {s: flops[s] / 1e9 for s in rounds}, "rounds": rounds, "flops": flops}

    found = network.Prediction.of([record(outputs, parted) for outputs in (1024, 2048, 4096)])
    for outputs, rounds in ((4096, parted), (320, {"feedback": 5})):
        piece = network.Piece("layer", "unet/a/kernel", (640, outputs), spec)
        expected = sum(record(outputs, rounds)["seconds"].values())
        assert found.seconds(piece, 100) == pytest.approx(expected, rel=1e-3)


def test_predictions_are_never_negative():
    assert network._line(np.array([1.0, 2.0]), np.array([2.0, 1.0])) == (1.5, 0.0)
    constant, slope = network._line(np.array([1.0, 2.0]), np.array([1.0, 3.0]))
    assert constant == 0
    assert 1 < slope < 1.5
