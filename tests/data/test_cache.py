from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from fedlp_jax.data import cache


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


NAMES = ("inputs", "labels", "num_classes")


def _decode(offset: int = 0) -> dict[str, np.ndarray]:
    inputs = (np.arange(18).reshape(2, 3, 3, 1) + offset).astype(np.uint8)
    return {"inputs": inputs, "labels": np.array([0, 1], np.int32), "num_classes": np.asarray(7)}


def _never() -> dict[str, np.ndarray]:
    raise AssertionError("decoded although the entry is good")


def _cached(decode=_never) -> dict[str, np.ndarray]:
    return cache.cached("set", NAMES, decode)


def _assert_same(arrays, expected) -> None:
    assert list(arrays) == list(expected)
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name])


def test_the_second_time_nothing_is_decoded(root):
    _assert_same(_cached(_decode), _decode())
    arrays = _cached()
    _assert_same(arrays, _decode())
    assert isinstance(arrays["inputs"].base, np.memmap)
    assert not arrays["inputs"].flags.writeable
    assert [child.name for child in root.iterdir()] == ["set"]


DAMAGE = {
    "a file cut short": lambda entry: os.truncate(entry / "inputs.npy", 130),
    "an empty file": lambda entry: os.truncate(entry / "labels.npy", 0),
    "a missing file": lambda entry: (entry / "labels.npy").unlink(),
    "a pickle": lambda entry: np.save(entry / "labels.npy", np.array([None])),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_replaced(damage, root):
    _cached(_decode)
    damage(root / "set")
    _assert_same(_cached(lambda: _decode(1)), _decode(1))
    _assert_same(_cached(), _decode(1))
    assert [child.name for child in root.iterdir()] == ["set"]


def test_two_at_once_do_no_harm(root):
    both_decode = threading.Barrier(2)
    results = []

    def decode() -> dict[str, np.ndarray]:
        both_decode.wait(10)
        return _decode()

    threads = [threading.Thread(target=lambda: results.append(_cached(decode))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for arrays in (*results, _cached()):
        _assert_same(arrays, _decode())
    assert [child.name for child in root.iterdir()] == ["set"]


def test_another_process_may_be_faster(root, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
    cache._store(root / "set", _decode())
    cache._store(root / "set", _decode(1))
    _assert_same(_cached(), _decode())


def test_a_cache_that_cannot_be_written_only_warns(root, monkeypatch):
    root.parent.joinpath("file").write_text("")
    monkeypatch.setenv("FEDLP_CACHE_DIR", str(root.parent / "file"))
    with pytest.warns(UserWarning, match="could not be cached .*file.* set FEDLP_CACHE_DIR"):
        _assert_same(_cached(_decode), _decode())
    monkeypatch.setenv("FEDLP_CACHE_DIR", "~nobody-at-all/x")
    with pytest.warns(UserWarning, match="could not be cached"):
        _assert_same(_cached(_decode), _decode())


def test_a_full_disk_leaves_nothing_behind(root, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        _cached(_decode)
    assert list(root.iterdir()) == []


def test_a_decoder_that_fails_leaves_nothing_behind(root):
    with pytest.raises(AssertionError):
        _cached(_never)
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
    assert cache.cache_dir() == Path(expected)
