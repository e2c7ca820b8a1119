# SPDX-License-Identifier: Apache-2.0
"""What a quantization prints of its report."""

import pathlib

from vqjax.pipeline import results


def test_identical_pictures_are_shown(capsys):
    sizes = {"bytes_before": 4e6, "bytes_after": 1e6, "bits_per_weight": 8.0}
    content = {
        "weights": sizes,
        "activations": {"bits": 32},
        "metrics": {"quantized": None},
        "fidelity": {"psnr": None, "ssim": 1.0, "identical": 4},
        "fidelity_scalar_baseline": {"psnr": 31.25, "ssim": 0.5, "identical": 0},
    }
    results.show(content, pathlib.Path("run"))
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "PSNR" in line)
    assert row.replace("│", " ").split()[-2:] == ["∞", "31.250"]
