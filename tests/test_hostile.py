"""Nothing hostile gets a traceback, a hang, a wrong number or a file; the page says which."""

import contextlib
import gc
import io
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import hostile
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fedlp_jax as fl
from fedlp_jax.config.schema import Config, dump_config, load_config, parse_config
from fedlp_jax.config.yaml import parse_yaml, to_yaml
from fedlp_jax.data import archive
from fedlp_jax.errors import FedLPError

CASES = {f"{case.group}: {case.name}": case for case in hostile.cases()}
# orbax leaves its other reads running when one has failed, which then find their loop closed.
tolerant = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
quick = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return hostile.template(tmp_path_factory.mktemp("hostile") / "good")


@pytest.fixture(scope="module")
def outcomes(good, tmp_path_factory):
    """What became of the cases that were tried so far."""
    return {}


@tolerant
@pytest.mark.parametrize("name", CASES)
def test_a_hostile_input_is_refused_in_a_sentence(name, good, outcomes, tmp_path):
    case = CASES[name]
    (tmp_path / "around").mkdir()
    outcome = outcomes[case] = hostile.attempt(case, good, tmp_path / "around")
    if case.act is hostile._latest:
        gc.collect()
    assert outcome.code == case.code, outcome
    assert outcome.changed == []
    lines = outcome.said.splitlines()
    assert 1 <= len(lines) <= 11  # a line for each problem, and how many more there are
    for line in lines:
        assert len(line) <= 600
        assert line.isprintable()
    assert "Traceback" not in outcome.said
    assert "0x7f" not in outcome.said
    assert outcome.seconds < hostile.SECONDS


def test_there_are_many_cases_of_different_names():
    assert len(CASES) == len(hostile.cases()) > 300


FIELDS = {f"{kind} {field}".strip(): (field, raw) for field, kind, raw in hostile.fields()}
# Where values of another type than its own mean something to a field.
MEANT = {
    "name": {"text"},
    "data.name": {"text", "a path"},
    "data.data_dir": {"text", "a path", "null"},
    "data.options": {"{}", "{a: 1}"},
    "cohort": {"1e-320"},
    "faults": {"{}"},
    "plan": {"{}"},
    "checkpoint": {"{}"},
    "hidden": {"[]"},
    "keep": {"{a: 1}"},  # which layers there are is known when the model is built
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_takes_its_own_values_only(name):
    field, raw = FIELDS[name]
    said, accepted = hostile.try_field(field, raw)
    for sentence in said.values():
        assert sentence.startswith("h.yaml: ")
        assert len(sentence) < 2000  # a section of another kind may lack several fields
        assert all(line.isprintable() and len(line) < 400 for line in sentence.splitlines())
    leaf = field.rsplit(".", maxsplit=1)[-1]
    meant = MEANT.get(field) or MEANT.get(leaf, set())
    # Numbers, true and null are judged by the tests of the fields; no text or nest gets through.
    numbers = {"1.5", "2^31", "true", "null"}
    assert set(accepted) - numbers <= meant, accepted
    for value in ("NaN", "infinity", "minus infinity", "1e200", "10^400", "-1"):
        assert value in said


def test_the_page_is_what_the_cases_say(outcomes):
    """Of cases that were not tried in this process, and of other versions, names are compared."""
    there = hostile.PAGE.read_text("utf-8")
    nothing = hostile.Outcome(2, "", 0.0, [])
    here = hostile.page({case: outcomes.get(case, nothing) for case in CASES.values()})
    whole = len(outcomes) == len(CASES) and hostile.versions() in there
    assert told(here, whole) == told(there, whole)
    assert "/tmp" not in there


def told(page, whole):
    """Lines to compare: without the reasons that orbax gives, and if not whole, any sentence."""
    lines, group = [], ""
    for line in page.splitlines():
        group = line if line.startswith("## ") else group
        if line.startswith("Said with"):
            continue
        if line.startswith("| ") and not line.startswith("| `"):
            if not whole:
                line = line.split(" | ")[0]
            elif group.endswith("is taken"):
                line = line.split("passed over:")[0]
        lines.append(line)
    return lines


def test_the_command_itself_goes_on_from_the_checkpoint_before(good, tmp_path):
    """In a process of its own, where all that any thread says is heard."""
    folder = shutil.copytree(good, tmp_path / "here")
    with contextlib.chdir(folder):
        hostile._flip(str(hostile._largest()), 0.5)()
    program = "from fedlp_jax.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "run", "run", "--resume", "--rounds", "3"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(fl.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "/checkpoints/2 is damaged and passed over" in done.stderr
    assert "compiling round 2 of 3" in done.stderr


# --- random ones --------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from([*hostile.VALUES.values()]),
    st.dates(),
)
names = st.one_of(
    st.text(max_size=8),
    st.sampled_from([name.rsplit(".", maxsplit=1)[-1] for name, _, _ in hostile.fields()]),
)
trees = st.recursive(
    scalars,
    lambda below: st.one_of(st.lists(below, max_size=4), st.dictionaries(names, below, max_size=4)),
    max_leaves=12,
)


