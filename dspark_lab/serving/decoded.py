"""Decoded speed, against plain decoding and against the prediction."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from dspark_lab.checks import Count, Size, checked
from dspark_lab.decoding import Decoded, Prompt, decode, encode_prompt
from dspark_lab.files import now
from dspark_lab.model import BlockDrafter, Target, TargetCache
from dspark_lab.serving.costs import RoundCosts, break_even_rate, require_lengths
from dspark_lab.serving.profile import acceptance_profile
from dspark_lab.serving.speedup import speedup_table
from dspark_lab.serving.timing import measure_engine


@checked
def speed_table(
    plain: Sequence[Decoded], drafted: Sequence[Decoded], block_size: Count
) -> pd.Series:
    """Speculative against plain decoding of the same prompts, without the reading of these.

    ``draft``, ``verify`` and ``rest`` are shares of a round's time; at ``break_even_tau``, and at
    the ``break_even_rate`` of every slot that gives it (inf: none), both would be as fast.
    """
    tokens, rounds, parts = _sum("drafted", drafted)
    plain_tokens, _, plain_parts = _sum("plain", plain)
    seconds = parts.sum()
    speed, plain_speed = tokens / seconds, plain_tokens / plain_parts.sum()
    break_even_tau = seconds / rounds * plain_speed
    figures = {
        "tokens_per_second": speed,
        "plain_tokens_per_second": plain_speed,
        "speedup": speed / plain_speed,
        "tau": tokens / rounds,
        **parts / seconds,
        "break_even_tau": break_even_tau,
        "break_even_rate": break_even_rate(break_even_tau, block_size),
    }
    return pd.Series(figures)


@checked
def repeated_speeds(
    plain: Sequence[Decoded], drafted: Sequence[Decoded], block_size: Count
) -> pd.DataFrame:
    """The :func:`speed_table` of runs of the same prompts: median, lowest and highest figures.

    Run i of ``drafted`` is timed against run i of ``plain``. The rows are named in ``of_runs``.
    """
    counts = len(plain), len(drafted)
    if counts[0] != counts[1] or not plain:
        raise ValueError(f"plain and drafted must be as many runs, one or more, got {counts}")
    runs = pd.DataFrame(
        [speed_table([one], [other], block_size) for one, other in zip(plain, drafted, strict=True)]
    )
    table = runs.agg(["median", "min", "max"]).assign(runs=len(runs))
    return table.reset_index(drop=True).assign(of_runs=["median", "lowest", "highest"])[
        ["of_runs", "runs", *runs.columns]
    ]


@checked
def decode_check(
    target: Target,
    drafter: BlockDrafter,
    prompts: Sequence[Prompt],
    trace: pd.DataFrame,
    *,
    draft_lengths: Sequence[Count] | None = None,
    temperatures: Sequence[float] = (0.0, 1.0),
    max_new_tokens: Count = 64,
    replay: bool = False,
    costs: Mapping[float, RoundCosts] | None = None,
    repeats: Count = 20,
    resamples: Count = 1000,
    seed: Size = 0,
) -> pd.DataFrame:
    """Predictions from a trace and from costs against what decoding really does.

    Prompts are decoded one at a time, plainly and at each length in turns; predictions are for
    answers as long as those that came out.

    Args:
        trace: of this drafter alone, with a column ``temperature``.
        draft_lengths: by default all that the trace has.
        replay: read again what was accepted after each rejection, as if no cache could be cut.
        costs: of each temperature, measured first where None, with ``repeats``.

    Returns:
        a row for each temperature and length. The errors are the shares by which the predicted
        ``tau`` and ``speedup`` are too high; other columns as in :meth:`RoundCosts.figures`.
    """
    ids = [encode_prompt(target, prompt) for prompt in prompts]
    # Half an answer behind a prompt of middling length.
    context = int(np.median([len(tokens) for tokens in ids])) + max_new_tokens // 2
    measured: dict[str, Any] = {"requests": (1,), "context_length": context, "repeats": repeats}
    rows = []
    for temperature in temperatures:
        profile = acceptance_profile(trace, temperature=temperature, resamples=resamples, seed=seed)
        lengths = require_lengths(draft_lengths, len(profile.rates))
        if costs is None:
            engine = measure_engine(
                target, drafter, draft_lengths=lengths, temperature=temperature, **measured
            )
            here = engine.costs()
            if replay:
                again = _replay_seconds(target, context, engine.longest, repeats)
                here = dataclasses.replace(here, replay_seconds=again)
        else:
            here = costs[temperature]
        runs: dict[int, list[Decoded]] = {k: [] for k in (0, *lengths)}
        options: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens}
        for number, prompt in enumerate(ids):
            options["seed"] = seed + number
            runs[0].append(decode(target, None, [prompt], **options))
            for k in lengths:
                run = decode(target, drafter, [prompt], draft_length=k, **options)
                runs[k].append(_with_replay(target, prompt, run) if replay else run)
        for k in lengths:
            real = speed_table(runs[0], runs[k], k)
            answers = [len(run.tokens[0]) - 1 for run in runs[k]]
            figures = speedup_table(profile, here, [k], tokens=answers).iloc[0]
            row = {"temperature": temperature, "draft_length": k}
            row["rounds"] = sum(len(run.rounds) for run in runs[k])
            row |= figures[["tau", "tau_low", "tau_high"]]
            row |= {"tau_decoded": real["tau"], "tau_error": figures["tau"] / real["tau"] - 1}
            speeds = ["speedup", "speedup_low", "speedup_high", "without_replay"]
            row |= figures[[*speeds, "without_overhead"]]
            row["speedup_decoded"] = real["speedup"]
            row["speedup_error"] = row["speedup"] / real["speedup"] - 1
            rows.append(row)
    return pd.DataFrame(rows)


def _replay_seconds(target: Target, context: int, longest: int, repeats: int) -> list[float]:
    """Median seconds of reading 1, 2, ... tokens again behind a context."""
    cache = target.start_cache(1, context + longest)
    _read(target, cache, [0] * context)
    times = [
        [_read(target, cache, [0] * count, keep=False) for count in range(1, longest + 1)]
        for _ in range(repeats)
    ]
    return np.median(times, axis=0).tolist()


def _with_replay(target: Target, prompt: list[int], run: Decoded) -> Decoded:
    """The run with the seconds of reading again, after each rejection, in the rest."""
    cache = target.start_cache(1, len(prompt) + len(run.tokens[0]) + 1)
    _read(target, cache, prompt)
    spent, begin = 0.0, 0
    for round_ in run.rounds.itertuples():
        seconds = _read(target, cache, run.tokens[0][begin : begin + round_.accepted + 1])
        if round_.accepted < round_.verified:
            spent += seconds
        begin += round_.tokens
    return dataclasses.replace(run, seconds=run.seconds | {"rest": run.seconds["rest"] + spent})


@torch.inference_mode()
def _read(target: Target, cache: TargetCache, tokens: Sequence[int], *, keep: bool = True) -> float:
    rows = torch.tensor([list(tokens)], device=target.device)
    begin = now(target.device)
    target.advance(rows, cache, [])
    spent = now(target.device) - begin
    cache.commit([len(tokens) * keep])
    return spent


def _sum(name: str, decoded: Sequence[Decoded]) -> tuple[int, int, pd.Series]:
    """Tokens, rounds, and seconds of each part of a round."""
    tokens = sum(int(run.rounds["tokens"].sum()) for run in decoded)
    rounds = sum(len(run.rounds) for run in decoded)
    if rounds == 0:
        raise ValueError(f"{name} must hold at least one round, got none")
    seconds = pd.DataFrame([run.seconds for run in decoded])
    return tokens, rounds, seconds[["draft", "verify", "rest"]].sum()
