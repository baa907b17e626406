"""Causes of a low accept rate: figures of a record, and what is likely by planted signatures."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from data.make.planted import Case, record_lines
from dspark_lab.decoding import decode, save_trace
from dspark_lab.decoding.text import end_tokens
from dspark_lab.pairs import load_pair, question
from dspark_lab.records import (
    CAUSES,
    FIGURES,
    HEALTHY,
    AcceptanceRecord,
    diagnose,
    figures_of,
    likelihoods,
    load_acceptance,
    record_of_trace,
)
from dspark_lab.records import causes as module
from tests.served import drawn, record

SLOTS = 6


def logit(rate: float) -> float:
    return math.log(rate / (1 - rate))


def planted(**shifts: Any) -> pd.DataFrame:
    """Signatures of made-up cases: three of each cause, around its shift of some figures."""
    lines = []
    for cause, shift in {HEALTHY: {}, **shifts}.items():
        for number in (-1, 0, 1):
            line = dict.fromkeys(FIGURES, 0.02 * number) | {
                name: value + 0.05 * number for name, value in shift.items()
            }
            lines.append({"cause": cause, **line})
    return pd.DataFrame(lines)


def test_figures_are_those_of_a_small_case_by_hand() -> None:
    # Two requests: rounds by accepted tokens 0, 1, ..., 6.
    one = record([[2, 1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 1, 0, 2]], tokens=[12, 21])
    found = dict(zip(FIGURES, figures_of(one), strict=True))
    # Of 8 rounds 5 pass slot 0; half a round is added to those that do and that do not.
    assert found["slot 0"] == pytest.approx(math.log(5.5 / 3.5))
    assert found["slot 1"] == pytest.approx(math.log(4.5 / 1.5))
    assert found["slot 2"] == pytest.approx(math.log(4.5 / 0.5))
    # Slots 4 and 5: 4 + 3 reached, 3 + 3 passed.
    assert found["later slots"] == pytest.approx(math.log(6.5 / 1.5))
    taus = 1 + np.array([7 / 4, 16 / 4])
    assert found["spread"] == pytest.approx(math.log(taus.std() + 1e-6), abs=1e-5)
    assert found["length"] == pytest.approx((math.log(12) + math.log(21)) / 2)
    assert found["longer answers"] == pytest.approx(1, abs=1e-5)
    # 31 tokens were counted behind the first ones, and 31 are in the answers.
    assert found["surplus"] == pytest.approx(1 - 31 / 31)


def test_tokens_behind_the_end_are_a_surplus() -> None:
    whole = drawn([0.8] * SLOTS)
    cut = drawn([0.8] * SLOTS)
    cut.lines["output_tokens"] = 1 + (whole.lines["output_tokens"] - 1) / 2
    place = FIGURES.index("surplus")
    assert figures_of(whole)[place] == pytest.approx(0)
    assert figures_of(cut)[place] == pytest.approx(0.5)


def test_the_nearest_cause_is_the_likeliest_and_shares_sum_to_one() -> None:
    signatures = planted(first={"slot 0": -1.0}, second={"slot 1": -1.0})
    noise = 0.01 * np.eye(len(FIGURES))
    for shift, cause in (({}, HEALTHY), ({"slot 0": -0.9}, "first"), ({"slot 1": -1.1}, "second")):
        difference = np.array([shift.get(name, 0.0) for name in FIGURES])
        shares = likelihoods(difference, noise, signatures)
        assert max(shares, key=shares.__getitem__) == cause
        assert sum(shares.values()) == pytest.approx(1)


def test_unknown_figures_are_left_out() -> None:
    signatures = planted(first={"slot 0": -1.0}, second={"slot 0": -1.0, "length": 2.0})
    difference = np.array([{"slot 0": -1.0}.get(name, 0.0) for name in FIGURES])
    noise = 0.01 * np.eye(len(FIGURES))
    told = likelihoods(difference, noise, signatures)
    assert told["first"] > 0.95
    difference[FIGURES.index("length")] = math.nan
    untold = likelihoods(difference, noise, signatures)
    assert untold["first"] == pytest.approx(untold["second"], rel=0.3)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures of two real causes and of none, as if they were shipped."""
    rates = {
        HEALTHY: [0.8] * SLOTS,
        "no Markov head": [0.8, 0.5, 0.5, 0.8, 0.8, 0.8],
        "tokenizer": [0.6, *[0.8] * (SLOTS - 1)],
    }
    healthy, lines = figures_of(drawn(rates[HEALTHY], seed=9)), []
    for cause, own in rates.items():
        for seed in range(10, 14):
            difference = figures_of(drawn(own, seed=seed)) - healthy
            line = dict(zip(FIGURES, difference, strict=True))
            lines.append({"cause": cause, **line})
    monkeypatch.setattr(module, "shipped", lambda name: name)
    monkeypatch.setattr(module, "read_csv", lambda path, columns: pd.DataFrame(lines))


