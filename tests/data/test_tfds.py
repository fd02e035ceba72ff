from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest
from prepared_set import Record, records, write

from fedlp_jax.data import tfds
from fedlp_jax.data.tfds import load_prepared
from fedlp_jax.errors import FedLPError

SPLITS = {"train": records(3), "test": records(2)}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FEDLP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def _load(tmp_path, splits, image=None, label=None, **facts):
    write(tmp_path, splits, **facts)
    return load_prepared("tiny", tmp_path, image=image, label=label)


def _find(name, data_dir=None):
    return tfds._find(name, data_dir, ("digits", "synthetic"))


@pytest.mark.parametrize("shape", [(4, 5, 3), (6, 6, 1), (3, 3, 4), (129, 130, 3)])
def test_pixels_and_labels_come_back_as_they_were(tmp_path, shape):
    train, test = records(5, shape), records(2, shape)
    decoded = _load(tmp_path, {"train": train, "test": test}, channels=shape[-1])
    np.testing.assert_array_equal(decoded["train_inputs"], [row.image for row in train])
    np.testing.assert_array_equal(decoded["test_inputs"], [row.image for row in test])
    assert decoded["train_inputs"].dtype == np.uint8
    assert decoded["train_labels"].tolist() == [row.label for row in train]
    assert decoded["train_labels"].dtype == np.int32
    assert decoded["num_classes"] == 3


def test_a_split_may_span_several_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds, "_CHUNK", 3)
    train = records(10)
    decoded = _load(tmp_path, {"train": train, "test": records(2)})
    np.testing.assert_array_equal(decoded["train_inputs"], [row.image for row in train])


def test_a_grey_picture_in_a_colour_set_gets_three_channels(tmp_path):
    grey = Record(np.full((4, 5, 1), 77, np.uint8), 0)
    decoded = _load(tmp_path, {"train": [grey], "test": records(1)})
    assert decoded["train_inputs"].shape == (1, 4, 5, 3)
    assert (decoded["train_inputs"] == 77).all()


def test_rows_go_back_to_the_order_of_their_ids(tmp_path):
    shuffled = [3, 0, 2, 10, 1]
    rows = [row._replace(id=f"train_{i:05d}") for row, i in zip(records(5), shuffled, strict=True)]
    test = [row._replace(id=f"test_{i}") for i, row in enumerate(records(2))]
    decoded = _load(tmp_path, {"train": rows, "test": test})
    expected = [rows[i].image for i in (1, 4, 2, 0, 3)]
    np.testing.assert_array_equal(decoded["train_inputs"], expected)
    assert decoded["train_labels"].tolist() == [rows[i].label for i in (1, 4, 2, 0, 3)]


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
    positions = tfds._original_order(ids)
    assert (None if positions is None else positions.tolist()) == order


def test_slices_of_a_split_may_be_used(tmp_path):
    rows = records(10)
    write(tmp_path, {"train": rows})
    decoded = load_prepared("tiny", tmp_path, train_split="train[:70%]", test_split="train[70%:]")
    np.testing.assert_array_equal(decoded["train_inputs"], [row.image for row in rows[:7]])
    np.testing.assert_array_equal(decoded["test_inputs"], [row.image for row in rows[7:]])


def test_images_of_differing_shapes_are_refused(tmp_path):
    rows = [*records(4), *records(1, (9, 5, 3))]
    with pytest.raises(FedLPError) as refusal:
        _load(tmp_path, {"train": rows, "test": records(1)})
    assert str(refusal.value).startswith(
        "The images of tiny train differ in shape (number 0 is (4, 5, 3), number 4 is (9, 5, 3))"
    )
    assert "from_arrays" in str(refusal.value)


def test_of_several_labels_one_is_named(tmp_path):
    splits = {"train": records(3), "test": records(2)}
    with pytest.raises(
        FedLPError, match=r"2 features of kind ClassLabel \(coarse, fine\), .*label="
    ):
        _load(tmp_path, splits, labels=("coarse", "fine"))
    fine = load_prepared("tiny", tmp_path, label="fine")
    assert fine["train_labels"].tolist() == [0, 1, 2]
    with pytest.raises(FedLPError, match="label='x' is not among them; choose one with label="):
        load_prepared("tiny", tmp_path, label="x")


