# SPDX-License-Identifier: Apache-2.0
"""The arrows between layers (WORKSPACE.md), read from the source, lazy imports included."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("vqjax", "kernels", "train", "eval")

# What each layer may import besides itself. Command lines are every other module of vqjax.
BELOW = {
    "errors": set(),
    "config": {"errors"},
    "progress": {"errors"},
    "settings": {"errors"},
    "kernels": {"errors", "config"},
    "core": {"kernels", "errors", "config"},
    "assets": set(),
    "models": {"core", "kernels", "errors", "config"},
    "io": {"core", "kernels", "assets", "errors", "config"},
    "sampling": {"models", "io", "core", "kernels", "errors", "config"},
    "train": {
        "sampling",
        "models",
        "io",
        "core",
        "kernels",
        "assets",
        "errors",
        "config",
        "progress",
    },
    "eval": {"models", "io", "core", "kernels", "assets", "errors", "config"},
}
BELOW["pipeline"] = set(BELOW)
COMMANDS = {"__init__", "quantize", "sample", "evaluate", "reproduce", "bench", "doctor"}


def sources() -> list[pathlib.Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def layer_of(path: pathlib.Path) -> str:
    """The layer a file belongs to: a folder, or a module directly below vqjax/."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] != "vqjax" else parts[1]


def imports(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write vqjax.…"
            module = node.module or ""
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def layers_imported(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] == "vqjax" and len(parts) > 1:
            yield line, parts[1]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    layer = layer_of(path)
    allowed = set(BELOW) | COMMANDS if layer in COMMANDS else BELOW[layer] | {layer}
    known = set(BELOW) | COMMANDS  # other names below vqjax are values, such as vqjax.load
    wrong = [
        f"line {line}: {layer} imports {name}"
        for line, name in layers_imported(path)
        if name in known and name not in allowed
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_goes_around_the_layers(path):
    """Flax stays in the models, torch outside, and our folders are named below vqjax."""
    roots = {name.split(".")[0] for _, name in imports(path)}
    forbidden = {"torch", "kernels", "train", "eval", "tests"}
    if layer_of(path) not in ("models", "doctor"):
        forbidden.add("flax")
    assert not roots & forbidden


def test_every_layer_is_known():
    found = {layer_of(path) for path in sources()}
    assert found <= set(BELOW) | COMMANDS


def test_a_forbidden_import_is_seen(tmp_path):
    """The reader finds what it should: a lazy import inside a function, both spellings."""
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from vqjax import eval\n    import vqjax.train.loop\n")
    assert {name for _, name in layers_imported(path)} == {"eval", "train"}
