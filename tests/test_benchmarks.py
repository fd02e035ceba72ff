"""Commands of benchmarks/ run and say something that can be true; no time is asserted.

All but `behaviours`, which compiles for minutes even with `--smoke`.
"""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import fedlp_jax as fl
from benchmarks import (
    accelerator,
    aggregate,
    asynchrony,
    cells,
    command,
    compile,
    convolutions,
    curves,
    dense,
    devices,
    family,
    frozen,
    goals,
    hetero,
    kernels,
    language,
    memory,
    paper,
    parts,
    robustness,
    roofline,
    scaling,
    soak,
    speed,
    step,
    sweep,
    tuning,
    widths,
)
from benchmarks.timing import rounds_of
from benchmarks.workloads import WORKLOADS, made_up, smoke
from fedlp_jax.execution.plan import GPU_KERNELS

pytestmark = pytest.mark.slow  # each test starts a whole command


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a command with --smoke in this process; returns what it writes."""
    monkeypatch.setattr(fl, "setup", lambda cpu_devices=None: None)  # jax is in use here
    # No time is looked at, so compiling should take little of it; here, and in processes started.
    jax.config.update("jax_disable_most_optimizations", True)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

    def run(module, *words):
        file = tmp_path / "result.json"
        arguments = [module.__name__, "--smoke", "--json", str(file), *words]
        monkeypatch.setattr(sys, "argv", arguments)
        module.main()
        result = json.loads(file.read_text())
        assert {"machine", "versions", "device", "commit"} <= set(result)
        return result

    yield run
    jax.config.update("jax_disable_most_optimizations", False)


def is_spread(times):
    return set(times) == {"min", "median", "max"} and (
        0 < times["min"] <= times["median"] <= times["max"] < math.inf
    )


# what is modelled


@pytest.mark.parametrize(
    ("workload", "macs", "first", "params", "slots"),
    [("W1", 38_896_896, 32 * 32 * 27 * 32, 551_466, 2), ("W2", 493_888, 784 * 512, 494_762, 1)],
)
def test_the_cost_of_a_step_is_counted_from_its_layers(workload, macs, first, params, slots):
    w = WORKLOADS[workload]
    cost = step.cost(parts.module(w), parts.optimizer(w), w.image, w.batch_size)
    assert cost.macs == macs
    assert cost.written == 2 * 10 * (3 * macs - first)
    assert cost.parameter_bytes == 4 * params * (6 + 2 * slots)
    outputs = {
        "W1": 4 * 32 * 32 * 32 + 4 * 16 * 16 * 64 + 4 * 8 * 8 * 128 + 138,
        "W2": 512 + 128 + 128 + 64 + 32 + 10,
    }
    assert cost.activation_bytes == 4 * 5 * 10 * outputs[workload]
    # Products of an MLP have one form; the reference CNN's convolutions take cheaper ones.
    assert cost.lowered > cost.written if workload == "W2" else cost.lowered < cost.written


def test_the_busiest_device_decides():
    segment = np.array([[0, 2, 3], [0, 0, 4]])  # two shallow and one deep; four deep
    assert hetero.busiest(segment, [1.0, 10.0], width=1) == 40
    assert hetero.busiest(segment, [1.0, 10.0], width=3) == 60  # a chunk is computed whole
    assert hetero.busiest(segment, [100.0, 10.0], width=1) == 210


def test_mixtures_are_the_cohorts_of_the_paper():
    found = {name: counts.tolist() for name, counts in hetero.mixtures(5, 20).items()}
    assert found == {
        "Hetero(1)": [12, 2, 2, 2, 2],
        "Hetero(3)": [2, 2, 12, 2, 2],
        "Hetero(u)": [4, 4, 4, 4, 4],
        "Hetero(5)": [2, 2, 2, 2, 12],
    }


# what is measured


def test_roofline(run):
    result = run(roofline)
    assert len(result["ceilings"]) == 4 and min(result["ceilings"].values()) > 0
    (row,) = result["workloads"].values()
    assert is_spread(row["measured_ms_per_client_step"])
    peak = max(v for k, v in result["ceilings"].items() if "flop" in k)
    seconds = row["measured_ms_per_client_step"]["median"] / 1e3
    assert row["share_of_peak"]["written"] == pytest.approx(
        row["modelled_flop"]["written"] / seconds / peak
    )
    assert row["floor_ms"]["products"] > 0 and row["floor_ms"]["memory"] > 0


def test_widths(run):
    whole, *narrow = run(widths)["widths"]
    assert whole["share"] == {"macs": 1, "bytes": 1, "measured_time": 1}
    assert all(row["share"]["macs"] < 1 and row["share"]["bytes"] < 1 for row in narrow)
    assert all(is_spread(row["measured_seconds"]) for row in [whole, *narrow])


def test_asynchrony(run):
    rows = run(asynchrony)["algorithms"]
    assert rows["fedavg"]["staleness_mean"] == [0.0] < rows["fedasync"]["staleness_mean"]
    # Whoever waits takes longer for as many arrivals.
    assert rows["fedbuff"]["simulated_seconds"] < rows["fedavg"]["simulated_seconds"]


def test_frozen(run):
    rows = run(frozen)["trained"]
    assert [*rows][-1] == "keep 0.3"
    macs = [row["modelled_macs_to_fedavg"] for row in rows.values()]
    assert macs[:4] == sorted(macs[:4], reverse=True)  # fewer and fewer layers are trained
    assert macs[0] == 1 and all(1 / 3 < share < 1 for share in macs[1:])
    assert all(is_spread(row["measured_seconds"]) for row in rows.values())


def test_hetero(run):
    result = run(hetero)
    deepest = result["levels"][-1]
    assert all(share == 1 for share in deepest["share_of_deepest"].values())
    shallow = result["levels"][0]["share_of_deepest"]
    assert 0 < shallow["macs"] < 1
    for level in result["levels"]:
        assert is_spread(level["measured_seconds"])
        rounds = level["measured_seconds"]["median"]
        assert level["measured_ms_per_step"] * result["cohort"] * result["steps"] == pytest.approx(
            1e3 * rounds * result["plan"]["devices"]
        )
    assert set(result["mixtures"]) == {"Hetero(1)", "Hetero(2)", "Hetero(u)", "Hetero(3)"}
    for row in result["mixtures"].values():
        assert sum(row["clients_by_depth"]) == result["cohort"]
        assert is_spread(row["measured_seconds"])
        assert row["imbalance"] >= 1 - 1e-9
        assert row["ratio_to_sum_of_levels_evenly"] == pytest.approx(
            row["ratio_to_sum_of_levels"] * row["imbalance"]
        )


def test_aggregate(run):
    (row,) = run(aggregate)["aggregate"]
    rates = row["measured_gigabytes_per_second"]
    assert set(rates) == {"copy", "at once", "ours"} and all(map(is_spread, rates.values()))
    assert row["megabytes"] == pytest.approx(4 * row["cohort"] * row["parameters"] / 1e6)
    assert row["ours_of_copy"] == rates["ours"]["median"] / rates["copy"]["median"]


def test_aggregate_times_nothing_that_is_wrong(monkeypatch):
    monkeypatch.setattr(aggregate, "masked_mean", fl.aggregate.cohort_mean)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        aggregate.measure(hetero.Stairs(), (8, 8, 1), cohort=4, repeats=1)


def test_scaling(run):
    result = run(scaling)
    assert [row["clients"] for row in result["population"]] == 2 * [1_000, 20_000]
    assert [row["data"] for row in result["population"]] == ["device", "device", "host", "host"]
    for row in result["population"]:
        assert list(row["host_ms"]) == ["draw", "layout", "staging", "reading", "booking"]
        assert all(map(is_spread, [row["ratio_to_smallest"], *row["host_ms"].values()]))
    sizes = [(4, 1), (4, 4), (8, 1), (8, 4)]
    assert [(row["cohort"], row["width"]) for row in result["cohort"]] == sizes
    assert ["slope" in row for row in result["cohort"]] == [False, False, True, True]
    assert [row["data"] for row in result["plan"]] == ["device", "host"]
    assert all(row["predicted_bytes"] > 0 for row in result["plan"])
    assert all((row["measured_bytes"] or 0) >= 0 for row in result["plan"])
    timed = [row for name in ("population", "cohort", "plan") for row in result[name]]
    assert all(is_spread(row["seconds"]) for row in timed)
    for row in result["uneven"]:
        assert 0 <= row["padded_share"] < 1 <= row["imbalance"] < 1.1
        assert row["padded_share"] == 0 or row["width"] > 1


def test_devices(run):
    result = run(devices)
    *rounds, inputs = result["cohort"]
    cases = [(kind, count) for kind in ("strong", "weak") for count in (1, 2, 4)]
    assert [(row["kind"], row["devices"]) for row in rounds] == cases
    assert [row["clients"] for row in rounds] == [8, 8, 8, 4, 8, 16]
    assert inputs["pace"]["step"] > 0 and inputs["link"]["bandwidth"] > 0
    for row in rounds:
        assert row["predicted_to_measured"] * row["seconds"]["min"] == pytest.approx(
            row["predicted_seconds"]
        )
    assert [(row["kind"], row["devices"]) for row in result["sweep"]] == cases
    assert all(is_spread(row["seconds"]) for row in [*rounds, *result["sweep"]])
    assert [row["devices"] for row in result["memory"]] == [1, 2, 4]
    assert all(row["predicted_bytes"] > 0 for row in result["memory"])


def test_the_memory_of_a_call_is_what_it_holds_at_most():
    def call():
        return np.ones(2**25).sum()  # 256 MiB, let go at the end

    peak = memory.peak_of(call)
    assert peak is None or 2**27 < peak < 2**30


def test_convolutions(run, monkeypatch):
    monkeypatch.setattr(convolutions, "_TARGET_SECONDS", 0.001)
    (row,) = run(convolutions)["backends"]["cpu"]
    assert set(row["milliseconds"]) == {"patches", "winograd_4x4"}
    assert all(0 < time < math.inf for time in row["milliseconds"].values())


@pytest.mark.slow
def test_family(run):
    result = run(family, "--only", "FedAvg", "FedLP-Homo(0.5)")
    assert result["rounds"] == 2 and list(result["runs"]) == ["FedAvg", "FedLP-Homo(0.5)"]
    fedavg, homo = (seeds[0] for seeds in result["runs"].values())
    assert fedavg["round"] == homo["round"] == [2]
    masks = 2 * 6  # a byte for each client of each round
    assert fedavg["upload_bytes"] == [fedavg["download_bytes"][0] + masks]
    assert homo["upload_bytes"] < fedavg["upload_bytes"]
    assert homo["train_macs"] == fedavg["train_macs"]
    more = run(family, "--only", "DepthFL(u)")
    assert list(more["runs"]) == list(more["commits"]) == [*result["runs"], "DepthFL(u)"]
    assert more["runs"]["FedAvg"] == result["runs"]["FedAvg"]


def test_every_algorithm_of_the_family_table_can_be_configured():
    each = [fl.load_config(family.CONFIG, {"algorithm": one}) for one in family.FAMILY.values()]
    assert len({config.algorithm.name for config in each}) > 10


def test_language(run):
    result = run(language, "--rounds", "4", "--every", "2")
    assert list(result["runs"]) == ["FedAvg", "FedLP-Homo(0.5)"]
    for contender in result["runs"].values():
        assert [test["round"] for test in contender["tests"]] == [2, 4]
        assert contender["train_loss"][-1] < contender["train_loss"][0]
    sent = [contender["tests"][-1]["upload_bytes"] for contender in result["runs"].values()]
    assert sent[1] < sent[0]


def test_curves(run):
    result = run(curves, "--rounds", "1", "--workload", "W4", "auto:0", "direct:0", "auto:1")
    assert list(result["curves"]) == ["auto:0", "direct:0", "auto:1"]
    assert set(result["lowerings"]["direct:0"].values()) == {"direct"}
    assert "direct" not in result["lowerings"]["auto:0"].values()
    loss = {name: curve["train_loss"][0] for name, curve in result["curves"].items()}
    assert loss["direct:0"] == pytest.approx(loss["auto:0"], rel=1e-4)  # the same clients
    assert abs(loss["auto:1"] - loss["auto:0"]) > 1e-4 * loss["auto:0"]  # others
    assert list(result["largest_difference_from_auto"]) == ["direct:0"]


def test_speed(run, monkeypatch):
    two = {name: how for name, how in speed._CONTENDERS.items() if name in ("ours", "naive JAX")}
    monkeypatch.setattr(speed, "_CONTENDERS", two | {"cannot start": ("nobody", {})})
    (result,) = run(speed, "--workload", "W2", "--made-up")["results"]
    assert result["data"] == "synthetic"
    assert result["contenders"].pop("cannot start") == {"error": "KeyError: 'nobody'"}
    assert set(result["contenders"]) == set(two) and result["ratio_to_best_torch"] is None
    for row in result["contenders"].values():
        assert is_spread(row["ms_per_client_step"])
        assert row["difference_after_5_steps"] < 1e-8


def test_contenders_of_speed_are_those_of_the_device():
    names = [*speed.chosen(cuda=False, prefixes=("ours", "naive"))]
    assert names == ["ours", "ours, 1 device of 1 thread", "naive JAX"]
    assert [*speed.chosen(cuda=True, prefixes=("naive",))] == ["ours", "naive JAX"]


def test_contenders_of_speed_in_pytorch():
    pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[bench]'")
    assert [*speed.chosen(cuda=False, prefixes=("torch",))] == [
        "ours",
        "torch, 2 processes x 1 thread",
        "torch, 1 process x 2 threads",
    ]
    assert [*speed.chosen(cuda=True)] == [
        "ours",
        "torch, CUDA graphs on 10 streams",
        "torch, CUDA graphs on 1 stream",
        "torch, CUDA eager",
        "naive JAX",
    ]
    assert [*speed.chosen(cuda=True, prefixes=("torch, CUDA e",))] == ["ours", "torch, CUDA eager"]


def test_made_up_images_are_as_many_and_as_large():
    for workload in WORKLOADS.values():
        made = made_up(workload)
        assert made.data == "synthetic" and made.client_steps == workload.client_steps
        assert dataclasses.replace(made, data=workload.data) == workload


# Answers once it is set up and once more; a shell, which starts at once.
_CONTENDER = r"""
echo '{"compile_s": 1.5, "peak_rss_mb": 2}'
read -r command
echo '{"seconds": 3, "compile_s": 1.5, "peak_rss_mb": 4}'
read -r command
exit 7
"""


@pytest.fixture
def dying(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "_WORKER", ("sh", "-c", _CONTENDER))

    def start(label):
        contender = speed.Contender(label, "any", tmp_path, {})
        contender.ready()
        assert contender.ask(do="round", number=1)["seconds"] == 3
        assert contender.readings == {"compile_s": 1.5, "peak_rss_mb": 4}
        return contender

    return start


def test_a_contender_that_dies_is_asked_no_more(dying):
    contender = dying("torch")
    assert contender.ask(do="round", number=2) == {}
    assert contender.error == "the process ended with exit code 7"
    assert contender.ask(do="round", number=3) == {}


def test_speed_ends_where_ours_dies(dying):
    with pytest.raises(SystemExit, match="ours: the process ended with exit code 7"):
        dying("ours").ask(do="round", number=2)


def staged(folder, w):
    """What `stage.write` writes, in a second: made of noise."""
    from benchmarks import torch_contender, torch_networks

    rng = np.random.default_rng(0)
    rows = rng.permutation(w.clients * w.per_client).reshape(w.clients, w.per_client)
    np.save(folder / "inputs.npy", rng.integers(256, size=(rows.size, *w.image), dtype=np.uint8))
    np.save(folder / "labels.npy", rng.integers(10, size=rows.size))
    np.save(folder / "normalize.npy", np.float32([3 * [1 / 64], 3 * [-2]]))
    np.save(folder / "rows.npy", rows)
    np.save(folder / "check.npy", rows[0])
    named = torch_networks.named(torch_contender._MODELS[w.model]())
    initial = {name: torch_networks.to_flax(tensor.numpy()) for name, tensor in named.items()}
    np.savez(folder / "initial.npz", **initial)


@pytest.mark.parametrize("workload", ["W1", "W2"])
def test_what_becomes_a_cuda_graph_trains_as_the_plain_loop(tmp_path, workload):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[bench]'")
    from benchmarks import torch_contender, torch_cuda

    w = smoke(WORKLOADS[workload])
    staged(tmp_path, w)
    plain = torch_contender.Trainer(tmp_path, w)
    graph = torch_cuda.Graph(tmp_path, w, device="cpu")
    plain.orders = graph.orders  # which differ, as they are drawn at once
    for number in (1, 2):  # nothing is left of the first round, nor of a client
        sums = [trainer.clients([3, 1], number) for trainer in (plain, graph)]
        for a, b in zip(*sums, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        for trainer, total in zip((plain, graph), sums, strict=True):
            trainer.finish(total)
    order = np.load(tmp_path / "check.npy").astype(np.int64)
    checks = [trainer.check(order) for trainer in (plain, graph)]
    for name, expected in checks[0].items():
        np.testing.assert_allclose(checks[1][name], expected, rtol=1e-9, atol=1e-12)
    after = graph.clients([3, 1], 1)  # which captures again, from the initial weights
    for a, b in zip(plain.clients([3, 1], 1), after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_orders_drawn_at_once_are_permutations_of_each_client(tmp_path):
    pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[bench]'")
    from benchmarks import torch_cuda

    w = smoke(WORKLOADS["W2"])
    staged(tmp_path, w)
    trainer = torch_cuda.Eager(tmp_path, w, device="cpu")
    first, second = (np.stack([*trainer.orders([2, 0], number)]) for number in (1, 2))
    rows = np.load(tmp_path / "rows.npy")[[2, 0]]
    for orders in (first, second):
        np.testing.assert_array_equal(np.sort(orders), np.sort(rows))
    assert (first != second).any() and (first != rows).any()


def test_robustness(run):
    result = run(robustness)
    assert [row["rule"] for row in result["attacks"]] == ["masked_mean", "masked_mean, clip 1"]
    assert [row["keep"] for row in result["time"]] == [1.0, 0.7]
    rows = [row for table in ("attacks", "time", "privacy") for row in result[table]]
    assert all(0 <= row["lowest"] <= row["accuracy"] <= row["highest"] <= 1 for row in rows)
    weak, strong = result["privacy"]
    assert weak["epsilon"] > strong["epsilon"] > 0


def test_soak(run):
    result = run(soak)
    assert [round for round, _ in result["resident_mib"]] == list(range(2, 81, 2))
    assert all(size > 100 for _, size in result["resident_mib"])
    assert math.isfinite(result["bytes_a_round"])


def test_sweep(run):
    result = run(sweep)
    assert result["runs"] == 4
    assert result["apart"]["largest_difference_of_test_accuracy"] < 0.02
    assert all(math.isfinite(share) and share > 0 for share in result["shares"].values())


def test_dense(run):
    result = run(dense)
    assert result["measured"]
    for row in result["measured"]:
        assert math.isfinite(row["ratio"]) and row["ratio"] > 0


def test_tuning(run):
    result = run(tuning, "--workload", "W2")["workloads"]["W2"]
    assert result["found"] in result["measured_seconds"]
    assert result["best_by_hand"] in result["measured_seconds"]
    assert all(map(is_spread, result["measured_seconds"].values()))
    tried = [*result["measured_seconds"], *result["dropped_first_round_seconds"]]
    assert any("data host" in name for name in tried)
    assert result["ratio_to_best_by_hand"] >= 1


def test_compile(run):
    result = run(compile)
    (rows,) = result["workloads"].values()
    for row in (*rows.values(), *result["quickstart"].values()):
        assert all(seconds > 0 for seconds in row.values()), row
    assert set(rows) == {"cold", "warm"}
    assert {"round_trace_seconds", "round_lowering_seconds", "round_compile_seconds"} <= set(
        rows["cold"]
    )
    assert set(result["quickstart"]) == {"import jax", "cold"}
    cold = result["quickstart"]["cold"]
    assert cold["first_round_seconds"] < cold["whole_seconds"]


# the command for accelerators


def test_accelerator_goes_on_after_a_cell_without_memory(run):
    peak, bandwidth, fill, rounds, uneven = run(accelerator)["cells"]
    assert peak["result"]["flop_per_second"] > 0
    assert "RESOURCE_EXHAUSTED" in fill["error"] and "result" not in fill
    for row in (rounds, uneven):  # of two processes
        result = row["result"]
        assert is_spread(result["measured_ms_per_client_step"])
        assert result["digest"] == result["digest_again"]
        seconds = result["measured_ms_per_client_step"]["median"] / 1e3
        floor = result["step"]["bytes_a_client_step"] / bandwidth["result"]["bytes_per_second"]
        assert result["shares"]["floor"] == pytest.approx(floor / seconds)
    share = rounds["result"]["written_flop"] / peak["result"]["flop_per_second"]
    seconds = rounds["result"]["measured_ms_per_client_step"]["median"] / 1e3
    assert rounds["result"]["shares"]["peak"] == pytest.approx(share / seconds)


# Answers with the cell it was asked for and its own process; a shell, which starts at once.
_FAKE = r"""
while read -r cell; do
  case "$cell" in
    *die*) kill -9 $$ ;;
    *hang*|*4096*) exec sleep 600 ;;
  esac
  echo "{\"result\": {\"cell\": $cell, \"process\": $$, \"flags\": \"$XLA_FLAGS\"}}"
