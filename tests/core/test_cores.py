# SPDX-License-Identifier: Apache-2.0
"""Calls at the same time: their order, their settings, and what becomes of errors."""

import os
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from vqjax.core import cores
from vqjax.kernels import dispatch


def test_results_come_in_the_order_of_the_items():
    def work(number: int) -> int:
        time.sleep(0.02 if number == 0 else 0.0)  # the first ends last
        return 2 * number

    assert list(cores.in_order(work, iter(range(6)))) == [0, 2, 4, 6, 8, 10]
    assert list(cores.in_order(work, [])) == []


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_calls_run_at_the_same_time_unless_told_otherwise():
    together = threading.Barrier(2)
    cores.each(lambda _: together.wait(timeout=20), range(2))

    here = threading.get_ident()
    found = cores.in_order(lambda _: threading.get_ident(), range(3), together=False)
    assert list(found) == [here] * 3
    assert cores.at_once(together=False) == 1


def test_threads_have_the_settings_of_the_caller():
    def work(_: int) -> str:
        return str(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 2)), jnp.ones((2, 2))))

    with jax.default_matmul_precision("highest"):
        assert all("HIGHEST" in found for found in cores.each(work, range(2)))


def test_threads_ask_for_the_kernels_of_the_caller():
    with dispatch.asking("lut"):
        assert cores.each(lambda _: dispatch.wanted(), range(2)) == ["lut"] * 2
        later = cores.beside(dispatch.wanted)
    assert later() == "lut"


def test_work_runs_where_programs_run_by_default():
    device = jax.local_devices()[-1]
    with jax.default_device(device):
        found = cores.each(lambda _: jnp.ones(2), range(2))
    assert all(array.devices() == {device} for array in found)


def test_an_error_ends_the_work():
    done = []

    def work(number: int) -> None:
        if number == 0:
            raise ValueError("no")
        time.sleep(0.01)
        done.append(number)

    with pytest.raises(ValueError, match="no"):
        list(cores.in_order(work, range(100)))
    assert len(done) < 50
