"""Which pilots to run, how far, and what their results say; nothing is trained here.

    contest = Contest(options, budget=600, allowed=90)
    while todo := next_pilots(contest, pilots):
        pilots = ...                    # run each option of todo up to its share of a whole run
    decide(contest, pilots)

What an option would reach in the whole budget is known beforehand with some error, by
:class:`Growth`. A pilot is the beginning of an option's own run, and its extrapolation another
estimate of the same. The two are combined as Gaussians, log tau of all options together, so that a
pilot says something of the options that were not run, too. Pilots take the time of those that lose
from the winner, and are run only where the choice is expected to gain more than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from dspark_lab.checks import (
    Count,
    NonNegative,
    Positive,
    Share,
    Size,
    Within,
    checked,
    require_columns,
)
from dspark_lab.training import TrainConfig
from dspark_lab.tuning.cells import ALL
from dspark_lab.tuning.extrapolation import (
    Forecast,
    Reference,
    extrapolate,
    learning_rates,
    run_points,
)
from dspark_lab.tuning.growth import GROWTH, Growth
from dspark_lab.tuning.judging import CELL
from dspark_lab.tuning.progress import EXPONENT
from dspark_lab.tuning.results import run_table
from dspark_lab.tuning.runs import evaluation_steps
from dspark_lab.tuning.settings import TrainingSettings

# Points of a whole run, evenly spaced in their logarithm from 1 % to all of it, at which pilots may
# end; what goes on runs to the next of them, 1.5 times as long.
EVALUATIONS = 12
PILOT_SHARES = np.geomspace(0.01, 1, EVALUATIONS).tolist()
# None ends at the first three: the learning rate rises over a twentieth of a run, and what a pilot
# shows before is off by up to a fifth. Nor within so many steps: in the first half of them drafters
# of all options learn little.
_FIRST, PILOT_STEPS = 3, 200
# Columns of an option.
_OPTION = [*CELL, "seconds", "noise", "rate", "low", "high"]
# Draws of a posterior.
_DRAWS = 4000
# Half a 90 % interval in standard deviations.
_HALF = 1.645
# Pilots have a share of the budget, of shorter budgets than this one the same seconds, as long as
# these are at most so many times the share.
_SHORT, _TIMES = 200.0, 1.5
# The standard deviation of the logarithm of a rate of which nothing is known.
_UNKNOWN = 1.0
# Options whose steps are timed, the steps that this takes of each, and its share of the budget.
TIMED, TIMED_STEPS, _TIMING = 4, 7, 0.02
# The run on whose drafter the noise is measured, and the conversations it is measured on: most and
# fewest, and their share of the budget.
_WARM_STEPS, _LEAST_WARM, _WARMING = 100, 20, 0.01
_CONVERSATIONS, _LEAST_CONVERSATIONS, _NOISING = 64, 16, 0.02
# Probability at which an answer needs no more pilots.
_SURE = 0.9


@checked
def pilot_allowance(seconds: Positive, share: Share = 0.15) -> float:
    """Seconds of a budget that pilots which do not win may take: 15 %, 30 s of less than 200 s.

    Of less than 133 s it is 22.5 %, since nothing would be left to train with.
    """
    return share * max(seconds, min(_SHORT, _TIMES * seconds))


@checked
def pilot_error(share: Annotated[float, Within(0, 1, above=True)]) -> float:
    """How far one pilot's logit(p), extrapolated from a share of a run, is off more than others'.

    See :class:`Growth` for p. The standard deviation in the 18 runs of the development sweep, at a
    tau of 1.1 to 1.7: 0.3 from 5 %, 0.2 from 12 %, 0.1 from 28 %. What they are all off together
    changes no choice.
    """
    return 0.05 * share**-0.6


@dataclass(frozen=True, eq=False)
class Pilot:
    """The beginning of a run: its lines (:func:`load_runs`), and the ``share`` that was run."""

    share: float
    lines: pd.DataFrame


@checked
@dataclass(frozen=True, eq=False)
class Contest:
    """Options, and what finding the best of them may cost.

    Args:
        options: of :func:`progress_table`: a line each with ``batch_size``, ``num_anchors``,
            ``block_size``, ``seconds`` and ``noise`` of a step, and ``rate``, progress a second, in
            its 95 % interval ``low`` to ``high``.
        budget: seconds, or whatever else ``seconds`` counts.
        allowed: of the budget, for pilots that lose.
        measured: of the budget, spent before.
        evaluation: of the budget, for evaluating a pilot once, as is done at the end of each rung.
        arms: pilots at once, at most.
        growth: how tau grows, from other data.
        reference: what other runs say of how learning curves go on, see :func:`learn_curves`.
        domain: of the held-out conversations that count.
        training: of the runs, whose learning rate falls by its schedule.
    """

    options: pd.DataFrame
    budget: Positive
    allowed: NonNegative
    measured: NonNegative = 0.0
    evaluation: NonNegative = 0.0
    arms: Count = 5
    growth: Growth = GROWTH
    reference: Reference | None = None
    domain: str = ALL
    training: TrainConfig = TrainConfig(steps=1)

    def __post_init__(self) -> None:
        missing = [name for name in _OPTION if name not in self.options]
        if missing or self.options.empty or not self.options.index.is_unique:
            got = f"got {len(self.options)} without {missing}" if missing else "got other ones"
            raise ValueError(f"options must be lines with {_OPTION} and labels of their own, {got}")
        if not np.isfinite(self.options[["seconds", "noise"]].to_numpy(dtype=float)).all():
            raise ValueError("options must have finite seconds and noise: see known_noise")
        if self.measured >= self.budget:
            raise ValueError(f"measured must be below budget {self.budget}, got {self.measured}")

    @cached_property
    def plan(self) -> PilotPlan:
        """The pilots that are expected to be worth most, perhaps none."""
        rest = self.budget - self.measured
        beliefs = self.beliefs(rest)
        order = np.argsort(-beliefs.mean, kind="stable")
        best, most = PilotPlan((), (), rest), 0.0
        for count in range(2, min(self.arms, len(order)) + 1):
            arms = order[:count]
            for first in range(_FIRST, EVALUATIONS - 1):
                plan = _scheduled(arms.tolist(), first, rest, self.evaluation)
                if plan is None or plan.most > self.allowed:
                    continue
                steps = plan.seconds / self.options["seconds"].to_numpy()[arms]
                if plan.rungs[0][1] * steps.min() < PILOT_STEPS:
                    continue
                errors = pilot_error(plan.rungs[0][1]) * beliefs.by_logit[arms]
                worth = beliefs.expected_gain(arms, errors)
                worth -= beliefs.slope[order[0]] * math.log(rest / plan.seconds)
                if worth > most:
                    best, most = plan, worth
        return best

    @property
    def steps(self) -> pd.Series:
        """Of a whole run of each option, which the budget pays for beside planned pilots."""
        return (self.plan.seconds / self.options["seconds"]).round().clip(lower=1).astype(int)

    def beliefs(self, seconds: float) -> Beliefs:
        """Log tau of each option after so many seconds, before any pilot."""
        steps = (seconds / self.options["seconds"]).clip(lower=1).to_numpy()
        mean, covariance = self.growth.predict(self.options, steps)
        slope = self.growth.slope(self.options, steps)
        low, high = (self.options[name].to_numpy(dtype=float) for name in ("low", "high"))
        with np.errstate(divide="ignore"):
            spread = np.minimum(np.log(high / low) / (2 * 1.96), _UNKNOWN)
        # Most of what is not known of the noise, |G|^2, all options have in common.
        off = slope * spread
        by_logit = self.growth.by_logit(self.options, steps)
        return Beliefs(mean, covariance + np.outer(off, off), slope, by_logit)


@dataclass(frozen=True)
class PilotPlan:
    """Pilots in rungs: at each, so many of the ``arms`` have run a share of their whole run.

    ``seconds`` are those of a whole run, if all rungs are run, and ``most`` those of all pilots
    with their evaluations, which are lost where none of them is chosen.
    """

    arms: tuple[int, ...]
    rungs: tuple[tuple[int, float], ...]
    seconds: float
    most: float = 0.0


@dataclass(frozen=True, eq=False)
class Beliefs:
    """Log tau of the options as a Gaussian, and its derivatives at the start: by the log of time,
    ``slope``, and by the logit of what it stands for, ``by_logit``."""

    mean: Float[np.ndarray, " option"]
    covariance: Float[np.ndarray, "option option"]
    slope: Float[np.ndarray, " option"]
    by_logit: Float[np.ndarray, " option"]

    def expected_gain(self, seen: Any, errors: Float[np.ndarray, " seen"]) -> float:
        """What choosing after estimates of the ``seen`` options gains in log tau, on average."""
        _, moved = self._moved(seen, errors, np.zeros(len(errors)))
        draws = np.random.default_rng(0).standard_normal((_DRAWS, len(errors)))
        best = (self.mean + draws @ moved.T).max(axis=1)
        return float(best.mean() - self.mean.max())

    def given(
        self,
        seen: Any,
        found: Any,
        errors: Float[np.ndarray, " seen"],
        shared: Float[np.ndarray, " seen"],
    ) -> Beliefs:
        """The beliefs after estimates of the ``seen`` options.

        Each has an error of its own, and all have one in common, with these standard deviations.
        """
        root, moved = self._moved(seen, errors, shared)
        mean = self.mean + moved @ np.linalg.solve(root, found - self.mean[seen])
        return replace(self, mean=mean, covariance=self.covariance - moved @ moved.T)

    def draws(self) -> Float[np.ndarray, "draw option"]:
        values, vectors = np.linalg.eigh(self.covariance)
        root = vectors * np.sqrt(np.maximum(values, 0))
        normal = np.random.default_rng(0).standard_normal((_DRAWS, len(values)))
        return self.mean + normal @ root.T

    def _moved(self, seen: Any, errors: Any, shared: Any) -> tuple[Any, Any]:
        """The root of the covariance of estimates, and how means move with each of its parts."""
        noisy = self.covariance[np.ix_(seen, seen)] + np.diag(errors**2) + np.outer(shared, shared)
        root = np.linalg.cholesky(noisy)
        return root, np.linalg.solve(root, self.covariance[seen]).T


@dataclass(frozen=True, eq=False)
class Advice:
    """What to train with the rest of the budget, and how sure that is.

    Attributes:
        best: the option, a line of ``table``.
        runner_up: the next one, None where there is no other.
        lead: of the best, in tau, relative to the runner-up, in its 90 % interval ``lead_low`` to
            ``lead_high``.
        sure: the probability that no other option would reach more.
        steps: of the chosen run, as many as the rest of the budget pays for.
        spent: of the budget, by measuring and by pilots that lost: what the chosen run lacks.
        table: a line an option: ``seconds`` of a step; progress a second, ``rate``, in its
            interval; ``steps`` of a whole run; tau as expected before any pilot, ``prior``; the
            share that its pilot has run, ``piloted``, and what this alone forecasts; ``tau`` after
            both in its 90 % interval ``low`` to ``high``; and the probability to be the ``best``.
        curves: of each pilot the points that were measured, and their extrapolation.
        surer: what it would take to be surer.
        blocks: what long blocks lose where fewer of their slots are served, if pilots show it.
        settings: of the chosen run, to be exported; None where there is no run to go on with.
        command: that goes on with it.
    """

    best: pd.Series
    runner_up: pd.Series | None
    lead: float
    lead_low: float
    lead_high: float
    sure: float
    steps: int
    spent: float
    table: pd.DataFrame
    curves: pd.DataFrame
    surer: str
    blocks: str = ""
    settings: TrainingSettings | None = None
    command: str = ""

    @property
    def reason(self) -> str:
        best, piloted = self.best, int((self.table["piloted"] > 0).sum())
        text = (
            f"Train with {option_name(best)}: {self.steps:,} steps are expected to reach a tau of "
            f"{best['tau']:.2f} ({best['low']:.2f} to {best['high']:.2f}). It is the best of "
            f"{len(self.table)} options with a probability of {self.sure:.0%}"
        )
        if self.runner_up is not None:
            text += (
                f", {self.lead:.1%} above the runner-up, {option_name(self.runner_up)} "
                f"({self.lead_low:.1%} to {self.lead_high:.1%})"
            )
        pilots = f"{piloted} pilots were run" if piloted else "No pilot was worth its time"
        text += f". {pilots}; measuring and losing pilots took {self.spent:,.1f} s. {self.surer}"
        return f"{text} {self.blocks}".rstrip()


@checked
def usual_noise(options: pd.DataFrame) -> pd.DataFrame:
    """Options (sizes and ``seconds``) with the noise that the pocket pair has, and their progress.

    For budgets that measuring it would use up: between conversations 9 |G|^2, between blocks 125,
    about as :func:`shipped_noise` has them after 100 steps. On code alone both are less than half;
    other data may be off by a factor of three.
    """
    noise = (9 + 125 / options["num_anchors"]) / options["batch_size"]
    rate = (1 + noise) ** -EXPONENT / options["seconds"]
    return options.assign(noise=noise, rate=rate, low=rate / 3, high=rate * 3)


@checked
def known_noise(options: pd.DataFrame) -> pd.DataFrame:
    """The lines of :func:`progress_table` with a noise each, where that of some is not ``known``.

    It is then that of the same rows and anchors in the nearest block size of which it is known, and
    :func:`usual_noise` where it is known of none.
    """
    known = options[options["known"] & np.isfinite(options["noise"])]
    usual = usual_noise(options)
    for label, option in options.drop(index=known.index).iterrows():
        alike = known[(known[CELL[:2]] == option[CELL[:2]]).all(axis=1)]
        if len(alike):
            apart = (np.log(alike["block_size"]) - math.log(option["block_size"])).abs()
            usual.loc[label, "noise"] = alike["noise"][apart.idxmin()]
    usual.loc[known.index] = known
    return usual


@checked
def timed_options(
    work: pd.Series, budget: Positive, measure: Callable[[int], float]
) -> tuple[dict[int, float], float]:
    """Time the steps of a few options, from the least ``work`` to the most that may be afforded.

    ``measure`` is asked for the seconds of an option's step, by its label. Returns those of at
    least two options, if there are so many, and what measuring took.
    """
    order = work.sort_values(kind="stable").index
    found: dict[int, float] = {}
    spent, last = 0.0, order[0]
    for place in np.linspace(0, len(order) - 1, min(TIMED, len(order))).round().astype(int):
        label = order[place]
        if len(found) > 1:
            expected = found[last] * work[label] / work[last]
            if spent + expected * TIMED_STEPS > _TIMING * budget:
                break
        found[int(label)] = measure(int(label))
        spent, last = spent + found[int(label)] * TIMED_STEPS, label
    return found, spent


@dataclass(frozen=True)
class NoisePlan:
    """Measure the noise on a drafter of the option ``label`` after a run of so many ``steps``."""

    label: int
    steps: int
    conversations: int
    seconds: float


@checked
def noise_plan(options: pd.DataFrame, budget: Positive) -> NoisePlan | None:
    """How the noise is measured for a few percent of the budget; None where that is not enough.

    On the option of the longest block whose step (``seconds``) takes least.
    """
    longest = options[options["block_size"] == options["block_size"].max()]
    label = longest["seconds"].idxmin()
    step, rows = (float(longest[name][label]) for name in ("seconds", "batch_size"))
    steps = min(_WARM_STEPS, int(_WARMING * budget / step))
    # Two gradients of each objective of a conversation, and a step is one of each of its rows.
    each = 2 * options["block_size"].nunique() * step / rows
    conversations = min(_CONVERSATIONS, int(_NOISING * budget / each))
    if steps < _LEAST_WARM or conversations < _LEAST_CONVERSATIONS:
        return None
    return NoisePlan(int(label), steps, conversations, steps * step + conversations * each)


@checked
def next_pilots(contest: Contest, pilots: Mapping[int, Pilot]) -> dict[int, float]:
    """The options to run, by their label, and the share of a whole run until which.

    None where the answer is there. What ``pilots`` hold beyond what was asked for changes nothing.
    """
    return _Race(contest, pilots).todo


@checked
def decide(contest: Contest, pilots: Mapping[int, Pilot]) -> Advice:
    """The answer; a ValueError while pilots are still to be run."""
    race = _Race(contest, pilots)
    if race.todo:
        raise ValueError(f"pilots must hold all of next_pilots, got none of {race.todo}")
    options, beliefs, plan = contest.options, race.beliefs, contest.plan
    mean, deviation = beliefs.mean, np.sqrt(np.diag(beliefs.covariance))
    draws = beliefs.draws()
    found = {arm: forecast.tau for arm, forecast in race.forecasts.items()}
    arms = range(len(options))
    table = options[[*CELL, "seconds", "rate"]].assign(
        rate_low=options["low"],
        rate_high=options["high"],
        steps=contest.steps,
        prior=np.exp(race.prior.mean),
        piloted=[race.shares.get(arm, 0.0) for arm in arms],
        forecast=[found.get(arm, math.nan) for arm in arms],
        tau=np.exp(mean),
        low=np.maximum(np.exp(mean - _HALF * deviation), 1),
        high=np.minimum(np.exp(mean + _HALF * deviation), options["block_size"] + 1),
        best=np.bincount(draws.argmax(axis=1), minlength=len(mean)) / len(draws),
    )
    first, *others = np.argsort(-mean, kind="stable").tolist()
    begun = race.shares.get(first, 0.0)
    # A run that has begun has its steps; a new one has what all pilots have left.
    rest = plan.seconds
    if not begun:
        rest = contest.budget - contest.measured - race.evaluations * contest.evaluation
        rest -= sum(race.shares.values()) * plan.seconds
    steps = max(1, round(rest / float(options["seconds"].iloc[first])))
    lead = low = high = math.inf
    if others:
        apart = draws[:, first] - draws[:, others[0]]
        low, high = np.expm1(np.quantile(apart, [0.05, 0.95])).tolist()
        lead = math.expm1(mean[first] - mean[others[0]])
    return Advice(
        table.iloc[first],
        table.iloc[others[0]] if others else None,
        lead,
        low,
        high,
        float(table["best"].iloc[first]),
        steps,
        contest.budget - rest,
        table,
        _curves(contest, race, pilots),
        _surer(contest, race, first, others[0]) if others else "There is no other option.",
    )


class _Race:
    """The pilots of a plan, as far as they have come.

    ``todo`` as in :func:`next_pilots`; ``shares`` and ``forecasts`` of the arms that were run, and
    how many ``evaluations`` these had.
    """

    def __init__(self, contest: Contest, pilots: Mapping[int, Pilot]) -> None:
        plan = contest.plan
        self.todo: dict[int, float] = {}
        self.prior = self.beliefs = contest.beliefs(plan.seconds)
        self.shares: dict[int, float] = {}
        self.forecasts: dict[int, Forecast] = {}
        self.evaluations = 0
        alive, before = list(plan.arms), 0.0
        for _, share in plan.rungs:
            if before and not self._worth_going_on(alive, before, share):
                break
            labels = {int(contest.options.index[arm]): arm for arm in alive}
            behind = [one for one in labels if one not in pilots or pilots[one].share < share]
            if behind:
                self.todo = dict.fromkeys(behind, share)
                return
            self.evaluations += len(alive)
            for label, arm in labels.items():
                self.shares[arm] = share
                self.forecasts[arm] = _forecast(pilots[label], share, contest)
            seen = sorted(self.forecasts)
            slots = contest.options["block_size"].to_numpy()[seen]
            found = np.log(np.minimum([self.forecasts[arm].tau for arm in seen], slots + 1))
            own = np.array([pilot_error(self.shares[arm]) for arm in seen])
            own *= self.prior.by_logit[seen]
            whole = np.array([_error(self.forecasts[arm]) for arm in seen])
            shared = np.sqrt(np.maximum(whole**2 - own**2, 0))
            self.beliefs = self.prior.given(seen, found, own, shared)
            alive = promoted({arm: float(self.beliefs.mean[arm]) for arm in alive})
            before = share

    def _worth_going_on(self, alive: Sequence[int], before: float, share: float) -> bool:
        errors = _more_precise(before, share) * self.beliefs.by_logit[list(alive)]
        lost = (len(alive) - 1) * (share - before)
        slope = self.beliefs.slope[self.beliefs.mean.argmax()]
        return self.beliefs.expected_gain(list(alive), errors) > slope * lost


@checked
def promoted(forecasts: Mapping[int, float]) -> list[int]:
    """The half of the runs that goes on to the next rung of successive halving, one at least.

    Optuna's pruner judges a run by those that came to the rung before it; here each comes last, so
    that the order in which they end changes nothing. Of equal ones the first stay.
    """
    import optuna

    logged = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        kept = [key for key in forecasts if _stays(key, forecasts)]
    finally:
        optuna.logging.set_verbosity(logged)
    return kept[: max(1, len(forecasts) // 2)]


def _stays(key: int, forecasts: Mapping[int, float]) -> bool:
    import optuna

    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    pruned = False
    for other in [*(other for other in forecasts if other != key), key]:
        trial = study.ask()
        trial.report(forecasts[other], step=1)
        pruned = trial.should_prune()
    return not pruned


def _scheduled(arms: Sequence[int], first: int, rest: float, evaluation: float) -> PilotPlan | None:
    """Rungs from a point of the run on, each for half as many; None where a run is too short."""
    shares = PILOT_SHARES[first:-1]
    rungs: list[tuple[int, float]] = []
    lost, count = 0.0, len(arms)
    while count > 1:
        if len(rungs) == len(shares):
            return None
        share, kept = shares[len(rungs)], count // 2
        rungs.append((count, share))
        lost, count = lost + (count - kept) * share, kept
    evaluated = sum(number for number, _ in rungs) * evaluation
    whole = (rest - evaluated) / (1 + lost)
    if whole <= 0:
        return None
    # The one that is left at the end has run as far as the last rung.
    most = (lost + rungs[-1][1]) * whole + evaluated
    return PilotPlan(tuple(arms), tuple(rungs), whole, most)


def pilot_step(steps: int, share: float) -> int:
    """The evaluated step that is nearest to a share of a run."""
    return min(evaluation_steps(steps, EVALUATIONS), key=lambda step: abs(step - share * steps))


def _measured(pilot: Pilot, share: float, domain: str) -> pd.DataFrame:
    """The lines of training, and of evaluations over a domain, up to a share of a pilot's run."""
    lines = pilot.lines
    by_then = lines["step"] <= pilot_step(int(lines["steps"].iloc[0]), share)
    return run_points(lines[by_then], domain)


