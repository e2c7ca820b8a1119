# SPDX-License-Identifier: Apache-2.0
"""Independent pieces of work: on all cores of a CPU, where most keep one busy, or all devices."""

import contextvars
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax

Item = TypeVar("Item")
Result = TypeVar("Result")


def at_once(device: Any = None, *, together: bool = True) -> int:
    """Returns how many calls of one program a device is given at a time.

    On a CPU as many as it has cores, on other devices one: there programs follow each other anyhow.

    Args:
      device: default: the one that programs run on by default.
      together: False makes it one everywhere, for programs that keep all cores busy by themselves,
        or take much memory.
    """
    device = device or _default_device()
    return (os.cpu_count() or 1) if device.platform == "cpu" and together else 1


def each(work: Callable[[Item], Result], items: Iterable[Item], device: Any = None) -> list[Result]:
    """Calls `work` for every item, and returns the results in their order; see `in_order`."""
    return list(in_order(work, items, device))


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    device: Any = None,
    *,
    together: bool = True,
) -> Iterator[Result]:
    """Calls `work` for every item, and yields the results in their order as they are there.

    Args:
      work: dispatches programs to the device; pure. Calls run at the same time, `at_once` of them.
      device, together: see `at_once`.
    """
    items = list(items)
    device = device or _default_device()
    workers = min(at_once(device, together=together), len(items))
    if workers < 2:
        yield from map(work, items)
        return
    yield from _in_threads(as_here(work, device), items, workers)


def placed(params: Any) -> dict[Any, Any]:
    """Returns a copy of the arrays for each device of this process, by device.

    Where the caller chose a default device, that one alone.
    """
    chosen = getattr(jax.config, "jax_default_device", None)
    devices = [_default_device()] if chosen is not None else jax.local_devices()
    return {device: jax.device_put(params, device) for device in devices}


def over_devices(
    work: Callable[[Any, Item], Result],
    items: Iterable[Item],
    places: Mapping[Any, Any],
    *,
    together: bool = True,
) -> Iterator[Result]:
    """Calls `work` for every item, dealt to devices in turn, and yields the results in their order.

    Args:
      work: takes what is placed on a device, and an item; dispatches programs to that device, which
        is the default one meanwhile; pure.
      places: what `placed` returns.
      together: see `at_once`.
    """
    there = {device: as_here(work, device) for device in places}
    turns = list(zip(items, itertools.cycle(places.items())))

    def call(turn: tuple[Item, tuple[Any, Any]]) -> Result:
        item, (device, params) = turn
        return there[device](params, item)

    workers = min(sum(at_once(device, together=together) for device in places), len(turns))
    if workers < 2:
        yield from map(call, turns)
        return
    yield from _in_threads(call, turns, workers)


def _in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from pool.map(lambda item: jax.block_until_ready(work(item)), items)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def beside(work: Callable[[], Result]) -> Callable[[], Result]:
    """Begins `work` in a thread of its own, and returns what waits for its result.

    For programs to compile while others run: compiling keeps one core busy, and most networks leave
    a part of the others idle.

    Args:
      work: runs on the default device; what it raises, `beside(work)()` raises.
    """
    pool = ThreadPoolExecutor(1)
    future = pool.submit(as_here(work))
    pool.shutdown(wait=False)
    return future.result


def _default_device() -> Any:
    wanted = getattr(jax.config, "jax_default_device", None)
    return wanted if isinstance(wanted, jax.Device) else jax.local_devices()[0]


def as_here(work: Callable[..., Result], device: Any = None) -> Callable[..., Result]:
    """Returns the work with the settings of the calling thread, which others do not see.

    Args:
      device: default: the one that programs run on by default.
    """
    device = device or _default_device()
    precision = getattr(jax.config, "jax_default_matmul_precision", None)
    context = contextvars.copy_context()  # which kernels were asked for, among others

    def placed(*items: Any) -> Result:
        with jax.default_device(device), jax.default_matmul_precision(precision):
            return work(*items)

    return lambda *items: context.copy().run(placed, *items)
