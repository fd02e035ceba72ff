"""The import order is the data flow; files and functions stay small enough to read."""

import ast
import pathlib
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).parents[1] / "fedlp_jax"

# Each module may import those before it, and no other. An algorithm may not import another family.
ORDER = [
    "types",
    "keys",
    "plots",
    "data.cache",
    "data.prepared",
    "data.decoding",
    "data.embedded",
    "data.arrays",
    "data.datasets",
    "data.sizes",
    "data.holdings",
    "data.partition",
    "data.batching",
    "conv",
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
    "submodel",
    "masks",
    "client",
    "aggregate",
    "placement",
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
    "costs",
    "progress",
    "result",
    "checks",
    "simulation",
    "simulate",
    "report",
    "config_field",
    "config_section",
    "config_problem",
    "config_file",
    "config",
    "experiment",
    "overview",
    "tables",
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


def test_importing_changes_no_setting_of_jax_and_loads_nothing_heavy():
    code = (
        "import jax, sys; before = dict(jax.config.values);"
        "import fedlp_jax; assert dict(jax.config.values) == before;"
        "heavy = {'tensorflow', 'tensorflow_datasets', 'matplotlib', 'sklearn', 'torch'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
