"""sweep: many runs as few programs. Points -> groups of one structure -> lanes -> results."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from fedlp_jax.accounting.macs import forward_macs
from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.clients.failures import Faults
from fedlp_jax.data.loading import Dataset
from fedlp_jax.data.partition import Partition
from fedlp_jax.errors import FedLPError, check_number, collecting, shown, warn
from fedlp_jax.execution import processes
from fedlp_jax.execution.packing import size_bytes
from fedlp_jax.execution.plan import HOST, LanesPlan, Plan, checked
from fedlp_jax.reporting.compare import Comparison, compare
from fedlp_jax.reporting.frames import frame
from fedlp_jax.simulation import snapshot as snapshots
from fedlp_jax.simulation import validation as checks
from fedlp_jax.simulation.checkpoint import Checkpoint, Saver
from fedlp_jax.simulation.cohorts import CohortRule
from fedlp_jax.simulation.early_stop import EarlyStop, Watch
from fedlp_jax.simulation.lanes import (
    Lanes,
    LanesPending,
    LanesProgram,
    compile_lanes,
)
from fedlp_jax.simulation.loop import listening_to_ctrl_c, simulate
from fedlp_jax.simulation.result import DivergedError, Result, Row
from fedlp_jax.simulation.run import RoundRecord, Run
from fedlp_jax.simulation.snapshot import Snapshot
from fedlp_jax.simulation.spec import Fit, Spec, specify
from fedlp_jax.simulation.structure import structures
from fedlp_jax.types import Variables

if TYPE_CHECKING:
    from pandas import DataFrame

# On a CPU, runs side by side save what a step of a small model costs besides its products. Larger
# products gain nothing: a run of the MNIST CNN (480,000 MACs an example) took as long as alone.
_CPU_MACS = 200_000
# Bytes of the models that one CPU device trains side by side: with their gradients they should stay
# in its cache. Of an MLP of 670 kB, 13 on a device took twice as long as one.
_CPU_CACHE = 2**19
# Rounds of a call where the plan leaves them open: what the host does for one weighs most in a
# sweep, whose models are small.
_ROUNDS_AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      label: of its algorithm.
      settings: arguments of `simulate` that say what is run.
      log: called with each row.
      checkpoint: where and how often to save it.
      resume: what it continues from.
      compiled: called with its plan before its first round.
      ended: called with its result as soon as it is known, and with the error of a run that
        diverged.
    """

    label: str
    settings: Mapping[str, Any]
    log: Callable[[Row], None] | None = None
    checkpoint: Checkpoint | None = None
    resume: Snapshot | None = None
    compiled: Callable[[Plan], None] | None = None
    ended: Callable[[Result, DivergedError | None], None] | None = None


@dataclasses.dataclass(repr=False)
class Sweep:
    """What a sweep leaves.

    Attributes:
      runs: a `Result` for each algorithm and seed, in the order given; all seeds of an algorithm
        follow each other. `label` and `seed` say which.
    """

    runs: list[Result]

    def __repr__(self) -> str:
        labels = dict.fromkeys(run.label for run in self.runs)
        return f"Sweep of {len(self.runs)} runs: {', '.join(labels)}"

    def to_frame(self) -> DataFrame:
        """A row for each round of each run, with the columns `label` and `seed`.

        Raises:
          FedLPError: pandas is not installed.
        """
        return frame(
            [
                {"label": run.label, "seed": run.seed, **row}
                for run in self.runs
                for row in run.history
            ]
        )

    def table(
        self,
        *,
        target: float | None = None,
        metric: str | None = None,
        columns: Sequence[str] | None = None,
    ) -> Comparison:
        """A line for each algorithm, with mean and deviation over its seeds; see `fl.compare`."""
        runs: dict[str, list[Result]] = {}
        for run in self.runs:
            runs.setdefault(run.label, []).append(run)
        return compare(runs, target=target, metric=metric, columns=columns)


