# SPDX-License-Identifier: Apache-2.0
"""`bench kernels`: every layer shape of a model with packed weights, beside the same dense layer.

Dimension key:  O outputs   N fan-in
"""

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from vqjax.bench import tables
from vqjax.bench.clock import medians_in_turn
from vqjax.bench.sample import asked, relative_rms
from vqjax.errors import VqjaxError
from vqjax.io import native
from vqjax.kernels import decode, device, specs, tuned
from vqjax.kernels.dispatch import Choice
from vqjax.kernels.problem import Operands, Problem
from vqjax.kernels.schedule import Schedule, candidates
from vqjax.kernels.vq_conv import api as conv
from vqjax.kernels.vq_conv import pallas as conv_pallas
from vqjax.kernels.vq_conv import ref as conv_ref
from vqjax.kernels.vq_conv.window import Window
from vqjax.kernels.vq_matmul import api as matmul
from vqjax.kernels.vq_matmul import pallas as matmul_pallas
from vqjax.kernels.vq_matmul import ref as matmul_ref
from vqjax.pipeline import environment
from vqjax.settings import BenchKernelsSettings, command_line

CACHE_BYTES = 64 * 2**20
"""Packed weights of one program come to this much, so that they are not read from a cache, ..."""

MOST_COPIES, MOST_OPERATIONS = 16, 2e9
"""... unless these limits are met: a layer of much arithmetic does not wait for its weights."""

Program = Callable[[], list[jax.Array]]

_log = logging.getLogger("vqjax.bench")


