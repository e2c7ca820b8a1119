# SPDX-License-Identifier: Apache-2.0
"""Who does which layer and in what order; what other processes did is picked up."""

import contextlib
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.errors import VqjaxError
from vqjax.pipeline import layers, processes
from vqjax.pipeline.journal import Journal
from vqjax.pipeline.processes import Team

COSTS = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 3.0, "e": 3.0, "f": 0.0}


def journal(folder, team=None) -> Journal:
    return Journal(folder, {"status": "running", "seconds": {}}, team)


def quiet(path, result) -> str:
    return ""


def test_the_longest_go_first_and_to_who_has_least():
    assert layers.shares(COSTS, 1) == [["a", "b", "c", "d", "e", "f"]]
    first, second = layers.shares(COSTS, 2)
    assert (first, second) == (["a", "d", "f"], ["b", "c", "e"])
    assert layers.shares(dict(reversed(COSTS.items())), 2) == [first, second]
    assert layers.shares({"a": 1.0}, 3) == [["a"], [], []]


def test_results_come_in_the_order_asked_for_with_the_callers_precision(tmp_path):
    seen: list[str] = []

    def work(path, argument):
        return jnp.float32(argument), getattr(jax.config, "jax_default_matmul_precision", None)

    with jax.default_matmul_precision("highest"):
        found = layers.each_layer(
            "test", work, {"c": 3, "f": 6, "a": 1}, lambda path, _: seen.append(path) or path,
            journal=journal(tmp_path), piece=str, costs=COSTS, workers=2,
        )  # fmt: skip
    assert list(found) == ["c", "f", "a"]
    assert sorted(seen) == ["a", "c", "f"]
    assert [float(value) for value, _ in found.values()] == [3, 6, 1]
    assert {precision for _, precision in found.values()} == {"highest"}


def test_one_of_those_that_share_programs_goes_first(tmp_path):
    running, together = set(), []
    lock = threading.Lock()

    def work(path, argument):
        with lock:
            running.add(path)
            together.append({p[0] for p in running} if len(running) > 1 else set())
        time.sleep(0.05)
        with lock:
            running.discard(path)

    names: list[str] = ["x1", "x2", "x3", "y1", "y2"]
    paths = dict.fromkeys(names)
    layers.each_layer(
        "test", work, paths, quiet,
        journal=journal(tmp_path), piece=str, costs=dict.fromkeys(paths, 1.0),
        alike=lambda path: path[0], workers=2,
    )  # fmt: skip
    assert together[:2] == [set(), {"x", "y"}]


def test_a_failing_layer_stops_the_others(tmp_path):
    started = []

    def work(path, argument):
        started.append(path)
        raise VqjaxError("is broken")

    with pytest.raises(VqjaxError, match="a: is broken"):
        layers.each_layer(
            "test", work, dict.fromkeys(COSTS), quiet,
            journal=journal(tmp_path), piece=str, costs=COSTS, workers=1,
        )  # fmt: skip
    assert started == ["a"]


def test_layers_of_another_process_come_from_the_journal(tmp_path):
    arguments = dict.fromkeys(COSTS, 0)
    made: dict[int, list[str]] = {0: [], 1: []}

    def member(index: int) -> dict:
        team = Team(index, 2)
        pieces = journal(tmp_path, team)

        def work(path, argument):
            found = pieces.load(path)
            if found is not None:
                return float(found[0]["x"])
            made[index].append(path)
            pieces.store(path, {"x": np.asarray(COSTS[path])}, {})
            return COSTS[path]

        with team.beating(tmp_path):
            return layers.each_layer(
                "test", work, arguments, quiet, journal=pieces, piece=str, costs=COSTS, workers=1
            )

    other = threading.Thread(target=member, args=(1,))
    other.start()
    found = member(0)
    other.join()
    assert found == COSTS
    assert [made[0], made[1]] == layers.shares(COSTS, 2)


def test_a_process_that_stops_or_falls_silent_is_named(tmp_path, monkeypatch):
    team = Team(0, 2)
    with monkeypatch.context() as hasty:
        hasty.setattr(processes, "START_SECONDS", 0.3)
        with pytest.raises(VqjaxError, match=r"process 1 of 2 has given no sign of life for 0 s"):
            journal(tmp_path, team).wait_for("layers/a", (1,))

    other = Team(1, 2)

    def fail():
        with contextlib.suppress(KeyboardInterrupt), other.beating(tmp_path):
            time.sleep(0.5)
            raise KeyboardInterrupt

    thread = threading.Thread(target=fail)
    thread.start()
    with pytest.raises(VqjaxError, match=r"stopped with an error while process 0 waited for the"):
        team.wait(tmp_path, lambda: False, (1,), "the layers")
    thread.join()


def test_only_a_living_leader_has_opened_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "BEAT_SECONDS", 0.1)
    out = tmp_path / "out"
    opened = Journal.open(out, {"fingerprint": "f"}, Team(0, 2))
    (out / "work").mkdir()
    (out / "work" / "process-0").write_text("of a process that was killed before")
    with monkeypatch.context() as hasty:
        hasty.setattr(processes, "START_SECONDS", 0.5)
        with pytest.raises(VqjaxError, match=r"process 0 of 2 .* waited for the run folder"):
            Journal.open(out, {"fingerprint": "f"}, Team(1, 2))
    with Team(0, 2).beating(out):
        joined = Journal.open(out, {"fingerprint": "f"}, Team(1, 2))
    with joined.stage("compress"):
        pass
    assert opened.record["seconds"] == {}  # only the leader keeps the record
    assert '"compress"' not in (out / "run.json").read_text()
    opened.finish()
    assert Journal.open(out, {"fingerprint": "f"}, Team(1, 2)).done


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (("two", "two", "two"), "JAX_NUM_PROCESSES=two JAX_PROCESS_ID=two: expected"),
        (("host:1", "two", None), "JAX_NUM_PROCESSES=two JAX_PROCESS_ID=None: expected"),
        (("host", "2", "0"), "JAX_COORDINATOR_ADDRESS=host: expected host:port"),
    ],
)
def test_numbers_of_processes_that_make_no_sense(monkeypatch, found, message):
    for name, text in zip(("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"), found):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
        if text is not None:
            monkeypatch.setenv(f"JAX_{name}", text)
    with pytest.raises(VqjaxError, match=message):
        processes.initialize()
