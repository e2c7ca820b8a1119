# SPDX-License-Identifier: Apache-2.0
"""`bench sample`: images per second of one quantized model, on every path that runs here.

Dimension key:  B images of a call   O outputs   J vectors of a row   M codebooks   K entries
                G weights of a vector
"""

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from vqjax import config as config_lib
from vqjax import io, sampling
from vqjax.bench import random_weights, roofline, tables
from vqjax.bench.clock import medians_in_turn, together
from vqjax.bench.layers import layers_of
from vqjax.config import LatentDiffusionConfig
from vqjax.core import tree
from vqjax.core.model import Model
from vqjax.core.tensor import VQTensor, densify
from vqjax.errors import VqjaxError
from vqjax.io import native
from vqjax.kernels import device, dispatch, tuned
from vqjax.kernels.lut_matmul import counts
from vqjax.kernels.lut_matmul import native as native_tables
from vqjax.pipeline import environment
from vqjax.pipeline.journal import peak_memory_bytes
from vqjax.sampling.weights import Placed, place
from vqjax.settings import BenchSampleSettings, command_line

DENSE = "dense"
"""The path that others are compared with: weights that were never packed, and inputs in floating
point."""

SIMULATED = "inputs rounded"
"""The same weights where a model has ranges of what layers read: all other paths should have its
latents."""

_RANGES = "activations"  # as `core.activations.Activations` stands in a tree

CORES = 4
"""That compiling a whole network keeps busy."""

BITS = 2.0
"""Of a preset's weights where nothing else is asked for."""


class Way(NamedTuple):
    """How a path is asked for.

    Attributes:
      title: for people.
      kernels: as `VQJAX_KERNELS`.
      limit: GB of decoded weights, or None.
      integer: multiply int8 by int8.
    """

    title: str
    kernels: str
    limit: float | None = None
    integer: bool = False


WAYS = {
    "load": Way("decoded at load", "xla"),
    "step": Way("decoded in the step", "xla", 0.0),
    "lut": Way("lookup tables", "lut"),
    "native": Way("native tables", "native"),
    "auto": Way("kernels", "auto"),
    "integer": Way("integers", "auto", integer=True),
}
"""Named as in `BenchSampleSettings.paths`."""


class Work(NamedTuple):
    """One path at one batch size.

    Attributes:
      name: for people.
      batch: images.
      kernels: as `VQJAX_KERNELS`.
      placed, load_seconds: weights, and what it took to decode them.
    """

    name: str
    batch: int
    kernels: str
    placed: Placed
    load_seconds: float


Program = Callable[[], tuple[jax.Array, jax.Array]]
"""Images and latents."""


def run(wanted: BenchSampleSettings) -> None:
    """Measures, prints and writes."""
    if min(*wanted.batch, wanted.repeat, 1) < 1:
        raise VqjaxError(f"--batch {wanted.batch}, --repeat {wanted.repeat}: expected 1 or more")
    model = quantized_model(wanted.source, wanted.bits, wanted.seed, wanted.act_bits)
    quantized = [leaf for leaf in tree.flatten(model.params).values() if isinstance(leaf, VQTensor)]
    guidance = model.config.guidance if wanted.guidance is None else wanted.guidance
    machine = roofline.of(device.current(), wanted.dtype)
    least = machine.least_seconds(0, image_operations(model, guidance, wanted))
    records: list[dict[str, Any]] = []
    found: dict[str, Any] = {
        "command": command_line("vqjax.bench", wanted, "sample"),
        "environment": environment.describe(),
        "model": model.config.name,
        "quantized_weights": sum(leaf.size for leaf in quantized),
        "bits_per_weight": 8 * sum(x.nbytes for x in quantized) / sum(x.size for x in quantized),
        "steps": wanted.steps,
        "guidance": guidance,
        "dtype": wanted.dtype,
        "peaks": machine._asdict(),
        "records": records,
    }
    for works, programs in compiled(wanted, model, guidance):
        records += measure(works, programs, wanted.repeat, least)
        found["peak_memory_bytes"] = peak_memory_bytes()
        if wanted.json is not None:  # after each: whoever ends the process keeps what was measured
            native.write_atomically(wanted.json, (json.dumps(found, indent=2) + "\n").encode())
    show(found)


