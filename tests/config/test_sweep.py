"""A grid of a configuration: its points, their run directories, and what a kill leaves."""

import pytest
import yaml
from small import DIGITS

import fedlp_jax as fl
from fedlp_jax.config.loading import load_config
from fedlp_jax.config.sweep import execute_sweep, parse_grid, remaining, sweep_points
from fedlp_jax.reporting.run_directory import read_metrics

GRID = {"algorithm.client_optimizer.learning_rate": (0.1, 0.2)}
HOMO = DIGITS | {"algorithm": DIGITS["algorithm"] | {"name": "fedlp_homo", "keep": 0.5}}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(HOMO | {"rounds": 3}))
    return path


def without_seconds(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(path)]


def test_points_are_all_combinations_and_seeds_in_order(file):
    grid = parse_grid(["algorithm.keep=0.1,1", "model.name=logistic"])
    points = sweep_points(file, {"seed": 3}, grid, 2)
    assert [(label, config.seed, config.algorithm.keep) for label, config in points] == [
        ("keep=0.1,name=logistic", 3, 0.1),
        ("keep=0.1,name=logistic", 4, 0.1),
        ("keep=1,name=logistic", 3, 1),
        ("keep=1,name=logistic", 4, 1),
    ]
    two_names = {"model.name": ("mlp",), "partition.name": ("iid",)}
    assert sweep_points(file, {}, two_names)[0][0] == "model.name=mlp,partition.name=iid"
    hidden = {"model.name": ("mlp",), "model.hidden": ([64, 32],)}
    assert sweep_points(file, {}, hidden)[0][0] == "name=mlp,hidden=64-32"
    assert sweep_points(file, {}, {})[0][0] == "small"


def test_a_section_says_the_same_and_the_command_line_wins(file):
    raw = HOMO | {"rounds": 3, "sweep": {"grid": {"algorithm.keep": [0.2, 0.4]}, "seeds": 2}}
    file.write_text(yaml.safe_dump(raw))
    assert sweep_points(file, {}, {}) == sweep_points(file, {}, {"algorithm.keep": (0.2, 0.4)}, 2)
    assert [label for label, _ in sweep_points(file, {}, {"algorithm.keep": (1,)}, 1)] == ["keep=1"]
    with pytest.raises(fl.FedLPError, match="has a section sweep; run it with fedlp sweep, or"):
        fl.run(file, out=file.parent / "out")
    assert not (file.parent / "out").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["algorithm.keep"], "--grid 'algorithm.keep' must be as in --grid algorithm.keep=0.1,0.3"),
        (["algorithm.keep=0.1", "algorithm.keep=0.2"], "--grid names algorithm.keep twice"),
        (["algorithm.keep="], "the grid has no values of algorithm.keep"),
        (["algorithm.keep=0.1,0.1"], r"the grid has algorithm.keep=0\.1 twice"),
        (["algorithm.keep=0.1,1e-1"], r"the grid has algorithm.keep=0\.1 twice"),
        (["algorithm.kep=0.1"], "'kep' is not a field of 'fedlp_homo'; did you mean 'keep'"),
        (["model.name=mpl"], "did you mean 'mlp'"),
        (["seed=1,2"], "the grid cannot have seed; it is given with --seeds"),
        (["sweep.seeds=1,2"], "the grid cannot have sweep.seeds; it is given with --grid and"),
        (["name=a,b"], "the grid cannot have name; each point is named by its values"),
        (["keep_best.metric=test_loss"], "a sweep has no keep_best; omit the section"),
        (["sinks=[],[{name: tensorboard}]"], "a sweep has no sinks; omit the section"),
        (["partition.clients=[1"], "not valid YAML"),
    ],
)
def test_a_bad_grid_is_one_sentence(file, words, sentence):
    with pytest.raises(fl.FedLPError, match=sentence) as error:
        sweep_points(file, {}, parse_grid(words))
    assert "\n" not in str(error.value)


def test_a_name_is_for_a_sweep_without_a_grid(file):
    assert sweep_points(file, {"name": "mine"}, {}, 2)[1][0] == "mine"
    with pytest.raises(fl.FedLPError, match="named by their values; omit --name"):
        sweep_points(file, {"name": "mine"}, {"algorithm.keep": (0.5, 1)})


def test_a_value_out_of_range_writes_nothing(file):
    points = sweep_points(file, {}, {"algorithm.keep": (0.5, 1.5)})
    with pytest.raises(fl.FedLPError, match=r"keep=1\.5 must be a number in \[0, 1\]"):
        execute_sweep(points, file.parent / "out")
    points = sweep_points(file, {}, {"cohort": (2, 21)})
    with pytest.raises(fl.FedLPError, match="cohort=21 exceeds the 20 clients") as error:
        execute_sweep(points, file.parent / "out")
    assert not hasattr(error.value, "__notes__")  # there is nothing to resume
    assert not (file.parent / "out").exists()


