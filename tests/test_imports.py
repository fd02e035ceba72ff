"""The order of the rooms is the data flow; functions stay short; importing is cheap and quiet."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "fedlp_jax"
# A module imports from its own room, from rooms before it and from the hall, and from no other.
ROOMS = [
    "data",
    "nn",
    "tasks",
    "pruning",
    "accounting",
    "execution",
    "clients",
    "aggregation",
    "algorithms",
    "reporting",
    "simulation",
    "config",
    "paper",
    "cli",
]
HALL = {"types", "errors", "prng"}
# `Partition.plot` draws: the one import that looks ahead, and it runs only when called.
AHEAD = {("data", "reporting")}


def modules():
    return {p.relative_to(PACKAGE).with_suffix("").parts: p for p in PACKAGE.rglob("*.py")}


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fedlp_jax":
            _, *inner = node.module.split(".")
            yield from [inner[0]] if inner else [alias.name for alias in node.names]


def test_a_room_imports_only_from_rooms_above_it():
    for (room, *inner), path in modules().items():
        if room in ("__init__", "__main__"):
            continue
        assert room in ROOMS if inner else room in HALL, path
        above = HALL | {"__version__"}
        if inner:
            above |= set(ROOMS[: ROOMS.index(room) + 1])
        late = {(room, other) for other in imported_rooms(path) if other not in above}
        assert late <= AHEAD, path


def test_the_package_has_at_most_twenty_entries():
    assert len([p for p in PACKAGE.iterdir() if p.name != "__pycache__"]) <= 20


def test_functions_stay_short():
    long = [
        f"{path}: {node.name}, {code_lines(node)} lines of code"
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and code_lines(node) > 60
    ]
    assert not long


def code_lines(function):
    """Lines of a function without its docstring, which is as long as its users need."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function):
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


def python(code):
    """Runs a program in a process of its own, which must not fail."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_starts_without_jax():
    python(
        "import sys, fedlp_jax.cli;"
        "slow = {'jax', 'flax', 'numpy', 'pydantic'} & set(sys.modules);"
        "assert not slow, slow"
    )


def test_importing_takes_less_than_a_second_beyond_jax():
    python(
        "import time, jax; start = time.process_time();"
        "import fedlp_jax as fl; bare = time.process_time() - start;"
        "fl.simulate; used = time.process_time() - start;"
        "assert bare < 0.1 and used < 1, (bare, used)"
    )


@pytest.mark.slow
def test_importing_changes_no_setting():
    python(
        "import sys, jax; before = dict(jax.config.values);"
        "import fedlp_jax as fl; [getattr(fl, name) for name in dir(fl)];"
        "assert dict(jax.config.values) == before;"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'matplotlib', 'sklearn', 'torch'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )


def test_the_public_names_for_type_checkers_are_those_of_the_interpreter():
    import fedlp_jax

    (block,) = (n for n in ast.parse((PACKAGE / "__init__.py").read_text()).body if is_block(n))
    listed = [
        (node.module, alias.name, alias.asname) for node in block.body for alias in node.names
    ]
    assert {name for _, _, name in listed} == {*fedlp_jax._MODULES, *fedlp_jax._HOME}
    for module, original, name in listed:
        home = importlib.import_module(module)
        assert getattr(fedlp_jax, name) is getattr(home, original)
    with pytest.raises(AttributeError, match="module 'fedlp_jax' has no attribute 'simulat'"):
        _ = fedlp_jax.simulat


def is_block(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_names_can_be_used_as_they_are_documented():
    python(
        "import fedlp_jax as fl; from fedlp_jax import simulate; assert callable(simulate);"
        "fl.models.MLP; fl.partition.iid; fl.types.Array; fl.plots.curves; fl.__version__;"
        "from fedlp_jax.data import partition; assert fl.partition is partition;"
        "import rlcompleter; complete = rlcompleter.Completer({'fl': fl}).complete;"
        "assert complete('fl.simul', 0) == 'fl.simulate('"
    )
