"""The advised draft length held against real decoding of other prompts, every length in turns."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from dspark_lab.checks import Count, NonNegative, Size, checked
from dspark_lab.decoding import Prompt
from dspark_lab.model import BlockDrafter, Target
from dspark_lab.serving.costs import RoundCosts
from dspark_lab.serving.profile import AcceptanceProfile


@checked
def decode_lengths(
    target: Target,
    drafter: BlockDrafter,
    prompts: Sequence[Prompt],
    *,
    draft_lengths: Sequence[Size] | None = None,
    temperature: NonNegative = 0.0,
    requests: Count = 1,
    turns: Count = 2,
    max_new_tokens: Count = 64,
    seed: Size = 0,
) -> pd.DataFrame:
    """Decode the prompts at every draft length, 0 being plain decoding, in turns.

    Args:
        prompts: so many ``requests`` share their rounds, a *group*; a rest too small for one is
            left out.
        draft_lengths: by default plain decoding and every length of the drafter.
        turns: how often every group is decoded at every length, with other random numbers.

    Returns:
        a row for each turn, group and length: ``tokens``, ``steps`` and ``seconds`` without the
        reading of prompts, as long as all requests of the group go on.
    """
    raise NotImplementedError


@checked
def length_table(
    decoded: pd.DataFrame,
    profile: AcceptanceProfile | None = None,
    costs: RoundCosts | None = None,
    *,
    resamples: Count = 1000,
    seed: Size = 0,
) -> pd.DataFrame:
    """Measured speed at each length of :func:`decode_lengths`, beside what was predicted.

    Returns:
        a row for each length: tokens a second of all requests together with the 95 % interval over
        groups, ``tau``, ``round_seconds``; with a profile and costs also both as predicted.
    """
    raise NotImplementedError


@checked
def length_loss(
    decoded: pd.DataFrame, advised: Size, *, resamples: Count = 1000, seed: Size = 0
) -> pd.Series:
    """Loss of speed at the advised length, against the fastest of :func:`decode_lengths`.

    The fastest of noisy lengths looks faster than it is. So every second group chooses the fastest
    for the others, and is compared with the one that these chose.
    """
    raise NotImplementedError
