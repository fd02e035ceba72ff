"""Devices and failures: slow phones that answer at night only, on a modelled clock."""

import numpy as np
import optax
from small import dataset

import fedlp_jax as fl

CLIENTS, HOURS = 8, 4


def phones_and_servers():
    """Speeds per client: MACs, bytes down and bytes up per second; every other one is a phone."""
    phone = np.arange(CLIENTS) % 2 == 0
    return fl.Profile(
        compute=np.where(phone, 1e4, 1e6),
        download=np.where(phone, 1e3, 1e6),
        upload=np.where(phone, 2e2, 1e6),
    )


def nights():
    """`f32[T, K]`, the probability that a client answers; round t reads row t mod T."""
    answers = np.ones((HOURS, CLIENTS), np.float32)
    answers[HOURS // 2 :, ::2] = 0.0  # phones are busy in the second half
    return answers


def test_busy_phones_do_not_answer_and_slow_ones_take_time():
    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=CLIENTS)
    task = fl.classification(fl.models.Logistic(num_classes=3))
    algorithm = fl.fedavg(task, client_optimizer=optax.sgd(0.1))
    faults = fl.Faults(availability=nights(), profile=phones_and_servers())
    history = fl.simulate(
        algorithm, data, clients, rounds=HOURS, cohort=CLIENTS, faults=faults
    ).history
    assert history["unavailable"].tolist() == [0, 0, 4, 4]
    night, day = history["simulated_time"][:2].min(), history["simulated_time"][2:].max()
    assert night > 10 * day
