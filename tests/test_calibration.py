"""What is read off a trace about its confidences: splits, reports, reliability and drift.

Each table is counted again by a loop over a trace that was made up round by round.
"""

import math
import warnings

import numpy as np
import pandas as pd
import pytest

from dspark_lab.decoding import rounds_of
from dspark_lab.rates import (
    SequentialTemperatures,
    auroc,
    brier,
    calibration_report,
    claims_table,
    drift_table,
    expected_calibration_error,
    prefix_survival,
    reliability_slots,
    reliability_table,
    reliability_tables,
    split_prompts,
)
from dspark_lab.serving import RoundCosts, gain_table
from tests.traces import RAGGED, SLOTS, TRACE, made_trace, reached_by_hand, rounds_by_hand, unlucky

FIT, TEST = split_prompts(TRACE)
COSTS = RoundCosts.of(SLOTS, plain_seconds=1, draft_seconds=0.3, verify_seconds=1)


def test_a_split_is_by_conversation_and_repeatable() -> None:
    fit, test = split_prompts(TRACE, 0.5, seed=1)
    assert not set(fit["prompt"]) & set(test["prompt"])
    assert len(fit) + len(test) == len(TRACE)
    for domain in ("code", "chat"):
        assert fit.loc[fit["domain"] == domain, "prompt"].nunique() == 3
    shuffled, _ = split_prompts(TRACE.sample(frac=1, random_state=0), 0.5, seed=1)
    assert set(shuffled["prompt"]) == set(fit["prompt"])
    draws = {frozenset(split_prompts(TRACE, 0.5, seed=s)[0]["prompt"]) for s in range(8)}
    assert len(draws) > 1
    with pytest.raises(ValueError, match="leaves one side empty"):
        split_prompts(TRACE[TRACE["prompt"] == 0])
    with pytest.raises(ValueError, match="share must lie between 0 and 1, got 1"):
        split_prompts(TRACE, 1)


def error_interval_by_hand(rows: list, prompts: list, draws: np.ndarray, bins: int):
    """Each resample as a list of samples, the same sample as often as its conversation is drawn."""
    errors = []
    for times in draws:
        often = dict(zip(prompts, times, strict=True))
        sample = [r for r in rows for _ in range(often[r.prompt])]
        if sample:
            outcome = [float(r.accepted) for r in sample]
            confidence = [r.confidence for r in sample]
            errors.append(expected_calibration_error(confidence, outcome, bins))
    return pytest.approx(tuple(np.quantile(errors, [0.025, 0.975])))


def test_a_report_is_fitted_on_one_part_and_counted_on_conversations_drawn_of_the_other() -> None:
    report = calibration_report(FIT, TEST, bins=8, resamples=40, seed=3)
    scaling = SequentialTemperatures.fit_trace(FIT, bins=8)
    assert report["slot"].tolist() == [0, 1, 2, 3, "all"]
    assert report["temperature"].tolist()[:4] == list(scaling.temperatures)
    scaled = TEST.assign(confidence=scaling.apply(rounds_of(TEST).confidence).ravel())
    prompts = sorted(TEST["prompt"].unique())
    draws = np.random.default_rng(3).multinomial(6, [1 / 6] * 6, size=40)
    for row in report.itertuples():
        kept = [r for r in reached_by_hand(TEST) if row.slot in ("all", r.slot)]
        kept_scaled = [r for r in reached_by_hand(scaled) if row.slot in ("all", r.slot)]
        after = [r.confidence for r in kept_scaled]
        before = [r.confidence for r in kept]
        outcome = [float(r.accepted) for r in kept]
        assert row.samples == len(kept)
        assert row.confidence == pytest.approx(np.mean(before))
        assert row.confidence_scaled == pytest.approx(np.mean(after))
        assert row.outcome == pytest.approx(np.mean(outcome))
        assert row.ece == pytest.approx(expected_calibration_error(before, outcome, 8))
        assert row.ece_scaled == pytest.approx(expected_calibration_error(after, outcome, 8))
        interval = error_interval_by_hand(kept, prompts, draws, 8)
        assert (row.ece_low, row.ece_high) == interval
        interval = error_interval_by_hand(kept_scaled, prompts, draws, 8)
        assert (row.ece_scaled_low, row.ece_scaled_high) == interval
        assert row.brier_scaled == pytest.approx(brier(after, outcome))
        assert row.auroc == pytest.approx(auroc(before, outcome))
        if row.slot != "all":
            assert row.auroc_scaled == pytest.approx(row.auroc)
            lived, product = [], []
            for block in rounds_by_hand(scaled).values():
                lived.append(float(all(r.accepted for r in block[: row.slot + 1])))
                product.append(math.prod(r.confidence for r in block[: row.slot + 1]))
            error = expected_calibration_error(product, lived, 8)
            assert row.ece_product_scaled == pytest.approx(error)
    # TRACE is far from calibrated, so that chance adds little.
    assert row.ece_low < row.ece < row.ece_high and row.ece_scaled_high < row.ece_low


