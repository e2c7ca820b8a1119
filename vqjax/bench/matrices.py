# SPDX-License-Identifier: Apache-2.0
"""`bench aq --inputs`: error, stored bits and time on matrix files, beside baselines and the bound.

Errors are evaluated in float64 on the dequantized matrix. Seconds are those of a run that needed no
new program: a setting that compiled any is run again.

Dimension key:  O rows   N fan-in   J vectors of a row   M codebooks
"""

import dataclasses
import math
import sys
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqjax import progress
from vqjax.bench import baselines, inputs, reference, results, tables
from vqjax.bench.baselines import Quantized
from vqjax.bench.clock import CompileClock, compiled_seconds
from vqjax.bench.inputs import Matrix
from vqjax.core import grouping, moments, shrinkage
from vqjax.core.compress import Effort, compress_layer
from vqjax.core.granularity import input_scale_gain
from vqjax.core.plan import LayerSpec, best_spec
from vqjax.core.rate import relative_bound
from vqjax.core.scalar import scalar_baseline
from vqjax.errors import VqjaxError
from vqjax.pipeline.journal import fingerprint
from vqjax.pipeline.layer_figures import codes_entropy
from vqjax.settings import BenchAqSettings

NOMINAL = (2, 4)
_PRODUCT_GROUPS = {2: 4, 4: 2}  # with 256 entries: 2 and 4 bits of codes
_PRODUCT_ENTRIES = 256


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the tables for one file.

    Attributes:
      method: "vqjax", "gptq", "round_to_nearest", "product" or "reference".
      nominal: bits per weight, about.
      objective: "S", the given inputs, or "I", all weights alike.
      storage: "reference", no more bits than it stores, or "exact", no more than nominal;
        empty for baselines, which store what they need.
      limit: stored bits per weight that `spec` must not exceed.
      spec: codebooks, for vqjax alone.
    """

    method: str
    nominal: int
    objective: str
    storage: str = ""
    limit: float | None = None
    spec: LayerSpec | None = None

    @property
    def name(self) -> str:
        """As in the records: "vqjax 2b S exact"."""
        return f"{self.method} {self.nominal}b {self.objective} {self.storage}".rstrip()


@dataclasses.dataclass(frozen=True)
class _Bench:
    """What all measurements share."""

    effort: Effort
    seed: int
    clock: CompileClock


@jax.default_matmul_precision("highest")  # TF32 would cost the third digit of every figure
def run(wanted: BenchAqSettings) -> None:
    """Measures what is not yet in the JSON file, then prints the tables.

    Raises:
      VqjaxError: if the folder or the JSON file cannot be used.
    """
    assert wanted.inputs is not None
    found = inputs.read(wanted.inputs)
    cases = reference.read(wanted.inputs)
    identity = results.identity(wanted)
    work = [(matrix, setting) for matrix in found for setting in settings_of(matrix)]
    keys = {
        (matrix.name, setting.name): fingerprint(identity, matrix.digest, repr(setting))
        for matrix, setting in work
    }
    of_reference = {
        fingerprint(matrix.digest, case): (matrix, case)
        for matrix in found
        for case in cases.get(matrix.name, [])
    }
    kept = results.Results(wanted.json, results.about(wanted), [*of_reference, *keys.values()])
    for key, (matrix, case) in of_reference.items():
        kept.add(key, _reference_record(matrix, case))
    bench = _Bench(results.effort_of(wanted), wanted.seed, CompileClock())
    done = sum(kept.get(key) is not None for key in keys.values())
    with progress.stage("bench", len(work), done=done) as advance:
        for matrix, setting in work:
            key = keys[matrix.name, setting.name]
            if kept.get(key) is None:
                case = reference.matching(
                    cases.get(matrix.name, []), setting.objective, setting.nominal
                )
                record = kept.add(key, measure(matrix, setting, case, bench))
                advance(1, f"{matrix.name}  {setting.name}  {record['rel_act_mse_test']:.5f}")
    tables.show(kept.records)


def settings_of(matrix: Matrix) -> list[Setting]:
    """All settings of a file; one that no code fits is left out, and said."""
    found = []
    gain = input_scale_gain(matrix.kernel)
    for nominal in NOMINAL:
        found += [
            Setting("round_to_nearest", nominal, "I"),
            Setting("product", nominal, "I"),
            Setting("gptq", nominal, "S"),
        ]
        limits = {"reference": reference.limit(matrix.kernel.shape, nominal), "exact": nominal}
        for storage, limit in limits.items():
            try:
                spec = best_spec(matrix.kernel.shape, limit, _kind(matrix), input_gain=gain)
            except VqjaxError as error:
                print(f"{matrix.name}: {nominal} bits, {storage}: {error}", file=sys.stderr)
                continue
            found += [
                Setting("vqjax", nominal, objective, storage, limit, spec) for objective in "SI"
            ]
    return found


def _kind(matrix: Matrix) -> str:
    return {3: "conv3x3", 1: "feed_forward"}.get(matrix.window, "conv1x1")


def measure(
    matrix: Matrix, setting: Setting, case: dict[str, Any] | None, bench: _Bench
) -> results.Record:
    """One record.

    Args:
      case: the reference's result to compare with.
    """
    chosen = None
    if setting.method == "vqjax":
        quantized, seconds, chosen = _additive(matrix, setting, bench)
    else:
        quantized, seconds = compiled_seconds(
            lambda: _baseline(matrix, setting, bench), bench.clock
        )
    record = _record(matrix, setting, _errors(matrix, quantized.q_ON), quantized, seconds)
    record["shrinkage"] = None if chosen is None else chosen._asdict()
    if case is not None:
        compared = "rel_act_mse_test" if setting.objective == "S" else "rel_weight_mse"
        record["reference"] = case
        record["ratio_to_reference"] = record[compared] / case[compared]
    return record


def _additive(matrix: Matrix, setting: Setting, bench: _Bench):
    """Returns the quantized matrix, the seconds of the search, and the shrinkage if one was chosen.

    The shrinkage is chosen where single images can be held out.
    """
    assert setting.spec is not None
    spec, moment, metric, chosen = setting.spec, None, None, None
    if setting.objective == "S":
        moment = jnp.asarray(matrix.moment_NN, jnp.float32)
        if matrix.rows_IRN is not None:
            seen = moments.of_images(matrix.rows_IRN, matrix.window)
            made = shrinkage.layer_metric(seen, matrix.window, has_bias=False, bits=setting.nominal)
            metric, chosen = jnp.asarray(made.metric_NN), made.shrinkage
    key = jax.random.fold_in(
        jax.random.key(bench.seed), zlib.crc32(f"{matrix.name} {setting.name}".encode())
    )
    kernel = jnp.asarray(matrix.kernel)

    def search():
        return compress_layer(kernel, moment, spec, key=key, effort=bench.effort, metric=metric)

    (tensor, _), seconds = compiled_seconds(search, bench.clock)
    stored = spec.stored(matrix.kernel.shape)
    entropy = codes_entropy(tensor, stored)
    q_ON = np.asarray(tensor.decode_matrix(), np.float64)
    return Quantized(q_ON, tensor.bits_per_weight, entropy), seconds, chosen


def _baseline(matrix: Matrix, setting: Setting, bench: _Bench) -> Quantized:
    if setting.method == "round_to_nearest":
        return baselines.round_to_nearest(matrix.w_ON, setting.nominal)
    if setting.method == "product":
        return baselines.product_quantization(
            matrix.w_ON,
            group=_PRODUCT_GROUPS[setting.nominal],
            entries=_PRODUCT_ENTRIES,
            rng=np.random.default_rng(bench.seed),
        )
    layer = scalar_baseline(
        jnp.asarray(matrix.kernel), jnp.asarray(matrix.moment_NN, jnp.float32), setting.nominal
    )
    q_ON = np.asarray(grouping.to_matrix(layer.kernel), np.float64)
    return Quantized(q_ON, layer.bits_per_weight, math.nan)


def _errors(matrix: Matrix, q_ON: np.ndarray) -> dict[str, float]:
    """Relative errors in float64; what a zero matrix loses is returned as it is."""
    error_ON = matrix.w_ON - q_ON

    def relative(moment_NN: np.ndarray | None) -> float:
        lost, whole = (
            float(np.sum((x if moment_NN is None else x @ moment_NN) * x))
            for x in (error_ON, matrix.w_ON)
        )
        return lost / whole if whole > 0 else lost

    return {
        "rel_weight_mse": relative(None),
        "rel_act_mse": relative(matrix.moment_NN),
        "rel_act_mse_test": relative(matrix.moment_test_NN),
    }


def _record(
    matrix: Matrix, setting: Setting, errors: dict[str, float], quantized: Quantized, seconds: float
) -> results.Record:
    spec = setting.spec
    record = {
        "file": matrix.name,
        "setting": setting.name,
        "bits_per_weight": quantized.bits_per_weight,
        **errors,
        "seconds": seconds,
        "method": setting.method,
        "objective": setting.objective,
        "nominal_bits": setting.nominal,
        "storage": setting.storage or None,
        "limit_bits": setting.limit,
        "shape": list(matrix.w_ON.shape),
        "codes_entropy": None if math.isnan(quantized.codes_entropy) else quantized.codes_entropy,
        "spec": None if spec is None else dataclasses.asdict(spec),
        "reference": None,
        "ratio_to_reference": None,
    }
    return record | _bound(matrix, record)


def _bound(matrix: Matrix, record: results.Record) -> dict[str, float]:
    """The bound of the error that was minimized, at the same stored bits, and the ratio to it."""
    bits = record["bits_per_weight"]
    if record["objective"] == "S":
        bound, measured = relative_bound(matrix.spectrum_N, bits), record["rel_act_mse"]
    else:
        bound, measured = 2.0 ** (-2 * bits), record["rel_weight_mse"]
    return {"bound": bound, "ratio_to_bound": measured / bound if bound > 0 else math.inf}


def _reference_record(matrix: Matrix, case: dict[str, Any]) -> results.Record:
    errors = {name: case[name] for name in ("rel_weight_mse", "rel_act_mse", "rel_act_mse_test")}
    setting = Setting("reference", round(case["nominal_bits"]), case["objective"])
    stored = Quantized(matrix.w_ON, case["bits_per_weight"], math.nan)
    record = _record(matrix, setting, errors, stored, case["seconds"])
    name = f"{setting.name} beam {case['beam']}"
    return record | {"setting": name, "spec": case["spec"], "shrinkage": None}
