from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from prepared_set import Record, records, write

from fedlp_jax.data import tfds as decoding
from fedlp_jax.data.prepared import find
from fedlp_jax.errors import FedLPError


def _decode(tmp_path, splits, image=None, label=None, **facts):
    write(tmp_path, splits, **facts)
    return decoding.decode(find("tiny", tmp_path), image, label)


@pytest.mark.parametrize("shape", [(4, 5, 3), (6, 6, 1), (3, 3, 4), (129, 130, 3)])
def test_pixels_and_labels_come_back_as_they_were(tmp_path, shape):
    train, test = records(5, shape), records(2, shape)
    decoded = _decode(tmp_path, {"train": train, "test": test}, channels=shape[-1])
    np.testing.assert_array_equal(decoded.train_inputs, [row.image for row in train])
    np.testing.assert_array_equal(decoded.test_inputs, [row.image for row in test])
    assert decoded.train_inputs.dtype == np.uint8
    assert decoded.train_labels.tolist() == [row.label for row in train]
    assert decoded.train_labels.dtype == np.int32
    assert decoded.num_classes == 3


def test_a_split_may_span_several_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "_CHUNK", 3)
    train = records(10)
    decoded = _decode(tmp_path, {"train": train, "test": records(2)})
    np.testing.assert_array_equal(decoded.train_inputs, [row.image for row in train])


def test_a_grey_picture_in_a_colour_set_gets_three_channels(tmp_path):
    grey = Record(np.full((4, 5, 1), 77, np.uint8), 0)
    decoded = _decode(tmp_path, {"train": [grey], "test": records(1)})
    assert decoded.train_inputs.shape == (1, 4, 5, 3)
    assert (decoded.train_inputs == 77).all()


def test_rows_go_back_to_the_order_of_their_ids(tmp_path):
    shuffled = [3, 0, 2, 10, 1]
    rows = [row._replace(id=f"train_{i:05d}") for row, i in zip(records(5), shuffled, strict=True)]
    test = [row._replace(id=f"test_{i}") for i, row in enumerate(records(2))]
    decoded = _decode(tmp_path, {"train": rows, "test": test})
    expected = [rows[i].image for i in (1, 4, 2, 0, 3)]
    np.testing.assert_array_equal(decoded.train_inputs, expected)
    assert decoded.train_labels.tolist() == [rows[i].label for i in (1, 4, 2, 0, 3)]


@pytest.mark.parametrize(
    ("ids", "order"),
    [
        ([b"train_2", b"train_10", b"train_1"], [2, 0, 1]),
        ([b"7", b"3"], [1, 0]),
        ([None, None], None),
        ([b"a_1", None], None),
        ([b"a_1", b"b_0"], None),
        ([b"a_1", b"a_01"], None),
        ([b"a_1", b"a_x"], None),
        ([3, 1], None),
    ],
)
def test_ids_give_an_order_only_if_they_number_one_source(ids, order):
    found = decoding._original_order(ids)
    assert (None if found is None else found.tolist()) == order


def test_slices_of_a_split_may_be_used(tmp_path):
    rows = records(10)
    write(tmp_path, {"train": rows})
    found = find("tiny", tmp_path, train_split="train[:70%]", test_split="train[70%:]")
    decoded = decoding.decode(found)
    np.testing.assert_array_equal(decoded.train_inputs, [row.image for row in rows[:7]])
    np.testing.assert_array_equal(decoded.test_inputs, [row.image for row in rows[7:]])


def test_images_of_differing_shapes_are_refused(tmp_path):
    rows = [*records(4), *records(1, (9, 5, 3))]
    with pytest.raises(FedLPError) as refusal:
        _decode(tmp_path, {"train": rows, "test": records(1)})
    assert str(refusal.value).startswith(
        "The images of tiny train differ in shape (number 0 is (4, 5, 3), number 4 is (9, 5, 3))"
    )
    assert "from_arrays" in str(refusal.value)


def test_of_several_labels_one_is_named(tmp_path):
    splits = {"train": records(3), "test": records(2)}
    with pytest.raises(
        FedLPError, match=r"2 features of kind ClassLabel \(coarse, fine\), .*label="
    ):
        _decode(tmp_path, splits, labels=("coarse", "fine"))
    found = find("tiny", tmp_path)
    assert decoding.decode(found, label="fine").train_labels.tolist() == [0, 1, 2]
    with pytest.raises(FedLPError, match="label='x' is not among them; say which with label="):
        decoding.decode(found, label="x")


def test_the_supervised_label_is_taken_of_several(tmp_path, monkeypatch):
    directory = write(
        tmp_path, {"train": records(3), "test": records(2)}, labels=("coarse", "fine")
    )
    info = json.loads((directory / "dataset_info.json").read_text())
    items = [{"featureKey": "image"}, {"featureKey": "fine"}]
    info["supervisedKeys"] = {"tuple": {"items": items}}
    (directory / "dataset_info.json").write_text(json.dumps(info))
    read = []
    whole = decoding._decode_split

    def decode_split(title, source, image, label, mode):
        read.append((image, label))
        return whole(title, source, image, label, mode)

    monkeypatch.setattr(decoding, "_decode_split", decode_split)
    decoding.decode(find("tiny", tmp_path))
    assert read == [("image", "fine")] * 2


def test_a_set_without_labels_is_refused(tmp_path):
    with pytest.raises(FedLPError, match=r"0 features of kind ClassLabel \(none\)"):
        _decode(tmp_path, {"train": records(3), "test": records(2)}, labels=())


def test_images_of_16_bits_are_refused(tmp_path):
    directory = write(tmp_path, {"train": records(3), "test": records(2)})
    file = directory / "features.json"
    file.write_text(file.read_text().replace("uint8", "uint16"))
    with pytest.raises(FedLPError, match="holds uint16 images .* pass the arrays to from_arrays"):
        decoding.decode(find("tiny", tmp_path))


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("PIL.Image", "pillow"),
        ("array_record.python.array_record_data_source", "array_record"),
        ("tensorflow_datasets", "tensorflow-datasets"),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, package):
    write(tmp_path, {"train": records(1), "test": records(1)})
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(FedLPError, match=f"needs the package {package} .*`pip install {package}`"):
        decoding.decode(find("tiny", tmp_path))


@pytest.mark.parametrize("splits", ["train[:", "train[:0%]"])
def test_a_slice_that_is_none_is_refused(tmp_path, splits):
    write(tmp_path, {"train": records(3), "test": records(2)})
    found = find("tiny", tmp_path, train_split=splits)
    with pytest.raises(FedLPError, match="cannot be read from .* Check the splits' names"):
        decoding.decode(found)


def test_a_damaged_file_is_refused(tmp_path):
    directory = write(tmp_path, {"train": records(3), "test": records(2)})
    file = directory / "tiny-train.array_record-00000-of-00001"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(FedLPError, match="cannot be read from .* prepare the set again"):
        decoding.decode(find("tiny", tmp_path))


def test_nothing_imports_tensorflow(tmp_path):
    _decode(tmp_path, {"train": records(3), "test": records(2)})
    assert "tensorflow" not in sys.modules


def test_progress_is_shown_on_a_terminal_only(capfd, monkeypatch):
    assert list(decoding._progress("Decoding", 1200)) == [0, 500, 1000]
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert list(decoding._progress("Decoding", 1200)) == [0, 500, 1000]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Decoding" in captured.err
