"""The advised draft length held against real decoding, every length in turns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd

from dspark_lab.checks import Count, NonNegative, Size, checked, require_columns
from dspark_lab.decoding import Decoding, Prompt, decode_rounds, encode_prompt
from dspark_lab.model import BlockDrafter, Target
from dspark_lab.rates import interval, ratio_interval, resampled
from dspark_lab.serving.costs import RoundCosts, require_lengths
from dspark_lab.serving.profile import AcceptanceProfile
from dspark_lab.serving.speedup import AnswerTokens, speedup_table

_COLUMNS = ("turn", "group", "draft_length", "requests", "tokens", "steps", "seconds")


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

    A group of prompts is decoded at all lengths, in random order, before it is the next one's turn.

    Args:
        prompts: so many ``requests`` share their rounds, a *group*; a rest too small for one is
            left out.
        draft_lengths: by default plain decoding and every length of the drafter.
        turns: how often every group is decoded at every length, with other random numbers.

    Returns:
        a row for each turn, group and length: ``tokens``, ``steps`` that the requests shared, and
        ``seconds``, without the reading of prompts, and as long as all of the group go on. Since an
        answer's first tokens are the easiest, those of a group should be about as long.
    """
    if requests > 1 and not target.decodes_batches:
        raise ValueError(
            f"requests must be 1 for a target that decodes one row at a time, got {requests}"
        )
    most = drafter.config.predicted
    lengths = sorted({*(range(most + 1) if draft_lengths is None else draft_lengths)})
    require_lengths([k for k in lengths if k], most)
    ids = [encode_prompt(target, prompt) for prompt in prompts]
    groups = [ids[i : i + requests] for i in range(0, len(ids) - requests + 1, requests)]
    if not groups:
        raise ValueError(f"prompts must be {requests} or more for a group, got {len(ids)}")
    rng = np.random.default_rng(seed)

    def timed(group: list[list[int]], k: int, seed: int, tokens: int) -> tuple[int, int, float]:
        options: dict[str, Any] = {"temperature": temperature, "max_new_tokens": tokens}
        options |= {"draft_length": k or None, "seed": seed}
        return _whole_steps(
            decode_rounds(target, drafter if k else None, group, **options), requests
        )

    for k in lengths:
        # The first calls of a shape are slower, and count for nobody.
        timed(groups[0], k, seed, min(max_new_tokens, 8))
    rows = []
    for turn in range(turns):
        for number, group in enumerate(groups):
            of_turn = seed + turn * len(groups) + number
            for k in rng.permutation(lengths).tolist():
                counted = timed(group, k, of_turn, max_new_tokens)
                rows.append((turn, number, k, requests, *counted))
    return pd.DataFrame(rows, columns=list(_COLUMNS))


@checked
def length_table(
    decoded: pd.DataFrame,
    profile: AcceptanceProfile | None = None,
    costs: RoundCosts | None = None,
    *,
    tokens: AnswerTokens = None,
    resamples: Count = 1000,
    seed: Size = 0,
) -> pd.DataFrame:
    """Measured speed at each length of :func:`decode_lengths`, beside what was predicted.

    Returns:
        a row for each length: ``tau``, ``round_seconds``, and ``tokens_per_second`` of a request
        with its 95 % interval over groups. With a profile and costs of as many requests, all three
        as ``_predicted`` by :func:`speedup_table` for answers of ``tokens``, too.
    """
    sums = _sums(decoded)
    requests = decoded["requests"].iloc[0]
    grown, steps, seconds = (sums[name] for name in ("tokens", "steps", "seconds"))
    grown = grown / requests
    table = pd.DataFrame(
        {
            "tau": grown.sum() / steps.sum(),
            "round_seconds": seconds.sum() / steps.sum(),
            "tokens_per_second": grown.sum() / seconds.sum(),
        }
    ).reset_index()
    drawn = resampled(len(grown), resamples, seed)
    bounds = ratio_interval(grown.to_numpy().T, seconds.to_numpy().T, drawn)
    table["tokens_per_second_low"], table["tokens_per_second_high"] = bounds
    if profile is not None and costs is not None:
        plain = costs.plain_seconds
        rows = [
            {"draft_length": 0, "tau": 1, "round_seconds": plain, "tokens_per_second": 1 / plain}
        ]
        drafted = table["draft_length"][table["draft_length"] > 0].tolist()
        predicted = pd.concat(
            [pd.DataFrame(rows), speedup_table(profile, costs, drafted, tokens=tokens)]
        )
        predicted = predicted[list(rows[0])].set_index("draft_length").add_suffix("_predicted")
        table = table.join(predicted, on="draft_length")
    return table


