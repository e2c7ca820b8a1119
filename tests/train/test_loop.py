# SPDX-License-Identifier: Apache-2.0
"""A killed training run continues to the same bits."""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vqjax.errors import VqjaxError
from vqjax.train import loop, packing

OPTIMIZER = optax.adam(0.1)
KEY = jax.random.key(0)


def step(state, index):
    params, opt_state = state
    target = jax.random.normal(jax.random.fold_in(KEY, index), params["w"].shape)
    loss, grads = jax.value_and_grad(lambda p: jnp.mean((p["w"] - target) ** 2))(params)
    updates, opt_state = OPTIMIZER.update(grads, opt_state)
    return (optax.apply_updates(params, updates), opt_state), {"loss": loss}


def start():
    params = {"w": jnp.ones(5)}
    return params, OPTIMIZER.init(params)


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path):
    whole = loop.train("whole", start(), step, 9, tmp_path / "whole")
    loop.train("part", start(), step, 4, tmp_path / "part")
    resumed = loop.train("part", start(), step, 9, tmp_path / "part")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


_KILLED = """
import os, pathlib, signal, sys
from tests.train import test_loop as t
t.loop.SAVE_INTERVAL = -1.0  # after every step
def dying(state, index):
    if index == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return t.step(state, index)
t.loop.train("run", t.start(), dying, 9, pathlib.Path(sys.argv[1]))
"""


def test_a_run_that_was_killed_between_checkpoints_ends_with_the_same_bits(tmp_path):
    root = pathlib.Path(__file__).parents[2]
    died = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    assert loop.begun(tmp_path / "run")
    whole = loop.train("whole", start(), step, 9, tmp_path / "whole")
    resumed = loop.train("run", start(), step, 9, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_a_complete_run_is_not_repeated(tmp_path):
    first = loop.train("run", start(), step, 3, tmp_path)

    def never(state, index):
        raise AssertionError("a complete run has no steps left")

    again = loop.train("run", start(), never, 3, tmp_path)
    np.testing.assert_array_equal(first[0]["w"], again[0]["w"])


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tmp_path):
    def diverging(state, index):
        state, metrics = step(state, index)
        return state, {"loss": jnp.where(index == 2, jnp.nan, metrics["loss"])}

    with pytest.raises(loop.DivergedError, match=r"run: loss nan at step 2.*Nothing was saved yet"):
        loop.train("run", start(), diverging, 5, tmp_path)


def test_growing_losses_stop_before_they_overflow(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "GUARD", 4)

    def growing(state, index):
        return state, {"loss": 2.0**index}

    with pytest.raises(loop.DivergedError, match=r"it diverged.*try 0.1"):
        loop.train("run", start(), growing, 99, tmp_path, most=5, advice="try 0.1")


def test_a_state_that_is_no_number_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_INTERVAL", -1.0)  # after every step

    def overflowing(state, index):
        return {"w": jnp.where(index < 2, state["w"], jnp.inf)}, {"loss": jnp.float32(1)}

    with pytest.raises(
        loop.DivergedError,
        match=r"NaN or infinity in the state after step 2: .*"
        r"The state after 2 steps is kept",
    ):
        loop.train("run", {"w": jnp.ones(3)}, overflowing, 3, tmp_path)
    found = loop.train("run", packing.shapes_of({"w": jnp.ones(3)}), overflowing, 2, tmp_path)
    np.testing.assert_array_equal(found["w"], np.ones(3))


@pytest.mark.parametrize("jump", [12, 50, 95])
def test_a_short_run_that_diverges_stops_too(jump, tmp_path):
    """With the constants as they are: a default tuning has a hundred steps."""

    def jumping(state, index):
        return {"index": index}, {"loss": jnp.where(index < jump, 1.0, 1e4)}

    with pytest.raises(loop.DivergedError, match=rf"loss 1e\+04 at step {jump}, 1 in the first"):
        loop.train("run", {"index": jnp.int32(0)}, jumping, 100, tmp_path, most=20)


def test_losses_may_rise_and_fall_within_the_guard(tmp_path):
    def in_turn(rising):
        def losses(state, index):
            turn, place = divmod(index, 24)
            return state, {"loss": (1 + rising * turn) * jnp.where(place < 12, 1e-3, 0.1)}

        return losses

    def run(name, rising, **settings):
        loop.train(name, start(), in_turn(rising), 96, tmp_path / name, most=20, **settings)

    with pytest.raises(loop.DivergedError, match="at step 13"):
        run("a", 0)
    run("b", 0, guard=24)
    with pytest.raises(loop.DivergedError, match="it diverged"):
        run("c", 40, guard=24)


def test_what_diverged_diverges_again_from_its_last_good_state(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "GUARD", 4)
    monkeypatch.setattr(loop, "SAVE_INTERVAL", -1.0)  # after every step

    def growing(state, index):
        return {"index": index}, {"loss": jnp.exp2(jnp.maximum(0.0, index - 6))}

    def run():
        with pytest.raises(loop.DivergedError) as error:
            loop.train("run", {"index": jnp.int32(0)}, growing, 30, tmp_path, most=20)
        return str(error.value)

    first = run()
    assert "loss 64 at step 12, 1 in the first steps" in first
    assert loop.begun(tmp_path)
    assert run() == first
    stop = loop.train("run", {"index": jnp.int32(0)}, growing, 10, tmp_path)  # saved, far from 20
    assert int(stop["index"]) == 9


def test_a_resumed_run_needs_shapes_alone(tmp_path):
    assert not loop.begun(tmp_path / "run")
    whole = loop.train("run", start(), step, 5, tmp_path / "whole")
    loop.train("run", start(), step, 3, tmp_path / "run")
    assert loop.begun(tmp_path / "run")
    resumed = loop.train("run", packing.shapes_of(start()), step, 5, tmp_path / "run")
    np.testing.assert_array_equal(resumed[0]["w"], whole[0]["w"])


def test_states_are_not_kept_beside_the_present_one(tmp_path, monkeypatch):
    """A state that a step does not donate is gone once the next one is there."""
    monkeypatch.setattr(loop, "SAVE_INTERVAL", -1.0)
    alive = []

    def adding(state, index):
        alive.append(sum(array.shape == (77,) for array in jax.live_arrays()))
        return {"sum": state["sum"] + 1}, {"loss": index}

    loop.train("run", {"sum": jnp.zeros(77)}, adding, 3, tmp_path)
    start = packing.shapes_of({"sum": jnp.zeros(77)})
    loop.train("run", start, adding, 6, tmp_path)
    assert max(alive) <= 2  # Python up to 3.12 holds the arguments of the call before


def test_steps_see_their_inputs(tmp_path):
    def adding(state, x):
        return {"sum": state["sum"] + x}, {"loss": x}

    start = {"sum": jnp.zeros(())}
    last = loop.train("run", start, adding, 4, tmp_path, inputs=lambda i: jnp.float32(10**i))
    assert float(last["sum"]) == 1111


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand a thousand lines")

    monkeypatch.setattr(loop.ocp.CheckpointManager, "save", full)
    with pytest.raises(
        VqjaxError, match=r"cannot write a checkpoint \(RESOURCE[^\n]*\); make room"
    ):
        loop.train("run", start(), step, 2, tmp_path)
