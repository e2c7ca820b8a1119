# SPDX-License-Identifier: Apache-2.0
"""PyTorch files without PyTorch: exact values from both containers, and nothing run from any."""

import contextlib
import pathlib
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from tests.conftest import golden_files
from tests.io import torch_writer
from tests.io.torch_writer import SAVERS, Instance, Raw, View
from vqjax.errors import VqjaxError
from vqjax.io import checked, pickle_machine, torch_pickle
from vqjax.io.lazy import LazyTensor

CONTAINERS = [
    path
    for pattern in ("*.pth", "*.pt", "*.ckpt", "*.safetensors")
    for path in golden_files("golden_eval", pattern)
]


def expected_by_names(names: set[str]) -> list[dict[str, np.ndarray]]:
    """What the .npz files of exactly these names list."""
    found = []
    for path in golden_files("golden_eval", "*.npz"):
        with np.load(path) as file:
            if set(file.files) == names:
                found.append(dict(file))
    return found


def is_equal(found: dict[str, LazyTensor], expected: dict[str, np.ndarray]) -> bool:
    for name, value in expected.items():
        array = found[name].read()
        if (found[name].shape, found[name].dtype) != (value.shape, value.dtype):
            return False
        if (array.shape, array.dtype) != (value.shape, value.dtype) or (array != value).any():
            return False
    return True


@pytest.mark.skipif(not CONTAINERS, reason="no containers (set VQJAX_GOLDEN)")
@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.name)
def test_reference_containers_load_exactly(path):
    found = checked.open_tensors(path)
    candidates = expected_by_names(set(found))
    assert candidates, f"no .npz lists the tensors of {path.name}"
    assert any(is_equal(found, expected) for expected in candidates)


def sample() -> dict:
    """Every kind of tensor, and what Lightning leaves beside them."""
    base = np.arange(24, dtype=np.float32)
    return {
        "state_dict": {
            "plain": np.arange(6, dtype=np.float32).reshape(2, 3),
            "half": np.array([1, -2], np.float16),
            "bf16": np.array([0x3F80, 0xC000], np.uint16),
            "double": np.array(1 / 3),
            "long": np.array([2**40]),
            "flags": np.array([True, False]),
            "empty": np.zeros((0, 3), np.float32),
            "transposed": View(base, 0, (3, 2), (1, 3)),
            "shifted": View(base, 5, (2, 2), (6, 2)),
            "repeated": View(base, 3, (2, 4), (0, 0)),
        },
        "global_step": 7,
        "callbacks": {"x": Instance("pytorch_lightning.callbacks", "EMA", {"decay": 0.9})},
    }


@pytest.mark.parametrize("container", SAVERS)
def test_every_kind_of_tensor(container, tmp_path):
    SAVERS[container](tmp_path / "m.ckpt", sample())
    loaded = torch_pickle.load(tmp_path / "m.ckpt")
    assert loaded.contents["global_step"] == 7
    assert loaded.stubs == ("pytorch_lightning.callbacks.EMA",)
    found = {k: v.read() for k, v in torch_pickle.load_tensors(tmp_path / "m.ckpt").items()}
    base = np.arange(24, dtype=np.float32)
    np.testing.assert_array_equal(found["plain"], base[:6].reshape(2, 3))
    np.testing.assert_array_equal(found["bf16"], np.array([1, -2], np.float32))
    np.testing.assert_array_equal(found["transposed"], base[:6].reshape(2, 3).T)
    np.testing.assert_array_equal(found["shifted"], [[5, 7], [11, 13]])
    np.testing.assert_array_equal(found["repeated"], np.full((2, 4), 3))
    assert found["double"].dtype == np.float64
    assert found["double"] == 1 / 3
    assert found["long"][0] == 2**40
    assert found["flags"].tolist() == [True, False]
    assert found["empty"].shape == (0, 3)


MARKER = "vqjax-was-here"


def hostile(marker: pathlib.Path) -> dict[str, bytes]:
    """Opcodes that make Python's own unpickler run a command, or try to, by each way to call."""
    argument = torch_writer._Pickler(legacy=False)
    argument.write(f"touch {marker}")
    text = argument.out.getvalue()
    python = f"V__import__('os').system('touch {marker}')\n"
    line = f"S'touch {marker}'\n".encode()
    return {
        "reduce": b"cos\nsystem\n(" + text + b"tR",
        "stack_global": b"X\x02\0\0\0osX\x06\0\0\0system\x93(" + text + b"tR",
        "inst": b"(" + line + b"ios\nsystem\n",
        "obj": b"(cos\nsystem\n" + line + b"o",
        "newobj": b"cos\nsystem\n(" + text + b"t\x81",
        "newobj_ex": b"cos\nsystem\n(" + text + b"t}\x92",
        "build": b"cos\nsystem\n)\x81}(X\x0c\0\0\0__setstate__cos\nsystem\nub(" + text + b"tb",
        "builtins": b"cbuiltins\nexec\n(" + python.encode() + b"tR",
        "rebuild": b"ctorch._utils\n_rebuild_parameter\n(cos\nsystem\ntR(" + text + b"tR",
        "extension": b"\x82\x01(" + text + b"tR",
        "load_from_bytes": b"ctorch.storage\n_load_from_bytes\n(" + text + b"tR",
    }


