"""compare: a line for each experiment, seeds as a mean, and what it took to reach a target."""

import csv
import io
import json

import pytest
import typer.testing
import yaml

import fedlp_jax as fl
from fedlp_jax import cli
from fedlp_jax.reporting.compare import experiments

CONFIG = {"partition": {"name": "iid"}, "algorithm": {"name": "fedlp_homo", "keep": 0.5}}


def rows(*accuracies, upload=1_000_000):
    return [
        {"round": i, "test_accuracy": a, "test_loss": 1 - (a or 0), "upload_bytes": upload}
        for i, a in enumerate(accuracies, start=1)
    ]


def cells(table, label):
    return dict(zip((c.title for c in table.columns), table.cells[label], strict=True))


def test_numbers_of_a_run_and_of_reaching_a_target():
    table = fl.compare({"a": rows(0.2, None, 0.8, 0.7)}, target=0.75)
    got = {title: cell.mean for title, cell in cells(table, "a").items()}
    assert got == {
        "rounds": 4,
        "final test accuracy": 0.7,
        "best test accuracy": 0.8,
        "upload": pytest.approx(4),
        "rounds to 0.75": 3,
        "upload to 0.75": pytest.approx(3),
    }


def test_seeds_are_a_mean_with_a_deviation_and_say_how_many_reached_the_target():
    table = fl.compare({"a": [rows(0.5, 0.9), rows(0.5, 0.7)], "b": rows(0.1)}, target=0.8)
    final = cells(table, "a")["final test accuracy"]
    assert final == (pytest.approx(0.8), pytest.approx(0.02**0.5), 2)
    assert cells(table, "a")["rounds to 0.8"] == (2, None, 1)
    assert cells(table, "b")["rounds to 0.8"] is None
    line_a, line_b = table.lines()
    assert line_a[:4] == ["a", "2", "2", "0.8000 ± 0.1414"]
    assert line_a[-2:] == ["2 (1 of 2)", "2.00 (1 of 2)"] and line_b[-1] == "–"


def test_a_loss_is_better_when_smaller():
    table = fl.compare({"a": rows(0.2, 0.8, 0.7)}, metric="test_loss", target=0.25)
    assert cells(table, "a")["best test loss"].mean == pytest.approx(0.2)
    assert cells(table, "a")["rounds to 0.25"].mean == 2


def test_what_lacks_the_metric_is_named_with_the_metric_that_it_has():
    own = [{"round": 1, "test_accuracy_personal": 0.9, "upload_bytes": 1}]
    untested = [{"round": 1, "train_loss": 2.0, "upload_bytes": 1}]
    runs = {"FedAvg": rows(0.5), "FedBN": own, "FedPer": [own, own], "stopped": untested}
    table = fl.compare(runs)
    assert cells(table, "FedBN")["final test accuracy"] is None
    assert table.notes == [
        "FedBN, FedPer: no test_accuracy. Their clients keep layers of their own, so there is no "
        "model for everybody. Compare them by the metric test_accuracy_personal.",
        "stopped: no test_accuracy.",
    ]
    assert str(table) == "\n\n".join([table.to_markdown(), *table.notes])
    assert fl.compare(runs, metric="train_loss").notes == ["FedAvg, FedBN, FedPer: no train_loss."]
    other = fl.compare(runs, metric="test_accuracy_personal").notes
    assert other[0] == (
        "FedAvg: no test_accuracy_personal. Compare them by the metric test_accuracy."
    )
    assert fl.compare({"FedBN": own}).notes == []


def test_columns_are_chosen_by_their_titles():
    runs = {"a": rows(0.2, 0.8)}
    table = fl.compare(runs, target=0.5, columns=("upload", "final", "rounds to"))
    assert table.header == ["run", "runs", "upload [MB]", "final test accuracy", "rounds to 0.5"]
    assert table.lines() == [["a", "1", "2.00", "0.8000", "2"]]
    with pytest.raises(fl.FedLPError, match="no column 'MACs'; there are: rounds, final test"):
        fl.compare(runs, columns=["MACs"])