def sweep(
    algorithms: Algorithm | Mapping[str, Algorithm] | Sequence[Algorithm],
    data: Dataset,
    clients: Partition | Callable[[int], Partition],
    *,
    seeds: int | Sequence[int],
    rounds: int,
    cohort: CohortRule,
    eval_every: int | None = None,
    max_cohort: int | None = None,
    plan: Plan | None = None,
    variables: Variables | None = None,
    faults: Faults | None = None,
    early_stop: EarlyStop | None = None,
    at_once: int | None = None,
    log: Callable[[str, int, Row], None] | None = None,
) -> Sweep:
    """Runs every algorithm with every seed, and many of these runs as one program.

        keeps = (0.1, 0.3, 0.5, 0.7, 0.9)
        algorithms = {f"keep {keep}": fl.fedlp_homo(task, keep=keep, ...) for keep in keeps}
        fl.sweep(algorithms, data, clients, seeds=5, rounds=60, cohort=10).table()

    Runs whose compiled rounds would be equal are lanes of one program: those that differ in seed,
    keep, mu, a number as `client_schedule`, the numbers of the server's state, or in who holds
    which examples. A learning rate within an optax optimizer is a constant of the program, so
    each is a program of its own, compiled beside the others; give the optimizer the rate 1 and the
    rate as `client_schedule`.

    Each run has the masks, cohorts and counts of the run alone, and its parameters but for the
    order of sums. A run that diverges ends alone: its result ends with the round before, and
    `stopped` says why. Ctrl-C ends all runs after the round in flight.

    Args:
      algorithms: label -> algorithm; or several, with the labels "0", "1", ...; or one.
      data: from `load` or `from_arrays`.
      clients: a partition, or a function of the seed that returns one.
      seeds: how many, from 0; or a list of them.
      rounds: of each run.
      cohort: as in `simulate`.

    Other Arguments:
      eval_every: as in `simulate`.
      max_cohort: as in `simulate`.
      plan: as in `simulate`, but `devices` are those of all runs together, which are dealt out to
        them: a run has one device, unless it runs alone. Short rounds side by side share a call
        up to the next evaluation, unless the plan says how many.
      variables: as in `simulate`.
      faults: as in `simulate`.
      early_stop: as in `simulate`, for each run.
      at_once: the most runs side by side; None = as many as the memory holds. On a CPU, runs of a
        large model or of several depths are not faster side by side, so they follow each other,
        as do runs with data on the host and runs of several processes.
      log: called with label, seed and row of each round of each run.

    Raises:
      FedLPError: bad input, before anything is compiled.
    """
    points = []
    for label, algorithm in _labelled(algorithms).items():
        for seed in _seeds(seeds):
            settings = {
                "algorithm": algorithm,
                "data": data,
                "clients": clients(seed) if callable(clients) else clients,
                "rounds": rounds,
                "cohort": cohort,
                "seed": seed,
                "eval_every": eval_every,
                "max_cohort": max_cohort,
                "plan": plan,
                "variables": variables,
                "faults": faults,
                "early_stop": early_stop,
            }
            logged = None if log is None else functools.partial(log, label, seed)
            points.append(Point(label, settings, logged))
    return Sweep(run_points(points, at_once))


def _labelled(algorithms: Any) -> dict[str, Algorithm]:
    if isinstance(algorithms, Algorithm):
        algorithms = {"0": algorithms}
    elif not isinstance(algorithms, Mapping):
        algorithms = {str(i): algorithm for i, algorithm in enumerate(algorithms)}
    others = [one for one in algorithms.values() if not isinstance(one, Algorithm)]
    if others or not algorithms:
        what = f"{shown(others[0])} among them is none" if others else "there is none"
        raise FedLPError(
            f"a sweep needs algorithms, such as {{'half': fl.fedlp_homo(task, keep=0.5, ...)}}, "
            f"but {what}."
        )
    return {str(label): algorithm for label, algorithm in algorithms.items()}


def _seeds(seeds: Any) -> list[int]:
    if not isinstance(seeds, Sequence) or isinstance(seeds, str):
        return list(range(check_number("seeds", seeds, ge=1, integer=True)))
    if not seeds or len(set(seeds)) < len(seeds):
        raise FedLPError(f"seeds={shown(seeds)} must be different numbers, at least one.")
    return list(seeds)