done
"""


def measured(*parts, seconds=60, limit=2.0):
    """The rows after the first, which is the environment's."""
    wanted = [accelerator.Part("", share, cells) for share, cells in parts]
    deadline = time.monotonic() + seconds
    rows = accelerator.measure(False, deadline, limit, ["sh", "-c", _FAKE], wanted)
    return list(rows)[1:]


def named(*kinds):
    return [{"kind": kind} for kind in kinds]


def test_accelerator_goes_on_after_a_cell_that_kills_or_hangs():
    rows = measured((1.0, named("a", "b", "die", "c", "hang", "d")))
    assert [row["cell"]["kind"] for row in rows] == ["a", "b", "die", "c", "hang", "d"]
    said = [row.get("error") or row["result"]["cell"]["kind"] for row in rows]
    assert said == ["a", "b", "the process ended with code -9", "c", "no answer within 2 s", "d"]
    processes = [row["result"]["process"] for row in rows if "result" in row]
    assert processes[0] == processes[1] and len(set(processes)) == 3


def test_accelerator_keeps_to_its_time():
    begin = time.monotonic()
    rows = measured((1.0, named("hang", "b", "c")), seconds=3)
    assert time.monotonic() - begin < 10
    assert "no answer" in rows[0]["error"]
    assert [row.get("skipped") for row in rows[1:]] == ["no time was left"] * 2


