import numpy as np
import pytest
import small

import fedlp_jax as fl
from fedlp_jax.errors import FedLPError
from fedlp_jax.simulation.validation import check_partition


def test_a_partition_of_other_labels_is_refused():
    data = small.dataset()
    labels = data.train.labels
    check_partition(fl.partition.iid(labels, clients=3), data)
    with pytest.raises(FedLPError, match=r"was made for 5 examples but the training split"):
        check_partition(fl.partition.iid(labels[:5], clients=3), data)
    other = np.where(np.arange(len(labels)) < 2, (labels + 1) % 3, labels)
    by_other = fl.partition.iid(other, clients=3)
    with pytest.raises(
        FedLPError, match=r"from other labels: 2 of .* pass fl\.Partition\(p\.order"
    ):
        check_partition(by_other, data)
    check_partition(fl.Partition(by_other.order, by_other.offset, labels, data.num_classes), data)