def test_a_report_shows_no_temperature_of_slots_that_are_not_identifiable() -> None:
    every = calibration_report(*split_prompts(TRACE))
    report = calibration_report(*split_prompts(unlucky(TRACE)))
    assert report["temperature"].tolist()[:2] == every["temperature"].tolist()[:2]
    assert report["temperature"][2:].isna().all()
    assert report["samples"][2] > 0 and report["samples"][3] == 0
    assert report["confidence_scaled"][2] == pytest.approx(report["confidence"][2])
    assert report["ece_scaled"][1] != report["ece"][1]
    certain = TRACE.assign(accepted=TRACE["accepted"] | (TRACE["slot"] == 0))
    report = calibration_report(*split_prompts(certain))
    assert report["temperature"].isna().tolist() == [True, False, False, False, True]
    assert report["confidence_scaled"][0] == pytest.approx(report["confidence"][0])


@pytest.mark.parametrize("trace", [TRACE, RAGGED, unlucky(TRACE)])
@pytest.mark.parametrize("outcome", ["empirical", "analytic"])
@pytest.mark.parametrize("binning", ["width", "mass"])
def test_reliability_is_that_of_held_samples_scaled_by_hand(trace, outcome, binning) -> None:
    fit, held = split_prompts(trace)
    options = {"bins": 8, "binning": binning}
    scaling = SequentialTemperatures.fit_trace(fit, otherwise=1.0, **options)
    reached = sorted(reached_by_hand(held), key=lambda r: (r.prompt, r.round, r.slot))
    raw = [r.confidence for r in reached]
    scaled = [
        1 / (1 + (1 / r.confidence - 1) ** (1 / scaling.temperatures[r.slot])) for r in reached
    ]
    seen = [float(r.accepted) if outcome == "empirical" else r.accept_rate for r in reached]
    tables = reliability_tables(fit, held, outcome=outcome, resamples=30, seed=5, **options)
    assert list(tables) == ["raw", "scaled"]
    slots = reliability_slots(fit, held, **options)
    places = [(r.prompt, r.round, r.slot) for r in reached]
    assert slots[["prompt", "round", "slot"]].to_records(index=False).tolist() == places
    assert slots["scaled"].tolist() == pytest.approx(scaled)
    for name, confidence in (("raw", raw), ("scaled", scaled)):
        table, bounds = tables[name], ["outcome_low", "outcome_high"]
        assert table["count"].sum() == len(reached)
        expected = reliability_table(confidence, seen, **options)
        pd.testing.assert_frame_equal(table.drop(columns=bounds), expected)
        # Of the very numbers, which may lie on an edge.
        own = slots[{"raw": "confidence"}.get(name, name)]
        of_bin = bins_by_number(own, [*table["low"], table["high"].iloc[-1]])
        assert slots[f"{name}_bin"].tolist() == of_bin
        by_hand = outcome_intervals_by_hand(reached, seen, of_bin, len(table))
        assert table[bounds].to_numpy() == pytest.approx(by_hand, nan_ok=True)


def bins_by_number(confidence: pd.Series, edges: list) -> list[int]:
    """The first bin whose high edge is not below; the last takes what is left."""
    last = len(edges) - 2
    return [min(sum(f > edge for edge in edges[1:]), last) for f in confidence]


def outcome_intervals_by_hand(rows: list, seen: list, of_bin: list, bins: int) -> np.ndarray:
    """Of each bin, from resamples in which a conversation counts as often as it was drawn."""
    prompts = sorted({r.prompt for r in rows})
    chances = [1 / len(prompts)] * len(prompts)
    draws = np.random.default_rng(5).multinomial(len(prompts), chances, size=30)
    found = np.full((bins, 2), np.nan)
    for number in range(bins):
        held = [(r.prompt, o) for r, o, b in zip(rows, seen, of_bin, strict=True) if b == number]
        if len({prompt for prompt, _ in held}) < 2:
            continue
        means = []
        for times in draws:
            often = dict(zip(prompts, times, strict=True))
            sample = [o for prompt, o in held for _ in range(often[prompt])]
            if sample:
                means.append(sum(sample) / len(sample))
        found[number] = np.quantile(means, [0.025, 0.975])
    return found


def claims(fit: pd.DataFrame, held: pd.DataFrame) -> pd.DataFrame:
    traces = pd.concat([fit, held]).assign(drafter="dspark", temperature=1.0)
    return claims_table(traces, resamples=5)


