"""A user's own table of convolutions: measured, written, preferred, and never misread."""

import json
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from typer.testing import CliRunner

import fedlp_jax as fl
from fedlp_jax import cli
from fedlp_jax.config import tuning_conv
from fedlp_jax.execution import map_clients as placement
from fedlp_jax.nn import conv
from fedlp_jax.nn.conv import measure, table
from fedlp_jax.nn.conv.lowering import FORMS, Convolution
from fedlp_jax.nn.conv.window import Window

SHAPES = "10x32x32x32 * 3x3x32x32"
ENTRY = {SHAPES: {"patches": 2.0, "winograd_1x4": 1.0}}
SAME = Window((1, 1), ((1, 1), (1, 1)), (1, 1))


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "mine.json"
    monkeypatch.setenv(table.VARIABLE, str(path))
    return path


def chosen(lhs=(10, 32, 32, 32), rhs=(3, 3, 32, 32), dtype=jnp.float32):
    with conv.recording() as found:
        jax.eval_shape(  # of a function that jax has not traced before
            lambda x, w: conv.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            jnp.zeros(lhs, dtype),
            jnp.zeros(rhs, dtype),
        )
    (form,) = found.values()
    return form


def test_a_table_of_ones_own_goes_before_the_packages(file):
    with pytest.warns(UserWarning, match=r"names .*mine.json, which does not exist"):
        assert chosen() == "winograd_4x4"
    table.write(file, ENTRY, FORMS)
    assert chosen() == "winograd_1x4"
    assert chosen(dtype=jnp.bfloat16) == "patches"  # which was not measured
    assert chosen((10, 32, 32, 64), (3, 3, 64, 64)) != "patches"  # another shape: as committed
    table.write(file, {"10x32x32x32 * 5x5x32x32": {"patches": 1.0, "winograd_1x4": 0.5}}, FORMS)
    assert chosen(rhs=(5, 5, 32, 32)) == "winograd_1x4"  # kernels that the package did not measure
    assert chosen() == "winograd_1x4"  # and what was there stays
    table.write(file, {SHAPES: {"patches": 1.0, "winograd_1x4": 0.95}}, FORMS)
    assert chosen() == "patches"  # nearly as quick, and compiles sooner


def test_none_is_looked_for_where_the_variable_is_empty(file, monkeypatch):
    table.write(file, ENTRY, FORMS)
    monkeypatch.setenv(table.VARIABLE, "")
    assert table.path() is None and chosen() == "winograd_4x4"


def test_it_is_in_the_cache_directory(file, monkeypatch, tmp_path):
    monkeypatch.delenv(table.VARIABLE)
    monkeypatch.setenv("FEDLP_CACHE_DIR", str(tmp_path / "cache"))
    assert table.path() == tmp_path / "cache" / "convolutions.json"
    assert chosen() == "winograd_4x4"  # and none there is no news
    table.write(table.path(), ENTRY, FORMS)
    assert chosen() == "winograd_1x4"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("[]", "no table of the format 'fedlp_jax convolutions 1'"),
        ('{"backends": {"cpu": []}}', "no table of the format"),
        ('{"format": "fedlp_jax convolutions 2", "devices": {}}', "no table of the format"),
        ('{"format": "fedlp_jax convolutions 1"}', "KeyError: 'devices'"),
        ('{"format": "fedlp_jax convolutions 1", "devices": {"cpu": [1]}}', "list"),
        ({SHAPES: {"fft": 1.0}}, "form 'fft' is unknown"),
        ({SHAPES: {"patches": -1.0}}, "a time is -1.0"),
        ({SHAPES: {"patches": None}}, "a time is None"),
        ({SHAPES: {}}, "no times"),
        (b"\xff\xfe", "utf-8"),
    ],
    ids=range(11),
)
def test_what_is_no_table_is_left_out_with_a_warning(file, text, reason):
    if isinstance(text, dict):
        devices = {table.device(): text}
        text = json.dumps({"format": "fedlp_jax convolutions 1", "devices": devices})
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(UserWarning, match="is left out") as said:
        assert chosen() == "winograd_4x4"
    (warning,) = said
    assert reason in str(warning.message) and "measure again" in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen()  # it is said once
    with pytest.warns(UserWarning, match="is left out"):
        table.write(file, ENTRY, FORMS)
    assert chosen() == "winograd_1x4"


def test_times_of_another_processor_are_not_taken(file, monkeypatch):
    monkeypatch.setattr(table, "device", lambda: "cpu Another")
    table.write(file, ENTRY, FORMS)
    monkeypatch.undo()
    assert table.device().startswith("cpu ") and table.device() != "cpu Another"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(table.VARIABLE, str(file))
        assert chosen() == "winograd_4x4"
        table.write(file, ENTRY, FORMS)
        assert chosen() == "winograd_1x4"
    assert len(json.loads(file.read_text())["devices"]) == 2


