"""Whether planted faults are found: right causes first and among three, and healthy servers.

Signatures were learned on other drafters, questions and seeds (``data/make/planted.py``). A record
of 300 requests is held against another of the same drafter without a fault, of other questions.

The five causes that change tau most are also planted in SmolLM2's decoding, 60 requests each.

python -m benchmarks diagnose              all cases, about two hours on two cores
python -m benchmarks.diagnose --few        26 cases and 10 healthy ones
python -m benchmarks.diagnose --work FILE  goes on where it stopped
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.stats import binomtest

from data.make.planted import (
    FAULTS,
    REQUESTS,
    TEMPERATURES,
    Case,
    healthy_case,
    plant,
    possible,
    work_through,
)
from dspark_lab.files import shipped
from dspark_lab.pairs import load_pair
from dspark_lab.records import HEALTHY, AcceptanceRecord, diagnose

DRAFTERS = ("dspark-k7", "rnn-k7", "dflash-k7")
SEED = 300_000
# Of each cause, and healthy ones; few of them in the long tests.
ALL, FEW = (20, 100), (2, 10)
# Requests of a record.
EACH = {"pocket": REQUESTS, "smollm2": 60}


def run(counts: tuple[int, int] = ALL, work: Path | None = None) -> Iterator[str]:
    begin = time.perf_counter()
    cases = planned(*counts) + (planned_smollm2() if counts == ALL else [])
    found = pd.DataFrame(work_through(cases, diagnosed, work))
    for pair, part in found.groupby("pair", sort=False):
        yield f"{pair}, {part['requests_each'].iloc[0]} requests a record:"
        yield from report(part)
    seconds = time.perf_counter() - begin
    yield f"{len(found)} records, {seconds:.0f} s, {platform.machine()}, two processes"


def planned(of_each: int, healthy: int) -> list[Case]:
    """Cases of each cause, on the drafters and temperatures that can have it in turns."""
    pair = load_pair()
    drafters = {name: pair.load_drafter(name) for name in DRAFTERS}
    # Each of three drafters at each of two temperatures, in turns of both.
    places = list(islice(zip(cycle(DRAFTERS), cycle(TEMPERATURES), strict=False), 6))
    cases: list[tuple[float, Case]] = []
    for cause, count in {"": healthy, **dict.fromkeys(FAULTS, of_each)}.items():
        able = [at for at in places if not cause or possible(cause, drafters[at[0]], at[1])]
        for number in range(count):
            case = Case(cause, *able[number % len(able)], SEED + len(cases))
            cases.append((number / count, case))
    # One of each cause comes first: the work can be stopped at any time.
    return [case for _, case in sorted(cases, key=lambda one: one[0])]


def planned_smollm2() -> list[Case]:
    """The causes with the largest effects among the signatures, at each temperature."""
    known = pd.read_csv(shipped("pocket/signatures.csv"))
    effects = (known["tau"] / known["healthy"] - 1).abs().groupby(known["cause"]).median()
    causes = ["", *effects.nlargest(5).index]
    places = product(causes, TEMPERATURES)
    return [
        Case(cause, "dspark-k7", temperature, 2 * SEED + number, "smollm2")
        for number, (cause, temperature) in enumerate(places)
    ]


@lru_cache
def _healthy(pair: str, drafter: str, temperature: float) -> AcceptanceRecord:
    case = healthy_case(drafter, temperature, SEED)
    return plant(load_pair(pair), case, EACH[pair])


def diagnosed(case: Case) -> dict[str, Any]:
    """The place of the right cause, from requests and from their sums alone."""
    torch.set_num_threads(1)
    pair, healthy = load_pair(case.pair), _healthy(case.pair, case.drafter, case.temperature)
    record = plant(pair, case, EACH[case.pair])
    told: dict[str, Any] = {"cause": case.cause or HEALTHY, "drafter": case.drafter}
    told |= {"temperature": case.temperature, "seed": case.seed, "tau": record.tau}
    told |= {"pair": case.pair, "requests_each": EACH[case.pair]}
    told["effect"] = record.tau / healthy.tau - 1
    config = pair.load_drafter(case.drafter).config
    for name, given in {"requests": record, "sums": summed(record)}.items():
        causes = diagnose(given, healthy, config=config).table["cause"].tolist()
        told |= {name: causes[0], f"{name}_place": 1 + causes.index(told["cause"])}
    return told


def summed(record: AcceptanceRecord) -> AcceptanceRecord:
    """What a log says of all requests together."""
    lines = record.lines[["rounds", "accepted", "drafted"]].sum().to_frame().T
    lines = lines.assign(line=1, temperature=record.lines["temperature"].iloc[0])
    sums = {
        name: getattr(record, name).sum(axis=0, keepdims=True) for name in ("reached", "passed")
    }
    return replace(record, unit="interval", lines=lines, **sums)


def report(found: pd.DataFrame) -> Iterator[str]:
    """Shares of cases, with exact binomial intervals, and what each cause was taken for."""
    sick, well = found[found["cause"] != HEALTHY], found[found["cause"] == HEALTHY]
    for name in ("requests", "sums"):
        place = sick[f"{name}_place"]
        yield (
            f"from {name}: right cause first {_share(place == 1)}, among three "
            f"{_share(place <= 3)}; of healthy servers nothing wrong "
            f"{_share(well[name] == HEALTHY)}"
        )
    strong = sick[sick["effect"].abs() >= 0.1]["requests_place"]
    yield (
        f"accept length changed by a tenth in {len(strong)} of {len(sick)} planted cases; of these "
        f"right cause first {_share(strong == 1)}, among three {_share(strong <= 3)}"
    )
    for cause, part in sick.groupby("cause", sort=False):
        others = part.loc[part["requests"] != cause, "requests"].value_counts()
        taken = ", ".join(f"{other} {count}" for other, count in others.items())
        yield (
            f"  {cause}: first {(part['requests_place'] == 1).sum()}, among three "
            f"{(part['requests_place'] <= 3).sum()} of {len(part)}, from sums "
            f"{(part['sums_place'] == 1).sum()}; tau {part['effect'].median():+.0%}"
            f"{'; taken for ' + taken if taken else ''}"
        )


def _share(hits: Sequence[bool]) -> str:
    count, whole = int(sum(hits)), len(hits)
    bounds = binomtest(count, whole).proportion_ci()
    return f"{count} of {whole} ({bounds.low:.1%} to {bounds.high:.1%})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    for line in run(FEW if given.few else ALL, given.work):
        print(line, flush=True)
