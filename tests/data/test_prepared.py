from __future__ import annotations

import json
import shutil

import pytest
from prepared_set import records, write

from fedlp_jax.data.prepared import find
from fedlp_jax.errors import FedLPError

SPLITS = {"train": records(3), "test": records(2)}


def test_a_prepared_set_is_found(tmp_path):
    directory = write(tmp_path, SPLITS)
    found = find("tiny", tmp_path)
    assert (found.name, found.version, found.directory) == ("tiny", "1.0.0", directory)
    assert (found.train_split, found.test_split) == ("train", "test")
    assert sorted(found.files) == sorted(directory.iterdir())


def test_the_directory_comes_from_the_argument_then_the_environment_then_home(
    tmp_path, monkeypatch
):
    home, named, given = (tmp_path / name for name in ("home", "named", "given"))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    write(home / "tensorflow_datasets", SPLITS)
    assert find("tiny").directory.is_relative_to(home)
    write(named, SPLITS)
    monkeypatch.setenv("TFDS_DATA_DIR", str(named))
    assert find("tiny").directory.is_relative_to(named)
    write(given, SPLITS)
    assert find("tiny", given).directory.is_relative_to(given)


def test_the_newest_version_is_taken_unless_one_is_named(tmp_path):
    for version in ("1.9.0", "1.10.0", "1.2.0"):
        write(tmp_path, SPLITS, version=version)
    assert find("tiny", tmp_path).version == "1.10.0"
    assert find("tiny:1.2.0", tmp_path).version == "1.2.0"
    with pytest.raises(FedLPError, match="'tiny:3.0.0' is not .* has version 1.2.0, 1.9.0, 1.10.0"):
        find("tiny:3.0.0", tmp_path)


def test_configurations(tmp_path):
    write(tmp_path, SPLITS, name="emnist", config="balanced")
    assert find("emnist", tmp_path).directory == tmp_path / "emnist" / "balanced" / "1.0.0"
    write(tmp_path, SPLITS, name="emnist", config="letters")
    assert find("emnist/letters", tmp_path).directory == tmp_path / "emnist" / "letters" / "1.0.0"
    assert find("emnist/letters:1.0.0", tmp_path).version == "1.0.0"
    with pytest.raises(
        FedLPError, match=r"2 configurations \(balanced, letters\); .*'emnist/balan"
    ):
        find("emnist", tmp_path)
    with pytest.raises(FedLPError, match="'emnist' is not .* did you mean 'emnist/letters'"):
        find("emnist/leters", tmp_path)


def test_validation_stands_in_for_a_missing_test_split(tmp_path):
    write(tmp_path, {"train": records(3), "validation": records(2)})
    assert find("tiny", tmp_path).test_split == "validation"


def test_splits_may_be_sliced_and_added(tmp_path):
    write(tmp_path, {"train": records(3), "extra": records(2)})
    found = find("tiny", tmp_path, train_split="train[:50%] + extra", test_split="train[50%:]")
    assert found.train_split == "train[:50%] + extra"
    assert sum("array_record" in file.name for file in found.files) == 2
    with pytest.raises(
        FedLPError, match="no split 'validation'.* has: train, extra. .*test_split="
    ):
        find("tiny", tmp_path)
    with pytest.raises(FedLPError, match=r"no split 'trian'; did you mean 'train'\? It has: "):
        find("tiny", tmp_path, train_split="trian[:10]", test_split="extra")


def test_an_unused_split_may_be_missing(tmp_path):
    directory = write(tmp_path, {**SPLITS, "unlabelled": records(4)})
    (directory / "tiny-unlabelled.array_record-00000-of-00001").unlink()
    assert len(find("tiny", tmp_path).files) == 4


