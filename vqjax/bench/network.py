# SPDX-License-Identifier: Apache-2.0
"""`bench aq --model`: a whole U-Net with random weights, quantized layer by layer, by the clock.

Weights are Gaussian; inputs are Gaussian too, of spread scales and correlated through common
factors. One layer is in memory at a time.

Dimension key:  O outputs   N fan-in   R rows   F factors
"""

import dataclasses
import functools
import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from vqjax import config as config_lib
from vqjax import models, progress
from vqjax.bench import results, work
from vqjax.bench.clock import CompileClock, StageClock
from vqjax.core import folding, grouping, tree
from vqjax.core.compress import Effort, compress_layer, part_rows
from vqjax.core.plan import LayerSpec, make_plan
from vqjax.pipeline.journal import fingerprint, peak_memory_bytes
from vqjax.settings import BenchAqSettings

BITS = 2.0
ON_PART = ("part feedback", "part descent", "part least_squares")
STAGES = ("moments", "factor", "start", *ON_PART, "feedback", "descent", "least_squares", "store")
PER_OUTPUT = ("feedback", "descent", "least_squares", "store")  # the other stages do not see O
ROWS = {"complete": 16_384, "reduced": 2_048}
_BLOCK_ROWS = 1024
_FACTORS = 32
_WIDE = 4608  # fan-in: large enough to predict the largest, small enough not to take long


@dataclasses.dataclass(frozen=True)
class Piece:
    """One measurement: a layer of the model, or one like it to see how cost grows.

    Attributes:
      part: "scaling", one fan-in at several output counts; "wide", a large fan-in; "layer".
      path: of the kernel.
      shape: in Linen layout.
    """

    part: str
    path: str
    shape: tuple[int, ...]
    spec: LayerSpec


@jax.default_matmul_precision("highest")
def run(wanted: BenchAqSettings) -> None:
    """Times what is not yet in the JSON file, then prints where the time went."""
    assert wanted.model is not None
    console = progress.console()
    effort, rows = results.effort_of(wanted), ROWS[wanted.effort]
    pieces = pieces_of(config_lib.PRESETS[wanted.model]())
    identity = results.identity(wanted)
    keys = [fingerprint(identity, wanted.model, rows, repr(piece)) for piece in pieces]
    kept = results.Results(wanted.json, results.about(wanted), keys)
    console.print(
        f"{wanted.model} at {BITS:g} bits, effort {wanted.effort}: {rows:,} input rows per layer, "
        f"{effort.start_steps} start steps, up to {effort.feedback_rounds} feedback and "
        f"{effort.descent_rounds} descent rounds"
    )
    clock = CompileClock()
    first = [index for index, piece in enumerate(pieces) if piece.part != "layer"]
    with progress.stage("scaling", len(first)) as advance:
        for index in first:
            if kept.get(keys[index]) is None:
                _timed(
                    pieces[index], effort, rows, wanted.seed, clock
                )  # compiles, and is forgotten
                kept.add(keys[index], _timed(pieces[index], effort, rows, wanted.seed, clock))
            advance()
    prediction = Prediction.of(kept.records[: len(first)])
    layers = [index for index in range(len(pieces)) if index not in first]
    expected = [prediction.seconds(pieces[index], rows) for index in layers]
    console.print(f"predicted: {sum(expected):.0f} s, compilation apart")
    _layers(
        [(pieces[index], keys[index]) for index in layers],
        expected,
        kept,
        lambda piece: _timed(piece, effort, rows, wanted.seed, clock),
    )
    kept.content["summary"] = summary(kept.records, sum(expected), work.matmul_peak())
    kept.save()
    show(kept.content["summary"], console)


def _layers(todo, expected, kept: results.Results, measure: Callable[[Piece], dict]) -> None:
    """Measures the layers that are missing; progress counts predicted seconds, so its ETA holds."""
    steps = np.diff(np.round(np.cumsum([0.0, *expected])).astype(int))
    done = sum(int(step) for (_, key), step in zip(todo, steps) if kept.get(key) is not None)
    with progress.stage("layers, s", int(sum(steps)), done=done) as advance:
        for number, ((piece, key), step) in enumerate(zip(todo, steps), 1):
            if kept.get(key) is None:
                record = kept.add(key, measure(piece))
                note = f"layer {number}/{len(todo)}  {piece.path}  {record['total_seconds']:.1f} s"
                advance(int(step), note)


