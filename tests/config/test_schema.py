import pytest
import yaml

from fedlp_jax.config.schema import dump_config, load_config, parse_config
from fedlp_jax.errors import FedLPError

HOMO = {
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 100},
    "model": {"name": "mlp", "hidden": [64]},
    "algorithm": {
        "name": "fedlp_homo",
        "keep": 0.5,
        "client_optimizer": {"name": "sgd", "learning_rate": 0.1},
    },
    "rounds": 10,
    "cohort": 10,
}


@pytest.fixture
def write(tmp_path):
    """Writes files of a configs folder and gives back the path of the last one."""

    def write(**files):
        folder = tmp_path / "configs"
        for name, content in files.items():
            path = folder / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def test_reads_all_fields_with_defaults(write):
    config = load_config(write(homo=HOMO))
    assert config.name == "homo"  # the stem of the file
    assert config.seed == 0
    assert config.model.hidden == (64,)
    assert config.algorithm.keep == 0.5
    assert config.algorithm.client_optimizer.momentum == 0.0
    assert config.partition.seed is None
    assert config.plan.devices is None


def test_is_frozen(write):
    config = load_config(write(homo=HOMO))
    with pytest.raises(ValueError, match="frozen"):
        config.rounds = 3


def test_a_resolved_config_reads_back_equal(write):
    overrides = {
        "algorithm.server_optimizer": {"name": "adam", "learning_rate": 1e-5},
        "algorithm.layers": {"dense_[01]": "bottom"},
        "algorithm.keep": {"bottom": 0.25},
        "cohort": 0.25,
        "data.options": {"train_split": "train[:50%]"},
    }
    config = load_config(write(homo=HOMO), overrides)
    again = load_config(write(resolved=dump_config(config)))
    assert again == config
    assert again.name == "homo"  # and not "resolved"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        # values
        ({"algorithm.keep": 1.5}, "algorithm.keep is 1.5, but must be a number >= 0 and <= 1."),
        ({"algorithm.keep": "half"}, "algorithm.keep is 'half', but must be a number >= 0 and"),
        ({"algorithm.keep": [0.5, 2]}, "algorithm.keep[1] is 2, but must be a number"),
        ({"algorithm.keep": float("nan")}, "algorithm.keep is nan, but must be a number"),
        ({"algorithm.keep": []}, "algorithm.keep is [], but must have 1 or more entries."),
        ({"rounds": -1}, "rounds is -1, but must be a whole number >= 0."),
        ({"rounds": 2.5}, "rounds is 2.5, but must be a whole number >= 0."),
        ({"rounds": True}, "rounds is True, but must be a whole number >= 0."),
        ({"rounds": float("inf")}, "rounds is inf, but must be a whole number"),
        ({"seed": 2**32}, "seed is 4294967296, but must be a whole number from 0 to 4294967295."),
        ({"cohort": 0}, "cohort is 0, but must be a whole number of clients >= 1, or a share"),
        ({"cohort": -0.5}, "cohort is -0.5, but must be a whole number of clients >= 1, or"),
        ({"cohort": 101}, "cohort is 101, but there are only 100 clients; lower cohort or raise"),
        ({"eval_every": 0}, "eval_every is 0, but must be a whole number >= 1."),
        ({"model.hidden": 64}, "model.hidden is 64, but must be a list."),
        ({"model.hidden": [64, 0]}, "model.hidden[1] is 0, but must be a whole number >= 1."),
        ({"name": "a/b"}, "name is 'a/b', but must be usable as the name of a folder."),
        ({"name": ".."}, "name is '..', but must be usable as the name of a folder."),
        ({"data.name": 5}, "data.name is 5, but must be text."),
        ({"partition.clients": "many"}, "partition.clients is 'many', but must be a whole number"),
        ({"plan.devices": 0}, "plan.devices is 0, but must be a whole number >= 1."),
        (
            {"algorithm.client_optimizer.momentum": 1},
            "algorithm.client_optimizer.momentum is 1, but must be a number >= 0 and below 1.",
        ),
        (
            {"algorithm.client_optimizer.learning_rate": "{x}"},
            "algorithm.client_optimizer.learning_rate is '{x}', but must be a number >= 0.",
        ),
        (
            {"algorithm.client_optimizer.nesterov": 1},
            "algorithm.client_optimizer.nesterov is 1, but must be true or false.",
        ),
        (
            {"algorithm.weighting": "exmples"},
            "algorithm.weighting is 'exmples', but must be examples or uniform; did you mean "
            "'examples'?",
        ),
        ({"algorithm.layers": {}}, "algorithm.layers is {}, but must map regular expressions"),
        ({"algorithm.layers": "by_modul"}, "by_module or by_tensor; did you mean 'by_module'?"),
        (
            {"algorithm.epochs": 1, "algorithm.steps": 3},
            "algorithm has 1 epochs and 3 steps, but takes only one of them; set the other to",
        ),
        # kinds
        ({"algorithm.name": "fedlp-homo"}, "'fedlp-homo', which is not known; did you mean 'fedlp"),
        (
            {"model.name": "vit"},
            "model.name is 'vit', which is not known: it may be fedlp_cnn, mnist_cnn, mlp, resnet "
            "or logistic.",
        ),
        ({"model": "mlp"}, "model is 'mlp', but must be a section with fields of its own; to"),
        ({"plan": 3}, "plan is 3, but must be a section with fields of its own."),
        ({"algorithm.server_optimizer": {}}, "algorithm.server_optimizer.name is missing: it may"),
        ({"partition.name": "dirichlet"}, "partition.alpha is missing."),
        ({"algorithm.name": "fedlp_hetero"}, "algorithm.depths is missing."),
        (
            {"algorithm.name": "fedlp_hetero", "algorithm.depths": 7},
            "algorithm.depths is 7, but must be 1 to 5",
        ),
        # fields
        ({"roundz": 3}, "roundz is not a field of a configuration; did you mean 'rounds'?"),
        ({"keep": 0.5}, "keep is not a field of a configuration; did you mean 'algorithm.keep'?"),
        (
            {"algorithm.kep": 1},
            "algorithm.kep is not a field of 'fedlp_homo'; did you mean 'keep'?",
        ),
        ({"partition.alpha": 1}, "partition.alpha is not a field of 'iid', only of dirichlet or"),
        ({"partition.iid": 3}, "partition.iid is not a field of 'iid': it has name, clients and"),
        ({"plan.device": 2}, "plan.device is not a field of section plan; did you mean 'devices'?"),
        ({"extends": "x.yaml"}, "extends is not a field of a configuration: it has name, seed,"),
        ({"algorithm..keep": 1}, "'algorithm..keep' is not a field"),
    ],
)
def test_refuses_in_one_sentence(write, overrides, sentence):
    with pytest.raises(FedLPError) as error:
        load_config(write(homo=HOMO), overrides)
    said = str(error.value)
    assert sentence in said
    assert "\n" not in said
    assert "pydantic" not in said and "http" not in said