TABLES = {
    "report": lambda fit, held: calibration_report(fit, held, resamples=5),
    "reliability": reliability_tables,
    "gain": lambda fit, held: gain_table(fit, held, COSTS, resamples=5),
    "drift": lambda fit, held: drift_table(fit, *split_prompts(held), half_life=30, window=50),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_nothing_is_reported_on_prompts_that_were_fitted(table) -> None:
    overlapping = pd.concat([TEST, FIT[FIT["prompt"] == FIT["prompt"].iloc[0]]])
    for held in (FIT, overlapping):
        with pytest.raises(ValueError, match="no prompt in common, got"):
            table(FIT, held)


@pytest.mark.parametrize("table", [*TABLES.values(), claims], ids=[*TABLES, "claims"])
def test_tables_neither_warn_of_the_grids_end_nor_refuse_non_identifiable_slots(table) -> None:
    # A temperature of 10 would repair these confidences; the grid ends at 5.
    trace = unlucky(made_trace(3, distortion=(0.1,) * SLOTS))
    fit, held = split_prompts(trace)
    with pytest.warns(UserWarning, match="the best temperature, 5, is at the end of the grid"):
        SequentialTemperatures.fit_trace(fit, otherwise=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(table(fit, held)) > 0


def test_what_is_undefined_is_marked_in_a_report_and_has_no_reliability() -> None:
    few = TEST[TEST["round"] < 1].assign(accepted=lambda t: t["slot"] < 1)
    report = calibration_report(FIT, few).set_index("slot")
    # Slot 0 of six rounds, always accepted: too few for 15 bins, and one class only.
    assert report.loc[0, "samples"] == 6
    assert math.isnan(report.loc[0, "ece"]) and math.isnan(report.loc[0, "auroc"])
    assert report.loc[0, "outcome"] == 1
    assert report.loc[2, "samples"] == 0
    columns = ["outcome", "ece", "brier", "auroc", "confidence_scaled"]
    assert report.loc[2, columns].isna().all()
    report = calibration_report(FIT, TEST[TEST["prompt"] == TEST["prompt"].iloc[0]], bins=5)
    bounds = ["ece_low", "ece_high", "ece_scaled_low", "ece_scaled_high"]
    assert report["ece"].notna().all() and report[bounds].isna().all(axis=None)
    with pytest.raises(ValueError, match="5000 bins of equal mass need"):
        reliability_tables(FIT, TEST, bins=5000, binning="mass")
    with pytest.raises(ValueError, match="confidence must be a number"):
        reliability_tables(FIT, TEST.assign(confidence=math.nan))


def test_bins_of_equal_mass_stay_where_they_are_when_conversations_are_drawn_again() -> None:
    report = calibration_report(FIT, TEST, binning="mass", bins=5)
    assert (report["ece_low"] < report["ece_high"]).all()
    assert report["ece"].iloc[-1] == pytest.approx(
        expected_calibration_error(*rounds_of(TEST).pairs(), 5, "mass")
    )


def test_online_scaling_recovers_from_a_change_that_static_temperatures_do_not() -> None:
    """From overconfident (0.4) to underconfident (2.5): after 400 rounds 0.03 against 0.2.

    Over three seeds the online error is 0.021 to 0.031 there, the static one 0.186 to 0.227.
    """
    first = dict(distortion=(0.4,) * SLOTS, domains=("math",))
    second = dict(distortion=(2.5,) * SLOTS, domains=("chat",))
    fit = made_trace(7, range(10), 60, **first)
    before = made_trace(8, range(10, 20), 80, **first)
    after = made_trace(9, range(20, 40), 60, **second)
    table = drift_table(fit, before, after, half_life=80, window=400, every=40, bins=10)
    assert table["start"].tolist() == [-800, -400, 0, 400, 800]
    early, late = table[table["start"] < 0], table[table["start"] >= 400]
    assert (early["ece_raw"] > early["ece_static"] + 0.03).all()
    assert (early["ece_online"] < 0.1).all()
    assert (late["ece_online"] < late["ece_static"] - 0.05).all()


@pytest.mark.parametrize("change", [lambda trace: trace, unlucky], ids=["whole", "unlucky"])
def test_drift_windows_are_counted_from_the_change(change) -> None:
    parts = [change(made_trace(s, range(10 * s, 10 * s + 4), 30)) for s in (1, 2, 3)]
    table = drift_table(*parts, half_life=30, window=50, bins=5)
    assert table["start"].tolist() == [-100, -50, 0, 50]
    raw = rounds_of(parts[2])
    product = np.cumprod(raw.confidence[50:100], axis=1).ravel()
    lived = prefix_survival(raw.outcome()[50:100]).ravel()
    assert table["ece_raw"].iloc[-1] == pytest.approx(expected_calibration_error(product, lived, 5))
    grid = np.exp(np.linspace(-np.log(5), np.log(5), 55))
    fit = SequentialTemperatures.fit_trace(parts[0], otherwise=1.0, grid=grid, bins=5)
    static = np.cumprod(fit.apply(raw.confidence[50:100]), axis=1).ravel()
    error = expected_calibration_error(static, lived, 5)
    assert table["ece_static"].iloc[-1] == pytest.approx(error)
    with pytest.raises(ValueError, match="window must fit into before or after, got 500 for 120"):
        drift_table(*parts, half_life=30, window=500, bins=5)
