"""Thresholds on a trace: sweeps, each counted again by a loop over that trace."""

import math

import numpy as np
import pandas as pd
import pytest

from dspark_lab.rates import SequentialTemperatures, temperature_scale, threshold_sweep
from tests.traces import RAGGED, SLOTS, TRACE, rounds_by_hand


def sweep_by_hand(trace: pd.DataFrame, threshold: float) -> tuple[float, float, float]:
    blocks = rounds_by_hand(trace).values()
    verified = accepted = beyond = 0
    for block in blocks:
        for row in block:
            if row.confidence < threshold:
                break
            verified += row.verified
            accepted += row.accepted
            beyond += not row.verified
    return verified / len(blocks), accepted / len(blocks), beyond / len(blocks)


@pytest.mark.parametrize("trace", [TRACE, RAGGED], ids=["whole", "ragged"])
def test_a_threshold_stops_at_the_first_slot_below_it(trace) -> None:
    thresholds = [0.0, 0.3, float(trace["confidence"][7]), 0.8, 0.999, 1.0]
    for row in threshold_sweep(trace, thresholds).itertuples():
        verified, accepted, beyond = sweep_by_hand(trace, row.threshold)
        assert row.verified == pytest.approx(verified, abs=1e-12)
        assert row.accepted == pytest.approx(accepted, abs=1e-12)
        assert row.not_in_trace == pytest.approx(beyond, abs=1e-12)
        if verified:
            assert row.acceptance_rate == pytest.approx(accepted / verified)
        else:
            assert math.isnan(row.acceptance_rate)


def test_a_calibrated_sweep_is_a_sweep_of_the_calibrated_trace() -> None:
    scaling = SequentialTemperatures((2.0, 0.5, 1.0, 3.0))
    scaled = RAGGED.copy()
    for slot, temperature in enumerate(scaling.temperatures):
        here = scaled["slot"] == slot
        scaled.loc[here, "confidence"] = temperature_scale(
            scaled.loc[here, "confidence"], temperature
        )
    thresholds = [0.2, 0.6, 0.9]
    pd.testing.assert_frame_equal(
        threshold_sweep(RAGGED, thresholds, scaling), threshold_sweep(scaled, thresholds)
    )
    for wrong in ([1.5], [-0.1], [math.nan], []):
        with pytest.raises(ValueError, match="thresholds must"):
            threshold_sweep(RAGGED, wrong)


@pytest.mark.parametrize("trace", [TRACE, RAGGED], ids=["whole", "ragged"])
def test_the_sweeps_intervals_are_those_of_conversations_drawn_again(trace) -> None:
    thresholds = [0.9, 0.0, 0.6]
    table = threshold_sweep(trace, thresholds, resamples=60, seed=4)
    figures = ["acceptance_rate", "verified", "accepted"]
    prompts = sorted(trace["prompt"].unique())
    blocks = {prompt: trace[trace["prompt"] == prompt] for prompt in prompts}
    found: dict[tuple[float, str], list[float]] = {}
    for times in np.random.default_rng(4).multinomial(12, [1 / 12] * 12, size=60):
        copies = []
        for prompt, often in zip(prompts, times, strict=True):
            copies += [
                blocks[prompt].assign(round=blocks[prompt]["round"] + 1000 * copy)
                for copy in range(often)
            ]
        for threshold in thresholds:
            verified, accepted, _ = sweep_by_hand(pd.concat(copies), threshold)
            for name, value in zip(figures, (accepted / verified, verified, accepted), strict=True):
                found.setdefault((threshold, name), []).append(value)
    for row in table.to_dict("records"):
        for name in figures:
            low, high = np.quantile(found[row["threshold"], name], [0.025, 0.975])
            assert row[f"{name}_low"] == pytest.approx(low)
            assert row[f"{name}_high"] == pytest.approx(high)
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]


def test_resamples_that_verify_nothing_do_not_count_for_the_acceptance_rate() -> None:
    """Two of twelve conversations verify anything: one resample in nine holds neither."""
    confident = TRACE["prompt"] < 2
    trace = TRACE.assign(confidence=np.where(confident, 0.9, 0.1))
    row = threshold_sweep(trace, [0.5]).iloc[0]
    assert row["acceptance_rate_low"] < row["acceptance_rate"] < row["acceptance_rate_high"]
    assert row["verified_low"] == 0 and row["verified"] == SLOTS / 6
    alone = trace.assign(confidence=np.where(TRACE["prompt"] < 1, 0.9, 0.1))
    row = threshold_sweep(alone, [0.5]).iloc[0]
    assert math.isnan(row["acceptance_rate_low"]) and not math.isnan(row["acceptance_rate"])
    assert row["verified_low"] <= row["verified"] <= row["verified_high"]


def test_a_sweep_of_one_conversation_has_no_intervals() -> None:
    table = threshold_sweep(TRACE[TRACE["prompt"] == 0], [0.0, 0.5])
    bounds = [name for name in table if name.endswith(("_low", "_high"))]
    assert len(bounds) == 6 and table[bounds].isna().all(axis=None)
    assert table.drop(columns=bounds).notna().all(axis=None)