def test_cells_without_time_in_their_part_come_last():
    rows = measured((0.3, named("hang", "hang too", "a")), (0.5, named("b")), seconds=10)
    kinds = [row["cell"]["kind"] for row in rows]
    assert kinds == ["hang", "b", "hang too", "a"]


def test_a_later_call_measures_what_an_earlier_one_did_not():
    earlier = [
        {"cell": {"kind": "a"}, "seconds": 1.0, "result": {}},
        {"cell": {"kind": "b"}, "seconds": 1.0, "error": "no answer within 2 s"},
    ]
    parts = [accelerator.Part("", 1.0, named("a", "b", "c"))]
    rows = accelerator.measure(
        False, time.monotonic() + 60, 2.0, ["sh", "-c", _FAKE], parts, earlier
    )
    assert [row["cell"]["kind"] for row in rows] == ["environment", "b", "c"]


def test_a_smaller_cell_of_an_earlier_call_is_not_measured_again():
    large = {"kind": "rounds", "workload": "W4", "cohort": 4096, "width": 4096}
    fewer = accelerator.smaller(large, late=True)
    parts = [accelerator.Part("", 1.0, [large, *named("a")])]
    rows = accelerator.measure(
        False,
        time.monotonic() + 60,
        2.0,
        ["sh", "-c", _FAKE],
        parts,
        [{"cell": fewer, "seconds": 1.0, "result": {}}],
    )
    assert [row["cell"] for row in rows][1:] == [large, *named("a")]


