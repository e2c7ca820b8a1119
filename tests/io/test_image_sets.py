# SPDX-License-Identifier: Apache-2.0
"""Pictures in and out: ADM batches and folders are streamed, and every misfit has a sentence."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from vqjax.errors import VqjaxError
from vqjax.io import adm_npz, image_set
from vqjax.io.images import open_images

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (7, 5, 4, 3), np.uint8)
LABELS = np.array([3, 1, 4, 1, 5, 9, 2])
STATISTICS = {
    "mu": np.arange(3.0, dtype=np.float32),
    "sigma": np.eye(3),
    "mu_s": np.arange(2.0),
    "sigma_s": np.eye(2),
}


def joined(images: image_set.ImageSet, size: int) -> np.ndarray:
    parts = list(images.batches(size))
    assert {len(part) for part in parts[:-1]} <= {size}
    return np.concatenate(parts)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_batches_of_numpy(save, tmp_path):
    save(tmp_path / "a.npz", PICTURES, LABELS, **STATISTICS)
    found = open_images(tmp_path / "a.npz")
    assert (found.count, found.size) == (7, (5, 4))
    for _ in range(2):  # a set can be read again
        np.testing.assert_array_equal(joined(found, 3), PICTURES)
    assert found.labels is not None
    np.testing.assert_array_equal(found.labels, LABELS)
    assert found.statistics is not None
    for name, expected in STATISTICS.items():
        values = getattr(found.statistics, name)
        assert values.dtype == np.float64
        np.testing.assert_array_equal(values, expected)


def test_written_batches_are_what_numpy_reads(tmp_path):
    path = tmp_path / "new" / "out.npz"
    adm_npz.save_npz(path, [PICTURES[:4], PICTURES[4:]], count=7, labels_N=LABELS)
    with np.load(path) as file:
        np.testing.assert_array_equal(file["arr_0"], PICTURES)
        np.testing.assert_array_equal(file["arr_1"], LABELS)
    assert [p.name for p in path.parent.iterdir()] == ["out.npz"]


def test_pictures_are_never_all_in_memory(tmp_path):
    shape = (400, 64, 64, 3)  # 4.9 MB
    adm_npz.save_npz(
        tmp_path / "a.npz", (np.zeros((10, *shape[1:]), np.uint8) for _ in range(40)), count=400
    )
    tracemalloc.start()
    total = sum(len(batch) for batch in open_images(tmp_path / "a.npz").batches(10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 400
    assert peak < np.prod(shape) / 4


def test_a_folder_in_order_of_names(tmp_path):
    for name, picture in zip(["b.png", "a.PNG", "c.bmp"], PICTURES):
        Image.fromarray(picture).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    found = open_images(tmp_path)
    assert (found.count, found.size) == (3, (5, 4))
    np.testing.assert_array_equal(joined(found, 2), PICTURES[[1, 0, 2]])


def _png16(path) -> None:
    """16 bits per sample, RGB: Pillow cannot write it, and reads it as 8 bits without a word."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        tail = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + tail

    rows = b"".join(b"\0" + bytes(4 * 6) for _ in range(5))
    header = struct.pack(">2I5B", 4, 5, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def test_every_picture_that_does_not_fit_is_named(tmp_path):
    for index, picture in enumerate(PICTURES[:3]):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    Image.fromarray(PICTURES[0][:4]).save(tmp_path / "size.png")
    Image.fromarray(PICTURES[0, :, :, 0]).save(tmp_path / "gray.png")
    Image.fromarray(PICTURES[0, :, :, 0].astype(np.uint16)).save(tmp_path / "gray16.png")
    Image.fromarray(PICTURES[0]).convert("RGBA").save(tmp_path / "alpha.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    _png16(tmp_path / "deep.png")
    first, *others = map(Image.fromarray, PICTURES[:3])
    first.save(tmp_path / "moving.webp", save_all=True, append_images=others)
    first.save(tmp_path / "holed.png", transparency=(0, 0, 0))
    with Image.open(tmp_path / "deep.png") as image:
        assert image.mode == "RGB"  # why its header is looked at
    with pytest.raises(VqjaxError, match="8-bit RGB of one size") as caught:
        open_images(tmp_path)
    text = str(caught.value)
    assert "size.png: 4 x 4, most are 4 x 5" in text
    assert "gray.png: grayscale (mode L)" in text
    assert "gray16.png: 16 bits per sample" in text
    assert "alpha.png: with alpha (mode RGBA)" in text
    assert "broken.png: cannot be read" in text
    assert "deep.png: 16 bits per sample" in text
    assert "moving.webp: 3 pictures in one file" in text
    assert "holed.png: a color that stands for transparent" in text
    assert "0.png" not in text


def test_a_picture_that_ends_early(tmp_path):
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.png", compress_level=0)
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[:3000])
    with pytest.raises(VqjaxError, match=r"a\.png: cannot be read"):
        list(open_images(tmp_path).batches(1))


BAD = {
    "keys": ({"images": PICTURES}, r"holds images\.npy, expected arr_0\.npy"),
    "float pictures": ({"arr_0": PICTURES / 255}, r"found float64 \[7, 5, 4, 3\]"),
    "channels first": ({"arr_0": PICTURES.transpose(0, 3, 1, 2)}, r"\[7, 3, 5, 4\]"),
    "gray": ({"arr_0": PICTURES[..., 0]}, r"found uint8 \[7, 5, 4\]"),
    "none": ({"arr_0": PICTURES[:0]}, r"found uint8 \[0, 5, 4, 3\]"),
    "objects": ({"arr_0": np.array([None, PICTURES], object)}, "objects"),
    "label count": ({"arr_1": LABELS[:3]}, r"arr_1 is int64 \[3\], expected integers \[7\]"),
    "label dtype": ({"arr_1": LABELS + 0.5}, "arr_1 is float64"),
    "half": ({"mu_s": None, "sigma_s": None}, "mu_s: missing"),
    "not square": (
        {"sigma": np.ones((3, 2))},
        r"sigma is float64 \[3, 2\].*floating point \[3, 3\]",
    ),
    "integers": ({"mu": np.arange(3)}, r"mu is int64 \[3\], expected floating point \[D\]"),
    "dimensions": (
        {"sigma_s": np.eye(3)},
        r"sigma_s is float64 \[3, 3\], expected floating point \[2, 2\]",
    ),
    "variances": ({"sigma": -np.eye(3)}, "sigma: negative variances"),
    "nan": ({"mu": np.full(3, np.nan)}, "mu: NaN or infinite"),
    "lopsided": ({"sigma": np.triu(np.ones((3, 3)))}, "sigma: not symmetric"),
}


@pytest.mark.parametrize("case", BAD)
def test_npz_that_does_not_serve(case, tmp_path):
    change, message = BAD[case]
    arrays = {"arr_0": PICTURES, "arr_1": LABELS, **STATISTICS}
    if case == "keys":
        arrays = {}
    arrays = {name: value for name, value in {**arrays, **change}.items() if value is not None}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(VqjaxError, match=message):
        open_images(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("(-7, 5, 4, 3)", r"found uint8 \[-7, 5, 4, 3\]"),
        ("(True, 5, 4, 3)", r"found uint8 \[True, 5, 4, 3\]"),
        ("(" * 300, r"not a readable \.npz file"),
    ],
)
def test_headers_that_hold_no_sizes(shape, message, tmp_path):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(1000) + "\n"
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(420)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("arr_0.npy", member)
    with pytest.raises(VqjaxError, match=message):
        open_images(tmp_path / "a.npz")


