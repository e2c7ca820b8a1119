# SPDX-License-Identifier: Apache-2.0
"""`python -m vqjax.doctor`: the report, the self-tests, and that a failure is seen."""

import hashlib
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from vqjax import doctor

ROOT = pathlib.Path(__file__).parents[1]


def test_command_passes_here():
    as_users_compile = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "vqjax.doctor"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | as_users_compile,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for section in ("versions", "devices", "paths", "files", "self-test"):
        assert f"[{section}]" in lines
    assert any(line.split() == ["jax", jax.__version__] for line in lines)
    assert sum("PASS" in line for line in lines) == len(doctor.CHECKS)
    assert lines[-1] == "all is well"


def fail(seed: int) -> str:
    raise RuntimeError("the sky is green")


def test_failure_is_shown_and_counted(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", {"good": lambda seed: "fine", "bad": fail})
    assert doctor.examine(doctor.DoctorSettings()) == 4
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert "RuntimeError: the sky is green" in out
    assert out.endswith("1 of 2 self-tests failed\n")


def test_self_test_can_be_left_out(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", {"bad": fail})
    assert doctor.examine(doctor.DoctorSettings(self_test=False)) == 0
    assert "self-test" not in capsys.readouterr().out


def test_wrong_results_fail(monkeypatch):
    """The checks compare: with a search that finds nothing, the search check fails."""
    from vqjax.core import encode

    def zeros(linear_OG, metric_GG, books_MKG):
        return jax.numpy.zeros((len(linear_OG), len(books_MKG)), int)

    monkeypatch.setattr(encode, "encode_exact", zeros)
    with pytest.raises(AssertionError, match="exact search missed planted codes"):
        doctor.check_search(0)


def test_the_seed_reaches_the_checks(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", {"seeded": lambda seed: f"computed with {seed}"})
    assert doctor.main(["--seed", "5"]) == 0
    assert "computed with 5" in capsys.readouterr().out
    for seed in ("-1", str(2**32)):
        assert doctor.main(["--seed", seed]) == 2
        assert f"vqjax: --seed {seed}: expected 0 to 4294967295" in capsys.readouterr().err


def test_shipped_files_carry_their_hash(monkeypatch):
    rows = dict(doctor.files())
    for name, asset in doctor.ASSETS.items():
        digest = hashlib.sha256((ROOT / "vqjax" / "assets" / asset).read_bytes()).hexdigest()
        assert digest[:16] in rows[name]
    monkeypatch.setattr(doctor, "ASSETS", {"embedded model": "lost.safetensors"})
    assert "MISSING: vqjax/assets/lost.safetensors" in dict(doctor.files())["embedded model"]


def test_missing_package_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("jax", "no-such-package-at-all"))
    assert dict(doctor.versions())["no-such-package-at-all"] == "MISSING"


def test_table_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(doctor, "CHECKS", {"good": lambda seed: "[fine]"})
    assert doctor.examine(doctor.DoctorSettings()) == 0
    out = capsys.readouterr().out
    assert "[devices]" not in out
    assert "[fine]" in out  # brackets are text, not markup