def test_says_every_problem(write):
    path = write(homo=HOMO)
    with pytest.raises(FedLPError) as error:
        load_config(path, {"rounds": -1, "algorithm.keep": 2, "colour": "red"})
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{path}: ") for line in lines)


@pytest.mark.parametrize("missing", ["data", "partition", "model", "algorithm", "rounds", "cohort"])
def test_names_what_is_missing(missing):
    with pytest.raises(FedLPError, match=rf"^{missing} is missing\.$"):
        parse_config({k: v for k, v in HOMO.items() if k != missing})


def test_cohort_may_be_a_share():
    assert parse_config(HOMO | {"cohort": 0.1}).cohort == 0.1
    assert parse_config(HOMO | {"cohort": 10.0}).cohort == 10


def test_the_natural_partition_has_no_number_of_clients():
    config = parse_config(HOMO | {"partition": {"name": "natural"}, "cohort": 1000})
    assert config.cohort == 1000


# extends


def test_a_file_wins_over_its_parents_and_later_parents_over_earlier(write):
    path = write(
        base=HOMO | {"seed": 1, "name": "base"},
        long={"rounds": 50, "seed": 2},
        child={"extends": ["base.yaml", "long.yaml"], "algorithm": {"keep": 0.9}},
    )
    config = load_config(path)
    assert (config.seed, config.rounds, config.algorithm.keep) == (2, 50, 0.9)
    assert config.algorithm.client_optimizer.learning_rate == 0.1  # merged, not replaced
    assert config.name == "child"  # a name is not inherited


def test_extends_goes_through_chains_and_up_to_the_configs_folder(write):
    path = write(
        base=HOMO,
        paper__middle={"extends": "../base.yaml", "seed": 7},
        paper__rows__leaf={"extends": "../middle.yaml", "rounds": 3},
    )
    config = load_config(path)
    assert (config.seed, config.rounds, config.cohort) == (7, 3, 10)


def test_one_parent_may_be_reached_twice(write):
    path = write(
        base=HOMO,
        a={"extends": "base.yaml", "seed": 1},
        b={"extends": "base.yaml", "rounds": 3},
        child={"extends": ["a.yaml", "b.yaml"]},
    )
    assert load_config(path).rounds == 3


def test_a_new_kind_leaves_behind_what_only_the_old_one_has(write):
    path = write(
        base=HOMO | {"data": {"name": "synthetic", "options": {"examples": 10}}},
        child={
            "extends": "base.yaml",
            "data": {"name": "digits"},
            "model": {"name": "logistic"},
            "partition": {"name": "dirichlet", "alpha": 1},
            "algorithm": {
                "name": "fedavg",
                "client_optimizer": {"name": "adam"},
            },
        },
    )
    config = load_config(path)
    assert config.data.options == {}
    assert config.partition.clients == 100  # both kinds have it
    assert config.algorithm.client_optimizer.learning_rate == 0.1
    assert not hasattr(config.algorithm, "keep")
    assert not hasattr(config.model, "hidden")


