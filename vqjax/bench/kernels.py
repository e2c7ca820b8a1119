# SPDX-License-Identifier: Apache-2.0
"""`bench kernels`: every layer shape of a model with packed weights, beside the same dense layer.

"Dense" is a weight that was decoded at load: in products of integers one of int8.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

import vqjax.kernels
from vqjax import config as config_lib
from vqjax import progress
from vqjax.bench import random_weights, results, roofline, sums, tables
from vqjax.bench.cases import Case, case_of
from vqjax.bench.clock import medians_in_turn, together
from vqjax.bench.layers import layers_of
from vqjax.bench.sample import BITS, asked, quantized_model, relative_rms
from vqjax.errors import DoesNotFitError, VqjaxError
from vqjax.io import native
from vqjax.kernels import device, lut_matmul, specs, tuned, vq_conv, vq_matmul
from vqjax.kernels.dispatch import KERNELS, refusals_of
from vqjax.kernels.lut_matmul import counts
from vqjax.kernels.lut_matmul import native as native_tables
from vqjax.kernels.problem import INTEGER, AnyOperands
from vqjax.kernels.schedule import Schedule, candidates
from vqjax.pipeline import environment
from vqjax.pipeline.journal import fingerprint
from vqjax.settings import BenchKernelsSettings, command_line


class Limits(NamedTuple):
    """What one program runs at most.

    Attributes:
      copies: of a layer, in turn, until what they read exceeds the cache.
      rounds: of all copies. To hand over the arrays of a copy takes the host up to 12 us, longer
        than a GPU needs for many a layer: rounds inside the program share that, and also what XLA
        takes out of their loop, as it does in a sampler's: a dense weight in another layout.
      operations: of all rounds; a layer of much arithmetic waits neither for memory nor the host.
    """

    copies: int
    rounds: int
    operations: float


LIMITS = {"cpu": Limits(16, 1, 2e9), "gpu": Limits(64, 64, 1e13)}
"""More copies take long to compile. What stays in a GPU's cache with 64 of them, less than 2 MB a
copy, is read from its memory in a fraction of the time that it takes to start a kernel."""

CACHES = 2
"""How many times the cache all copies are: of what is a little larger than a cache, much stays."""

TOLERANCES = {"float32": 1e-4, "float16": 3e-3, "bfloat16": 2e-2, "int8": 1e-5}
"""Most relative RMS of a kernel's result to that of a decoded weight. float32: what convolutions by
transforms differ by, less than what ten bits of mantissa (TF32) would. Sums of integers are exact,
and scaled in float32."""

Program = Callable[[list[Any]], list[jax.Array]]
"""Takes operands in several places."""

_SOURCES = (vqjax.kernels, vq_matmul, vq_conv, lut_matmul)

_log = logging.getLogger("vqjax.bench")


class Run(NamedTuple):
    """One way to compute a case: the operation, and its operands."""

    function: Callable[[Any], jax.Array]
    operands: Any


NATIVE = tuned.Entry("native")
IN_EVERY_CALL = tuned.Entry("xla in every call")
"""What is tried on a CPU beside a weight that is decoded at load."""


class Trial(NamedTuple):
    """What became of one path and schedule.

    Attributes:
      entry: path and schedule.
      seconds: median of the rounds, or None where it was passed over.
      error: relative RMS to the result of a decoded weight, or None where there is no result.
      why: it was passed over, or None.
    """

    entry: tuned.Entry
    seconds: float | None
    error: float | None
    why: str | None


def run(wanted: BenchKernelsSettings) -> None:
    """Measures, prints and writes; or tunes, where that is asked for."""
    if min(*wanted.batch, wanted.repeat, 1) < 1:
        raise VqjaxError(f"--batch {wanted.batch}, --repeat {wanted.repeat}: expected 1 or more")
    if wanted.tune:
        tune(wanted)
        return
    records: list[dict[str, Any]] = []
    found = about(wanted) | {"records": records}
    with asked(wanted.path):
        for case, programs in compiled(places(wanted), wanted, measured_runs):
            records.append(measure(case, programs, wanted))
            found["sums"] = sums.of(records, targets=device.current().platform == "gpu")
            if wanted.json is not None:  # after each: whoever ends the process keeps the others
                native.write_atomically(wanted.json, (json.dumps(found, indent=2) + "\n").encode())
    show(found)


def about(wanted: BenchKernelsSettings) -> dict[str, Any]:
    """What a file of results says beside its records."""
    return {
        "command": command_line("vqjax.bench", wanted, "kernels"),
        "environment": environment.describe(),
        "model": wanted.model,
        "dtype": wanted.dtype,
        "peaks": roofline.of(device.current(), wanted.dtype)._asdict(),
    }


def layers(wanted: BenchKernelsSettings) -> list[specs.Layer]:
    """The distinct layers of the model.

    Raises:
      VqjaxError: if it is no preset and cannot be loaded, or has no quantized weight; for int8, if
        its codebooks are others.
    """
    preset = config_lib.PRESETS.get(wanted.model)
    if preset is None:
        model = quantized_model(wanted.model, wanted.bits, wanted.seed)
        found = layers_of(wanted.model, model.config, model.params)
    else:
        every = [layer for op in ("vq_matmul", "vq_conv") for layer in specs.layers(op)]
        found = [layer for layer in every if layer.model == wanted.model]
        if wanted.bits is not None or not found:
            bits = BITS if wanted.bits is None else wanted.bits
            shapes = random_weights.quantized_shapes(preset(), bits)
            found = layers_of(wanted.model, preset(), shapes)
    other = sum(layer.code is not None and layer.code[3] != INTEGER for layer in found)
    if wanted.dtype == INTEGER and other:
        raise VqjaxError(
            f"--dtype int8: {other} of {len(found)} layers of {wanted.model} have codebooks of "
            "floating point, which products of integers do not read"
        )
    return found


def places(wanted: BenchKernelsSettings) -> list[tuple[specs.Layer, int]]:
    """All layer shapes at all batch sizes: for each of these, what takes most of the network's
    operations first, so that whoever ends it has what counts.

    Raises:
      VqjaxError: if there is none of so few rows.
    """
    most = math.inf if wanted.most_rows is None else wanted.most_rows
    every = sorted(layers(wanted), key=lambda layer: -operations_of(layer, 1, wanted))
    pairs = [(layer, batch) for batch in wanted.batch for layer in every]
    found = [pair for pair in pairs if pair[0].problem(pair[1], wanted.dtype).rows <= most]
    if not found:
        raise VqjaxError(f"--most-rows {wanted.most_rows}: no layer has so few at this --batch")
    return found


def operations_of(layer: specs.Layer, batch: int, wanted: BenchKernelsSettings) -> int:
    """Of all layers of the network that are like this one."""
    return layer.count * counts.operations(layer.problem(batch, wanted.dtype))[0]


def compiled(
    chosen: Sequence[tuple[specs.Layer, int]],
    wanted: BenchKernelsSettings,
    runs_of: Callable[[Case], Mapping[Any, Run]],
) -> Iterator[tuple[Case, dict[Any, Program | Exception]]]:
    """Yields cases in their order with programs of all their runs, or what a compiler said.

    As many cases at a time as keep all cores busy: on a GPU nearly all time is compilation, which
    takes one core for each program. Nothing is compiled while the caller measures.
    """
    size = max(1, (os.cpu_count() or 1) // 2)  # each has two programs at least
    for start in range(0, len(chosen), size):
        cases = together(
            lambda place: case_of(*place, wanted.dtype, wanted.seed), chosen[start : start + size]
        )
        runs = [runs_of(case) for case in cases]
        pairs = [(case, run) for case, own in zip(cases, runs) for run in own.values()]
        programs = iter(together(lambda pair: _compiled(*pair), pairs))
        for case, own in zip(cases, runs):
            yield case, {name: next(programs) for name in own}


def _compiled(case: Case, run: Run) -> Program | Exception:
    """From shapes: copies of what many cases read would not fit the memory together."""
    one = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), run.operands)
    count, rounds = shares(case)
    in_places(run.operands, 1)  # what copies them is compiled here, too
    try:
        return repeated(run.function, rounds).lower([one] * count).compile()
    except Exception as raised:  # whatever a compiler says, there may be other programs
        return raised


def measured_runs(case: Case) -> dict[str, Run]:
    """The dense layer and the packed one."""
    return {
        "dense": Run(case.dense, case.dense_operands),
        "packed": Run(case.packed, case.packed_operands(case.choice().schedule)),
    }


def measure(
    case: Case, programs: Mapping[str, Program | Exception], wanted: BenchKernelsSettings
) -> dict[str, Any]:
    """Times one case on the path that was asked for, in turn with the dense layer."""
    machine = roofline.of(device.current(), wanted.dtype)
    count, rounds = shares(case)
    choice = case.choice()
    works = {}
    for name, run in measured_runs(case).items():
        program = programs[name]
        if isinstance(program, Exception):
            raise program
        works[name] = functools.partial(program, in_places(run.operands, count))
    ys = {name: work()[-1] for name, work in works.items()}
    error = relative_rms(*(np.asarray(ys[name], np.float64) for name in ("packed", "dense")))
    medians = medians_in_turn(works, wanted.repeat)
    seconds = {name: median / (count * rounds) for name, median in medians.items()}
    fields = dataclasses.asdict(case.layer)
    products, lookups = counts.operations(case.problem)
    operations = {
        "dense": products,
        "packed": lookups if choice.path in ("lut", "native") else products,
    }
    moved = {
        "dense": tree_bytes(case.dense_operands) + ys["dense"].nbytes,
        "packed": tree_bytes(case.operands) + ys["packed"].nbytes,
    }
    least = {name: machine.least_seconds(moved[name], operations[name]) for name in works}
    reached = {name: None if t is None else t / seconds[name] for name, t in least.items()}
    return {name: fields[name] for name in ("op", "outputs", "window", "stride", "count")} | {
        "x": [case.batch, *case.layer.x_shape[1:]],
        "batch": case.batch,
        "rows": case.problem.rows,
        "code": f"{case.problem.books}x{case.problem.entries} g{case.problem.group}",
        "path": choice.path,
        "schedule": None if choice.schedule is None else str(choice.schedule),
        "why": choice.why,
        "seconds": seconds["packed"],
        "dense_seconds": seconds["dense"],
        "ratio_to_dense": seconds["dense"] / seconds["packed"],
        "packed_bytes": tree_bytes(case.stored),
        "dense_bytes": case.kernel.nbytes,
        "moved_bytes": moved["packed"],
        "dense_moved_bytes": moved["dense"],
        "operations": operations["packed"],
        "dense_operations": operations["dense"],
        "roofline_share": reached["packed"],
        "dense_roofline_share": reached["dense"],
        "in_each_step": case.layer.sees_latent,
        "copies": count,
        "rounds": rounds,
        "past_cache": count * tree_bytes(case.operands) >= CACHES * machine.cache,
        "error": error,
    }


def tree_bytes(arrays: Any) -> int:
    """Bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))