def _forecast(pilot: Pilot, share: float, contest: Contest) -> Forecast:
    lines = _measured(pilot, share, contest.domain)
    steps, peak, warmup = lines[["steps", "learning_rate", "warmup_steps"]].iloc[0]
    own: dict[str, Any] = {"learning_rate": float(peak), "warmup_steps": int(warmup)}
    config = replace(contest.training, steps=int(steps), **own)
    return extrapolate(lines, learning_rates(config), reference=contest.reference)


def _error(forecast: Forecast) -> float:
    """The standard deviation of its log tau."""
    return math.log(forecast.high / forecast.low) / (2 * _HALF)


def _more_precise(before: float, share: float) -> float:
    """The error of what a longer pilot adds to what the shorter one said."""
    return (pilot_error(share) ** -2 - pilot_error(before) ** -2) ** -0.5


def _surer(contest: Contest, race: _Race, best: int, other: int) -> str:
    """What longer pilots of the best and the runner-up would cost, and how sure they would make."""
    pair = [best, other]
    lead = float(race.beliefs.mean[best] - race.beliefs.mean[other])
    (a, c), (_, b) = race.beliefs.covariance[np.ix_(pair, pair)]
    variance, begun = float(a + b - 2 * c), min(race.shares.get(arm, 0.0) for arm in pair)
    sure = _expected_sure(lead, variance, math.inf)
    if sure >= _SURE:
        return f"Between these two it is {sure:.0%} sure, which more pilots would hardly change."
    run, steps = sum(race.shares.get(arm, 0.0) for arm in pair), contest.steps.iloc[pair].min()
    text = ""
    for share in PILOT_SHARES[_FIRST:-1]:
        if share <= begun or share * steps < PILOT_STEPS:
            continue
        error = _more_precise(begun, share) if begun else pilot_error(share)
        sure = _expected_sure(
            lead, variance, error**2 * float((race.prior.by_logit[pair] ** 2).sum())
        )
        seconds = (2 * share - run) * contest.plan.seconds
        if seconds > contest.budget:
            break
        text = f"Another {seconds:,.0f} s of pilots of these two would make it {sure:.0%} sure"
        if sure >= _SURE:
            return f"{text}."
    if not text:
        return "Pilots that make it surer would take longer than the run: train both."
    return f"{text} and no more: longer ones take more than the budget, or seeds differ by as much."


