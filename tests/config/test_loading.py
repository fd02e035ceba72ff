"""Files: YAML 1.2, extends, overrides, the resolved file, and a plan written back."""

from pathlib import Path

import pytest

import fedlp_jax as fl
from fedlp_jax.config.loading import dump_config, load_config, parse_value, write_plan
from fedlp_jax.errors import FedLPError

CONFIGS = Path(__file__).parents[2] / "configs"
HOMO = """\
data: {name: digits}
partition: {name: iid, clients: 100}
model: {name: mlp, hidden: [64]}
algorithm:
  name: fedlp_homo
  keep: 0.5
  client_optimizer: {name: sgd, learning_rate: 0.1}
rounds: 10
cohort: 10
"""


@pytest.fixture
def write(tmp_path):
    """Writes files into a folder configs and returns the path of the last one."""

    def write(**files):
        for name, text in files.items():
            path = tmp_path / "configs" / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1_000", 1000),
        ("0x1f", 31),
        ("1e-3", 0.001),
        ("1E+2", 100.0),
        ("1.", 1.0),
        ("010", 10),  # eight in YAML 1.1
        ("1:30", "1:30"),  # ninety there
        ("yes", "yes"),  # true there
        ("true", True),
        ("", None),
        ("[1, a]", [1, "a"]),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
    ],
)
def test_values_are_what_they_look_like(text, value):
    parsed = parse_value(text)
    assert (parsed, type(parsed)) == (value, type(value))


def test_a_resolved_config_reads_back_equal(write):
    overrides = {
        "algorithm.server_optimizer": {"name": "adam", "learning_rate": 1e-5},
        "algorithm.layers": {"dense_[01]": "bottom", "010": "1e3"},
        "algorithm.keep": {"bottom": 0.25},
        "cohort": 0.25,
        "data.options": {"train_split": "train[:50%]"},
    }
    config = load_config(write(homo=HOMO), overrides)
    again = load_config(write(resolved=dump_config(config)))
    assert again == config
    assert again.name == "homo"  # and not "resolved"


# extends and overrides


def test_a_file_wins_over_its_parents_and_later_parents_over_earlier(write):
    path = write(
        base=HOMO + "seed: 1\nname: base\n",
        long="rounds: 50\nseed: 2\n",
        child="extends: [base.yaml, long.yaml]\nalgorithm: {keep: 0.9}\n",
    )
    config = load_config(path)
    assert (config.seed, config.rounds, config.algorithm.keep) == (2, 50, 0.9)
    assert config.algorithm.client_optimizer.learning_rate == 0.1  # merged, not replaced
    assert config.name == "child"  # a name is not inherited


def test_extends_goes_through_chains_and_up_to_the_configs_folder(write):
    path = write(
        base=HOMO,
        paper__middle="extends: ../base.yaml\nseed: 7\n",
        paper__rows__leaf="extends: ../middle.yaml\nrounds: 3\n",
    )
    config = load_config(path)
    assert (config.seed, config.rounds, config.cohort) == (7, 3, 10)


def test_one_parent_may_be_reached_twice(write):
    path = write(
        base=HOMO,
        a="extends: base.yaml\nseed: 1\n",
        b="extends: base.yaml\nrounds: 3\n",
        child="extends: [a.yaml, b.yaml]\n",
    )
    assert load_config(path).rounds == 3


def test_a_new_kind_loses_the_fields_that_only_the_old_one_has(write):
    path = write(
        base=HOMO.replace("digits", "synthetic, options: {examples: 10}"),
        child="""\
extends: base.yaml
data: {name: digits}
model: {name: logistic}
partition: {name: dirichlet, alpha: 1}
algorithm: {name: fedavg, client_optimizer: {name: adam}}
""",
    )
    config = load_config(path)
    assert config.data.options == {}
    assert config.partition.clients == 100  # both kinds have it
    assert config.algorithm.client_optimizer.learning_rate == 0.1
    assert not hasattr(config.algorithm, "keep")
    assert not hasattr(config.model, "hidden")


def test_a_slip_in_the_base_is_still_refused(write):
    path = write(
        base=HOMO.replace("keep: 0.5", "kepe: 0.5"),
        child="extends: base.yaml\nalgorithm: {name: fedavg}\n",
    )
    with pytest.raises(FedLPError, match="'kepe' is not a field"):
        load_config(path)


def test_lists_and_layer_rules_are_replaced_as_a_whole(write):
    path = write(
        base=HOMO.replace("keep: 0.5", "keep: {a: 0.5}\n  layers: {a: x, b: y}"),
        child="extends: base.yaml\nalgorithm: {layers: {c: z}, keep: {c: 1}}\nmodel: {hidden: [5]}",
    )
    config = load_config(path)
    assert config.algorithm.layers == {"c": "z"}
    assert config.algorithm.keep == {"c": 1.0}
    assert config.model.hidden == (5,)


