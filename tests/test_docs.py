"""Every page beside the README does what it says."""

import ast
import glob
import gzip
import json
import operator
import pathlib
import re
import shlex
import shutil
import sys

import pytest
import typer.testing
import yaml
from test_readme import check_commands

import fedlp_jax as fl
from benchmarks import family
from fedlp_jax import cli
from fedlp_jax.config.loading import parse_config
from fedlp_jax.config.schema import ALGORITHMS
from fedlp_jax.execution import plan as plans

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "robustness.md").read_text()
TASKS = (ROOT / "docs" / "tasks.md").read_text()
SWEEPS = (ROOT / "docs" / "sweeps.md").read_text()
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
API = ROOT / "docs" / "api"
PAGES = [CONTRIBUTING, ROOT / "benchmarks" / "README.md", *(ROOT / "docs").rglob("*.md")]


# Pages whose blocks run one after the other, in one directory and one interpreter.
SCRIPTS = [
    "tutorial",
    "algorithms",
    "bring_your_own",
    "coming_from",
    "costs",
    "determinism",
    "python",
    "scaling",
]
ELSEWHERE = {"make", "source", "pip", "git"}  # commands that set up an environment


def blocks(language, page=PAGE):
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("python"))
def test_python_runs(block):
    if "privacy=" in block:
        pytest.importorskip("dp_accounting", reason="the extra `privacy` is not installed")
    names = {}
    exec(compile(block, "robustness.md", "exec"), names)
    history = names["result"].history
    key = "epsilon" if "privacy=" in block else "simulated_time"
    assert (history[key] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("python", SWEEPS))
def test_sweeps_run(block):
    names = {}
    exec(compile(block, "sweeps.md", "exec"), names)
    assert len(names["sweep"].runs) == 4


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("python", TASKS))
def test_python_of_other_tasks_runs(block, tmp_path, monkeypatch):
    roles = {f"play::{i}": ["Once more unto the breach, " * (40 + i)] for i in range(12)}
    (tmp_path / "roles.json.gz").write_bytes(gzip.compress(json.dumps(roles).encode()))
    monkeypatch.setenv("SHAKESPEARE_DIR", str(tmp_path))
    names = {}
    exec(compile(block, "tasks.md", "exec"), names)
    result = names["result"]
    assert result.history["train_loss"][-1] < result.history["train_loss"][0]
    if "masks.only" in block:
        table = dict(zip(result.layers.names, result.layers.params, strict=True))
        rounds, cohort = 20, 5
        assert result.costs.total["upload_params"] == rounds * cohort * table["lora"]
        start = names["fl"].simulate(
            names["algorithm"], names["data"], names["clients"], rounds=0, cohort=cohort
        )
        for layer, parts in start.variables["params"].items():
            for name, value in parts["base"].items():  # to the bit
                assert (result.variables["params"][layer]["base"][name] == value).all()


def test_the_table_of_a_language_task_is_the_measured_one():
    file = ROOT / "benchmarks" / "results" / "language.json"
    runs = json.loads(file.read_text())["runs"].values()
    one, other = ([row_of(test) for test in run["tests"]] for run in runs)
    for (turn, *fedavg), (_, *homo) in zip(one, other, strict=True):
        assert f"| {turn} | {' | '.join([*fedavg, *homo])} |" in TASKS


def row_of(test):
    accuracy = f"{test['test_accuracy']:.3f}".lstrip("0")
    sent = f"{test['upload_bytes'] / 1e6:.1f}"
    return test["round"], f"{test['test_loss']:.3f}, {accuracy}", sent


def test_the_configuration_of_a_language_task_is_valid():
    raw = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    (block,) = blocks("yaml", TASKS)
    whole = yaml.safe_load((ROOT / "configs" / "shakespeare.yaml").read_text())
    own = yaml.safe_load(block)
    config = parse_config(raw | own)
    assert config.task.padding == 0
    assert {k: own[k] for k in ("model", "task")} == {k: whole[k] for k in ("model", "task")}


def test_the_configuration_is_valid():
    raw = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    (block,) = blocks("yaml")
    config = parse_config(raw | yaml.safe_load(block))
    assert config.faults.corruption.kind == "sign_flip"
    section = re.search(r"`algorithm\.privacy: (\{.*\})`", PAGE)[1]
    raw["algorithm"]["privacy"] = yaml.safe_load(section)
    assert parse_config(raw).algorithm.privacy.delta == 1e-3


def test_the_table_of_algorithms_has_a_row_for_each():
    page = (ROOT / "docs" / "algorithms.md").read_text()
    first = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    named = re.findall(r"`(\w+)`", " ".join(first))
    assert sorted(named) == sorted(set(ALGORITHMS) - {"compose"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    for link in links:
        assert "://" in link or (page.parent / link).exists(), link


def test_the_table_of_warnings_is_complete_and_names_their_tests():
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split(" | ")]
        for line in (ROOT / "docs" / "warnings.md").read_text().splitlines()
        if "::test_" in line
    ]
    texts, given = [], []
    for path in (ROOT / "fedlp_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant | ast.JoinedStr):
                texts.append(text_of(node))
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("warn"):
                given.append(text_of(node.args[0]))
    for fragment, _, _, test in rows:
        assert any(fragment in text for text in texts), fragment
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / file).read_text(), test
    assert len(given) > 15
    for text in filter(None, given):
        assert any(row[0] in text for row in rows), text


