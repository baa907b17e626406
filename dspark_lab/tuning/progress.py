"""Expected progress a second of every setting: what a step teaches over what it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import pandas as pd

from dspark_lab.blocks import Per
from dspark_lab.checks import Count, NotEmpty, Size, checked
from dspark_lab.tuning.noise import GradientNoise
from dspark_lab.tuning.shape import Shape
from dspark_lab.tuning.spans import Spans
from dspark_lab.tuning.step import Step
from dspark_lab.tuning.steptime import StepTime


@checked
def progress_table(
    noise: GradientNoise,
    spans: Spans | Mapping[int, Spans],
    seconds: StepTime | pd.DataFrame,
    *,
    batch_sizes: Annotated[Sequence[Count], NotEmpty()] = (8,),
    num_anchors: Annotated[Sequence[Count], NotEmpty()] = (4, 8, 16, 32, 64, 128),
    block_sizes: Annotated[Sequence[Count], NotEmpty()] | None = None,
    per: Per | Sequence[Per] = "row",
    shape: Shape | None = None,
    step: Step | None = None,
    resamples: Count = 1000,
    seed: Size = 0,
) -> pd.DataFrame:
    """The expected progress a second of every combination of rows, anchors and block size.

    Args:
        noise: as measured; ``block_sizes`` are all of its own where None.
        spans: of the conversations, in rows as they are trained on; or by the row's length.
        seconds: of a step: a table with a line for each option (``batch_size``, ``num_anchors``,
            ``block_size``, and ``seq_len`` and ``per`` where these vary), ``seconds``, and where
            known ``error``, its relative standard deviation; or a fit, which needs ``shape``, and
            ``step`` for all that is not an option.
        per: what ``num_anchors`` counts for.
        resamples: of the conversations and step times, for the intervals.

    Returns:
        one line for each option, with its ``seq_len`` (longest row) and ``per``: ``anchors`` and
        ``effective`` ones of a step; ``noise``: the variance of the step's gradient over its squared mean;
        ``progress`` of a step, ``rate``: of a second, with its 95 % interval ``low`` to ``high``;
        ``best``: the probability to have the highest rate of its block size. Rates of different
        block sizes are those of different objectives: nothing tells them apart here.
    """
    raise NotImplementedError


@checked
def progress_reason(table: pd.DataFrame, block_size: Count | None = None) -> str:
    """Why the best option of :func:`progress_table` is the best, in a sentence."""
    raise NotImplementedError
