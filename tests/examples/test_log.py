"""A log: every round as a line of a CSV file, from `simulate(log=...)`."""

import csv

import optax
from small import dataset

import fedlp_jax as fl


class CSVLog:
    """Writes some keys of every row; a row without a key leaves its cell empty."""

    def __init__(self, path, keys):
        self.file = open(path, "w", newline="")  # noqa: SIM115
        self.writer = csv.DictWriter(self.file, keys, extrasaction="ignore")
        self.writer.writeheader()

    def __call__(self, row):
        self.writer.writerow(row)
        self.file.flush()  # a killed run keeps its lines

    def close(self):
        self.file.close()


def test_rounds_are_lines(tmp_path):
    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=4)
    task = fl.classification(fl.models.Logistic(num_classes=3))
    algorithm = fl.fedavg(task, client_optimizer=optax.sgd(0.1))
    log = CSVLog(tmp_path / "log.csv", ["round", "train_loss", "test_accuracy"])
    result = fl.simulate(algorithm, data, clients, rounds=3, cohort=4, eval_every=3, log=log)
    log.close()
    lines = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [line["round"] for line in lines] == ["1", "2", "3"]
    assert [line["test_accuracy"] for line in lines[:2]] == ["", ""]
    assert float(lines[2]["test_accuracy"]) == result.history["test_accuracy"][-1]
