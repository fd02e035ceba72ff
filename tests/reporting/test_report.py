"""A report is one file with everything that runs left, and needs nothing from elsewhere."""

import json
import re
import sys

import numpy as np
import optax
import pytest
import typer.testing
import yaml
from small import DIGITS, Steps, dataset

import fedlp_jax as fl
from fedlp_jax import cli
from fedlp_jax.config.experiment import run
from fedlp_jax.reporting import charts
from fedlp_jax.reporting.report import _latest


def rows(*accuracies):
    return [
        {"round": i, "test_accuracy": a, "train_loss": 1 / i, "upload_bytes": 10**6}
        for i, a in enumerate(accuracies, start=1)
    ]


def without_library(path):
    page = path.read_text()
    assert page.count(charts.library()) == 1
    return page.replace(charts.library(), "")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds with half of the uploads, and one with all."""
    made = []
    for keep, seed in [(0.5, 0), (0.5, 1), (1.0, 0)]:
        algorithm = DIGITS["algorithm"] | {"name": "fedlp_homo", "keep": keep}
        config = DIGITS | {"name": "<b>&", "algorithm": algorithm, "seed": seed, "rounds": 3}
        folder = tmp_path_factory.mktemp("runs") / f"{keep}-{seed}"
        run(config | {"eval_every": 1}, out=folder)
        made.append(folder)
    return made


def test_a_page_has_every_part_and_no_address(runs, tmp_path):
    out = tmp_path / "made/report.html"
    words = ["report", *map(str, runs), "--target", "0.01", "--title", "Two <rates>"]
    said = typer.testing.CliRunner().invoke(cli.app, [*words, "--out", str(out)])
    assert said.exit_code == 0, said.output
    page = without_library(out)
    assert not re.findall(r"(?:https?:)?//[a-z]", page)
    assert "<title>Two &lt;rates&gt;</title>" in page and "3 runs of 2 experiments" in page
    for section in (
        "Summary", "Learning curves", "Test accuracy against cost", "Layers kept by round",
        "Cost of each layer", "Fairness over clients", "Partition", "Settings", "Warnings",
    ):  # fmt: skip
        assert f"<h2>{section}</h2>" in page
    assert "&lt;b&gt;&amp; (keep=0.5)" in page and "<b>& " not in page  # a hostile name
    assert "upload to 0.01 [MB]" in page and "learning_rate: 0.1" in page
    assert len(re.findall(r'<div id="kept-\d"', page)) == 1
    assert "Every client sent every layer, in every round: &lt;b&gt;&amp; (keep=1.0)." in page
    assert len(re.findall(r'<div id="layers-\d"', page)) == 2  # bytes and MACs
    assert "<td>650</td><td>640</td>" in page and "forward pass of an example [MAC]" in page
    assert len(re.findall(r'<div id="partition-\d"', page)) == 2  # equal ones once
    assert "uploaded so far [MB]" in page and "measured time so far [s]" in page
    assert "modelled time" not in re.sub(r"<p class=note>.*?</p>", "", page)


def test_results_and_rows_are_reported_without_what_they_lack(tmp_path):
    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=4)
    task = fl.classification(Steps(depth=1))
    algorithm = fl.fedavg(task, client_optimizer=optax.sgd(0.1), batch_size=8)
    result = fl.simulate(algorithm, data, clients, rounds=2, cohort=2)
    page = without_library(fl.report({"a": [result], "b": rows(0.1, 0.2)}, tmp_path / "r.html"))
    assert "Upload of each layer" in page and "MACs of an example" not in page  # no task, no count
    assert "<h2>Layers kept by round</h2>" in page and "Sizes of all 4 clients of a" in page
    assert "No configuration is known." in page
    page = without_library(fl.report({"b": rows(0.1, 0.2)}, tmp_path / "r.html"))
    assert "<h2>Layers kept by round</h2>" not in page and "<h2>Partition</h2>" not in page


def test_curves_are_of_every_metric_of_the_task_and_of_no_cost(tmp_path):
    row = {"round": 1, "upload_bytes": 1, "train_macs": 5, "test_accuracy_depth_1": 0.5}
    row |= {"test_accuracy_personal": 0.5, "train_absolute_error": 1.0, "test_loss": None}
    page = without_library(fl.report({"a": [row]}, tmp_path / "r.html"))
    assert re.findall(r"<figcaption>(.*?) by round", page) == [
        "Test accuracy personal",
        "Train absolute error",
    ]


def test_a_run_that_has_not_ended_says_so(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"name": "part"}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(0.5)))
    page = without_library(fl.report([tmp_path], tmp_path / "r.html"))
    assert "the run has not ended (there is no summary)" in page


def test_marks_differ_in_more_than_colour():
    marks = charts.marks(list(map(str, range(35)))).values()
    assert len(set(marks)) == len({(m.colour, m.dash) for m in marks}) == 35
    assert len({(m.colour, m.pattern) for m in marks}) == 35
    first = list(marks)[:5]
    assert len({m.dash for m in first}) == len({m.marker for m in first}) == 5
    assert all(mark.colour != "#000000" for mark in marks)


def test_shares_of_senders_are_of_the_clients_that_arrived():
    clients = {
        "layers": np.array(["fc1", "fc2"]),
        "round": np.array([1, 1, 1, 3]),
        "outcome": np.array(["arrived", "arrived", "late", "arrived"]),
        "kept": np.array([[1, 0], [1, 1], [0, 0], [0, 1]], bool),
    }
    (heat,) = charts.kept([clients]).data
    np.testing.assert_array_equal(heat.z, [[100, np.nan, 0], [50, np.nan, 100]])
    assert heat.x.tolist() == [1, 2, 3]
    longer = clients | {"round": np.array([1, 2, 401, 802])}
    (heat,) = charts.kept([longer]).data
    assert heat.z.shape == (2, 268) and heat.x[0] == 2  # three rounds a column


def test_fairness_is_of_the_second_half_of_the_rounds():
    clients = {
        "round": np.array([1, 2, 3, 4, 4]),
        "client": np.array([0, 1, 2, 1, 3]),
        "accuracy": np.array([0.1, 0.2, 0.3, np.nan, 0.5]),
    }
    assert _latest(clients, "accuracy").tolist() == [0.3, 0.5]
    values = {"a": [np.array([0.0, 0.5, 1.0]), np.array([0.5, 0.5, 1.0])]}
    _, line = charts.over_clients(values, "accuracy", charts.marks(["a"])).data
    assert line.y[[0, 10, 20]].tolist() == [25, 50, 100] and line.x[10] == 50
    assert line.customdata[0, 1] == pytest.approx(100 * 0.125**0.5)


def test_long_names_keep_what_tells_them_apart():
    blocks = [f"encoder/stack/block_{i}/attention/kernel" for i in range(3)]
    assert charts.short_names([*blocks, "head"]) == [
        *(f"…/block_{i}/attenti…" for i in range(3)), "head",
    ]  # fmt: skip
    assert charts.short_names(["a" * 18, "b" * 19]) == ["a" * 18, "b" * 17 + "…"]


def test_sizes_are_counted_once(tmp_path):
    for sizes in ([3, 3, 4], [1, 5, 900], np.arange(1, 500)):
        (bars,) = charts.sizes(np.asarray(sizes)).data
        assert sum(bars.y) == len(sizes)


def test_what_cannot_be_reported_is_refused(tmp_path, monkeypatch):
    with pytest.raises(fl.FedLPError, match="nothing to report"):
        fl.report([], tmp_path / "r.html")
    with pytest.raises(fl.FedLPError, match=r"nowhere holds no run"):
        fl.report(["nowhere"], tmp_path / "r.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(fl.FedLPError, match=r"the report .* cannot be written"):
        fl.report({"a": rows(0.1)}, tmp_path / "file/r.html")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(fl.FedLPError, match=r"pip install 'fedlp-jax\[report\]'"):
        fl.report({"a": rows(0.1)}, tmp_path / "r.html")