def test_every_format_holds_the_same_numbers():
    table = fl.compare({"A_1 | x": [rows(0.5), rows(0.7)]})
    head, rule, line = table.to_markdown().splitlines()
    assert head.startswith("| run | runs | rounds | final test accuracy |")
    assert rule.count("---") == len(table.header)
    assert line.startswith(r"| A_1 \| x | 2 | 1 | 0.6000 ± 0.1414 |")
    latex = table.to_latex()
    assert r"A\_1 | x & 2 & 1 & 0.6000 $\pm$ 0.1414" in latex and latex.count(r"\\") == 2
    (record,) = csv.DictReader(io.StringIO(table.to_csv()))
    assert float(record["final test accuracy"]) == pytest.approx(0.6)
    assert float(record["final test accuracy deviation"]) == pytest.approx(0.02**0.5)
    assert record["final test accuracy runs"] == "2" and str(table) == table.to_markdown()


def test_the_runs_of_a_sweep_come_in_the_order_of_its_numbers(tmp_path):
    for keep in ("0.1", "0.05", "10"):
        for seed in (10, 9):
            folder = tmp_path / f"runs/keep={keep}-seed{seed}"
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text(
                yaml.safe_dump({"name": f"keep={keep}", "seed": seed, "keep": float(keep)})
            )
            (folder / "metrics.jsonl").write_text(json.dumps(rows(0.5)[0]) + "\n")
    for given in (tmp_path, tmp_path / "runs"):
        found = experiments([given])
        assert list(found) == ["keep=0.05", "keep=0.1", "keep=10"]
        assert [config["seed"] for _, config in found["keep=10"]] == [9, 10]
    with pytest.raises(fl.FedLPError, match="holds several runs; pass it without a label"):
        fl.compare({"all": tmp_path})


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(fl.FedLPError, match="nothing to compare"):
        fl.compare([])
    with pytest.raises(fl.FedLPError, match="holds no run: there is no config.yaml"):
        fl.compare([tmp_path])
    with pytest.raises(fl.FedLPError, match="no run has 'accuracy'; did you mean|They have round"):
        fl.compare({"a": rows(0.5)}, metric="accuracy")


def test_the_command_says_below_the_table_what_lacks_the_metric(tmp_path):
    for name, row in (
        ("avg", rows(0.5)[0]),
        ("bn", {"round": 1, "test_accuracy_personal": 0.9, "upload_bytes": 1}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(
            yaml.safe_dump({"name": name, "algorithm": name})
        )
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    call = typer.testing.CliRunner().invoke
    for words in ([], ["--format", "csv"]):
        said = call(cli.app, ["compare", str(tmp_path), *words])
        below = said.stderr if words else said.stdout
        assert "bn: no test_accuracy. Their clients" in below, said.output
        assert ("Their clients" in said.stdout) != bool(words)


def test_the_command_groups_seeds_and_names_what_differs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for keep in (0.5, 1.0):
        for seed in (0, 1):
            folder = tmp_path / f"keep{keep}-{seed}"
            folder.mkdir()
            algorithm = CONFIG["algorithm"] | {"keep": keep}
            partition = CONFIG["partition"] | {"seed": seed}
            config = {"name": "run", "seed": seed, "partition": partition, "algorithm": algorithm}
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
            lines = [json.dumps(row) + "\n" for row in rows(0.1 + keep / 10, 0.2 + seed / 10)]
            (folder / "metrics.jsonl").write_text("".join(lines))
    words = ["compare", *(str(p) for p in sorted(tmp_path.iterdir())), "--target", "0.01"]
    call = typer.testing.CliRunner().invoke
    table = call(cli.app, words)
    assert table.exit_code == 0, table.output
    assert "run (keep=0.5)" in table.output and "run (keep=1.0)" in table.output
    markdown = call(cli.app, [*words, "--format", "md", "--plots", "pictures"]).output
    assert markdown.count("\n") == 4 and "| run (keep=0.5) | 2 | 2 | 0." in markdown
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == [
        "test_accuracy_by_round.png",
        "test_accuracy_by_upload_megabytes.png",
    ]
    narrow = call(cli.app, [*words, "--columns", "final, rounds to", "--format", "csv"]).output
    assert narrow.count("\n") == 3 and narrow.startswith("run,runs,final test accuracy,")
    refused = call(cli.app, ["compare", "nowhere"])
    assert refused.exit_code == 2 and "nowhere holds no run" in refused.output