def test_a_slip_in_the_base_is_not_left_behind_silently(write):
    base = HOMO | {"algorithm": HOMO["algorithm"] | {"kepe": 0.5}}
    path = write(base=base, child={"extends": "base.yaml", "algorithm": {"name": "fedavg"}})
    with pytest.raises(FedLPError, match="algorithm.kepe is not a field"):
        load_config(path)


def test_lists_and_layer_rules_are_replaced_as_a_whole(write):
    algorithm = HOMO["algorithm"] | {"layers": {"a": "x", "b": "y"}}
    path = write(
        base=HOMO | {"algorithm": algorithm, "model": {"name": "mlp", "hidden": [3, 4]}},
        child={
            "extends": "base.yaml",
            "algorithm": {"layers": {"c": "z"}},
            "model": {"hidden": [5]},
        },
    )
    config = load_config(path)
    assert config.algorithm.layers == {"c": "z"}
    assert config.model.hidden == (5,)


def test_overrides_merge_like_a_last_child(write):
    config = load_config(
        write(homo=HOMO),
        {"algorithm.name": "fedavg", "algorithm.client_optimizer.learning_rate": 0.5, "rounds": 1},
    )
    assert config.algorithm.name == "fedavg"
    assert config.algorithm.client_optimizer.learning_rate == 0.5
    assert config.algorithm.client_optimizer.name == "sgd"


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a": {"extends": "a.yaml"}}, "extends itself: a.yaml -> a.yaml."),
        (
            {"b": {"extends": "a.yaml"}, "a": {"extends": "b.yaml"}},
            "extends itself: a.yaml -> b.yaml -> a.yaml.",
        ),
        ({"a": {"extends": "../outside.yaml"}}, "extends ../outside.yaml, which is outside"),
        ({"a": {"extends": "/etc/passwd"}}, "extends /etc/passwd, which is outside"),
        ({"a": {"extends": "nobody.yaml"}}, "nobody.yaml does not exist."),
        ({"base": HOMO, "a": {"extends": "bse.yaml"}}, "base.yaml'?"),
        ({"a": {"extends": 3}}, "extends is 3, but must be a file name or a list of them."),
        ({"a": ""}, "a.yaml is empty; configs/quickstart.yaml is one to start from."),
        ({"a": "- 1\n- 2\n"}, "a.yaml holds a list, but must hold fields and values."),
        ({"a": "rounds: 1\nseed: 2\nrounds: 3\n"}, "line 3 is not valid YAML: the key 'rounds' is"),
        ({"a": "plan: {width: 1, width: 2}"}, "the key 'width' is given twice."),
        ({"a": "rounds: [1\n"}, "a.yaml, line 2 is not valid YAML"),
        ({"a": "1: 2"}, "the key 1 is not text."),
        ({"a": yaml.safe_dump(HOMO | {"algorithm.keep": 1})}, "nest it in a file."),
        ({"a": yaml.safe_dump(HOMO | {"foo.bar": 1})}, "'foo.bar' is written with dots"),
        ({"a": "a: !!python/object/apply:os.getcwd []"}, "is not valid YAML: could not determine"),
        ({"a": "when: 2024-99-99"}, "is not valid YAML"),
    ],
)
def test_refuses_broken_files(write, files, sentence):
    with pytest.raises(FedLPError) as error:
        load_config(write(**files))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_link_leads_nowhere_outside_either(write, tmp_path):
    (tmp_path / "secret.yaml").write_text("seed: 1")
    path = write(a=HOMO | {"extends": "link.yaml"})
    (path.parent / "link.yaml").symlink_to(tmp_path / "secret.yaml")
    with pytest.raises(FedLPError, match="outside"):
        load_config(path)


def test_refuses_what_is_no_text_file(tmp_path):
    with pytest.raises(FedLPError, match="cannot be read as a text file"):
        load_config(tmp_path)
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FedLPError, match="cannot be read as a text file"):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(FedLPError, match="nor does the folder"):
        load_config(tmp_path / "nowhere" / "a.yaml")


@pytest.mark.parametrize(("written", "read"), [("1e-3", 1e-3), ("1E+2", 100.0), (".5e1", 5.0)])
def test_numbers_with_an_exponent_are_numbers(write, written, read):
    text = yaml.safe_dump(HOMO).replace("learning_rate: 0.1", f"learning_rate: {written}")
    assert load_config(write(homo=text)).algorithm.client_optimizer.learning_rate == read


def test_merge_keys_of_yaml_still_work(write):
    text = yaml.safe_dump(HOMO) + "plan: &p {width: 2}\n"
    assert load_config(write(homo=text + "eval_every: 3\n")).plan.width == 2
    text = text.replace("plan: &p", "plan: {<<: &p").replace("width: 2}", "width: 2}, devices: 3}")
    assert load_config(write(homo=text)).plan.devices == 3
