# SPDX-License-Identifier: Apache-2.0
"""SeMI-PV against the reference's traces, and what it adds to them."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import golden_files, golden_params
from vqjax.core import grouping as grouping_lib
from vqjax.core.coded import CodedWeight
from vqjax.errors import VqjaxError
from vqjax.train import pv
from vqjax.train.pv import PVConfig, semi_pv

apply_updates: Any = optax.apply_updates  # its type does not know of trees with our leaves

TRACED = PVConfig(beam=4, max_code_change=0.25, eps=1e-6, betas=(0.9, 0.95))
VARIANTS = {
    "ste_lamb": dataclasses.replace(TRACED, code_lr=0.15, code_betas=(0.0, 0.95), lr=3e-3),
    "ste_adam_mix": dataclasses.replace(
        TRACED,
        lamb=False,
        delta_decay=0.1,
        trust_ratio=0.05,
        code_lr=0.15,
        code_betas=(0.9, 0.95),
        lr=1e-3,
    ),
    "direct_lamb": dataclasses.replace(
        TRACED,
        delta_decay=1.0,
        trust_ratio=0.1,
        force_change=True,
        code_lr=0.03,
        code_betas=(0.0, 0.95),
        lr=3e-3,
    ),
}


def _traces():
    """Files that hold a trace: a start, and what became of it step by step."""
    needed = {"start_codes", "weight", "xtx"} | {f"{name}_buffer" for name in VARIANTS}
    files = [path for path in golden_files("aq", "*.npz") if needed <= set(np.load(path).files)]
    return [pytest.param(path, id=path.stem) for path in files] or golden_params("aq", "no trace")


def _coded(codes, books, scales, grouping="linear", **rest):
    """A weight [N, O] without rounding, N a multiple of G unless given a shape."""
    shape = rest.pop("shape", (codes.shape[1] * books.shape[-1], len(scales)))
    return CodedWeight(
        codes_OJM=jnp.asarray(codes, jnp.uint8),
        codebooks_MKG=jnp.asarray(books),
        scales_O=jnp.asarray(scales),
        shape=shape,
        grouping=grouping,
        **rest,
    )


@pytest.mark.parametrize("path", _traces())
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_every_step_meets_the_reference(path, variant, precision):
    data = np.load(path)
    tolerance = {"float32": 2e-5, "float64": 1e-12}[precision]
    with jax.enable_x64(precision == "float64"):
        wanted_NO = jnp.asarray(data["weight"].T, precision)
        moment_NN = jnp.asarray(data["xtx"], precision)
        params = _coded(
            data["start_codes"],
            data["codebooks"].astype(precision),
            data["scales"].astype(precision),
        )
        transform: Any = semi_pv(VARIANTS[variant])
        state = transform.init(params)

        @jax.jit
        def step(params, state):
            def loss(kernel_NO):
                error_NO = kernel_NO - wanted_NO
                return jnp.sum(error_NO * (moment_NN @ error_NO)) / wanted_NO.shape[1]

            value, grad = jax.value_and_grad(loss)(params.decode(precision))
            updates, state = transform.update(grad, state, params)
            params = apply_updates(params, updates)
            return value, params, params.matrix(), state

        for at in range(len(data[f"{variant}_loss"])):
            value, params, matrix_ON, state = step(params, state)
            found = {
                "loss": value,
                "codebooks": params.codebooks_MKG,
                "scales": params.scales_O,
                "weight": matrix_ON,
            }
            if data[f"{variant}_buffer"].size:
                found["buffer"] = state.leaves.codes.target_OJG.reshape(wanted_NO.T.shape)
            np.testing.assert_array_equal(params.codes_OJM, data[f"{variant}_codes"][at])
            for name, array in found.items():
                expected = data[f"{variant}_{name}"][at]
                assert array.dtype == precision
                np.testing.assert_allclose(
                    array, expected, rtol=tolerance, atol=tolerance, err_msg=f"{name}, step {at}"
                )


def _problem(seed=0, rows=6, groups=5, books=2, entries=7, group=4, shape=None, **rest):
    """A random weight, K no power of two, and a quadratic loss of its kernel."""
    rng = np.random.default_rng(seed)
    shape = shape or (groups * group, rows)
    weight = _coded(
        rng.integers(0, entries, (rows, groups, books)),
        rng.normal(size=(books, entries, group)).astype(np.float32) / np.sqrt(books),
        rng.uniform(0.5, 1.5, rows).astype(np.float32),
        shape=shape,
        **rest,
    )
    fan_in = grouping_lib.matrix_shape(shape)[1]
    wanted = jnp.asarray(rng.normal(size=(rows, fan_in)), jnp.float32)
    mix = rng.normal(size=(fan_in, 2 * fan_in)).astype(np.float32)
    moment = jnp.asarray(mix @ mix.T / mix.shape[1])

    def loss(kernel):
        error = grouping_lib.to_matrix(kernel) - wanted
        return jnp.sum((error @ moment) * error)

    return weight, loss


KINDS = (("a", 11), ("b", 13), ("c", 11))
QUICK = PVConfig(lr=1e-2, code_lr=0.3, max_code_change=0.3, lamb=False, beam=4)


def _run(config, weight, loss, steps, key=None) -> list[tuple[Any, Any]]:
    """Returns (params, state) before the first step and after each."""
    transform: Any = semi_pv(config, key)
    params, state = weight, transform.init(weight)
    update = jax.jit(transform.update)
    found = [(params, state)]
    for _ in range(steps):
        updates, state = update(jax.grad(loss)(params.decode()), state, params)
        params = apply_updates(params, updates)
        found.append((params, state))
    return found


def _moved(before, after):
    return np.any(np.asarray(before.codes_OJM) != np.asarray(after.codes_OJM), axis=-1)


@pytest.mark.parametrize("which", ["first", "both"])
def test_only_what_moved_loses_its_moments_and_nothing_else_does(which):
    """Of a network of two weights and a bias: codebooks, scales, the bias and targets stay."""
    (weight, loss), (other, other_loss) = _problem(), _problem(rows=7)
    params = {"bias": jnp.arange(3.0), "other": other, "weight": weight}
    grads = {
        "bias": jnp.ones(3),
        "other": jax.grad(other_loss)(other.decode()),
        "weight": jax.grad(loss)(weight.decode()),
    }

    def after_one_step(config: PVConfig) -> tuple[Any, Any]:
        transform: Any = semi_pv(config)
        updates, state = jax.jit(transform.update)(grads, transform.init(params), params)
        return apply_updates(params, updates), state

    config = dataclasses.replace(QUICK, code_betas=(0.9, 0.95))
    stepped, kept = after_one_step(config)
    expected = jax.tree.map(np.array, kept)
    for name in ("other", "weight"):
        moved = _moved(params[name], stepped[name])
        assert 0 < moved.sum() < moved.size
        moments = expected.leaves[name].codes.moments
        for field in moments._fields:
            assert np.all(np.any(getattr(moments, field) != 0, axis=-1))
            if which == "both" or field.startswith("first"):
                getattr(moments, field)[moved] = 0
    found = after_one_step(dataclasses.replace(config, invalidate=which))[1]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("lamb", [False, True])
@pytest.mark.parametrize("which", ["first", "both"])
def test_the_step_after_invalidation_has_the_size_of_any_first_step(which, lamb):
    # Equal gradients, so that u is 1 everywhere: a wrong age shows as another size.
    weight, _ = _problem()
    config = dataclasses.replace(QUICK, code_betas=(0.9, 0.95), invalidate=which, lamb=lamb)
    found = _run(config, weight, jnp.sum, 5)
    assert _moved(found[0][0], found[-2][0]).any()
    for (_, before), (_, after) in itertools.pairwise(found):
        step = np.asarray(before.leaves.codes.target_OJG - after.leaves.codes.target_OJG)
        np.testing.assert_allclose(step, step.flat[0], rtol=1e-4)
        if not lamb:
            np.testing.assert_allclose(step, 0.3, rtol=1e-4)


def test_decayed_entries_lose_the_share_of_their_vectors_that_changed():
    weight, loss = _problem(rows=12)
    config = dataclasses.replace(QUICK, codebook_moments="decay")
    (start, _), (after, decayed) = _run(config, weight, loss, 1)
    kept = _run(QUICK, weight, loss, 1)[1][1]
    old, new = np.asarray(start.codes_OJM), np.asarray(after.codes_OJM)
    entries = weight.codebooks_MKG.shape[1]
    shares = np.zeros(weight.codebooks_MKG.shape[:2])
    for m in range(shares.shape[0]):
        for k in range(entries):
            was, is_ = old[..., m] == k, new[..., m] == k
            shares[m, k] = np.clip(1 - (was != is_).sum() / max(was.sum(), 1), 0, 1)
    assert np.any((shares > 0) & (shares < 1))
    for name in ("first", "second", "first_mass", "second_mass"):
        expected = np.asarray(getattr(kept.leaves.codebooks, name)) * shares[..., None]
        np.testing.assert_allclose(getattr(decayed.leaves.codebooks, name), expected, rtol=1e-6)


def test_codebooks_only_keeps_codes_and_codes_only_keeps_codebooks():
    weight, loss = _problem()
    config = dataclasses.replace(QUICK, train_codes=False)
    after, state = _run(config, weight, loss, 3)[-1]
    np.testing.assert_array_equal(after.codes_OJM, weight.codes_OJM)
    assert np.any(after.codebooks_MKG != weight.codebooks_MKG)
    assert float(pv.moved_fraction(state)) == 0

    config = dataclasses.replace(QUICK, train_codebooks=False)
    after, state = _run(config, weight, loss, 3)[-1]
    assert np.any(after.codes_OJM != weight.codes_OJM)
    np.testing.assert_array_equal(after.codebooks_MKG, weight.codebooks_MKG)
    np.testing.assert_array_equal(after.scales_O, weight.scales_O)


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_no_more_vectors_move_than_allowed(temperature):
    weight, loss = _problem()
    config = dataclasses.replace(
        QUICK, code_lr=2.0, max_code_change=0.1, force_change=True, temperature=temperature
    )
    found = _run(config, weight, loss, 3, jax.random.key(0))
    for (before, _), (after, state) in itertools.pairwise(found):
        moved = _moved(before, after)
        assert moved.sum() == 3  # of 30
        assert float(pv.moved_fraction(state)) == pytest.approx(0.1)


def test_weights_change_by_no_more_than_the_trust_ratio_and_one_vector():
    weight, loss = _problem()
    config = dataclasses.replace(
        QUICK, code_lr=2.0, max_code_change=1.0, trust_ratio=0.2, train_codebooks=False
    )
    (before, _), (after, _) = _run(config, weight, loss, 1)
    change = np.asarray(after.matrix() - before.matrix())
    sizes = np.sort(np.sum(change.reshape(6, 5, 4) ** 2, axis=-1).ravel())
    limit = 0.2 * np.linalg.norm(before.matrix())
    assert np.sqrt(sizes.sum()) > limit
    assert np.sqrt(sizes.sum() - sizes[-1]) < limit


@pytest.mark.parametrize("beam", [0, 3])
@pytest.mark.parametrize("books", [1, 2, 3, 4])
def test_no_vector_moves_away_from_its_target(books, beam):
    weight, loss = _problem(books=books, entries=5, shape=(18, 6))
    config = dataclasses.replace(QUICK, beam=beam, max_code_change=1.0, train_codebooks=False)
    (before, _), (after, state) = _run(config, weight, loss, 1)
    target = np.asarray(state.leaves.codes.target_OJG).reshape(6, -1)[:, :18]
    assert _moved(before, after).any()

    def distances(weight):
        left = np.pad(target - np.asarray(weight.matrix()), ((0, 0), (0, 2)))
        return np.sum(left.reshape(6, 5, 4) ** 2, axis=-1)

    assert np.all(distances(after) <= distances(before) * (1 + 1e-6))


def test_compiled_equals_eager():
    weight, loss = _problem(books=3)
    config = dataclasses.replace(pv.SEMI_PV, code_lr=0.5, trust_ratio=0.3)
    grad = jax.grad(loss)(weight.decode())
    transform: Any = semi_pv(config)
    state = transform.init(weight)
    eager = transform.update(grad, state, weight)
    compiled = jax.jit(transform.update)(grad, state, weight)
    assert np.any(np.asarray(eager[0].codes_OJM))
    assert jax.tree.structure(eager) == jax.tree.structure(compiled)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("donate", [False, True])
def test_what_is_compiled_ahead_is_not_compiled_again(donate):
    weights = {name: _problem(seed, rows=rows)[0] for seed, (name, rows) in enumerate(KINDS)}
    config = dataclasses.replace(QUICK, lr=optax.constant_schedule(1e-2))
    transform: Any = semi_pv(config, donate=donate)
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("batch",))  # as `distill` places them
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    weights, state = jax.device_put((weights, transform.init(weights)), everywhere)
    compiled: Any = pv._of_weight(donate)
    pv.forget_programs()
    pv.compile_ahead(config, weights, state, donate=donate)
    assert compiled._cache_size() == 2
    grads = {name: jnp.ones(weight.shape) for name, weight in weights.items()}
    grads = jax.device_put(grads, everywhere)
    transform.update(grads, state, weights)
    assert compiled._cache_size() == 2
    pv.forget_programs()
    assert compiled._cache_size() == 0


def test_donated_state_is_reused_for_the_same_bits():
    weight, loss = _problem()
    grad = jax.grad(loss)(weight.decode())
    found = {}
    for donate in (False, True):
        transform: Any = semi_pv(dataclasses.replace(pv.SEMI_PV, code_lr=0.5), donate=donate)
        params: Any = weight
        state = transform.init(params)
        for _ in range(3):
            before = state
            updates, state = transform.update(grad, state, params)
            params = optax.apply_updates(params, updates)
            assert before.leaves.codes.target_OJG.is_deleted() == donate
            assert before.leaves.codes.moments.second.is_deleted() == donate
        found[donate] = params, state
    for kept, donated in zip(*map(jax.tree.leaves, found.values()), strict=True):
        np.testing.assert_array_equal(kept, donated)


def test_padding_and_rows_of_zeros_decide_nothing():
    weight, loss = _problem(shape=(18, 6))
    weight = dataclasses.replace(weight, scales_O=weight.scales_O.at[2].set(0.0))
    # The last vectors, and they alone, use an entry that is out of reach where it is not cut off.
    codes = weight.codes_OJM.at[:, :-1, 0].max(1).at[:, -1, 0].set(0)
    weight, other = (
        dataclasses.replace(
            weight, codes_OJM=codes, codebooks_MKG=weight.codebooks_MKG.at[0, 0, 2:].set(far)
        )
        for far in (100.0, -300.0)
    )
    config = dataclasses.replace(QUICK, trust_ratio=3.0, max_code_change=1.0, invalidate="both")
    found, same = (_run(config, start, loss, 4)[-1] for start in (weight, other))
    assert np.any(found[0].codes_OJM[:, -1] != codes[:, -1])
    np.testing.assert_array_equal(found[0].codes_OJM, same[0].codes_OJM)
    np.testing.assert_array_equal(found[0].codes_OJM[2], codes[2])
    assert float(found[0].scales_O[2]) == 0
    assert np.all(np.isfinite(found[0].matrix()))


def test_scales_stay_positive_and_on_their_grid():
    weight, _ = _problem()
    grid = jnp.asarray([-1.0, 2 / 30], jnp.float32)  # 1/2 ... 2
    for scale_range, least in ((None, 0.0), (grid, 0.5 - 1e-6)):
        start = dataclasses.replace(weight, scale_range=scale_range)
        config = dataclasses.replace(QUICK, lr=100.0)
        scales = _run(config, start, lambda kernel: jnp.sum(kernel**2), 2)[-1][0].scales_O
        assert np.all(scales > least)
        assert np.all(scales < 2.0 + 1e-6) or scale_range is None


def test_other_leaves_take_adam_and_schedules_and_chains_work():
    weight, loss = _problem()
    params: Any = {"a": {"kernel": weight, "bias": jnp.arange(4.0)}, "b": jnp.ones((2, 3))}
    schedule = optax.linear_schedule(1e-2, 0.0, 5)
    config = PVConfig(lr=schedule, code_lr=schedule, betas=(0.9, 0.99), eps=1e-12)
    ours: Any = optax.chain(optax.clip_by_global_norm(1e3), semi_pv(config))
    adam: Any = optax.adam(schedule, b1=0.9, b2=0.99, eps=1e-12)
    plain = {"a": {"bias": params["a"]["bias"]}, "b": params["b"]}
    state, adam_state = ours.init(params), adam.init(plain)
    update = jax.jit(ours.update)
    for at in range(4):
        noise = jax.random.normal(jax.random.key(at), (4,))
        grads = {
            "a": {"kernel": jax.grad(loss)(params["a"]["kernel"].decode()), "bias": noise},
            "b": jnp.full((2, 3), float(at - 1.5)),
        }
        updates, state = update(grads, state, params)
        params = apply_updates(params, updates)
        plain_grads = {"a": {"bias": noise}, "b": grads["b"]}
        changes, adam_state = adam.update(plain_grads, adam_state)
        plain = apply_updates(plain, changes)
    np.testing.assert_allclose(params["a"]["bias"], plain["a"]["bias"], rtol=1e-5)
    np.testing.assert_allclose(params["b"], plain["b"], rtol=1e-5)
    assert params["a"]["kernel"].codes_OJM.dtype == jnp.uint8


def test_restarts_forget_all_targets_moments_and_nothing_else():
    weight, loss = _problem()
    _, state = _run(QUICK, weight, loss, 2)[-1]
    restarted = pv.invalidate_all(state)
    for moment in restarted.leaves.codes.moments:
        assert not np.any(moment)
    expected = state.leaves.codes._replace(moments=restarted.leaves.codes.moments)
    expected = state._replace(leaves=state.leaves._replace(codes=expected))
    for a, b in zip(jax.tree.leaves(restarted), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_tuning_codes_gains_on_tuning_codebooks():
    # 2 bits per weight; the start is far from what two codebooks can do.
    weight, loss = _problem(rows=16, groups=8, books=2, entries=16)
    start = float(loss(weight.decode()))
    ends = {}
    reach = {"lr": 1e-2, "code_lr": 2e-2, "delta_decay": 0.05, "max_code_change": 0.05, "beam": 4}
    for name, config in {
        "codebooks": dataclasses.replace(pv.CODEBOOKS_ONLY, lr=1e-2),
        "PV": dataclasses.replace(pv.PV, **reach),
        "SeMI-PV": dataclasses.replace(pv.SEMI_PV, **reach),
    }.items():
        after, _ = _run(config, weight, loss, 150)[-1]
        ends[name] = float(loss(after.decode())) / start
    assert ends["codebooks"] < 0.4
    assert ends["PV"] < 0.6 * ends["codebooks"], ends
    assert ends["SeMI-PV"] < 0.6 * ends["codebooks"], ends


def test_mistakes_are_named():
    weight, _ = _problem()
    with pytest.raises(VqjaxError, match=r"delta_decay 2, expected 0 to 1; beam 0, .* forced"):
        PVConfig(delta_decay=2, force_change=True)
    with pytest.raises(VqjaxError, match="pass a key"):
        semi_pv(PVConfig(temperature=1.0))
    transform: Any = semi_pv(PVConfig())
    state = transform.init(weight)
    with pytest.raises(VqjaxError, match="pass params"):
        transform.update(jnp.ones(weight.shape), state)
    with pytest.raises(VqjaxError, match=r"gradient \(6, 20\) for a kernel \(20, 6\)"):
        transform.update(jnp.ones((6, 20)), state, weight)