def _expected_sure(lead: float, variance: float, error: float) -> float:
    """The expected probability of the better of two after their difference is measured.

    The difference of their log tau is a Gaussian, and so is the ``error`` (a variance) of what is
    measured of it.
    """
    from scipy import stats

    left = variance if math.isinf(error) else variance * error / (variance + error)
    quantiles = stats.norm.ppf((np.arange(400) + 0.5) / 400)
    means = lead + math.sqrt(max(variance - left, 0)) * quantiles
    return float(stats.norm.cdf(np.abs(means) / math.sqrt(left)).mean())


def _curves(contest: Contest, race: _Race, pilots: Mapping[int, Pilot]) -> pd.DataFrame:
    """What was measured, with the survival by slot, and where it leads."""
    columns = ["option", "kind", "step", "tau", "low", "high", "survival"]
    parts = [pd.DataFrame(columns=columns)]
    for arm, forecast in race.forecasts.items():
        label = contest.options.index[arm]
        seen = _measured(pilots[label], race.shares[arm], contest.domain)
        seen = seen.loc[seen["kind"] == "held_out", ["step", "tau", "survival"]]
        parts.append(seen.assign(option=label, kind="measured"))
        parts.append(forecast.table.assign(option=label, kind="forecast"))
    return pd.concat(parts, ignore_index=True)[columns]


