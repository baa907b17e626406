"""Which pilots to run, how far, and what their results say: without training anything.

    contest = Contest(options, budget=600)
    while todo := next_runs(contest, points):
        points = ...                             # run each option of todo up to its step
    decide(contest, points)

What an option will reach in the whole budget is known in advance with some error, by
:class:`Growth`. A pilot is the beginning of an option's own run, and its extrapolation another
estimate of the same. The two are combined as Gaussians, log tau of all options together, so that a
pilot says something of the options that it was not. Pilots cost what the losers' training takes
from the winner, and are run where the log tau that the choice is expected to gain is more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from dspark_lab.checks import Count, NonNegative, Positive, Share, checked
from dspark_lab.tuning.growth import Growth

@checked
@dataclass(frozen=True, eq=False)
class Contest:
    """Options and what they may cost.

    Args:
        options: of :func:`progress_table`: a line each with ``batch_size``, ``num_anchors``,
            ``block_size``, ``seconds`` and ``noise`` of a step, and ``rate``, progress a second, in
            its interval ``low`` to ``high``.
        budget: seconds (or whatever else ``seconds`` of a step counts).
        measured: of the budget, spent already.
        share: of the budget that pilots which do not win may take; see :attr:`allowed`.
        arms: pilots at most.
        evaluations: points of a whole run, at which pilots may end.
        growth: how tau grows, from other data.
    """

    options: pd.DataFrame
    budget: Positive
    measured: NonNegative = 0.0
    share: Share = 0.15
    arms: Count = 5
    evaluations: Count = 12
    growth: Growth = None

    @property
    def allowed(self) -> float:
        """Seconds that losers may take: a share of 200 s at least, but of a third of the budget"""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Advice:
    """What to train with the rest of the budget, and how sure that is.

    Attributes:
        best: the option, with its ``steps``, ``tau``, ``low`` and ``high``.
        runner_up: the next, None where there is none; ``lead``: relative, of tau, with
            ``lead_low`` and ``lead_high``.
        sure: probability that no other option reaches more.
        spent: seconds of the budget that measuring and losing pilots took.
        table: a line an option: its progress, its pilot, its forecast with a 90 % interval.
        surer: what more pilots would bring, in words.
        reason: all that in a sentence or two.
    """

    best: pd.Series
    runner_up: pd.Series | None
    lead: float
    lead_low: float
    lead_high: float
    sure: float
    spent: float
    table: pd.DataFrame
    surer: str
    reason: str


@checked
def next_runs(contest: Contest, points: pd.DataFrame) -> dict[int, int]:
    """The options to run, and the step until which, given what there is; none where it is decided.

    ``points`` are lines of runs as :func:`load_runs` describes them, with the ``option`` (its label
    in the contest's table) that each is of.
    """
    raise NotImplementedError


@checked
def decide(contest: Contest, points: pd.DataFrame) -> Advice:
    """The answer, from the points that :func:`next_runs` asked for; all other points count for nothing."""
    raise NotImplementedError


@checked
def replay_pilot(
    runs: pd.DataFrame,
    progress: pd.DataFrame,
    amount: Positive,
    *,
    reference: pd.DataFrame | None = None,
    reference_progress: pd.DataFrame | None = None,
    measured: NonNegative = 0.0,
    share: Share = 0.15,
    by: Literal["seconds", "slots"] = "seconds",
) -> Advice:
    """What a pilot would have said of recorded runs of one mix (:func:`load_runs`).

    Args:
        runs: of one mix; a cell's runs of other budgets say what it reaches in less than ``amount``.
        progress: of :func:`progress_table` for this mix.
        amount: the budget.
        reference: runs of other data, with their progress, that say how tau grows.
        measured: seconds that step times and noise took.
        by: what the budget counts: seconds, or supervised slots.
    """
    raise NotImplementedError
