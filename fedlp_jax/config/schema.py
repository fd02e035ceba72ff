"""The typed configuration of one run: what every field may hold, checked before anything else.

A YAML file, with what it extends and what the command line lays over it, becomes one `Config`;
its fields are the arguments of `fl.simulate` and of what that takes. Fields that nobody knows are
refused with the nearest known one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, model_validator

from fedlp_jax.algorithms.presets import BEHAVIOURS
from fedlp_jax.config import section as config_section
from fedlp_jax.config.fault import Faults
from fedlp_jax.config.field import (
    Checked,
    Count,
    OptionalCount,
    Section,
    Seed,
    choice,
    is_number,
    optional,
    real,
    refuse,
    text,
    whole,
)
from fedlp_jax.config.loading import Raw, read_config
from fedlp_jax.config.problem import section_kinds, sentences
from fedlp_jax.config.yaml import to_yaml
from fedlp_jax.errors import FedLPError, shown


def _folder_name(value: str) -> str:
    if not value.strip(". ") or any(c in value for c in "/\\") or len(value.encode()) > 200:
        raise refuse(f"is {shown(value)}, but must be usable as the name of a folder")
    return value


def _cohort(value: Any) -> int | float:
    # As in simulate: 1 is one client and 1.0 all of them.
    if isinstance(value, float) and 0 < value <= 1:
        return value
    if not is_number(value) or not 1 <= value < 2**31 or value % 1:
        raise refuse(
            f"is {shown(value)}, but must be a whole number of clients >= 1, or a share of them "
            "above 0 and up to 1.0"
        )
    return int(value)


class PlanSection(Section):
    """How a round is laid on the hardware; it changes the cost of a run, never its result."""

    devices: OptionalCount = None  # null = all there are
    width: OptionalCount = None  # clients vmapped at once; null = as measured to be good
    # where the training split lies; null = on every device if it fits there, else on the host
    data: Annotated[str | None, Checked(optional(choice("device", "host")))] = None
    rounds_at_once: OptionalCount = None  # the most that one call runs; null = 1


class CheckpointSection(Section):
    """How often a run is saved; it is also when it is interrupted."""

    every: OptionalCount = None  # rounds; null = by time alone
    minutes: Annotated[float | None, Checked(optional(real(0)))] = 10.0  # null = by rounds alone
    keep: Count = 2  # the latest


class Config(Section):
    """One run, whole."""

    name: Annotated[str, Checked(text), AfterValidator(_folder_name)] = "run"
    seed: Seed = 0
    data: config_section.Data
    partition: config_section.Partition
    model: config_section.Model
    algorithm: config_section.Algorithm
    rounds: Annotated[int, Checked(whole(0))]
    cohort: Annotated[int | float, Checked(_cohort)]  # clients of a round, or their share
    eval_every: OptionalCount = None  # rounds from one evaluation to the next; null = the last only
    faults: Faults | None = None
    plan: PlanSection = PlanSection()
    checkpoint: CheckpointSection = CheckpointSection()
    # null once read: it has then set the settings it stands for, where they were not given.
    behaviour: Annotated[
        str | None, Checked(optional(choice(*BEHAVIOURS))), Field(exclude=True)
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _behave(cls, raw: Any) -> Any:
        preset = BEHAVIOURS.get(str(raw.get("behaviour"))) if isinstance(raw, dict) else None
        if preset is None:
            return raw
        raw = {key: value for key, value in raw.items() if key != "behaviour"}
        for key in ("partition", "model", "algorithm"):
            given = raw.get(key)
            if isinstance(given, dict) and (kind := _KINDS[key].get(str(given.get("name")))):
                fields = kind.model_fields
                raw[key] = {k: v for k, v in preset._asdict().items() if k in fields} | given
        return raw

    @model_validator(mode="after")
    def _cohort_fits(self) -> Config:
        clients = getattr(self.partition, "clients", None)
        if clients is not None and self.cohort > clients:
            raise refuse(
                f"cohort is {self.cohort}, but there are only {clients} clients; lower cohort or "
                "raise partition.clients"
            )
        return self


_KINDS = section_kinds(Config)


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads a YAML file, with all it extends, and checks it.

    Args:
      path: the file.
      overrides: dotted field -> value, laid over the file: `{"algorithm.keep": 0.7}`.

    Raises:
      FedLPError: one sentence for each problem, with the dotted field.
    """
    return parse_config(read_config(path, overrides, _left_behind), source=str(path))


def parse_config(raw: Raw, source: str = "") -> Config:
    """Checks a nested dictionary.

    Args:
      raw: as a YAML file would give it.
      source: what to put before every sentence about it, as the name of the file.

    Raises:
      FedLPError: one sentence for each problem, with the dotted field.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = sentences(error, raw, _KINDS)
    before = f"{source}: " if source else ""
    raise FedLPError("\n".join(before + line for line in lines))


def dump_config(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    return to_yaml(config.model_dump(mode="json"))


def _left_behind(section: str, old: str, new: str) -> set[str]:
    """Fields which a section does not take along when its kind changes from old to new."""
    if section == "data":
        return {"options"}
    kinds = _KINDS.get(section, {})
    if old not in kinds or new not in kinds:
        return set()
    return set(kinds[old].model_fields) - set(kinds[new].model_fields)
