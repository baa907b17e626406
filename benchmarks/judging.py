"""Advice for training held against the recorded runs that it has not seen, and their forecasts.

python -m benchmarks judging
DSPARK_LAB_RUNS=runs.parquet python -m benchmarks judging    other runs, of the pocket pair
DSPARK_LAB_NOISE=folder ...                                  other files noise-<mix>-<step>.*

Nothing is timed: budgets are of the runs' own step times, measured before them.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from dspark_lab.files import DATA
from dspark_lab.pairs import load_pair
from dspark_lab.training import encode_chats
from dspark_lab.tuning import (
    ALL,
    Shape,
    SweepConfig,
    block_loss,
    coverage_advice,
    forecast_summary,
    judge_advice,
    judge_forecasts,
    judged_table,
    load_noise,
    load_runs,
    pilot_advice,
    recorded_progress,
    run_table,
    slot_advice,
    taus_at,
)

# The noise is that after so many steps; the budgets of slots are those that most cells reach.
NOISE_STEP, SLOTS = 100, (100_000, 200_000, 400_000)


def run() -> Iterator[str]:
    runs = load_runs(os.environ.get("DSPARK_LAB_RUNS"))
    noises = Path(os.environ.get("DSPARK_LAB_NOISE", DATA / "pocket"))
    ends, training, pair = (
        run_table(runs).astype({"mix": str}),
        SweepConfig.training,
        load_pair(),
    )
    encoded = encode_chats(pair.chats, pair.target.tokenizer, training.max_length)
    data = {
        mix: [one for one in encoded if mix in (ALL, one.domain)]
        for mix in sorted(set(ends["mix"]))
    }
    noise = {mix: load_noise(noises / f"noise-{mix}-{NOISE_STEP}.safetensors") for mix in data}
    progress = recorded_progress(ends, data, noise)
    first = runs[runs["seed"] == runs["seed"].min()]
    fresh = ends[ends["seed"] >= 3] if (ends["seed"] >= 3).any() else None
    swept = ends[ends["seed"] < 3]
    yield f"{len(ends)} runs, {len(swept)} of them swept; mixes {list(data)}"
    shape = Shape.of("pocket")
    for left_out in ("mix", "amount"):
        yield from _titled(f"advice at equal time, {left_out} left out")
        advice = [
            pilot_advice(first, progress, left_out=left_out),
            pilot_advice(first, progress, left_out=left_out, share=0.0).assign(advisor="no pilots"),
            coverage_advice(swept, data, shape, training),
        ]
        judged = judge_advice(swept, pd.concat(advice, ignore_index=True), fresh=fresh)
        yield from _lines(judged)
        yield from _lines(judged_table(judged))
        promised = advice[0].merge(judged[judged["advisor"] == "pilot"], on=["mix", "amount"])
        told = ["mix", "amount", "tau_x", "tau_low", "tau_high", "tau_y", "sure", "pilots"]
        yield from _titled("promised (tau_x) and reached (tau_y)")
        yield from _lines(promised[told])
        yield from _titled(f"advice at equal slots, {left_out} left out")
        cells = pd.concat([taus_at(swept, "slots", amount) for amount in SLOTS])
        own = [
            slot_advice(first, progress, list(SLOTS), left_out=left_out),
            coverage_advice(cells, data, shape, training),
        ]
        judged = judge_advice(cells, pd.concat(own, ignore_index=True))
        yield from _lines(judged)
        yield from _lines(judged_table(judged))
        yield from _titled(f"forecasts from the first quarter, {left_out} left out")
        found = judge_forecasts(runs, by=left_out)
        yield from _lines(forecast_summary(found))
        yield from _lines(forecast_summary(found, ("kind", "amount")))
    yield from _titled("trained on blocks of 15 slots, served with fewer")
    for served in (4, 7):
        yield from _lines(block_loss(runs, trained=15, served=served))


def _titled(title: str) -> Iterator[str]:
    yield ""
    yield title


def _lines(table: pd.DataFrame) -> Iterator[str]:
    yield from table.round(3).to_string(index=False).splitlines()
