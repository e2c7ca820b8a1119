# SPDX-License-Identifier: Apache-2.0
"""Time with compilation apart, and time by stage."""

import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import jax

from vqjax.core import cores

Item = TypeVar("Item")
Result = TypeVar("Result")
Name = TypeVar("Name", bound=Hashable)

_COMPILATION = "/jax/core/compile/"  # prefix of the events for tracing, lowering and compiling
_ATTEMPTS = 4


class CompileClock:
    """Seconds that this thread's process spent on making programs, since the clock was made."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if not event.startswith(_COMPILATION):
            return
        end = time.perf_counter()
        start = end - duration_secs
        # Tracing one program traces those inside it: the outer event comes last and holds theirs.
        while self._spans and self._spans[-1][1] > start:
            start = min(start, self._spans.pop()[0])
        self._spans.append((start, end))

    @property
    def seconds(self) -> float:
        """Time so far."""
        return sum(end - start for start, end in self._spans)


def compiled_seconds(work: Callable[[], Result], clock: CompileClock) -> tuple[Result, float]:
    """Runs `work` until a run needs no new program; returns its result and that run's seconds.

    Args:
      work: gives the same result each time.
    """
    attempt = 0
    while True:
        attempt += 1
        before, start = clock.seconds, time.perf_counter()
        result = jax.block_until_ready(work())
        seconds = time.perf_counter() - start
        if clock.seconds == before or attempt == _ATTEMPTS:
            return result, seconds


def together(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Calls `work`, which compiles, for all items side by side, whatever they are compiled for.

    `cores.each` is for programs that run, and gives a GPU one at a time.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(cores.as_here(work), items))


class Cost(NamedTuple):
    """What a work took: seconds by the clock, and those of all processors together.

    The latter hardly depend on what else the machine does.
    """

    seconds: float
    processor_seconds: float


def medians_in_turn(works: Mapping[Name, Callable[[], object]], repeat: int) -> dict[Name, float]:
    """Median seconds of several works that run in turn, after a round that compiles."""
    return {name: cost.seconds for name, cost in costs_in_turn(works, repeat).items()}


def costs_in_turn(
    works: Mapping[Name, Callable[[], object]], repeat: int, *, warm_up: bool = True
) -> dict[Name, Cost]:
    """Median costs of several works that run in turn.

    Args:
      warm_up: run all once before, since something has to be compiled.
    """
    costs: dict[Name, list[Cost]] = {name: [] for name in works}
    for attempt in range(repeat + warm_up):
        for name, work in works.items():
            start = Cost(time.perf_counter(), time.process_time())
            jax.block_until_ready(work())
            if attempt >= warm_up:
                end = Cost(time.perf_counter(), time.process_time())
                costs[name].append(Cost(*(after - before for after, before in zip(end, start))))
    return {
        name: Cost(*(statistics.median(values) for values in zip(*found)))
        for name, found in costs.items()
    }


class StageClock:
    """Seconds by stage, compilation apart.

    Attributes:
      seconds: by stage; "compile" is one of them once anything was compiled.
      rounds: how often each stage ended.
    """

    def __init__(self, clock: CompileClock) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.rounds: Counter[str] = Counter()
        self._clock = clock
        self._last, self._compiled = time.perf_counter(), clock.seconds

    def end(self, stage: str) -> None:
        """Counts the time since the last call to `stage`, once all its arrays are computed."""
        jax.block_until_ready(jax.live_arrays())
        now, compiled = time.perf_counter(), self._clock.seconds
        self.seconds[stage] += max(0.0, now - self._last - (compiled - self._compiled))
        self.seconds["compile"] += compiled - self._compiled
        self.rounds[stage] += 1
        self._last, self._compiled = now, compiled
