# SPDX-License-Identifier: Apache-2.0
"""`bench evaluate`: what scoring costs, part by part, beside TensorFlow and SciPy.

Dimension key:  N samples   R reference rows   F features (2048)   H W rows and columns
"""

import functools
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from vqjax.bench import rivals, tables
from vqjax.bench.clock import costs_in_turn
from vqjax.core import cores
from vqjax.errors import VqjaxError
from vqjax.eval import adm, metrics
from vqjax.io import inception as weights_io
from vqjax.io import inception_keys, native
from vqjax.models import inception
from vqjax.pipeline import environment
from vqjax.pipeline.journal import peak_memory_bytes
from vqjax.settings import BenchEvaluateSettings, command_line

SIDE = 256  # pixels of the pictures
OURS = "vqjax"
TENSORFLOW = "tensorflow-cpu", "tensorflow"  # the names that it is installed under
_BLOCK_VALUES = 1 << 25  # distances at once in TensorFlow: as many as ours


class Part(NamedTuple):
    """Something to be measured.

    Attributes:
      name: for people.
      unit, count: what one round does, and how many of them.
      work: ours.
      rival: what does the same, by its name; empty where nothing is there to compare with.
      difference: of our result to a rival's, or None where they give nothing to compare.
      once: too slow for more than one round.
    """

    name: str
    unit: str
    count: int
    work: Callable[[], Any]
    rival: dict[str, Callable[[], Any]]
    difference: Callable[[Any, Any], float] | None = None
    once: bool = False


