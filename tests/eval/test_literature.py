# SPDX-License-Identifier: Apache-2.0
"""Published numbers keep their sources, and ours stand beside those of the same protocol only."""

import pytest

from vqjax.eval import literature

SCORES = ("size_mib", "is", "fid", "sfid", "precision", "recall")


def ours(**changes):
    run = {
        "name": "cin256-v2 W2A8",
        "model": "cin256-v2",
        "weights": 2.0,
        "activations": 8,
        "protocol": dict(literature.COMPARED),
        "files": dict(literature.FILES),
        "notes": (),
        "results": {"fid": 12.345, "precision": 0.9, "full.fid": 11.0, "psnr": 24.5},
        "where": "record.json",
    }
    return run | changes


def test_every_published_number_has_a_source():
    found = literature.load()
    for protocol in found["protocols"]:
        for row in protocol["rows"]:
            if any(row[score] is not None for score in SCORES):
                assert row["source"] in found["sources"], row


def test_what_is_unknown_is_said():
    rows = literature.tables([])[0].rows
    (row,) = (row for row in rows if row[1] == "AQUATIC-Diff" and row[0] == "2/8")
    assert row[2:10] == [literature.NOT_FOUND] * 8


def test_ours_stand_beside_the_same_protocol():
    first, *rest = literature.tables([ours()])
    mine = [row for row in first.rows if "vqjax" in row[1]]
    assert [row[:2] for row in mine] == [["32/32", "vqjax, full precision"], ["2/8", "vqjax"]]
    assert mine[1][4] == "12.35"  # FID
    assert mine[1][6] == "90.00"  # precision, in percent as the papers print it
    assert mine[1][3] == literature.NOT_MEASURED
    assert not any("vqjax" in row[1] for table in rest for row in table.rows)


@pytest.mark.parametrize("change", [{"count": 5000}, {"guidance": 1.5}, {"eta": 1.0}])
def test_other_protocols_are_not_mixed_in(change):
    run = ours(protocol=literature.COMPARED | change)
    first, own, *_ = literature.tables([run])
    assert not any("vqjax" in row[1] for row in first.rows)
    assert "cin256-v2 W2A8" in own.heading
    assert len(own.rows) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"files": literature.FILES | {"reference": "my_val.npz"}},
            "- reference: found my_val.npz, published results have VIRTUAL_imagenet256_labeled.npz",
        ),
        ({"files": literature.FILES | {"inception": "a.pb"}}, "- inception: found a.pb, published"),
        ({"files": literature.FILES | {"model": "a.ckpt"}}, "- model: found a.ckpt, published"),
        ({"files": literature.FILES | {"reference": None}}, "- reference: found none, published"),
        ({"notes": ("model.ckpt: found 5 bytes",)}, "- model.ckpt: found 5 bytes"),
    ],
)
def test_other_files_are_not_mixed_in_and_the_table_says_why(change, reason):
    first, own, *_ = literature.tables([ours(**change)])
    assert not any("vqjax" in row[1] for row in first.rows)
    assert "cin256-v2 W2A8" in own.heading
    assert reason in own.note
    assert [row[:2] for row in own.rows] == [["2/8", "vqjax"]]


def test_a_run_of_another_model_is_not_told_which_files_it_lacks():
    run = ours(model="lsun_bedrooms", files=literature.FILES | {"reference": "beds.npz"})
    assert literature.tables([run])[1].note == "Ours."


def test_digits_have_a_table_of_their_own():
    run = ours(model="digits", protocol=literature.COMPARED | {"count": 10_000, "guidance": 1.5})
    run["results"] = {"digits.fd": 5.5, "bits_per_weight": 1.99, "full.digits.fd": 3.25}
    table = literature.tables([run])[1]
    assert [row[:4] for row in table.rows] == [
        ["32/32", "32", "10,000", "3.25"],
        ["2/8", "1.990", "10,000", "5.50"],
    ]
