# SPDX-License-Identifier: Apache-2.0
"""Compilation is told apart from work."""

import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.bench import clock as clocks
from vqjax.bench.clock import CompileClock, StageClock, compiled_seconds


class Wound:
    """Time as a test says it, in place of the module: what passes for work, and for compilation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr(clocks, "time", types.SimpleNamespace(perf_counter=lambda: self.now))
        self.clock = CompileClock()

    def work(self, seconds: float) -> None:
        self.now += seconds

    def compile(self, seconds: float) -> None:
        self.now += seconds
        self.clock._hear("/jax/core/compile/backend_compile_duration", seconds)


@pytest.fixture
def wound(monkeypatch):
    return Wound(monkeypatch)


def fresh():
    """A program that nothing has compiled yet."""
    return jax.jit(lambda x: jnp.sin(x) + jax.jit(jnp.cos)(x))


def test_only_new_programs_count():
    clock, program, x = CompileClock(), fresh(), jnp.ones(3)
    start, before = time.perf_counter(), clock.seconds
    program(x).block_until_ready()
    first = clock.seconds
    assert 0 < first - before <= time.perf_counter() - start  # nested tracing is not counted twice
    program(x).block_until_ready()
    assert clock.seconds == first


def test_nested_programs_count_once(wound):
    start = wound.now
    wound.compile(1)
    wound.work(2)
    wound.compile(3)
    outer = wound.now - start  # of an event that comes last and holds all three
    wound.clock._hear("/jax/core/compile/jaxpr_trace_duration", outer)
    wound.clock._hear("/jax/checkpoint/write_duration", 100)
    assert wound.clock.seconds == 6


def test_work_that_compiles_is_run_again(wound):
    calls = []

    def work():
        calls.append(wound.now)
        if len(calls) == 1:
            wound.compile(10)
        wound.work(2)
        return np.zeros(5)

    result, seconds = compiled_seconds(work, wound.clock)
    assert calls == [0, 12]
    assert seconds == 2
    assert result.shape == (5,)
    compiled_seconds(work, wound.clock)
    assert len(calls) == 3


def test_stages_add_up_without_compilation(wound):
    stages = StageClock(wound.clock)
    for seconds in (4, 0):
        wound.work(1)
        wound.compile(seconds)
        stages.end("search")
    wound.work(5)
    stages.end("store")
    assert stages.rounds == {"search": 2, "store": 1}
    assert stages.seconds == {"search": 2, "compile": 4, "store": 5}
    assert sum(stages.seconds.values()) == wound.now