@pytest.mark.parametrize("container", SAVERS)
@pytest.mark.parametrize("attack", hostile(pathlib.Path(MARKER)))
def test_no_code_runs(container, attack, tmp_path):
    marker = tmp_path / MARKER
    contents = {"state_dict": {"w": np.ones(2, np.float32)}, "x": Raw(hostile(marker)[attack])}
    SAVERS[container](tmp_path / "m.ckpt", contents)
    loaded = None
    with contextlib.suppress(VqjaxError):
        loaded = torch_pickle.load(tmp_path / "m.ckpt")
    assert not marker.exists()
    if loaded is not None:
        assert isinstance(loaded.contents["x"], pickle_machine.Stub | pickle_machine.Global)
        assert loaded.contents["state_dict"]["w"].read().tolist() == [1, 1]


def test_names_of_what_was_not_built_are_kept(tmp_path):
    contents = {"state_dict": {"w": np.ones(2, np.float32)}, "x": Raw(b"cos\nsystem\n)R")}
    torch_writer.save_zip(tmp_path / "m.ckpt", contents)
    assert torch_pickle.load(tmp_path / "m.ckpt").stubs == ("os.system",)


def test_a_hundred_names_of_what_was_not_built_are_enough(tmp_path):
    calls = b"".join(b"cos\nf%03d%b\n)R" % (index, b"x" * 500) for index in range(102))
    torch_writer.save_zip(tmp_path / "m.ckpt", {"x": Raw(b"(" + calls + b"l")})
    loaded = torch_pickle.load(tmp_path / "m.ckpt")
    assert [name[:7] for name in loaded.stubs] == [f"os.f{index:03d}" for index in range(100)]
    assert {len(name) for name in loaded.stubs} == {200}
    assert repr(loaded.contents["x"][101]) == "<stub of an object whose name came after 100 others>"


BASE = np.zeros(8, np.float32)
ABSURD_VIEWS = {
    "beyond": View(BASE, 1, (8,), (1,)),
    "offset": View(BASE, 9, (1,), (1,)),
    "negative stride": View(BASE, 7, (8,), (-1,)),
    "negative size": View(BASE, 0, (-1,), (1,)),
    "negative offset": View(BASE, -1, (1,), (1,)),
    "huge stride": View(BASE, 0, (2,), (2**62,)),
    "overflow": View(BASE, 0, (2**40, 2**40), (0, 0)),
    "expanded": View(BASE, 0, (2**20,), (0,)),
    "huge empty": View(BASE, 0, (0, 2**40, 2**40), (0, 0, 0)),
    "dimensions": View(BASE, 0, (1,) * 40, (1,) * 40),
    "ranks": View(BASE, 0, (2, 2), (1,)),
    "claims more": View(BASE, 0, (2**30,), (1,), count=2**30),
    "claims negative": View(BASE, 0, (1,), (1,), count=-1),
    "big numbers": View(BASE, 0, (2**200,), (2**200,), count=2**200),
}


@pytest.mark.parametrize("container", SAVERS)
@pytest.mark.parametrize("case", ABSURD_VIEWS)
def test_absurd_tensors_are_refused(container, case, tmp_path):
    SAVERS[container](tmp_path / "m.ckpt", {"w": ABSURD_VIEWS[case]})
    with pytest.raises(VqjaxError, match=r"m\.ckpt.*(storage|tensor|integer).*download it again"):
        torch_pickle.load(tmp_path / "m.ckpt")


def text(raw: bytes) -> bytes:
    """The opcode that puts it on the stack."""
    return b"X" + struct.pack("<I", len(raw)) + raw


