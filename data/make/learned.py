"""What the shipped runs teach: how tau grows with training, and how learning curves go on.

python -m data.make.learned        writes data/pocket/learned.json, from runs.parquet there

Forecasts and pilots of other data begin with it. Only runs of the first seed are learned from, one
of each cell.
"""

from dataclasses import asdict
from typing import Any

import numpy as np

from dspark_lab.files import DATA, write_json
from dspark_lab.pairs import load_pair
from dspark_lab.training import encode_chats
from dspark_lab.tuning import (
    ALL,
    Growth,
    Reference,
    SweepConfig,
    fit_growth,
    learn_curves,
    load_runs,
    recorded_progress,
    run_table,
    shipped_noise,
)

# Of the noise that is taken for that of all steps.
NOISE_STEP = 100


def learned() -> tuple[Growth, Reference]:
    """What is written, of the shipped runs."""
    runs, pair = load_runs(), load_pair()
    runs = runs[runs["seed"] == 0]
    chats = encode_chats(pair.chats, pair.target.tokenizer, SweepConfig.training.max_length)
    data, noise, ends = {}, {}, run_table(runs)
    for mix in ends["mix"].unique():
        data[mix] = [one for one in chats if mix in (ALL, one.domain)]
        noise[mix] = shipped_noise(mix)[NOISE_STEP]
    growth = fit_growth(runs, recorded_progress(ends, data, noise))
    return growth, learn_curves(runs, source=f"{len(ends)} small runs of the lab's")


def rounded(value: Any) -> Any:
    """Arrays as lists of numbers with six digits, for JSON."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main() -> None:
    growth, reference = learned()
    found = {"growth": asdict(growth), **asdict(reference)}
    write_json(DATA / "pocket" / "learned.json", rounded(found), indent=1)


if __name__ == "__main__":
    main()
