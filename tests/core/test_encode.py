# SPDX-License-Identifier: Apache-2.0
"""The inner search against enumeration by brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.core import encode

encode_exact = jax.jit(encode.encode_exact)
encode_beam = jax.jit(encode.encode_beam, static_argnums=3)


def _problem(books, entries, group=5, rows=9, seed=0, rank=5):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(group, rank))
    linear, entries_MKG = rng.normal(size=(rows, group)), rng.normal(size=(books, entries, group))
    return (
        linear.astype(np.float32),
        (root @ root.T).astype(np.float32),
        entries_MKG.astype(np.float32),
    )


def _every_cost(linear, metric, books):
    linear, metric, books = (np.asarray(part, np.float64) for part in (linear, metric, books))
    choices = itertools.product(range(books.shape[1]), repeat=books.shape[0])
    sums = np.stack([sum(books[m, k] for m, k in enumerate(codes)) for codes in choices])
    return np.einsum("pg,gh,ph->p", sums, metric, sums)[None] - 2 * linear @ sums.T


def _cost(codes, linear, metric, books):
    sums = np.sum(
        [book_KG[codes_P] for book_KG, codes_P in zip(books, np.asarray(codes).T)], axis=0
    )
    np.testing.assert_allclose(encode.entry_sum(codes, books), sums, rtol=1e-5, atol=1e-5)
    return np.asarray(jax.jit(encode.cost)(sums, linear, metric))


@pytest.mark.parametrize(
    ("books", "entries", "rank"), [(1, 16, 5), (2, 7, 5), (3, 4, 2), (4, 4, 5)]
)
def test_enumeration_finds_the_least_cost(books, entries, rank):
    problem = _problem(books, entries, rank=rank)
    found = _cost(encode_exact(*problem), *problem)
    np.testing.assert_allclose(found, _every_cost(*problem).min(1), rtol=1e-4, atol=1e-4)


def test_full_width_beam_is_enumeration_and_narrow_ones_are_no_better():
    problem = _problem(3, 5)
    full = _cost(encode_beam(*problem, 25), *problem)
    np.testing.assert_allclose(full, _every_cost(*problem).min(1), rtol=1e-4, atol=1e-4)
    assert _cost(encode_beam(*problem, 1), *problem).sum() > full.sum()


def test_more_codebooks_than_can_be_enumerated_improve_on_the_beam_and_the_start():
    problem = _problem(6, 16, group=8, rank=8)
    previous = jnp.zeros((9, 6), jnp.int32)
    compiled = jax.jit(encode.encode, static_argnames="beam")
    found = _cost(compiled(*problem, previous, beam=4), *problem)
    assert np.all(found <= _cost(previous, *problem))
    assert found.sum() < _cost(encode_beam(*problem, 4), *problem).sum()


@pytest.mark.parametrize(
    ("books", "entries"), [(4, 16), (8, 16), (2, 256), (3, 256), (1, 4096), (2, 4096)]
)
def test_blocks_cover_all_codebooks_within_the_limit(books, entries):
    blocks = encode._blocks(books, entries, encode.EXACT_LIMIT)
    assert set(itertools.chain(*blocks)) == set(range(books))
    assert all(entries ** len(block) <= encode.EXACT_LIMIT for block in blocks)


def test_smaller_blocks_serve_where_not_all_sums_are_enumerated():
    assert encode._blocks(4, 16, 4096) == [[0, 1, 2, 3]]
    blocks = encode._blocks(5, 16, 4096)
    assert set(itertools.chain(*blocks)) == set(range(5))
    assert {len(block) for block in blocks} == {3}
    assert {len(block) for block in encode._blocks(3, 512, 4096)} == {1}


@pytest.mark.parametrize("entries", [3, 16, 21])
def test_enumeration_is_complete_for_any_number_of_entries(entries):
    """Sums are taken sixteen at a time: what fills the last sixteen must never be chosen."""
    rng = np.random.default_rng(entries)
    books = rng.normal(size=(2, entries, 4)).astype(np.float32)
    wanted = 3 * rng.normal(size=(40, 4)).astype(np.float32)
    metric = np.eye(4, dtype=np.float32)
    codes = encode_exact(wanted, metric, books)
    sums = np.asarray(jax.jit(encode.all_sums)(books))
    nearest = np.argmin(((np.asarray(wanted)[:, None] - sums[None]) ** 2).sum(-1), axis=1)
    np.testing.assert_array_equal(np.asarray(codes)[:, 0] * entries + codes[:, 1], nearest)
