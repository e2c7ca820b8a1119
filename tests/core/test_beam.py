# SPDX-License-Identifier: Apache-2.0
"""Beam search against reference codes, and what every beam search must keep."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import golden_params
from vqjax.core import beam, sweep
from vqjax.errors import VqjaxError


def _float64_loss(data, codes, moment):
    books, scales = data["codebooks"], data["scales"]
    sums = sum(books[m][codes[..., m]] for m in range(books.shape[0]))
    residual = data["weight"] - (sums * scales[:, None, None]).reshape(data["weight"].shape)
    return np.einsum("oi,ij,oj->", residual, moment, residual)


def _arguments(data, codes):
    weight, moment, books, scales = (
        jnp.asarray(data[name], jnp.float32) for name in ("weight", "xtx", "codebooks", "scales")
    )
    return weight, moment, jnp.asarray(codes, jnp.int32), books, scales


@pytest.mark.parametrize("path", golden_params("aq", "beam_fixture_*.npz"))
@pytest.mark.parametrize("width", [1, 4])
def test_sweeps_meet_the_reference(path, width):
    data = np.load(path)
    codes = data["start_codes"]
    for name in (f"xtx_beam{width}", f"xtx_beam{width}_pass2"):
        codes = np.asarray(beam.beam_search(*_arguments(data, codes), beam=width)[0])
        expected = float(data[f"{name}_loss"])
        assert _float64_loss(data, codes, data["xtx"]) <= expected * (1 + 1e-6), name


def _plain_search(weight, codes, books, scales, *, width):
    """Under the plain squared error, where every vector is a row of its own."""
    found, loss = beam.beam_search(
        weight.reshape(-1, books.shape[-1]),
        jnp.eye(books.shape[-1], dtype=jnp.float32),
        codes.reshape(-1, 1, codes.shape[-1]),
        books,
        jnp.repeat(scales, codes.shape[1]),
        beam=width,
    )
    return found.reshape(codes.shape), loss


@pytest.mark.parametrize("path", golden_params("aq", "beam_fixture_*.npz"))
@pytest.mark.parametrize("width", [1, 4])
def test_plain_search_meets_the_reference(path, width):
    data = np.load(path)
    weight, _, codes, books, scales = _arguments(data, data["start_codes"])
    found = np.asarray(_plain_search(weight, codes, books, scales, width=width)[0])
    expected = float(data[f"l2_beam{width}_loss"])
    assert _float64_loss(data, found, np.eye(weight.shape[1])) <= expected * (1 + 1e-6)


def _problem(rows=12, groups=6, books=4, entries=8, group=4, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(groups * group, 2 * groups * group))
    parts = (
        rng.normal(size=(rows, groups * group)),
        mix @ mix.T / mix.shape[1],
        rng.integers(0, entries, (rows, groups, books)),
        rng.normal(size=(books, entries, group)) * 0.6,
        rng.uniform(0.5, 1.5, rows),
    )
    return tuple(
        jnp.asarray(part, jnp.int32 if part.dtype == int else jnp.float32) for part in parts
    )


def test_no_row_gets_worse_and_wider_beams_get_better():
    weight, moment, codes, books, scales = _problem()
    start = sweep.loss_rows(weight - sweep.reconstruct(codes, books, scales), moment)
    losses = []
    for width in (1, 4, 16):
        _, loss = beam.beam_search(weight, moment, codes, books, scales, beam=width)
        assert np.all(np.asarray(loss) <= np.asarray(start) * (1 + 1e-5))
        losses.append(float(loss.sum()))
    assert losses[0] > losses[1] > losses[2]


def test_plain_search_needs_residuals_that_follow_their_hypotheses():
    # With four codebooks a residual left behind makes wide beams worse than narrow ones.
    weight, _, codes, books, scales = _problem(books=4, entries=16, seed=1)
    losses = [
        float(_plain_search(weight, codes, books, scales, width=width)[1].sum())
        for width in (1, 4, 32)
    ]
    assert losses[0] > losses[1] > losses[2]


def test_a_beam_needs_a_hypothesis():
    with pytest.raises(VqjaxError, match="beam of 0 hypotheses: at least 1"):
        beam.beam_search(*_problem(), beam=0)
