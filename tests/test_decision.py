"""What to do about a server: each option's gain over what was served, and what is surely faster."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from data.make.server_files import json_lines, sglang_dump, vllm_object, vllm_row
from dspark_lab.pairs import load_traces
from dspark_lab.rates import split_prompts
from dspark_lab.records import (
    CAUSES,
    HEALTHY,
    Diagnosis,
    decide_serving,
    record_parts,
)
from dspark_lab.serving import AcceptanceProfile, RoundCosts, gain_by_length, gain_table
from tests.served import drawn, record
from tests.test_records import SIX

PLAIN, DRAFT, VERIFY, REST = 0.01, 0.0005, 0.002, 0.001


def costs(verify: float = VERIFY, longest: int = 6, draft: float = DRAFT) -> RoundCosts:
    """A pass takes as long as a plain step and so much more for each drafted token."""
    return RoundCosts(
        plain_seconds=PLAIN,
        draft_seconds=[draft * k for k in range(1, longest + 1)],
        verify_seconds=[PLAIN + verify * k for k in range(longest + 1)],
        overhead_seconds=REST,
    )


def speed(rates: list[float], k: int, verify: float = VERIFY) -> float:
    tau = 1 + sum(math.prod(rates[: slot + 1]) for slot in range(k))
    return tau * PLAIN / (DRAFT * k + PLAIN + verify * k + REST)


def diagnosis(cause: str) -> Diagnosis:
    other = next(name for name in CAUSES if name != cause)
    rows = [(cause, 0.9, "what it does", "what settles it"), (other, 0.1, "", "")]
    figures = pd.DataFrame({"figure": ["slot 0"], "server": [0.4], "trained": [0.6]})
    figures = figures.assign(difference=-0.8, standard_error=0.1)
    return Diagnosis(pd.DataFrame(rows, columns=["cause", "share", "says", "test"]), figures, ())


def test_gains_are_those_of_a_loop_over_lengths() -> None:
    rates = [0.9, 0.7, 0.5, 0.3]
    table = gain_by_length(AcceptanceProfile.of(rates), costs()).set_index("draft_length")
    for k in range(1, 5):
        assert table.loc[k, "speedup"] == pytest.approx(speed(rates, k))
        assert table.loc[k, "gain_percent"] == pytest.approx(
            100 * (speed(rates, k) / speed(rates, 4) - 1)
        )
    assert table["gain_low"].isna().all()
    against = gain_by_length(AcceptanceProfile.of(rates), costs(), 2).set_index("draft_length")
    assert against.loc[2, "gain_percent"] == 0 and against.loc[4, "gain_percent"] == pytest.approx(
        100 * (speed(rates, 4) / speed(rates, 2) - 1)
    )
    with pytest.raises(ValueError, match="draft_length must be at most 4, got 5"):
        gain_by_length(AcceptanceProfile.of(rates), costs(), 5)


def test_intervals_of_a_gain_are_of_the_same_requests_drawn_again() -> None:
    profile = drawn([0.8] * 6, 60).profile(resamples=200)
    table = gain_by_length(profile, costs()).set_index("draft_length")
    assert table.loc[6, ["gain_low", "gain_high"]].tolist() == [0, 0]
    apart = table.loc[6, "speedup_high"] - table.loc[6, "speedup_low"]
    assert table.loc[5, "gain_high"] - table.loc[5, "gain_low"] < apart * 50
    sampled = [costs().figures(profile.sampled_survival(k))["speedup"] for k in (5, 6)]
    low, high = 100 * np.quantile(sampled[0] / sampled[1] - 1, [0.025, 0.975])
    assert table.loc[5, ["gain_low", "gain_high"]].tolist() == pytest.approx([low, high])


ACTIONS = {
    "keep": ([0.95] * 6, VERIFY, {"draft_length": 6}),
    "change the draft length": ([0.95, 0.95, 0.1, 0.1, 0.1, 0.1], VERIFY, {"draft_length": 2}),
    "stop drafting": ([0.2] * 6, 0.01, {"draft_length": 0}),
}


HEADLINES = {
    "keep": "Keep",
    "change the draft length": "Change the draft length to 2",
    "stop drafting": "Stop drafting",
}


@pytest.mark.parametrize("action", ACTIONS)
def test_what_is_surely_faster_is_advised(action: str) -> None:
    rates, verify, setting = ACTIONS[action]
    found = decide_serving(drawn(rates), costs(verify))
    assert (found.action, found.setting) == (action, setting)
    assert found.headline == HEADLINES[action]
    assert found.options["option"].tolist() == [
        *(f"draft {k}" for k in range(6, 0, -1)),
        "plain decoding",
    ]
    plain = found.options.iloc[-1]
    served = found.options.iloc[0]
    assert plain["gain_percent"] == pytest.approx(100 / served["speedup"] - 100)
    assert plain["gain_low"] == pytest.approx(100 / served["speedup_high"] - 100)
    assert found.reason.startswith(action[0].upper() + action[1:]) and found.diagnosis is None


def test_a_gain_that_may_be_chance_changes_nothing() -> None:
    # Two requests of which one is for shorter drafts and one for longer ones.
    both = record([[0, 0, 60, 0, 0, 0, 0], [0, 0, 5, 0, 0, 0, 21]])
    found = decide_serving(both, costs())
    best = found.options.set_index("option").loc["draft 2"]
    assert best["gain_percent"] > 10 and best["gain_low"] < 0 < best["gain_high"]
    assert found.action == "keep" and not found.options["faster"].any()
    # The same counts as sums alone have no chance to speak of.
    whole = found.options
    sums = replace(both, unit="interval")
    alone = decide_serving(sums, costs())
    assert alone.action == "change the draft length" and alone.setting == {"draft_length": 2}
    assert alone.options["gain_percent"].tolist() == pytest.approx(whole["gain_percent"].tolist())
    assert alone.options["gain_low"].isna().all()


def test_without_intervals_a_gain_of_a_tenth_counts() -> None:
    rates = [0.9, 0.9, 0.3]
    for verify, faster in ((0.0045, True), (0.0025, False)):
        gain = 100 * (speed(rates, 2, verify) / speed(rates, 3, verify) - 1)
        assert 0 < gain and (gain > 10) == faster and abs(gain - 10) > 1
        sums = replace(drawn(rates, 5000), unit="interval")
        shown = decide_serving(sums, costs(verify)).options.set_index("option")
        assert shown.loc["draft 2", "gain_percent"] == pytest.approx(gain, abs=0.4)
        assert shown.loc["draft 2", "faster"] == faster


def test_a_fault_comes_before_every_option() -> None:
    served = drawn(ACTIONS["stop drafting"][0])
    found = decide_serving(served, costs(0.01), diagnosis=diagnosis("positions"))
    assert found.action == "something is wrong" and found.setting == {}
    assert found.headline == "Something is wrong: positions"
    assert "what it does" in found.reason and "what settles it" in found.reason
    assert found.diagnosis is not None and len(found.options) == 7
    for harmless in (HEALTHY, "harder prompts"):
        found = decide_serving(served, costs(0.01), diagnosis=diagnosis(harmless))
        assert found.action == "stop drafting"
        assert found.reason.endswith(
            f"{harmless[0].upper()}{harmless[1:]} (90% of the likelihood)."
        )


def test_slots_that_no_round_reached_were_served_too() -> None:
    found = decide_serving(record([[9, 3, 0, 0, 0, 0, 0], [8, 4, 0, 0, 0, 0, 0]]), costs())
    rates = [7 / 24, 0, 0, 0, 0, 0]
    assert found.options["draft_length"].tolist() == [6, 5, 4, 3, 2, 1, 0]
    speeds = [speed(rates, k) for k in range(6, 0, -1)]
    assert found.options["speedup"].tolist() == pytest.approx([*speeds, 1])


def test_totals_alone_tell_no_option() -> None:
    totals = replace(drawn([0.5]), reached=np.zeros((300, 0)), passed=np.zeros((300, 0)))
    found = decide_serving(totals, costs())
    assert found.action == "cannot be told" and found.options.empty
    assert "must have acceptance by slot" in found.reason
    assert decide_serving(totals, costs(), diagnosis=diagnosis("window")).action == (
        "something is wrong"
    )


def test_blocks_that_the_engine_does_not_know_are_not_judged() -> None:
    found = decide_serving(drawn([0.5] * 6), costs(longest=4))
    assert found.action == "cannot be told" and "drafts of 6 tokens, got up to 4" in found.reason


@pytest.fixture(scope="module")
def trace() -> pd.DataFrame:
    found = load_traces()
    return found[(found["drafter"] == "dspark-k7") & (found["temperature"] == 0)]


def test_a_threshold_is_judged_on_other_requests_than_it_was_chosen_on(
    trace: pd.DataFrame,
) -> None:
    dear = costs(0.01, longest=7)
    found = decide_serving(trace, dear)
    table = gain_table(*split_prompts(trace), dear).set_index("values")
    row = found.options.set_index("draft_length").loc[7].set_index("option").iloc[1]
    assert row.name == f"threshold {table.loc['raw', 'threshold']:.2f}"
    whole = table.loc["everything"]
    bounds = [
        100 / (1 + whole[name] / 100) - 100 for name in ("gain_percent", "gain_high", "gain_low")
    ]
    assert row[["gain_percent", "gain_low", "gain_high"]].tolist() == pytest.approx(bounds)
    ratio = table.loc["raw", "speed"] / table.loc["everything", "speed"]
    assert row["gain_percent"] == pytest.approx(100 * (ratio - 1))
    assert row["speedup"] == pytest.approx(found.options["speedup"][0] * ratio)


def test_a_threshold_is_advised_where_it_is_the_fastest(trace: pd.DataFrame) -> None:
    # Drafting is free, and so is what plain decoding would take per token.
    found = decide_serving(trace, replace(costs(0.004, longest=7, draft=0.0), plain_seconds=0.05))
    assert found.action == "change the threshold"
    assert found.headline == f"Change the threshold to {found.setting['threshold']:.2f}"
    assert 0 < found.setting["threshold"] < 1


def test_parts_are_by_temperature_with_their_traces(trace: pd.DataFrame, tmp_path: Path) -> None:
    whole = load_traces()
    parts = record_parts(whole, "dspark-k7")
    assert list(parts) == [0.0, 1.0]
    pd.testing.assert_frame_equal(parts[0.0][1], trace)
    assert parts[0.0][0].rounds == trace.groupby(["prompt", "round"]).ngroups
    with pytest.raises(ValueError, match="one drafter"):
        record_parts(whole)
    with pytest.raises(ValueError, match=r"one temperature.*, got \[0.0, 1.0\]"):
        decide_serving(whole[whole["drafter"] == "dspark-k7"], costs(longest=7))
    rows = [vllm_row(vllm_object(SIX, 3), f"r{n}", temperature=n % 2 / 2) for n in range(4)]
    path = tmp_path / "served.jsonl"
    path.write_text(json_lines(*rows))
    path.write_text(json_lines(*rows, vllm_row(vllm_object(SIX, 3), "r4")))
    parts = record_parts(path)
    assert "1 of 5 lines say no temperature" in parts[0.0][0].reason
    assert {t: len(one.lines) for t, (one, _) in parts.items()} == {0.0: 2, 0.5: 2}


def test_a_debug_record_brings_its_own_trace(tmp_path: Path) -> None:
    path = tmp_path / "dump.json"
    path.write_text(sglang_dump([SIX, SIX], 3))
    [(served, own)] = record_parts(path).values()
    assert served.rounds == 12 and own is not None
    # What a server accepted stands for the accept rates that it does not record.
    assert own["accept_rate"].tolist() == own["accepted"].astype(float).tolist()
    found = decide_serving(path, costs(longest=3))
    assert "threshold" not in "".join(found.options["option"])


def test_where_plain_steps_are_not_known_plain_decoding_is_no_option() -> None:
    served = drawn(ACTIONS["stop drafting"][0])
    found = decide_serving(served, replace(costs(0.01), plain_known=False))
    known = decide_serving(served, costs(0.01)).options
    assert found.action == "change the draft length" and found.setting == {"draft_length": 1}
    assert found.options["option"].tolist() == known["option"].tolist()[:-1]
    assert found.options["speedup"].isna().all() and "plain" not in found.reason
    assert found.options["gain_low"].tolist() == known["gain_low"].tolist()[:-1]


def test_what_is_given_wrong_is_refused() -> None:
    wrong: Any = 3
    with pytest.raises(TypeError, match="costs must be"):
        decide_serving(drawn([0.5]), wrong)
