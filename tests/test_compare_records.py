"""Two records of acceptance side by side, and one over time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dspark_lab as lab
from dspark_lab.decoding import save_trace
from dspark_lab.pairs import load_traces
from dspark_lab.rates import rate_table, trace_sums
from dspark_lab.records import (
    AcceptanceRecord,
    acceptance_over,
    compare_acceptance,
    speedup_by,
)
from dspark_lab.serving import RoundCosts, break_even, speedup_table

SLOTS = 4


def served(
    folder: Path, count: int, rate: float, seed: int, *, names: Any = "r{}".format, **given: Any
) -> AcceptanceRecord:
    """Requests of 30 rounds, each slot accepted with a rate that the request has a part in."""
    rng, rows = np.random.default_rng(seed), []
    own = np.random.default_rng(99).normal(0, 0.3, 1000)
    for number in range(count):
        likely = float(np.clip(rate + own[number], 0.01, 0.99))
        accepted = [int(np.append(rng.random(SLOTS) > likely, True).argmax()) for _ in range(30)]
        row: dict[str, Any] = {"per_step_accepted": accepted, "per_step_drafted": [SLOTS] * 30}
        rows.append({"id": names(number), "created": 100.0 + number, **given, **row})
    path = folder / f"{count}-{rate}-{seed}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return lab.load_acceptance(path)


def test_pairs_say_more_than_all_requests_of_either(tmp_path: Path):
    before, after = served(tmp_path, 60, 0.5, 1), served(tmp_path, 60, 0.6, 2)
    other = served(tmp_path, 60, 0.6, 2, names="other{}".format)
    paired, apart = (compare_acceptance(before, one) for one in (after, other))
    assert paired["figure"].tolist() == ["tau", *(f"survival {k}" for k in range(SLOTS))]
    assert paired["paired"].all() and not apart["paired"].any()
    shown = ["before", "after", "difference"]
    np.testing.assert_allclose(paired[shown], apart[shown])
    tau = paired.iloc[0]
    assert (tau["before"], tau["after"]) == (before.tau, after.tau)
    assert tau["difference"] == pytest.approx(after.tau - before.tau)
    assert 0 < tau["low"] < tau["difference"] < tau["high"]
    width, wider = (one["high"].iloc[0] - one["low"].iloc[0] for one in (paired, apart))
    assert width < 0.8 * wider
    np.testing.assert_allclose(paired["before"][1:], before.survival)


def test_only_requests_of_both_are_compared(tmp_path: Path):
    before, after = served(tmp_path, 40, 0.5, 1), served(tmp_path, 60, 0.5, 2)
    table = compare_acceptance(before, after)
    shared = after.lines.iloc[:40]
    assert table["requests"].tolist() == [40] * (1 + SLOTS)
    tau = 1 + shared["accepted"].sum() / shared["rounds"].sum()
    assert table["after"].iloc[0] == pytest.approx(tau) != after.tau


def test_intervals_miss_a_difference_of_none_in_about_5_percent(tmp_path: Path):
    """Of 200 pairs alike in all but the draws 95 %: fewer than 178 in 1 of 10,000 seeds."""
    hits = 0
    for seed in range(200):
        pair = (served(tmp_path, 30, 0.5, 2 * seed + own) for own in (0, 1))
        tau = compare_acceptance(*pair, resamples=400).iloc[0]
        hits += tau["low"] <= 0 <= tau["high"]
    assert 178 <= hits < 200


def test_sums_alone_have_a_difference_without_an_interval(tmp_path: Path):
    path = tmp_path / "metrics"
    lines = ["vllm:spec_decode_num_drafts_total 100", "vllm:spec_decode_num_draft_tokens_total 200"]
    for slot, count in enumerate((80, 40)):
        place = f'{{position="{slot}"}}'
        lines.append(f"vllm:spec_decode_num_accepted_tokens_per_pos_total{place} {count}")
    path.write_text("\n".join(lines) + "\n")
    server, requests = lab.load_acceptance(path), served(tmp_path, 20, 0.5, 1)
    table = compare_acceptance(server, requests)
    assert table["figure"].tolist() == ["tau", "survival 0", "survival 1"]
    assert table["before"].tolist() == [2.2, 0.8, 0.4]
    assert table["low"].isna().all() and not table["paired"].any()
    with pytest.raises(ValueError, match="a number that all lines"):
        acceptance_over(server)


def test_stretches_of_time_hold_all_rounds_and_show_a_change(tmp_path: Path):
    early, late = served(tmp_path, 40, 0.7, 1), served(tmp_path, 40, 0.3, 2)
    rows = [*(tmp_path / "40-0.7-1.jsonl").read_text().splitlines()]
    for line in (tmp_path / "40-0.3-2.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.insert(0, json.dumps(row | {"created": row["created"] + 1000}))
    path = tmp_path / "both.jsonl"
    path.write_text("\n".join(rows))
    table = acceptance_over(lab.load_acceptance(path), stretches=4)
    assert table["rounds"].tolist() == [600] * 4
    assert table["begin"].tolist() == [0, 20, 1000, 1020] and table["end"].iloc[-1] == 1039
    assert (table["low"] < table["tau"]).all() and (table["tau"] < table["high"]).all()
    assert table["tau"][:2].mean() == pytest.approx(early.tau)
    assert table["tau"][2:].mean() == pytest.approx(late.tau)
    assert len(acceptance_over(early, stretches=100)) == 40


# A round of K tokens takes 1.3 + K / 10 plain steps.
COSTS = RoundCosts.of(
    SLOTS, plain_seconds=1, draft_seconds=0.4, verify_seconds=lambda n: 0.9 + 0.1 * (n - 1)
)


def mixed(folder: Path) -> tuple[AcceptanceRecord, list[dict[str, Any]]]:
    """Requests of two temperatures and two labels, one that says neither, and their rows."""
    for place, (rate, given) in enumerate(
        [
            (0.9, {"temperature": 0.0, "label": "code"}),
            (0.6, {"temperature": 1.0, "label": "code"}),
            (0.1, {"temperature": 1.0, "label": "chat"}),
            (0.5, {}),
        ]
    ):
        served(folder, 12 + place, rate, place, names=f"{place}-{{}}".format, **given)
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    path = folder / "mixed.jsonl"
    path.write_text("\n".join(lines))
    return lab.load_acceptance(path), list(map(json.loads, lines))


@pytest.mark.parametrize("by", ["temperature", "label"])
def test_speed_by_temperature_and_label_is_that_of_the_parts(tmp_path: Path, by: Any):
    record, rows = mixed(tmp_path)
    table = speedup_by(record, COSTS, by, resamples=50, seed=3)
    assert table[by].tolist() == ([0.0, 1.0] if by == "temperature" else ["chat", "code"])
    for row in table.to_dict("records"):
        own = [one for one in rows if one.get(by) == row[by]]
        accepted = [count for one in own for count in one["per_step_accepted"]]
        assert (row["requests"], row["rounds"]) == (len(own), len(accepted))
        tau = 1 + sum(accepted) / len(accepted)
        assert row["tau"] == pytest.approx(tau) and row["draft_length"] == SLOTS
        assert row["speedup"] == pytest.approx(tau / 1.7)
        assert sum(row["accept_rate"] ** k for k in range(SLOTS + 1)) == pytest.approx(tau)
        assert row["break_even_rate"] == break_even(COSTS, SLOTS)
        # The accepted of a round of K are those of a whole block, at most K.
        speeds = {0: 1.0} | {
            k: (1 + sum(min(count, k) for count in accepted) / len(accepted)) / (1.3 + k / 10)
            for k in range(1, SLOTS + 1)
        }
        best = max(speeds, key=speeds.__getitem__)
        assert row["best_length"] == best
        assert row["best_speedup"] == pytest.approx(speeds[best])
        profile = record.part(**{by: row[by]}).profile(resamples=50, seed=3)
        lengths = speedup_table(profile, COSTS).set_index("draft_length")
        for name, length in (("tau", SLOTS), ("speedup", SLOTS), ("best_speedup", best)):
            for end in ("_low", "_high"):
                wanted = lengths.loc[length, name.removeprefix("best_") + end] if length else np.nan
                np.testing.assert_equal(row[name + end], wanted)
    assert (table["best_length"] == 0).tolist() == [by == "label", False]
    assert (table["tau_low"] < table["tau"]).all() and (table["tau"] < table["tau_high"]).all()


def test_a_group_is_judged_at_the_longest_draft_that_is_known_of_it(tmp_path: Path):
    rows = [
        {"id": "a", "label": 1, "per_step_accepted": [2, 0], "per_step_drafted": [2, 2]},
        {"id": "b", "label": 2, "per_step_accepted": [4, 3], "per_step_drafted": [4, 4]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    record = lab.load_acceptance(path)
    table = speedup_by(record, COSTS, "label")
    assert table["draft_length"].tolist() == [2, 4] and table["tau"].tolist() == [2.0, 4.5]
    # One request each, of which nothing can be drawn again.
    assert table["requests"].tolist() == [1, 1]
    spreads = [name for name in table if name.endswith(("_low", "_high"))]
    assert len(spreads) == 6 and table[spreads].isna().all(axis=None)
    sums = speedup_by(replace(record, unit="data set"), COSTS, "label")
    assert sums["requests"].tolist() == [0, 0] and sums["rounds"].tolist() == [2, 2]
    short = RoundCosts.of(3, plain_seconds=1, draft_seconds=0.4, verify_seconds=1)
    assert speedup_by(record, short, "label")["draft_length"].tolist() == [2, 3]


def test_what_a_record_does_not_say_is_no_row(tmp_path: Path):
    with pytest.raises(ValueError, match=r"lines have, \[\], got temperature"):
        speedup_by(served(tmp_path, 3, 0.5, 1), COSTS, "temperature")
    with pytest.raises(ValueError, match=r"lines have, \['label'\], got temperature"):
        speedup_by(served(tmp_path, 3, 0.5, 1, label="code"), COSTS, "temperature")
    record = served(tmp_path, 3, 0.5, 1, label="code")
    cut = replace(record, reached=np.full_like(record.reached, np.nan))
    with pytest.raises(ValueError, match="must say how often its slots were verified"):
        speedup_by(cut, COSTS, "label")
    bare = replace(record, reached=record.reached[:, :0], passed=record.passed[:, :0])
    with pytest.raises(ValueError, match="must have acceptance by slot, got sums alone"):
        speedup_by(bare, COSTS, "label")


def test_a_trace_is_a_record_too(tmp_path: Path):
    trace = load_traces().query("drafter == 'dspark-k7' and temperature == 0")
    save_trace(trace.drop(columns=["drafter", "temperature"]), tmp_path / "trace.parquet")
    record = lab.load_acceptance(tmp_path / "trace.parquet")
    rates = rate_table(trace_sums(trace).query("kind == 'empirical'")).set_index("slot")
    assert record.unit == "request" and len(record.lines) == trace["prompt"].nunique()
    np.testing.assert_allclose(record.survival, rates["survival"])
    np.testing.assert_allclose(record.conditional, rates["conditional"])
    assert record.rounds == len(trace[["prompt", "round"]].drop_duplicates())
    table = record.table()
    for name in ("low", "high", "survival_low", "survival_high"):
        np.testing.assert_allclose(table[name], rates[name])
    assert compare_acceptance(record, record)["paired"].all()