def text_of(node):
    """A string, or the constant parts of an f-string; None for another expression."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value for part in node.values if isinstance(part, ast.Constant))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_examples_to_copy_have_at_most_sixty_lines():
    section = CONTRIBUTING.read_text().split("## Where does mine live?")[1].split("\n## ")[0]
    files = [link for link in re.findall(r"\]\(([^)#]+)\)", section) if link.endswith(".py")]
    assert len(files) > 10
    for file in files:
        assert len((ROOT / file).read_text().splitlines()) <= 60, file


def test_software_and_paper_can_be_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2303.06360"


def test_the_reference_shows_every_public_name_once():
    text = "\n".join(page.read_text() for page in API.glob("*.md"))
    shown = re.findall(
        r"^\.\. auto(?:function|class|exception):: fedlp_jax\.(\w+)$", text, re.MULTILINE
    )
    modules = dict(
        re.findall(r"^## fl\.(\w+)\n.*?automodule:: (\S+)$", text, re.MULTILINE | re.DOTALL)
    )
    assert {name: getattr(fl, name).__name__ for name in modules} == modules
    inside = [
        name for name in dir(fl) if getattr(getattr(fl, name), "__module__", "") in modules.values()
    ]
    assert sorted([*shown, *modules, *inside]) == [
        name for name in sorted(dir(fl)) if name[0] != "_"
    ]


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Where a reader would be: a clone of the repository, without its runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plans, "setup", lambda cpu_devices=None: None)  # jax is in use here
    for folder in ("configs", "docs"):
        shutil.copytree(ROOT / folder, folder, ignore=shutil.ignore_patterns("_build"))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_page_runs_from_top_to_bottom(name, directory):
    names = {}
    text = (ROOT / "docs" / f"{name}.md").read_text()
    found = re.findall(r"^```(python|yaml|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found
    for language, block in found:
        file = re.match(r"# (\w+\.(?:py|yaml))\n", block)
        if file:
            (directory / file[1]).write_text(block)
        elif language == "python":
            exec(compile(block, f"{name}.md", "exec"), names)
        elif language == "sh":
            for line in block.splitlines():
                run_line(line)


def run_line(line):
    """A line of a shell, if it is a command of ours."""
    line, _, target = line.split("#")[0].partition(" > ")
    words = shlex.split(line)
    if not words or words[0] in ELSEWHERE:
        return
    assert words[0] == "fedlp", line
    words = [path for word in words[1:] for path in sorted(glob.glob(word)) or [word]]
    result = typer.testing.CliRunner().invoke(cli.app, words, prog_name="fedlp")
    assert result.exit_code == 0, (line, result.output)
    if target:
        pathlib.Path(target.strip()).write_text(result.stdout)


def test_every_page_is_in_the_contents():
    entries = re.findall(r"^[\w/]+$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    pages = {str(p.relative_to(ROOT / "docs"))[:-3] for p in PAGES if ROOT / "docs" in p.parents}
    assert sorted(entries) == sorted(pages - {"index"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_names_exist(page):
    text = page.read_text()
    check_commands(text)
    for name in set(re.findall(r"\bfl\.([A-Za-z_]+(?:\.[A-Za-z_]+)?)", text)):
        operator.attrgetter(name)(fl)


def test_the_configuration_of_the_configuration_page_is_valid():
    (block,) = blocks("yaml", (ROOT / "docs" / "configuration.md").read_text())
    assert parse_config(yaml.safe_load(block)).rounds == 60


def test_what_one_brings_takes_at_most_thirty_lines():
    found = blocks("python", (ROOT / "docs" / "bring_your_own.md").read_text())
    assert len(found) == 5
    assert max(len(block.splitlines()) for block in found) <= 30


def test_the_table_of_the_family_is_the_measured_one():
    file = ROOT / "benchmarks" / "results" / "family.json"
    page = (ROOT / "docs" / "family.md").read_text()
    assert family.table(json.loads(file.read_text())["runs"]) in page
    resnet = json.loads(file.with_name("family_resnet.json").read_text())["runs"]
    for label, (run,) in resnet.items():
        tested = " | ".join(f"{accuracy:.3f}" for accuracy in run["test_accuracy"])
        assert f"| {label} | {tested} | {sum(run['upload_bytes']) / 1e6:.1f} |" in page


def test_the_tables_of_devices_are_the_measured_ones():
    page = (ROOT / "docs" / "scaling.md").read_text()
    results = ROOT / "benchmarks" / "results"
    found = json.loads((results / "devices.json").read_text())
    for row in found["cohort"][:-1] + found["sweep"]:
        work = row.get("clients") or row["runs"]
        cells = [row["kind"], row["devices"], work, f"{1e3 * row['seconds']['min']:.1f} ms"]
        cells.append(f"{row['speedup']:.2f}")
        if "predicted_seconds" in row:
            cells.append(f"{1e3 * row['predicted_seconds']:.1f} ms")
            cells.append(f"{row['predicted_to_measured']:.2f}")
        assert f"| {' | '.join(map(str, cells))} |" in page
    for row in json.loads((results / "devices_memory.json").read_text())["memory"]:
        sizes = (row["predicted_bytes"], row["measured_bytes"])
        cells = [row["width"], row["devices"], *(f"{size / 1e6:.1f} MB" for size in sizes)]
        assert f"| {' | '.join(map(str, cells))} |" in page
