# SPDX-License-Identifier: Apache-2.0
"""A resumable training loop: the same steps give the same bits, however often it is killed."""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vqjax import progress

SAVE_INTERVAL = 60.0  # seconds between checkpoints: the most that a kill can cost


def train(
    name: str,
    state: Any,
    step: Callable[[Any, jax.Array], tuple[Any, jax.Array]],
    steps: int,
    folder: pathlib.Path,
) -> Any:
    """Runs `step` for indices 0 .. steps - 1, or from the last checkpoint in `folder`.

    Args:
      name: stage name for the progress line.
      state: pytree of arrays before step 0.
      step: `(state, index) -> (state, loss)`, pure; all randomness derives from `index`, which
        makes a resumed run equal to an unbroken one. It is compiled, its input state is donated.
      folder: absolute path; holds this stage's checkpoints alone.

    Returns:
      The state after the last step.

    Raises:
      FloatingPointError: if the loss is not finite; the last good checkpoint stays.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        first = manager.latest_step() or 0
        if first:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(first, args=ocp.args.StandardRestore(abstract))
        compiled = jax.jit(step, donate_argnums=0)
        saved, losses = time.monotonic(), []
        with progress.stage(name, steps, done=first) as advance:
            for index in range(first, steps):
                state, loss = compiled(state, jax.numpy.int32(index))
                losses.append(float(loss))
                if not np.isfinite(losses[-1]):
                    raise FloatingPointError(f"{name}: loss {losses[-1]} at step {index}")
                if time.monotonic() - saved > SAVE_INTERVAL or index == steps - 1:
                    manager.save(index + 1, args=ocp.args.StandardSave(state))
                    manager.wait_until_finished()
                    saved = time.monotonic()
                advance(1, f"loss {np.mean(losses[-100:]):.5f}")
    return state