@pytest.mark.usefixtures("few")
def test_a_cause_is_found_with_its_reasons_and_its_test() -> None:
    healthy = drawn([0.8] * SLOTS, seed=1)
    served = drawn([0.8, 0.47, 0.47, 0.8, 0.8, 0.8], seed=2)
    found = diagnose(served, healthy)
    assert found.cause == "no Markov head"
    assert CAUSES["no Markov head"].test in found.reason and "slot 1: 4" in found.reason
    assert diagnose(drawn([0.8] * SLOTS, seed=3), healthy).cause == HEALTHY
    assert set(found.table["cause"]) == {HEALTHY, "no Markov head", "tokenizer"}


@pytest.mark.usefixtures("few")
def test_what_cannot_be_told_is_said() -> None:
    whole = drawn([0.8] * SLOTS)
    lines = whole.lines[["rounds", "accepted", "drafted"]].sum().to_frame().T.assign(line=1)
    sums = AcceptanceRecord(
        "log", "interval", lines, whole.reached.sum(0)[None], whole.passed.sum(0)[None], True, ""
    )
    found = diagnose(sums, whole)
    assert found.cause == HEALTHY and "Sums only" in found.reason
    assert any("temperature" in line for line in found.unknown)


@pytest.mark.usefixtures("few")
def test_records_of_two_temperatures_are_refused() -> None:
    rates = [0.8] * SLOTS
    with pytest.raises(ValueError, match="one temperature"):
        diagnose(drawn(rates, temperature=0.0), drawn(rates, temperature=1.0))


def test_every_cause_says_what_it_is_and_what_settles_it() -> None:
    for cause in CAUSES.values():
        assert cause.says and cause.test and not cause.test.endswith(".")


@pytest.mark.usefixtures("few")
def test_a_trace_counts_as_the_server_that_decoded_it_would(tmp_path: Path) -> None:
    pair = load_pair()
    questions = [question(chat) for chat in pair.held_out]
    long = decode(pair.target, None, questions, max_new_tokens=40).tokens
    # A server knows no end of an answer but its own.
    ended = [text for text, own in zip(questions, long, strict=True) if len(own) < 40]
    decoded = decode(pair.target, pair.drafter, ended[:20], max_new_tokens=60, draft_length=7)
    case = Case("", "dspark-k7", 0.0, 0)
    path = tmp_path / "server.jsonl"
    path.write_text("\n".join(record_lines(decoded, case, end_tokens(pair.target))) + "\n")
    served = load_acceptance(path)
    trace = decoded.trace.assign(temperature=0.0)
    save_trace(trace, tmp_path / "own.parquet")
    for trained in (trace, tmp_path / "own.parquet"):
        found = diagnose(served, trained)
        assert found.figures["difference"].notna().all() and found.unknown == ()
        counted = found.figures.set_index("figure")["difference"]
        assert counted[[*FIGURES[:6]]].abs().max() == 0
        assert counted.abs().max() < 0.02
    # Whether the last slot of a block was the end of a turn, a trace does not say.
    own = record_of_trace(trace).lines["output_tokens"]
    over = own.to_numpy() - [len(answer) for answer in decoded.tokens]
    assert set(over) <= {0, 1} and over.mean() < 0.3


@pytest.mark.usefixtures("few")
def test_blocks_of_another_length_are_held_together_as_far_as_both_go() -> None:
    one, whole = drawn([0.8] * SLOTS, seed=1), drawn([0.8] * SLOTS, seed=2)
    short = replace(one, reached=one.reached[:, :4], passed=one.passed[:, :4])
    found = diagnose(short, whole)
    assert found.cause == HEALTHY and "Blocks of 4 and 6 slots" in found.reason
    shown = found.figures.set_index("figure")["difference"]
    assert shown[["later slots", "spread", "longer answers"]].isna().all()
    assert shown[["slot 0", "slot 1", "slot 2", "slot 3", "length", "surplus"]].notna().all()


@pytest.mark.usefixtures("few")
def test_totals_alone_are_refused() -> None:
    whole = drawn([0.8] * SLOTS)
    totals = replace(whole, reached=whole.reached[:, :0], passed=whole.passed[:, :0])
    with pytest.raises(ValueError, match="record must have acceptance by slot"):
        diagnose(totals, whole)
    with pytest.raises(ValueError, match="trained must have acceptance by slot"):
        diagnose(whole, totals)
