# SPDX-License-Identifier: Apache-2.0
"""The nearest sums against reference codes and brute force."""

import jax
import numpy as np
import pytest

from tests.conftest import golden_params
from vqjax.core.encode import all_sums
from vqjax.core.nearest import nearest_codes
from vqjax.errors import VqjaxError

compiled = jax.jit(nearest_codes, static_argnames=("beam", "differ", "tail"))


@pytest.mark.parametrize("path", golden_params("aq", "beam_fixture_*.npz"))
@pytest.mark.parametrize("name", ["l2_beam1", "l2_beam4", "l2_beam4_force"])
def test_codes_equal_the_reference(path, name):
    data = np.load(path)
    books, scales, codes = (data[name] for name in ("codebooks", "scales", "start_codes"))
    vectors = (data["weight"] / scales[:, None]).reshape(-1, books.shape[-1])
    found = compiled(
        vectors.astype(np.float32),
        codes.reshape(-1, codes.shape[-1]).astype(np.int32),
        books.astype(np.float32),
        beam=int(name.removeprefix("l2_beam")[0]),
        differ=name.endswith("force"),
    )
    np.testing.assert_array_equal(found, data[f"{name}_codes"].reshape(found.shape))


def _problem(count=40, books=3, entries=5, group=4):
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(count, group)).astype(np.float32),
        rng.integers(0, entries, (count, books)).astype(np.int32),
        rng.normal(size=(books, entries, group)).astype(np.float32),
    )


@pytest.mark.parametrize("beam", [0, 25])
def test_a_full_search_finds_the_nearest_in_the_weights_that_count(beam):
    wanted, codes, books = _problem()
    short = np.arange(len(wanted)) % 3 == 0
    found = compiled(wanted, codes, books, beam=beam, short_V=short, tail=2)
    sums, found = (np.asarray(x) for x in (jax.jit(all_sums)(books), found))
    for v in range(len(wanted)):
        length = 2 if short[v] else 4
        distances = np.sum((sums[:, :length] - wanted[v, :length]) ** 2, axis=-1)
        place = np.ravel_multi_index(tuple(found[v]), (5, 5, 5))
        assert distances[place] == pytest.approx(distances.min(), rel=1e-5, abs=1e-6)


def test_codes_that_must_differ_need_a_beam():
    with pytest.raises(VqjaxError, match="beam of at least 1 hypothesis, not 0"):
        compiled(*_problem(), beam=0, differ=True)
