# SPDX-License-Identifier: Apache-2.0
"""Many samples of one model, in shards on disk, on all devices of this process.

A shard is one compiled batch and is made wholly on one device, so its bytes depend neither on the
other devices nor on where an earlier run stopped.
"""

import concurrent.futures
import dataclasses
import queue

import jax
import numpy as np

from vqjax import progress, sampling
from vqjax.core import cores
from vqjax.core.model import Model
from vqjax.io.image_shards import Shards
from vqjax.kernels import dispatch
from vqjax.sampling.weights import place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """How pictures are sampled; twins share it."""

    steps: int
    guidance: float
    eta: float
    seed: int


def sample(
    model: Model, labels_N: np.ndarray, shards: Shards, protocol: Protocol, title: str
) -> None:
    """Makes the shards that are missing.

    Args:
      labels_N: class of every picture, those of finished shards included.
      title: for the progress shown.

    Raises:
      VqjaxError: for classes, steps or eta that the model cannot do.
    """
    config, missing = model.config, shards.missing()
    run = sampling.Run(
        protocol.steps, protocol.guidance, protocol.eta, "float32", dispatch.wanted()
    )
    sampling.check(config, labels_N, run, seed=protocol.seed, batch_size=shards.shard)
    free: queue.SimpleQueue = queue.SimpleQueue()
    rows = sampling.rows(config, shards.shard, run.guidance)
    for device in jax.local_devices() if missing else ():
        with jax.default_device(device):  # once for all shards
            there = jax.device_put(model.params, device)
            placed = place(config, there, rows=rows, dtype=run.dtype)
            del there  # what was decoded needs its codes no longer
        for _ in range(cores.at_once(device, together=config.small)):
            free.put((device, placed))

    @cores.as_here
    def one(number: int) -> int:
        pictures = shards.pictures_of(number)
        device, placed = free.get()
        try:
            with jax.default_device(device):
                images, latents = sampling.generate_placed(
                    config,
                    placed,
                    labels_N[pictures.start : pictures.stop],
                    run=run,
                    seed=protocol.seed,
                    first_index=pictures.start,
                    batch_size=shards.shard,
                )
        finally:
            free.put((device, placed))
        shards.write(number, images, latents)
        return len(images)

    done = shards.count - sum(len(shards.pictures_of(number)) for number in missing)
    workers = concurrent.futures.ThreadPoolExecutor(max(free.qsize(), 1))
    with progress.stage(title, shards.count, done=done) as advance, workers as pool:
        try:
            running = [pool.submit(one, number) for number in missing]
            for future in concurrent.futures.as_completed(running):
                advance(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
