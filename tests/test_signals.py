"""What a drafter's best logits say of a slot, beside its confidence head."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize

from dspark_lab.decoding import rounds_of
from dspark_lab.decoding.verification import top_and_margin
from dspark_lab.rates import (
    SIGNALS,
    auroc,
    expected_calibration_error,
    reached_rows,
    signal_table,
    signals,
    split_prompts,
)
from dspark_lab.serving import (
    Engine,
    FixedLength,
    PrefixScheduler,
    StepsPerSecond,
    best_threshold,
    draw_requests,
    signal_speeds,
    simulate,
)
from tests.traces import SLOTS, made_trace


def with_margins(trace: pd.DataFrame, seed: int, noise: float) -> pd.DataFrame:
    """Margins that know a slot's true rate up to some noise, and a largest probability alike."""
    rng = np.random.default_rng(seed)
    rate = trace["accept_rate"].fillna(0.5).clip(0.02, 0.98)
    margin = np.log(rate / (1 - rate)) + 4 + noise * rng.normal(size=len(trace))
    top = 1 / (1 + np.exp(-(margin - 4)))
    rates = trace["accept_rate"]
    own = {"top_prob": top, "margin": margin.clip(lower=0), "accept_prob": rates}
    return trace.assign(**own, drafter="dspark", temperature=1.0)


@pytest.fixture(scope="module")
def trace() -> pd.DataFrame:
    """Of a head that knows little, and margins that know more."""
    return with_margins(made_trace(1, noise=1.5), seed=2, noise=0.3)


@pytest.fixture(scope="module")
def halves(trace: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    return split_prompts(trace)


def fitted(inputs: Sequence[np.ndarray], accepted: np.ndarray) -> np.ndarray:
    """A logistic regression by a general minimiser; the prior is that of weights near 0."""
    x = np.column_stack([np.ones(len(accepted)), *inputs])

    def loss(w: np.ndarray) -> float:
        z = x @ w
        return float(np.logaddexp(0, z).sum() - z[accepted].sum() + 0.005 * w @ w)

    return minimize(loss, np.zeros(x.shape[1]), method="BFGS", options={"gtol": 1e-8}).x


def logit(p: pd.Series) -> np.ndarray:
    p = p.clip(1e-6, 1 - 1e-6)
    return np.log(p / (1 - p)).to_numpy()


def test_the_best_logits_of_a_row_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.5], [0.0, 0.0, -math.inf]])
    found = top_and_margin(logits)
    top = 1 / (1 + math.exp(-0.5) + math.exp(-2))
    torch.testing.assert_close(found, torch.tensor([[top, 0.5], [0.5, 0.0]]))
    assert top_and_margin(torch.zeros(2, 1)).tolist() == [[1.0, math.inf]] * 2


def test_head_and_largest_probability_are_taken_as_they_are(halves) -> None:
    found = signals(*halves)
    assert list(found) == list(SIGNALS)
    for signal, column in (("head", "confidence"), ("top_prob", "top_prob")):
        for own, given in zip(found[signal], halves, strict=True):
            expected = given[column].rename("confidence")
            pd.testing.assert_series_equal(own["confidence"], expected)
    for parts in found.values():
        for own, given in zip(parts, halves, strict=True):
            pd.testing.assert_frame_equal(
                own.drop(columns="confidence"), given.drop(columns="confidence")
            )


def test_regressions_are_fitted_on_what_the_first_half_accepted(halves) -> None:
    seen, found = reached_rows(halves[0]), signals(*halves)
    accepted = seen["accepted"].to_numpy()
    inputs = {"margin": [seen["margin"]], "both": [logit(seen["confidence"]), seen["margin"]]}
    for name, of in inputs.items():
        weights = fitted(of, accepted)
        for own, given in zip(found[name], halves, strict=True):
            x = [given["margin"].to_numpy()]
            if name == "both":
                x.insert(0, logit(given["confidence"]))
            z = weights[0] + sum(w * part for w, part in zip(weights[1:], x, strict=True))
            expected = 1 / (1 + np.exp(-z))
            np.testing.assert_allclose(own["confidence"], expected, atol=1e-4)


