# SPDX-License-Identifier: Apache-2.0
"""What gets installed, and what an import costs."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

import vqjax

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"vqjax": "vqjax", "kernels": "vqjax.kernels", "train": "vqjax.train"} | {
    "eval": "vqjax.eval"
}


def packages_on_disk() -> set[str]:
    found = set()
    for folder, package in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            below = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *below)))
    return found


def test_every_subpackage_is_listed():
    assert packages_on_disk() == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_module_lies_in_a_package():
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def is_needed(path: pathlib.Path) -> bool:
    """Whether an installed package reads the file: of `eval/results`, records of runs alone."""
    if path.parent != ROOT / "eval" / "results":
        return path.suffix != ".pyc"
    return {"run", "results"} <= json.loads(path.read_text(encoding="utf-8")).keys()


def test_all_data_that_the_package_reads_is_listed():
    listed = set()
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        spec = importlib.util.find_spec(package)
        assert spec is not None
        folder = pathlib.Path(str(spec.origin)).parent
        listed |= {path for pattern in patterns for path in folder.glob(pattern)}
    files = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}
    assert {path for path in files if path.suffix != ".py" and is_needed(path)} == listed


def test_top_level_folders_are_imported_below_vqjax():
    for folder in ("kernels", "train", "eval"):
        spec = importlib.util.find_spec(f"vqjax.{folder}")
        assert spec is not None
        assert pathlib.Path(str(spec.origin)) == ROOT / folder / "__init__.py"


def test_version_is_the_one_of_the_metadata():
    assert vqjax.__version__ == PROJECT["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{vqjax.__version__}]" in changelog


def test_readme_marks_the_command_that_ci_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    marked = re.search(r"<!-- test-command -->(.*?)<!-- /test-command -->", readme, re.DOTALL)
    assert marked is not None
    assert "-m pytest" in marked.group(1)


def python(code: str, **env: str) -> str:
    """Standard output of a fresh interpreter in the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = ("jax", "flax", "sklearn", "matplotlib", "torch")


def test_import_is_light():
    code = f"import sys, vqjax; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(code).strip() == "[]"


def commands() -> list[str]:
    """Every module with a command line: those of the installed scripts."""
    scripts = PROJECT["project"]["scripts"].values()
    return sorted(target.split(":")[0].removesuffix(".__main__") for target in scripts)


@pytest.mark.parametrize("module", commands())
def test_help_is_light(module):
    code = f"""
import runpy, sys
sys.argv = ["{module}", "--help"]
try:
    runpy.run_module("{module}", run_name="__main__", alter_sys=True)
except SystemExit as done:
    assert not done.code, done.code
print("HEAVY", [m for m in {HEAVY} if m in sys.modules])
"""
    out = python(code)
    assert out.splitlines()[-1] == "HEAVY []"
    assert "usage" in out.lower()


def test_torch_is_never_imported():
    """With torch made unimportable, every module loads, but for kernels in Triton without that."""
    names = sorted(
        ".".join((FOLDERS[folder], *path.relative_to(ROOT / folder).with_suffix("").parts))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if path.stem not in ("__init__", "__main__")
    )
    code = f"""
import importlib, sys
sys.modules["torch"] = None
missing = []
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        missing.append(name)
print(missing)
"""
    missing = ast.literal_eval(python(code, JAX_PLATFORMS="cpu").splitlines()[-1])
    kernels = ["vqjax.kernels.triton_decode"]
    kernels += [f"vqjax.kernels.{op}.triton" for op in ("vq_conv", "vq_matmul")]
    assert missing == ([] if importlib.util.find_spec("triton") else kernels)
    assert len(names) > 20


@pytest.mark.slow
def test_wheel_holds_everything_below_vqjax(tmp_path):
    if importlib.util.find_spec("pip") is None or importlib.util.find_spec("setuptools") is None:
        pytest.skip("building without the network needs pip and setuptools in this environment")
    version = importlib.metadata.version("setuptools")
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"setuptools {version} is older than the build needs (77)")
    # A build writes beside the sources, so it works on a copy of what git tracks.
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "src" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", tmp_path, tmp_path / "src"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "vqjax",
        f"vqjax-{vqjax.__version__}.dist-info",
    }
    tracked = [n for n in listed.stdout.splitlines() if n.split("/")[0] in FOLDERS]
    needed = [name for name in tracked if is_needed(ROOT / name)]
    assert {re.sub(r"^(kernels|train|eval)/", r"vqjax/\1/", name) for name in needed} <= set(names)
