# SPDX-License-Identifier: Apache-2.0
"""Bytes, memory and time of a quantization before it starts.

Bytes are exact. Memory and time are predictions: counted work over the speed of one matrix product
measured now, with factors fitted to complete runs.
"""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from vqjax import progress
from vqjax.config import LatentDiffusionConfig
from vqjax.core import compress
from vqjax.core.activations import CANDIDATES, TRIED
from vqjax.core.encode import EXACT_LIMIT
from vqjax.core.flops import layer_flops, total
from vqjax.core.grouping import groups_per_row, matrix_shape
from vqjax.core.initialization import SAMPLE
from vqjax.core.plan import LayerSpec, Plan
from vqjax.pipeline import activations
from vqjax.pipeline.calibrate import LayerInput, batches
from vqjax.pipeline.layer_figures import held_out_settings
from vqjax.pipeline.memory import Division
from vqjax.pipeline.sensitivity import LEAST_IMAGES, POSITIONS
from vqjax.settings import Calibration

_SWEEPS, _LAST_SWEEPS = 20, 8  # over the vectors that codebooks are made on; over all after a part
_SCORE_SHARE = 0.10  # speed of enumerating sums, relative to a large matrix product
NETWORK_SHARE = 0.45  # the same for the networks
_BACKWARD = 4  # forward calls that one step takes which is computed, again, and gone back through
_TRAINED = 3  # forward calls that a step of training takes
_FACTOR_SHARE = 0.45  # of Cholesky factors, and of products with them
_SCALAR_RANGES = 5  # that the scalar baseline tries for each row
_ROUNDING = 200  # operations of a large matrix product in the time that one number is rounded in
# Of XLA on two cores; nothing from the second run on one machine. Networks, and each kind of layer.
_COMPILE_NETWORKS, _COMPILE_TUNED_NETWORK = 60.0, 50.0
_COMPILE_LAYER, _COMPILE_TUNED_LAYER = 5.5, 5.0

MEMORY_FILES = tuple(
    map(pathlib.Path, ("/proc/self/status", "/proc/meminfo", "/sys/fs/cgroup/memory.max"))
)
"""Of this process, of the system, and the limit of its container."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run will need.

    Attributes:
      bytes_before: U-Net in float32.
      bytes_after: U-Net as it will be stored, unquantized parts in float16, ranges of activations.
      memory: peak resident bytes by part.
      seconds: by stage.
    """

    bytes_before: int
    bytes_after: int
    memory: dict[str, int]
    seconds: dict[str, float]


