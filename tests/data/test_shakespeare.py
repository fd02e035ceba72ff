"""Shakespeare: windows, clients and the test split, from a file of the same form."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

import fedlp_jax as fl

FOLDER = os.environ.get("SHAKESPEARE_DIR", "")
# Joined by line ends: 25, 41 and 3 characters.
ROLES = {
    "hamlet::OPHELIA": ["abcdefghijkl", "mnopqrstuvwx"],
    "hamlet::HAMLET": ["to be, or not to be:" * 2 + "!"],
    "hamlet::All": ["Oh!"],
}


@pytest.fixture
def folder(tmp_path):
    def write(content):
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / "roles.json.gz").write_bytes(gzip.compress(raw))
        return tmp_path

    return write


def text(data, tokens):
    return "".join(("_" + data.characters)[t] for t in np.ravel(tokens))


def test_windows_of_a_role_do_not_overlap_and_predict_the_next_character(folder):
    data = fl.load("shakespeare", folder(ROLES), length=4, min_windows=6)
    assert data.roles == ("hamlet::HAMLET", "hamlet::OPHELIA")
    assert data.short_roles == 1
    used = {c for speeches in ROLES.values() for c in "\n".join(speeches)}
    assert (data.characters, data.num_classes) == ("".join(sorted(used)), 1 + len(used))
    inputs, targets = data.train
    assert inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    # 40 targets of Hamlet are ten windows, and the last one is tested on; Ophelia's 24 are six.
    assert data.client.tolist() == [0] * 9 + [1] * 6
    hamlet, test = targets[:9], data.test.labels
    assert (
        text(data, inputs[0, :1]) + text(data, hamlet) + text(data, test)
        == (ROLES["hamlet::HAMLET"][0])
    )
    assert text(data, targets[9:]) == "\n".join(ROLES["hamlet::OPHELIA"])[1:]
    assert "2 roles; 1 roles with too little text are left out" in repr(data)


def test_the_last_window_ends_in_padding(folder):
    data = fl.load("shakespeare", folder({"a": ["x" * 47]}), length=5, min_windows=1)
    assert text(data, data.test.inputs) == "xx___"
    assert text(data, data.test.labels) == "x____"
    assert (data.train.inputs == 1).all()


def test_a_role_is_a_client(folder):
    data = fl.load("shakespeare", folder(ROLES), length=4, min_windows=6)
    clients = fl.partition.natural(data.train.labels, clients=data.client)
    assert clients.sizes.tolist() == [9, 6]
    assert data.client.dtype == data.test_client.dtype == np.int64
    assert data.test_client.tolist() == [0]


def test_the_directory_may_be_named_by_the_environment(folder, monkeypatch):
    monkeypatch.setenv("SHAKESPEARE_DIR", str(folder(ROLES)))
    assert len(fl.load("shakespeare", length=2).roles) == 2


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"[]", {}, r"roles.json.gz holds \[\]; expected {role: \[speech"),
        (b"{", {}, "cannot be read as gzipped JSON"),
        (b"\xff", {}, "cannot be read as gzipped JSON"),
        (b"[" * 100_000, {}, "cannot be read as gzipped JSON"),
        ({"a": "b"}, {}, r"the role 'a' has 'b'; expected a list of texts"),
        ({"a": [1]}, {}, r"the role 'a' has \[1\]; expected a list"),
        ({"a": []}, {}, "none of the 1 roles has min_windows=10 windows of length=80; .* has 0"),
        (ROLES, {}, "none of the 3 roles has min_windows=10 .* the longest has 1. Lower"),
        (ROLES, {"length": 8, "min_windows": 1}, "no role has the ten windows of length=8"),
        (ROLES, {"length": 0}, "length=0 must be a whole number in"),
        (ROLES, {"min_windows": 0}, "min_windows=0 must be a whole number of at least 1"),
        (ROLES, {"lenght": 8}, "has no option 'lenght'; did you mean 'length'"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(folder, content, options, message):
    with pytest.raises(fl.FedLPError, match=message):
        fl.load("shakespeare", folder(content), **options)


def test_a_missing_or_broken_file_is_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("SHAKESPEARE_DIR", raising=False)
    with pytest.raises(fl.FedLPError, match=r"has to be given: data_dir or \$SHAKESPEARE_DIR"):
        fl.load("shakespeare")
    with pytest.raises(fl.FedLPError, match=r"there is no .*nowhere/roles.json.gz; data_dir or"):
        fl.load("shakespeare", tmp_path / "nowhere")
    whole = gzip.compress(json.dumps(ROLES).encode())
    for content in (b"plain", whole[:-20], whole[:40] + b"\0" * 9 + whole[49:]):
        (tmp_path / "roles.json.gz").write_bytes(content)
        with pytest.raises(fl.FedLPError, match="cannot be read as gzipped JSON"):
            fl.load("shakespeare", tmp_path)


def test_a_file_that_unpacks_to_too_much_is_refused(folder, monkeypatch):
    from fedlp_jax.data import shakespeare

    monkeypatch.setattr(shakespeare, "_LIMIT", 50)
    with pytest.raises(fl.FedLPError, match="unpacks to more than 50 bytes"):
        fl.load("shakespeare", folder(ROLES))


@pytest.mark.real_data
@pytest.mark.skipif(not FOLDER, reason="SHAKESPEARE_DIR does not name the directory of the plays")
def test_the_real_plays():
    data = fl.load("shakespeare", Path(FOLDER))
    assert len(data.roles) + data.short_roles == 1346
    assert data.num_classes == 77
    sizes = np.bincount(data.client)
    assert sizes.min() == 9  # of ten windows, one is tested on
    for split in (data.train, data.test):
        np.testing.assert_array_equal(split.inputs[:, 1:], split.labels[:, :-1])
        assert (split.inputs[:, 0] > 0).all()
