# SPDX-License-Identifier: Apache-2.0
"""Any nested dict of arrays: what is compressed, what is left alone, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vqjax
from vqjax.core import compress
from vqjax.core.plan import LayerSpec
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError

QUICK = compress.Effort(start_steps=4, feedback_rounds=1, descent_rounds=1)
SPEC = LayerSpec("feed_forward", "linear", 8, 2, 8, 8)


def tree():
    rng = np.random.default_rng(0)
    return {
        "net": {
            "dense": {"kernel": rng.normal(size=(24, 16)).astype(np.float32), "bias": np.zeros(16)},
            "conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 4, 8)), jnp.float32)},
        },
        "table": rng.normal(size=(10, 8)),
        "steps": np.int32(7),
    }


def test_named_kernels_are_compressed_and_all_else_is_handed_on():
    params = tree()
    conv = LayerSpec("conv3x3", "conv3x3", 9, 2, 8, 8)
    plan = {"net/dense/kernel": SPEC, "net/conv/kernel": conv}
    moment = np.diag(np.linspace(4, 0.1, 24) ** 2).astype(np.float32)
    done: list[str] = []
    found, stats = vqjax.compress_tree(
        params,
        {"net/dense/kernel": moment},
        plan,
        effort=QUICK,
        on_layer=lambda path, _: done.append(path),
    )
    assert done == list(stats) == list(plan)
    assert found["net"]["dense"]["bias"] is params["net"]["dense"]["bias"]
    assert found["table"] is params["table"]
    assert found["steps"] is params["steps"]
    for path, kernel in (("dense", params["net"]["dense"]), ("conv", params["net"]["conv"])):
        tensor = found["net"][path]["kernel"]
        assert isinstance(tensor, VQTensor)
        assert tensor.shape == kernel["kernel"].shape
    dense = vqjax.densify(found)
    error = dense["net"]["dense"]["kernel"] - params["net"]["dense"]["kernel"]
    exact = params["net"]["dense"]["kernel"]
    by_input = np.linspace(4, 0.1, 24)[:, None]
    expected = float(np.sum((by_input * error) ** 2) / np.sum((by_input * exact) ** 2))
    assert stats["net/dense/kernel"].rel_output_mse == pytest.approx(expected, rel=1e-3)
    assert stats["net/conv/kernel"].rel_output_mse < 0.6
    assert dense["table"] is params["table"]


def test_layers_do_not_depend_on_each_other():
    params, plan = tree(), {"net/dense/kernel": SPEC, "net/conv/kernel": SPEC}
    together = vqjax.compress_tree(params, None, plan, effort=QUICK, seed=3).params
    alone = vqjax.compress_tree(
        params, None, {"net/conv/kernel": SPEC}, effort=QUICK, seed=3
    ).params
    pairs = zip(
        jax.tree.leaves(together["net"]["conv"]), jax.tree.leaves(alone["net"]["conv"]), strict=True
    )
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)


def test_everything_that_does_not_fit_is_listed_at_once():
    params = tree()
    quantized = vqjax.compress_tree(params, None, {"net/dense/kernel": SPEC}, effort=QUICK).params
    plan = {
        "net/dense/kernel": SPEC,
        "net/missing": SPEC,
        "net/dense/bias": SPEC,
        "steps": SPEC,
        "net/conv/kernel": LayerSpec("conv3x3", "conv3x3", 9, 1, 40),
        "table": LayerSpec("conv3x3", "conv3x3", 9, 0, 8),
        "broken": SPEC,
    }
    quantized["broken"] = np.full((8, 8), np.nan, np.float32)
    moments = {"net/conv/kernel": np.eye(8), "net/other": np.eye(3)}
    with pytest.raises(VqjaxError) as error:
        vqjax.compress_tree(quantized, moments, plan)
    for line in (
        "net/dense/kernel: quantized already",
        "net/missing: the tree has no such leaf",
        "net/dense/bias: float64 (16,), expected floats, [inputs, outputs] or",
        "steps: int32 (), expected floats",
        "net/conv/kernel: codebooks of 40 entries for 32 vectors; take at most 32",
        "net/conv/kernel: moment (8, 8) for a kernel (3, 3, 4, 8): expected (36, 36)",
        "broken: kernel of shape (8, 8) holds 64 NaN or infinite values",
        "table: codebooks 0, expected a whole number",
        "table: grouping conv3x3 for a kernel (10, 8)",
        "net/other: a moment, but no such layer in the plan",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_uniform_plan_keeps_every_layer_within_its_budget(bits):
    params = {
        "block": {"up": {"kernel": np.zeros((64, 256))}, "down": {"kernel": np.zeros((256, 64))}},
        "embed": np.zeros((10, 8)),
        "conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.float32)},
    }
    plan = vqjax.uniform_plan(params, bits=bits)
    assert list(plan) == ["block/down/kernel", "block/up/kernel", "conv/kernel"]
    assert plan["conv/kernel"].grouping == "conv3x3"
    shapes = {"block/down/kernel": (256, 64), "block/up/kernel": (64, 256)}
    report = plan.bits_report(shapes | {"conv/kernel": (3, 3, 64, 64)})
    for stored in report.layers.values():
        assert bits - 0.4 < stored.per_weight <= bits


def test_uniform_plans_that_cannot_be_are_refused():
    with pytest.raises(VqjaxError, match=r"no leaf of two or four axes has 'weight' .*'a/kernel'"):
        vqjax.uniform_plan({"a": {"kernel": np.zeros((8, 8))}}, bits=2, select="weight")
    with pytest.raises(VqjaxError, match=r"a/kernel: no code of a kernel \(8, 8\) stores 2 bits"):
        vqjax.uniform_plan({"a": {"kernel": np.zeros((8, 8))}}, bits=2)
