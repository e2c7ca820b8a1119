# SPDX-License-Identifier: Apache-2.0
"""Ranges against numpy, their derivatives against the published ones, tables between timesteps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.config import LatentDiffusionConfig
from vqjax.core import tensor
from vqjax.core.activations import (
    Activations,
    InputRange,
    candidate_ranges,
    layer_bits,
    squared_errors,
)
from vqjax.sampling.schedule import ddim_schedule


def _inputs(seed=0, shape=(3, 5, 7)):
    return np.random.default_rng(seed).normal(0.5, 2, shape).astype(np.float32)


def _range(bits=8, steps=(0.02, 0.5, 0.01), zeros=(3, 7, 0)) -> InputRange:
    return InputRange(
        step_B=jnp.array(steps, jnp.float32), zero_B=jnp.array(zeros, jnp.float32), bits=bits
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_levels_are_those_of_numpy(bits):
    x, read = _inputs(), _range(bits)
    step, zero = (np.asarray(part).reshape(3, 1, 1) for part in (read.step_B, read.zero_B))
    top = 2**bits - 1
    zero = np.minimum(zero, top)
    read = dataclasses.replace(read, zero_B=jnp.asarray(zero.ravel()))
    level = np.clip(np.round(x / step) + zero, 0, top)
    np.testing.assert_array_equal(read.fake_quantize(jnp.asarray(x)), (level - zero) * step)
    stored = np.asarray(read.quantize(jnp.asarray(x)))
    assert stored.dtype == np.int8
    np.testing.assert_array_equal(stored.astype(int) + 2 ** (bits - 1), level)


def test_zero_stays_exactly_zero_and_the_dtype_stays():
    found = _range().fake_quantize(jnp.zeros((3, 2), jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found, np.float32), 0.0)


@pytest.mark.parametrize("bits", [3, 8])
def test_derivatives_are_those_of_learned_step_sizes(bits):
    """LSQ (arXiv 1902.08153), equations 3 and 5, moved by the zero point as in LSQ+."""
    x, weight = _inputs(1), _inputs(2)
    read, top = _range(bits, zeros=(3, 7, 0)), 2**bits - 1
    step, zero = (np.asarray(part).reshape(3, 1, 1) for part in (read.step_B, read.zero_B))
    v = x / step
    below, above = v <= -zero, v >= top - zero
    inside = ~below & ~above
    # Clipped on both sides somewhere, and values inside that round to an end: no halves there.
    assert below.any()
    assert above.any()
    assert (inside & (np.round(v) == -zero)).any()
    to_step = np.where(below, -zero, np.where(above, top - zero, np.round(v) - v))
    expected = {
        "x": weight * inside,
        "step": (weight * to_step).sum((1, 2)),
        "zero": (weight * np.where(inside, 0, -step)).sum((1, 2)),
    }

    def loss(x, step_B, zero_B):
        found = InputRange(step_B=step_B, zero_B=zero_B, bits=bits).fake_quantize(x)
        return jnp.sum(found * weight)

    found = jax.grad(loss, (0, 1, 2))(jnp.asarray(x), read.step_B, read.zero_B)
    for one, (name, other) in zip(found, expected.items()):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3, err_msg=name)


def _table(steps=25, bits=8, seed=0) -> Activations:
    rng = np.random.default_rng(seed)
    paths = ("unet/b/kernel", "unet/out/conv/kernel", "unet/a/kernel")
    timesteps_T = jnp.asarray(
        ddim_schedule(LatentDiffusionConfig.digits(), steps).timesteps, jnp.int32
    )

    def numbers(low, high):
        return {p: jnp.asarray(rng.uniform(low, high, steps), jnp.float32) for p in paths}

    return Activations(
        timesteps_T=timesteps_T, log2_steps=numbers(-8, 0), zeros=numbers(0, 2**bits - 1), bits=bits
    )


def test_at_the_tables_timesteps_its_rows_hold():
    table = _table()
    ranges = jax.jit(lambda t: table.at(t))(table.timesteps_T)
    assert ranges.keys() == table.zeros.keys()
    for path, read in ranges.items():
        np.testing.assert_allclose(read.step_B, np.exp2(table.log2_steps[path]), rtol=1e-6)
        np.testing.assert_array_equal(read.zero_B, np.round(table.zeros[path]))


def test_between_and_outside_the_tables_timesteps():
    table = _table()
    times = np.array([0, 1, 2, 33, 500, 961, 999])
    for path, read in table.at(jnp.asarray(times)).items():
        known = np.asarray(table.timesteps_T)
        logs = np.interp(times, known, table.log2_steps[path])
        zeros = np.interp(times, known, table.zeros[path])
        np.testing.assert_allclose(np.log2(read.step_B), logs, atol=1e-5)
        np.testing.assert_allclose(read.zero_B, np.round(zeros), atol=0)


def test_a_sampler_looks_up_what_would_be_worked_out():
    table = _table(bits=4)
    timesteps_T = jnp.asarray(ddim_schedule(LatentDiffusionConfig.digits(), 7).timesteps)
    visited_B = timesteps_T[jnp.array([5, 0, 3])]
    found = table.tabulated(timesteps_T).at(visited_B)
    for path, expected in table.at(visited_B).items():
        assert found[path].bits == expected.bits
        np.testing.assert_allclose(found[path].step_B, expected.step_B, rtol=1e-6)
        np.testing.assert_array_equal(found[path].zero_B, expected.zero_B)


def test_one_timestep_serves_all():
    table = _table()
    first = {name: {p: row[:1] for p, row in getattr(table, name).items()} for name in _TABLES}
    table = dataclasses.replace(table, timesteps_T=table.timesteps_T[:1], **first)
    for path, read in table.at(jnp.array([0, 1, 999])).items():
        np.testing.assert_allclose(read.step_B, np.exp2(table.log2_steps[path][0]), rtol=1e-6)


_TABLES = ("log2_steps", "zeros")


def test_derivatives_reach_the_tables():
    """Those of zero points go through rounding, also where training has left the levels."""
    table = dataclasses.replace(_table(), zeros={"unet/a/kernel": jnp.full(25, -0.7)})
    table = dataclasses.replace(
        table, log2_steps={"unet/a/kernel": table.log2_steps["unet/a/kernel"]}
    )
    t_B = (table.timesteps_T[3:4] + table.timesteps_T[4:5]) // 2

    def total(table):
        read = table.at(t_B)["unet/a/kernel"]
        return jnp.sum(read.zero_B + jnp.log2(read.step_B))

    assert float(table.at(t_B)["unet/a/kernel"].zero_B[0]) == 0
    slopes = jax.grad(total, allow_int=True)(table)
    for name in _TABLES:
        slope_T = np.asarray(getattr(slopes, name)["unet/a/kernel"])
        np.testing.assert_allclose(slope_T[3:5], 0.5, atol=0.03)
        assert not np.delete(slope_T, [3, 4]).any()


def test_first_last_and_time_layers_keep_eight_bits():
    layers = ("time_embed/dense1", "time_embed/dense2", "input_blocks_0/conv", "out/conv")
    for layer in layers:
        assert layer_bits(f"unet/{layer}/kernel", 4) == 8
        assert layer_bits(f"unet/{layer}/kernel", 10) == 10
    for layer in ("input_blocks_1/res/emb", "output_blocks_0/res/conv1"):
        assert layer_bits(f"unet/{layer}/kernel", 4) == 4
    table = _table(bits=4)
    ranges = table.at(jnp.array([5]))
    assert {path: read.bits for path, read in ranges.items()} == {
        path: table.bits_of(path) for path in table.zeros
    }
    assert ranges["unet/out/conv/kernel"].bits == 8


def test_rounded_changes_nothing_at_the_tables_timesteps():
    table = _table(bits=4)
    rounded = table.rounded()
    for path, zero_T in rounded.zeros.items():
        zero_T = np.asarray(zero_T)
        assert (zero_T == np.round(zero_T)).all()
        assert zero_T.min() >= 0
        assert zero_T.max() < 2 ** table.bits_of(path)
    both = table.at(table.timesteps_T), rounded.at(table.timesteps_T)
    for path in table.zeros:
        stored_B, trained_B = (ranges[path].zero_B for ranges in both)
        np.testing.assert_array_equal(stored_B, trained_B)


def test_densify_keeps_them():
    table = _table()
    for decode in (tensor.densify, jax.jit(tensor.densify)):
        found = decode({"unet": {"a": jnp.ones(2)}, "activations": table})["activations"]
        assert isinstance(found, Activations)
        assert found.bits == table.bits
        np.testing.assert_array_equal(found.timesteps_T, table.timesteps_T)
        for name in _TABLES:
            for path, row_T in getattr(table, name).items():
                np.testing.assert_array_equal(getattr(found, name)[path], row_T)


@pytest.mark.parametrize("bits", [4, 8])
def test_errors_of_candidates_are_those_of_numpy(bits):
    x = _inputs(3)
    step_F, zero_F = candidate_ranges(x.min(), x.max(), bits)
    found_F = squared_errors(jnp.asarray(x), jnp.asarray(step_F), jnp.asarray(zero_F), bits)
    for step, zero, found in zip(step_F, zero_F, found_F):
        level = np.clip(np.round(x / step) + zero, 0, 2**bits - 1)
        assert zero == np.round(zero)
        error = (((level - zero) * step - x).astype(np.float64) ** 2).sum()
        np.testing.assert_allclose(found, error, rtol=1e-3)
    first = np.array([-zero_F[0], 2**bits - 1 - zero_F[0]]) * step_F[0]
    np.testing.assert_allclose(first, [x.min(), x.max()], atol=0.51 * step_F[0])


def test_one_end_may_shrink_alone():
    """Few large numbers above, dense ones below: at 4 bits the best range clips above only."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-1, 1, 5000), [6.0]]).astype(np.float32)[None]
    step_F, zero_F = candidate_ranges(x.min(), x.max(), 4)
    found_F = squared_errors(jnp.asarray(x), jnp.asarray(step_F), jnp.asarray(zero_F), 4)
    best = int(np.argmin(found_F))
    low, high = -zero_F[best] * step_F[best], (15 - zero_F[best]) * step_F[best]
    assert low < -0.8
    assert high < 3
    assert found_F[best] < 0.5 * found_F[0]


def test_inputs_of_one_sign_or_all_zero_have_a_range_with_zero():
    low, high = np.array([2.0, -3.0, 0.0]), np.array([5.0, -1.0, 0.0])
    step_F, zero_F = candidate_ranges(low, high, 8)
    assert (step_F > 0).all()
    np.testing.assert_array_equal(zero_F[0], [0, 255, 0])
    np.testing.assert_allclose(step_F[0], [5 / 255, 3 / 255, 1])