H200 = {"device": {"kind": "NVIDIA H200", "platform": "gpu"}}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (json.dumps(H200 | {"cells": []}), "was measured on NVIDIA H200, and this is None"),
        (json.dumps(H200 | {"cells": [], "smoke": True}), "was measured with --smoke; choose"),
        ('{"cells": [', "has no cells that this command could continue .*; remove it, or choose"),
        ("", "has no cells that this command could continue"),
        ("[]", "has no cells that this command could continue"),
        ('{"cells": []}', "has no cells that this command could continue"),
        # A result as an earlier version of the command wrote it.
        (
            json.dumps(H200 | {"cells": [{"cell": {"kind": "bandwidth"}, "result": {"gb": 1}}]}),
            "has no cells that this command could continue .*bytes_per_second",
        ),
    ],
)
def test_a_file_that_cannot_be_continued_stays(tmp_path, monkeypatch, content, sentence):
    file = tmp_path / "h200.json"
    file.write_text(content)
    monkeypatch.setattr(accelerator.measure, "__defaults__", (2.0, ["sh", "-c", _FAKE], None, ()))
    monkeypatch.setattr("sys.argv", ["accelerator", "--json", str(file), "--minutes", "0.1"])
    with pytest.raises(SystemExit, match=sentence):
        accelerator.main()
    assert file.read_text() == content


