# SPDX-License-Identifier: Apache-2.0
"""What is computed before a sampler's loop is what each step would compute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import relative_rms
from tests.io import models as small
from vqjax import models, sampling
from vqjax.core import folding
from vqjax.core.integer import integerize
from vqjax.models import ahead
from vqjax.sampling.schedule import ddim_schedule

T_T = np.array([801, 401, 1], np.int32)


def folded(model) -> dict:
    return folding.fold(model.config, model.params).params


def ranged(integer: bool) -> tuple:
    """Of the smallest model: networks that round take several times as long to compile."""
    params = folded(small.with_ranges(small.TINY))
    return small.TINY, integerize(params) if integer else params


MODELS = {
    "dense": lambda: (small.CLASSES, folded(small.dense(small.CLASSES))),
    "packed": lambda: (small.CLASSES, folded(small.quantized(small.CLASSES))),
    "rounded inputs": lambda: ranged(integer=False),
    "integers": lambda: ranged(integer=True),
    "with queries": lambda: (small.CLASSES, small.dense(small.CLASSES).params),
    "no classes": lambda: (small.PLAIN, small.dense(small.PLAIN).params),
    "scale and shift": lambda: (small.UPDOWN, small.dense(small.UPDOWN).params),
}


@functools.cache
def call(name: str):
    """A model, a latent of two examples, and their context."""
    config, params = MODELS[name]()
    x_BHWC = jnp.asarray(np.random.default_rng(0).standard_normal((2, *config.latent_shape)))
    context = models.embed_classes(config, params, jnp.array([1, 3]))
    return config, params, x_BHWC.astype(jnp.float32), context


@pytest.mark.parametrize("name", MODELS)
def test_predictions_are_those_of_a_network_that_computes_all(name):
    config, params, x_BHWC, context = call(name)
    known_at = models.outputs_ahead(config, params, jnp.asarray(T_T), context, "float32")
    predict = jax.jit(functools.partial(models.predict_noise, config))
    for t in T_T:
        t_B = jnp.full(2, t)
        expected = predict(params, x_BHWC, t_B, context)
        found = predict(params, x_BHWC, t_B, context, known=known_at(t))
        # A level of an 8-bit input may be the next one after a rounding error.
        assert relative_rms(found, expected) < (1e-3 if "activations" in params else 1e-5)


# Integers hide what is no number.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "integers"])
def test_every_layer_that_does_not_see_the_latent_is_known(name):
    """Latents that are no numbers leave their marks everywhere else."""
    config, params, x_BHWC, context = call(name)
    known = models.outputs_ahead(config, params, jnp.asarray(T_T), context, "float32")(T_T[1])

    @jax.jit
    def looked(params, x_BHWC, t_B, context):
        def look(path, x, window):
            return jnp.isfinite(x).all()

        return models.capture_inputs(config, params, x_BHWC, t_B, context, look)[1]

    nothing = np.full(x_BHWC.shape, np.nan, np.float32)
    seen = looked(params, nothing, np.full(2, T_T[1]), context)
    finite = {path for path, clean in seen.items() if clean}
    covered = {"/".join(("unet", *path)) for path in known}
    left = {path for path in finite if not any(path.startswith(f"{c}/") for c in covered)}
    attended = {path for path in left if "/attn2/to_" in path}  # of those with queries
    assert left - attended == {f"unet/time_embed/dense{n}/kernel" for n in (1, 2)}
    assert bool(attended) == (name == "with queries")
    assert covered


def test_what_is_known_is_not_computed():
    config, params, x_BHWC, context = call("dense")
    predict = jax.jit(functools.partial(models.predict_noise, config))
    known = models.outputs_ahead(config, params, jnp.asarray(T_T), context, "float32")(T_T[0])
    for path in known:
        wrong = {**known, path: known[path] * jnp.nan}
        found = predict(params, x_BHWC, jnp.full(2, T_T[0]), context, known=wrong)
        assert np.isnan(found).all(), path


def test_classes_by_hundreds_of_steps_are_left_in_the_loop(monkeypatch):
    config, params, _, context = call("rounded inputs")
    monkeypatch.setattr(ahead, "_MOST_BYTES", 64)
    known = models.outputs_ahead(config, params, jnp.asarray(T_T), context, "float32")(T_T[0])
    assert known
    assert {path[-1] for path in known} == {"emb"}


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_sampler_gives_the_same_latents(guidance):
    config, params, x_BHWC, _ = call("dense")
    schedule, ids_B = ddim_schedule(config, 4), jnp.array([1, 3])
    found, seen = sampling.sample_latents(
        config, params, schedule, ids_B, x_BHWC, guidance=guidance
    )
    predict = sampling.predictor(config, params, ids_B, guidance)
    expected = sampling.ddim.ddim(predict, schedule, x_BHWC)[0]
    assert relative_rms(found, expected) < 1e-5
    assert len(seen.x_SBHWC) == 4
