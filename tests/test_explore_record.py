"""The explorer of a server's record shows what the library says of it."""

from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dspark_lab import explore, explore_record, load_acceptance
from dspark_lab.explore import plot_causes, plot_options, plot_record
from dspark_lab.pairs import load_traces
from dspark_lab.rates import depth_table
from dspark_lab.records import (
    acceptance_over,
    decide_serving,
    diagnose,
    read_engine,
    record_of_trace,
    save_step_costs,
    trained_record,
)
from dspark_lab.serving import Engine, StepsPerSecond, load_engine
from tests.served import drawn

RATES = [0.8, 0.8, 0.7, 0.7, 0.6, 0.6, 0.5]


@pytest.fixture(scope="module")
def trace() -> pd.DataFrame:
    found = load_traces()
    return found[(found["drafter"] == "dspark-k7") & (found["temperature"] == 0)]


def said(explorer: Any) -> list[str]:
    return [unescape(part) for part in explorer.frame.html[3:-4].split("</p><p>")]


def lengths(count: int = 300) -> dict[str, Any]:
    return {"seconds": np.arange(float(count)), "output_tokens": np.arange(count) % 40 + 2}


@pytest.mark.parametrize("requests", [1, 16])
def test_tables_and_sentences_are_what_the_library_says(trace: pd.DataFrame, requests: int) -> None:
    served = drawn(RATES, seed=1, temperature=0.0, **lengths())
    explorer = explore_record(served, trace, requests=requests, over="seconds")
    found = diagnose(served, trace)
    costs = load_engine().costs(requests)
    decision = decide_serving(served, costs, diagnosis=found)
    pd.testing.assert_frame_equal(explorer.table, decision.options)
    for name, table in {
        "options": decision.options,
        "causes": found.table,
        "figures": found.figures,
        "over": acceptance_over(served, "seconds"),
    }.items():
        pd.testing.assert_frame_equal(explorer.tables[name], table)
    own = trained_record(trace)
    for i, one in enumerate((served, own)):
        for shown, table in (("rates", one.table()), ("tau", one.tau_table())):
            both = dict(list(explorer.tables[shown].groupby("record", sort=False)))
            part = both[("server", "trained")[i]].drop(columns="record")
            pd.testing.assert_frame_equal(part.reset_index(drop=True), table)
    lines = said(explorer)
    assert lines[0] == decision.reason and served.reason in lines
    assert any("engine=" in line for line in lines)
    missing = () if decision.action == "something is wrong" else found.unknown
    assert [line for line in lines if line in found.unknown] == list(missing)


def test_a_trace_alone_has_no_causes_and_its_own_positions(trace: pd.DataFrame) -> None:
    explorer = explore_record(trace)
    assert {"causes", "figures"} & set(explorer.tables) == set()
    assert explorer.settings["over"] == "position"
    pd.testing.assert_frame_equal(explorer.tables["over"], depth_table(trace))
    assert set(explorer.tables["rates"]["record"]) == {"server"}
    costs = load_engine().costs(1)
    assert said(explorer)[0] == decide_serving(trace, costs).reason


def test_each_temperature_is_shown_apart_beside_what_was_trained_at_it() -> None:
    whole = load_traces()
    explorer = explore_record(whole, whole, drafter="dspark-k7", temperature=1.0)
    assert explorer.settings["temperature"] == 1.0
    for temperature in (1.0, 0.0):
        explorer.choose(temperature=temperature)
        part = whole[(whole["drafter"] == "dspark-k7") & (whole["temperature"] == temperature)]
        tau = explorer.tables["tau"].set_index("record")["tau"]
        assert tau["server"] == pytest.approx(record_of_trace(part).tau)
        assert tau["trained"] == pytest.approx(tau["server"])
        # A trace beside itself: no figure differs but those of slots behind an answer's end.
        assert explorer.tables["causes"]["cause"][0] == "nothing wrong"


def test_a_record_without_a_temperature_can_be_told_one() -> None:
    served, whole = drawn(RATES, seed=1), load_traces()
    with pytest.raises(ValueError, match="one temperature"):
        explore_record(served, whole, drafter="dspark-k7")
    for temperature in (0.0, 1.0):
        told = explore_record(served, whole, drafter="dspark-k7", temperature=temperature)
        part = whole[(whole["drafter"] == "dspark-k7") & (whole["temperature"] == temperature)]
        tau = told.tables["tau"].set_index("record")["tau"]
        assert tau["trained"] == pytest.approx(record_of_trace(part).tau)
        assert "temperature" not in told.controls
    with pytest.raises(ValueError, match=r"temperature must be that of the record, \[0.0\], got 1"):
        diagnose(drawn(RATES, seed=1, temperature=0.0), whole, drafter="dspark-k7", temperature=1.0)