def test_the_supervised_label_is_taken_of_several(tmp_path, monkeypatch):
    directory = write(
        tmp_path, {"train": records(3), "test": records(2)}, labels=("coarse", "fine")
    )
    info = json.loads((directory / "dataset_info.json").read_text())
    items = [{"featureKey": "image"}, {"featureKey": "fine"}]
    info["supervisedKeys"] = {"tuple": {"items": items}}
    (directory / "dataset_info.json").write_text(json.dumps(info))
    read = []
    whole = tfds._decode_split

    def decode_split(title, source, image, label, mode):
        read.append((image, label))
        return whole(title, source, image, label, mode)

    monkeypatch.setattr(tfds, "_decode_split", decode_split)
    load_prepared("tiny", tmp_path)
    assert read == [("image", "fine")] * 2


def test_a_set_without_labels_is_refused(tmp_path):
    with pytest.raises(FedLPError, match=r"0 features of kind ClassLabel \(none\)"):
        _load(tmp_path, {"train": records(3), "test": records(2)}, labels=())


def test_images_of_16_bits_are_refused(tmp_path):
    directory = write(tmp_path, {"train": records(3), "test": records(2)})
    file = directory / "features.json"
    file.write_text(file.read_text().replace("uint8", "uint16"))
    with pytest.raises(FedLPError, match="holds uint16 images .* pass the arrays to from_arrays"):
        load_prepared("tiny", tmp_path)


@pytest.mark.parametrize("splits", ["train[:", "train[:0%]"])
def test_a_slice_that_is_none_is_refused(tmp_path, splits):
    write(tmp_path, SPLITS)
    with pytest.raises(FedLPError, match="cannot be read from .* Check the splits train_split="):
        load_prepared("tiny", tmp_path, train_split=splits)


def test_nothing_imports_tensorflow(tmp_path):
    _load(tmp_path, {"train": records(3), "test": records(2)})
    assert "tensorflow" not in sys.modules


def test_progress_is_shown_on_a_terminal_only(tmp_path, capfd, monkeypatch):
    write(tmp_path, SPLITS)
    load_prepared("tiny", tmp_path)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    load_prepared("tiny", tmp_path, test_split="train")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Decoding tiny train" in captured.err


# --- which directory


def test_the_directory_comes_from_the_argument_then_the_environment_then_home(
    tmp_path, monkeypatch
):
    home, variable, argument = (tmp_path / name for name in ("home", "variable", "argument"))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    write(home / "tensorflow_datasets", SPLITS)
    assert _find("tiny").is_relative_to(home)
    write(variable, SPLITS)
    monkeypatch.setenv("TFDS_DATA_DIR", str(variable))
    assert _find("tiny").is_relative_to(variable)
    write(argument, SPLITS)
    assert _find("tiny", argument).is_relative_to(argument)


def test_the_newest_version_is_taken_unless_one_is_named(tmp_path):
    for version in ("1.9.0", "1.10.0", "1.2.0"):
        write(tmp_path, SPLITS, version=version)
    assert _find("tiny", tmp_path).name == "1.10.0"
    assert _find("tiny:1.2.0", tmp_path).name == "1.2.0"
    with pytest.raises(FedLPError, match="'tiny:3.0.0' is not .* has version 1.2.0, 1.9.0, 1.10.0"):
        _find("tiny:3.0.0", tmp_path)


def test_configurations(tmp_path):
    write(tmp_path, SPLITS, name="emnist", config="balanced")
    assert _find("emnist", tmp_path) == tmp_path / "emnist" / "balanced" / "1.0.0"
    write(tmp_path, SPLITS, name="emnist", config="letters")
    assert _find("emnist/letters", tmp_path) == tmp_path / "emnist" / "letters" / "1.0.0"
    assert _find("emnist/letters:1.0.0", tmp_path).name == "1.0.0"
    assert load_prepared("emnist/letters", tmp_path)["num_classes"] == 3
    with pytest.raises(FedLPError, match="2 configurations; choose .* emnist/balanced, emnist/let"):
        _find("emnist", tmp_path)
    with pytest.raises(FedLPError, match="did you mean 'emnist/letters'"):
        _find("emnist/leters", tmp_path)


def test_validation_stands_in_for_a_missing_test_split(tmp_path):
    decoded = _load(tmp_path, {"train": records(3), "validation": records(2)})
    assert len(decoded["test_labels"]) == 2