def test_shards_are_named_by_the_sets_own_template(tmp_path):
    directory = write(tmp_path, SPLITS)
    info = json.loads((directory / "dataset_info.json").read_text())
    template = "{SPLIT}/{SHARD_INDEX}-{NUM_SHARDS}.{FILEFORMAT}"
    info["splits"][0] |= {"filepathTemplate": template, "shardLengths": ["2", "0", "1"]}
    (directory / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(
        FedLPError, match="lacks 2 of 3 files, train/00000-00003.array_record among"
    ):
        find("tiny", tmp_path)


def test_a_missing_set_names_the_two_commands_and_starts_no_download(tmp_path):
    write(tmp_path, SPLITS)
    with pytest.raises(FedLPError) as refusal:
        find("cifar100", tmp_path, own_names=("digits",))
    message = str(refusal.value)
    assert "`pip install tensorflow importlib_resources`" in message
    assert f"`tfds build cifar100 --file_format=array_record --data_dir={tmp_path}`" in message
    assert "holds tiny" in message
    assert "own (digits)" in message
    assert [child.name for child in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("name", "near"), [("tinny", "tiny"), ("TINY", "tiny"), ("digts", "digits")]
)
def test_a_misspelt_name_is_answered_with_the_nearest(tmp_path, name, near):
    write(tmp_path, SPLITS)
    with pytest.raises(FedLPError, match=f"did you mean '{near}'"):
        find(name, tmp_path, own_names=("digits", "synthetic"))


def test_a_missing_directory_is_said_to_be_missing(tmp_path):
    with pytest.raises(FedLPError, match="no such directory.*TFDS_DATA_DIR"):
        find("cifar10", tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../tiny", "/etc", "a b", "", "tiny:1", "tiny/../x", "data.csv"])
def test_what_is_no_name_is_refused(tmp_path, name):
    with pytest.raises(FedLPError, match="is not the name of a data set; expected .* an .npz file"):
        find(name, tmp_path)


def _without(file):
    return lambda directory: (directory / file).unlink()


def _unfinished(directory):
    directory.rename(directory.with_name("1.0.0.incomplete4XR1_tiny"))


HALF = {
    "a shard": (_without("tiny-test.array_record-00000-of-00001"), "lacks 1 of 2 files, tiny-test"),
    "features": (_without("features.json"), r"features.json cannot be read \(FileNotFound"),
    "information": (_without("dataset_info.json"), "dataset_info.json cannot be read"),
    "half a file": (
        lambda directory: (directory / "dataset_info.json").write_text('{"na'),
        r"dataset_info.json cannot be read \(JSONDecodeError",
    ),
    "the end": (_unfinished, "1.0.0.incomplete4XR1_tiny was never finished"),
}


@pytest.mark.parametrize(("damage", "message"), HALF.values(), ids=HALF)
def test_a_half_prepared_set_is_refused(tmp_path, damage, message):
    damage(write(tmp_path, SPLITS))
    with pytest.raises(FedLPError, match=f"only half prepared: .*{message}.*`tfds build tiny "):
        find("tiny", tmp_path)


def test_a_half_prepared_configuration_is_refused(tmp_path):
    _unfinished(write(tmp_path, SPLITS, name="emnist", config="letters"))
    for name in ("emnist", "emnist/letters"):
        with pytest.raises(FedLPError, match="only half prepared"):
            find(name, tmp_path)


def test_a_format_without_random_access_is_refused(tmp_path):
    directory = write(tmp_path, SPLITS, file_format="tfrecord")
    with pytest.raises(FedLPError) as refusal:
        find("tiny", tmp_path)
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
    assert find("tiny", tmp_path).version == "1.0.0"


def test_a_directory_that_is_no_data_set_is_not_one(tmp_path):
    (tmp_path / "downloads" / "extracted").mkdir(parents=True)
    with pytest.raises(FedLPError, match="which holds no prepared set"):
        find("downloads", tmp_path)
    shutil.rmtree(tmp_path / "downloads")


@pytest.mark.parametrize("template", ["../../x-{SHARD_INDEX}", "/etc/passwd", "a\0b", "a/../../b"])
def test_a_shard_outside_its_folder_is_refused(tmp_path, template):
    directory = write(tmp_path, SPLITS)
    info = json.loads((directory / "dataset_info.json").read_text())
    info["splits"][0]["filepathTemplate"] = template
    (directory / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(FedLPError, match="which leads out of its folder"):
        find("tiny", tmp_path)


@pytest.mark.parametrize(
    "content",
    ["[1]", "3", "{", "[" * 100_000, '{"splits": 3}', '{"splits": [{"name": []}, 1]}'],
    ids=["list", "number", "broken", "deep", "splits", "names"],
)
def test_a_description_of_another_form_is_refused(tmp_path, content):
    directory = write(tmp_path, SPLITS)
    (directory / "dataset_info.json").write_text(content)
    with pytest.raises(FedLPError, match=r"half prepared: .*dataset_info.json cannot be read"):
        find("tiny", tmp_path)