def _limits() -> Limits:
    return LIMITS["cpu" if device.current().platform == "cpu" else "gpu"]


def copies(case: Case, cache: int) -> int:
    """How many layers one program runs, one after the other, of inputs and weights of their own."""
    limits, (products, _) = _limits(), counts.operations(case.problem)
    past_cache = math.ceil(CACHES * cache / tree_bytes(case.operands))
    return max(1, min(past_cache, limits.copies, int(limits.operations / products)))


def rounds_of(case: Case, count: int) -> int:
    """How often one program runs all its copies."""
    limits, (products, _) = _limits(), counts.operations(case.problem)
    return max(1, min(limits.rounds, int(limits.operations / (count * products))))


def shares(case: Case) -> tuple[int, int]:
    """Copies and rounds of a case on this device."""
    count = copies(case, roofline.of(device.current(), case.problem.dtype).cache)
    return count, rounds_of(case, count)


def in_places(operands: Any, count: int) -> list[Any]:
    """Copies of operands in several places in memory."""
    return [jax.tree.map(jnp.copy, operands) for _ in range(count)]


def repeated(run: Callable[[Any], jax.Array], rounds: int) -> Any:
    """A jitted `Program` that runs an operation on several operands in turn, in rounds.

    All that an operation reads waits for the operation before it: nothing is computed once for all
    rounds, as a decoded weight could be. For the same reason all results are given, those of the
    last round at the end.
    """
    one = jax.jit(run)  # lowered once for all

    def in_turn(several: list[Any], before: list[jax.Array]) -> list[jax.Array]:
        ys = before[-1:]
        for operands in several:
            if ys:
                operands, ys[-1] = jax.lax.optimization_barrier((operands, ys[-1]))
            ys.append(one(operands))
        return ys

    @jax.jit
    def program(several: list[Any]) -> list[jax.Array]:
        if rounds == 1:
            return in_turn(several, [])
        shapes = [jax.eval_shape(one, operands) for operands in several[:1] + several]
        ys = [jnp.zeros(y.shape, y.dtype) for y in shapes]
        return jax.lax.fori_loop(0, rounds, lambda _, ys: in_turn(several, ys), ys)

    return program