def test_a_record_that_says_little_is_shown_as_far_as_it_goes() -> None:
    served = drawn(RATES, 1)
    explorer = explore_record(served)
    assert set(explorer.controls) == {"requests"} and "over" not in explorer.tables
    totals = replace(served, reached=np.zeros((1, 0)), passed=np.zeros((1, 0)))
    explorer = explore_record(totals, drawn(RATES, 9))
    assert explorer.tables["tau"]["record"].tolist() == ["server", "trained"]
    assert explorer.table.empty and len(explorer.frame.png) > 1000
    assert said(explorer)[0].startswith("Cannot be told")


def test_a_column_that_is_one_value_is_no_drift() -> None:
    served = drawn(RATES, 9, seconds=4.0, prompt_tokens=np.arange(9), running=[None, *range(8)])
    assert explore_record(served).controls["over"].options == ("prompt_tokens", "output_tokens")


def test_record_trace_and_engine_may_be_files(trace: pd.DataFrame, tmp_path: Path) -> None:
    trace.to_parquet(tmp_path / "trace.parquet")
    sps = StepsPerSecond.of(
        pd.DataFrame({"tokens": [1, 64], "steps_per_second": [90.0, 80.0]}).assign(
            context_length=0, device="card", target="t"
        )
    )
    engine = Engine.of(sps, 7, draft_seconds=0.002)
    engine.save(tmp_path / "engine.csv")
    paths = {"trained": tmp_path / "trace.parquet", "engine": str(tmp_path / "engine.csv")}
    explorer = explore_record(tmp_path / "trace.parquet", **paths)
    served = load_acceptance(tmp_path / "trace.parquet")
    expected = decide_serving(
        served, engine.costs(1), diagnosis=diagnose(served, tmp_path / "trace.parquet")
    )
    pd.testing.assert_frame_equal(explorer.table, expected.options)
    assert not any("engine=" in line for line in said(explorer))


def test_a_step_cost_table_is_an_engine_that_knows_no_plain_steps(tmp_path: Path) -> None:
    path = tmp_path / "sps.json"
    save_step_costs(load_engine(), path)
    explorer = explore_record(drawn(RATES), engine=path)
    expected = decide_serving(drawn(RATES), read_engine(path, block_size=7).costs(1))
    pd.testing.assert_frame_equal(explorer.table, expected.options)
    assert any("whether to draft" in line for line in said(explorer))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"over": "colour"}, "over must be one of"),
        ({"temperature": 0.7}, "temperature must be one of"),
        ({"requests": 3}, "requests must be one of"),
        ({"engine": "not/there.csv"}, "not/there|there.csv"),
        ({"drafter": "mine"}, "drafter"),
    ],
)
def test_what_cannot_be_shown_is_refused(options: dict[str, Any], match: str) -> None:
    served = drawn(RATES, 9, temperature=0.0, **lengths(9))
    with pytest.raises((ValueError, OSError), match=match):
        explore_record(served, load_traces(), **({"drafter": "dspark-k7"} | options))


OPTIONS = pd.DataFrame(
    {
        "option": ["draft 7", "draft 4", "plain decoding"],
        "gain_percent": [0.0, 10.0, -20.0],
        "gain_low": [0.0, 5.0, -30.0],
        "gain_high": [0.0, 15.0, -10.0],
        "faster": [False, True, False],
    }
)


def marks(figure: Any) -> dict[str, list[float]]:
    """The gains of full and of open marks."""
    found: dict[str, list[float]] = {"full": [], "open": []}
    for line in figure.axes[0].lines:
        if line.get_marker() == "o":
            kind = "open" if line.get_markerfacecolor() == "none" else "full"
            found[kind] += list(map(float, line.get_xdata()))
    return found


def test_options_that_are_surely_faster_have_full_marks_and_the_served_is_named() -> None:
    figure = plot_options(OPTIONS)
    assert marks(figure) == {"full": [10.0], "open": [0.0, -20.0]}
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["draft 7, served", "draft 4", "plain decoding"]


def test_the_five_likeliest_causes_are_drawn_with_their_shares() -> None:
    causes = pd.DataFrame({"cause": list("abcdefg"), "share": [0.5, 0.3, 0.1, 0.05, 0.03, 0.01, 0]})
    figure = plot_causes(causes)
    assert [bar.get_width() for bar in figure.axes[0].patches] == causes["share"].tolist()[:5]
    assert [text.get_text() for text in figure.axes[0].texts] == ["50%", "30%", "10%", "5%", "3%"]


def test_what_is_not_known_is_said_in_the_picture() -> None:
    empty = pd.DataFrame(columns=["record", "slot"])
    figure = plot_record(empty, OPTIONS.head(0))
    words = " ".join(text.get_text() for ax in figure.axes for text in ax.texts)
    for part in ("totals alone", "no option", "differs by line", "trained="):
        assert part in words
    assert explore.plot_record is plot_record
