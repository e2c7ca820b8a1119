# SPDX-License-Identifier: Apache-2.0
"""The inner search against enumeration by brute force."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.core import encode


def _problem(books, entries, group=5, rows=9, seed=0, rank=5):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(group, rank))
    linear, entries_MKG = rng.normal(size=(rows, group)), rng.normal(size=(books, entries, group))
    return (
        jnp.asarray(linear, jnp.float32),
        jnp.asarray(root @ root.T, jnp.float32),
        jnp.asarray(entries_MKG, jnp.float32),
    )


def _every_cost(linear, metric, books):
    linear, metric, books = (np.asarray(part, np.float64) for part in (linear, metric, books))
    choices = itertools.product(range(books.shape[1]), repeat=books.shape[0])
    sums = np.stack([sum(books[m, k] for m, k in enumerate(codes)) for codes in choices])
    return np.einsum("pg,gh,ph->p", sums, metric, sums)[None] - 2 * linear @ sums.T


def _cost(codes, linear, metric, books):
    return np.asarray(encode.cost(encode.entry_sum(codes, books), linear, metric))


@pytest.mark.parametrize(
    ("books", "entries", "rank"), [(1, 16, 5), (2, 7, 5), (3, 4, 2), (4, 4, 5)]
)
def test_enumeration_finds_the_least_cost(books, entries, rank):
    problem = _problem(books, entries, rank=rank)
    found = _cost(encode.encode_exact(*problem), *problem)
    np.testing.assert_allclose(found, _every_cost(*problem).min(1), rtol=1e-4, atol=1e-4)


def test_full_width_beam_is_enumeration_and_narrow_ones_are_no_better():
    problem = _problem(3, 5)
    full = _cost(encode.encode_beam(*problem, 25), *problem)
    np.testing.assert_allclose(full, _every_cost(*problem).min(1), rtol=1e-4, atol=1e-4)
    assert _cost(encode.encode_beam(*problem, 1), *problem).sum() > full.sum()


def test_more_codebooks_than_can_be_enumerated_improve_on_the_beam_and_the_start():
    problem = _problem(6, 16, group=8, rank=8)
    previous = jnp.zeros((9, 6), jnp.int32)
    found = _cost(encode.encode(*problem, previous, beam=4), *problem)
    assert np.all(found <= _cost(previous, *problem))
    assert found.sum() < _cost(encode.encode_beam(*problem, 4), *problem).sum()


@pytest.mark.parametrize(
    ("books", "entries"), [(4, 16), (8, 16), (2, 256), (3, 256), (1, 4096), (2, 4096)]
)
def test_blocks_cover_all_codebooks_within_the_limit(books, entries):
    blocks = encode._blocks(books, entries)
    assert set(itertools.chain(*blocks)) == set(range(books))
    assert all(entries ** len(block) <= encode.EXACT_LIMIT for block in blocks)


@pytest.mark.parametrize("entries", [3, 16, 21])
def test_enumeration_is_complete_for_any_number_of_entries(entries):
    """Sums are taken sixteen at a time: what fills the last sixteen must never be chosen."""
    rng = np.random.default_rng(entries)
    books = jnp.asarray(rng.normal(size=(2, entries, 4)), jnp.float32)
    wanted = jnp.asarray(rng.normal(size=(40, 4)) * 3, jnp.float32)
    metric = jnp.eye(4, dtype=jnp.float32)
    codes = encode.encode_exact(wanted, metric, books)
    sums = np.asarray(encode.all_sums(books))
    nearest = np.argmin(((np.asarray(wanted)[:, None] - sums[None]) ** 2).sum(-1), axis=1)
    np.testing.assert_array_equal(np.asarray(codes)[:, 0] * entries + codes[:, 1], nearest)
