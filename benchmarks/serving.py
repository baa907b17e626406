"""The speed-up that serving predicts, beside the one that decoding has, in this process.

Costs are measured first, rates come from the shipped traces; then some of the trace's questions are
decoded, plainly and at several lengths in turns, at temperature 1 with other draws than the trace
had: once as the lab decodes, with a cache that is cut, and once with a target that reads again
after every rejection. One thread; the clock is the process's CPU time, which other work on the
machine disturbs less than wall time.
"""

import time
from collections.abc import Iterator
from unittest.mock import patch

import pandas as pd
import torch

from benchmarks.measure import median_seconds
from dspark_lab.pairs import Pair, in_turns, load_pair, load_traces, question
from dspark_lab.serving import (
    acceptance_profile,
    advice,
    best_threshold,
    decode_check,
    measure_engine,
    speedup_table,
    temperature_table,
    threshold_table,
)

# Questions, tokens of each answer, rounds whose median is a cost.
SIZES = {"pocket": (30, 64, 30), "smollm2": (5, 48, 12)}
LENGTHS = (1, 3, 5, 7)


def run() -> Iterator[str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with patch("time.perf_counter", time.process_time):
        yield from _run()
    torch.set_num_threads(threads)


def _run() -> Iterator[str]:
    for name in SIZES:
        try:
            pair = load_pair(name)
        except (FileNotFoundError, OSError) as error:
            yield f"{name}: left out, {error}"
            continue
        trace = load_traces(name)
        trace = trace[trace["drafter"] == "dspark-k7"]
        yield from _check(pair, trace, *SIZES[name])
        yield from _choices(pair, trace, SIZES[name][2])


def _check(pair: Pair, trace: pd.DataFrame, count: int, tokens: int, repeats: int) -> Iterator[str]:
    asked = [question(chat) for chat in in_turns(pair.held_out)]
    step = trace["prompt"].nunique() // count
    chosen = list(range(0, count * step, step))
    for replay in (False, True):
        table = decode_check(
            pair.target,
            pair.drafter,
            [asked[number] for number in chosen],
            trace[trace["prompt"].isin(chosen)],
            draft_lengths=LENGTHS,
            max_new_tokens=tokens,
            replay=replay,
            repeats=repeats,
        )
        for row in table.to_dict("records"):
            yield (
                f"{pair.name}, {'reads again' if replay else 'cuts'}, "
                f"temperature {row['temperature']:.0f}, K {row['draft_length']}: "
                f"tau {row['tau']:.2f} ({row['tau_low']:.2f} to {row['tau_high']:.2f}), decoded "
                f"{row['tau_decoded']:.2f}, {row['tau_error']:+.1%}; speed-up {row['speedup']:.2f} "
                f"({row['speedup_low']:.2f} to {row['speedup_high']:.2f}), decoded "
                f"{row['speedup_decoded']:.2f}, {row['speedup_error']:+.1%}; forgetting replay "
                f"{row['without_replay']:.2f}, overhead too {row['without_overhead']:.2f}"
            )
        for name in ("tau", "speedup"):
            error = table[f"{name}_error"].abs()
            yield (
                f"{pair.name}, {'reads again' if replay else 'cuts'}: error of {name}, "
                f"median {error.median():.1%}, largest {error.max():.1%}"
            )


def _choices(pair: Pair, trace: pd.DataFrame, repeats: int) -> Iterator[str]:
    costs = {
        value: measure_engine(
            pair.target,
            pair.drafter,
            requests=(1,),
            draft_lengths=range(1, pair.drafter.config.block_size + 1),
            temperature=value,
            repeats=repeats,
        ).costs(replay=True)
        for value in sorted(trace["temperature"].unique().tolist())
    }
    for what, each in (
        ("cuts", {value: one.cutting() for value, one in costs.items()}),
        ("reads again", costs),
    ):
        for row in temperature_table(trace, each).to_dict("records"):
            yield (
                f"{pair.name}, {what}, temperature {row['temperature']:g}, K "
                f"{row['draft_length']}: speed-up {row['speedup']:.2f} ({row['speedup_low']:.2f} "
                f"to {row['speedup_high']:.2f}), tau {row['tau']:.2f}; rate "
                f"{row['accept_rate']:.2f}, breaks even at {row['break_even_rate']:.2f}; best K "
                f"{row['best_length']}, {row['best_speedup']:.2f}"
            )
        for value, one in each.items():
            profile = acceptance_profile(trace, temperature=value)
            best = best_threshold(trace, one, temperature=value)
            yield f"{pair.name}, {what}: {advice(profile, one)}"
            yield (
                f"{pair.name}, {what}, temperature {value:g}: best threshold "
                f"{best['threshold']:.2f} at K {best['draft_length']:.0f}, {best['speedup']:.2f} "
                f"({best['speedup_low']:.2f} to {best['speedup_high']:.2f})"
            )
    value, one = next(iter(costs.items()))
    profile = acceptance_profile(trace, temperature=value)
    for name, call in {
        "profile": lambda: acceptance_profile(trace, temperature=value),
        "speed-up against K": lambda: speedup_table(profile, one),
        "thresholds": lambda: threshold_table(trace, one, temperature=value),
        "best threshold": lambda: best_threshold(trace, one, temperature=value),
    }.items():
        yield f"{pair.name}: {name:<20} {median_seconds(call, runs=5) * 1e3:6.1f} ms"