def tune(wanted: BenchKernelsSettings) -> None:
    """Times every kernel that runs here, and writes after each layer what was fastest.

    What takes most of the network's arithmetic comes first, and what an interrupted run had
    measured is not repeated. Says so where there is no kernel.
    """
    here, table = device.current(), wanted.table or tuned.own_file()
    integer = wanted.dtype == INTEGER
    refused = {path: here.refuses(path, integer=integer) for path in KERNELS}
    if not refused["native"]:
        whole = "it multiplies no integers" if integer else None
        refused["native"] = whole or native_tables.missing()
    if all(refused.values()):
        reasons = "; ".join(f"no {path}: {reason}" for path, reason in refused.items())
        print(f"--tune: nothing to tune: {reasons}; {table} stays as it is")
        return
    problems = problems_of(wanted)
    identity = [*results.here(), results.source_digest(*_SOURCES), wanted.repeat, wanted.seed]
    prints = {name: fingerprint(identity, name) for name in problems}
    kept = results.Results(wanted.json, about(wanted), prints.values())
    known = tuned.read(_text(table))
    finished = {name for name in prints if kept.get(prints[name]) and (here.kind, *name) in known}
    places_left = [place for name, place in problems.items() if name not in finished]
    with asked("xla"), progress.stage("layers", len(problems), done=len(finished)) as advance:
        for case, programs in compiled(places_left, wanted, tried_runs):
            name = case.problem.op, tuned.key(case.problem)
            tried = trials(case, programs, wanted.repeat)
            chosen = best(tried)
            text = _text(table)
            native.write_atomically(table, tuned.merged(text, here.kind, {name: chosen}).encode())
            kept.add(prints[name], _trial_record(case, tried, chosen))
            advance(1, f"{name[1]}: {chosen.path}")
    entries = tuned.read(_text(table))
    chosen_of = [entries[here.kind, *name] for name in problems]
    paths = Counter(chosen.path for chosen in chosen_of)
    counted = ", ".join(f"{count} {path}" for path, count in paths.most_common())
    packed = sum(chosen.packed is not None for chosen in chosen_of)
    if packed:
        counted += f"; {packed} more native where a weight has to stay packed"
    print(f"--tune: {len(problems)} shapes on {here} written to {table}: {counted}")