def pieces_of(config: config_lib.LatentDiffusionConfig) -> list[Piece]:
    """A few measurements to predict from, then all layers in the order of the plan."""
    folded = folding.fold(config, models.param_shapes(config)).params
    shapes = {path: tuple(leaf.shape) for path, leaf in tree.flatten(folded).items()}
    plan = make_plan(shapes, bits=BITS)
    layers = [Piece("layer", path, shapes[path], spec) for path, spec in plan.items()]
    coded = [piece for piece in layers if piece.spec.grouping != "scalar"]
    coded.sort(key=lambda piece: (grouping.matrix_shape(piece.shape)[1], piece.path))
    middle = coded[len(coded) // 2]
    # So many that codebooks are made on a part of the rows.
    counts = (512, 1024, 2048) if jax.default_backend() == "cpu" else (2048, 4096, 8192)
    scaling = [
        dataclasses.replace(middle, part="scaling", shape=(*middle.shape[:-1], count))
        for count in counts
    ]
    wide = [piece for piece in coded if grouping.matrix_shape(piece.shape)[1] <= _WIDE][-1]
    wide = dataclasses.replace(wide, part="wide", shape=(*wide.shape[:-1], counts[0]))
    return [*scaling, wide, *layers]


def _timed(piece: Piece, effort: Effort, rows: int, seed: int, clock: CompileClock) -> dict:
    """Quantizes one layer; returns its record."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(piece.path.encode()))
    stages = StageClock(clock)
    _, fan_in = grouping.matrix_shape(piece.shape)
    weight_key, input_key, search_key = jax.random.split(key, 3)
    kernel = jax.random.normal(weight_key, piece.shape) / math.sqrt(fan_in)
    moment = random_moment(input_key, fan_in, rows)
    stages.end("moments")
    tensor, stats = compress_layer(
        kernel, moment, piece.spec, key=search_key, effort=effort, on_stage=stages.end
    )
    seconds = dict(stages.seconds)
    compiled = seconds.pop("compile", 0.0)
    return {
        "part": piece.part,
        "path": piece.path,
        "shape": list(piece.shape),
        "fan_in": fan_in,
        "outputs": piece.shape[-1],
        "spec": dataclasses.asdict(piece.spec),
        "bits_per_weight": tensor.bits_per_weight,
        "rel_weight_mse": stats.rel_weight_mse,
        "rel_output_mse": stats.rel_output_mse,
        "seconds": seconds,
        "rounds": dict(stages.rounds),
        "flops": work.stage_flops(piece.shape, piece.spec, stages.rounds, rows),
        "total_seconds": sum(seconds.values()),
        "compile_seconds": compiled,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def random_moment(key: jax.Array, fan_in: int, rows: int) -> jax.Array:
    """Mean of x x^T over random inputs, [N, N]: scales spread by 10, F factors in common."""
    scale_key, mix_key, key = jax.random.split(key, 3)
    scale_N = jnp.exp(0.6 * jax.random.normal(scale_key, (fan_in,)))
    mix_FN = jax.random.normal(mix_key, (_FACTORS, fan_in)) / math.sqrt(_FACTORS / 2)
    total_NN = jnp.zeros((fan_in, fan_in))
    for first in range(0, rows, _BLOCK_ROWS):
        count = min(_BLOCK_ROWS, rows - first)
        total_NN = _add_rows(total_NN, jax.random.fold_in(key, first), scale_N, mix_FN, count=count)
    return total_NN / rows


@functools.partial(jax.jit, donate_argnums=0, static_argnames="count")
def _add_rows(total_NN, key, scale_N, mix_FN, *, count: int):
    own_key, common_key = jax.random.split(key)
    own_RN = jax.random.normal(own_key, (count, scale_N.shape[0]))
    common_RF = jax.random.normal(common_key, (count, mix_FN.shape[0]))
    precision = jax.lax.Precision.HIGHEST
    x_RN = (own_RN + jnp.matmul(common_RF, mix_FN, precision=precision)) * scale_N[None]
    return total_NN + jnp.matmul(x_RN.T, x_RN, precision=precision)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of a stage as a constant and a multiple of its counted operations.

    Attributes:
      constant, slope: by stage; stages without a count are constant.
      rounds: how often a stage ran.
    """

    constant: dict[str, float]
    slope: dict[str, float]
    rounds: dict[str, int]

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]]) -> "Prediction":
        """Least squares of relative errors on a few measurements of different sizes."""
        constant, slope = {}, {}
        for stage in sorted({stage for record in records for stage in record["seconds"]}):
            seconds = np.array([max(r["seconds"].get(stage, 0.0), 1e-6) for r in records])
            flops = np.array([r["flops"].get(stage, 0.0) for r in records])
            constant[stage], slope[stage] = _line(flops, seconds)
        return cls(constant, slope, records[0]["rounds"])

    def seconds(self, piece: Piece, rows: int) -> float:
        """Of one layer, compilation apart."""
        outputs, fan_in = grouping.matrix_shape(piece.shape)
        groups = grouping.groups_per_row(fan_in, piece.spec.group)
        rounds, skipped = self.rounds, ()
        if part_rows(outputs, groups, piece.spec) == outputs:  # all rows take the rounds of a part
            rounds = rounds | {n.removeprefix("part "): rounds[n] for n in ON_PART if n in rounds}
            skipped = ON_PART
        counts = work.stage_flops(piece.shape, piece.spec, rounds, rows)
        if piece.spec.grouping == "scalar":
            return self.constant["moments"] + self.slope["moments"] * counts["moments"]
        return sum(
            constant + self.slope[stage] * counts.get(stage, 0.0)
            for stage, constant in self.constant.items()
            if stage not in skipped
        )


