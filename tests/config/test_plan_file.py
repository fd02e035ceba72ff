"""A plan is put into a file, and every other byte of it stays."""

import pathlib
import shutil
import stat

import pytest

import fedlp_jax as fl
from fedlp_jax.config.plan_file import check_writable, write_plan

REST = """\
# The quickstart.
data: {name: digits}   # embedded
partition: {name: iid, clients: 10}
model: {name: logistic}
algorithm: {name: fedavg, batch_size: 1_0, client_optimizer: {name: sgd, learning_rate: 1e-1}}

rounds: 0x2
cohort: 4"""
PLAN = fl.Plan(devices=2, width=3)
PARENT = REST + "\nplan: {devices: 1}\n"
FLOW = (
    "{data: {name: digits}, partition: {name: iid, clients: 10}, model: {name: logistic}, "
    "rounds: 2, cohort: 4, algorithm: {name: fedavg, client_optimizer: {name: sgd, "
    "learning_rate: 0.1}}%s}"
)
CASES = {
    "none": (f"{REST}\n", f"{REST}\nBLOCK"),
    "no newline at the end": (REST, f"{REST}\n\nplan:\n  devices: 2\n  width: 3\n"),
    "a block": (
        f"plan:\n  # of a day in May\n  devices: 1  # slow\n\n  width: 8 # ok\n{REST}\n",
        f"plan:\n  # of a day in May\n  devices: 2  # slow\n\n  width: 3 # ok\n{REST}\n",
    ),
    "half a block": (
        f"plan:\n    width: 8 # ok\n# more\n{REST}\n",
        f"plan:\n    width: 3 # ok\n    devices: 2\n# more\n{REST}\n",
    ),
    "half a block at the end": (f"{REST}\nplan:\n  width: 8", f"{REST}\nplan:\n  width: 3\n  devi"),
    "braces": (f"{REST}\nplan: {{width: 8}} # x", f"{REST}\nplan: {{width: 3, devices: 2}} # x"),
    "a comma": (f"{REST}\nplan: {{width: 8, }}", f"{REST}\nplan: {{width: 3, devices: 2}}"),
    "empty braces": (f"{REST}\nplan: {{}}\n", f"{REST}\nplan: {{devices: 2, width: 3}}\n"),
    "an empty field": (
        f'{REST}\n"plan":\n  width:\n  devices: null # all\n',
        f'{REST}\n"plan":\n  width: 3\n  devices: 2 # all\n',
    ),
    "all in braces": (FLOW % "", FLOW % ", plan: {devices: 2, width: 3}"),
    "all in braces, with a plan": (
        FLOW % ", plan: {devices: 1}",
        FLOW % ", plan: {devices: 2, width: 3}",
    ),
    "a parent": (
        "extends: parent.yaml\nseed: 3\n",
        "extends: parent.yaml\nseed: 3\nplan:\n  devices: 2\n  width: 3\n",
    ),
}


@pytest.fixture
def file(tmp_path):
    (tmp_path / "parent.yaml").write_text(PARENT)
    return tmp_path / "mine.yaml"


@pytest.mark.parametrize(("before", "after"), CASES.values(), ids=CASES)
def test_nothing_but_the_plan_changes(file, before, after):
    file.write_text(before)
    file.chmod(0o640)
    old = fl.load_config(file)
    check_writable(file)
    assert file.read_text() == before
    write_plan(file, PLAN)
    text = file.read_text()
    if after.endswith("BLOCK"):
        after = after.replace("BLOCK", "plan:\n  devices: 2\n  width: 3\n")
    if after.endswith("devi"):
        assert text == after + "ces: 2"
    else:
        assert text.replace("\n\nplan", "\nplan") == after.replace("\n\nplan", "\nplan")
    assert text.startswith(before[:4])
    new = fl.load_config(file)
    assert (new.plan.devices, new.plan.width) == (2, 3)
    assert new.model_copy(update={"plan": old.plan}) == old
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    write_plan(file, PLAN)
    assert file.read_text() == text  # and the second time nothing
    assert sorted(p.name for p in file.parent.iterdir()) == ["mine.yaml", "parent.yaml"]


def test_line_ends_and_letters_stay(file):
    before = f"# Größe\r\n{REST}\r\n".replace("\r", "").replace("\n", "\r\n").encode()
    file.write_bytes(before)
    write_plan(file, PLAN)
    after = file.read_bytes()
    assert after.startswith(before) and after.count(b"\n") == after.count(b"\r\n")
    file.write_bytes(before + b"plan:\r\n  width: 7\r\n")
    write_plan(file, PLAN)
    assert file.read_bytes() == before + b"plan:\r\n  width: 3\r\n  devices: 2\r\n"


def test_a_link_stays_one(file):
    file.write_text(REST)
    link = file.with_name("link.yaml")
    link.symlink_to(file)
    write_plan(link, PLAN)
    assert link.is_symlink() and fl.load_config(file).plan.width == 3


def test_every_committed_configuration_can_be_given_one(tmp_path):
    configs = pathlib.Path(__file__).parents[2] / "configs"
    shutil.copytree(configs, tmp_path / "configs")
    for copy in (tmp_path / "configs").rglob("*.yaml"):
        write_plan(copy, PLAN)
        assert fl.load_config(copy).plan.width == 3


@pytest.mark.parametrize(
    "text",
    [
        f"seed: &two 2\nplan: &p {{width: *two}}\n{REST}\n",  # to change it would change the seed
        f"{REST}\n...\n",
        f"plan: {{devices: &d 1}}\neval_every: *d\n{REST}\n",
    ],
    ids=["an alias", "an end", "an anchor"],
)
def test_what_cannot_be_changed_safely_is_left_and_told(file, text):
    file.write_text(text)
    for change in (check_writable, lambda path: write_plan(path, PLAN)):
        with pytest.raises(fl.FedLPError, match="its plan cannot be changed without touching"):
            change(file)
    assert file.read_text() == text
    with pytest.raises(fl.FedLPError, match=r"write it yourself as\nplan:\n  devices: 2\n  width"):
        write_plan(file, PLAN)


def test_a_read_only_file_is_left_and_told(file):
    file.write_text(REST)
    file.chmod(0o444)
    with pytest.raises(fl.FedLPError, match=r"mine.yaml is read-only, so no plan can be put"):
        check_writable(file)
    with pytest.raises(fl.FedLPError, match="yourself as\nplan:\n  devices: 2"):
        write_plan(file, PLAN)
    assert file.read_text() == REST


def test_a_folder_that_cannot_be_written_is_told(file, monkeypatch):
    file.write_text(REST)

    def refuse(*_, **__):
        raise PermissionError("no")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(fl.FedLPError, match=r"cannot be written \(no\); write it yourself as"):
        write_plan(file, PLAN)