class Case(NamedTuple):
    """One layer shape at one batch size."""

    layer: specs.Layer
    batch: int
    problem: Problem
    operands: Operands

    @property
    def window(self) -> Window:
        """Of a convolution."""
        pad = self.layer.padding
        return Window(self.layer.window, self.problem.strides, (pad, pad))

    def packed(self, operands: Operands) -> jax.Array:
        """The operation on the path that is asked for."""
        if self.layer.op == "vq_matmul":
            return matmul.vq_matmul(*operands)
        geometry = self.window._asdict()
        return conv.vq_conv(*operands, window=geometry.pop("size"), **geometry)

    def scheduled(self, operands: Operands, *, schedule: Schedule) -> jax.Array:
        """The operation by a GPU kernel with this schedule."""
        if self.layer.op == "vq_matmul":
            return matmul_pallas.vq_matmul(operands, self.problem, schedule)
        return conv_pallas.vq_conv(operands, self.problem, schedule, self.window)

    def dense(self, operands: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        """The operation with a decoded weight [O, N]: operands are x, weight and bias."""
        if self.layer.op == "vq_matmul":
            return matmul_ref.product(*operands)
        return conv_ref.convolve(*operands, self.window)

    def choice(self) -> Choice:
        """The path that would be taken."""
        if self.layer.op == "vq_matmul":
            return matmul.choice(self.operands)
        return conv.choice(self.operands, self.window)


def run(wanted: BenchKernelsSettings) -> None:
    """Measures, prints, writes, and tunes where that is asked for."""
    if min(*wanted.batch, wanted.repeat, 1) < 1:
        raise VqjaxError(f"--batch {wanted.batch}, --repeat {wanted.repeat}: expected 1 or more")
    records = [measure(case, wanted) for case in cases(wanted)]
    found = {
        "command": command_line("vqjax.bench", wanted, "kernels"),
        "environment": environment.describe(),
        "model": wanted.model,
        "dtype": wanted.dtype,
        "records": records,
    }
    if wanted.json is not None:
        native.write_atomically(wanted.json, (json.dumps(found, indent=2) + "\n").encode())
    show(found)
    if wanted.tune:
        tune(wanted)


def cases(wanted: BenchKernelsSettings) -> Iterator[Case]:
    """All layer shapes of the model, products first; arrays exist while they are looked at."""
    for op in ("vq_matmul", "vq_conv"):
        for layer in specs.layers(op):
            for batch in wanted.batch if layer.model == wanted.model else ():
                problem = layer.problem(batch, wanted.dtype)
                shape = layer.operands_shape(batch)
                operands = specs.random_operands(problem, shape, seed=wanted.seed)
                yield Case(layer, batch, problem, operands)


def measure(case: Case, wanted: BenchKernelsSettings) -> dict[str, Any]:
    """Times one case on the path that is asked for, in turn with the dense layer."""
    with asked(wanted.path):
        choice = case.choice()
        weight_ON = decoded(case)
        dense = (case.operands.x, weight_ON, case.operands.bias_O)
        works = {
            "dense": repeated(case, case.dense, dense),
            "packed": repeated(case, case.packed, case.operands),
        }
        error = relative_rms(
            *(np.asarray(works[name]()[-1], np.float64) for name in ("packed", "dense"))
        )
        seconds = medians_in_turn(works, wanted.repeat)
    count = copies(case)
    fields = dataclasses.asdict(case.layer)
    return {name: fields[name] for name in ("op", "outputs", "window", "stride", "count")} | {
        "x": [case.batch, *case.layer.x_shape[1:]],
        "batch": case.batch,
        "rows": case.problem.rows,
        "code": f"{case.problem.books}x{case.problem.entries} g{case.problem.group}",
        "path": choice.path,
        "schedule": None if choice.schedule is None else str(choice.schedule),
        "why": choice.why,
        "seconds": seconds["packed"] / count,
        "dense_seconds": seconds["dense"] / count,
        "ratio_to_dense": seconds["dense"] / seconds["packed"],
        "packed_bytes": packed_bytes(case),
        "dense_bytes": weight_ON.nbytes,
        "error": error,
    }


def decoded(case: Case) -> jax.Array:
    """The weight as it is stored for a dense layer, [O, N]."""
    stored = case.operands
    w_OP = decode.decode(
        stored.packed_OY,
        stored.codebooks_MKG,
        stored.scales_O,
        stored.codebook_scale,
        groups=case.problem.groups,
    )
    return w_OP[:, : case.problem.fan_in].astype(case.problem.dtype)


def packed_bytes(case: Case) -> int:
    """Bytes of codes, codebooks and scales."""
    _, *stored, _ = case.operands
    return sum(leaf.nbytes for leaf in jax.tree.leaves(stored))


def copies(case: Case) -> int:
    """How many weights one program multiplies by, one after the other."""
    operations = 2 * case.problem.fan_in * case.problem.outputs * case.problem.rows
    past_cache = math.ceil(CACHE_BYTES / packed_bytes(case))
    return max(1, min(past_cache, MOST_COPIES, int(MOST_OPERATIONS / operations)))


def repeated(case: Case, run: Callable[[Any], jax.Array], operands: Any) -> Program:
    """A program that runs an operation with weights of several places in memory, in turn."""
    x, *weights = operands
    several = [jax.tree.map(jnp.copy, weights) for _ in range(copies(case))]
    kind = type(operands)
    make = kind._make if hasattr(kind, "_make") else kind

    @jax.jit
    def program(x: jax.Array, several: list[Any]) -> list[jax.Array]:
        ys: list[jax.Array] = []
        for weights in several:
            if ys:  # each waits for the one before, and none is left out: all are returned
                x, ys[-1] = jax.lax.optimization_barrier((x, ys[-1]))
            ys.append(run(make([x, *weights])))
        return ys

    return functools.partial(program, x, several)


def tune(wanted: BenchKernelsSettings) -> None:
    """Times schedules of every case and writes the best ones; says so where there are none."""
    here = device.current()
    refused = here.refuses_pallas()
    if refused:
        print(f"--tune: nothing to tune: {refused}; {wanted.table} stays as it is")
        return
    found = {}
    for case in cases(wanted):
        found[case.problem.op, tuned.key(case.problem)] = best(case, wanted.repeat)
    text = wanted.table.read_text(encoding="utf-8") if wanted.table.exists() else tuned.EMPTY
    merged = tuned.merged(text, here.kind, found)
    native.write_atomically(wanted.table, merged.encode())
    print(f"--tune: {len(found)} shapes on {here} written to {wanted.table}")


def best(case: Case, repeat: int) -> tuned.Entry:
    """The path and schedule of least median time; schedules that do not compile are passed over."""
    works: dict[tuned.Entry, Program] = {}
    with asked("xla"):
        works["xla", None] = repeated(case, case.packed, case.operands)
        for schedule in candidates(case.problem):
            work = repeated(
                case, functools.partial(case.scheduled, schedule=schedule), case.operands
            )
            try:
                jax.block_until_ready(work())
            except Exception as error:  # whatever a compiler says, there are others
                _log.info("%s: %s is passed over: %s", tuned.key(case.problem), schedule, error)
                continue
            works["pallas", schedule] = work
        seconds = medians_in_turn(works, repeat)
    return min(seconds, key=lambda entry: seconds[entry])


def show(found: Mapping[str, Any]) -> None:
    """Prints one row for each layer shape and batch, and the sum over the layers of the model."""
    title = f"Layers of {found['model']}, {found['dtype']}, on {found['environment']['device']}"
    table = Table(title=title, title_justify="left")
    left = ("x", "code", "path")
    columns = (
        "x",
        "outputs",
        "window",
        "layers",
        "code",
        "ms",
        "dense ms",
        "x dense",
        "MB",
        "dense MB",
    )
    for name in (*columns, "error", "path"):
        table.add_column(name, justify="left" if name in left else "right")
    for record in found["records"]:
        stride = "" if record["stride"] == 1 else f" /{record['stride']}"
        table.add_row(
            "x".join(map(str, record["x"])),
            str(record["outputs"]),
            f"{record['window']}{stride}",
            str(record["count"]),
            record["code"],
            f"{1e3 * record['seconds']:.3g}",
            f"{1e3 * record['dense_seconds']:.3g}",
            f"{record['ratio_to_dense']:.2f}",
            f"{record['packed_bytes'] / 1e6:.3f}",
            f"{record['dense_bytes'] / 1e6:.3f}",
            f"{record['error']:.1g}",
            record["path"] if record["schedule"] is None else record["schedule"],
        )
    console = tables.wide_console()
    console.print(table)
    for batch in dict.fromkeys(record["batch"] for record in found["records"]):
        chosen = [record for record in found["records"] if record["batch"] == batch]
        packed, dense = (
            sum(record["count"] * record[name] for record in chosen)
            for name in ("seconds", "dense_seconds")
        )
        console.print(
            f"All layers, batch {batch}: {1e3 * packed:,.1f} ms, dense {1e3 * dense:,.1f} ms, "
            f"{dense / packed:.2f} x dense"
        )