def test_overrides_merge_like_a_last_child(write):
    config = load_config(
        write(homo=HOMO),
        {
            "algorithm.name": "fedavg",
            "algorithm.client_optimizer.learning_rate": 0.5,
            "faults.dropout": 0.3,
            "algorithm.aggregator.name": "median",
        },
    )
    assert config.algorithm.name == "fedavg"
    assert config.algorithm.client_optimizer.learning_rate == 0.5
    assert config.algorithm.client_optimizer.name == "sgd"
    assert config.faults.dropout == 0.3
    assert config.algorithm.aggregator == {"name": "median"}


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a": "extends: a.yaml"}, "a.yaml extends itself"),
        ({"b": "extends: a.yaml", "a": "extends: b.yaml"}, "extends itself, through b.yaml."),
        ({"a": "extends: ../outside.yaml"}, "extends ../outside.yaml, which is outside"),
        ({"a": "extends: /etc/passwd"}, "extends /etc/passwd, which is outside"),
        ({"a": "extends: nobody.yaml"}, "extends nobody.yaml, which is no file of"),
        ({"base": HOMO, "a": "extends: bse.yaml"}, "did you mean 'base.yaml'?"),
        ({"a": "extends: 3"}, "extends must be a file name or a list of them (got 3)."),
        ({"a": ""}, "a.yaml holds None, not fields and values; start from"),
        ({"a": "- 1\n- 2\n"}, "a.yaml holds [1, 2], not fields and values"),
        ({"a": "rounds: 1\nseed: 2\nrounds: 3\n"}, 'line 3: found duplicate key "rounds"'),
        ({"a": "rounds: [1\n"}, "a.yaml is not valid YAML: line 2"),
        ({"a": "1: 2\n"}, "'1' is not a field of a configuration"),
        ({"a": HOMO + "algorithm.keep: 1"}, "'algorithm.keep' is not a field"),
        ({"a": "a: !!python/object/apply:os.getcwd []"}, "could not determine a constructor"),
        ({"a": "when: 2024-99-99"}, "is not valid YAML"),
        ({"a": "[" * 100_000}, "is not valid YAML"),
        ({"a": f"a: {'x' * 1_100_000}"}, "cannot be read"),
    ],
)
def test_refuses_broken_files(write, files, sentence):
    with pytest.raises(FedLPError) as error:
        load_config(write(**files))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_link_does_not_lead_outside_either(write, tmp_path):
    (tmp_path / "secret.yaml").write_text("seed: 1")
    path = write(a=HOMO + "extends: link.yaml\n")
    (path.parent / "link.yaml").symlink_to(tmp_path / "secret.yaml")
    with pytest.raises(FedLPError, match="outside"):
        load_config(path)


def test_every_sentence_names_the_file(write):
    path = write(homo=HOMO)
    with pytest.raises(FedLPError) as error:
        load_config(path, {"rounds": -1, "algorithm.keep": "x"})
    assert all(line.startswith(f"{path}: ") for line in str(error.value).splitlines())
    with pytest.raises(FedLPError, match="write it as in --algorithm"):
        load_config(path, {"algorithm..keep": 1})


def test_a_path_may_start_at_home(write, tmp_path, monkeypatch):
    write(homo=HOMO)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config("~/configs/homo.yaml").name == "homo"


# a plan written back


def test_a_plan_is_written_and_the_rest_of_the_file_stays(write):
    text = f"# The quickstart.\n{HOMO}seed: 0x2  # two\nplan:\n  width: 8  # slow\n"
    path = write(homo=text)
    before = load_config(path)
    write_plan(path, fl.Plan(devices=2, width=3))
    after = load_config(path)
    assert (after.plan.devices, after.plan.width) == (2, 3)
    assert after.model_copy(update={"plan": before.plan}) == before
    written = path.read_text()
    assert written.startswith("# The quickstart.\n") and "# two" in written
    assert {*text.splitlines()} - {*written.splitlines()} <= {"  width: 8  # slow"}


@pytest.mark.parametrize("path", ["quickstart.yaml", "paper/homo-0.5-iid.yaml"])
def test_a_file_without_a_plan_gets_one(path, tmp_path):
    copy = tmp_path / "configs" / path
    for original in (CONFIGS / path, *(CONFIGS / "paper").glob("*")):
        target = tmp_path / "configs" / original.relative_to(CONFIGS)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(original.read_bytes())
    write_plan(copy, fl.Plan(width=3))
    assert load_config(copy).plan.width == 3
    assert copy.read_text() == (CONFIGS / path).read_text() + "plan:\n  width: 3\n"
