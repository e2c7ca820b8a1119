# SPDX-License-Identifier: Apache-2.0
"""Compilation is told apart from work."""

import time

import jax
import jax.numpy as jnp

from vqjax.bench.clock import CompileClock, StageClock, compiled_seconds


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


def test_work_that_compiles_is_run_again():
    clock, program, x, calls = CompileClock(), fresh(), jnp.ones(5), []

    def work():
        calls.append(clock.seconds)
        return program(x)

    result, seconds = compiled_seconds(work, clock)
    assert len(calls) == 2
    assert calls[1] > calls[0]
    assert seconds < calls[1] - calls[0]
    assert result.shape == (5,)
    compiled_seconds(work, clock)
    assert len(calls) == 3


def test_stages_add_up_without_compilation():
    clock, program, x = CompileClock(), fresh(), jnp.ones(7)
    start = time.perf_counter()
    stages = StageClock(clock)
    for _ in range(2):
        program(x)
        stages.end("search")
    stages.end("store")
    assert stages.rounds == {"search": 2, "store": 1}
    assert stages.seconds["compile"] > stages.seconds["search"]
    assert sum(stages.seconds.values()) <= time.perf_counter() - start
