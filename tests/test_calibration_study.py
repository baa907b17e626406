"""How a trace is read, and the study of its confidences: each figure by a loop over the trace."""

import math

import numpy as np
import pandas as pd
import pytest

from dspark_lab.decoding import rounds_of
from dspark_lab.rates import prefix_survival, study, threshold_sweep
from tests.traces import RAGGED, SLOTS, TRACE, made_trace, reached_by_hand


@pytest.mark.parametrize("trace", [TRACE, RAGGED], ids=["whole", "ragged"])
def test_pairs_are_those_of_reached_slots(trace) -> None:
    rounds = rounds_of(trace)
    reached = reached_by_hand(trace)
    for kind in ("empirical", "analytic"):
        confidence, outcome = rounds.pairs(kind)
        expected = [
            (r.confidence, float(r.accepted) if kind == "empirical" else r.accept_rate)
            for r in reached
        ]
        assert sorted(zip(confidence, outcome, strict=True)) == sorted(expected)


def test_rows_behind_a_rejection_do_not_count_but_their_survival_is_known() -> None:
    accepted = [True, False, False, False]
    trace = made_trace(2, range(1), 1).assign(accepted=accepted, verified=True)
    outcome = rounds_of(trace).outcome()[0]
    assert outcome[:2].tolist() == [1, 0] and np.isnan(outcome[2:]).all()
    assert prefix_survival(outcome[None]).tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize("trace", [TRACE, RAGGED], ids=["whole", "ragged"])
def test_the_order_of_a_traces_rows_makes_no_difference(trace) -> None:
    shuffled = trace.sample(frac=1, random_state=3)
    ours, again = rounds_of(trace), rounds_of(shuffled)
    for name in ours.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(ours, name), getattr(again, name))
    thresholds = [0.0, 0.5, 0.9]
    pd.testing.assert_frame_equal(
        threshold_sweep(trace, thresholds), threshold_sweep(shuffled, thresholds)
    )


def test_a_trace_without_a_confidence_in_every_row_has_no_sweep() -> None:
    some = TRACE.assign(confidence=TRACE["confidence"].where(TRACE.index != 5))
    words = "confidence must be a number in every row, got nan in prompt 0, round 1, slot 1"
    for read in (rounds_of, threshold_sweep):
        with pytest.raises(ValueError, match=words):
            read(some)
        with pytest.raises(ValueError, match="must have a column 'confidence'"):
            read(TRACE.drop(columns="confidence"))


def test_rounds_are_read_once() -> None:
    rounds = rounds_of(TRACE)
    assert rounds_of(rounds) is rounds


def study_by_hand(rows: list, kind: str) -> dict[str, float]:
    errors: dict[tuple, list[float]] = {}
    for r in rows:
        outcome = float(r.accepted) if kind == "empirical" else r.accept_rate
        errors.setdefault((r.domain, r.prompt), []).append(r.confidence - outcome)
    pooled = [e for held in errors.values() for e in held]
    bias = sum(pooled) / len(pooled)
    means = [sum(held) / len(held) for held in errors.values()]
    return {
        "conversations": len(errors),
        "samples": len(pooled),
        "bias": bias,
        "variance": sum((e - bias) ** 2 for e in pooled) / len(pooled),
        "spread": float(np.std(means, ddof=1)),
    }


@pytest.mark.parametrize("kind", ["analytic", "empirical"])
@pytest.mark.parametrize("by", [("drafter", "temperature", "domain", "slot"), ("slot",)])
def test_the_study_counts_the_errors_of_reached_slots(kind, by) -> None:
    drafters = {"a": TRACE.assign(drafter="a", temperature=1.0)}
    drafters["b"] = RAGGED.assign(drafter="b", temperature=0.5)
    traces = pd.concat(drafters.values())
    table = study(traces, by=by, outcome=kind, resamples=50)
    assert list(table.columns[: len(by)]) == list(by)
    assert len(table) == (16 if len(by) == 4 else 4)
    for row in table.to_dict("records"):
        reached = [r for trace in drafters.values() for r in reached_by_hand(trace)]
        kept = [r for r in reached if all(getattr(r, name) == row[name] for name in by)]
        for name, value in study_by_hand(kept, kind).items():
            assert row[name] == pytest.approx(value), name
        for name in ("bias", "variance", "spread"):
            assert row[f"{name}_low"] <= row[f"{name}_high"]
        assert row["bias"] == pytest.approx(row["confidence"] - row["outcome"])


def test_a_study_by_a_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="must have a column 'drafter'"):
        study(TRACE)


def test_the_studys_intervals_are_over_conversations() -> None:
    """Ten times the same rounds of each say no more than once; sqrt(12) is of 12 conversations."""
    copies = [TRACE.assign(round=TRACE["round"] + 40 * copy) for copy in range(10)]
    once, often = (study(trace, by=("slot",)) for trace in (TRACE, pd.concat(copies)))
    pd.testing.assert_frame_equal(once.drop(columns="samples"), often.drop(columns="samples"))
    width = 2 * 1.96 * once["spread"] / math.sqrt(12)
    assert (once["bias_high"] - once["bias_low"]).tolist() == pytest.approx(width, rel=0.25)


def test_a_single_conversation_has_a_bias_but_no_interval() -> None:
    [row] = study(made_trace(3, range(1)), by=("domain",)).to_dict("records")
    assert not math.isnan(row["bias"])
    for name in ("bias_low", "variance_high", "spread", "spread_low"):
        assert math.isnan(row[name])
    headless = made_trace(3).assign(confidence=math.nan)
    assert study(headless, by=("slot",))["samples"].tolist() == [0] * SLOTS
    assert study(headless, by=("slot",))["bias"].isna().all()