def test_a_row_of_an_earlier_call_says_where_its_commit_was_another(tmp_path, monkeypatch):
    file, commits = tmp_path / "file.json", iter("abb")
    parts = {"a": named("peak"), "b": named("peak", "bandwidth")}

    def measure(smoke, deadline, known):
        commit = next(commits)
        yield {
            "cell": {"kind": "environment"},
            "seconds": 1.0,
            "result": {"commit": commit, "device": {"kind": "Abacus", "count": 1}},
        }
        values = {"flop_per_second": 1.0, "bytes_per_second": 1.0}
        for cell in parts[commit]:
            if cell not in [row["cell"] for row in known]:
                yield {"cell": cell, "seconds": 1.0, "result": values}

    monkeypatch.setattr(accelerator, "measure", measure)
    monkeypatch.setattr("sys.argv", ["accelerator", "--json", str(file)])
    for _ in range(3):
        accelerator.main()
    found = json.loads(file.read_text())
    assert found["commit"] == "b"
    assert [row.get("commit") for row in found["cells"]] == ["a", None]


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch, capsys):
    for file in (tmp_path, tmp_path / "missing" / "file.json"):
        monkeypatch.setattr("sys.argv", ["accelerator", "--smoke", "--json", str(file)])
        with pytest.raises(SystemExit):
            accelerator.main()
        assert f"{file} cannot be written (" in capsys.readouterr().err