def test_online_a_round_is_judged_before_it_is_seen(halves) -> None:
    fit, test = halves
    before = signals(fit, test)["online margin"]
    # Nothing was seen before the first round: even odds.
    first = before[0].sort_values(["round", "prompt", "slot"]).iloc[:SLOTS]
    assert first["confidence"].tolist() == [0.5] * SLOTS
    # The outcome of the last round of all is not known to anyone.
    last = test[test["round"] == test["round"].max()]
    last = last[last["prompt"] == last["prompt"].max()]
    changed = test.copy()
    changed.loc[last.index, "accepted"] = False
    after = signals(fit, changed)["online margin"]
    pd.testing.assert_series_equal(after[1]["confidence"], before[1]["confidence"])
    # That of the first round of all is known to every other.
    changed = fit.copy()
    changed.loc[first.index, "accepted"] = ~first["accepted"].any()
    after = signals(changed, test)["online margin"]
    assert (after[1]["confidence"] != before[1]["confidence"]).all()


def test_online_the_first_rounds_of_all_prompts_come_before_any_second(halves) -> None:
    fit, test = halves
    before = signals(fit, test)["online margin"][0]
    later = fit[(fit["prompt"] == fit["prompt"].min()) & (fit["round"] == 1)]
    changed = fit.copy()
    changed.loc[later.index, "accepted"] = ~later["accepted"].any()
    after = signals(changed, test)["online margin"][0]
    other = before["confidence"] != after["confidence"]
    # The changed round is the first of the second ones, and none of the first knows it.
    assert not other[fit["round"] == 0].any()
    assert other[fit["round"] > 1].all()


def test_what_is_learned_online_ends_near_what_is_fitted_at_once() -> None:
    fit, test = split_prompts(with_margins(made_trace(3, rounds=400), seed=4, noise=0.3))
    found = signals(fit, test)
    gap = found["online margin"][1]["confidence"] - found["margin"][1]["confidence"]
    assert gap.abs().max() < 0.03


def test_a_table_has_the_scores_of_each_signal_on_the_other_half(trace, halves) -> None:
    table = signal_table(trace, resamples=30).set_index("signal")
    head = auroc(*rounds_of(halves[1]).pairs())
    for name, (_, test) in signals(*halves).items():
        pairs, row = rounds_of(test).pairs(), table.loc[name]
        assert row["auroc"] == pytest.approx(auroc(*pairs))
        assert row["over_head"] == pytest.approx(auroc(*pairs) - head)
        assert row["ece"] == pytest.approx(expected_calibration_error(*pairs))
        assert row["auroc_low"] < row["auroc"] < row["auroc_high"]
    # The margins were made to know more than the head does.
    assert table.loc["margin", "over_head"] > 0
    assert table.loc["both", "auroc"] > table.loc["head", "auroc"]


def test_without_a_head_its_signals_are_left_out(trace) -> None:
    headless = trace.assign(confidence=math.nan)
    table = signal_table(headless, resamples=5)
    assert table["signal"].tolist() == ["top_prob", "margin", "online margin"]
    assert table["over_head"].isna().all() and table["auroc"].notna().all()


def test_speeds_are_those_of_the_threshold_and_of_the_scheduler(trace, halves) -> None:
    tokens = np.array([1, 100])
    sps = StepsPerSecond(tokens, 1 / (1 + 0.2 * tokens), 0, "imaginary")
    engine = Engine.of(sps, SLOTS, draft_seconds=0.1)
    table = signal_speeds(trace, engine, [2], requests=20, resamples=5)
    assert table["signal"].tolist() == list(SIGNALS) and set(table["concurrency"]) == {2}
    for name, (fit, test) in signals(*halves).items():
        row = table.set_index("signal").loc[name]
        best = best_threshold(fit, engine.costs(2), test=test, resamples=5)
        assert row["threshold"] == best["threshold"] and row["speedup"] == best["speedup"]
        drawn = draw_requests(test, 20)
        plain, scheduled = (
            simulate(drawn, engine, policy, concurrency=2).figures["throughput"]
            for policy in (FixedLength(0), PrefixScheduler())
        )
        assert row["scheduled"] == pytest.approx(scheduled / plain)


def test_traces_without_margins_are_refused(trace, halves) -> None:
    with pytest.raises(ValueError, match="must have top_prob and margin in every row"):
        signal_table(trace.drop(columns="margin"))
    with pytest.raises(ValueError, match="must have top_prob and margin in every row"):
        signals(halves[0], halves[1].assign(top_prob=math.nan))
    with pytest.raises(ValueError, match="no prompt in common"):
        signals(halves[0], halves[0])
