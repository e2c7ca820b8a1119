# SPDX-License-Identifier: Apache-2.0
"""The report: complete JSON, a page that stands alone, honest numbers on top."""

import html.parser
import json
import math

import numpy as np
import pytest

from vqjax.errors import VqjaxError
from vqjax.eval import report as report_module

_VOID = {"meta", "img", "source", "br", "link"}


@pytest.fixture
def report():
    layer = {
        "path": "unet/input_blocks_1/res/conv1/kernel",
        "kind": "conv3x3",
        "shape": [3, 3, 64, 64],
        "group": 9,
        "codebooks": 4,
        "entries": 16,
        "bits_per_weight": 1.9,
        "rel_weight_mse": 0.11,
        "rel_output_mse": 0.03,
        "rel_output_mse_test": 0.036,
        "bound": 0.02,
        "ratio_to_bound": 1.5,
        "codes_entropy": 1.85,
        "flops_dense": 1000,
        "flops_lookup": 400,
        "flops_ratio": 0.4,
        "seconds": 12.34,
        "scalar_bits_per_weight": 2.06,
        "scalar_output_mse": 0.07,
        "scalar_output_mse_test": 0.08,
    }
    scores = {"fd": 2.5, "sfd": 0.3, "is": 8.9, "precision": 0.9, "recall": 0.8}
    scores |= {"accuracy": 0.99, "n": 1000}
    return {
        "model": {"name": "digits <tiny>", "parameters": 1_500_000},
        "weights": {
            "bits_target": 2.0,
            "bits_per_weight": 2.04,
            "bits_per_weight_model": 2.6,
            "bytes_before": 6_000_000,
            "bytes_after": 487_500,
        },
        "activations": {"bits": 8},
        "layers": [layer, layer | {"path": "unet/out/conv/kernel", "rel_output_mse": 0.0}],
        "metrics": {
            "full_precision": scores,
            "quantized": scores | {"fd": 3.25},
            "scalar_baseline": scores | {"fd": 9.0},
        },
        "fidelity": {"psnr": np.float32(24.25), "ssim": 0.91, "latent_mse": 0.02},
        "flops": {"dense": 1e9, "lookup": 4e8, "ratio": 0.4},
        "seconds": {"calibrate": 12.0, "compress": 61.0},
        "peak_memory_bytes": 1_200_000_000,
        "environment": {"jax": "0.10.2", "devices": ["cpu"]},
    }


class _Page(html.parser.HTMLParser):
    """Fails on tags that do not nest; keeps the text and every address."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.addresses = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in _VOID:
            self.open.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "srcset", "href") and v]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        self.text.append(data)


def _page(report, pictures=None):
    return report_module.build(report, pictures or {})["report.html"].decode()


def test_json_has_every_field_and_survives_a_strict_parser(report):
    report["fidelity"]["psnr"] = math.inf
    content = report_module.build(report, {})["report.json"]
    found = json.loads(content, parse_constant=lambda name: pytest.fail(f"JSON holds {name}"))
    assert list(found) == list(report)
    report_module.check(found)
    assert found["fidelity"]["psnr"] is None
    assert found["layers"][0]["shape"] == [3, 3, 64, 64]


def test_missing_fields_are_listed_together(report):
    del report["flops"]
    del report["weights"]["bytes_after"]
    del report["layers"][1]["kind"]
    report["metrics"]["quantized"].pop("n")
    with pytest.raises(VqjaxError) as caught:
        report_module.build(report, {})
    for field in ("flops", "weights.bytes_after", "layers[1].kind", "metrics.quantized.n"):
        assert f"{field} is missing" in str(caught.value)


def test_page_nests_and_asks_for_nothing_outside(report):
    page = _page(report, dict.fromkeys(("samples", "sizes", "layers"), (b"light", b"dark")))
    parsed = _Page(page)
    assert not parsed.open
    assert len(parsed.addresses) == 6
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    assert "http://" not in page
    assert "https://" not in page
    assert "url(" not in page
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page


def test_names_are_escaped(report):
    page = _page(report)
    assert "<tiny>" not in page
    assert "digits &lt;tiny&gt;" in page


def test_page_and_markdown_show_the_same_numbers(report):
    files = report_module.build(report, {})
    text = " ".join(_Page(files["report.html"].decode()).text)
    markdown = files["report.md"].decode()
    for number in ("12.3×", "+0.75", "24.25", "2.040", "1.2 GB", "1 min 13 s", "res/conv1"):
        assert number in text, number
        assert number in markdown, number


def test_failures_and_warnings_come_before_the_results(report):
    report["failures"] = ["accuracy 0.41 is below 0.95"]
    report["warnings"] = ["N = 100 is small"]
    files = report_module.build(report, {})
    for name, first_result in (("report.html", "What was gained"), ("report.md", "## ")):
        text = files[name].decode()
        order = [text.index(part) for part in (*report["failures"], *report["warnings"])]
        assert order == sorted(order)
        assert order[-1] < text.index(first_result)
    assert "quality gate" not in _page(report | {"failures": []}).lower()


def test_models_without_scores_still_have_a_report(report):
    report["metrics"] = dict.fromkeys(report["metrics"])
    page = _page(report)
    assert "What was lost" not in page
    assert "What was gained" in page


def test_direction_of_change_decides_its_colour(report):
    report["metrics"]["quantized"]["accuracy"] = 1.0
    page = _page(report)
    assert '<td class="worse">+0.75</td>' in page
    assert '<td class="good">+0.010</td>' in page


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (report_module.number(0.00001234, 3), "1.2e-05"),
        (report_module.number(0.0, 3), "0.000"),
        (report_module.number(None, 3), "–"),
        (report_module.number(math.inf, 1), "∞"),
        (report_module.size(999), "999 B"),
        (report_module.size(1_234_567), "1.23 MB"),
        (report_module.count(400_920_579), "401 M"),
        (report_module.duration(59.94), "59.9 s"),
        (report_module.duration(3599.7), "1 h 00 min"),
    ],
)
def test_numbers_for_people(found, expected):
    assert found == expected