@jax.default_matmul_precision("highest")  # as scores are computed
def run(wanted: BenchEvaluateSettings) -> None:
    """Measures, prints and writes.

    Raises:
      VqjaxError: for counts that nothing can be measured with, or an unusable network.
    """
    least = {"pictures": 1, "repeat": 1}
    least |= dict.fromkeys(("samples", "reference"), metrics.NEIGHBOURS + 1)
    for name, lowest in least.items():
        if getattr(wanted, name) < lowest:
            raise VqjaxError(f"--{name} {getattr(wanted, name)}: expected {lowest} or more")
    if wanted.pictures % adm.BATCH:  # the network would see blank ones for the rest
        raise VqjaxError(
            f"--pictures {wanted.pictures}: expected a multiple of {adm.BATCH}, whole batches"
        )
    weights = (
        random_weights(wanted.seed)
        if wanted.inception is None
        else weights_io.load(wanted.inception)
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    records: list[dict[str, Any]] = []
    found = {
        "command": command_line("vqjax.bench", wanted, "evaluate"),
        "environment": environment.describe() | {"cores": str(os.cpu_count())},
        "tensorflow": tensorflow_version(),
        "network": "random weights" if wanted.inception is None else weights.sha256,
        "load_before": load,
        "records": records,
    }
    for part in parts(wanted, weights):
        records.append(measure(part, wanted.repeat))
        found["peak_memory_bytes"] = peak_memory_bytes()
        if wanted.json is not None:  # after each: whoever ends it keeps what was measured
            native.write_atomically(wanted.json, (json.dumps(found, indent=2) + "\n").encode())
    show(found)


def random_weights(seed: int) -> weights_io.Weights:
    """The FID network with He-normal kernels and zero biases."""
    rng = np.random.default_rng(seed)
    params = {}
    for conv in inception_keys.convolutions():
        outputs, inputs, height, width = conv.shape
        noise = rng.standard_normal((height, width, inputs, outputs), np.float32)
        params[f"{conv.name}/kernel"] = noise * np.float32((2 / (height * width * inputs)) ** 0.5)
        params[f"{conv.name}/bias"] = np.zeros(outputs, np.float32)
    shape = inception_keys.POOLED, inception_keys.CLASSES
    params["fc/kernel"] = rng.standard_normal(shape, np.float32) / np.float32(shape[0] ** 0.5)
    return weights_io.Weights({k: jnp.asarray(v) for k, v in params.items()}, "random", False)


def parts(wanted: BenchEvaluateSettings, weights: weights_io.Weights) -> list[Part]:
    """Everything that is measured, on arrays of the real sizes."""
    rng = np.random.default_rng(wanted.seed)
    images_NHWC = rng.integers(0, 256, (wanted.pictures, SIDE, SIDE, 3), np.uint8)
    samples_NF, reference_RF = features(rng, wanted.samples), features(rng, wanted.reference)
    moments = [metrics.moments(rows) for rows in (reference_RF, samples_NF)]
    places = cores.placed(weights.params)
    here = rivals.has_tensorflow()
    network = rivals.tensorflow_network(weights.params) if here else None
    block = max(1, _BLOCK_VALUES // max(wanted.samples, wanted.reference))
    sets = reference_RF, samples_NF
    shares = functools.partial(rivals.tensorflow_precision_recall, *sets, block)
    return [
        Part(
            "FID network",
            "pictures",
            wanted.pictures,
            lambda: adm.rows_of(images_NHWC, places).pooled,
            {} if network is None else {"TensorFlow": lambda: network(images_NHWC)},
            relative,
        ),
        Part(
            "moments",
            "rows",
            wanted.samples,
            lambda: streamed(samples_NF).covariance,
            {"NumPy, all at once": lambda: np.cov(samples_NF, rowvar=False)},
            relative,
        ),
        Part(
            "Frechet distance",
            "distances",
            1,
            lambda: metrics.frechet_distance(*moments),
            {"SciPy sqrtm": lambda: rivals.scipy_distance(*moments)},
            relative,
            once=True,
        ),
        Part(
            "its standard error",
            "rows",
            wanted.samples,
            lambda: metrics.frechet_error(samples_NF, moments[1], moments[0]),
            {},
            once=True,
        ),
        Part(
            "precision, recall",
            "rows",
            wanted.samples + wanted.reference,
            lambda: metrics.precision_recall(*sets),
            {"TensorFlow": shares} if here else {},
            lambda a, b: float(np.abs(np.subtract(a, b)).max()),
        ),
    ]


def features(rng: np.random.Generator, count: int) -> np.ndarray:
    """Rows like the network's: not negative, with a spectrum that falls. float32 [count, 2048]."""
    scales_F = np.exp(-np.arange(inception.POOLED) / (inception.POOLED / 4)).astype(np.float32)
    rows_NF = rng.standard_normal((count, inception.POOLED), np.float32)
    return np.abs(rows_NF) * scales_F


def streamed(rows_NF: np.ndarray) -> metrics.Moments:
    """Moments as an evaluation takes them: as many rows at once as it does."""
    accumulator = metrics.Accumulator()
    for start in range(0, len(rows_NF), adm.FLUSH):
        accumulator.add(rows_NF[start : start + adm.FLUSH])
    return accumulator.moments()


def relative(found: Any, expected: Any) -> float:
    """The largest difference over the largest expected value."""
    return float(np.abs(np.subtract(found, expected)).max() / np.abs(expected).max())


def measure(part: Part, repeat: int) -> dict[str, Any]:
    """One record: medians of rounds in which ours and the rival's run in turn."""
    results: dict[str, Any] = {}

    def keep(name: str, work: Callable[[], Any]) -> None:
        results[name] = work()

    works = {OURS: part.work} | part.rival
    kept = {name: functools.partial(keep, name, work) for name, work in works.items()}
    costs = costs_in_turn(kept, 1 if part.once else repeat, warm_up=not part.once)
    record = {
        "part": part.name,
        "unit": part.unit,
        "count": part.count,
        "rounds": 1 if part.once else repeat,
        "per_second": part.count / costs[OURS].seconds,
        **costs[OURS]._asdict(),
    }
    for name in part.rival:
        record["rival"] = {
            "name": name,
            **costs[name]._asdict(),
            "ratio": costs[name].seconds / costs[OURS].seconds,
            "processor_ratio": costs[name].processor_seconds / costs[OURS].processor_seconds,
            "difference": part.difference and part.difference(results[OURS], results[name]),
        }
    return record


def tensorflow_version() -> str | None:
    """As installed; None where it is not."""
    for name in TENSORFLOW if rivals.has_tensorflow() else ():
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def show(found: Mapping[str, Any]) -> None:
    """Prints one row for each part."""
    here = found["environment"]
    title = f"Scoring on {here['device']}, {here['cores']} cores; network: {found['network']}"
    table = Table(title=title, title_justify="left")
    left = ("part", "beside")
    for name in ("part", "work", "s", "CPU s", "per s", "beside", "x", "x CPU", "difference"):
        table.add_column(name, justify="left" if name in left else "right")
    for record in found["records"]:
        rival = record.get("rival")
        table.add_row(
            record["part"],
            f"{record['count']:,} {record['unit']}",
            f"{record['seconds']:.3g}",
            f"{record['processor_seconds']:.3g}",
            f"{record['per_second']:.3g}",
            *_beside(rival),
        )
    console = tables.wide_console()
    console.print(table)
    console.print(
        "medians of rounds in turn; x: the other's time over ours, above 1 we are faster; x CPU: "
        "the same of processor\nseconds, which other programs on the machine hardly change "
        f"(load before: {_number(found['load_before'])})",
        style="dim",
    )
    if found["tensorflow"] is None:
        console.print("TensorFlow is not installed: the network has nothing to be compared with")


def _beside(rival: Mapping[str, Any] | None) -> list[str]:
    if rival is None:
        return [""] * 4
    return [
        rival["name"],
        f"{rival['ratio']:.2f}",
        f"{rival['processor_ratio']:.2f}",
        _number(rival["difference"]),
    ]


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2g}"