def _line(flops: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """Returns a constant and a slope, neither negative, of least squared relative error."""
    if np.ptp(flops) == 0:
        return float(np.mean(seconds)), 0.0
    slope, constant = np.polyfit(flops, seconds, 1, w=1 / seconds)
    if slope < 0:
        return float(np.mean(seconds)), 0.0
    if constant < 0:
        return 0.0, float(np.mean(flops / seconds) / np.mean((flops / seconds) ** 2))
    return float(constant), float(slope)


def exponent(outputs: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log seconds over log outputs, by least squares: 1 is linear growth."""
    return float(np.polyfit(np.log(outputs), np.log(np.maximum(seconds, 1e-9)), 1)[0])


def summary(records: Sequence[dict[str, Any]], predicted: float, peak: float) -> dict[str, Any]:
    """Time by stage over all layers, speed and its share of the peak, and how cost grows."""
    layers = [record for record in records if record["part"] == "layer"]
    scaling = [record for record in records if record["part"] == "scaling"]
    seconds, flops = Counter(), Counter()
    for record in layers:
        seconds.update(record["seconds"])
        flops.update(record["flops"])
    stages = {}
    for stage in sorted(seconds, key=lambda name: STAGES.index(name) if name in STAGES else 99):
        speed = flops[stage] / seconds[stage] if flops[stage] and seconds[stage] else None
        stages[stage] = {
            "seconds": seconds[stage],
            "flops": flops[stage] or None,
            "flops_per_second": speed,
            "share_of_peak": None if speed is None else speed / peak,
        }
    outputs = [record["outputs"] for record in scaling]
    searched = [sum(r["seconds"].get(name, 0.0) for name in PER_OUTPUT) for r in scaling]
    bits = sum(r["bits_per_weight"] * math.prod(r["shape"]) for r in layers)
    weights = sum(math.prod(record["shape"]) for record in layers)
    return {
        "layers": len(layers),
        "weights": weights,
        "bits_per_weight": bits / weights,
        "seconds": sum(seconds.values()),
        "predicted_seconds": predicted,
        "compile_seconds": sum(record["compile_seconds"] for record in layers),
        "stages": stages,
        "matmul_peak": peak,
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in layers),
        "scaling": {
            "fan_in": scaling[0]["fan_in"],
            "outputs": outputs,
            "seconds": [record["total_seconds"] for record in scaling],
            "search_seconds": searched,
            "exponent": exponent(outputs, [record["total_seconds"] for record in scaling]),
            "search_exponent": exponent(outputs, searched),
        },
    }


def show(content: dict[str, Any], console: Console) -> None:
    """Prints the summary."""
    table = Table(title="Time by stage, compilation apart", title_justify="left")
    for name in ("stage", "s", "share", "GFLOP/s", "of peak"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    whole = max(content["seconds"], 1e-9)
    for stage, row in content["stages"].items():
        speed = row["flops_per_second"]
        table.add_row(
            stage.replace("_", " "),
            f"{row['seconds']:.1f}",
            f"{row['seconds'] / whole:.1%}",
            "" if speed is None else f"{speed / 1e9:,.1f}",
            "" if speed is None else f"{row['share_of_peak']:.1%}",
        )
    console.print(table)
    scaling = content["scaling"]
    console.print(
        f"{content['layers']} layers, {content['weights']:,} weights at "
        f"{content['bits_per_weight']:.3f} bits\n"
        f"total: {content['seconds']:.1f} s measured, {content['predicted_seconds']:.1f} s "
        f"predicted; compilation {content['compile_seconds']:.1f} s more\n"
        f"peak: {content['matmul_peak'] / 1e9:,.0f} GFLOP/s in one large float32 matrix product; "
        f"memory {content['peak_memory_bytes'] / 1e9:.2f} GB\n"
        f"cost grows as outputs^{scaling['search_exponent']:.2f} in the search, "
        f"outputs^{scaling['exponent']:.2f} in all (fan-in {scaling['fan_in']:,}, outputs "
        f"{', '.join(map(str, scaling['outputs']))})"
    )
