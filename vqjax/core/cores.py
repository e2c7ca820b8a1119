# SPDX-License-Identifier: Apache-2.0
"""Independent pieces of work on all cores of a CPU: most of ours keep one core busy."""

import contextvars
import os
from collections.abc import Callable, Iterable, Iterator
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
    work = as_here(work, device)
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
