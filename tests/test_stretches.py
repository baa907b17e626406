"""Tau in stretches of depth, time or load: sums by hand, changes that are planted and none."""

import numpy as np
import pandas as pd
import pytest

from dspark_lab.pairs import load_traces
from dspark_lab.rates import depth_table, stretch_reason, tau_by_stretch, tau_table, trace_sums
from dspark_lab.records import AcceptanceRecord, acceptance_over


def parts(change: float, seed: int, answers: int = 60) -> tuple[np.ndarray, ...]:
    """Values 0 to 19 of each answer; from 10 on rounds accept ``change`` fewer of three tokens."""
    rng = np.random.default_rng(seed)
    values = np.tile(np.arange(20.0), answers)
    accepted = rng.binomial(3, np.where(values < 10, 0.6, 0.6 - change / 3)).astype(float)
    return values, np.ones(len(values)), accepted, np.repeat(np.arange(answers), 20)


def test_stretches_are_those_of_a_small_case_by_hand() -> None:
    values = np.array([5.0, 1.0, 1.0, 9.0, 7.0])
    rounds = np.array([2.0, 1.0, 1.0, 3.0, 1.0])
    accepted = np.array([4.0, 1.0, 2.0, 3.0, 0.0])
    table = tau_by_stretch(values, rounds, accepted, stretches=2)
    # Four of eight rounds lie at 5 and below.
    assert table["begin"].tolist() == [1, 7] and table["end"].tolist() == [5, 9]
    assert table["rounds"].tolist() == [4, 4]
    assert table["tau"].tolist() == [1 + 7 / 4, 1 + 3 / 4]
    assert table["change"].tolist()[1] == pytest.approx(1.75 / 2.75 - 1)
    assert np.isnan(table["change"][0]) and table["low"].isna().all()
    assert "cannot be told" in stretch_reason(table)


def test_equal_values_are_never_put_apart() -> None:
    values = np.array([1.0] * 9 + [2.0])
    table = tau_by_stretch(values, np.ones(10), np.ones(10), stretches=5)
    assert table["rounds"].tolist() == [9, 1]


@pytest.mark.parametrize(("change", "word"), [(0.6, "falls"), (-0.6, "rises")])
def test_a_planted_change_is_found_where_it_begins(change: float, word: str) -> None:
    table = tau_by_stretch(*parts(change, seed=0), stretches=4)
    assert table["begin"].tolist() == [0, 5, 10, 15]
    assert f"Tau {word} from position 10 on" in stretch_reason(table)


def test_no_change_is_seldom_taken_for_one() -> None:
    # Both of two later stretches must lie beyond their 95 % intervals, on one side.
    wrong = 0
    for seed in range(40):
        table = tau_by_stretch(*parts(0.0, seed), stretches=3, resamples=200)
        wrong += "No lasting change" not in stretch_reason(table)
    # The last stretch alone does so in 5 %; more than 7 of 40 have a chance below 0.5 %.
    assert wrong <= 7


def test_the_depth_of_a_trace_is_where_its_rounds_begin() -> None:
    trace = load_traces().query("drafter == 'dspark-k7' and temperature == 0")
    table = depth_table(trace, stretches=3)
    starts = trace.groupby(["prompt", "round"])["position"].min()
    assert table["begin"].iloc[0] == starts.min() and table["end"].iloc[-1] == starts.max()
    assert table["rounds"].sum() == len(starts)
    whole = tau_table(trace_sums(trace)).set_index("kind").loc["empirical", "tau"]
    assert (table["tau"] * table["rounds"]).sum() / len(starts) == pytest.approx(whole)
    lengths = {prompt: 100 for prompt in trace["prompt"].unique()}
    deeper = depth_table(trace, prompt_tokens=lengths, stretches=3)
    pd.testing.assert_series_equal(deeper["begin"], table["begin"] + 100)
    pd.testing.assert_frame_equal(deeper.drop(columns=["begin", "end"]), table.iloc[:, 2:])
    with pytest.raises(ValueError, match="prompt_tokens must have all prompts"):
        depth_table(trace, prompt_tokens={0: 1})


def test_load_is_a_column_of_a_record() -> None:
    lines = pd.DataFrame({"line": [1, 2, 3, 4], "rounds": [10.0] * 4, "drafted": [40.0] * 4})
    lines = lines.assign(accepted=[20.0, 20.0, 10.0, 10.0], running=[1, 1, 8, 8])
    nothing = np.empty((4, 0))
    record = AcceptanceRecord("log", "interval", lines, nothing, nothing, True, "")
    table = acceptance_over(record, "running", stretches=2)
    assert table["begin"].tolist() == [1, 8] and table["tau"].tolist() == [3, 2]
    assert table["low"].isna().all()
    with pytest.raises(ValueError, match=r"\['running'\], got 'seconds'"):
        acceptance_over(record)


def test_values_that_are_not_finite_and_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        tau_by_stretch(np.array([np.nan]), np.ones(1), np.ones(1))
    with pytest.raises(ValueError, match="no rounds"):
        tau_by_stretch(np.ones(1), np.zeros(1), np.zeros(1))


def test_a_dip_that_does_not_last_is_no_change() -> None:
    table = pd.DataFrame({"begin": [0, 10, 20], "tau": [3.0, 2.0, 3.0]})
    table = table.assign(change=[np.nan, -1 / 3, 0.0], change_low=[np.nan, -0.4, -0.1])
    table = table.assign(change_high=[np.nan, -0.2, 0.1])
    assert "No lasting change" in stretch_reason(table)
    table.loc[2, ["tau", "change", "change_low", "change_high"]] = [2.0, -1 / 3, -0.4, -0.2]
    assert "falls from position 10 on" in stretch_reason(table)
