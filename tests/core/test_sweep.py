# SPDX-License-Identifier: Apache-2.0
"""Sweeps over whole matrices: what they may never do, and in which precision they judge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.core import codebooks, sweep

ROWS, GROUPS, GROUP = 7, 12, 4
SIZE = GROUPS * GROUP


def _problem(books=3, entries=5, seed=0, condition=1e3):
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    moment = basis * np.geomspace(condition, 1, SIZE) @ basis.T
    return (
        jnp.asarray(rng.normal(size=(ROWS, SIZE)), jnp.float32),
        jnp.asarray(moment / np.mean(np.diagonal(moment)), jnp.float32),
        jnp.asarray(rng.integers(0, entries, (ROWS, GROUPS, books)), jnp.int32),
        jnp.asarray(rng.normal(size=(books, entries, GROUP)) * 0.6, jnp.float32),
        jnp.asarray(rng.uniform(0.5, 2, ROWS), jnp.float32),
    )


def _loss(weight, moment, codes, books, scales):
    """By loops' arithmetic: decoded and multiplied out in float64."""
    parts = np.asarray(books, np.float64), np.asarray(codes)
    sums = np.sum([parts[0][m][parts[1][..., m]] for m in range(parts[0].shape[0])], axis=0)
    decoded = sums.reshape(ROWS, SIZE) * np.asarray(scales, np.float64)[:, None]
    error = np.asarray(weight, np.float64) - decoded
    return np.sum(error @ np.asarray(moment, np.float64) * error, axis=1)


@pytest.mark.parametrize(("books", "entries"), [(1, 5), (3, 5), (6, 16)])
@pytest.mark.parametrize("condition", [1.0, 1e6])
def test_no_sweep_of_descent_raises_the_loss_of_any_row(books, entries, condition):
    weight, moment, codes, books_MKG, scales = _problem(books, entries, condition=condition)
    before = _loss(weight, moment, codes, books_MKG, scales)
    for _ in range(3):
        codes = sweep.descend(weight, moment, codes, books_MKG, scales)
        after = _loss(weight, moment, codes, books_MKG, scales)
        assert np.all(after <= before * (1 + 1e-5))
        before = after


def test_least_squares_never_raises_the_loss_and_is_the_optimum():
    weight, moment, codes, books_MKG, scales = _problem()
    codes = sweep.descend(weight, moment, codes, books_MKG, scales)
    before = _loss(weight, moment, codes, books_MKG, scales).sum()
    fit = codebooks.improve(weight, moment, codes, books_MKG, scales, jax.random.key(0))
    after = _loss(weight, moment, codes, fit.books_MKG, fit.scales_O).sum()
    np.testing.assert_allclose(fit.loss, after, rtol=1e-4)
    assert after < before
    # The same with the normal equations written out, scales held.
    entries = books_MKG.shape[1]
    design = np.zeros((ROWS, SIZE, books_MKG.size))
    for o, j, m in np.ndindex(codes.shape):
        for g in range(GROUP):
            place = (m * entries + int(codes[o, j, m])) * GROUP + g
            design[o, j * GROUP + g, place] += float(scales[o])
    root = np.linalg.cholesky(np.asarray(moment, np.float64)).T
    left = np.concatenate([root @ design[o] for o in range(ROWS)])
    right = np.concatenate([root @ np.asarray(weight[o], np.float64) for o in range(ROWS)])
    best = np.linalg.lstsq(left, right, rcond=None)[0].reshape(books_MKG.shape)
    least = _loss(weight, moment, codes, best, scales).sum()
    image = (weight - sweep.reconstruct(codes, books_MKG, scales)) @ moment
    shares = codebooks.entry_weights(codes, scales, jnp.diagonal(moment), entries)
    found = codebooks.fit_codebooks(image, moment, codes, books_MKG, scales, shares, steps=60)
    assert _loss(weight, moment, codes, found, scales).sum() < least * 1.02


def test_codebooks_fitted_to_some_rows_are_kept_only_where_all_rows_gain():
    weight, moment, codes, books_MKG, scales = _problem()
    before = _loss(weight, moment, codes, books_MKG, scales).sum()
    for rows in (1, 3, ROWS):
        fit = codebooks.improve(
            weight, moment, codes, books_MKG, scales, jax.random.key(0), rows=rows
        )
        after = _loss(weight, moment, codes, fit.books_MKG, fit.scales_O).sum()
        assert after <= before * (1 + 1e-5)
        np.testing.assert_allclose(fit.loss, after, rtol=1e-4)
    assert codebooks.fit_rows(960, 960) == 68
    assert codebooks.fit_rows(64, 64) == 64


@pytest.mark.parametrize("padded", [ROWS + 2, 2 * ROWS + 3])
def test_padding_changes_no_fit(padded):
    weight, moment, codes, books_MKG, scales = _problem()
    key = jax.random.key(0)
    alone = codebooks.improve(weight, moment, codes, books_MKG, scales, key)
    rows = jax.tree.map(
        lambda array: jnp.pad(array, ((0, padded - ROWS), *((0, 0),) * (array.ndim - 1))),
        (weight, codes, scales),
    )
    filled = codebooks.improve(rows[0], moment, rows[1], books_MKG, rows[2], key, ROWS)
    np.testing.assert_allclose(filled.books_MKG, alone.books_MKG, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(filled.scales_O[:ROWS], alone.scales_O, rtol=1e-4)


def test_unused_entries_move_next_to_the_busiest():
    weight, moment, codes, books_MKG, scales = _problem()
    codes = jnp.where(codes == 2, 1, codes)
    last_MKG, momentum = books_MKG - 0.1, 0.8
    fit = codebooks.improve(
        weight, moment, codes, books_MKG, scales, jax.random.key(0), None, last_MKG, momentum
    )
    np.testing.assert_array_equal(fit.books_MKG[:, 2], books_MKG[:, 2])
    used = [0, 1, 3, 4]
    onward = (fit.books_MKG - books_MKG) + momentum * (fit.books_MKG - last_MKG)
    moved = np.asarray(fit.onward_MKG - fit.books_MKG)
    np.testing.assert_allclose(moved[:, used], onward[:, used], rtol=1e-3, atol=1e-5)
    assert np.all(np.abs(moved[:, 2]).max(axis=-1) > 0)


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e7])
def test_float32_tells_losses_apart_that_the_search_must_tell_apart(condition):
    """Rounds end at gains of 1e-3: float32 is right to a tenth of that, however ill S is.

    Losses are judged from (W - Q) S, whose error is relative to the loss itself: nothing large is
    subtracted.
    """
    weight, moment, codes, books_MKG, scales = _problem(condition=condition)
    codes = sweep.descend(weight, moment, codes, books_MKG, scales)
    exact = _loss(weight, moment, codes, books_MKG, scales)
    residual = weight - sweep.reconstruct(codes, books_MKG, scales)
    np.testing.assert_allclose(sweep.loss_rows(residual, moment), exact, rtol=1e-4)


def test_error_feedback_beats_choosing_every_vector_by_itself():
    weight, moment, _, books_MKG, scales = _problem(entries=16, condition=1e4)
    passed, metric, _ = sweep.feedback_factors(moment, 0.01, group=GROUP)
    alone = sweep.feedback(weight, jnp.zeros_like(passed), metric, books_MKG, scales)
    fed = sweep.feedback(weight, passed, metric, books_MKG, scales)
    losses = [_loss(weight, moment, codes, books_MKG, scales).sum() for codes in (fed, alone)]
    assert losses[0] < 0.8 * losses[1]