def test_files_that_are_no_batches(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(VqjaxError, match=r"not a readable \.npz"):
        open_images(tmp_path / "text.npz")
    with zipfile.ZipFile(tmp_path / "no_arrays.npz", "w") as file:
        file.writestr("arr_0", b"no array of NumPy has this name")
    with pytest.raises(VqjaxError, match=r"holds arr_0, expected arr_0\.npy"):
        open_images(tmp_path / "no_arrays.npz")
    with pytest.raises(VqjaxError, match="no such file"):
        open_images(tmp_path / "absent.npz")
    (tmp_path / "a.tar").touch()
    with pytest.raises(VqjaxError, match=r"expected an \.npz file with arr_0 or a folder"):
        open_images(tmp_path / "a.tar")
    with pytest.raises(VqjaxError, match=r"b\.tar: no such file or folder"):
        open_images(tmp_path / "b.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VqjaxError, match="no pictures"):
        open_images(tmp_path / "empty")


def test_an_array_that_ends_early(tmp_path):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, PICTURES)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("arr_0.npy", stream.getvalue()[:-50])
    with pytest.raises(VqjaxError, match="arr_0 ends before picture 7"):
        list(open_images(tmp_path / "a.npz").batches(3))


def test_writing_checks_what_comes(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(VqjaxError, match=r"7 pictures, labels of shape \(3,\)"):
        adm_npz.save_npz(path, [PICTURES], count=7, labels_N=LABELS[:3])
    with pytest.raises(VqjaxError, match="8 pictures were announced, 7 came"):
        adm_npz.save_npz(path, [PICTURES], count=8)
    with pytest.raises(VqjaxError, match="pictures of sizes"):
        adm_npz.save_npz(path, [PICTURES[:2], PICTURES[2:, :4]], count=7)
    assert list(tmp_path.iterdir()) == []  # nothing half written stays


def test_pictures_in_memory():
    found = image_set.from_array(PICTURES, LABELS)
    np.testing.assert_array_equal(joined(found, 4), PICTURES)
    with pytest.raises(VqjaxError, match="convert to 8-bit RGB"):
        image_set.from_array(PICTURES.astype(np.float32))
    with pytest.raises(VqjaxError, match="7 pictures, labels"):
        image_set.from_array(PICTURES, LABELS[:2])
