"""The advised draft length against real decoding of prompts that the advice has not seen.

Costs are measured first, rates come from the shipped traces; then other held-out prompts are decoded
plainly and at every length, in turns. A trace without the temperature stands for it by what lies
between its own; the trace of one drafter advises another one of the same target. One thread; the
clock is the process's CPU time, which other work on the machine disturbs less than wall time.

python -m benchmarks advice                          both pairs
python -m benchmarks.advice smollm2 --quick          one of them, a few seconds: no figure counts
python -m benchmarks.advice --keep folder            what was decoded, and the costs, as CSV
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pandas as pd
import torch

from dspark_lab.pairs import Pair, in_turns, load_pair, load_traces, question
from dspark_lab.serving import (
    AcceptanceProfile,
    Engine,
    acceptance_profile,
    best_length,
    decode_lengths,
    length_loss,
    length_table,
    measure_engine,
)

TRACED_PROMPTS = 120


class Setting(NamedTuple):
    """``trace``: the drafter whose trace advises, where it is another one."""

    drafter: str
    temperature: float
    requests: int = 1
    trace: str | None = None


class Plan(NamedTuple):
    """``groups`` of prompts in each of ``turns``, ``tokens`` of each answer, rounds of a cost."""

    settings: Sequence[Setting]
    groups: int
    turns: int
    tokens: int
    repeats: int


PLANS = {
    "pocket": Plan(
        [
            *(Setting("dspark-k7", t, requests) for requests in (1, 4) for t in (0.0, 0.4, 1.0)),
            *(Setting("dspark-k15", t) for t in (0.0, 1.0)),
            *(Setting("dflash-k7", t) for t in (0.0, 1.0)),
            Setting("gated-k7", 1.0, trace="dspark-k7"),
            Setting("dspark-k7", 0.0, trace="dspark-k15"),
        ],
        groups=32,
        turns=1,
        tokens=64,
        repeats=30,
    ),
    "smollm2": Plan(
        [Setting("dspark-k7", t) for t in (0.0, 0.4, 1.0)],
        groups=10,
        turns=1,
        tokens=32,
        repeats=12,
    ),
}
