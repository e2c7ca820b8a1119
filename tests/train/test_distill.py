# SPDX-License-Identifier: Apache-2.0
"""A quantized copy learns from the full-precision model, and does so the same way every time."""

import dataclasses
import functools
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from tests.conftest import relative_rms
from tests.io import models as small
from vqjax import sampling
from vqjax.core import grouping, scalar, tree
from vqjax.core.activations import Activations
from vqjax.core.coded import CodedWeight
from vqjax.core.plan import kernel_shapes
from vqjax.errors import VqjaxError
from vqjax.pipeline import memory, tuning
from vqjax.sampling.schedule import ddim_schedule
from vqjax.train import distill, loop, pv

TEACHER = small.dense(small.TINY)
CODED = ("unet/input_blocks_1/res/conv1/kernel", "unet/time_embed/dense2/kernel")
FAST = dataclasses.replace(pv.SEMI_PV, code_lr=0.3, max_code_change=0.1)
RECIPE = distill.Recipe(steps=6, batch=4, trajectories=6, timesteps=3, guidance=1.5)


def student(*, bits: int | None, ranges: bool = True) -> tuple[distill.Student, Activations | None]:
    """The teacher's weights, two kernels rounded to `bits`, and wide ranges of all inputs."""
    flat = tree.flatten({name: TEACHER.params[name] for name in memory.TRAINED})
    kernels = kernel_shapes({path: leaf.shape for path, leaf in flat.items()})
    if bits is not None:
        for path in CODED:
            shape = kernels[path]
            matrix_ON = grouping.to_matrix(np.asarray(flat[path]))
            flat[path] = CodedWeight.of(scalar.round_to_grid(matrix_ON, shape, 2**bits))
    weights = tree.unflatten(flat)
    if not ranges:
        return distill.Student(weights, None), None
    t_T = np.sort(distill.grid(TEACHER.config, RECIPE))
    activations = Activations(
        timesteps_T=jnp.asarray(t_T, jnp.int32),
        log2_steps={path: jnp.full(len(t_T), -4.0) for path in kernels},
        zeros={path: jnp.full(len(t_T), 100.0) for path in kernels},
        bits=8,
    )
    return distill.Student(weights, distill.Ranges.of(activations)), activations


def taught(
    folder: pathlib.Path, steps: int = RECIPE.steps, variant: pv.PVConfig = FAST, **settings
) -> distill.Student:
    """A student of 3 bits after some steps of a run of six."""
    before, activations = student(bits=3)
    return distill.distill(
        TEACHER,
        before,
        tuning.weights_optimizer(RECIPE.steps, 1.0, variant),
        tuning.ranges_optimizer(RECIPE.steps, 1.0),
        dataclasses.replace(RECIPE, steps=steps),
        folder,
        activations=activations,
        **settings,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> distill.Student:
    return taught(tmp_path_factory.mktemp("whole"))


def lessons(recipe: distill.Recipe) -> distill.Lessons:
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("batch",))
    return distill.Lessons(TEACHER, recipe, jax.sharding.NamedSharding(mesh, PartitionSpec()))


def test_the_teacher_walks_as_the_sampler_does():
    schedule = ddim_schedule(TEACHER.config, RECIPE.timesteps)
    ids, noise = jnp.array([1, 2]), sampling.image_noise(3, [0, 1], TEACHER.config.latent_shape)
    teach = functools.partial(distill.trajectories, TEACHER.config, RECIPE.guidance)
    t_TP = np.repeat(distill.grid(TEACHER.config, RECIPE)[:, None], 2, axis=1)
    found = teach(TEACHER.params, ids, noise, t_TP)
    expected = sampling.sample_latents(
        TEACHER.config, TEACHER.params, schedule, ids, noise, guidance=RECIPE.guidance
    )[1]
    assert relative_rms(found.x_BHWC, expected.x_SBHWC) < 1e-5
    np.testing.assert_array_equal(found.t_B[:, 0], schedule.timesteps[::-1])
    np.testing.assert_array_equal(found.ids_B[0], ids)
    # Beside another trajectory, at timesteps of its own.
    t_TP[:2, 1] += [-90, 120]
    beside = teach(TEACHER.params, ids, noise, t_TP)
    assert relative_rms(beside.x_BHWC[:, 0], expected.x_SBHWC[:, 0]) < 1e-5
    assert relative_rms(beside.x_BHWC[1:, 1], expected.x_SBHWC[1:, 1]) > 1e-2


