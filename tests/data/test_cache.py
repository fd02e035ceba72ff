from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from fedlp_jax.data import cache


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _decoded(offset: int = 0) -> cache.Decoded:
    inputs = (np.arange(2 * 3 * 3 * 1).reshape(2, 3, 3, 1) + offset).astype(np.uint8)
    labels = np.array([0, 1], np.int32)
    return cache.Decoded(inputs, labels, inputs[:1], labels[:1], 7)


def _never() -> cache.Decoded:
    raise AssertionError("decoded although the entry is good")


def _assert_same(found: cache.Decoded, expected: cache.Decoded) -> None:
    assert found.num_classes == expected.num_classes
    for one, other in zip(found[:4], expected[:4], strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_the_second_time_nothing_is_decoded(root):
    _assert_same(cache.remember("set", _decoded), _decoded())
    found = cache.remember("set", _never)
    _assert_same(found, _decoded())
    assert isinstance(found.train_inputs.base, np.memmap)
    assert not found.train_inputs.flags.writeable
    assert [child.name for child in root.iterdir()] == ["set"]


def _flip_a_bit(entry: Path) -> None:
    file = entry / "test_inputs.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 4
    file.write_bytes(data)


DAMAGE = {
    "a flipped bit": _flip_a_bit,
    "a file cut short": lambda entry: os.truncate(entry / "train_inputs.npy", 130),
    "an empty file": lambda entry: os.truncate(entry / "train_labels.npy", 0),
    "a missing file": lambda entry: (entry / "train_labels.npy").unlink(),
    "a missing index": lambda entry: (entry / "index.json").unlink(),
    "an index that is no JSON": lambda entry: (entry / "index.json").write_text("{"),
    "an index of another kind": lambda entry: (entry / "index.json").write_text("[]"),
    "an index without checksums": lambda entry: (entry / "index.json").write_text("{}"),
    "a pickle": lambda entry: np.save(entry / "train_labels.npy", np.array([None])),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_replaced(damage, root):
    cache.remember("set", _decoded)
    damage(root / "set")
    _assert_same(cache.remember("set", lambda: _decoded(1)), _decoded(1))
    _assert_same(cache.remember("set", _never), _decoded(1))
    assert [child.name for child in root.iterdir()] == ["set"]


def test_two_at_once_do_no_harm(root):
    both_decode = threading.Barrier(2)
    found = []

    def decode() -> cache.Decoded:
        both_decode.wait(10)
        return _decoded()

    threads = [
        threading.Thread(target=lambda: found.append(cache.remember("set", decode)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    for one in (*found, cache.remember("set", _never)):
        _assert_same(one, _decoded())
    assert [child.name for child in root.iterdir()] == ["set"]


def test_a_cache_that_cannot_be_written_only_warns(root, monkeypatch):
    root.parent.joinpath("file").write_text("")
    monkeypatch.setenv("FEDLP_CACHE_DIR", str(root.parent / "file"))
    with pytest.warns(UserWarning, match="could not be stored under .*file.* set FEDLP_CACHE_DIR"):
        _assert_same(cache.remember("set", _decoded), _decoded())


def test_a_full_disk_leaves_nothing_behind(root, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        cache.remember("set", _decoded)
    assert list(root.iterdir()) == []


def test_a_decoder_that_fails_leaves_nothing_behind(root):
    with pytest.raises(AssertionError):
        cache.remember("set", _never)
    assert not root.exists()


def test_the_digest_follows_the_files_and_the_choices(tmp_path):
    def digest(*choices: str | None) -> str:
        return cache.digest([tmp_path / "a", tmp_path / "b"], *choices)

    for name in "ab":
        (tmp_path / name).write_text("x")
    first = digest("train", None)
    assert digest("train", None) == first
    assert cache.digest([tmp_path / "b", tmp_path / "a"], "train", None) == first
    seen = {first, digest("test", None), digest("train", "label")}
    os.utime(tmp_path / "b", ns=(1, 1))
    seen.add(digest("train", None))
    (tmp_path / "b").write_text("xy")
    os.utime(tmp_path / "b", ns=(1, 1))
    seen.add(digest("train", None))
    (tmp_path / "moved").mkdir()
    (tmp_path / "a").rename(tmp_path / "moved" / "a")
    seen.add(cache.digest([tmp_path / "moved" / "a", tmp_path / "b"], "train", None))
    assert len(seen) == 6


def test_the_digest_sees_through_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert cache.digest([tmp_path / "real" / "a"]) == cache.digest([tmp_path / "link" / "a"])


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FEDLP_CACHE_DIR": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/fedlp_jax"),
        ({"FEDLP_CACHE_DIR": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/fedlp_jax"),
    ],
)
def test_where_the_cache_is(variables, expected, monkeypatch):
    for name in ("FEDLP_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.root() == Path(expected)
