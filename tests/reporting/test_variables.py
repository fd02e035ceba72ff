import jax
import numpy as np
import pytest

from fedlp_jax.errors import FedLPError
from fedlp_jax.reporting.variables import load_variables, save_variables

VARIABLES = {
    "params": {"fc1": {"kernel": np.float32([[1.5, -0.0]])}, "a": {"b": {"c": np.float32(3)}}},
    "batch_stats": {"norm": {"mean": np.float32([np.nan, np.inf])}},
}


def test_a_model_is_read_back_bit_for_bit(tmp_path):
    file = tmp_path / "variables.npz"
    save_variables(file, VARIABLES)
    with np.load(file) as stored:
        assert set(stored.files) == {"params/fc1/kernel", "params/a/b/c", "batch_stats/norm/mean"}
    for source in (tmp_path, str(tmp_path), file):
        found = load_variables(source)
        assert jax.tree.structure(found) == jax.tree.structure(VARIABLES)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(VARIABLES), strict=True):
            assert (one.dtype, one.tobytes()) == (other.dtype, other.tobytes())


def test_a_model_that_is_not_there_is_said_so(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "variables.npz"):
        with pytest.raises(FedLPError, match="there is no file .*; a run writes it when it ends"):
            load_variables(path)


def test_a_damaged_model_is_refused(tmp_path):
    file = tmp_path / "variables.npz"
    save_variables(file, VARIABLES)
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[: len(whole) * i // 10] for i in range(10)] + [b"", b"text", b"PK\x03\x04"]
    for _ in range(200):
        copy = bytearray(whole)
        copy[rng.integers(len(copy))] ^= 1 << rng.integers(8)
        damaged.append(bytes(copy))
    refused = 0
    for data in damaged:
        file.write_bytes(data)
        try:
            load_variables(file)  # some bits of an archive mean nothing
        except FedLPError as error:
            refused += 1
            assert f"{file} " in str(error)
    assert refused > 100


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"x_train": np.zeros(3)},
        {"params/w": np.arange(3)},
        {"params": np.zeros(3)},
        {"params/w": np.array([None])},
    ],
)
def test_another_archive_is_no_model(tmp_path, arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(FedLPError, match=r"x\.npz (holds .*params/fc1/kernel|cannot be read)"):
        load_variables(tmp_path / "x.npz")
