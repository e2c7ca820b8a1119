# SPDX-License-Identifier: Apache-2.0
"""Which implementation answers: one choice per problem, with its reason, logged once.

A path is a way to run an operation: "pallas", "triton", "native" (lookup tables in native code),
"lut" (in XLA), and "xla", which always can. On a GPU `auto` takes what was measured best on this
kind of device (`kernels.tuned`), and else Pallas where it can run, and else XLA. Triton, and native
code on a CPU, it takes only where they were measured to win. Whether a weight is better decoded
once, when a model is loaded, is what was measured, too (`Choice.keeps`); without a measurement it
is on a CPU, and stays packed on a GPU. Tables in XLA are taken only where they are asked for. The
choice is made when a function is traced: `VQJAX_KERNELS` has to be set before, or `asking` to be
entered.
"""

import contextlib
import contextvars
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from vqjax.errors import VqjaxError
from vqjax.kernels import gpu_arrays, pallas_gpu, schedule, triton_gpu, tuned
from vqjax.kernels.books import Books, books_for
from vqjax.kernels.device import Device, current
from vqjax.kernels.lut_matmul import counts, native
from vqjax.kernels.problem import Problem
from vqjax.kernels.schedule import Schedule
from vqjax.kernels.vq_conv import window

VARIABLE = "VQJAX_KERNELS"
WANTED = ("auto", "xla", "pallas", "triton", "native", "lut")
KERNELS = ("pallas", "triton", "native")
"""Paths that are code of ours, in the order of preference."""

PLATFORMS = {"pallas": "cuda", "triton": "cuda", "native": "cpu"}
"""Where kernels run, as XLA names it."""

MEASURED = ("triton", "native")
"""Kernels that `auto` takes where they were measured to be fastest, and only there."""

UNMEASURED = "it is taken by name, or where it was measured to be fastest"


def _unread_by_gpus(problem: Problem) -> list[str]:
    return gpu_arrays.unread(problem) + (window.unread(problem) if problem.op == "vq_conv" else [])


_UNREAD = {"pallas": _unread_by_gpus, "triton": _unread_by_gpus, "native": native.unsupported}

_log = logging.getLogger("vqjax.kernels")
_asked: contextvars.ContextVar[str | None] = contextvars.ContextVar("asked", default=None)

Refusals = Mapping[str, list[str]]
"""Why a path cannot run a problem, by path; no reasons where it can. In the order of preference."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Attributes:
    path: "xla", "pallas", "triton", "native" or "lut".
    schedule: of a GPU kernel; None for others.
    why: what decided.
    keeps: whether the weight is better left packed than decoded at load.
    books: how a GPU kernel looks vectors up, which a sampler prepares; None for others.
    bias_dtype: `schedule.bias_dtype`.
    """

    path: str
    schedule: Schedule | None
    why: str
    keeps: bool
    books: Books | None = None
    bias_dtype: str = "float32"


_LOOKUP = Choice("lut", None, f"{VARIABLE}=lut", keeps=True)


def wanted() -> str:
    """Returns what `asking` or else `VQJAX_KERNELS` asks for, "auto" where neither does.

    Raises:
      VqjaxError: if it is none of `WANTED`.
    """
    name = _asked.get() or os.environ.get(VARIABLE) or "auto"
    if name not in WANTED:
        raise VqjaxError(f"{VARIABLE}={name}, expected one of {', '.join(WANTED)}")
    return name


@contextlib.contextmanager
def asking(name: str) -> Iterator[None]:
    """Asks for a path in place of `VQJAX_KERNELS`, for functions that are traced inside."""
    token = _asked.set(name)
    try:
        wanted()
        yield
    finally:
        _asked.reset(token)


def keeps_none() -> bool:
    """Returns whether no weight is better left packed: nothing has to be traced to know."""
    name, device = wanted(), current()
    if name == "auto":
        return device.refuses("pallas") is not None and not tuned.knows(device.kind)
    return name == "xla"


