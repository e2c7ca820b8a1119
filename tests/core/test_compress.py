# SPDX-License-Identifier: Apache-2.0
"""One layer end to end: against reference results, and on input that is no good."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import golden_files, golden_params
from vqjax.core import compress, grouping, scalar
from vqjax.core.plan import LayerSpec
from vqjax.core.tensor import VQTensor
from vqjax.errors import VqjaxError

QUICK = compress.Effort(start_steps=6, feedback_rounds=1, descent_rounds=2)


def _spec(books=2, entries=8, name="linear", bits=8):
    return LayerSpec("attention", name, grouping.GROUPS[name], books, entries, bits)


def _problem(shape=(20, 6), seed=0, scale=0.02):
    rng = np.random.default_rng(seed)
    _, fan_in = grouping.matrix_shape(shape)
    kernel = rng.normal(size=shape).astype(np.float32) * scale
    inputs = np.cumsum(rng.normal(size=(fan_in, 3 * fan_in)), axis=0)
    moment = (inputs @ inputs.T / inputs.shape[1]).astype(np.float32)
    return jnp.asarray(kernel), jnp.asarray(moment)


def _output_error(kernel, decoded, moment):
    weights, found = (np.asarray(grouping.to_matrix(k), np.float64) for k in (kernel, decoded))
    moment = np.asarray(moment, np.float64)
    error = weights - found
    return np.sum(error @ moment * error) / np.sum(weights @ moment * weights)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("shape", "name"), [((20, 6), "linear"), ((3, 3, 4, 5), "conv3x3"), ((1, 1, 9, 3), "linear")]
)
def test_statistics_are_those_of_the_stored_tensor(shape, name, bits):
    kernel, moment = _problem(shape)
    spec = _spec(name=name, bits=bits)
    tensor, stats = compress.compress_layer(
        kernel, moment, spec, key=jax.random.key(0), effort=QUICK
    )
    assert isinstance(tensor, VQTensor)
    assert tensor.shape == shape
    assert tensor.codebooks.dtype == (jnp.int8 if bits == 8 else jnp.float16)
    assert tensor.nbytes * 8 == spec.stored(shape).total
    assert stats.bits_per_weight == tensor.bits_per_weight
    expected = _output_error(kernel, tensor.decode(), moment)
    np.testing.assert_allclose(stats.rel_output_mse, expected, rtol=1e-3)
    weight_error = jnp.sum((kernel - tensor.decode()) ** 2) / jnp.sum(kernel**2)
    np.testing.assert_allclose(stats.rel_weight_mse, weight_error, rtol=1e-4)
    assert stats.rel_output_mse < 0.3


def test_same_key_same_bytes_and_the_moment_matters():
    kernel, moment = _problem((40, 16))
    spec = _spec(books=2, entries=16)
    first, with_moment = compress.compress_layer(
        kernel, moment, spec, key=jax.random.key(3), effort=QUICK
    )
    second, _ = compress.compress_layer(kernel, moment, spec, key=jax.random.key(3), effort=QUICK)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), first, second))
    plain, without = compress.compress_layer(
        kernel, None, spec, key=jax.random.key(3), effort=QUICK
    )
    assert with_moment.rel_output_mse < 0.5 * _output_error(kernel, plain.decode(), moment)
    assert without.rel_weight_mse < with_moment.rel_weight_mse
    assert without.rel_output_mse == pytest.approx(without.rel_weight_mse)


def test_codebooks_made_on_a_part_of_the_rows_serve_all_rows(monkeypatch):
    """Less search over all rows, an error as low, and rows outside the part no worse off."""
    kernel, moment = _problem((64, 320))
    spec = _spec(books=2, entries=8)
    effort = compress.Effort(start_steps=6, feedback_rounds=4, descent_rounds=4)
    monkeypatch.setattr(compress, "_PART", 16)  # 256 vectors, 32 rows

    def compressed():
        ends = []
        tensor, stats = compress.compress_layer(
            kernel, moment, spec, key=jax.random.key(0), effort=effort, on_stage=ends.append
        )
        error_ON = grouping.to_matrix(np.asarray(kernel - tensor.decode()))
        return np.sum(error_ON @ np.asarray(moment) * error_ON, axis=1), stats, ends

    errors_O, stats, ends = compressed()
    monkeypatch.setattr(compress, "_PART", 10**6)
    _, whole, all_ends = compressed()
    assert ends.count("part feedback") > 1
    assert ends.count("feedback") == 1
    assert len(stats.history) == ends.count("least_squares")
    assert len(whole.history) == all_ends.count("least_squares")
    assert stats.history[-1] < 1.05 * whole.history[-1]
    part_R = np.arange(32) * 10
    others = np.setdiff1d(np.arange(320), part_R)
    assert errors_O[others].mean() < 1.2 * errors_O[part_R].mean()


def test_a_part_without_weights_leaves_the_other_rows_theirs(monkeypatch):
    kernel, moment = _problem((16, 320))
    monkeypatch.setattr(compress, "_PART", 4)
    empty = kernel.at[:, np.arange(32) * 10].set(0.0)
    _, stats = compress.compress_layer(
        empty, moment, _spec(books=2, entries=8), key=jax.random.key(0), effort=QUICK
    )
    assert stats.rel_output_mse < 0.3


@pytest.mark.parametrize(("books", "entries"), [(1, 300), (2, 64), (6, 16)])
def test_any_number_of_codebooks_and_entries(books, entries):
    kernel, moment = _problem((16, 8))
    tensor, stats = compress.compress_layer(
        kernel, moment, _spec(books, entries, bits=16), key=jax.random.key(0), effort=QUICK
    )
    assert tensor.codebooks.shape == (books, entries, 8)
    assert np.isfinite(stats.rel_output_mse)
    assert stats.rel_output_mse < 0.5


def test_degenerate_layers_are_survived():
    kernel, moment = _problem((20, 6))
    kernel = kernel.at[:, 2].set(0).at[:, 4].mul(1e-5)
    singular = moment.at[:, 3].set(0).at[3, :].set(0)
    key = jax.random.key(0)
    for given in (singular, jnp.zeros_like(moment), jnp.ones_like(moment)):
        tensor, stats = compress.compress_layer(kernel, given, _spec(), key=key, effort=QUICK)
        assert np.all(np.isfinite(np.asarray(tensor.decode(), np.float32)))
        assert np.isfinite(stats.rel_output_mse)
        np.testing.assert_array_equal(tensor.decode()[:, 2], 0)
    tensor, stats = compress.compress_layer(
        jnp.zeros_like(kernel), moment, _spec(), key=key, effort=QUICK
    )
    assert stats.rel_weight_mse == 0
    np.testing.assert_array_equal(tensor.decode(), 0)


@pytest.mark.parametrize("scale", [1e-7, 1e5])
def test_magnitudes_outside_float16_are_kept(scale):
    kernel, moment = _problem((20, 6), scale=scale)
    for bits in (8, 16):
        _, stats = compress.compress_layer(
            kernel, moment, _spec(bits=bits), key=jax.random.key(0), effort=QUICK
        )
        assert stats.rel_output_mse < 0.3


def test_bad_input_is_named():
    kernel, moment = _problem((20, 6))
    key = jax.random.key(0)
    with pytest.raises(VqjaxError, match=r"kernel of shape \(20, 6\) holds 2 NaN or infinite"):
        compress.compress_layer(kernel.at[0, :2].set(jnp.nan), moment, _spec(), key=key)
    with pytest.raises(VqjaxError, match=r"moment of shape \(20, 20\) holds 1 NaN or infinite"):
        compress.compress_layer(kernel, moment.at[0, 0].set(jnp.inf), _spec(), key=key)
    with pytest.raises(VqjaxError, match=r"moment \(19, 19\) .* expected \(20, 20\)"):
        compress.compress_layer(kernel, moment[:19, :19], _spec(), key=key)


def test_eight_bits_for_first_and_last_layers():
    kernel, moment = _problem((3, 3, 3, 5))
    spec = LayerSpec("first_last", "scalar", 1, 1, 256, 8)
    tensor, stats = compress.compress_layer(kernel, moment, spec, key=jax.random.key(0))
    assert tensor.codebooks.shape == (1, 256, 1)
    assert tensor.nbytes * 8 == spec.stored(kernel.shape).total
    assert stats.rel_weight_mse < 1e-4
    nearest, _ = compress.compress_layer(kernel, None, spec, key=jax.random.key(0))
    step = np.abs(np.asarray(kernel)).max((0, 1, 2)) / 127
    assert np.all(np.abs(np.asarray(kernel - nearest.decode())) <= 0.51 * step)


def test_single_weights_feed_errors_back():
    kernel, moment = _problem((100, 12))
    spec = LayerSpec("attention", "scalar", 1, 1, 64, 8)
    key = jax.random.key(0)
    tensor, stats = compress.compress_layer(kernel, moment, spec, key=key)
    _, nearest = compress.compress_layer(kernel, None, spec, key=key)
    plain = scalar.round_to_grid(grouping.to_matrix(np.asarray(kernel)), kernel.shape, 64)
    assert _output_error(kernel, plain.decode(), moment) > 3 * stats.rel_output_mse
    assert nearest.rel_weight_mse < stats.rel_weight_mse
    np.testing.assert_array_equal(tensor.scales.codes, plain.scales.codes)


def test_the_scalar_baseline_feeds_errors_back():
    kernel, moment = _problem((3, 3, 4, 6))
    found = scalar.scalar_baseline(kernel, moment, 2)
    plain = scalar.scalar_baseline(kernel, None, 2)
    assert found.kernel.shape == kernel.shape
    expected = _output_error(kernel, found.kernel, moment)
    np.testing.assert_allclose(found.rel_output_mse, expected, rtol=1e-3)
    assert expected < 0.7 * _output_error(kernel, plain.kernel, moment)
    assert found.bits_per_weight == (8 * 9 + 32) / 36
    rows = np.asarray(grouping.to_matrix(found.kernel))
    assert all(len(np.unique(row.round(7))) <= 4 for row in rows)
    with pytest.raises(VqjaxError, match="scalar baseline at 9 bits: 1 to 8"):
        scalar.scalar_baseline(kernel, moment, 9)


def _reference_error(path, weights, moment):
    """Output error and stored bits of a reference result: float16 codebooks, a scale per row."""
    data = np.load(path)
    codes, books, scales = data["codes"], data["codebooks"], data["scales"]
    sums = sum(books[m][codes[..., m]] for m in range(books.shape[0]))
    decoded = (sums * scales[:, None, None]).reshape(weights.shape)
    code_bits = codes.size * np.log2(books.shape[1])
    bits = (code_bits + 16 * books.size + 16 * scales.size) / weights.size
    return _output_error(weights.T, decoded.T, moment), bits


@pytest.mark.usefixtures("optimized")
@pytest.mark.slow
@pytest.mark.parametrize("path", golden_params("aq", "ref_*_2b_xtx_b1.npz"))
def test_error_and_bits_are_below_the_reference(path):
    matrices = golden_files("aq", f"{path.stem.split('_')[1]}*.npz")
    data = np.load(matrices[0]) if matrices else {}
    if "XTX" not in data:
        pytest.skip(f"no matrix file with moments beside {path.name}")
    weights, moment = data["W"], data["XTX"]
    spec = LayerSpec("attention", "linear", 8, 4, 16, 8)
    tensor, stats = compress.compress_layer(
        jnp.asarray(weights.T), jnp.asarray(moment, jnp.float32), spec, key=jax.random.key(0)
    )
    found = _output_error(weights.T, tensor.decode(), moment)
    reference, bits = _reference_error(path, weights, moment)
    np.testing.assert_allclose(stats.rel_output_mse, found, rtol=1e-3)
    assert found < 0.9 * reference
    assert tensor.bits_per_weight < bits


def test_input_scales_pay_where_channels_differ_in_size():
    rng = np.random.default_rng(3)
    sizes = np.exp(1.5 * rng.normal(size=(1, 1, 24, 1)))
    kernel = jnp.asarray(rng.normal(size=(3, 3, 24, 64)) * sizes, jnp.float32)
    rows = rng.normal(size=(1000, 216)) / np.repeat(sizes.reshape(-1), 9)
    moment = np.asarray(rows.T @ rows / 1000, np.float32)
    spec = LayerSpec("conv3x3", "conv3x3", 9, 2, 16)
    found = {}
    for input_scales in (False, True):
        wanted = dataclasses.replace(spec, input_scales=input_scales)
        tensor, stats = compress.compress_layer(
            kernel, moment, wanted, key=jax.random.key(0), effort=QUICK
        )
        assert tensor.bits_per_weight == wanted.stored(kernel.shape).per_weight
        assert (tensor.input_scales is not None) == input_scales
        found[input_scales] = stats.rel_output_mse
    assert found[True] < 0.7 * found[False]


def test_a_channel_without_weights_stays_without_under_input_scales():
    kernel = jax.random.normal(jax.random.key(0), (32, 16)).at[5].set(0.0)
    spec = LayerSpec("attention", "linear", 8, 2, 16, input_scales=True)
    tensor, _ = compress.compress_layer(kernel, None, spec, key=jax.random.key(1), effort=QUICK)
    decoded = np.asarray(tensor.decode())
    assert np.all(decoded[5] == 0)
    assert np.all(decoded[4] != 0)