def problems_of(wanted: BenchKernelsSettings) -> dict[tuple[str, str], tuple[specs.Layer, int]]:
    """One layer and batch of each operation and key of the table.

    In the order of the batches, and then of the operations in all layers of the network.
    """
    first: dict[tuple[str, str], tuple[specs.Layer, int]] = {}
    work: Counter[tuple[str, str]] = Counter()
    for layer, batch in places(wanted):
        problem = layer.problem(batch, wanted.dtype)
        name = problem.op, tuned.key(problem)
        first.setdefault(name, (layer, batch))
        work[name] += operations_of(layer, batch, wanted)
    order = sorted(first, key=lambda name: (wanted.batch.index(first[name][1]), -work[name]))
    return {name: first[name] for name in order}


def _text(table: pathlib.Path) -> str:
    return table.read_text(encoding="utf-8") if table.exists() else tuned.EMPTY


def _trial_record(case: Case, tried: Sequence[Trial], chosen: tuned.Entry) -> dict[str, Any]:
    return {
        "op": case.problem.op,
        "key": tuned.key(case.problem),
        "x": list(case.operands.x.shape),
        "count": case.layer.count,
        **tuned.plain(chosen),
        "tried": [
            tuned.plain(one.entry) | {"seconds": one.seconds, "error": one.error, "why": one.why}
            for one in tried
        ],
    }


def tried_runs(case: Case) -> dict[tuned.Entry, Run]:
    """A decoded weight, and every path and schedule that runs here.

    Native code is compared with decoding in every call, too: without it that is what a CPU does
    with weights that have to stay packed.
    """
    runs = {tuned.DECODED: Run(case.dense, case.dense_operands)}
    for path, schedule in _entries(case, device.current()):
        function = functools.partial(case.scheduled, path=path, schedule=schedule)
        runs[tuned.Entry(path, schedule)] = Run(function, case.packed_operands(schedule))
    if NATIVE in runs:
        runs[IN_EVERY_CALL] = Run(case.packed, case.packed_operands(None))
    return runs


