"""Measured seconds: of the rounds of this lab's decoding, and of the target's steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dspark_lab.checks import Count, Size, checked
from dspark_lab.decoding import Decoding, decode_rounds, distribution
from dspark_lab.files import now
from dspark_lab.model import BlockDrafter, Target
from dspark_lab.serving.costs import require_lengths
from dspark_lab.serving.engine import Engine
from dspark_lab.serving.steps import StepsPerSecond, measured_points

# Rounds of one kind that are timed before it is another's turn.
_ROUNDS_AT_A_TIME = 12

# How many requests decode together, and how many tokens are drafted; 0 is plain decoding.
Kind = tuple[int, int]


@checked
def measure_engine(
    target: Target,
    drafter: BlockDrafter,
    *,
    requests: Sequence[Count] | None = None,
    draft_lengths: Sequence[Count] | None = None,
    context_length: Count = 128,
    temperature: float = 0.0,
    repeats: Count = 10,
    warm_up: Size = 3,
    seed: Size = 0,
    progress: Callable[[float, float], None] | None = None,
) -> Engine:
    """This lab's decoding as an :class:`Engine`, on the devices of these models.

    The target's steps include its distributions; drafting is linear between the measured lengths.

    Args:
        requests: how many take their rounds together, rising; 1, 4 and 16 where None, or 1 alone.
        draft_lengths: one slot and a whole block where None.
        repeats, warm_up: rounds that count, and rounds before these.
        progress: is told how many rounds are timed, and of how many, and may raise to end it.
    """
    if requests is None:
        requests = (1, 4, 16) if target.decodes_batches else (1,)
    counts = measured_points("requests", requests).tolist()
    if counts != [1] and not target.decodes_batches:
        raise ValueError(
            f"requests must be 1 for a target that decodes one row at a time, got {counts}"
        )
    most = drafter.config.predicted
    lengths = sorted({*require_lengths(draft_lengths or [1, most], most)})
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(target.vocab_size, (context_length,), generator=generator)
    runs = {
        (count, k): decode_rounds(
            target,
            drafter if k else None,
            [prompt] * count,
            draft_length=k or None,
            # No round is the last one of an answer.
            max_new_tokens=2 + (warm_up + repeats) * (k + 1),
            temperature=temperature,
            end_ids=(),
            seed=seed,
        )
        for count in counts
        for k in (0, *lengths)
    }
    spent = _timed_rounds(runs, repeats, warm_up, progress)
    steps: dict[int, list[float]] = {}
    for (count, k), (_, verify, _) in spent.items():
        steps.setdefault(count * (k + 1), []).append(verify)
    by_tokens = {tokens: statistics.median(seconds) for tokens, seconds in steps.items()}
    drafts = [[spent[count, k][0] for k in lengths] for count in counts]
    slots = range(1, lengths[-1] + 1)
    return Engine(
        sps=_curve(target, by_tokens, context_length),
        requests=np.array(counts),
        draft=np.array([np.interp(slots, lengths, seconds) for seconds in drafts]),
        rest=np.array([spent[count, lengths[-1]][2] for count in counts]),
        plain_rest=np.array([spent[count, 0][0] + spent[count, 0][2] for count in counts]),
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

    Every row reads its tokens behind the same ``context_length`` cached ones, and each token gets
    its probabilities. A row's tokens are the largest divisor of B that is at most
    ``tokens_per_row``; a target that decodes one row at a time reads all B in it.

    Args:
        tokens: B, rising.
        repeats, warm_up: steps at each B whose median counts, and steps before these.
    """
    sizes = measured_points("tokens", tokens).tolist()
    most = tokens_per_row if target.decodes_batches else max(sizes)
    per_row = {n: max(k for k in range(1, min(most, n) + 1) if n % k == 0) for n in sizes}
    behind = context_length + max(per_row.values())
    target.require_room("context_length and a row's tokens", behind)
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: int, length: int) -> Tensor:
        ids = torch.randint(target.vocab_size, (rows, length), generator=generator)
        return ids.to(target.device)

    context = drawn(1, context_length)
    seconds: dict[int, float] = {}
    for size, count in per_row.items():
        rows = size // count
        cache = target.start_cache(1, behind)
        target.advance(context, cache, [])
        cache.commit([context_length], [0] * rows)
        times = []
        for _ in range(warm_up + repeats):
            ids = drawn(rows, count)
            begin = now(target.device)
            last = target.advance(ids, cache, []).last
            distribution(target.logits(last), 1.0)
            times.append(now(target.device) - begin)
            cache.commit([0] * rows)
        seconds[size] = statistics.median(times[warm_up:])
    return _curve(target, seconds, context_length)


def _timed_rounds(
    runs: Mapping[Kind, Decoding],
    repeats: int,
    warm_up: int,
    progress: Callable[[float, float], None] | None,
) -> dict[Kind, list[float]]:
    """Median seconds of drafting, verifying and the rest of a round, for each kind.

    The kinds take turns, so that noise affects all of them equally, a few rounds at a time, so that
    each finds its weights in the processor's caches as it would alone.
    """
    clocks = {kind: [[0.0] * 3] for kind in runs}
    done = 0
    for begin in range(0, warm_up + repeats, _ROUNDS_AT_A_TIME):
        for kind, run in runs.items():
            for _ in range(min(_ROUNDS_AT_A_TIME, warm_up + repeats - begin)):
                if progress is not None:
                    progress(done, len(runs) * (warm_up + repeats))
                done += 1
                for _ in range(kind[0]):
                    next(run)
                clocks[kind].append([run.seconds[part] for part in ("draft", "verify", "rest")])
    return {
        kind: np.median(np.diff(clock, axis=0)[warm_up:], axis=0).tolist()
        for kind, clock in clocks.items()
    }


def _curve(target: Target, seconds: Mapping[int, float], context_length: int) -> StepsPerSecond:
    tokens = sorted(seconds)
    speeds = 1 / np.array([seconds[size] for size in tokens])
    # The last two parts of a folder's path say what it holds.
    name = "/".join(Path(target.name).parts[-2:])
    return StepsPerSecond(np.array(tokens), speeds, context_length, _device(target), name)


def _device(target: Target) -> str:
    precision = str(target.dtype).removeprefix("torch.")
    if target.device.type == "cuda":
        return f"{torch.cuda.get_device_name(target.device)}, {precision}"
    threads = torch.get_num_threads()
    return f"{target.device.type}, {threads} thread{'s' * (threads != 1)}, {precision}"