def test_a_kill_while_a_result_is_written_leaves_the_file_before_it(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    command.save(str(file), {"cells": [1]})
    with pytest.raises(TypeError):
        command.save(str(file), {"cells": [1, object()]})
    monkeypatch.setattr(Path, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.save(str(file), {"cells": [1, 2]})
    assert json.loads(file.read_text()) == {"cells": [1]}


def test_a_cell_that_takes_too_long_is_measured_again_on_less():
    large = {"kind": "rounds", "workload": "W4", "cohort": 4096, "width": 4096}
    first, second, third = measured((1.0, [large, *named("a")]))
    assert "no answer" in first["error"] and third["cell"]["kind"] == "a"
    assert second["cell"]["cohort"] == second["cell"]["width"] == 1024
    assert "deterministic" in second["result"]["flags"]  # which compiles in less time
    assert second["result"]["cell"] == {"kind": "rounds", "workload": "W4"} | {
        "cohort": 1024,
        "width": 1024,
    }


def test_cells_become_smaller_until_nothing_is_left():
    cell, cohorts = {"kind": "rounds", "workload": "W1"}, []
    while cell := accelerator.smaller(cell, late=False):
        cohorts.append(cell["cohort"])
    assert cohorts == [8, 2]
    assert accelerator.smaller({"kind": "peak"}, late=True) is None


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_every_cell_names_a_measurement_and_its_arguments(platform):
    parts = accelerator.parts_for(platform)
    found = [cell for part in parts for cell in part.cells]
    assert len(found) > 10
    for cell in found:
        code = cells.KINDS[cell["kind"]].__code__
        names = code.co_varnames[: code.co_argcount]
        assert set(cell) - {"kind", "flags", "platform"} <= set(names)
    assert platform == "gpu" or not any("flags" in cell for cell in found)
    cohorts = [cell.get("cohort", 0) for cell in found]
    assert max(cohorts) == (256 if platform == "cpu" else 4096)


def timed(milliseconds, kind="rounds", digests=("a", "a"), **cell):
    times = {"median": milliseconds}
    result = {"measured_ms_per_client_step": times, "digest": digests[0]}
    return {
        "cell": {"kind": kind} | cell,
        "result": result | {"digest_again": digests[1]},
    }


def test_goals_stand_beside_what_was_measured():
    host = {"cell": {"kind": "environment"}, "result": {"device": {"platform": "gpu"}}}
    slow = {"cell": {"kind": "bandwidth"}, "result": {"bytes_per_second": 4250e9 / 2}}
    rows = [
        host,
        slow,
        timed(0.02, workload="W2", steps=60),
        timed(0.01, workload="W2", steps=60, flat=True),  # another program
        timed(0.04, "naive", workload="W2", steps=60),
        timed(0.03, workload="W1", cohort=256, width=256, digests=("b", "c")),
        {"cell": {"kind": "sweep", "workload": "W2", "runs": 10}}
        | {"result": {"measured_ms_per_client_step": {"median": 0.005}}},
        {"cell": {"kind": "naive", "workload": "W1"}, "error": "no answer within 9 s"},
    ]
    found = {goal["what"]: (goal["goal"], goal["measured"]) for goal in goals.reached(rows)}
    assert found["W2, own cohort, ms a client-step"] == (0.022, 0.02)  # half the bandwidth
    assert found["W2, over naive JAX"] == (1.0, 0.5)
    assert found["W2, over torch's graphs"] == (0.4, None)
    assert found["W1, 100 lanes or more, ms a client-step"] == (0.056, 0.03)
    assert found["W2, 100 lanes or more, ms a client-step"] == (2 * 0.0067, None)
    assert found["W2, a sweep of as many"] == (2 * 0.0067, 0.005)  # 10 runs x 10 clients
    assert found["W1, over naive JAX"][1] is None
    assert found["the paper's table, modelled from W1's steps, s"][1] == pytest.approx(405)
    assert found["programs with other bits the second time"] == (0, 1)
    said = [goals.in_words(goal) for goal in goals.reached(rows)]
    assert "W2, over naive JAX: 0.5, at most 1: reached" in said
    assert "W3, over naive JAX: at most 1; not measured" in said
    assert goals.reached(rows[1:]) == []  # a CPU has none


def test_a_goal_is_of_the_most_clients_and_of_one_commit():
    host = {"cell": {"kind": "environment"}, "result": {"device": {"platform": "gpu"}}}
    depths = [
        {"cell": {"kind": "mixed depths", "cohort": c}, "result": {"ratio_to_fedavg": ratio}}
        for c, ratio in ((100, 0.9), (25, 0.5))
    ]
    cell = {"workload": "W2", "steps": 60}
    tuned = {"flags": f"{GPU_KERNELS['tuned']}=true"}
    earlier = timed(1, digests=("a", "a"), **cell) | {"commit": "b"}
    rows = [host, *depths, earlier, timed(1, digests=("c", "c"), **cell, **tuned)]
    found = {goal["what"]: goal["measured"] for goal in goals.reached(rows)}
    assert found["FedLP-Hetero(1) over FedAvg, 100 clients"] == 0.9
    assert found["programs with other bits the second time"] == 0
    rows.append(timed(1, digests=("d", "d"), **cell))
    assert goals.reached(rows)[-1]["measured"] == 1


# A loop of two kernels, one of which slices a large array, and a call of another; a CPU's text.
_HLO = """HloModule rounds

%sliced (a: f32[100,8], i: s32[]) -> f32[1,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8]{1,0} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={1,8}
}

%called (x: f32[1,8], y: f32[8,8]) -> f32[1,8] {
  %x = f32[1,8]{1,0} parameter(0)
  %y = f32[8,8]{1,0} parameter(1)
  ROOT %product = (f32[1,8]{1,0}, s8[4096]{0}) custom-call(%x, %y), custom_call_target="gemm"
}

%body (carry: (s32[], f32[100,8], f32[8,8])) -> (s32[], f32[100,8], f32[8,8]) {
  %carry = (s32[], /*index=1*/f32[100,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%carry), index=0
  %all = f32[100,8]{1,0} get-tuple-element(%carry), index=1
  %w = f32[8,8]{1,0} get-tuple-element(%carry), index=2
  %row = f32[1,8]{1,0} fusion(%all, %n), kind=kLoop, calls=%sliced
  %call = (f32[1,8]{1,0}, s8[4096]{0}) call(%row, %w), to_apply=%called
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  ROOT %new = (s32[], f32[100,8]{1,0}, f32[8,8]{1,0}) tuple(%next, %all, %w)
}

%condition (carry.1: (s32[], f32[100,8], f32[8,8])) -> pred[] {
  %carry.1 = (s32[], f32[100,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %m = s32[] get-tuple-element(%carry.1), index=0
  %most = s32[] constant(5)
  ROOT %less = pred[] compare(%m, %most), direction=LT
}

ENTRY %main (start: (s32[], f32[100,8], f32[8,8])) -> (s32[], f32[100,8], f32[8,8]) {
  %start = (s32[], f32[100,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[100,8], f32[8,8]) while(%start), condition=%condition, body=%body
}
"""


def test_kernels_of_a_loop_and_their_bytes():
    found = kernels.step(_HLO)
    assert found.kernels == {"fusion": 1, "custom-call": 1, "add": 1}
    row, product, add = (32 + 4) + 32, (32 + 256) + 32, 12
    assert found.bytes == row + product + add
    assert sum(kernels.whole(_HLO).kernels.values()) == 4  # and the comparison
    with pytest.raises(ValueError, match="no loop"):
        kernels.step("HloModule m\n\nENTRY %main () -> s32[] {\n  ROOT %x = s32[] constant(0)\n}")


def test_kernels_pass_as_many_bytes_as_xla_counts(run):
    chosen = dataclasses.replace(smoke(WORKLOADS["W2"]), cohort=2)
    program = rounds_of(chosen, fl.Plan(devices=1, width=2)).run.program.round
    found = kernels.whole(program.as_text())
    assert found.bytes == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.02)


def test_kernels(run):
    found = run(kernels)["workloads"]["W2"]
    assert set(found) == {"ours", "naive"}
    for row in found.values():
        assert row["kernels_a_step"] == sum(row["kernels_by_kind"].values()) > 20
        # Parameters, gradients and momentum pass memory at least once each.
        assert row["bytes_a_client_step"] > 3 * 4 * 494_762


def test_a_cell_that_fails_is_a_sentence(run):
    answer = cells.answer({"kind": "rounds", "workload": "W2", "steps": 1, "cohort": 2, "width": 0})
    assert answer == {
        "error": "FedLPError: plan.width=0 must be a whole number of at least 1, or None."
    }


def test_other_contenders_are_timed_on_the_same_rounds(run):
    result = cells.naive("W2", 1, 2)
    assert is_spread(result["measured_ms_per_client_step"]) and result["compile_seconds"] > 0


def test_an_update_is_compared_with_that_of_a_cpu(run):
    assert cells.equality("W2", 1, 2)["difference"] < 1e-5
    with pytest.raises(ArithmeticError, match="by 0.5 of its length, and 0.01 is allowed"):
        cells.apart(np.float32([1, 0]), np.float32([2, 0]))


def test_seeds_side_by_side_are_timed(run, monkeypatch):
    monkeypatch.setitem(cells.WORKLOADS, "W2", smoke(WORKLOADS["W2"]))
    assert is_spread(cells.sweep("W2", 2, 1)["measured_ms_per_client_step"])


@pytest.mark.parametrize("levels", ["in_turn", "side_by_side"])
def test_mixed_depths_are_timed_beside_fedavg(run, levels):
    result = cells.mixed_depths(5, 1, levels, small=True)
    assert result["plan"]["levels"] == levels and result["ratio_to_fedavg"] > 0
    assert all(map(is_spread, result["measured_seconds"].values()))


def test_the_cells_that_other_commands_measure(run):
    assert cells.masked_mean("MLP", 4)["ours_of_copy"] > 0
    assert cells.bandwidth(smoke=True)["bytes_per_second"] > 0


def test_paper_finds_the_uploads_of_committed_cells_in_their_draws(run):
    cells = Path(__file__).parents[1] / "benchmarks/results/paper"
    result = run(paper, "--results", str(cells))
    assert [row["directory"] for row in result["exchange"]] == [
        "fedavg-d-niid-own-seed25",
        "fedavg-iid-own-seed25@h200",
    ]
    (row,) = result["targets"]
    assert (row["60%"]["round"], row["rounds"]) == (5, 200)