def estimate(
    config: LatentDiffusionConfig,
    shapes: Mapping[str, tuple[int, ...]],
    plan: Plan,
    sizes: Mapping[str, LayerInput],
    calibration: Calibration,
    samples: int,
    folded_weights: int,
    division: Division,
    *,
    tune_pairs: int = 0,
    taught_pairs: int = 0,
    ranges: bool = False,
) -> Estimate:
    """Predicts a run.

    Args:
      shapes: of all parameters after folding, by path.
      sizes: from `calibrate.trace_layers`.
      samples: images per model in the report.
      folded_weights: removed before; they count in `bytes_before`.
      division: how the run divides its memory.
      tune_pairs: latents that tuning sees, each in both branches.
      taught_pairs: those that the teacher makes, in whole rounds.
      ranges: whether ranges of activations are looked for, and stored.
    """
    unet = {path: shape for path, shape in shapes.items() if path.startswith("unet/")}
    weights = sum(math.prod(shape) for shape in unet.values())
    stored = plan.bits_report(unet).total
    forward = total([layer_flops(unet[p], plan[p], sizes[p].positions) for p in plan]).dense
    moments = sum(size.moment_flops for size in sizes.values())
    positions = math.prod(config.latent_shape[:2])
    followed = min(calibration.images, max(LEAST_IMAGES, POSITIONS // positions))
    weighed = _BACKWARD * followed * calibration.steps * 2
    search = sum(search_flops(unet[path], plan[path]) for path in plan)
    metrics = sum(metric_flops(unet[path]) for path in plan)
    baseline = sum(baseline_flops(unet[path]) for path in plan)
    speed = flops_per_second()
    pictures = picture_flops(config, forward, calls=40)
    passes = len(batches({path: sizes[path] for path in plan}, division.moments))

    def inputs(wanted: Calibration) -> float:
        """Seconds of trajectories and of the moments along them, in passes."""
        calls = wanted.images * wanted.steps * 2
        return calls * ((1 + passes) * forward / NETWORK_SHARE + moments) / speed

    looked = 2 * calibration.images * calibration.steps if ranges else 0
    tried = TRIED / (2 * min(calibration.batch, calibration.images))  # of one image in one branch
    rounded = CANDIDATES * sum(min(size.numbers, tried) for size in sizes.values())
    tuned = 2 * (taught_pairs + tune_pairs * _TRAINED)
    alike = len({(unet[path], plan[path]) for path in plan})
    compiled = _COMPILE_NETWORKS + alike * _COMPILE_LAYER
    if tune_pairs:
        compiled += _COMPILE_TUNED_NETWORK + alike * _COMPILE_TUNED_LAYER
    return Estimate(
        bytes_before=4 * (weights + folded_weights),
        bytes_after=math.ceil(stored.total / 8)
        + 2 * (weights - stored.weights)
        + (activations.stored_bytes(config, shapes, calibration) if ranges else 0),
        memory=division.parts,
        seconds={
            "compile": compiled,
            "calibrate": inputs(calibration)
            + weighed * forward / NETWORK_SHARE / speed
            + metrics / _FACTOR_SHARE / speed,
            "compress": search / speed / _SCORE_SHARE,
            "scalar baseline": baseline / _FACTOR_SHARE / speed,
            "ranges": looked * (4 * forward / NETWORK_SHARE + rounded * _ROUNDING) / speed,
            "tune": tuned * 2 * forward / NETWORK_SHARE / speed,
            "sample": 3 * samples * pictures / speed / NETWORK_SHARE,
            "held-out errors": inputs(held_out_settings(config, calibration)),
        },
    )


def picture_flops(config: LatentDiffusionConfig, forward: float, calls: int) -> float:
    """Operations of one sample: `calls` of the U-Net, `forward` each, and the first stage."""
    return calls * forward + 3e3 * config.first_stage.resolution**2 * config.first_stage.ch


def search_flops(shape: tuple[int, ...], spec: LayerSpec) -> float:
    """Operations of searching one layer: an addition and a comparison for every sum of entries, and
    products with S; 0 where values are only rounded."""
    outputs, fan_in = matrix_shape(shape)
    if spec.grouping == "scalar":
        return 0.0
    sums = min(float(spec.entries) ** spec.codebooks, EXACT_LIMIT)
    groups = groups_per_row(fan_in, spec.group)
    part = compress.part_rows(outputs, groups, spec)
    rows = _SWEEPS * part + (_LAST_SWEEPS * outputs if part < outputs else 0)
    first = SAMPLE * compress.start_steps(spec, compress.Effort())
    return 2.0 * (rows * groups + first) * sums + 4.0 * rows * fan_in**2


def metric_flops(shape: tuple[int, ...]) -> float:
    """Operations of drawing one layer's typical error: a factor of S, and products with S."""
    outputs, fan_in = matrix_shape(shape)
    return 2 / 3 * fan_in**3 + 5.0 * outputs * fan_in**2


def baseline_flops(shape: tuple[int, ...]) -> float:
    """Operations of quantizing one layer to scalars: factors of S, and products with them."""
    outputs, fan_in = matrix_shape(shape)
    return 2.0 * fan_in**3 + 4.0 * _SCALAR_RANGES * outputs * fan_in**2


def flops_per_second(size: int = 768) -> float:
    """Speed of a float32 matrix product on the default device, best of three."""
    a = jnp.asarray(np.ones((size, size), np.float32))
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def available_memory(device: Any = None) -> int | None:
    """Bytes that this process can come to hold, or None where the system does not tell.

    On a CPU that is what it holds already, what is free, and what the system keeps of files while
    nobody needs the memory; never more than the limit of a container. On an accelerator it is what
    JAX may take of its memory.

    Args:
      device: default: the first one of this process.
    """
    device = device or jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    own, system, limit = MEMORY_FILES
    try:
        within = _bytes_of(own, "VmRSS") + _bytes_of(system, "MemAvailable")
    except (OSError, ValueError):
        return None
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        within = min(within, int(limit.read_text()))
    return within


def _bytes_of(path: pathlib.Path, name: str) -> int:
    """A line such as "MemAvailable:  1024 kB"; raises ValueError where there is none."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"{path} has no {name}")


def show(estimate: Estimate, plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Prints the plan by kind of layer, then bytes, memory and time."""
    console = progress.console()
    report = plan.bits_report(shapes)
    table = Table(title="Plan", title_justify="left")
    for name in ("kind", "layers", "weights", "codebooks", "bits per weight", "bytes"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for kind, bits in report.kinds.items():
        specs = [spec for spec in plan.values() if spec.kind == kind]
        books = sorted({spec.codebooks for spec in specs})
        span = f"{books[0]}" if len(books) == 1 else f"{books[0]}-{books[-1]}"
        table.add_row(kind.replace("_", " "), str(len(specs)), f"{bits.weights:,}", span,
                      f"{bits.per_weight:.3f}", f"{bits.total // 8:,}")  # fmt: skip
    whole = report.total
    table.add_row("all", str(len(plan)), f"{whole.weights:,}", "", f"{whole.per_weight:.3f}",
                  f"{whole.total // 8:,}", style="bold")  # fmt: skip
    console.print(table)
    console.print(
        f"U-Net: {estimate.bytes_before / 1e6:.2f} MB in float32 -> "
        f"{estimate.bytes_after / 1e6:.2f} MB (norms and biases in float16, ranges included)\n"
        f"memory: about {sum(estimate.memory.values()) / 1e9:.2f} GB ("
        + ", ".join(f"{part} {value / 1e9:.2f}" for part, value in estimate.memory.items())
        + ")\n"
        f"time: about {sum(estimate.seconds.values()):.0f} s ("
        + ", ".join(f"{stage} {value:.0f}" for stage, value in estimate.seconds.items())
        + "; compile only once per machine)"
    )
