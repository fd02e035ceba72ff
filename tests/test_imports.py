"""The import order is the data flow; files and functions stay small enough to read."""

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "fedlp_jax"

# Each module may import those before it, and no other. An algorithm may not import another family.
ORDER = [
    "types",
    "limits",
    "behaviour",
    "keys",
    "plots",
    "data.cache",
    "data.prepared",
    "data.decoding",
    "data.embedded",
    "data.arrays",
    "data.archive",
    "data.datasets",
    "data.sizes",
    "data.holdings",
    "data.partition",
    "data.batching",
    "fusion",
    "conv.window",
    "conv.toom",
    "conv.patches",
    "conv.winograd",
    "conv.table",
    "conv.choice",
    "conv.general",
    "conv.measure",
    "conv.injection",
    "conv",
    "dense",
    "models.init",
    "models.norm",
    "models.pool",
    "models.mlp",
    "models.cnn",
    "models.resnet",
    "models",
    "network",
    "task",
    "layers",
    "costs",
    "submodel",
    "masks",
    "optimizer",
    "client",
    "profile",
    "fate",
    "faults",
    "aggregate",
    "meeting",
    "hosts",
    "connection",
    "leaves",
    "packing",
    "placement",
    "layout",
    "robust",
    "privacy",
    "combine",
    "programs",
    "cohort",
    "store",
    "server",
    "algorithms.algorithm",
    "algorithms.round",
    "algorithms.compose",
    "algorithms.fedavg",
    "algorithms.fedlp",
    "algorithms",
    "metrics",
    "theory.uploads",
    "theory.weights",
    "theory.convergence",
    "theory",
    "progress",
    "readout",
    "result",
    "checks",
    "memory",
    "staging",
    "call",
    "simulation",
    "snapshot",
    "checkpoint",
    "saver",
    "simulate",
    "variables",
    "claim",
    "environment",
    "report",
    "elsewhere",
    "pictures",
    "config_field",
    "config_fault",
    "config_section",
    "config_problem",
    "config_yaml",
    "config_file",
    "config",
    "resumption",
    "experiment",
    "overview",
    "tables",
    "reproduction.paper",
    "reproduction.costs",
    "reproduction.cells",
    "reproduction.forecast",
    "reproduction.table",
    "reproduction.figures",
    "reproduction.run",
    "reproduction.view",
    "reproduction",
    "cli_reproduce",
    "plan_file",
    "rounds",
    "tuning",
    "tuning_conv",
    "cli_tune",
    "cli_hosts",
    "interruption",
    "cli",
]


def modules():
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }


def imported(path):
    """Names of package modules imported at the top level of a file."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("fedlp_jax"):
            continue
        base = node.module.removeprefix("fedlp_jax").removeprefix(".")
        for alias in node.names:
            inner = f"{base}.{alias.name}".lstrip(".")
            found.add(inner if inner in ORDER else base)
    return found - {"", "data"}


def test_every_module_has_its_place_in_the_order():
    assert set(modules()) - {"__init__", "data"} == set(ORDER)


def test_a_module_imports_only_from_above_it():
    late = [
        f"{name} imports {other}"
        for name, path in modules().items()
        if name in ORDER
        for other in imported(path)
        if ORDER.index(other) >= ORDER.index(name)
    ]
    assert not late


def test_files_and_functions_stay_short():
    long = []
    for name, path in modules().items():
        text = path.read_text()
        if text.count("\n") > 300:
            long.append(f"{name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and code_lines(node) > 60:
                long.append(f"{name}.{node.name}: {code_lines(node)} lines of code")
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


def test_importing_changes_no_setting_of_jax_and_loads_nothing_heavy():
    python(
        "import jax, sys; before = dict(jax.config.values);"
        "import fedlp_jax; [getattr(fedlp_jax, name) for name in dir(fedlp_jax)];"
        "assert 'fedlp_jax.simulate' in sys.modules;"
        "assert dict(jax.config.values) == before;"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'matplotlib', 'sklearn', 'torch'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )


def test_the_command_imports_jax_only_when_it_is_needed():
    python(
        "import sys, fedlp_jax.cli;"
        "slow = {'jax', 'flax', 'numpy', 'pydantic'} & set(sys.modules);"
        "assert not slow, slow"
    )


def test_the_public_names_for_readers_are_those_of_the_interpreter():
    import fedlp_jax

    (block,) = (n for n in ast.parse((PACKAGE / "__init__.py").read_text()).body if is_block(n))
    read = {alias.asname: node.module for node in block.body for alias in node.names}
    assert read == fedlp_jax._HOME
    assert set(read) <= set(dir(fedlp_jax))
    for name, home in read.items():
        assert getattr(fedlp_jax, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="module 'fedlp_jax' has no attribute 'simulat'"):
        _ = fedlp_jax.simulat


def is_block(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def shadowed():
    """Public names that a module of the package has too, and is not."""
    import fedlp_jax

    return sorted(n for n, home in fedlp_jax._HOME.items() if n in ORDER and home != "fedlp_jax")


FIRST = {
    "the package": "import fedlp_jax as fl",
    "the name": "from fedlp_jax import {name}; import fedlp_jax as fl",
    "the module": "import fedlp_jax.{name}; import fedlp_jax as fl",
    "the module's": "from fedlp_jax.{name} import {name}; import fedlp_jax as fl",
    "the name, then the module": "import fedlp_jax as fl; fl.{name}; import fedlp_jax.{name}",
    "what uses it": "from fedlp_jax.experiment import run; import fedlp_jax as fl",
}


@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)
def test_a_public_name_wins_over_the_module_of_that_name(first):
    names = shadowed()
    assert names == ["simulate"]
    for name in names:
        module = f"sys.modules['fedlp_jax.{name}']"
        python(f"{first.format(name=name)}; import sys; assert fl.{name} is {module}.{name}")


def test_names_can_be_used_as_they_are_documented():
    python(
        "import fedlp_jax as fl; from fedlp_jax import simulate; assert callable(simulate);"
        "fl.models.MLP; fl.partition.iid; fl.types.Array; fl.plots.curves; fl.__version__;"
        "from fedlp_jax.data import partition; assert fl.partition is partition;"
        "import rlcompleter; complete = rlcompleter.Completer({'fl': fl}).complete;"
        "assert complete('fl.simul', 0) == 'fl.simulate('"
    )
