# SPDX-License-Identifier: Apache-2.0
"""References of tensorflow-datasets: with the package where it is installed, else its errors."""

import dataclasses
import importlib
import importlib.util
import io
import json
import pathlib
import sys
import tracemalloc
import types
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from vqjax.errors import VqjaxError
from vqjax.io import adm_crop, tfds_images
from vqjax.io.images import open_images
from vqjax.pipeline import sources

COUNT = 7


def picture(number: int, height: int = 20) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, 30, 3), np.uint8)


def encoded(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG")
    return data.getvalue()


@dataclasses.dataclass
class Feature:
    shape: tuple[int | None, ...] = (None, None, 3)
    np_dtype: type = np.uint8


class Splits(dict):
    def __missing__(self, name: str):
        if name == "train[:2]":
            return types.SimpleNamespace(num_examples=2)
        raise ValueError(f"Unknown split {name!r}.\nand a second line")


@dataclasses.dataclass
class Builder:
    """As much of the package's builder as is used."""

    data_dir: pathlib.Path
    features: dict
    records: Callable[[int], dict]
    count: int = COUNT
    refuses: Exception | None = None
    asked: list = dataclasses.field(default_factory=list)

    @property
    def info(self):
        splits = Splits(train=types.SimpleNamespace(num_examples=self.count))
        return types.SimpleNamespace(
            full_name="fake/1.0.0",
            splits=splits,
            features=self.features,
            file_format=types.SimpleNamespace(value="tfrecord"),
        )

    def as_data_source(self, *, split, decoders):
        self.asked.append((split, decoders))
        if self.refuses is not None:
            raise self.refuses
        return Source(self.info.splits[split].num_examples, self.records)

    def as_dataset(self, *, split, decoders, shuffle_files):
        assert not shuffle_files
        return Source(self.info.splits[split].num_examples, self.records)


@dataclasses.dataclass
class Source:
    count: int
    records: Callable[[int], dict]

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        if not 0 <= number < self.count:
            raise IndexError(number)
        return self.records(number)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A function that makes the package know one dataset, of the given features."""

    def install(**changes) -> Builder:
        options = {
            "features": {"image": Feature(), "label": object()},
            "records": lambda number: {"image": encoded(picture(number)), "label": 0},
        }
        builder = Builder(tmp_path, **(options | changes))
        (tmp_path / "dataset_info.json").write_text(json.dumps({"name": "fake"}))
        package = types.ModuleType("tensorflow_datasets")
        package.__dict__.update(
            features=types.SimpleNamespace(Image=Feature),
            decode=types.SimpleNamespace(SkipDecoding=lambda: "encoded"),
            builder=lambda name: known(name, builder),
            as_numpy=lambda source: source,
        )
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", package)
        return builder

    def known(name: str, builder: Builder) -> Builder:
        if name != "fake":
            raise LookupError(f"Dataset {name} not found.")
        return builder

    return install


def test_names_are_taken_apart():
    full = tfds_images.parse("tfds:imagenet_resized/64x64:0.1.0?split=train[:90%]&size=32")
    assert full == tfds_images.Wanted("imagenet_resized/64x64:0.1.0", "train[:90%]", 32)
    both = tfds_images.parse("tfds:a?split=train[:5%]+validation%2Btest")
    assert both.split == "train[:5%]+validation+test"
    assert tfds_images.parse("tfds:cifar10") == tfds_images.Wanted("cifar10", "train", None)


@pytest.mark.parametrize(
    "text", ["tfds:", "tfds:?split=test", "tfds:a?splt=test", "tfds:a?split=", "tfds:a?test"]
)
def test_other_forms_are_refused(text):
    with pytest.raises(VqjaxError, match=r"expected tfds:NAME\[/CONFIG\].*quoted"):
        tfds_images.parse(text)


def test_a_size_that_is_none():
    with pytest.raises(VqjaxError, match="size=0, expected pixels"):
        tfds_images.parse("tfds:a?size=0")


def test_pictures_of_several_sizes_are_cropped_as_imagenet_was(fake):
    builder = fake()
    assert open_images("tfds:fake").size == (256, 256)
    found = open_images("tfds:fake?size=16")
    assert (found.count, found.size, found.manifold) == (COUNT, (16, 16), None)
    expected = [adm_crop.center_crop(Image.fromarray(picture(i)), 16) for i in range(COUNT)]
    for _ in range(2):  # a set can be read again
        batches = list(found.batches(3))
        assert [len(batch) for batch in batches] == [3, 3, 1]
        np.testing.assert_array_equal(np.concatenate(batches), expected)
    assert builder.asked[-1] == ("train", {"image": "encoded"})


def test_pictures_of_one_size_stay_as_they_are(fake):
    fake(features={"photo": Feature((20, 30, 3))}, records=lambda n: {"photo": encoded(picture(n))})
    found = open_images("tfds:fake?split=train[:2]")
    assert (found.count, found.size) == (2, (20, 30))
    np.testing.assert_array_equal(next(found.batches(2)), [picture(0), picture(1)])
    assert open_images("tfds:fake?size=8").size == (8, 8)


def test_precision_and_recall_look_at_as_many_as_the_published_reference(fake):
    fake(count=tfds_images.MANIFOLD + 1)
    assert open_images("tfds:fake").manifold == tfds_images.MANIFOLD


def test_the_fingerprint_follows_what_is_asked_for(fake, tmp_path):
    fake()
    texts = ["tfds:fake", "tfds:fake?size=64", "tfds:fake?split=train[:2]"]
    hashes = {text: sources.hash_of_pictures(text) for text in texts}
    assert len(set(hashes.values())) == 3
    assert hashes[texts[0]] == tfds_images.fingerprint("tfds:fake?size=256")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"name": "fake", "more": 1}))
    assert tfds_images.fingerprint(texts[0]) != hashes[texts[0]]


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(
        VqjaxError, match=r"tensorflow-datasets, which.*pip install 'vqjax\[tfds\]'"
    ):
        open_images("tfds:imagenet2012")


def test_files_that_only_tensorflow_reads(fake, monkeypatch):
    fake(refuses=NotImplementedError("No random access"))
    find = importlib.util.find_spec
    there: list[str] = []
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name if name in there else find("no_such_module")
    )
    with pytest.raises(VqjaxError, match="prepared as tfrecord, which only TensorFlow reads"):
        open_images("tfds:fake")
    there.append("tensorflow")
    found = open_images("tfds:fake?size=16")
    expected = [adm_crop.center_crop(Image.fromarray(picture(i)), 16) for i in range(COUNT)]
    np.testing.assert_array_equal(np.concatenate(list(found.batches(4))), expected)


def test_what_is_not_there(fake, tmp_path):
    fake()
    with pytest.raises(VqjaxError, match=r"knows no 'other' \(LookupError: Dataset other not"):
        open_images("tfds:other")
    with pytest.raises(VqjaxError, match=r"no split 'dev' \(Unknown split 'dev'\.\); there are t"):
        open_images("tfds:fake?split=dev")
    fake(refuses=ImportError("array_record"))
    with pytest.raises(VqjaxError, match="need the package array-record"):
        open_images("tfds:fake")
    (tmp_path / "dataset_info.json").unlink()
    with pytest.raises(VqjaxError, match=r"not prepared in .*nothing is downloaded"):
        open_images("tfds:fake")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"text": object()}, "expected one picture per example.*its features are text"),
        ({"a": Feature(), "b": Feature()}, "expected one picture per example.*a, b"),
        (
            {"image": Feature((28, 28, 1))},
            r"pictures \[28, 28, 1\] of uint8; scores need 8-bit RGB",
        ),
        ({"image": Feature(np_dtype=np.uint16)}, "of uint16"),
    ],
)
def test_datasets_without_one_rgb_picture(features, message, fake):
    fake(features=features)
    with pytest.raises(VqjaxError, match=message):
        open_images("tfds:fake")


def test_a_damaged_picture_is_named(fake):
    fake(records=lambda number: {"image": encoded(picture(0))[: 60 if number == 2 else None]})
    with pytest.raises(VqjaxError, match="picture 2 cannot be read"):
        list(open_images("tfds:fake?size=16").batches(2))


def test_datasets_are_never_all_in_memory(fake):
    one = {"image": encoded(picture(0))}
    fake(count=80, records=lambda number: one)
    found = open_images("tfds:fake?size=64")
    tracemalloc.start()
    total = sum(len(batch) for batch in found.batches(5))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 80
    assert peak < 80 * 64 * 64 * 3 / 4


BUILDER = '''
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class VqjaxTinyPictures(tfds.core.GeneratorBasedBuilder):
    """Two sizes of PNG pictures."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {"image": tfds.features.Image(shape=(None, None, 3), encoding_format="png")}
        )
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, downloads):
        return {"train": self._generate_examples(9), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        for number in range(count):
            data = io.BytesIO()
            pixels = np.full((20 + number, 30, 3), 10 * number, np.uint8)
            Image.fromarray(pixels).save(data, format="PNG")
            data.seek(0)
            yield number, {"image": data}
'''


def _prepare(folder: pathlib.Path, file_format: str, monkeypatch) -> None:
    """A dataset as the user's own preparation leaves it."""
    tfds = pytest.importorskip(
        "tensorflow_datasets", reason="tensorflow-datasets is not installed: vqjax[tfds]"
    )
    pytest.importorskip("array_record", reason="array-record is not installed: vqjax[tfds]")
    package = folder / "vqjax_tiny_pictures"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "builder.py").write_text(BUILDER)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    sys.modules.pop("vqjax_tiny_pictures.builder", None)
    # The package keeps a registry; a builder of another test may be in it already.
    monkeypatch.setattr(tfds.core.registered, "_DATASET_REGISTRY", {})
    tfds.core.utils.file_utils.clear_registered_data_dirs()
    module = importlib.import_module("vqjax_tiny_pictures.builder")
    data = folder / file_format
    builder = module.VqjaxTinyPictures(data_dir=data, file_format=file_format)
    builder.download_and_prepare()
    tfds.core.add_data_dir(str(data))


def _check_prepared() -> None:
    found = open_images("tfds:vqjax_tiny_pictures:1.0.0?size=8")
    pixels = np.concatenate(list(found.batches(4)))
    assert pixels.shape == (9, 8, 8, 3)
    assert sorted(pixels[:, 0, 0, 0]) == [10 * number for number in range(9)]  # it shuffles
    assert open_images("tfds:vqjax_tiny_pictures?split=test").size == (256, 256)
    assert open_images("tfds:vqjax_tiny_pictures?split=test[:3]").count == 3
    assert len(tfds_images.fingerprint("tfds:vqjax_tiny_pictures")) == 64
    with pytest.raises(VqjaxError, match="no split 'validation'"):
        open_images("tfds:vqjax_tiny_pictures?split=validation")


def test_a_prepared_dataset_without_tensorflow(tmp_path, monkeypatch):
    _prepare(tmp_path, "array_record", monkeypatch)
    before = "tensorflow" in sys.modules
    _check_prepared()
    assert ("tensorflow" in sys.modules) == before
    with pytest.raises(VqjaxError, match="knows no 'vqjax_no_such_pictures'"):
        open_images("tfds:vqjax_no_such_pictures")


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed"
)
def test_a_prepared_dataset_of_tensorflow(tmp_path, monkeypatch):
    _prepare(tmp_path, "tfrecord", monkeypatch)
    _check_prepared()
