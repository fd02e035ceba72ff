"""fedlp_jax: federated learning in which the client axis is an array axis.

The modules in the order in which data flows through them:

    data.datasets, data.partition   name -> arrays -> who has which examples
    task, layers, submodel, masks   what is learnt, cut into layers, held by whom, sent by whom
    client, aggregate, server       train one client, average what was sent, step the server
    faults, robust, privacy         clients that fail or lie, and what holds against them
    hosts, placement                several processes as one; map over clients and sum, anywhere
    algorithms                      short compositions: fedavg, fedlp_homo, fedlp_hetero
    simulate, checkpoint            the host loop, and how a run goes on after a power cut
    report, config, cli             the run directory, files, the command line

A name is imported when it is first used, so that what needs no jax, as `fedlp --help`, is fast.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlp_jax import aggregate as aggregate
    from fedlp_jax import costs as costs
    from fedlp_jax import layers as layers
    from fedlp_jax import masks as masks
    from fedlp_jax import models as models
    from fedlp_jax import plots as plots
    from fedlp_jax import robust as robust
    from fedlp_jax import submodel as submodel
    from fedlp_jax import theory as theory
    from fedlp_jax import types as types
    from fedlp_jax.algorithms.algorithm import Algorithm as Algorithm
    from fedlp_jax.algorithms.compose import compose as compose
    from fedlp_jax.algorithms.fedavg import fedavg as fedavg
    from fedlp_jax.algorithms.fedlp import fedlp_hetero as fedlp_hetero
    from fedlp_jax.algorithms.fedlp import fedlp_homo as fedlp_homo
    from fedlp_jax.checkpoint import Checkpoint as Checkpoint
    from fedlp_jax.config import load_config as load_config
    from fedlp_jax.connection import connect as connect
    from fedlp_jax.data import partition as partition
    from fedlp_jax.data.datasets import Dataset as Dataset
    from fedlp_jax.data.datasets import from_arrays as from_arrays
    from fedlp_jax.data.datasets import load as load
    from fedlp_jax.data.partition import Partition as Partition
    from fedlp_jax.experiment import run as run
    from fedlp_jax.faults import Corruption as Corruption
    from fedlp_jax.faults import Faults as Faults
    from fedlp_jax.placement import Plan as Plan
    from fedlp_jax.placement import setup as setup
    from fedlp_jax.privacy import Privacy as Privacy
    from fedlp_jax.profile import Profile as Profile
    from fedlp_jax.result import DivergedError as DivergedError
    from fedlp_jax.result import Result as Result
    from fedlp_jax.simulate import simulate as simulate
    from fedlp_jax.simulation import Simulation as Simulation
    from fedlp_jax.task import Task as Task
    from fedlp_jax.task import classification as classification
    from fedlp_jax.types import FedLPError as FedLPError
    from fedlp_jax.variables import load_variables as load_variables

__version__ = "0.1.0"

# The same once more, for the interpreter: module -> the public names in it.
_NAMES = {
    "fedlp_jax": "aggregate costs layers masks models plots robust submodel theory types",
    "fedlp_jax.algorithms.algorithm": "Algorithm",
    "fedlp_jax.algorithms.compose": "compose",
    "fedlp_jax.algorithms.fedavg": "fedavg",
    "fedlp_jax.algorithms.fedlp": "fedlp_hetero fedlp_homo",
    "fedlp_jax.checkpoint": "Checkpoint",
    "fedlp_jax.config": "load_config",
    "fedlp_jax.connection": "connect",
    "fedlp_jax.data": "partition",
    "fedlp_jax.data.datasets": "Dataset from_arrays load",
    "fedlp_jax.data.partition": "Partition",
    "fedlp_jax.experiment": "run",
    "fedlp_jax.faults": "Corruption Faults",
    "fedlp_jax.placement": "Plan setup",
    "fedlp_jax.privacy": "Privacy",
    "fedlp_jax.profile": "Profile",
    "fedlp_jax.result": "DivergedError Result",
    "fedlp_jax.simulate": "simulate",
    "fedlp_jax.simulation": "Simulation",
    "fedlp_jax.task": "Task classification",
    "fedlp_jax.types": "FedLPError",
    "fedlp_jax.variables": "load_variables",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}


if not TYPE_CHECKING:  # a type checker would believe that every name is there

    def __getattr__(name: str) -> Any:
        home = _HOME.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if home == __name__:
            return importlib.import_module(f"{home}.{name}")
        value = globals()[name] = getattr(importlib.import_module(home), name)
        return value


def __dir__() -> list[str]:
    return sorted({*_HOME, *(name for name in globals() if name.startswith("__"))})


class _Package(ModuleType):
    """Keeps `fedlp_jax.simulate` a function: importing the module of that name sets it too."""

    def __setattr__(self, name: str, value: Any) -> None:
        own_module = isinstance(value, ModuleType) and value.__name__ == f"{__name__}.{name}"
        if not own_module or _HOME.get(name, __name__) == __name__:
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
