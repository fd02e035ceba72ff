"""JAX's profiler over some rounds, which changes no number."""

import gzip
import json

import optax
import pytest
from small import DIGITS, Steps, dataset

import fedlp_jax as fl
from fedlp_jax.config.experiment import run
from fedlp_jax.simulation.profiling import Recorder, Trace, rounds_of

DATA = dataset()
CLIENTS = fl.partition.iid(DATA.train.labels, clients=4)
ALGORITHM = fl.fedavg(
    fl.classification(Steps(depth=1)), client_optimizer=optax.sgd(0.1), batch_size=8
)


def simulate(**options):
    return fl.simulate(ALGORITHM, DATA, CLIENTS, rounds=5, cohort=2, **options)


def events(folder):
    (trace,) = folder.rglob("*.trace.json.gz")
    return json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]


def test_rounds_are_recorded_and_keep_their_numbers(tmp_path):
    plan = fl.Plan(devices=1, rounds_at_once=4)
    traced = simulate(profile=fl.Trace(tmp_path, 3, 4), plan=plan)
    assert len(events(tmp_path)) > 100
    plain = simulate(plan=plan)
    for key in ("train_loss", "upload_bytes"):
        assert traced.history[key].tolist() == plain.history[key].tolist()


def test_a_run_that_ends_within_the_recording_leaves_a_trace(tmp_path):
    stop = fl.EarlyStop(target=0.0, metric="train_accuracy")
    result = simulate(profile=Trace(tmp_path, 1, 5), early_stop=stop)
    assert len(result.history) < 5 and events(tmp_path)


def test_the_trace_lies_in_the_run_directory(tmp_path):
    run(DIGITS | {"rounds": 2}, out=tmp_path / "out", profile="2")
    assert events(tmp_path / "out/profile")


def test_a_dispatch_ends_where_a_recording_does(tmp_path):
    recorder = Recorder(Trace(tmp_path, 4, 6), 1, 9)
    assert [recorder.rounds_left(r) for r in range(1, 7)] == [3, 2, 1, 3, 2, 1]
    assert recorder.rounds_left(7) > 9 and Recorder(None, 1, 9).rounds_left(1) > 9


@pytest.mark.parametrize(("text", "rounds"), [("7", (7, 7)), ("5-8", (5, 8))])
def test_rounds_are_named_by_a_number_or_two(text, rounds):
    assert rounds_of(text) == rounds


@pytest.mark.parametrize("text", ["", "-", "3-", "-3", "a", "1-2-3", "1.5"])
def test_other_text_is_refused(text):
    with pytest.raises(fl.FedLPError, match="must be a round, or two with a dash"):
        rounds_of(text)


def test_rounds_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(fl.FedLPError, match="rounds 5 to 6 cannot be profiled: .* 1 to 5"):
        simulate(profile=Trace(tmp_path, 5, 6))
    with pytest.raises(fl.FedLPError, match=r"profile.last=3 must be .* at least 4"):
        Trace(tmp_path, 4, 3)
    assert not list(tmp_path.iterdir())
