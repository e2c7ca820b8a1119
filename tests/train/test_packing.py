# SPDX-License-Identifier: Apache-2.0
"""Small arrays of a state are saved as one."""

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.train import loop, packing


def test_a_state_comes_back_from_few_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "SMALL", 64)
    rng = np.random.default_rng(0)
    state = {
        "key": jax.random.key(7),
        "large": jnp.asarray(rng.standard_normal((5, 7)), jnp.float32),
        "half": jnp.asarray(rng.standard_normal(3), jnp.bfloat16),
        "count": jnp.int32(-4),
        "none": None,
        "small": [
            jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 3), (), (4,))
        ],
        "codes": jnp.arange(9, dtype=jnp.uint8),
    }
    packed = packing.pack(state)
    assert {name: array.size for name, array in packed.items()} == {
        "bfloat16": 3,
        "float32": 11,
        "int32": 1,
        "uint8": 9,
        "leaf 3": 1,
        "leaf 4": 35,
    }

    def kept(state, index):
        return state, {"loss": jnp.float32(1)}

    loop.train("run", state, kept, 1, tmp_path)
    found = loop.train("run", packing.shapes_of(state), kept, 1, tmp_path)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert (a.dtype, a.shape, a.sharding) == (b.dtype, b.shape, b.sharding)
        if not jnp.issubdtype(a.dtype, jax.dtypes.extended):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert jnp.array_equal(jax.random.key_data(found["key"]), jax.random.key_data(state["key"]))