def good_or_refused(read):
    """The configuration or None; any other error than ours is a failure."""
    try:
        found = read()
    except FedLPError as error:
        assert all(line.isprintable() for line in str(error).splitlines())
        assert len(str(error)) < 6000
        return None
    assert isinstance(found, Config)
    return found


@quick
@given(st.sampled_from(sorted(FIELDS)), trees)
def test_any_value_in_any_field_is_good_or_refused(name, value):
    field, raw = FIELDS[name]
    found = good_or_refused(lambda: parse_config(hostile._laid(raw, field, value)))
    if found is not None:
        written = dump_config(found)  # which is compared, as NaN is not equal to itself
        assert dump_config(parse_config(parse_yaml(written))) == written
        written.encode()


@quick
@given(st.dictionaries(names, trees, max_size=6), st.booleans())
def test_any_mapping_is_good_or_refused(raw, over):
    good_or_refused(lambda: parse_config((hostile.GOOD if over else {}) | raw))


@quick
@given(st.one_of(st.text(max_size=200), st.text("[]{}&*a:-!| \n'\"#?,<10.", max_size=60)))
def test_any_text_is_values_or_no_yaml(text):
    with contextlib.suppress(ValueError):
        parse_yaml(text)


@quick
@given(st.binary(max_size=100), st.integers(0, 400), st.integers(0, 7))
def test_any_bytes_and_any_flipped_bit_of_a_file_are_good_or_refused(tmp_path, data, at, bit):
    file = tmp_path / "h.yaml"
    file.write_bytes(data)
    good_or_refused(lambda: load_config(file))
    flipped = bytearray(yaml.safe_dump(hostile.GOOD).encode())
    flipped[at % len(flipped)] ^= 1 << bit
    file.write_bytes(flipped)
    good_or_refused(lambda: load_config(file))


plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda below: st.lists(below, max_size=3),
    max_leaves=8,
)


@quick
@given(plain)
@pytest.mark.parametrize("fixed", [["1e3", "010", "1:30", "0x1f", "1_000", ".5", "-.inf", "~"]])
def test_what_is_written_is_read_back(fixed, value):
    for one in (value, fixed):
        assert parse_yaml(to_yaml(one)) == one


@tolerant
@settings(quick, max_examples=15)
@given(st.data())
def test_a_flipped_bit_of_a_checkpoint_changes_no_number_silently(good, tmp_path, data):
    where = tmp_path / "checkpoints"
    shutil.rmtree(where, ignore_errors=True)
    shutil.copytree(good / "run" / "checkpoints", where)
    config = load_config(good / "run" / "config.yaml")
    saved = fl.Checkpoint(where, settings=hostile.essence(config))
    true = {
        round: _bits(fl.Checkpoint(good / "run" / "checkpoints", settings=saved.settings))
        for round in (2,)
    }
    file = data.draw(st.sampled_from(sorted(p for p in where.rglob("2/**/*") if p.is_file())))
    content = bytearray(file.read_bytes())
    if not content:
        return
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = saved.latest()
        except FedLPError:
            return
    gc.collect()
    if found.round == 2:
        assert _bits(saved) == true[2]
    else:
        assert found.round == 1
        assert any("2 is damaged and passed over" in str(one.message) for one in told)


def _bits(checkpoint):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = checkpoint.latest()
    return {name: leaf.tobytes() for name, leaf in found.leaves.items()}, repr(found.rows)


@quick
@given(st.integers(0, 10**6), st.integers(0, 7), st.floats(0, 1))
def test_a_flipped_bit_or_a_cut_of_an_archive_changes_no_number_silently(tmp_path, at, bit, keep):
    file = io.BytesIO()
    wanted = hostile.arrays()
    np.savez(file, **wanted)
    whole = file.getvalue()
    flipped = bytearray(whole)
    flipped[at % len(flipped)] ^= 1 << bit
    for data in (bytes(flipped), whole[: int(keep * (len(whole) - 1))]):
        (tmp_path / "own.npz").write_bytes(data)
        try:
            found = archive.read_npz(tmp_path / "own.npz", lambda held: held)
        except Exception:  # which its callers put into a sentence
            continue
        for name in found.keys() & wanted.keys():
            assert found[name].tobytes() == wanted[name].tobytes()