def compiled(
    wanted: BenchSampleSettings, model: Model, guidance: float
) -> Iterator[tuple[list[Work], list[Program]]]:
    """Yields all paths of each batch size, `DENSE` first, and their programs.

    These are compiled side by side, on many cores those of several batch sizes; nothing is while
    the caller measures.
    """
    ranges = model.params.get(_RANGES)
    ways = ways_here(wanted.paths, eight_bits=ranges is not None and ranges.bits <= 8)
    weights = jax.jit(densify, static_argnames="dtype")(model.params, dtype=wanted.dtype)
    dense = {DENSE: Placed({name: weights[name] for name in weights if name != _RANGES}, {})}
    if _RANGES in weights:
        dense[SIMULATED] = Placed(weights, {})
    size = max(1, (os.cpu_count() or 1) // (CORES * (len(dense) + len(ways))))
    for start in range(0, len(wanted.batch), size):
        several = [
            [
                *(Work(name, batch, "xla", placed, 0.0) for name, placed in dense.items()),
                *(loaded(wanted, model, batch, guidance, way) for way in ways),
            ]
            for batch in wanted.batch[start : start + size]
        ]
        make = functools.partial(program_of, wanted, model.config, guidance)
        programs = iter(together(make, [work for works in several for work in works]))
        for works in several:
            yield works, [next(programs) for _ in works]


def loaded(
    wanted: BenchSampleSettings, model: Model, batch: int, guidance: float, way: Way
) -> Work:
    """The weights of a path, decoded as far as it decodes any at load."""
    start, rows = time.perf_counter(), sampling.rows(model.config, batch, guidance)
    with dispatch.asking(way.kernels):
        placed = place(
            model.config,
            model.params,
            rows=rows,
            dtype=wanted.dtype,
            limit=way.limit,
            integer=way.integer,
        )
    jax.block_until_ready(placed.params)
    return Work(way.title, batch, way.kernels, placed, time.perf_counter() - start)


def program_of(
    wanted: BenchSampleSettings, config: LatentDiffusionConfig, guidance: float, work: Work
) -> Program:
    """Compiles the sampler of one path, for images of numbered classes."""
    index_B = jnp.arange(work.batch, dtype=jnp.uint32)
    ids_B = jnp.arange(work.batch, dtype=jnp.int32) % max(config.null_class, 1)
    arguments = (ids_B if config.n_classes else None, index_B, jnp.uint32(wanted.seed))
    how = sampling.Run(wanted.steps, guidance, 0.0, wanted.dtype, work.kernels)
    with asked(work.kernels):
        lowered = sampling.sample_batch.lower(config, work.placed.params, *arguments, run=how)
    return functools.partial(lowered.compile(), work.placed.params, *arguments)


def quantized_model(
    source: str, bits: float | None, seed: int, act_bits: int | None = None
) -> Model:
    """A run folder or an exported file, or a preset with random codes.

    Args:
      bits: of a preset; default: `BITS`.
      act_bits: of what its layers read; default: floating point.

    Raises:
      VqjaxError: if it cannot be loaded, has no quantized weight, or has bits of its own.
    """
    if source in config_lib.PRESETS:
        config = config_lib.PRESETS[source]()
        if act_bits is not None and not 1 <= act_bits <= 8:
            raise VqjaxError(f"--act-bits {act_bits}: expected 1 to 8, or none: floating point")
        model = random_weights.quantized_model(config, BITS if bits is None else bits, seed)
        return model if act_bits is None else random_weights.with_ranges(model, act_bits)
    for option, value in (("--bits", bits), ("--act-bits", act_bits)):
        if value is not None:
            raise VqjaxError(
                f"{option} {value:g}: {source} is no preset and has the bits that it was quantized "
                f"to; leave {option} out"
            )
    model = io.load_model(source)
    if not any(isinstance(leaf, VQTensor) for leaf in tree.flatten(model.params).values()):
        raise VqjaxError(f"{source} has no quantized weight: quantize it first")
    return model


def image_operations(model: Model, guidance: float, wanted: BenchSampleSettings) -> int:
    """Of the dense layers in the steps of one image; neither of products of attention nor of the
    first stage."""
    shapes = jax.eval_shape(densify, model.params)
    rows = sampling.rows(model.config, 1, guidance)
    return wanted.steps * sum(
        layer.count * counts.operations(layer.problem(rows, wanted.dtype))[0]
        for layer in layers_of(model.config.name, model.config, shapes)
        if layer.sees_latent
    )


def measure(
    works: Sequence[Work], programs: Sequence[Program], repeat: int, least: float | None = None
) -> list[dict[str, Any]]:
    """One record for each path of a batch size.

    Args:
      least: seconds that an image's dense layers take at the device's peak, or None.
    """
    ready = {work.name: program for work, program in zip(works, programs)}
    latents = {name: np.asarray(program()[1]) for name, program in ready.items()}
    expected = latents.get(SIMULATED, latents[DENSE])
    seconds = medians_in_turn(ready, repeat)
    return [
        {
            "path": work.name,
            "batch": work.batch,
            "images_per_second": work.batch / seconds[work.name],
            "seconds": seconds[work.name],
            "ratio_to_dense": seconds[DENSE] / seconds[work.name],
            "roofline_share": None if least is None else work.batch * least / seconds[work.name],
            "weight_bytes": work.placed.nbytes,
            "load_seconds": work.load_seconds,
            "layers": work.placed.counts(),
            "latent_error": relative_rms(latents[work.name], expected),
        }
        for work in works
    ]


def ways_here(paths: Sequence[str] = (), *, eight_bits: bool = False) -> list[Way]:
    """The paths that run on this device and differ: without kernels, `auto` decodes at load.

    Args:
      paths: only these, unless there are none.
      eight_bits: whether what the layers of the model read has ranges of at most 8 bits.

    Raises:
      VqjaxError: if a path that was named does not run here, or not in a way of its own.
    """
    found, missing = dict(WAYS), absent(eight_bits=eight_bits)
    if not device.current().refuses("native"):  # a CPU, whose only kernels are those of "native"
        found["auto"] = found["auto"]._replace(title="measured best")
    reasons = [f"no {path}: {missing[path]}" for path in paths if path in missing]
    if reasons:
        raise VqjaxError(f"--paths {' '.join(paths)}: {'; '.join(reasons)}")
    return [way for path, way in found.items() if path in (paths or found) and path not in missing]


def absent(*, eight_bits: bool = False) -> dict[str, str]:
    """Why paths do not run on this device, or not in a way of their own, by path."""
    refused = device.current().refuses("native")
    found = {"native": refused or native_tables.missing()}
    if not eight_bits:
        found["integer"] = "inputs have over 8 bits (--act-bits 8 rounds those of a preset)"
    with dispatch.asking("auto"):
        if dispatch.keeps_none():
            found["auto"] = f"it decodes at load here, as load does ({tuned.COMMAND})"
    return {path: reason for path, reason in found.items() if reason}


@contextlib.contextmanager
def asked(kernels: str) -> Iterator[None]:
    """A path, at the precision of products that `sampling.generate` has."""
    with dispatch.asking(kernels), jax.default_matmul_precision("highest"):
        yield


def relative_rms(found: np.ndarray, expected: np.ndarray) -> float:
    """RMS of the difference over that of the expected array."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def show(found: Mapping[str, Any]) -> None:
    """Prints one row for each batch size and path."""
    title = (
        f"Sampling {found['model']}, {found['bits_per_weight']:.2f} bits per quantized weight, "
        f"{found['steps']} steps, {found['dtype']}, on {found['environment']['device']}"
    )
    table = Table(title=title, title_justify="left")
    left = ("path", "layers")
    columns = ("images/s", "x dense", "of peak", "U-Net MB", "load s", "error", "layers")
    for name in ("batch", "path", *columns):
        table.add_column(name, justify="left" if name in left else "right")
    for record in found["records"]:
        if record["path"] == DENSE:
            table.add_section()
        table.add_row(
            str(record["batch"]),
            record["path"],
            f"{record['images_per_second']:.3g}",
            f"{record['ratio_to_dense']:.2f}",
            tables.percent(record["roofline_share"]),
            f"{record['weight_bytes'] / 1e6:,.2f}",
            f"{record['load_seconds']:.2f}",
            f"{record['latent_error']:.1g}",
            ", ".join(f"{count} {path}" for path, count in record["layers"].items()),
        )
    paths = {record["path"] for record in found["records"]}
    named = SIMULATED if SIMULATED in paths else DENSE
    console = tables.wide_console()
    console.print(table)
    console.print(
        "images/s and x dense: medians of rounds in which all paths ran in turn; of peak: time "
        "that the operations of the\nU-Net's dense layers take at the device's peak, over all time "
        "taken; U-Net MB: its weights in memory;\nload s: decoding at load, its compilation "
        f"included; error: RMS of latents to those of {named}, relative.\nPeaks: "
        f"{found['peaks']['source']}",
        style="dim",
    )
