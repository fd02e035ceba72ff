"""fedlp_jax: federated learning in which the client axis is an array axis.

The rooms in the order in which data flows through them; a room imports only from rooms above it:

    data          data sets, and which client holds which examples
    nn            networks, and how their layers are computed fast
    tasks         what is learnt: a network, its loss, its metrics
    pruning       what of the network a client holds, trains and sends: layers, submodels, masks
    accounting    modelled parameters, bytes and MACs; never a clock
    execution     many lanes on many devices; knows nothing of federated learning
    clients       one client: its training, its device, its failures
    aggregation   what clients send -> the server's next variables
    algorithms    short compositions of the above
    reporting     what a run leaves for people: run directory, progress, plots
    simulation    rounds in a loop: program, run, evaluation, checkpoint
    config        a file -> the arguments of simulate()
    paper         the result table of FedLP, again, and the theory of its masks
    cli           the commands

Every public name is imported when it is first used, so `fedlp --help` starts without jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time the table below serves these names
    from fedlp_jax import accounting as costs
    from fedlp_jax import types as types
    from fedlp_jax.aggregation import means as aggregate
    from fedlp_jax.aggregation import robust as robust
    from fedlp_jax.aggregation.privacy import Privacy as Privacy
    from fedlp_jax.aggregation.uploads import cast as cast
    from fedlp_jax.aggregation.uploads import chain as chain
    from fedlp_jax.aggregation.uploads import quantize as quantize
    from fedlp_jax.aggregation.uploads import top_k as top_k
    from fedlp_jax.algorithms.base import Algorithm as Algorithm
    from fedlp_jax.algorithms.compose import compose as compose
    from fedlp_jax.algorithms.depthfl import depthfl as depthfl
    from fedlp_jax.algorithms.fedasync import fedasync as fedasync
    from fedlp_jax.algorithms.fedavg import fedavg as fedavg
    from fedlp_jax.algorithms.fedbabu import fedbabu as fedbabu
    from fedlp_jax.algorithms.fedbn import fedbn as fedbn
    from fedlp_jax.algorithms.fedbuff import fedbuff as fedbuff
    from fedlp_jax.algorithms.fedcm import fedcm as fedcm
    from fedlp_jax.algorithms.feddyn import feddyn as feddyn
    from fedlp_jax.algorithms.federated_dropout import federated_dropout as federated_dropout
    from fedlp_jax.algorithms.fedexp import fedexp as fedexp
    from fedlp_jax.algorithms.fedlama import fedlama as fedlama
    from fedlp_jax.algorithms.fedldf import fedldf as fedldf
    from fedlp_jax.algorithms.fedlp import fedlp_hetero as fedlp_hetero
    from fedlp_jax.algorithms.fedlp import fedlp_homo as fedlp_homo
    from fedlp_jax.algorithms.fedlp import fedlp_q as fedlp_q
    from fedlp_jax.algorithms.fedluar import fedluar as fedluar
    from fedlp_jax.algorithms.fednova import fednova as fednova
    from fedlp_jax.algorithms.fedopt import fedadagrad as fedadagrad
    from fedlp_jax.algorithms.fedopt import fedadam as fedadam
    from fedlp_jax.algorithms.fedopt import fedavgm as fedavgm
    from fedlp_jax.algorithms.fedopt import fedyogi as fedyogi
    from fedlp_jax.algorithms.fedpart import fedpart as fedpart
    from fedlp_jax.algorithms.fedper import fedper as fedper
    from fedlp_jax.algorithms.fedprox import fedprox as fedprox
    from fedlp_jax.algorithms.fedrep import fedrep as fedrep
    from fedlp_jax.algorithms.fedrolex import fedrolex as fedrolex
    from fedlp_jax.algorithms.fjord import fjord as fjord
    from fedlp_jax.algorithms.freeze import freeze as freeze
    from fedlp_jax.algorithms.heterofl import heterofl as heterofl
    from fedlp_jax.algorithms.inclusivefl import inclusivefl as inclusivefl
    from fedlp_jax.algorithms.lg_fedavg import lg_fedavg as lg_fedavg
    from fedlp_jax.algorithms.scaffold import scaffold as scaffold
    from fedlp_jax.clients.devices import Profile as Profile
    from fedlp_jax.clients.failures import Corruption as Corruption
    from fedlp_jax.clients.failures import Faults as Faults
    from fedlp_jax.config.experiment import run as run
    from fedlp_jax.config.loading import load_config as load_config
    from fedlp_jax.data import partition as partition
    from fedlp_jax.data.loading import Dataset as Dataset
    from fedlp_jax.data.loading import from_arrays as from_arrays
    from fedlp_jax.data.loading import load as load
    from fedlp_jax.data.partition import Partition as Partition
    from fedlp_jax.errors import FedLPError as FedLPError
    from fedlp_jax.execution.plan import Plan as Plan
    from fedlp_jax.execution.plan import setup as setup
    from fedlp_jax.execution.processes import connect as connect
    from fedlp_jax.nn import conv as conv
    from fedlp_jax.nn import models as models
    from fedlp_jax.paper import theory as theory
    from fedlp_jax.pruning import layers as layers
    from fedlp_jax.pruning import masks as masks
    from fedlp_jax.pruning import submodels as submodel
    from fedlp_jax.pruning import widths as widths
    from fedlp_jax.reporting import plots as plots
    from fedlp_jax.reporting import sinks as sinks
    from fedlp_jax.reporting.compare import compare as compare
    from fedlp_jax.reporting.report import report as report
    from fedlp_jax.reporting.variables import load_variables as load_variables
    from fedlp_jax.reporting.variables import save_variables as save_variables
    from fedlp_jax.simulation.checkpoint import Checkpoint as Checkpoint
    from fedlp_jax.simulation.early_stop import EarlyStop as EarlyStop
    from fedlp_jax.simulation.evaluation import evaluate as evaluate
    from fedlp_jax.simulation.keep_best import KeepBest as KeepBest
    from fedlp_jax.simulation.loop import simulate as simulate
    from fedlp_jax.simulation.profiling import Trace as Trace
    from fedlp_jax.simulation.result import DivergedError as DivergedError
    from fedlp_jax.simulation.result import Result as Result
    from fedlp_jax.simulation.run import Simulation as Simulation
    from fedlp_jax.simulation.sweep import Sweep as Sweep
    from fedlp_jax.simulation.sweep import sweep as sweep
    from fedlp_jax.tasks.classification import classification as classification
    from fedlp_jax.tasks.multi_label import multi_label as multi_label
    from fedlp_jax.tasks.next_token import next_token as next_token
    from fedlp_jax.tasks.regression import regression as regression
    from fedlp_jax.tasks.task import Task as Task

__version__ = "0.1.0"

_MODULES = {
    "aggregate": "aggregation.means",
    "conv": "nn.conv",
    "costs": "accounting",
    "layers": "pruning.layers",
    "masks": "pruning.masks",
    "models": "nn.models",
    "partition": "data.partition",
    "plots": "reporting.plots",
    "sinks": "reporting.sinks",
    "robust": "aggregation.robust",
    "submodel": "pruning.submodels",
    "widths": "pruning.widths",
    "theory": "paper.theory",
    "types": "types",
}
_HOMES = {
    "aggregation.privacy": "Privacy",
    "aggregation.uploads": "cast chain quantize top_k",
    "algorithms.base": "Algorithm",
    "algorithms.compose": "compose",
    "algorithms.fedavg": "fedavg",
    "algorithms.fedbabu": "fedbabu",
    "algorithms.fedlama": "fedlama",
    "algorithms.fedldf": "fedldf",
    "algorithms.fedluar": "fedluar",
    "algorithms.fedpart": "fedpart",
    "algorithms.fedrep": "fedrep",
    "algorithms.freeze": "freeze",
    "algorithms.fedlp": "fedlp_hetero fedlp_homo fedlp_q",
    "algorithms.fedper": "fedper",
    "algorithms.fedbn": "fedbn",
    "algorithms.fedprox": "fedprox",
    "algorithms.fedopt": "fedadagrad fedadam fedavgm fedyogi",
    "algorithms.fednova": "fednova",
    "algorithms.feddyn": "feddyn",
    "algorithms.fedcm": "fedcm",
    "algorithms.fedexp": "fedexp",
    "algorithms.lg_fedavg": "lg_fedavg",
    "algorithms.scaffold": "scaffold",
    "algorithms.inclusivefl": "inclusivefl",
    "algorithms.depthfl": "depthfl",
    "algorithms.heterofl": "heterofl",
    "algorithms.fedrolex": "fedrolex",
    "algorithms.federated_dropout": "federated_dropout",
    "algorithms.fjord": "fjord",
    "algorithms.fedbuff": "fedbuff",
    "algorithms.fedasync": "fedasync",
    "clients.devices": "Profile",
    "clients.failures": "Corruption Faults",
    "config.experiment": "run",
    "config.loading": "load_config",
    "data.loading": "Dataset from_arrays load",
    "data.partition": "Partition",
    "execution.processes": "connect",
    "errors": "FedLPError",
    "execution.plan": "Plan setup",
    "reporting.compare": "compare",
    "reporting.report": "report",
    "reporting.variables": "load_variables save_variables",
    "simulation.checkpoint": "Checkpoint",
    "simulation.early_stop": "EarlyStop",
    "simulation.evaluation": "evaluate",
    "simulation.keep_best": "KeepBest",
    "simulation.loop": "simulate",
    "simulation.profiling": "Trace",
    "simulation.result": "DivergedError Result",
    "simulation.run": "Simulation",
    "simulation.sweep": "Sweep sweep",
    "tasks.classification": "classification",
    "tasks.multi_label": "multi_label",
    "tasks.next_token": "next_token",
    "tasks.regression": "regression",
    "tasks.task": "Task",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

if not TYPE_CHECKING:  # a type checker would believe that every name exists

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            value = import_module(f"fedlp_jax.{_MODULES[name]}")
        elif name in _HOME:
            value = getattr(import_module(f"fedlp_jax.{_HOME[name]}"), name)
        else:
            raise AttributeError(f"module 'fedlp_jax' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*_MODULES, *_HOME, *(name for name in globals() if name.startswith("__"))})
