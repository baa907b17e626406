"""Learning curves: where tau will be at the end of a run, from its points so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from dspark_lab.checks import Positive, Share, checked


@dataclass(frozen=True, eq=False)
class Forecast:
    """Where tau will be at the end of a run, with an interval.

    ``kind``: "held_out" where the points hold evaluations, else "train", which is then what tau,
    ``low`` and ``high`` are of. ``gain``, ``gain_low``, ``gain_high``: what another tenth of steps
    would bring (the whole schedule stretched), relative to ``tau``. ``flat``: whether that is below
    1 % with its interval. ``table``: the curve, a line for each of some steps of the whole run:
    ``step``, ``tau``, ``low``, ``high``. ``by_slot``: the accept (or survival) rate of each slot at
    the end, ``low`` to ``high``; empty where the points have none.
    """

    tau: float
    low: float
    high: float
    level: float
    kind: str
    steps: int
    gain: float
    gain_low: float
    gain_high: float
    flat: bool
    table: pd.DataFrame
    by_slot: pd.DataFrame
    reason: str


@checked
def extrapolate(
    points: pd.DataFrame,
    learning_rates: Float[np.ndarray, " step"],
    *,
    measured: Float[np.ndarray, " measured_step"] | None = None,
    reference: pd.DataFrame | None = None,
    level: Share = 0.9,
) -> Forecast:
    """Extrapolate the points of a run to its end.

    Args:
        points: a line for each point: ``step`` (from 1), ``tau``; optional ``kind``, "held_out"
            (the default) or "train" (the mean since the training point before), and ``accept`` or
            ``survival``, a list by slot. A part of :func:`load_runs` is such a table.
        learning_rates: of every step of the run that is asked about, from its first to its last.
        measured: the learning rates of the run that the points are of, where that was another one:
            a pilot that had fewer steps, and whose rate fell earlier.
        reference: runs, as :func:`load_runs` gives them, which say how curves are bent, what a
            falling learning rate brings, and how far extrapolations are off.
        level: of the intervals.
    """
    raise NotImplementedError