def choose(problem: Problem, refusals: Refusals, device: Device) -> Choice:
    """Decides how a problem runs on a device.

    Raises:
      VqjaxError: if `VQJAX_KERNELS` names a path that cannot run it; every reason is listed. Tables
        and kernels are for a part of a network's layers: where tables save nothing ("lut"), or
        kernels do not read a layer's codes, XLA answers.
    """
    name = wanted()
    runs = name in _UNREAD and not device.refuses(name, integer=problem.integer)
    unread = _UNREAD[name](problem) if runs else []
    if unread:
        return _logged(problem, device, Choice("xla", None, "; ".join(unread), keeps=False))
    if name == "lut":
        saves_nothing = counts.refusal(problem)
        choice = Choice("xla", None, saves_nothing, keeps=False) if saves_nothing else _LOOKUP
        return _logged(problem, device, choice)
    if refusals.get(name):
        reasons = "; ".join(refusals[name])
        raise VqjaxError(
            f"{VARIABLE}={name}, but {problem.op} ({tuned.key(problem)}) cannot run there: "
            f"{reasons}. Unset {VARIABLE}, or set it to auto or xla"
        )
    able = [path for path, reasons in refusals.items() if not reasons] + ["xla"]
    candidates = able if name == "auto" else [name]
    measured = tuned.find(device.kind, problem)
    fastest = _packed_path(measured)
    if fastest in candidates:
        path = fastest
        why = f"measured on {device.kind}"
    else:
        path = candidates[0]
        if name != "auto":
            why = f"{VARIABLE}={name}"
        elif path == "xla":
            why = "; ".join(f"no {other}: {', '.join(found)}" for other, found in refusals.items())
        else:
            why = "it can run here"
    made = _schedule(path, problem, device)
    # Packed they take less memory, too: they stay so unless that was measured to be slower.
    slower = measured is not None and measured.path == "xla"
    keeps = path != "xla" and (name == path or not slower)
    books = books_for(problem, staged=made.kind == "staged") if made else None
    biases = schedule.bias_dtype(problem, made)
    return _logged(problem, device, Choice(path, made, why, keeps, books, biases))


def _packed_path(measured: tuned.Entry | None) -> str | None:
    """The kernel that was measured to be fastest for a weight that stays packed, if that was."""
    if measured is None:
        return None
    return measured.packed if measured.path == "xla" else measured.path


def _logged(problem: Problem, device: Device, choice: Choice) -> Choice:
    tables = "tables, then sums"
    kinds = {"lut": tables, "native": tables, "xla": "decode, then multiply"}
    kind = choice.schedule.kind if choice.schedule else kinds[choice.path]
    _log_once(f"{problem.op} on {device}: {choice.path} ({kind}): {choice.why}")
    return choice


@functools.cache
def _log_once(line: str, level: int = logging.INFO) -> None:
    _log.log(level, line)


class Kernel(NamedTuple):
    """Code of ours that runs an operation.

    Attributes:
      unsupported: why no device can run a problem; nothing if some can.
      trial: runs a problem of one tile by its schedule; raises if the kernel does not compile, or
        gives other numbers than the definition.
      run: the operation, on a GPU by a schedule.
    """

    unsupported: Callable[[Problem], list[str]]
    trial: Callable[[Problem, Any], object]
    run: Callable[[Any, Schedule | None], jax.Array]


class Implementations(NamedTuple):
    """What there is to run one operation.

    Attributes:
      kernels: by path, all of `KERNELS`.
      lookup: the same by lookup tables.
      reference: the definition.
    """

    kernels: Mapping[str, Kernel]
    lookup: Callable[[Any], jax.Array]
    reference: Callable[[Any], jax.Array]


def decide(problem: Problem, ways: Implementations) -> Choice:
    """Returns what `run` would do with a problem; where there is a kernel, one tile is tried."""
    device = current()
    if not problem.rows:
        return Choice("xla", None, "nothing to multiply", keeps=False)
    refusals = {
        path: _refusals(path, kernel, problem, device) for path, kernel in ways.kernels.items()
    }
    return choose(problem, refusals, device)


