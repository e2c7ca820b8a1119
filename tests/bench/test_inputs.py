# SPDX-License-Identifier: Apache-2.0
"""Matrix files: what is read, what is skipped, and how mistakes are named."""

import numpy as np
import pytest

from tests.conftest import golden_params
from vqjax.bench import inputs
from vqjax.bench.__main__ import main
from vqjax.errors import VqjaxError


def linear(**changes):
    """The arrays of a good linear file, some of them changed or, given as None, left out."""
    rng = np.random.default_rng(0)
    arrays = {"W": rng.normal(size=(6, 8)), "XTX": np.eye(8), "XTX_test": np.eye(8)} | changes
    return {name: array for name, array in arrays.items() if array is not None}


def conv(**changes):
    rng = np.random.default_rng(1)
    return {
        "W": rng.normal(size=(4, 2, 3, 3)),
        "maps": rng.normal(size=(3, 2, 5, 4)).astype(np.float16),
        "maps_test": rng.normal(size=(2, 2, 5, 4)),
    } | changes


def read_one(folder, arrays):
    np.savez(folder / "case.npz", **arrays)
    (matrix,) = inputs.read(folder)
    return matrix


def test_a_linear_weight_becomes_a_kernel(tmp_path):
    arrays = linear(XTX=np.diag(np.arange(8.0)))
    matrix = read_one(tmp_path, arrays)
    assert matrix.kernel.shape == (8, 6)
    assert matrix.window == 1
    np.testing.assert_allclose(matrix.w_ON, arrays["W"], rtol=1e-6)
    np.testing.assert_array_equal(matrix.moment_NN, np.diag(np.arange(8.0)))


def test_patches_times_weight_is_the_convolution(tmp_path):
    """Zeros outside, columns (channel, ky, kx): held against a loop over output pixels."""
    arrays = conv()
    matrix = read_one(tmp_path, arrays)
    assert matrix.rows_IRN is not None
    padded = np.pad(arrays["maps"].astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    found = matrix.rows_IRN.astype(np.float64) @ matrix.w_ON.T
    for image, y, x in [(0, 0, 0), (1, 2, 3), (2, 4, 1)]:
        patch = padded[image, :, y : y + 3, x : x + 3]
        expected = np.einsum("ocij,cij->o", arrays["W"], patch)
        np.testing.assert_allclose(found[image, y * 4 + x], expected, rtol=1e-5)
    rows = matrix.rows_IRN.reshape(-1, 18).astype(np.float64)
    np.testing.assert_allclose(matrix.moment_NN, rows.T @ rows / 60, rtol=1e-12)


def test_results_and_fixtures_are_skipped(tmp_path):
    np.savez(tmp_path / "ref.npz", codes=[1], codebooks=[1.0], scales=[1.0])
    np.savez(tmp_path / "fixture.npz", weight=[1.0], xtx=[1.0], start_codes=[1])
    assert read_one(tmp_path, linear()).name == "case.npz"


WRONG = {
    "keys": (linear(XTX_test=None), "case.npz: found W, XTX; expected W with XTX and XTX_test"),
    "nan": (linear(W=np.full((6, 8), np.nan)), "W holds 48 NaN or infinite values"),
    "shape": (linear(XTX=np.eye(7)), r"XTX has shape \(7, 7\), expected \(8, 8\)"),
    "rank": (linear(W=np.ones(8)), r"W has shape \(8,\), expected \(outputs, inputs\)"),
    "text": (linear(XTX=np.array(["a"])), "XTX is of type <U1, expected real numbers"),
    "empty": (linear(W=np.zeros((0, 8))), r"W has shape \(0, 8\), expected at least one"),
    "asymmetric": (linear(XTX=np.triu(np.ones((8, 8)))), "XTX differs from its transpose by 1 of"),
    "maps": (conv(maps=np.ones((3, 5, 4, 4))), r"maps has shape \(3, 5, 4, 4\), expected \(images"),
    "window": (conv(W=np.ones((4, 2, 2, 2))), "k odd"),
}


@pytest.mark.parametrize(("arrays", "text"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_file_is_named(tmp_path, arrays, text):
    np.savez(tmp_path / "case.npz", **arrays)
    with pytest.raises(VqjaxError, match=text) as caught:
        inputs.read(tmp_path)
    assert "case.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"PK\3\4 and no more", b"hello"])
def test_a_file_that_is_no_npz_is_named(tmp_path, data):
    (tmp_path / "case.npz").write_bytes(data)
    with pytest.raises(VqjaxError, match=r"case\.npz: not a readable \.npz"):
        inputs.read(tmp_path)


def test_all_wrong_files_are_named_at_once(tmp_path):
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", V=[1.0])
    with pytest.raises(VqjaxError, match=r"2 files cannot be used[^$]*a\.npz[^$]*b\.npz"):
        inputs.read(tmp_path)


def test_folders_without_matrices(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("nothing here")
    assert main(["aq", "--inputs", str(tmp_path)]) == 2
    assert "no matrix file among 1 entries; expected W with XTX" in capsys.readouterr().err
    assert main(["aq", "--inputs", str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_one_of_inputs_and_model_is_needed(capsys):
    assert main(["aq"]) == 2
    assert main(["aq", "--inputs", "x", "--model", "digits"]) == 2
    assert capsys.readouterr().err.count("give either --inputs DIR") == 2


@pytest.mark.parametrize("path", golden_params("aq", "*.npz"))
def test_every_reference_file_is_read_or_skipped(path):
    matrix = inputs._read_file(path)
    with np.load(path) as arrays:
        assert (matrix is not None) == ("W" in arrays)
        if matrix is not None:
            np.testing.assert_array_equal(
                matrix.w_ON, arrays["W"].reshape(len(arrays["W"]), -1).astype(np.float64)
            )
