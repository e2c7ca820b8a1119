# SPDX-License-Identifier: Apache-2.0
"""Second moments against numpy on the layer inputs themselves, and the split by memory."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.io import models as small
from vqjax import models
from vqjax.core import folding, row_sums, tree
from vqjax.core import moments as moments_lib
from vqjax.core.plan import kernel_shapes
from vqjax.pipeline import calibrate
from vqjax.pipeline.gathered import Gathered, Moments
from vqjax.settings import Calibration

SETTINGS = Calibration(images=3, steps=4, batch=2)


PATHS = (
    "unet/input_blocks_0/conv/kernel",
    "unet/input_blocks_2/downsample/kernel",
    "unet/input_blocks_3/attn/block_0/attn1/to_q/kernel",
    "unet/output_blocks_3/res/skip/kernel",
    "unet/output_blocks_1/res/conv1/kernel",
)
OF_TIME = ("unet/time_embed/dense1/kernel", "unet/input_blocks_1/res/emb/kernel")
OF_CLASS = tuple(
    f"unet/input_blocks_3/attn/block_0/attn2/to_{name}/kernel" for name in ("v", "out")
)


def _patches(x_BHWC: np.ndarray, stride: int, padding: tuple[int, int]) -> np.ndarray:
    x_BHWC = np.pad(x_BHWC, ((0, 0), padding, padding, (0, 0)))
    _, height, width, _ = x_BHWC.shape
    cells = [
        x_BHWC[:, i : i + 3, j : j + 3].transpose(0, 3, 1, 2).reshape(len(x_BHWC), -1)
        for i in range(0, height - 2, stride)
        for j in range(0, width - 2, stride)
    ]
    return np.stack(cells, axis=1)


def _rows_by_image(model, visited) -> dict[str, np.ndarray]:
    """Everything that the layers `PATHS` see, [images, rows, fan-in], as NumPy makes it."""
    found, windows = {path: [] for path in PATHS}, {}

    @jax.jit
    def look(params, x_BHWC, t_B, ids_B):
        def keep(path, x, window):
            windows[path] = window
            return x if path in PATHS else None

        context = models.embed_classes(model.config, params, ids_B)
        return models.capture_inputs(model.config, params, x_BHWC, t_B, context, keep)[1]

    for x_TBHWC, t_T, ids_B in visited:
        calls = {path: [] for path in PATHS}
        for x_BHWC, t in zip(x_TBHWC, t_T):
            both = np.concatenate([np.full(len(ids_B), 3), ids_B])
            x_BHWC = np.concatenate([x_BHWC, x_BHWC])
            seen = look(model.params, x_BHWC, np.full(len(both), t), both)
            for path in PATHS:
                x, window = np.asarray(seen[path], np.float64), windows[path]
                if window and window["window"] == 3:
                    x = _patches(x, window["stride"], window["padding"])
                x = x.reshape(2, len(ids_B), -1, x.shape[-1])
                calls[path].append(np.concatenate(x, axis=1))
        for path in PATHS:
            found[path].append(np.concatenate(calls[path], axis=1))
    return {path: np.concatenate(parts) for path, parts in found.items()}


def test_moments_are_the_means_over_what_each_output_reads(monkeypatch):
    monkeypatch.setattr(row_sums, "BLOCK", 50)
    monkeypatch.setattr(calibrate, "_CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr(moments_lib, "HELD_FEATURES", 180)
    model = small.dense(small.CLASSES)
    visited = list(calibrate.trajectories(model, SETTINGS, seed=0))
    moments = calibrate.second_moments(model, visited, PATHS)
    for path, rows_IRN in _rows_by_image(model, visited).items():
        window = 3 if "conv/" in path or "downsample" in path or "conv1" in path else 1
        if path.endswith("/emb/kernel"):  # the same for all images: timesteps take their place
            rows_IRN = rows_IRN[0].reshape(SETTINGS.steps, 2, -1)
        expected = moments_lib.of_images(rows_IRN, window)
        assert moments[path].held_share == expected.held_share
        for one, other in zip(moments[path]._asdict().values(), expected._asdict().values()):
            scale = np.abs(other).max()
            np.testing.assert_allclose(one / scale, other / scale, atol=2e-5)
    sizes = {
        len(moment._asdict()["held_mean_N"]) < len(moment.mean_N) for moment in moments.values()
    }
    assert sizes == {False, True}

    again = Moments.from_arrays(moments.to_arrays())
    assert again.keys() == moments.keys()
    for path, moment in moments.items():
        for one, other in zip(moment._asdict().values(), again[path]._asdict().values()):
            np.testing.assert_array_equal(one, other)


def test_arrays_give_back_moments_of_one_image():
    sums = row_sums.RowSums(np.eye(3, dtype=np.float32), np.ones(3, np.float32))
    moments = Moments({"unet/a/kernel": Gathered(sums, None, 0.0)})
    again = Moments.from_arrays(moments.to_arrays())
    assert again.keys() == moments.keys()
    moment = again["unet/a/kernel"]
    assert moment.held_NN is None
    assert moment.held_share == 0
    np.testing.assert_array_equal(moment.second_NN, sums.second_NN)
    np.testing.assert_array_equal(moment.mean_N, sums.sum_N)


def test_timesteps_count_as_their_weights_say():
    model = small.dense(small.CLASSES)
    visited = list(calibrate.trajectories(model, SETTINGS, seed=0))
    weights_T = np.array([2.2, 1.2, 0.4, 0.2])
    moments = calibrate.second_moments(model, visited, PATHS, weights_T=weights_T)
    for path, rows_IRN in _rows_by_image(model, visited).items():
        images, _, fan_in = rows_IRN.shape
        rows_ITRN = rows_IRN.reshape(images, SETTINGS.steps, -1, fan_in)
        second, mean = (
            moments_lib.of_images((scale_T[:, None, None] * rows_ITRN).reshape(images, -1, fan_in))
            for scale_T in (np.sqrt(weights_T), weights_T)
        )
        expected = {"second_NN": second.second_NN, "mean_N": mean.mean_N}
        if fan_in <= moments_lib.HELD_FEATURES:
            expected |= {"held_NN": second.held_NN, "held_mean_N": mean.held_mean_N}
            assert moments[path].held_share == pytest.approx(1 / images)
        for name, other in expected.items():
            scale = np.abs(np.asarray(other)).max()
            found = moments[path]._asdict()[name]
            np.testing.assert_allclose(found / scale, other / scale, atol=2e-5, err_msg=path)


def test_equal_weights_change_nothing():
    model = small.dense(small.CLASSES)
    visited = list(calibrate.trajectories(model, SETTINGS, seed=0))[1:]
    paths = PATHS[-2:]
    plain = calibrate.second_moments(model, visited, paths).to_arrays()
    equal = calibrate.second_moments(model, visited, paths, weights_T=np.ones(SETTINGS.steps))
    for name, array in equal.to_arrays().items():
        np.testing.assert_array_equal(array, plain[name])


@pytest.mark.parametrize("config", [small.CLASSES, small.PLAIN], ids=lambda c: c.name)
def test_layers_that_see_timestep_or_class_alone_are_shown_every_one(config):
    """Whatever the trajectories visit: here timesteps 31, 21, 11 and 1 of 40, and one class."""
    model = small.dense(dataclasses.replace(config, timesteps=40))
    model = dataclasses.replace(model, params=folding.fold(model.config, model.params).params)
    visited = list(calibrate.trajectories(model, SETTINGS, seed=0))[1:]
    weights_T = np.array([2.2, 1.2, 0.4, 0.2])
    weight_of = {
        path: np.interp(range(1, 40), [1, 11, 21, 31], weights_T[::-1]) for path in OF_TIME
    }
    if config.n_classes:  # three and none, which guidance asks for as often as for all
        weight_of |= {path: np.array([1, 1, 1, 3] * 9 + [0] * 3) for path in OF_CLASS}
    moments = calibrate.second_moments(
        model, visited, [*PATHS[:1], *weight_of], weights_T=weights_T
    )

    @jax.jit
    def look(params, x_RHWC, t_R, ids_R):
        def keep(path, x, window):
            return x.reshape(39, -1) if path in weight_of else None

        context = models.embed_classes(model.config, params, ids_R) if config.n_classes else None
        return models.capture_inputs(model.config, params, x_RHWC, t_R, context, keep)[1]

    noise = np.random.default_rng(0).normal(size=(39, *config.latent_shape)).astype(np.float32)
    rows = look(model.params, noise, np.arange(1, 40), np.arange(39) % 4)
    for path, weight_R in weight_of.items():
        rows_RN = np.asarray(rows[path], np.float64)
        second_NN = np.einsum("r,rn,rm->nm", weight_R, rows_RN, rows_RN) / weight_R.sum()
        mean_N = weight_R @ rows_RN / weight_R.sum()
        np.testing.assert_allclose(moments[path].mean_N, mean_N, rtol=1e-4, atol=1e-5)
        halves = moments_lib.split(moments[path], 1)
        assert halves is not None
        for found_NN in (moments[path].second_NN, halves.fit_PP, halves.test_PP):
            np.testing.assert_allclose(found_NN, second_NN, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [small.CLASSES, small.PLAIN], ids=lambda c: c.name)
def test_every_planned_kernel_is_seen_with_its_fan_in(config):
    model = small.dense(config)
    sizes = calibrate.trace_layers(config, model.params)
    shapes = {path: leaf.shape for path, leaf in tree.flatten(model.params).items()}
    kernels = kernel_shapes(shapes)
    assert sizes.keys() == kernels.keys()
    for path, shape in kernels.items():
        assert sizes[path].fan_in == np.prod(shape[:-1])
    assert sizes["unet/out/conv/kernel"].positions == np.prod(config.latent_shape[:2])


def test_moments_do_not_depend_on_the_passes():
    model = small.dense(small.PLAIN)
    sizes = calibrate.trace_layers(model.config, model.params)
    groups = calibrate.batches(sizes, 2_000_000)
    assert len(groups) > 2
    assert sorted(path for group in groups for path in group) == sorted(sizes)
    visited = list(calibrate.trajectories(model, SETTINGS, seed=0))[:1]
    two = groups[0][:1] + groups[1][:1]
    together = calibrate.second_moments(model, visited, two)
    for path in two:
        alone = calibrate.second_moments(model, visited, [path])
        parts = (moments[path]._asdict().values() for moments in (alone, together))
        for one, other in zip(*parts):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_layer_larger_than_the_limit_gets_a_pass_of_its_own():
    sizes = {f"layer{i}": calibrate.LayerInput(1000, 1) for i in range(3)}
    assert calibrate.batches(sizes, 1) == [["layer0"], ["layer1"], ["layer2"]]


def test_trajectories_go_from_noise_down_and_take_classes_in_turn():
    visited = list(calibrate.trajectories(small.dense(small.CLASSES), SETTINGS, seed=0))
    assert [len(ids) for _, _, ids in visited] == [2, 1]
    assert np.concatenate([ids for _, _, ids in visited]).tolist() == [0, 1, 2]
    x_TBHWC, t_T, _ = visited[0]
    assert x_TBHWC.shape[:2] == (4, 2)
    assert t_T.tolist() == [751, 501, 251, 1]
    assert np.std(x_TBHWC[0]) == pytest.approx(1, abs=0.05)