def test_splits_may_be_added_and_an_unused_one_may_be_missing(tmp_path):
    directory = write(
        tmp_path, {"train": records(4), "extra": records(2), "unlabelled": records(1)}
    )
    (directory / "tiny-unlabelled.array_record-00000-of-00001").unlink()
    decoded = load_prepared(
        "tiny", tmp_path, train_split="train[:50%]+extra", test_split="train[50%:]"
    )
    assert (len(decoded["train_labels"]), len(decoded["test_labels"])) == (4, 2)


def test_a_missing_set_names_the_two_commands_and_starts_no_download(tmp_path):
    write(tmp_path, SPLITS)
    with pytest.raises(FedLPError) as refusal:
        _find("cifar100", tmp_path)
    message = str(refusal.value)
    assert "`pip install tensorflow importlib_resources`" in message
    assert f"`tfds build cifar100 --file_format=array_record --data_dir={tmp_path}`" in message
    assert "holds tiny" in message
    assert "own (digits, synthetic)" in message
    assert [child.name for child in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("name", "near"), [("tinny", "tiny"), ("TINY", "tiny"), ("digts", "digits")]
)
def test_a_misspelt_name_is_answered_with_the_nearest(tmp_path, name, near):
    write(tmp_path, SPLITS)
    with pytest.raises(FedLPError, match=f"did you mean '{near}'"):
        _find(name, tmp_path)


def test_a_missing_directory_is_said_to_be_missing(tmp_path):
    with pytest.raises(FedLPError, match="which does not exist.*TFDS_DATA_DIR"):
        _find("cifar10", tmp_path / "nowhere")
    (tmp_path / "downloads" / "extracted").mkdir(parents=True)
    with pytest.raises(FedLPError, match="which holds no prepared set"):
        _find("downloads", tmp_path)


@pytest.mark.parametrize("name", ["../tiny", "/etc", "a b", "", "tiny:1", "tiny/../x", "data.csv"])
def test_what_is_no_name_is_refused(tmp_path, name):
    with pytest.raises(FedLPError, match="is not the name of a data set; expected .* an .npz file"):
        _find(name, tmp_path)


DAMAGE = {
    "a missing shard": lambda path: (path / "tiny-test.array_record-00000-of-00001").unlink(),
    "a shard cut short": lambda path: os.truncate(
        path / "tiny-train.array_record-00000-of-00001", 100
    ),
    "no features": lambda path: (path / "features.json").unlink(),
    "no information": lambda path: (path / "dataset_info.json").unlink(),
    "half a file": lambda path: (path / "dataset_info.json").write_text('{"na'),
    "another form": lambda path: (path / "dataset_info.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_half_prepared_set_is_refused(tmp_path, damage):
    damage(write(tmp_path, SPLITS))
    with pytest.raises(FedLPError, match="'tiny' cannot be read from .* again: .*`tfds build tiny"):
        load_prepared("tiny", tmp_path)


def test_an_unfinished_set_is_not_prepared(tmp_path):
    directory = write(tmp_path, SPLITS)
    directory.rename(directory.with_name("1.0.0.incomplete4XR1_tiny"))
    with pytest.raises(FedLPError, match="No data set 'tiny' is prepared"):
        _find("tiny", tmp_path)


def test_an_unknown_split_is_refused_with_those_there_are(tmp_path):
    write(tmp_path, SPLITS)
    with pytest.raises(FedLPError, match=r"Unknown split 'trian'.*\['train', 'test'\]"):
        load_prepared("tiny", tmp_path, train_split="trian")


def test_a_format_without_random_access_is_refused(tmp_path):
    directory = write(tmp_path, SPLITS, file_format="tfrecord")
    with pytest.raises(FedLPError) as refusal:
        load_prepared("tiny", tmp_path)
    assert "as tfrecord, which cannot be read without TensorFlow" in str(refusal.value)
    assert (
        f"`tfds convert_format --dataset_version_dir={directory} --out_file_format=array_record`"
    ) in str(refusal.value)


def test_a_converted_set_is_read_in_its_second_format(tmp_path):
    directory = write(tmp_path, SPLITS)
    file = directory / "dataset_info.json"
    info = json.loads(file.read_text())
    info |= {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    file.write_text(json.dumps(info))
    assert len(load_prepared("tiny", tmp_path)["train_labels"]) == 3