def test_networks_are_multiplied_as_tensor_cores_do_whatever_the_caller_wants():
    """Where there are some: CPUs have one precision."""
    before, activations = student(bits=3)
    batch = lessons(RECIPE).like()
    weight_T = jnp.ones(TEACHER.config.timesteps)
    ids, noise = jnp.array([1, 2]), sampling.image_noise(3, [0, 1], TEACHER.config.latent_shape)
    t_TP = np.repeat(distill.grid(TEACHER.config, RECIPE)[:, None], 2, axis=1)
    walk = functools.partial(distill.trajectories, TEACHER.config, RECIPE.guidance)
    learn = functools.partial(
        distill.loss_and_gradients,
        TEACHER.config,
        activations=activations,
        guidance=RECIPE.guidance,
        weight_T=weight_T,
    )
    for jaxpr in (
        jax.make_jaxpr(walk)(TEACHER.params, ids, noise, t_TP),
        jax.make_jaxpr(learn)(before, batch),
    ):
        text = str(jaxpr)
        assert "Precision.HIGH" in text
        assert "Precision.HIGHEST" not in text


def test_both_networks_multiply_in_the_recipes_type_and_gradients_are_float32():
    before, activations = student(bits=3)
    learn = functools.partial(
        distill.loss_and_gradients,
        TEACHER.config,
        activations=activations,
        guidance=RECIPE.guidance,
        weight_T=jnp.ones(TEACHER.config.timesteps),
    )
    walk = functools.partial(distill.trajectories, TEACHER.config, RECIPE.guidance)
    ids, noise = jnp.array([1, 2]), jnp.zeros((2, *TEACHER.config.latent_shape))
    t_TP = np.repeat(distill.grid(TEACHER.config, RECIPE)[:, None], 2, axis=1)
    for dtype, short in (("float32", "f32"), ("bfloat16", "bf16")):
        for work, arguments in (
            (learn, (before, lessons(RECIPE).like())),
            (walk, (TEACHER.params, ids, noise, t_TP)),
        ):
            traced, shapes = jax.make_jaxpr(
                functools.partial(work, dtype=dtype), return_shape=True
            )(*arguments)
            products = re.findall(
                r":(\w+)\[[^]]*\] = (?:dot_general|conv_general_dilated)", str(traced)
            )
            assert set(products) == {short}
            found = {str(leaf.dtype) for leaf in jax.tree.leaves(shapes)}
            assert {"float32"} <= found <= {"float32", "int32", "uint8", "float0"}


@pytest.mark.parametrize(("steps", "timesteps"), [(25, 1000), (30, 1000), (1, 1000), (9, 10)])
def test_trajectories_visit_all_timesteps_between_those_of_the_grid(steps, timesteps):
    config = dataclasses.replace(TEACHER.config, timesteps=timesteps)
    grid_T = distill.grid(config, dataclasses.replace(RECIPE, timesteps=steps))
    t_TP = distill.near_grid(grid_T, 4000, timesteps, np.random.default_rng(0))
    assert (np.diff(t_TP, axis=0) < 0).all()
    assert (t_TP[-1] == 1).all()
    assert set(t_TP.reshape(-1)) == ({1} if steps == 1 else set(range(1, timesteps)))


def test_mixed_batches_use_every_pair_once_and_follow_from_the_index():
    given = lessons(RECIPE)
    assert given.steps_per_round == 4  # 6 trajectories of 3 timesteps, 4 pairs each, 2 left over
    batches = [given(index) for index in range(4)]
    seen = {(int(t), x.tobytes()) for b in batches for t, x in zip(b.t_B, np.asarray(b.x_BHWC))}
    assert len(seen) == 16
    assert any(len(set(np.asarray(batch.t_B))) > 1 for batch in batches)
    given(5)  # another round
    again = lessons(RECIPE)(2)
    jax.tree.map(np.testing.assert_array_equal, again, batches[2])


@pytest.mark.parametrize(("order", "guard"), [("trajectory", 3), ("mixed", None)])
def test_a_course_in_order_of_the_trajectory_is_guarded_by_whole_ones(
    order, guard, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(loop, "train", lambda *args, guard, **rest: [seen.append(guard)])
    before, activations = student(bits=None)
    optimizer = optax.sgd(0.1)
    recipe = dataclasses.replace(RECIPE, order=order)
    distill.distill(
        TEACHER, before, optimizer, optimizer, recipe, tmp_path, activations=activations
    )
    assert seen == [guard]


def test_batches_in_order_of_the_trajectory_have_one_timestep_each():
    given = lessons(dataclasses.replace(RECIPE, order="trajectory"))
    assert given.steps_per_round == 3
    timesteps = [set(np.asarray(given(index).t_B).tolist()) for index in range(4)]
    assert timesteps == [{667}, {334}, {1}, {667}]


def compiled(activations: Activations | None, remat: bool = False, parts: int = 1) -> Any:
    """`loss_and_gradients` of student, batch and weights of timesteps."""

    def compute(student, batch, weight_T):
        return distill.loss_and_gradients(
            TEACHER.config,
            student,
            batch,
            activations=activations,
            guidance=RECIPE.guidance,
            weight_T=weight_T,
            remat=remat,
            parts=parts,
        )

    return compute


EQUAL = jnp.ones(TEACHER.config.timesteps)


def test_what_equals_the_teacher_has_no_loss():
    itself, _ = student(bits=None, ranges=False)
    loss, gradients = compiled(None)(itself, lessons(RECIPE)(0), EQUAL)
    assert float(loss) < 1e-8
    assert gradients.ranges is None


@pytest.mark.parametrize("how", [{"remat": True}, {"parts": 2}], ids=str)
def test_what_saves_memory_changes_no_gradient(how):
    coded, activations = student(bits=3)
    batch = lessons(RECIPE)(0)
    found = [compiled(activations, **way)(coded, batch, EQUAL) for way in ({}, how)]
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-5)
    plain, other = (jax.tree.leaves(gradients) for _, gradients in found)
    # Biases before a norm have no gradient but rounding.
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in plain)
    for a, b in zip(plain, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale)