def _refusals(path: str, kernel: Kernel, problem: Problem, device: Device) -> list[str]:
    """Every reason where the path was named; else the first, before packages are imported."""
    name = wanted()
    if name not in ("auto", path):
        return [f"{VARIABLE}={name}"]
    if name == "auto":
        refused = device.refuses(path, integer=problem.integer)
        if path in MEASURED and _packed_path(tuned.find(device.kind, problem)) != path:
            refused = refused or UNMEASURED
        if refused:
            return [refused]
    found = refusals_of(path, kernel.unsupported(problem), device, integer=problem.integer)
    if not found:
        tried = schedule.one_tile(problem, _schedule(path, problem, device))
        found += _failed_trial(kernel.trial, *tried, device)
    return found


def _schedule(path: str, problem: Problem, device: Device) -> Schedule | None:
    """How a GPU kernel would run a problem; None for other paths."""
    measured = tuned.find(device.kind, problem)
    if measured and measured.path == path:
        return measured.schedule
    if PLATFORMS.get(path) != "cuda":
        return None
    return schedule.by_rule(problem, device.multiplies_tiles)


def run(problem: Problem, operands: Any, ways: Implementations) -> jax.Array:
    """Runs an operation on the path that is chosen for it."""
    choice = decide(problem, ways)
    if choice.path not in ways.kernels:
        return (ways.lookup if choice.path == "lut" else ways.reference)(operands)

    def kernel(operands: Any) -> jax.Array:
        return ways.kernels[choice.path].run(operands, choice.schedule)

    if wanted() == choice.path:
        return kernel(operands)  # what was asked for by name is not replaced in silence
    # A computation may still be sent to another device than the default one.
    here = {PLATFORMS[choice.path]: kernel}
    return jax.lax.platform_dependent(operands, default=ways.reference, **here)


def refusals_of(
    path: str, unsupported: list[str], device: Device, *, integer: bool = False
) -> list[str]:
    """Returns every reason against a kernel: of the problem and of the device.

    Args:
      integer: as `Device.refuses` takes it.
    """
    refused = device.refuses(path, integer=integer)
    return [*unsupported, *([refused] if refused else [])]


def rules() -> str:
    """Returns what decides paths on the default device beside the problem: what was asked for, and
    the digest of what was measured."""
    return " ".join(filter(None, (wanted(), tuned.digest(current().kind))))


def overview() -> list[tuple[str, str]]:
    """Returns each path by name, whether it runs on the default device, and what was asked for."""
    device = current()
    missing = {
        "pallas": pallas_gpu.MISSING,
        "triton": triton_gpu.missing(),
        "native": None if device.refuses("native") else native.missing(),
    }
    found = {
        path: "; ".join(refusals_of(path, [reason] if reason else [], device))
        for path, reason in missing.items()
    }
    return [
        ("XLA decode, then multiply", f"yes, on {device}"),
        (
            "Pallas kernels",
            f"no: {found['pallas']}" if found["pallas"] else f"yes, on {device}",
        ),
        (
            "Triton kernels",
            f"no: {found['triton']}" if found["triton"] else f"yes, on {device}: {UNMEASURED}",
        ),
        (
            "Lookup tables, native",
            f"no: {found['native']}"
            if found["native"]
            else f"yes, {native.instructions()}, on {device}: {_measured(device)}",
        ),
        ("Lookup tables in XLA", f"yes, where {VARIABLE}=lut asks for them"),
        (VARIABLE, wanted()),
    ]


def _measured(device: Device) -> str:
    found = tuned.found_on(device.kind)
    if not found:
        return f"{UNMEASURED} ({tuned.COMMAND})"
    best = sum(entry.path == "native" for entry in found)
    packed = sum(entry.packed == "native" for entry in found)
    return (
        f"of {len(found)} problems measured to be fastest for {best}, and of weights that have to "
        f"stay packed for {packed} more"
    )


@functools.cache
def _failed_trial(
    trial: Callable[[Problem, Any], object], small: Problem, made: Schedule | None, device: Device
) -> tuple[str, ...]:
    """What is wrong with a kernel, tried on one tile: it would come too late from a whole model."""
    try:
        trial(small, made)
    except Exception as error:  # whatever it is, there is another path
        text = str(error).strip().splitlines() or [""]
        of = f"a kernel ({made})" if made else "native code"
        why = f"{of} fails on {device} ({type(error).__name__}: {text[0]})"
        _log_once(f"kernels are passed over: {why}", logging.WARNING)
        return (why,)
    return ()