def run_points(
    points: Sequence[Point],
    at_once: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[Result]:
    """Runs points, those of one structure side by side.

    Args:
      points: the runs.
      at_once: the most runs side by side; None = as many as the memory holds, if that is faster.
      stop: asked before every round; once it returns True all runs are saved and end.

    Returns:
      The result of each point. A run that diverged has its error as `stopped`.

    Raises:
      FedLPError: bad input, before anything is compiled.
    """
    if at_once is not None:
        at_once = check_number("at_once", at_once, ge=1, integer=True, optional=True)
    members = _members(points, at_once)
    with listening_to_ctrl_c(stop) as (ask, pressed):
        groups = _groups(members)
        alone = [member for member in members if not any(member in group for group in groups)]
        for member in alone:
            member.forget()
        for group, program in zip(groups, _programs(groups, at_once), strict=True):
            for batch in _batches(group, program.runs):
                _run_lanes(batch, program, ask)
        for member in alone:
            member.run_alone(ask)
    results = [member.result for member in members if member.result is not None]
    if pressed():
        done = sum(len(result.history) for result in results)
        warn(
            f"interrupted by Ctrl-C after {done} rounds of {len(results)} runs; the sweep holds "
            "the rounds so far.",
            stacklevel=3,
        )
    return results


class _Member:
    """A point on its way: checked, run, finished.

    Attributes:
      point: what is run.
      run: with the plan of a lane; None for a run that no lane takes, or once it is finished.
      reason: why no lane can take the run; empty where one can.
      result: once it is finished.
    """

    def __init__(self, point: Point, models: _Models, others: Sequence[_Member]):
        """Checks a point, and puts its run on the devices of a lane."""
        self.point = point
        self.run: Run | None = None
        self.result: Result | None = None
        self.reason = "several processes run" if processes.count() > 1 else ""
        self.error: DivergedError | None = None
        self._last: int | None = None  # the round after which it has ended
        checks.check_start(point.settings["rounds"], 1, point.checkpoint, point.resume)
        with collecting() as self._said:
            self._prepare(models, others)

    def _prepare(self, models: _Models, others: Sequence[_Member]) -> None:
        settings, resume = dict(self.point.settings), self.point.resume
        done = () if resume is None else resume.rows
        early_stop, plan = settings.pop("early_stop"), checked(settings.pop("plan"))
        checks.check_kinds(early_stop=early_stop)
        self._watch = Watch(early_stop, done)
        self._devices = plan.devices
        first = 1 if resume is None else resume.round + 1
        rounds, seed, eval_every, _ = checks.check_numbers(
            settings.pop("rounds"), settings.pop("seed"), settings.pop("eval_every")
        )
        if processes.count() == 1:
            plan = dataclasses.replace(plan, devices=1)
        if plan.rounds_at_once is None:
            most = _rounds_at_once(early_stop, eval_every or rounds)
            plan = dataclasses.replace(plan, rounds_at_once=most)
        fit = models.fits.get(alike := _of_fit(settings))
        spec = specify(**settings, seed=seed, first_round=first, plan=plan, fit=fit)
        models.fits[alike] = spec
        checks.check_tested("early_stop", early_stop, spec)
        if spec.plan.data == HOST:
            self.reason = "the data lie on the host"
        elif spec.algorithm.personal:
            self.reason = "clients are tested with layers of their own"
        elif spec.algorithm.asynchrony is not None:
            self.reason = "clients arrive at times of their own"
        if self.reason or rounds < first or self._watch.stops or not models.gain(spec):
            return
        like = next((m.run for m in others if m.run and m.run.spec.data is spec.data), None)
        run = self.run = Run(
            spec,
            rounds=rounds - first + 1,
            first_round=first,
            eval_every=eval_every,
            like=like,
        )
        checks.warn_of_first_block(spec.algorithm, rounds)
        self._saver = Saver(self.point.checkpoint, resume)
        if resume is not None:
            snapshots.check(run, resume)

    @property
    def kind(self) -> Hashable:
        """What runs side by side share besides the structure: their rounds and their plan."""
        run = self.lane
        return run.first_round, run.last_round, run.eval_every, id(run.spec.data), self._devices

    @property
    def lane(self) -> Run:
        """The run of a member that some lane can take."""
        assert self.run is not None
        return self.run

    @property
    def groups(self) -> int:
        """The devices among which its group is divided."""
        return len(processes.devices()) if self._devices is None else self._devices

    def start(self) -> None:
        """Restores a resumed run; called before its state joins those of others."""
        if self.point.resume is not None:
            snapshots.restore(self.lane, self.point.resume)
        if self.point.compiled is not None:
            self.point.compiled(self.lane.plan)

    def read(self, records: Sequence[RoundRecord], lanes: Lanes, lane: int, last: int) -> None:
        """Books rounds, and ends the run at the rounds that end it.

        Args:
          records: of rounds.
          lanes: that it runs in.
          lane: its own.
          last: the last round that was dispatched.
        """
        run = self.lane
        for record in records:
            if self._last is not None and record.round > self._last:
                return
            row = run.book(record)
            if self.point.log is not None:
                self.point.log(row)
            self._watch.update(row)
            if record.halted:  # the state stands still
                lanes.end(lane)
                self._last = record.round
            try:
                with collecting() as said:
                    run.check(record)
                self._said.extend(x for x in said if x not in self._said)
            except DivergedError as error:
                self.error = error
            if self._watch.stops and self._last is None:
                lanes.end(lane)
                self._last = last

    @property
    def has_ended(self) -> bool:
        """Whether the last round that counts is booked, where that is before the last of all."""
        ended = self._last is not None and self.lane.reached >= self._last
        return self.error is not None or ended

    def due(self, round: int) -> bool:
        """Whether to save after this round."""
        return self._saver.due(round)

    def rounds_until_due(self, round: int) -> int:
        """See `Saver.rounds_until_due`."""
        return self._saver.rounds_until_due(round)

    def save(self) -> None:
        """Writes a checkpoint of a settled run."""
        self._saver.save(snapshots.capture(self.lane))

    def finish(self, warnings: Sequence[str]) -> None:
        """Makes the result of a settled run."""
        run = self.lane
        if self.error is None and self._saver.due_at_end(run.reached, run.reached < run.last_round):
            self.save()
        run.readings["run_seconds"] = float(sum(row["seconds"] for row in run.history))
        self._end(run.result(), [*self._said, *warnings])

    def run_alone(self, stop: Callable[[], bool]) -> None:
        """Runs the point as `simulate` does, on all of its devices."""
        point = self.point
        try:
            result = simulate(
                **point.settings,
                log=point.log,
                checkpoint=point.checkpoint,
                resume=point.resume,
                compiled=point.compiled,
                stop=stop,
            )
        except DivergedError as error:
            self.error, result = error, error.result
        self._end(result, result.warnings)

    def forget(self) -> None:
        """Frees what a run in a lane holds on the devices."""
        self.run = None

    def _end(self, result: Result, warnings: Sequence[str]) -> None:
        stopped = result.stopped or self._watch.reason
        self.result = result = dataclasses.replace(
            result,
            label=self.point.label,
            stopped=stopped if self.error is None else str(self.error),
            warnings=list(dict.fromkeys(warnings)),
        )
        self.forget()
        if self.point.ended is not None:
            self.point.ended(result, self.error)


class _Models:
    """What runs share: what an algorithm makes of the data, and the MACs of a model.

    Attributes:
      fits: of the points before, by `_of_fit`.
    """

    def __init__(self, at_once: int | None) -> None:
        self._at_once = at_once
        self._macs: dict[int, int] = {}  # by task, which `fits` keep alive
        self.fits: dict[Hashable, Fit] = {}

    def gain(self, spec: Spec) -> bool:
        """Whether runs of this kind are to be side by side: by the user's choice, or its speed."""
        if self._at_once is not None or jax.default_backend() != "cpu":
            return self._at_once != 1
        return len(spec.levels) == 1 and self._forward_macs(spec) <= _CPU_MACS

    def _forward_macs(self, spec: Spec) -> int:
        """Of one example."""
        task = spec.levels[-1].task
        if id(task) not in self._macs:
            shapes = checks.initial_shapes(task, spec.root, spec.example)
            self._macs[id(task)] = sum(forward_macs(task, shapes, spec.example).values())
        return self._macs[id(task)]


def _of_fit(settings: Mapping[str, Any]) -> Hashable:
    """What points have in common that differ in their seed or in who holds which examples."""
    alike = [id(settings.get(name)) for name in ("algorithm", "data", "variables")]
    return *alike, getattr(settings["clients"], "clients", None)


def _members(points: Sequence[Point], at_once: int | None) -> list[_Member]:
    """The points, checked."""
    models, members = _Models(at_once), list[_Member]()
    for point in points:
        members.append(_Member(point, models, members))
    reasons = dict.fromkeys(member.reason for member in members if member.reason)
    if reasons:
        warn(f"runs follow each other, because {' and '.join(reasons)}.", stacklevel=4)
    return members


def _groups(members: Sequence[_Member]) -> list[list[_Member]]:
    """The members that run side by side, in groups of one structure."""
    able = [member for member in members if member.run is not None]
    _widen(able)
    groups: dict[Hashable, list[_Member]] = {}
    for member, key in zip(able, structures([member.lane for member in able]), strict=True):
        groups.setdefault((member.kind, key), []).append(member)
    return [group for group in groups.values() if len(group) > 1]


def _widen(members: Sequence[_Member]) -> None:
    """Gives partitions whose largest clients are of similar size one shape: at most twice as wide.

    Padding changes no draw.
    """
    widest: dict[int, int] = {}
    uneven = []
    for member in members:
        sizes = member.lane.spec.clients.sizes
        most = int(sizes.max())
        if int(sizes.min()) < most:
            uneven.append((member, most.bit_length()))
            widest[most.bit_length()] = max(widest.get(most.bit_length(), 0), most)
    for member, bits in uneven:
        member.lane.stage.lay_on(member.lane.plan, widest[bits])


def _programs(groups: Sequence[Sequence[_Member]], at_once: int | None) -> list[LanesProgram]:
    """The programs of groups, for as many lanes as are quick and fit the memory."""
    wanted = []
    for group in groups:
        run = group[0].lane
        most = min(at_once or _quickest(run, group[0].groups), len(group))
        batches = -(-len(group) // most)
        count = -(-len(group) // batches)  # in each batch, evenly
        plan = LanesPlan(**dataclasses.asdict(run.plan), groups=min(group[0].groups, count))
        wanted.append((run, count, plan))
    return compile_lanes(wanted) if wanted else []


def _rounds_at_once(early_stop: EarlyStop | None, until_test: int) -> int:
    """The most rounds of a call, so that runs end where they would end alone.

    An evaluation ends a call, and so does a stop by one; other metrics may stop a run at any round.
    """
    if early_stop is not None and not (early_stop.metric or "test_").startswith("test_"):
        return 1
    return max(min(_ROUNDS_AT_ONCE, until_test), 1)


def _quickest(run: Run, devices: int) -> int:
    """How many runs side by side are quicker than fewer."""
    if jax.default_backend() != "cpu":
        return 2**31
    lanes = max(_CPU_CACHE // size_bytes(run.state.variables), 1)
    return int(lanes * devices)


def _batches(group: Sequence[_Member], lanes: int) -> Iterator[Sequence[_Member]]:
    """As few batches as there must be, of equal size."""
    batches = -(-len(group) // lanes)
    most = -(-len(group) // batches)
    for first in range(0, len(group), most):
        yield group[first : first + most]


def _run_lanes(members: Sequence[_Member], program: LanesProgram, stop: Callable[[], bool]) -> None:
    """Runs members side by side to their ends."""
    for member in members:
        member.start()
    lanes = Lanes([member.lane for member in members], program)
    pending: collections.deque[LanesPending] = collections.deque()
    rounds = range(lanes.runs[0].first_round, lanes.runs[0].last_round + 1)

    def read(ahead: int) -> None:
        """Reads what was dispatched, but for the last `ahead` dispatches."""
        last = rounds.start - 1
        while len(pending) > ahead:
            for lane, records in lanes.records(pending.popleft()).items():
                member = members[lane]
                if member.result is None:  # or else these rounds came after its end
                    member.read(records, lanes, lane, last)
                    if member.has_ended:
                        member.finish(program.warnings)

    while rounds and lanes.live and not stop():
        first, live = rounds[0], [members[lane] for lane in lanes.live]
        until_due = min(member.rounds_until_due(first) for member in live)
        count = min(lanes.at_once(first), until_due)
        pending.append(lanes.dispatch(first, count))
        last, rounds = rounds[count - 1], rounds[count:]
        read(ahead=1)
        if any(members[lane].due(last) for lane in lanes.live):
            read(ahead=0)
            for lane in lanes.live:  # together, so that they resume together
                lanes.settle(lane)
                members[lane].save()
    read(ahead=0)
    for lane in lanes.live:
        lanes.settle(lane)
    for member in members:
        if member.result is None:
            member.finish(program.warnings)
