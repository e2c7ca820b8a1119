# SPDX-License-Identifier: Apache-2.0
"""Which implementation answers: one choice per problem, with its reason, logged once.

A path is a way to run an operation: "pallas", "triton", "lut" (lookup tables), and "xla", which
always can. `auto` takes what was measured best on this kind of device (`kernels.tuned`), and else
the first path that can run; lookup tables only run where they are asked for. The choice is made
when a function is traced: `VQJAX_KERNELS` has to be set before, or `asking` to be entered.
"""

import contextlib
import contextvars
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax

from vqjax.errors import VqjaxError
from vqjax.kernels import pallas_gpu, schedule, tuned
from vqjax.kernels.device import Device, current
from vqjax.kernels.lut_matmul import counts
from vqjax.kernels.problem import Operands, Problem
from vqjax.kernels.schedule import Schedule

VARIABLE = "VQJAX_KERNELS"
WANTED = ("auto", "xla", "pallas", "triton", "lut")
NO_TRITON = "this release has no jax-triton kernels"

_log = logging.getLogger("vqjax.kernels")
_asked: contextvars.ContextVar[str | None] = contextvars.ContextVar("asked", default=None)

Refusals = Mapping[str, list[str]]
"""Why a path cannot run a problem, by path; no reasons where it can. In the order of preference."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Attributes:
    path: "xla", "pallas", "triton" or "lut".
    schedule: of a GPU kernel; None for "xla" and "lut".
    why: what decided.
    """

    path: str
    schedule: Schedule | None
    why: str


_LOOKUP = Choice("lut", None, f"{VARIABLE}=lut")


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


def only_xla() -> bool:
    """Returns whether every problem would be given to XLA: nothing has to be traced to know."""
    name = wanted()
    return name == "xla" or (name == "auto" and current().refuses_pallas() is not None)


def choose(problem: Problem, refusals: Refusals, device: Device) -> Choice:
    """Decides how a problem runs on a device.

    Raises:
      VqjaxError: if `VQJAX_KERNELS` names a path that cannot run it; every reason is listed. Lookup
        tables can run everything: where they save nothing, XLA answers.
    """
    name = wanted()
    if name == "lut":
        saves_nothing = counts.refusal(problem)
        choice = Choice("xla", None, saves_nothing) if saves_nothing else _LOOKUP
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
    if measured and measured[0] in candidates:
        return _logged(problem, device, Choice(*measured, f"measured on {device.kind}"))
    path = candidates[0]
    if name != "auto":
        why = f"{VARIABLE}={name}"
    elif path == "xla":
        why = "; ".join(f"no {other}: {', '.join(found)}" for other, found in refusals.items())
    else:
        why = "it can run here"
    made = None if path == "xla" else schedule.by_rule(problem)
    return _logged(problem, device, Choice(path, made, why))


def _logged(problem: Problem, device: Device, choice: Choice) -> Choice:
    kinds = {"lut": "tables, then sums", "xla": "decode, then multiply"}
    kind = choice.schedule.kind if choice.schedule else kinds[choice.path]
    _log_once(f"{problem.op} on {device}: {choice.path} ({kind}): {choice.why}")
    return choice


@functools.cache
def _log_once(line: str) -> None:
    _log.info(line)


class Implementations(NamedTuple):
    """What there is to run one operation.

    Attributes:
      unsupported: why no device can run a problem in Pallas.
      compile_small: compiles Pallas kernels like those of a problem; raises if they do not compile.
      pallas: the kernel.
      lookup: the same by lookup tables.
      reference: the definition.
    """

    unsupported: Callable[[Problem], list[str]]
    compile_small: Callable[[Problem], object]
    pallas: Callable[[Operands, Schedule], jax.Array]
    lookup: Callable[[Operands], jax.Array]
    reference: Callable[[Operands], jax.Array]


def decide(problem: Problem, ways: Implementations) -> Choice:
    """Returns what `run` would do with a problem; a small kernel is compiled where there is one."""
    device = current()
    refusals = pallas_refusals(ways.unsupported(problem), device)
    if not refusals and wanted() not in ("xla", "lut"):
        refusals += _failed_trial(ways.compile_small, problem.kind_of_kernel(), device)
    return choose(problem, {"pallas": refusals, "triton": [NO_TRITON]}, device)


def run(problem: Problem, operands: Operands, ways: Implementations) -> jax.Array:
    """Runs an operation on the path that is chosen for it."""
    choice = decide(problem, ways)
    made = choice.schedule
    if made is None:
        return (ways.lookup if choice.path == "lut" else ways.reference)(operands)

    def kernel(operands: Operands) -> jax.Array:
        return ways.pallas(operands, made)

    if wanted() == choice.path:
        return kernel(operands)  # what was asked for by name is not replaced in silence
    # A computation may still be sent to another device than the default one.
    return jax.lax.platform_dependent(operands, cuda=kernel, default=ways.reference)


def pallas_refusals(unsupported: list[str], device: Device) -> list[str]:
    """Returns every reason against Pallas: of the problem and of the device."""
    refused = device.refuses_pallas()
    return [*unsupported, *([refused] if refused else [])]


def overview() -> list[tuple[str, str]]:
    """Returns each path by name, whether it runs on the default device, and what was asked for."""
    device = current()
    missing = [pallas_gpu.MISSING] if pallas_gpu.MISSING else []
    refused = "; ".join(pallas_refusals(missing, device))
    return [
        ("XLA decode, then multiply", f"yes, on {device}"),
        ("Pallas kernels", f"no: {refused}" if refused else f"yes, on {device}"),
        ("Triton kernels", f"no: {NO_TRITON}"),
        ("Lookup tables", f"yes, where {VARIABLE}=lut asks for them"),
        (VARIABLE, wanted()),
    ]


@functools.cache
def _failed_trial(
    compile_small: Callable[[Problem], object], small: Problem, device: Device
) -> tuple[str, ...]:
    """What a small kernel that does not compile says: it would come too late from a whole model."""
    try:
        compile_small(small)
    except Exception as error:  # whatever it is, there is another path
        text = str(error).strip().splitlines() or [""]
        return (f"a small kernel does not compile on {device} ({type(error).__name__}: {text[0]})",)
    return ()