def trials(
    case: Case, programs: Mapping[tuned.Entry, Program | Exception], repeat: int
) -> list[Trial]:
    """Times a decoded weight, and every path and schedule that runs here.

    What does not compile, or has another result than a decoded weight, is passed over.

    Args:
      programs: of `tried_runs`.

    Raises:
      DoesNotFitError: if memory does not suffice, which says nothing about a schedule.
    """
    here, key = device.current(), tuned.key(case.problem)
    count, rounds = shares(case)
    dense = in_places(case.dense_operands, count)
    packed = in_places(case.operands, count)
    works: dict[tuned.Entry, Callable[[], list[jax.Array]]] = {}
    errors: dict[tuned.Entry, float] = {}
    passed: list[Trial] = []
    expected = None
    for entry, program in programs.items():
        try:
            if isinstance(program, Exception):
                raise program
            places = dense if entry == tuned.DECODED else _as_read(case, packed, entry.schedule)
            work = functools.partial(program, places)
            y = np.asarray(work()[-1], np.float64)
        except Exception as raised:  # whatever it is, there are others
            if "out of memory" in str(raised).lower():
                raise DoesNotFitError(
                    f"--tune: {count} copies of {case.problem.op} {key} do not fit the memory "
                    f"of {here}: {raised}; what was measured before is in the table"
                ) from raised
            if expected is None:  # a decoded weight, which all are compared with
                raise
            why = f"{type(raised).__name__}: {raised}"
            _log.info("%s: %s, %s is passed over: %s", key, entry.path, entry.schedule, why)
            passed.append(Trial(entry, None, None, why))
            continue
        expected = y if expected is None else expected
        error = relative_rms(y, expected)
        if not error <= (limit := TOLERANCES[case.problem.dtype]):
            why = f"result differs from a decoded weight's by {error:.2g}, limit {limit:g}"
            _log.warning("%s: %s, %s is passed over: %s", key, entry.path, entry.schedule, why)
            passed.append(Trial(entry, None, error, why))
            continue
        works[entry], errors[entry] = work, error
    medians = medians_in_turn(works, repeat)
    each = {entry: median / (count * rounds) for entry, median in medians.items()}
    return [*(Trial(entry, each[entry], errors[entry], None) for entry in works), *passed]


def _as_read(case: Case, places: list[AnyOperands], schedule: Schedule | None) -> list[AnyOperands]:
    """Operands in several places, with what kernels of a schedule read, in places of its own, too.

    Codes, which are most of them, are shared with other schedules.
    """
    one = case.packed_operands(schedule)
    own = in_places((one.bias_O, one.prepared), len(places))
    return [
        operands._replace(bias_O=bias_O, prepared=prepared)
        for operands, (bias_O, prepared) in zip(places, own)
    ]


def best(tried: Sequence[Trial]) -> tuned.Entry:
    """The path and schedule of least time, and what is best for a weight that stays packed."""
    seconds = {trial.entry: trial.seconds for trial in tried if trial.seconds is not None}
    in_every_call = seconds.pop(IN_EVERY_CALL, math.inf)
    fastest = min(seconds, key=seconds.__getitem__)
    if fastest == tuned.DECODED and seconds.get(NATIVE, math.inf) < in_every_call:
        return fastest._replace(packed=NATIVE.path)
    return fastest


def _entries(case: Case, here: device.Device) -> Iterator[tuple[str, Schedule | None]]:
    """Paths that run a case here, by schedule."""
    for path in KERNELS:
        unsupported, integer = case.ways.kernels[path].unsupported, case.problem.integer
        reasons = refusals_of(path, unsupported(case.problem), here, integer=integer)
        if reasons:
            _log.info("%s: no %s: %s", tuned.key(case.problem), path, "; ".join(reasons))
            continue
        on_gpu = () if path == "native" else candidates(case.problem, here.multiplies_tiles)
        for schedule in on_gpu or [None]:
            yield path, schedule


def show(found: Mapping[str, Any]) -> None:
    """Prints one row for each layer shape and batch, and `sums.of` them."""
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
        "of peak",
        "dense of peak",
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
            tables.percent(record["roofline_share"]),
            tables.percent(record["dense_roofline_share"]),
            f"{record['packed_bytes'] / 1e6:.3f}",
            f"{record['dense_bytes'] / 1e6:.3f}",
            f"{record['error']:.1g}",
            record["path"] if record["schedule"] is None else record["schedule"],
        )
    console = tables.wide_console()
    console.print(table)
    console.print(
        "ms: medians of rounds in which both ran in turn; of peak: least time for the bytes moved "
        f"and the\noperations counted, over the time taken. Peaks: {found['peaks']['source']}",
        style="dim",
    )
    warm = sum(not record["past_cache"] for record in found["records"])
    if warm:
        console.print(
            f"{warm} of {len(found['records'])} rows read less than {CACHES} times the cache in a "
            "round, which may flatter them",
            style="dim",
        )
    for one in found["sums"]:
        target = "" if one["target"] is None else f" (target {one['target']:g})"
        console.print(
            f"{one['layers']}, batch {one['batch']}: {1e3 * one['seconds']:,.1f} ms, dense "
            f"{1e3 * one['dense_seconds']:,.1f} ms, {one['ratio_to_dense']:.2f} x dense{target}; "
            f"weights {one['packed_bytes'] / 1e6:,.1f} MB, dense {one['dense_bytes'] / 1e6:,.1f} MB"
        )
