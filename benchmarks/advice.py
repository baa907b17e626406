"""The advised draft length against real decoding of prompts that the advice has not seen.

For each setting costs are measured, rates come from the shipped traces; then other held-out
questions are decoded plainly and at every length, in turns. Where all questions are in the trace,
one half of it advises and the other is decoded. For a temperature that a trace has not, rates are
between those of the nearest that it has; one drafter is advised by another's trace. One thread
works at a time: two share the memory, and SmolLM2's weights are read from it at every step. The
clock is the process's CPU time, which other work on the machine disturbs less than wall time.

python -m benchmarks advice                     both pairs, half an hour on a quiet machine
python -m benchmarks.advice smollm2             one of them
python -m benchmarks.advice --quick             seconds, and no figure that counts
python -m benchmarks.advice --keep FOLDER       engines and what was decoded, as CSV
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pandas as pd
import torch

from dspark_lab.chats import Chat
from dspark_lab.pairs import Pair, in_turns, load_pair, load_traces, question
from dspark_lab.serving import (
    AcceptanceProfile,
    acceptance_profile,
    answers_of,
    best_length,
    decode_lengths,
    length_loss,
    length_table,
    measure_engine,
)

LENGTHS = (0, 1, 2, 3, 4, 5, 7, 10, 15)
# A loss up to this is none.
ENOUGH = 0.03


class Setting(NamedTuple):
    """``trace``: the drafter whose trace advises, where it is another one."""

    drafter: str
    temperature: float
    requests: int = 1
    trace: str | None = None


class Plan(NamedTuple):
    """``prompts`` to decode, ``tokens`` of each answer, rounds whose median is a cost."""

    settings: Sequence[Setting]
    prompts: int
    tokens: int
    repeats: int


PLANS = {
    "pocket": Plan(
        [
            *(Setting("dspark-k7", value) for value in (0.0, 0.4, 1.0)),
            *(Setting("dspark-k7", value, requests=4) for value in (0.0, 0.4, 1.0)),
            *(Setting("dspark-k15", value) for value in (0.0, 1.0)),
            *(Setting("dflash-k7", value) for value in (0.0, 1.0)),
            *(Setting("gated-k7", value, trace="dspark-k7") for value in (0.0, 1.0)),
        ],
        prompts=32,
        tokens=64,
        repeats=30,
    ),
    "smollm2": Plan(
        [Setting("dspark-k7", value) for value in (0.0, 0.4, 1.0)],
        prompts=10,
        tokens=64,
        repeats=12,
    ),
}
# A setting with the loss of the advised length and the table of all.
Result = tuple[Setting, pd.Series, pd.DataFrame]


def run(
    names: Sequence[str] = tuple(PLANS), *, quick: bool = False, keep: Path | None = None
) -> Iterator[str]:
    begin, losses = time.perf_counter(), []
    for name in names:
        try:
            pair = load_pair(name)
        except OSError as error:
            yield f"{name}: left out, {error}"
            continue
        for setting, loss, table in _settings(pair, _plan(name, quick), keep):
            losses.append(loss)
            yield from _lines(name, setting, loss, table)
    if losses:
        yield from _verdict(pd.DataFrame(losses), time.perf_counter() - begin)


def _plan(name: str, quick: bool) -> Plan:
    plan = PLANS[name]
    if not quick:
        return plan
    return Plan([*plan.settings[:2], plan.settings[-1]], prompts=4, tokens=8, repeats=2)


def _settings(pair: Pair, plan: Plan, keep: Path | None) -> Iterator[Result]:
    chats, every = in_turns(pair.held_out), load_traces(pair.name)
    asked = [question(chat) for chat in chats]
    # Several together are counted until the first answer ends: all of them should be long.
    enough = [len(pair.tokenizer(answer(chat))["input_ids"]) >= plan.tokens for chat in chats]
    traced = set(range(every["prompt"].max() + 1))
    if len(traced) == len(chats):
        traced = set(range(0, len(chats), 2))
    for number, setting in enumerate(plan.settings):
        name, requests = setting.drafter, setting.requests
        drafter = pair.load_drafter(name)
        with _own_clock():
            engine = measure_engine(pair.target, drafter, requests=[requests], repeats=plan.repeats)
        costs = engine.costs(requests)
        taken = [i for i in range(len(chats)) if requests == 1 or enough[i]]
        taken = _alike(chats, taken, traced, plan.prompts)
        trace = every[every["drafter"] == (setting.trace or name)]
        trace = trace[trace["prompt"].isin(traced.intersection(taken))]
        profile, tokens = _profile(trace, setting.temperature)
        predicted: dict[str, Any] = {"tokens": tokens if requests == 1 else None}
        lengths = [k for k in LENGTHS if k <= drafter.config.predicted]
        advised = best_length(profile, costs, lengths[1:], **predicted)
        with _own_clock():
            decoded = decode_lengths(
                pair.target,
                drafter,
                [asked[i] for i in taken if i not in traced][: plan.prompts * requests],
                draft_lengths=lengths,
                temperature=setting.temperature,
                requests=requests,
                turns=1,
                max_new_tokens=plan.tokens,
            )
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            engine.save(keep / f"{pair.name}-{number}-engine.csv")
            decoded.to_csv(keep / f"{pair.name}-{number}.csv", index=False)
        table = length_table(decoded, profile, costs, **predicted)
        yield setting, length_loss(decoded, advised), table


@contextmanager
def _own_clock() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with patch("time.perf_counter", time.process_time):
        yield
    torch.set_num_threads(threads)


def _alike(
    chats: Sequence[Chat], taken: Sequence[int], traced: set[int], prompts: int
) -> list[int]:
    """Those of domains that have a quarter of the prompts that are decoded, or more.

    Accept rates differ by domain, and the data set has few conversations of some beyond the traced
    ones; domains are in turns, so that those left are as frequent on either side.
    """
    new = Counter(chats[i].domain for i in taken if i not in traced)
    return [i for i in taken if 4 * new[chats[i].domain] >= prompts]


def answer(chat: Chat) -> str:
    return next(str(one["content"]) for one in chat.messages if one["role"] == "assistant")


def _profile(trace: pd.DataFrame, temperature: float) -> tuple[AcceptanceProfile, list[int]]:
    """At a traced temperature, or between those on both sides; and the tokens of its answers."""
    held = trace["temperature"].unique()
    near = held[held <= temperature].max(), held[held >= temperature].min()
    cold, hot = (acceptance_profile(trace, temperature=float(value)) for value in near)
    tokens = answers_of(trace[trace["temperature"] == near[0]]).tokens.tolist()
    return cold if near[0] == near[1] else cold.between(hot, temperature), tokens


def _lines(pair: str, setting: Setting, loss: pd.Series, table: pd.DataFrame) -> Iterator[str]:
    advised_by = f", advised by {setting.trace}" if setting.trace else ""
    yield (
        f"{pair}, {setting.drafter}{advised_by}, temperature {setting.temperature:g}, "
        f"{setting.requests} together: advised K {loss['advised']}, fastest {loss['fastest']}; "
        f"loss {loss['loss']:+.1%} ({loss['loss_low']:+.1%} to {loss['loss_high']:+.1%}), "
        f"{'' if loss['told_apart'] else 'not '}told apart; of all {loss['loss_of_all']:.1%}"
    )
    for row in table.to_dict("records"):
        speed, tau, seconds = (
            (row[name], row[f"{name}_predicted"] / row[name] - 1)
            for name in ("tokens_per_second", "tau", "round_seconds")
        )
        yield (
            f"  K {row['draft_length']:>2}: {speed[0]:6.1f} tokens/s "
            f"({row['tokens_per_second_low']:.1f} to {row['tokens_per_second_high']:.1f}), "
            f"predicted {speed[1]:+6.1%}; tau {tau[0]:.2f}, {tau[1]:+6.1%}; "
            f"round {seconds[0] * 1e3:6.2f} ms, {seconds[1]:+6.1%}"
        )


def _verdict(losses: pd.DataFrame, seconds: float) -> Iterator[str]:
    near, apart = losses["loss"] <= ENOUGH, losses["told_apart"].astype(bool)
    yield (
        f"{len(losses)} settings: loss of speed {losses['loss'].median():.1%} in the median, "
        f"{losses['loss'].max():.1%} at most; against the fastest of all, which errs high, "
        f"{losses['loss_of_all'].median():.1%} and {losses['loss_of_all'].max():.1%}"
    )
    yield (
        f"{near.sum()} within {ENOUGH:.0%}, {(~apart).sum()} not told apart from the fastest, "
        f"{(near | ~apart).sum()} one of both; {seconds:.0f} s, {platform.machine()}, "
        "one thread"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *PLANS], default=[], metavar="pair")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    for line in run(given.names or list(PLANS), quick=given.quick, keep=given.keep):
        print(line, flush=True)