def test_runs_that_have_not_ended_remain(file, tmp_path):
    points = sweep_points(file, {}, {}, 4)
    endings = [("done", 3), ("done", 2), ("diverged", 1), ("interrupted", 2)]
    for seed, (status, rounds) in enumerate(endings):
        path = tmp_path / f"out/runs/small-seed{seed}"
        path.mkdir(parents=True)
        (path / "summary.json").write_text(f'{{"status": "{status}", "rounds": {rounds}}}')
    assert remaining(points, tmp_path / "out") == [points[1], points[3]]
    assert remaining(points, tmp_path / "new") == points


@pytest.mark.slow
def test_each_point_is_a_run_directory_as_run_writes_it(file, tmp_path):
    points = sweep_points(file, {}, GRID, 2)
    outcome = execute_sweep(points, tmp_path / "out")
    names = [path.name for path in outcome.runs]
    assert names == [f"learning_rate={r}-seed{s}" for r in (0.1, 0.2) for s in (0, 1)]
    assert outcome.table.runs == {"learning_rate=0.1": 2, "learning_rate=0.2": 2}
    assert (tmp_path / "out/table.md").read_text() == f"{outcome.table.to_markdown()}\n"
    fl.run(points[3][1], out=tmp_path / "alone")
    there, alone = outcome.runs[3], tmp_path / "alone"
    in_sweep, by_run = (load_config(path / "config.yaml") for path in (there, alone))
    # Short rounds of a sweep share a call.
    assert (in_sweep.plan.rounds_at_once, by_run.plan.rounds_at_once) == (3, 1)
    plan = by_run.plan.model_copy(update={"rounds_at_once": 3})
    assert in_sweep == by_run.model_copy(update={"plan": plan})
    for one, other in zip(without_seconds(there), without_seconds(alone), strict=True):
        assert one.keys() == other.keys()
        assert one == pytest.approx(other, rel=1e-5)
    written = {path.name for path in alone.iterdir()} - {"plots"}  # of which a table has too many
    assert {path.name for path in there.iterdir()} >= written
    with pytest.raises(fl.FedLPError, match="already holds a sweep; choose another directory"):
        execute_sweep(points, tmp_path / "out")


@pytest.mark.slow
def test_a_sweep_that_is_stopped_continues_where_it_was(file, tmp_path):
    settings = {"checkpoint.every": 2, "rounds": 5}
    # Two structures, so two groups, which run in turn.
    points = sweep_points(file, settings, {"algorithm.batch_size": (40, 80)}, 2)
    whole = execute_sweep(points, tmp_path / "whole")
    seen = []

    def log(label, seed, row):
        seen.append((label, seed, row["round"]))

    def stop():
        return ("batch_size=80", 1, 2) in seen

    with pytest.raises(KeyboardInterrupt) as interrupted:
        execute_sweep(points, tmp_path / "out", log=log, stop=stop)
    assert interrupted.value.__notes__ == ["Resume with the same command and --resume."]
    first = tmp_path / "out/runs/batch_size=40-seed0/metrics.jsonl"
    written = first.stat().st_mtime_ns
    done = len(read_metrics(tmp_path / "out/runs/batch_size=80-seed0"))
    assert 2 <= done < 5
    seen.clear()
    outcome = execute_sweep(points, tmp_path / "out", resume=True, log=log, stop=lambda: False)
    assert {label for label, _, _ in seen} == {"batch_size=80"}
    assert min(round for _, _, round in seen) == done + 1
    assert first.stat().st_mtime_ns == written
    for one, other in zip(outcome.runs, whole.runs, strict=True):
        assert without_seconds(one) == without_seconds(other)
    again = execute_sweep(points, tmp_path / "out", resume=True)
    assert again.table.to_csv() == outcome.table.to_csv()


@pytest.mark.slow
def test_a_run_that_diverges_ends_alone_and_is_not_repeated(file, tmp_path):
    grid = {"algorithm.client_optimizer.learning_rate": (0.1, 1e38)}
    points = sweep_points(file, {}, grid)
    outcome = execute_sweep(points, tmp_path / "out")
    assert outcome.diverged == [outcome.runs[1]]
    assert len(read_metrics(outcome.runs[0])) == 3 > len(read_metrics(outcome.runs[1]))
    assert execute_sweep(points, tmp_path / "out", resume=True).diverged == outcome.diverged
