# SPDX-License-Identifier: Apache-2.0
"""Published files: what is known of them, and what speaks against a file of the same name."""

import dataclasses
import hashlib
import pathlib

import pytest

from vqjax.io import published

CONTENT = b"weights"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "vgg16-397923af.pth"
    path.write_bytes(CONTENT)
    return path


def known(**changes):
    right = {"size": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()[:8]}
    return dataclasses.replace(published.VGG16, **(right | changes))


def test_nothing_speaks_against_the_published_file(file):
    assert known().doubt(file) is None
    assert known(size="about 7 bytes", sha256="").doubt(file) is None


def test_another_size_or_hash_is_told_with_both(file):
    assert "found 7 bytes, the published file has 8 (" in str(known(size=8).doubt(file))
    other = str(known(sha256="0123abcd").doubt(file))
    assert f"found sha256 {known().sha256}..., the published file has 0123abcd..." in other
    assert published.VGG16.url in other


def test_files_of_other_names_are_not_looked_at(file, tmp_path):
    (sentence,) = published.doubts([tmp_path / "absent.pth", file])
    assert sentence.startswith(f"{file.name}: found sha256")


def test_descriptions_tell_sizes_in_bytes():
    assert "2,037,122,530 bytes, sha256 b32732719497e426..." in (
        published.IMAGENET_REFERENCE.describe()
    )
    assert "1,827,378,153 bytes, sha256 not published" in published.CIN256_V2.describe()


@pytest.mark.parametrize("file", published.FILES.values(), ids=lambda file: file.name)
def test_the_documentation_tells_where_files_are(file):
    text = (pathlib.Path(__file__).parents[2] / "docs" / "import.md").read_text(encoding="utf-8")
    size = file.size if isinstance(file.size, str) else f"{file.size:,} bytes"
    sha256 = f"`{file.sha256}...`" if file.sha256 else "not published"
    assert f"| `{file.name}` | {file.what} | {size} | {sha256} | <{file.url}> |" in text
