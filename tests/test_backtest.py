"""Pilots replayed on recorded runs learn nothing from the runs that they are judged by."""

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from dspark_lab.tuning import (
    backtest,
    pilot_advice,
    progress_table,
    recorded_progress,
    run_table,
    slot_advice,
)
from dspark_lab.tuning.race import noise_plan
from tests.test_judging import ended
from tests.test_progress import SPANS, noise_of, step_table

SETTINGS = {("all", 20.0), ("all", 60.0), ("code", 20.0), ("code", 60.0)}


@pytest.fixture
def seen(monkeypatch: Any) -> list[dict[str, Any]]:
    """What each replay was given; its advice is the first option."""
    found: list[dict[str, Any]] = []

    def pairs(runs: pd.DataFrame) -> set[tuple[str, float]]:
        return set(zip(runs["mix"], runs["amount"], strict=True))

    def replay(runs: pd.DataFrame, progress: pd.DataFrame, amount: float, **given: Any) -> Any:
        found.append({"own": pairs(runs), "options": progress, "amount": amount, **given})
        best = progress.iloc[0].to_dict() | {"tau": 2.0, "low": 1.5, "high": 2.5}
        table = pd.DataFrame({"piloted": [0.1, 0.0, 0.05]})
        return SimpleNamespace(best=best, spent=3.0, sure=0.6, table=table)

    def fit(runs: pd.DataFrame, progress: pd.DataFrame, mix: str) -> Any:
        return pairs(runs), progress, mix

    monkeypatch.setattr(backtest, "fit_growth", fit)
    monkeypatch.setattr(backtest, "learn_curves", lambda runs, by_slot: pairs(runs))
    monkeypatch.setattr(backtest, "replay_pilot", replay)
    return found


def runs() -> pd.DataFrame:
    table = ended(lambda *_: 2.0, (20.0, 60.0))
    return pd.concat([table, table.assign(mix="code")], ignore_index=True)


def progress() -> pd.DataFrame:
    cells = runs()[["mix", "batch_size", "num_anchors", "block_size"]].drop_duplicates()
    return cells.assign(noise=1.0, seconds=cells["num_anchors"] / 100)


@pytest.mark.parametrize("left_out", ["mix", "amount"])
def test_what_is_left_out_is_known_to_nobody(left_out: str, seen: list[dict[str, Any]]):
    advice = pilot_advice(runs(), progress(), left_out=left_out, share=0.1)
    assert set(zip(advice["mix"], advice["amount"], strict=True)) == SETTINGS
    for one, given in zip(advice.to_dict("records"), seen, strict=True):
        place = 0 if left_out == "mix" else 1
        own = (one["mix"], one["amount"])
        known = {pair for pair in SETTINGS if pair[place] != own[place]}
        assert given["growth"][0] == given["reference"] == known
        assert given["growth"][2] == one["mix"]
        assert {mix for mix, _ in given["own"]} == {one["mix"]} == set(given["options"]["mix"])
        assert given["amount"] == one["amount"]
        assert given["share"] == 0.1 and set(given["options"]["mix"]) == {one["mix"]}
        assert (one["advisor"], one["spent"], one["tau"], one["pilots"]) == ("pilot", 3.0, 2.0, 2)


def test_a_budget_too_small_to_measure_the_noise_has_the_usual_one(seen: list[dict[str, Any]]):
    rich = pd.concat([runs(), runs().assign(amount=runs()["amount"] * 100)], ignore_index=True)
    pilot_advice(rich, progress())
    for given in seen:
        measured = given["options"]["noise"].unique().tolist() == [1.0]
        assert measured == (noise_plan(progress(), given["amount"]) is not None)
        assert measured == (given["amount"] >= 2000) and "measured" not in given
    assert {given["amount"] for given in seen} == {20.0, 60.0, 2000.0, 6000.0}


def test_of_a_budget_of_slots_the_options_are_the_cells_that_reach_it(
    seen: list[dict[str, Any]], monkeypatch: Any
):
    table = runs()
    # Of N 16 on code, runs end before the budget; the slots of all others are 400 a second.
    table.loc[(table["mix"] == "code") & (table["num_anchors"] == 16), "slots"] /= 10
    monkeypatch.setattr(backtest, "run_table", lambda _: table)
    advice = slot_advice(table, progress(), [15_000, 10**9])
    assert advice["mix"].tolist() == ["all", "code"] and advice["budget"].unique() == ["slots"]
    assert [len(given["options"]) for given in seen] == [4, 2]
    assert all(given["by"] == "slots" and len(given["growth"][1]) == 8 for given in seen)
    assert advice["spent"].tolist() == [0.0, 0.0] and run_table is not backtest.run_table


def test_there_must_be_other_runs_to_learn_from(seen: list[dict[str, Any]]):
    alone = runs().query("mix == 'all'")
    with pytest.raises(ValueError, match="runs must hold another mix than all, got none"):
        pilot_advice(alone, progress())
    slots = alone.assign(budget="slots")
    with pytest.raises(ValueError, match="runs must have budgets of seconds, got \\['slots'\\]"):
        pilot_advice(slots, progress())


def test_recorded_options_have_the_progress_of_their_mix_at_their_step_times():
    noise = {"all": noise_of(), "code": noise_of(block_sizes=(3, 7))}
    times = step_table((1, 2), (1, 4))
    longer = times.assign(seconds=2 * times["seconds"])
    runs = [times.assign(mix="code"), longer.assign(mix="all"), longer.assign(mix="all")]
    table = pd.concat(runs).rename(columns={"seconds": "step_seconds"})
    found = recorded_progress(table, dict.fromkeys(noise, SPANS), noise)
    sizes: dict[str, Any] = {"batch_sizes": (1, 2), "num_anchors": (1, 4), "block_sizes": (3,)}
    for mix, seconds in (("all", longer), ("code", times)):
        own = found[found["mix"] == mix].drop(columns="mix").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, progress_table(noise[mix], SPANS, seconds, **sizes))
    assert len(found) == 2 * len(times)
