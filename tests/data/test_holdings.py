from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest

from fedlp_jax.data.holdings import Partition, by_owner, by_size, class_labels
from fedlp_jax.errors import FedLPError

LABELS = np.array([0, 1, 2, 1, 0, 2])


def _partition() -> Partition:
    return Partition(np.array([4, 0, 1, 5, 3]), np.array([0, 2, 5]), LABELS, 3)


def test_a_partition_hands_out_the_rows_sizes_and_classes_of_its_clients():
    partition = _partition()
    assert partition.clients == 2
    assert partition.rows(0).tolist() == [4, 0]
    assert partition.rows(1).tolist() == [1, 5, 3]
    assert partition.sizes.tolist() == [2, 3]
    assert partition.histogram.tolist() == [[2, 0, 0], [0, 2, 1]]
    assert (partition.order.dtype, partition.offset.dtype) == (np.int32, np.int64)
    assert (partition.sizes.dtype, partition.histogram.dtype) == (np.int64, np.int64)


def test_a_class_that_nobody_holds_has_a_column():
    partition = Partition(np.array([0]), np.array([0, 1]), np.array([0, 1]), 5)
    assert partition.histogram.tolist() == [[1, 0, 0, 0, 0]]


def test_arrays_are_read_only_and_the_callers_stay_writable():
    labels = LABELS.astype(np.int32)
    partition = Partition(np.array([0], np.int32), np.array([0, 1]), labels, 3)
    with pytest.raises(ValueError, match="read-only"):
        partition.labels[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        partition.rows(0)[0] = 1
    labels[0] = 0


def test_the_hash_is_that_of_the_little_endian_bytes():
    parts = struct.pack("<3q5i6i", 0, 2, 5, 4, 0, 1, 5, 3, *LABELS)
    assert _partition().hash == hashlib.sha256(b"partition 2 3 " + parts).hexdigest()


def test_the_hash_sees_every_field():
    order, offset = np.array([4, 0, 1, 5, 3]), np.array([0, 2, 5])
    other = LABELS.copy()
    other[2] = 1  # a label of a row that nobody holds
    hashes = {
        Partition(order, offset, LABELS, 3).hash,
        Partition(order[::-1], offset, LABELS, 3).hash,
        Partition(order, np.array([0, 3, 5]), LABELS, 3).hash,
        Partition(order, offset, other, 3).hash,
        Partition(order, offset, LABELS, 4).hash,
    }
    assert len(hashes) == 5


def test_the_hash_does_not_depend_on_the_types_given():
    wide = Partition(np.array([4, 0], np.int64), [0, 1, 2], LABELS.astype(np.uint8), 3)
    narrow = Partition(np.array([4, 0], np.int16), [0, 1, 2], LABELS.astype(">i4"), 3)
    assert wide.hash == narrow.hash


def test_describe_says_what_there_is():
    assert _partition().describe() == (
        "2 clients with 5 examples of 3 classes; per client 2 to 3 examples (median 2.5) of 1 to 2 "
        "classes (median 1.5)"
    )
    assert repr(_partition()) == f"Partition({_partition().describe()})"


def test_by_owner_keeps_the_order_of_a_clients_rows():
    rows = np.array([5, 3, 1, 4], np.int32)
    partition = by_owner(rows, np.array([1, 0, 1, 0]), 2, class_labels(LABELS))
    assert partition.rows(0).tolist() == [3, 4]
    assert partition.rows(1).tolist() == [5, 1]


def test_by_size_cuts_the_rows_as_they_come():
    partition = by_size(np.array([5, 3, 1], np.int32), np.array([1, 2]), class_labels(LABELS))
    assert partition.rows(0).tolist() == [5]
    assert partition.rows(1).tolist() == [3, 1]
    assert partition.num_classes == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"order": [0, 6]}, r"order holds rows 0 to 6, outside the 6 labelled examples"),
        ({"order": [-1, 0]}, r"order holds rows -1 to 0, outside the 6"),
        ({"order": [0.0, 1.0]}, r"order must be a one-dimensional array of integers, got float64"),
        (
            {"order": [[0, 1]]},
            r"order must be a one-dimensional array of integers, got int64\[1, 2",
        ),
        (
            {"offset": [0, 1]},
            r"offset must go from 0 to the 2 rows .* got 2 entries, \[0\] to \[1\]",
        ),
        ({"offset": [1, 2]}, r"offset must go from 0"),
        ({"offset": [2]}, r"over at least one client"),
        ({"offset": [0, 2, 2]}, r"Client 1 holds 0 examples \(1 of 2 clients hold none\)"),
        ({"offset": [0, 2, 1, 2]}, r"Client 1 holds -1 examples"),
        ({"num_classes": 2}, r"label 2 is out of range for num_classes=2"),
        ({"labels": [0, -1]}, r"2 labels go from -1 to 0; expected class numbers from 0 up"),
        ({"labels": [0, 2**31]}, r"go from 0 to 2147483648"),
        ({"labels": []}, r"labels are empty"),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(fields, message):
    good = {"order": [0, 1], "offset": [0, 1, 2], "labels": LABELS, "num_classes": 3}
    Partition(**good)
    with pytest.raises(FedLPError, match=message):
        Partition(**(good | fields))


@pytest.mark.parametrize("client", [-1, 2])
def test_a_client_that_is_not_there_is_refused(client):
    with pytest.raises(FedLPError, match=f"no client {client}: they count from 0 to 1"):
        _partition().rows(client)