def test_forms_are_measured_where_they_can_compute():
    small = Convolution((2, 4, 4, 3), (3, 3, 3, 5), SAME)
    assert measure.forms_of(small) == list(measure.FORMS)
    strided = Convolution((2, 4, 4, 3), (3, 3, 3, 5), SAME._replace(strides=(2, 2)))
    assert measure.forms_of(strided) == ["patches"]
    times = measure.measure(small, ("patches", "winograd_1x2"), repeats=2, seconds=1e-6)
    assert set(times) == {"patches", "winograd_1x2"} and min(times.values()) > 0
    many = measure.measure(small, ("patches", "winograd_2x2"), repeats=1, seconds=1e-6, width=3)
    assert set(many) == {"patches", "winograd_2x2"} and min(many.values()) > 0


def arguments(model, shape=(8, 8, 3)):
    data = fl.load("synthetic", examples=24, shape=shape, num_classes=4, seed=0)
    algorithm = fl.fedavg(fl.classification(model), client_optimizer=optax.sgd(0.1), batch_size=2)
    clients = fl.partition.iid(data.train.labels, clients=4, seed=0)
    return {
        "algorithm": algorithm,
        "data": data,
        "clients": clients,
        "cohort": 2,
        "rounds": 2,
        "plan": fl.Plan(1, 1),
    }


def test_the_convolutions_of_a_model_are_measured_and_taken(file):
    file.write_text('{"format": "fedlp_jax convolutions 1", "devices": {}}')
    given = arguments(fl.models.FedLPCNN(num_classes=4))
    said = []

    def clock(convolution, forms, width):
        assert "patches" in forms and len(forms) > 1
        return {form: 1.0 if form == "winograd_2x2" else 2.0 for form in forms}

    found = tuning_conv.tune_convolutions(given, file, say=said.append, clock=clock)
    assert said == found and [m.shapes for m in found][:2] == [
        "2x8x8x3 * 3x3x3x32",
        "2x8x8x32 * 3x3x32x32",
    ]
    assert {m.now for m in found} == {"winograd_2x2"}
    result = fl.simulate(**given)
    taken = {m.shapes: result.lowerings[m.shapes] for m in found}
    assert set(taken.values()) == {"winograd_2x2"}


def test_time_ends_the_measuring_and_nothing_is_written_unless_it_is_wanted(file):
    file.write_text('{"format": "fedlp_jax convolutions 1", "devices": {}}')
    before = file.read_text()
    given = arguments(fl.models.FedLPCNN(num_classes=4))
    found = tuning_conv.tune_convolutions(
        given, None, seconds=1e-9, clock=lambda _, forms, width: dict.fromkeys(forms, 1.0)
    )
    assert len(found) == 1 and found[0].now == "patches" and file.read_text() == before


def test_models_without_convolutions_are_told(file):
    file.write_text('{"format": "fedlp_jax convolutions 1", "devices": {}}')
    given = arguments(fl.models.Logistic(num_classes=4))
    with pytest.raises(fl.FedLPError, match="this model has no convolutions to measure"):
        tuning_conv.tune_convolutions(given, file)
    with pytest.raises(fl.FedLPError, match="seconds=0 must be a positive number"):
        tuning_conv.tune_convolutions(given, file, seconds=0)
    given = arguments(fl.models.FedLPCNN(num_classes=4))
    with pytest.raises(fl.FedLPError, match="cannot be written .* name another place with FEDLP"):
        tuning_conv.tune_convolutions(
            given, file / "below", clock=lambda _, forms, width: dict.fromkeys(forms, 1.0)
        )


CONFIG = """\
data: {name: digits}
partition: {name: iid, clients: 100}
model: {name: mnist_cnn}
algorithm: {name: fedavg, batch_size: 5, client_optimizer: {name: sgd, learning_rate: 0.1}}
rounds: 1
cohort: 2
plan: {devices: 1}
"""


def test_the_command_and_the_summary(file, tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "setup", lambda cpu_devices=None: None)  # jax is in use here
    monkeypatch.setattr("fedlp_jax.execution.compilation.keep_programs", lambda: None)
    monkeypatch.setattr(
        tuning_conv.tune_convolutions,
        "__defaults__",
        (120.0, lambda _: None, lambda _, forms, width: {f: 1.0 + len(f) for f in forms}),
    )
    file.write_text('{"format": "fedlp_jax convolutions 1", "devices": {}}')
    config = tmp_path / "mine.yaml"
    config.write_text(CONFIG.replace("mnist_cnn", "fedlp_cnn"))

    def invoke(*words):
        return CliRunner().invoke(cli.app, ["tune", str(config), "--convolutions", *words])

    done = invoke("--dry-run")
    assert done.exit_code == 0 and "Nothing is written" in done.output, done.output
    assert "5x8x8x1 * 3x3x1x32: patches (was" in done.output
    assert not json.loads(file.read_text())["devices"]
    done = invoke()
    assert done.exit_code == 0 and f"choose by {file}" in done.output.replace("\n", "")
    assert "5x8x8x1 * 3x3x1x32" in json.loads(file.read_text())["devices"][table.device()]
    assert config.read_text() == CONFIG.replace("mnist_cnn", "fedlp_cnn")
    monkeypatch.setenv(table.VARIABLE, "")
    assert invoke().exit_code == 2

    fl.run(config, out=tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["lowerings"]["5x8x8x1 * 3x3x1x32"] in FORMS
