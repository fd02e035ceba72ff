import os

import pytest

from fedlp_jax.data.files import open_plain, read_plain, replacing
from fedlp_jax.errors import why


def test_a_plain_file_is_read_up_to_the_limit(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    assert read_plain(file, 5) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes, and at most 4 are read"):
        read_plain(file, 4)


def test_what_has_no_end_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(OSError, match="it is a pipe or a device, not a file"):
            open_plain(path)
    with pytest.raises(IsADirectoryError):
        read_plain(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_plain(tmp_path / "nobody")


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"old")
    (tmp_path / "other").write_bytes(b"mine")
    part = tmp_path / f".a.{os.getpid()}"
    part.symlink_to(tmp_path / "other")  # nothing is written through it
    with pytest.raises(KeyError), replacing(file) as new:
        new.write(b"half")
        raise KeyError
    assert file.read_bytes() == b"old"
    with replacing(file) as new:
        new.write(b"new")
    assert file.read_bytes() == b"new"
    assert (tmp_path / "other").read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["a", "other"]


def test_processes_may_replace_a_file_at_once(tmp_path, monkeypatch):
    file = tmp_path / "a"
    with replacing(file) as ours:
        ours.write(b"ours")
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 0)
            with replacing(file) as theirs:
                theirs.write(b"theirs")
        assert file.read_bytes() == b"theirs"
    assert file.read_bytes() == b"ours" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "/somewhere"), "No space left on device"),
        (ValueError("two\n  lines."), "two lines"),
        (KeyError("round"), "it has no 'round'"),
        (KeyError("a whole sentence."), "a whole sentence"),
        (ValueError("<object at 0x7f12>"), "<object>"),
        (ValueError(), "ValueError"),
        (ValueError("x" * 999), "x" * 200),
    ],
)
def test_an_error_is_part_of_a_sentence(error, said):
    assert why(error) == said