BOMBS = {
    "long": (b"\x8b\xff\xff\xff\x7f", "an integer of 2147483647 bytes"),
    "negative long": (b"\x8b\xff\xff\xff\xff", "an integer of -1 bytes"),
    "text": (b"X\xff\xff\xff\xff", "ends early"),
    "text8": (b"\x8d" + b"\xff" * 8, "ends early"),
    "digits": (b"L" + b"9" * 900 + b"\n", "a number of 900 digits"),
    "line": (b"c" + b"a" * 5000 + b"\nb\n", "no end of line"),
    "stack": (b"t" * 3, "no mark"),
    "underflow": (b"0000000000", "nothing on the stack"),
    "memo": (b"h\xff", "memo entry 255"),
    "pairs": (b"(NNNd", "without a value"),
    "buffer": (b"\x97", "has no place"),
    "arguments": (b"cos\nsystem\nNR", "without a tuple"),
    "empty class": (b"(o", "without a class"),
    "long module": (text(b"a" * 1025) + text(b"b") + b"\x93", "name has 1025 characters, at most"),
    "long name": (text(b"a") + text(b"b" * (1 << 20)) + b"\x93", "name has 1048576 characters"),
    "steps": (b"N0" * 2_100_000, "more than 4000000 pickle instructions"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_malformed_pickles_say_what_is_wrong(case, tmp_path):
    code, message = BOMBS[case]
    torch_writer.save_zip(tmp_path / "m.ckpt", {"w": np.ones(2, np.float32), "x": Raw(code)})
    with pytest.raises(VqjaxError, match=message):
        torch_pickle.load(tmp_path / "m.ckpt")


HUGE = {
    "deep lists": b"]" * 200_000 + b"a" * 199_999,
    "deep tuples": b")" + b"\x85" * 200_000,
    "deep key": b"}(" + b")" + b"\x85" * 100_000 + b"K\x01u",  # a deep tuple as a dict key
    "memo index": b"K\x01r\xff\xff\xff\xff",  # near 2**32
    # Names as long as they may be: 300 MB, were each call to keep its own copy.
    "calls": b"(" + text(b"a" * 1024) * 2 + b"\x93q\0" + b"h\0)R" * 150_000 + b"l",
    # Each is named after the one before it: 400 MB, were the names kept whole.
    "tensors on stubs": b"(ctorch._utils\n_rebuild_tensor_v2\nq\0cos\nsystem\n)Rq\1"
    + b"h\0(h\1NNNtRq\1" * 8000
    + b"l",
    "shared": b"](" + b"N" * 1000 + b"e" + b"2\x86" * 1000,  # 2**1000 references
}


@pytest.mark.parametrize("container", SAVERS)
def test_errors_show_no_nested_objects(container, tmp_path):
    """Sixty lists of two that share their items: 2**60 of them, were they shown."""
    laugh = b"]" + b"2\x86" * 60
    storage = b"((X\x07\0\0\0storagectorch\nFloatStorage\n%bX\x03\0\0\0cpuK\x01tQ" % laugh
    SAVERS[container](tmp_path / "m.ckpt", {"w": Raw(storage)})
    with pytest.raises(VqjaxError, match=r"a storage named \(tuple\) of 1 values"):
        torch_pickle.load(tmp_path / "m.ckpt")


@pytest.mark.parametrize("case", HUGE)
def test_deep_and_shared_structures_stay_small(case, tmp_path):
    contents = {"w": np.ones(2, np.float32), "x": Raw(HUGE[case])}
    torch_writer.save_zip(tmp_path / "m.ckpt", contents)
    tracemalloc.start()
    try:
        loaded = torch_pickle.load(tmp_path / "m.ckpt")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert loaded.contents["w"].read().tolist() == [1, 1]
    assert peak < 200 << 20


def test_lists_copied_into_dicts_are_counted(tmp_path):
    code = b"](" + b"NN\x86" * 5000 + b"e\x85q\x010" + b"ccollections\nOrderedDict\nh\x01R0" * 1000
    torch_writer.save_zip(tmp_path / "m.ckpt", {"x": Raw(code + b"N")})
    with pytest.raises(VqjaxError, match="hold too many items"):
        torch_pickle.load(tmp_path / "m.ckpt")


def test_zip_bombs_are_refused(tmp_path):
    big = {"w": np.zeros(1_000_000, np.float32)}
    torch_writer.save_zip(tmp_path / "m.ckpt", big, compress=True)
    assert (tmp_path / "m.ckpt").stat().st_size < 10_000
    with pytest.raises(VqjaxError, match="compressed or encrypted"):
        torch_pickle.load(tmp_path / "m.ckpt")


def test_strange_zip_files_are_refused(tmp_path):
    path = tmp_path / "m.ckpt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../../escape", b"x")
        file.writestr("/etc/data.pkl.txt", b"x")
    with pytest.raises(VqjaxError, match="0 entries named data"):
        torch_pickle.load(path)
    assert [file.name for file in tmp_path.iterdir()] == ["m.ckpt"]
    torch_writer.save_zip(path, sample())
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("archive/data.pkl", b"N.")
    with pytest.raises(VqjaxError, match="given twice"):
        torch_pickle.load(path)
    torch_writer.save_zip(path, sample())
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/constants.pkl", b"N.")
    with pytest.raises(VqjaxError, match="TorchScript"):
        torch_pickle.load(path)


def test_directory_that_claims_millions_of_entries(tmp_path):
    path = tmp_path / "m.ckpt"
    torch_writer.save_zip(path, sample())
    data = bytearray(path.read_bytes())
    end = data.rfind(b"PK\x05\x06")
    struct.pack_into("<I", data, end + 12, 0xFFFFFFF0)
    path.write_bytes(data)
    with pytest.raises(VqjaxError, match="too large"):
        torch_pickle.load(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it begins with b''"),
        (b"<!DOCTYPE html><html>", "it begins with b'<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1\n", "version https:/"),
        (b"\x80\x02N.", "ends early"),
        (b"\x80\x02N.\x80\x02N.", "not one that torch.save wrote"),
        (b"PK\x03\x04" + b"\0" * 100, "directory at the end of the file is missing"),
    ],
)
def test_other_files_are_named_for_what_they_are(data, message, tmp_path):
    (tmp_path / "m.ckpt").write_bytes(data)
    with pytest.raises(VqjaxError, match=message):
        torch_pickle.load(tmp_path / "m.ckpt")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(VqjaxError, match="No such file"):
        torch_pickle.load(tmp_path / "m.ckpt")
    with pytest.raises(VqjaxError, match="cannot be read"):
        torch_pickle.load(tmp_path)


