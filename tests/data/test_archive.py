import warnings

import numpy as np
import pytest

from fedlp_jax.data import archive
from fedlp_jax.data.archive import read_npz
from fedlp_jax.errors import FedLPError

ARRAYS = {
    "a": np.arange(6.0).reshape(2, 3),
    "b/c": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "scalar": np.float32(3),
    "none": np.zeros((0, 4), np.uint8),
}


def everything(names):
    return names


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_back(tmp_path, save):
    save(tmp_path / "a.npz", **ARRAYS)
    found = read_npz(tmp_path / "a.npz", everything)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_only_what_is_chosen_is_unpacked(tmp_path):
    np.savez(tmp_path / "a.npz", **ARRAYS, objects=np.array([None]))
    assert list(read_npz(tmp_path / "a.npz", lambda names: ["a"])) == ["a"]
    with pytest.raises(FedLPError, match="'objects' holds Python objects, .* a pickle can run any"):
        read_npz(tmp_path / "a.npz", everything)


def test_more_than_half_of_the_memory_is_refused(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", **ARRAYS)
    monkeypatch.setattr(archive, "usable_memory", lambda: 99)
    with pytest.raises(FedLPError, match=r"a.npz unpacks to 100 bytes, and this machine has 99 to"):
        read_npz(tmp_path / "a.npz", everything)


def test_two_arrays_of_one_name_are_refused(tmp_path):
    import zipfile

    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.npz", "w") as new:
        warnings.simplefilter("ignore")
        new.writestr("a.npy", b"1")
        new.writestr("a.npy", b"2")
    with pytest.raises(ValueError, match="two arrays of one name"):
        read_npz(tmp_path / "a.npz", everything)
