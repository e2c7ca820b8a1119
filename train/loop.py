# SPDX-License-Identifier: Apache-2.0
"""A resumable training loop: the same steps give the same bits, however often it is killed."""

import collections
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from vqjax import progress
from vqjax.errors import VqjaxError
from vqjax.train import packing

SAVE_INTERVAL = 60.0  # seconds between checkpoints, while losses do not grow
WINDOW = 100  # steps that the shown figures are means of
LAYOUT = 2  # of checkpoints; raised where those of an earlier version cannot be continued
GUARD = 10  # first steps, and last ones, whose mean losses tell whether training diverges

Metrics = Mapping[str, jax.Array]
"""Scalars of one step by name; "loss" is one of them."""


class DivergedError(VqjaxError):
    """Training was stopped; the last good state is kept."""


def train(
    name: str,
    state: Any,
    step: Callable[[Any, Any], tuple[Any, Metrics]],
    steps: int,
    folder: pathlib.Path,
    *,
    inputs: Callable[[int], Any] = jnp.int32,
    most: float = math.inf,
    guard: int | None = None,
    advice: str = "take a lower learning rate",
) -> Any:
    """Runs `step` for indices 0 .. steps - 1, or from the last checkpoint in `folder`.

    Args:
      name: stage name for the progress line, which shows the means of all metrics.
      state: pytree of arrays before step 0; restored ones take over where its arrays lie. Where
        `begun`, their shapes, types and places are enough.
      step: `(state, inputs(index)) -> (state, metrics)`, pure, compiled where that pays; it may
        donate its input state.
      folder: absolute path; holds this stage's checkpoints alone.
      inputs: what a step sees beside the state; follows from the index alone, which makes a resumed
        run equal to an unbroken one. Default: the index.
      most: mean loss of the last steps, over that of the first ones, above which training stops.
      guard: so many steps are the first ones and the last ones, default: `GUARD`. Where losses rise
        and fall with what the steps see, as many as it takes to see all of it.
      advice: what to try then.

    Returns:
      The state after the last step.

    Raises:
      DivergedError: if a loss, or a state to be kept, is not finite, or losses grow beyond `most`;
        names the step. The last checkpoint in `folder` is from before they began to: none is
        written while they are above the root of that.
    """
    # A save ends before the next step: in the background it would only warn that it is waited for.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, create=True, enable_async_checkpointing=False
    )
    with ocp.CheckpointManager(folder, options=options) as manager:
        first = manager.latest_step() or 0
        watch = _Watch(name, most, guard or GUARD, advice)
        if first:
            state, seen = _restored(manager, first, state)
            watch.restore(first, seen)
        saved = time.monotonic()
        with progress.stage(name, steps, done=first) as advance:
            for index in range(first, steps):
                state, metrics = step(state, inputs(index))
                watch.add(index, {key: float(value) for key, value in metrics.items()})
                due = time.monotonic() - saved > SAVE_INTERVAL and watch.sound
                if due or index == steps - 1:
                    kept = packing.pack(state)
                    watch.check_finite(index, kept)
                    _save(manager, index + 1, kept, watch.seen)
                    watch.kept, saved = index + 1, time.monotonic()
                advance(1, watch.note())
    return state


def _save(
    manager: ocp.CheckpointManager, step: int, packed: dict[str, Any], seen: dict[str, list]
) -> None:
    kept = {"state": ocp.args.StandardSave(packed), "watch": ocp.args.JsonSave(seen)}
    try:
        manager.save(step, args=ocp.args.Composite(**kept))
    except (OSError, ValueError) as error:  # Orbax reports a full disk as the latter
        said = str(error).partition("\n")[0]
        raise VqjaxError(
            f"{manager.directory}: cannot write a checkpoint ({said}); make room, the same command "
            "continues from the one before"
        ) from error


def _restored(manager: ocp.CheckpointManager, step: int, like: Any) -> tuple[Any, dict[str, list]]:
    shapes = packing.packed_shapes(like)
    wanted = {"state": ocp.args.StandardRestore(shapes), "watch": ocp.args.JsonRestore()}
    found = manager.restore(step, args=ocp.args.Composite(**wanted))
    return packing.unpack(found["state"], like), found["watch"]


def begun(folder: pathlib.Path) -> bool:
    """Whether `train` would continue from a checkpoint."""
    return folder.exists() and bool(ocp.utils.checkpoint_steps(folder))


@jax.jit
def _finite_there(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def _finite(array: Any) -> Any:
    """Whether all numbers are finite, found where the array is."""
    return np.isfinite(array).all() if isinstance(array, np.ndarray) else _finite_there(array)


class _Watch:
    """Keeps the metrics of the last steps, and tells when they say that training diverged."""

    def __init__(self, name: str, most: float, guard: int, advice: str):
        self._name, self._most, self._guard, self._advice = name, most, guard, advice
        self._recent: collections.deque[dict[str, float]] = collections.deque(
            maxlen=max(WINDOW, guard)
        )
        self._early: list[float] = []
        self.kept = 0  # steps of the last checkpoint

    @property
    def seen(self) -> dict[str, list]:
        """What a resumed run has to know to stop where an unbroken one does."""
        return {"recent": list(self._recent), "early": self._early}

    def restore(self, kept: int, seen: dict[str, list]) -> None:
        """Takes what an earlier part of the run saw, by its checkpoint."""
        self.kept = kept
        self._recent.extend(seen["recent"])
        self._early = list(seen["early"])

    @property
    def sound(self) -> bool:
        """Whether losses are still far from where training stops: what a checkpoint shall keep."""
        return not self._last() > self._most**0.5 * float(np.mean(self._early))

    def add(self, index: int, metrics: dict[str, float]) -> None:
        """Takes the metrics of a step; raises DivergedError."""
        loss = metrics["loss"]
        self._recent.append(metrics)
        if len(self._early) < self._guard:
            self._early.append(loss)
        limit = self._most * float(np.mean(self._early))
        if math.isfinite(loss) and not self._last() > limit:
            return
        first = float(np.mean(self._early))
        raise self._diverged(f"loss {loss:.4g} at step {index}, {first:.4g} in the first steps")

    def check_finite(self, index: int, packed: Mapping[str, Any]) -> None:
        """Raises DivergedError where a state is no number: its loss is that of the next step."""
        floats = [x for x in packed.values() if jnp.issubdtype(x.dtype, jnp.floating)]
        # One by one: all in one program would take several times as long to compile.
        if not all(jax.device_get([_finite(array) for array in floats])):
            raise self._diverged(f"NaN or infinity in the state after step {index}")

    def _diverged(self, what: str) -> DivergedError:
        kept = (
            f"The state after {self.kept} steps is kept" if self.kept else "Nothing was saved yet"
        )
        return DivergedError(f"{self._name}: {what}: it diverged. {kept}; {self._advice}")

    def note(self) -> str:
        """The means for the progress line."""
        return "  ".join(f"{key} {self._mean(key):.5f}" for key in self._recent[-1])

    def _last(self) -> float:
        return float(np.mean([metrics["loss"] for metrics in self._recent][-self._guard :]))

    def _mean(self, key: str) -> float:
        return float(np.mean([metrics[key] for metrics in self._recent]))