def test_batches_have_equal_parts():
    assert [dataclasses.replace(RECIPE, at_once=n).parts for n in (0, 4, 2, 1)] == [1, 1, 2, 4]
    with pytest.raises(VqjaxError, match=r"at_once 3: expected a divisor of the batch, 4"):
        dataclasses.replace(RECIPE, at_once=3)


def test_tuning_moves_codes_ranges_and_biases(whole):
    before, _ = student(bits=3)
    old, new = (tree.flatten(s.weights)[CODED[0]] for s in (before, whole))
    assert np.any(np.asarray(old.codes_OJM) != np.asarray(new.codes_OJM))
    assert np.any(np.asarray(old.scales_O) != np.asarray(new.scales_O))
    for name in ("unet/out/conv/bias", "cond_stage/embedding"):
        changed = tree.flatten(whole.weights)[name] - tree.flatten(before.weights)[name]
        assert float(jnp.max(jnp.abs(changed))) > 0, name
    assert before.ranges is not None
    for old_LT, new_LT in zip(before.ranges, whole.ranges):
        assert np.any(np.asarray(old_LT) != np.asarray(new_LT))


def test_an_interrupted_tuning_ends_with_the_same_bits(whole, tmp_path):
    taught(tmp_path, steps=3)
    for a, b in zip(*(jax.tree.leaves(s) for s in (whole, taught(tmp_path))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_new_trajectories_are_announced_once_each(tmp_path):
    seen = []

    def on_restart(state):
        seen.append(int(state.count))
        return pv.invalidate_all(state)

    taught(tmp_path, variant=pv.CODEBOOKS_ONLY, on_restart=on_restart)
    assert seen == [lessons(RECIPE).steps_per_round]  # six steps, four in a round


def test_a_loss_that_grows_stops_with_advice(tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "_MOST", 1e-9)
    with pytest.raises(loop.DivergedError, match=r"at step 0.*try --tuning.rate 0.3"):
        taught(tmp_path)


def test_weights_of_timesteps_scale_the_loss():
    coded, activations = student(bits=3)
    batch = lessons(RECIPE)(0)
    t = int(batch.t_B[0])
    compute, weights = compiled(activations), (EQUAL, EQUAL.at[t].set(0.0), 2 * EQUAL)
    losses = [compute(coded, batch, weight_T)[0] for weight_T in weights]
    assert losses[1] < losses[0]
    assert float(losses[2]) == pytest.approx(2 * float(losses[0]), rel=1e-5)


def test_the_mean_loss_is_that_of_the_batches():
    coded, activations = student(bits=3)
    recipe = dataclasses.replace(RECIPE, steps=2)

    def weight_of_t(t_T):
        return 1.0 + t_T

    weight_T = lessons(recipe).weights(weight_of_t)
    assert float(jnp.mean(weight_T[lessons(recipe).grid_T])) == pytest.approx(1)
    given, compute = lessons(recipe), compiled(activations)
    expected = [float(compute(coded, given(index), weight_T)[0]) for index in range(2)]
    params = {**distill.decoded(coded.weights), "activations": activations}
    found = distill.mean_loss(TEACHER, params, recipe, weight_of_t=weight_of_t)
    assert found == pytest.approx(np.mean(expected), rel=1e-4)


def test_steps_lower_the_loss_of_their_batch():
    coded, activations = student(bits=3)
    batch = lessons(RECIPE)(0)
    optimizer: Any = pv.semi_pv(dataclasses.replace(FAST, lr=1e-2, code_lr=0.05))
    compute = compiled(activations)
    state, losses = optimizer.init(coded.weights), []
    for _ in range(20):
        loss, gradients = compute(coded, batch, EQUAL)
        updates, state = optimizer.update(gradients.weights, state, coded.weights)
        weights: Any = optax.apply_updates(coded.weights, updates)
        coded = coded._replace(weights=weights)
        losses.append(float(loss))
    assert min(losses) < 0.8 * losses[0]
