"""Algorithms: short compositions of the same parts, one file per family.

Every file has the same skeleton: the paper in the docstring; for each algorithm one function
`name(task, *, <numbers of the method>, client_optimizer, **settings) -> Algorithm`, with the update
rule in its docstring and one call of `compose` as its body. New parts (a mask policy, a scheme of
submodels, a reducer) belong to their own rooms.
"""

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
