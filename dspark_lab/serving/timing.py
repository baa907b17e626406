"""Measured seconds: of the rounds of this lab's decoding, and of the target's steps.

A figure is a median; a GPU's work is waited for.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from dspark_lab.checks import Count, Size, checked
from dspark_lab.decoding import decode_rounds, distribution
from dspark_lab.files import now
from dspark_lab.model import Drafter, Target
from dspark_lab.serving.costs import require_lengths
from dspark_lab.serving.engine import Engine
from dspark_lab.serving.steps import StepsPerSecond, measured_points

_PARTS = ("draft", "verify", "rest")
# Rounds of one kind that are timed before it is another's turn.
_ROUNDS_AT_A_TIME = 12

# How many requests decode together, and how many tokens are drafted; 0 is plain decoding.
Kind = tuple[int, int]


@checked
def measure_engine(
    target: Target,
    drafter: Drafter,
    *,
    requests: Sequence[Count] | None = None,
    draft_lengths: Sequence[Count] | None = None,
    context_length: Count = 128,
    temperature: float = 0.0,
    repeats: Count = 10,
    warm_up: Size = 3,
    seed: Size = 0,
) -> Engine:
    """This lab's decoding as an :class:`Engine`, on the devices of these models.

    The target's steps include its distributions; what drafting takes is linear between the measured
    lengths.

    Args:
        requests: how many take their rounds together, rising; 1, 4 and 16 where None, or 1 alone
            for a target that decodes one row at a time.
        draft_lengths: one slot and a whole block where None.
        context_length: tokens of a random prompt; rounds add to it.
        temperature: of decoding; drawing costs more than taking the likeliest.
        repeats, warm_up: rounds that count, and rounds before these that do not.
    """
    if requests is None:
        requests = (1, 4, 16) if target.decodes_batches else (1,)
    counts = measured_points("requests", requests).tolist()
    if counts != [1] and not target.decodes_batches:
        raise ValueError(
            f"requests must be 1 for a target that decodes one row at a time, got {counts}"
        )
    block_size = drafter.config.block_size
    lengths = sorted({*require_lengths(draft_lengths or [1, block_size], block_size)})
    spent = _timed_rounds(
        target,
        drafter,
        [(count, k) for count in counts for k in (0, *lengths)],
        _random_prompt(target, context_length, seed),
        temperature=temperature,
        repeats=repeats,
        warm_up=warm_up,
        seed=seed,
    )
    steps: dict[int, list[float]] = {}
    for (count, k), seconds in spent.items():
        steps.setdefault(count * (k + 1), []).append(seconds["verify"])
    by_tokens = {tokens: statistics.median(seconds) for tokens, seconds in steps.items()}
    drafts = [[spent[count, k]["draft"] for k in lengths] for count in counts]
    slots = range(1, lengths[-1] + 1)
    return Engine(
        sps=_curve(target, by_tokens, context_length),
        requests=np.array(counts),
        draft=np.array([np.interp(slots, lengths, seconds) for seconds in drafts]),
        rest=np.array([spent[count, lengths[-1]]["rest"] for count in counts]),
        plain_rest=np.array([spent[n, 0]["draft"] + spent[n, 0]["rest"] for n in counts]),
    )


@torch.inference_mode()
@checked
def measure_steps_per_second(
    target: Target,
    tokens: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128),
    *,
    context_length: Count = 256,
    tokens_per_row: Count = 8,
    warm_up: Size = 2,
    repeats: Count = 5,
    seed: Size = 0,
) -> StepsPerSecond:
    """SPS(B) of a target on the device that it is on.

    A step is what decoding does to verify: every row reads its tokens behind ``context_length``
    cached ones, and each token gets its probabilities over the vocabulary. B tokens are R requests
    of n tokens each: n is the largest divisor of B that is at most ``tokens_per_row``, as in a
    server that verifies blocks of n - 1 slots. A target that decodes one row at a time reads all B
    in it. After each step, outside the clock, the cache is cut back to the context.

    Args:
        tokens: B, rising.
        context_length: of every row; drawn at random once and shared by all rows.
        repeats, warm_up: steps at each B whose median counts, and steps before these.
    """
    sizes = measured_points("tokens", tokens).tolist()
    per_row = {size: _per_row(target, size, tokens_per_row) for size in sizes}
    limit = getattr(target.model.config.get_text_config(), "max_position_embeddings", None)
    longest = context_length + max(per_row.values())
    if limit is not None and longest > limit:
        raise ValueError(
            f"context_length and a row's tokens must be at most {limit} together "
            f"(max_position_embeddings), got {longest}"
        )
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: int, length: int) -> Tensor:
        ids = torch.randint(target.vocab_size, (rows, length), generator=generator)
        return ids.to(target.device)

    context = drawn(1, context_length)
    seconds: dict[int, float] = {}
    for size, count in per_row.items():
        rows = size // count
        cache = target.start_cache(1)
        target.advance(context, cache, [])
        cache.commit([context_length], [0] * rows)
        times = []
        for _ in range(warm_up + repeats):
            ids = drawn(rows, count)
            begin = now(target.device)
            last = target.advance(ids, cache, []).last
            distribution(torch.nn.functional.linear(last, target.head_weight), 1.0)
            times.append(now(target.device) - begin)
            cache.commit([0] * rows)
        seconds[size] = statistics.median(times[warm_up:])
    return _curve(target, seconds, context_length)


def _random_prompt(target: Target, context_length: int, seed: int) -> Int[Tensor, " context"]:
    """Tokens drawn from the whole vocabulary, to time decoding behind."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(target.vocab_size, (context_length,), generator=generator)


