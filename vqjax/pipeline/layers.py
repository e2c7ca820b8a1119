# SPDX-License-Identifier: Apache-2.0
"""The same work for every layer, spread over processes, devices and threads.

A layer's result depends on its own arguments alone, and each is made wholly on one device: who
made it, beside what and in which order, does not show in the bytes.
"""

import concurrent.futures
import heapq
import os
import queue
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vqjax import progress
from vqjax.core import cores
from vqjax.core.host import to_device
from vqjax.errors import about
from vqjax.pipeline.journal import Journal

CPU_WORKERS = 4  # layers searched side by side; each has its own arrays, so more cost memory

Work = Callable[[str, Any], Any]
"""`work(path, argument)`; a second call finds the piece that the first left in the journal."""


def each_layer(
    title: str,
    work: Work,
    arguments: Mapping[str, Any],
    note: Callable[[str, Any], str],
    *,
    journal: Journal,
    piece: Callable[[str], str],
    costs: Mapping[str, float],
    alike: Callable[[str], Hashable] = lambda path: path,
    workers: int | None = None,
) -> dict[str, Any]:
    """Returns `work(path, arguments[path])` for every layer, in the order of `arguments`.

    Args:
      title: for the progress shown.
      work: must store what it made in the journal as `piece(path)`.
      note: shown beside the progress when a layer is done.
      costs: how long each layer takes, in any unit: the longest go first, and processes get
        equal sums.
      alike: equal for layers that share compiled programs. One of them goes first and compiles.
      workers: layers side by side in this process; default: `side_by_side()`.

    Raises:
      VqjaxError: of `work`, or if another process died before its layers were done.
    """
    team = journal.team
    parts = shares({path: costs[path] for path in arguments}, team.count)
    results: dict[str, Any] = {}
    with progress.stage(title, len(arguments), quiet=not team.leads) as advance:

        def done(path: str, result: Any) -> None:
            results[path] = result
            advance(1, note(path, result))

        _on_devices(work, parts[team.index], arguments, alike, workers or side_by_side(), done)
        for index, paths in enumerate(parts):
            for path in paths if index != team.index else ():
                journal.wait_for(piece(path), (index,))
                done(path, work(path, arguments[path]))
    return {path: results[path] for path in arguments}


def side_by_side() -> int:
    """Layers that one process works on at a time.

    One on each accelerator. On a CPU a few, since neither compilation nor the search of one layer
    keeps all cores busy.
    """
    devices = len(jax.local_devices())
    if jax.default_backend() != "cpu":
        return devices
    return max(devices, min(os.cpu_count() or 1, CPU_WORKERS))


def shares(costs: Mapping[str, float], count: int) -> list[list[str]]:
    """Splits layers among `count` processes: longest first, each to who has least so far.

    Every process comes to the same split by itself. (R. L. Graham, "Bounds on multiprocessing
    timing anomalies", 1969: at most 4/3 of the best possible time.)
    """
    loads = [(0.0, index) for index in range(count)]
    parts: list[list[str]] = [[] for _ in range(count)]
    for path in sorted(costs, key=lambda path: (-costs[path], path)):
        load, index = heapq.heappop(loads)
        parts[index].append(path)
        heapq.heappush(loads, (load + costs[path], index))
    return parts


def _on_devices(
    work: Work,
    paths: Sequence[str],
    arguments: Mapping[str, Any],
    alike: Callable[[str], Hashable],
    workers: int,
    done: Callable[[str, Any], None],
) -> None:
    """Calls `done(path, work(path, argument))` for `paths`, `workers` layers at a time."""
    free: queue.SimpleQueue = queue.SimpleQueue()
    devices = jax.local_devices()
    for worker in range(workers):
        free.put(devices[worker % len(devices)])

    @cores.as_here
    def one(path: str) -> Any:
        device = free.get()
        try:
            with jax.default_device(device), about(path):
                return _unplaced(work(path, arguments[path]))
        finally:
            free.put(device)

    waiting, running, compiled = list(paths), {}, set()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    path = _next(waiting, {alike(p) for p in running.values()} - compiled, alike)
                    running[pool.submit(one, path)] = path
                finished, _ = concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in finished:
                    path = running.pop(future)
                    compiled.add(alike(path))
                    done(path, future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _next(waiting: list[str], compiling: set[Hashable], alike: Callable[[str], Hashable]) -> str:
    """Takes the first layer whose programs nobody is compiling just now, or else the first."""
    chosen = next((path for path in waiting if alike(path) not in compiling), waiting[0])
    waiting.remove(chosen)
    return chosen


def _unplaced(result: Any) -> Any:
    """The same arrays, as if made on the default device."""
    home = jax.local_devices()[0]

    def move(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and leaf.devices() != {home}:
            with jax.default_device(home):
                return to_device(np.asarray(leaf))
        return leaf

    return jax.tree.map(move, result)
