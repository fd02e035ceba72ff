"""fedlp_jax: federated learning in which the client axis is an array axis.

The modules in the order in which data flows through them:

    data.datasets, data.partition   name -> arrays -> who has which examples
    task, layers, submodel, masks   what is learnt, cut into layers, held by whom, sent by whom
    client, aggregate, server       train one client, average what was sent, step the server
    placement                       map over clients and sum, on any devices
    algorithms                      short compositions: fedavg, fedlp_homo, fedlp_hetero
    simulate, report, config, cli   the host loop, the run directory, files, the command line
"""

from fedlp_jax import aggregate as aggregate
from fedlp_jax import costs as costs
from fedlp_jax import layers as layers
from fedlp_jax import masks as masks
from fedlp_jax import models as models
from fedlp_jax import plots as plots
from fedlp_jax import submodel as submodel
from fedlp_jax.algorithms import Algorithm as Algorithm
from fedlp_jax.algorithms import compose as compose
from fedlp_jax.algorithms import fedavg as fedavg
from fedlp_jax.algorithms import fedlp_hetero as fedlp_hetero
from fedlp_jax.algorithms import fedlp_homo as fedlp_homo
from fedlp_jax.config import load_config as load_config
from fedlp_jax.data import partition as partition
from fedlp_jax.data.datasets import Dataset as Dataset
from fedlp_jax.data.datasets import from_arrays as from_arrays
from fedlp_jax.data.datasets import load as load
from fedlp_jax.data.partition import Partition as Partition
from fedlp_jax.experiment import run as run
from fedlp_jax.placement import Plan as Plan
from fedlp_jax.placement import setup as setup
from fedlp_jax.result import DivergedError as DivergedError
from fedlp_jax.result import Result as Result
from fedlp_jax.simulate import simulate as simulate
from fedlp_jax.simulation import Simulation as Simulation
from fedlp_jax.task import Task as Task
from fedlp_jax.task import classification as classification
from fedlp_jax.types import FedLPError as FedLPError

__version__ = "0.1.0"