def _timed_rounds(
    target: Target,
    drafter: Drafter,
    kinds: Sequence[Kind],
    prompt: Int[Tensor, " context"],
    *,
    temperature: float,
    repeats: int,
    warm_up: int,
    seed: int,
) -> dict[Kind, dict[str, float]]:
    """Median seconds of the parts of a round, "draft", "verify" and "rest", for each kind.

    The kinds take turns, so that noise affects all of them equally, a few rounds at a time, so that
    each finds its weights in the processor's caches as it would alone. No round is the last one of
    an answer.
    """
    rounds = warm_up + repeats
    runs = {
        (count, k): decode_rounds(
            target,
            drafter if k else None,
            [prompt] * count,
            draft_length=k or None,
            max_new_tokens=2 + rounds * (k + 1),
            temperature=temperature,
            end_ids=(),
            seed=seed,
        )
        for count, k in kinds
    }
    # Seconds since the beginning, after each round.
    clocks = {kind: [[0.0] * len(_PARTS)] for kind in runs}
    for begin in range(0, rounds, _ROUNDS_AT_A_TIME):
        turn = range(min(_ROUNDS_AT_A_TIME, rounds - begin))
        for (count, k), run in runs.items():
            for _ in turn:
                for _ in range(count):
                    next(run)
                clocks[count, k].append([run.seconds[part] for part in _PARTS])
    medians = {
        kind: np.median(np.diff(clock, axis=0)[warm_up:], axis=0) for kind, clock in clocks.items()
    }
    return {
        kind: dict(zip(_PARTS, seconds.tolist(), strict=True)) for kind, seconds in medians.items()
    }


def _curve(target: Target, seconds: Mapping[int, float], context_length: int) -> StepsPerSecond:
    """Of a target whose steps took so many seconds, by tokens."""
    tokens = np.array(sorted(seconds))
    speeds = 1 / np.array([seconds[int(size)] for size in tokens])
    # The last two parts of a folder's path say what it holds.
    name = "/".join(Path(target.name).parts[-2:])
    return StepsPerSecond(tokens, speeds, context_length, _device(target), name)


def _per_row(target: Target, size: int, most: int) -> int:
    if not target.decodes_batches:
        return size
    return next(count for count in range(min(most, size), 0, -1) if size % count == 0)


def _device(target: Target) -> str:
    precision = str(target.dtype).removeprefix("torch.")
    if target.device.type == "cuda":
        return f"{torch.cuda.get_device_name(target.device)}, {precision}"
    threads = torch.get_num_threads()
    return f"{target.device.type}, {threads} thread{'s' * (threads != 1)}, {precision}"