def test_big_endian_is_refused(tmp_path):
    torch_writer.save_zip(tmp_path / "m.ckpt", sample())
    torch_writer.replace_entry(tmp_path / "m.ckpt", "archive/byteorder", lambda _: b"big")
    with pytest.raises(VqjaxError, match="not little endian"):
        torch_pickle.load(tmp_path / "m.ckpt")


def read_all(path) -> None:
    """Reads every tensor of a file."""
    for tensor in torch_pickle.load_tensors(path).values():
        tensor.read()


@pytest.mark.parametrize(
    "source", [*SAVERS, *[pytest.param(path, id=path.name) for path in CONTAINERS]]
)
def test_damaged_files_load_or_say_so(source, tmp_path):
    path = tmp_path / "m.ckpt"
    if source in SAVERS:
        SAVERS[source](path, sample())
    data = path.read_bytes() if source in SAVERS else source.read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for trial in range(150):
        broken = bytearray(data)
        if trial % 3 == 0:
            broken = broken[: rng.integers(len(data))]
        for _ in range(trial % 3):
            broken[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(broken)
        try:
            read_all(path)
        except VqjaxError:
            refused += 1
    assert refused >= 50  # at least every file that was cut


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path):
    path = tmp_path / "m.ckpt"
    torch_writer.save_zip(path, {"w": np.full(64, 3.25, np.float32)})
    data = bytearray(path.read_bytes())
    data[data.index(np.full(64, 3.25, np.float32).tobytes()) + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(VqjaxError, match=r"m\.ckpt: storage '0' is damaged"):
        read_all(path)


def test_reading_one_tensor_reads_no_other(tmp_path):
    path = tmp_path / "m.ckpt"
    torch_writer.save_zip(path, {f"w{i}": np.full(1_000_000, i, np.float32) for i in range(8)})
    tracemalloc.start()
    try:
        found = torch_pickle.load(path).contents
        for tensor in found.values():
            assert isinstance(tensor, LazyTensor)
            tensor.read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 << 20  # two tensors of 4 MB and some


@pytest.mark.parametrize("contents", [7, [1], {}, {"a": 1}, {"state_dict": {"a": 1}}])
def test_files_without_tensors(contents, tmp_path):
    torch_writer.save_zip(tmp_path / "m.ckpt", contents)
    with pytest.raises(VqjaxError, match="no tensors found"):
        torch_pickle.load_tensors(tmp_path / "m.ckpt")


def test_unknown_storage_types_are_stubs(tmp_path):
    path = tmp_path / "m.ckpt"
    torch_writer.save_zip(path, {"w": np.ones(2, np.float32), "q": np.ones(3, np.uint8)})
    torch_writer.replace_entry(
        path, "archive/data.pkl", lambda data: data.replace(b"ByteStorage", b"QInt8Storage")
    )
    loaded = torch_pickle.load(path)
    assert loaded.stubs[-1] == "torch.QInt8Storage"
    assert list(torch_pickle.load_tensors(tmp_path / "m.ckpt")) == ["w"]