def option_name(option: pd.Series) -> str:
    """Such as "N 16, K 7, 8 rows"."""
    rows, anchors, block_size = (int(option[name]) for name in CELL)
    return f"N {anchors}, K {block_size}, {rows} row{'s' if rows > 1 else ''}"


@checked
def replay_pilot(
    runs: pd.DataFrame,
    progress: pd.DataFrame,
    amount: Positive,
    *,
    measured: NonNegative | None = None,
    growth: Growth = GROWTH,
    reference: Reference | None = None,
    domain: str = ALL,
    share: Share = 0.15,
    by: Literal["seconds", "slots"] = "seconds",
    seed: Size = 0,
) -> Advice:
    """What a pilot would have answered whose runs are the beginnings of recorded ones.

    What it has ``spent``, the winner's run lacks: :func:`judge_advice` takes it away.

    Args:
        runs: of one mix, of every option (:func:`load_runs`); for pilots, of the budget ``amount``.
            Of their evaluations a pilot has those at the ends of its rungs, each as long as the
            quickest that was recorded.
        progress: a line for each option of the runs (:func:`progress_table`).
        amount: the budget.
        measured: seconds that step times and noise took; None for what :func:`pilot` would take. It
            measures no noise where :func:`noise_plan` is None: give it :func:`usual_noise` there.
        growth: of runs on other data, see :func:`fit_growth`.
        reference: what runs on other data say of learning curves, see :func:`learn_curves`.
        domain: of the held-out conversations that count.
        by: what the budget counts: seconds, or supervised slots, of which then no pilot is run.
        seed: of the runs.
    """
    run = ["amount", "seed", "steps", "learning_rate", "warmup_steps"]
    line = ["kind", "domain", "step", "tau", "survival", "spent"]
    require_columns("runs", runs, [*CELL, *run, *line])
    require_columns("progress", progress, _OPTION)
    options, by_option = progress.reset_index(drop=True), {}
    for label, option in options.iterrows():
        mine = runs["seed"] == seed
        for name in CELL:
            mine &= runs[name] == option[name]
        by_option[label] = runs[mine]
        if by_option[label].empty:
            raise ValueError(
                f"runs must hold every option of progress, got no {option_name(option)}"
            )
        if by == "slots":
            ended = run_table(by_option[label])
            options.loc[label, "seconds"] = (ended["slots"] / ended["steps"]).mean()
    if measured is None:
        _, measured = timed_options(
            options["seconds"], amount, lambda label: float(options["seconds"][label])
        )
        plan = noise_plan(options, amount)
        measured += plan.seconds if plan else 0.0
    allowed = pilot_allowance(amount, share) if by == "seconds" else 0.0
    others: dict[str, Any] = {"growth": growth, "reference": reference, "domain": domain}
    held_out = runs["kind"] == "held_out"
    evaluation = float(runs.loc[held_out, "spent"].min()) if by == "seconds" else 0.0
    contest = Contest(options, amount, allowed, measured, evaluation, **others)
    pilots: dict[int, Pilot] = {}
    ends: dict[int, list[int]] = {}
    while todo := next_pilots(contest, pilots):
        for label, part in todo.items():
            lines = by_option[label][by_option[label]["amount"] == amount]
            ends.setdefault(label, []).append(pilot_step(int(lines["steps"].iloc[0]), part))
            seen = (lines["kind"] == "train") | lines["step"].isin(ends[label])
            pilots[label] = Pilot(part, lines[seen])
    return decide(contest, pilots)