@checked
def length_loss(
    decoded: pd.DataFrame, advised: Size, *, resamples: Count = 1000, seed: Size = 0
) -> pd.Series:
    """Loss of speed at the advised length, against the fastest of :func:`decode_lengths`.

    The fastest of noisy lengths is faster where it was chosen than elsewhere. So each half of the
    groups, drawn at random, is compared with the length that is the fastest in the other half. That
    may not be the fastest in truth: ``loss`` errs low, by chance, and ``loss_of_all``, against the
    fastest of all groups, errs high.

    Returns:
        the ``advised`` length, the ``fastest`` of all groups, ``loss_of_all``, and ``loss``, a
        share of the fastest's speed, with its 95 % interval over groups, which were decoded at both
        lengths; ``told_apart`` is whether all of the interval is above 0.
    """
    sums = _sums(decoded)
    lengths = sums["tokens"].columns
    if advised not in lengths:
        raise ValueError(f"advised must be one of the decoded {lengths.tolist()}, got {advised}")
    tokens, seconds = (sums[name].to_numpy(np.float64) for name in ("tokens", "seconds"))
    count = len(tokens)
    if count < 2:
        raise ValueError(f"decoded must hold two or more groups, got {count}")
    half = np.random.default_rng(seed).permutation(count) % 2
    speeds = np.stack(
        [tokens[half != h].sum(axis=0) / seconds[half != h].sum(axis=0) for h in (0, 1)]
    )
    # The column, for each group, of the length that is the fastest in the other half.
    fastest = speeds.argmax(axis=1)[half]
    own, other = lengths.get_loc(advised), np.arange(count)
    drawn = np.concatenate([np.ones((1, count), int), resampled(count, resamples, seed)])
    speed, against = (
        (drawn @ tokens[other, column]) / (drawn @ seconds[other, column])
        for column in (own, fastest)
    )
    loss = 1 - speed / against
    low, high = interval(loss[1:], count)
    of_all = tokens.sum(axis=0) / seconds.sum(axis=0)
    figures = {
        "advised": advised,
        "fastest": int(lengths[of_all.argmax()]),
        "loss_of_all": 1 - of_all[own] / of_all.max(),
        "loss": loss[0],
        "loss_low": low,
        "loss_high": high,
        "told_apart": bool(low > 0),
    }
    return pd.Series(figures, dtype=object)


def _whole_steps(run: Decoding, requests: int) -> tuple[int, int, float]:
    """Tokens, steps and seconds of a run until the first of its requests is over."""
    tokens = steps = 0
    seconds = 0.0
    # Where fewer are left, the next rounds are too few, or of two steps.
    while len(step := list(islice(run, requests))) == requests:
        if step[0].number != step[-1].number:
            break
        tokens += sum(len(round_.tokens) for round_ in step)
        steps += 1
        seconds = sum(run.seconds.values()) - run.seconds["prompt"]
    return tokens, steps, seconds


def _sums(decoded: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Tokens, steps and seconds over all turns, ``[group, length]`` each."""
    require_columns("decoded", decoded, _COLUMNS)
    if decoded["requests"].nunique() != 1:
        given = decoded["requests"].unique().tolist()
        raise ValueError(f"decoded must be of one number of requests, got {given}")
    table = decoded.groupby(["group", "draft_length"])[["tokens", "steps", "seconds"]].sum()
    wide = table.unstack("draft_length")
    if wide.isna().any(axis=None):
        raise ValueError("decoded must hold every group at every length, got one that lacks some")
    if not (wide["steps"].sum() > 0).all():
        raise ValueError("decoded must hold a step at every length, got one without any")
    return {name: wide[name] for name in ("tokens", "steps", "seconds")}
