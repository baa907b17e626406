"""`dspark_lab.explore.serving`: what the explorer of serving shows, and from what it is made.

Traces are made up or decoded by a tiny random pair, engines are made of plain numbers. Tables must
be what the library's functions say with the same settings; nothing depends on how long it takes.
"""

import asyncio
import io
import json
import re
from collections.abc import Iterator
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_decode_widgets import TEXTS, answers, drafter, target
from test_widgets import WIDGET, picture

from dspark_lab.decoding import save_trace
from dspark_lab.explore import Explorer, explore_serving
from dspark_lab.explore import serving as serving_module
from dspark_lab.pairs import load_traces
from dspark_lab.rates import SequentialTemperatures
from dspark_lab.serving import (
    Engine,
    FixedLength,
    PrefixScheduler,
    StaticThreshold,
    StepsPerSecond,
    acceptance_profile,
    advice,
    load_engine,
    load_table,
    speedup_table,
    temperature_table,
    threshold_table,
)
from dspark_lab.tuning import SERVERS, ServingSettings, export

pytestmark = pytest.mark.usefixtures("one_thread", "few_concurrencies")

SLOTS = 3
LEVELS = (1, 8, 64)


@pytest.fixture(scope="module")
def few_concurrencies() -> Iterator[None]:
    """The load is simulated for three of the seven, which takes half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving_module, "CONCURRENCY", LEVELS)
        yield


def made_trace(seed: int, rate: float, prompts: int = 6, rounds: int = 8) -> pd.DataFrame:
    """Whole blocks of which each slot is accepted at about this rate; confidences say so."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for prompt in range(prompts):
        for number in range(rounds):
            alive = True
            for slot in range(SLOTS):
                own = float(np.clip(rate + rng.normal(0, 0.1), 0.05, 0.95))
                alive = alive and bool(rng.random() < own)
                rows.append(
                    {"prompt": prompt, "domain": "none", "round": number, "slot": slot}
                    | {"position": 10 * number + slot, "token": 1, "draft_prob": 0.5}
                    | {"target_prob": 0.5, "accept_prob": own, "accept_rate": own}
                    | {"confidence": own, "verified": True, "accepted": alive, "resampled": pd.NA}
                )
    return pd.DataFrame(rows)


COLD, HOT = made_trace(0, 0.8), made_trace(1, 0.4)
TRACE = pd.concat([COLD.assign(temperature=0.0), HOT.assign(temperature=1.0)], ignore_index=True)
STEPS = StepsPerSecond(np.array([1, 16, 64]), np.array([100.0, 80.0, 20.0]), 128, "imaginary")
ENGINE = Engine(
    STEPS,
    requests=np.array([1, 16]),
    draft=np.array([[0.001, 0.0015, 0.002], [0.004, 0.005, 0.006]]),
    rest=np.full(2, 0.001),
    plain_rest=np.full(2, 0.0005),
)
OPTIONS: dict[str, Any] = {"trace": TRACE, "engine": ENGINE, "requests_simulated": 4}


def explore(**options: Any) -> Explorer:
    return explore_serving(**(OPTIONS | options))


@pytest.fixture(scope="module")
def explored(few_concurrencies: None) -> Explorer:
    """An explorer whose controls every test sets."""
    return explore()


def put(explorer: Explorer, **settings: Any) -> None:
    """Moves controls in a running loop, where quick moves are one redraw."""

    async def move() -> None:
        for name, value in settings.items():
            explorer.controls[name].value = value
        await asyncio.sleep(0.02)

    asyncio.run(move())


SETTINGS: list[dict[str, Any]] = [
    {"draft_length": 3, "temperature": 1.0, "requests": 1, "threshold": 0.3, "replay": False},
    {"draft_length": 2, "temperature": 0.0, "requests": 8, "threshold": 0.5, "replay": True},
    {"draft_length": 1, "temperature": 1.0, "requests": 64, "threshold": 0.0, "replay": False},
]
settings = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"K {s['draft_length']}")


def part(temperature: float) -> pd.DataFrame:
    return {0.0: COLD, 1.0: HOT}[temperature]


def loads(
    own: pd.DataFrame, draft_length: int, threshold: float | None, requests: int = 4, seed: int = 0
) -> pd.DataFrame:
    """Plain decoding, the length, and where there is a confidence head, both others."""
    policies = [(FixedLength(0), 1), (FixedLength(draft_length), draft_length)]
    if threshold is not None:
        policies += [(StaticThreshold(threshold), SLOTS), (PrefixScheduler(), SLOTS)]
    tables = [
        load_table(
            own, ENGINE, [policy], LEVELS, draft_length=drafted, requests=requests, seed=seed
        )
        for policy, drafted in policies
    ]
    return pd.concat(tables, ignore_index=True)


@settings
def test_the_tables_are_what_the_library_says_of_the_chosen_settings(explored, settings):
    put(explored, **settings)
    k, temperature = settings["draft_length"], settings["temperature"]
    own, costs = part(temperature), ENGINE.costs(settings["requests"], replay=settings["replay"])
    profile = acceptance_profile(own)
    wanted = {
        "speedup": speedup_table(profile, costs),
        "load": loads(own, k, settings["threshold"]),
        "temperatures": temperature_table(TRACE, costs),
        "thresholds": threshold_table(own, costs, draft_lengths=[k]),
        "profile": profile.table(),
        "steps": STEPS.table,
    }
    assert list(explored.tables) == [*wanted, "settings"]
    for name, table in wanted.items():
        pd.testing.assert_frame_equal(explored.tables[name], table, obj=name)
    pd.testing.assert_frame_equal(explored.table, wanted["speedup"])
    chosen = {"draft_length": k, "threshold": settings["threshold"], "drafter": "DRAFTER"}
    assert explored.tables["settings"].to_dict("records") == [chosen]


def said(explorer: Explorer) -> list[str]:
    """The sentences and the export below the picture."""
    shown = picture(explorer).value
    assert shown.startswith("<img alt=")
    found = re.findall(r"<(?:p|pre)(?: [^>]*)?>(.*?)</(?:p|pre)>", shown, flags=re.DOTALL)
    return [unescape(text) for text in found]


@settings
def test_below_the_picture_stands_what_to_choose(explored, settings):
    put(explored, **settings, export="json")
    own, costs = (
        part(settings["temperature"]),
        ENGINE.costs(settings["requests"], replay=settings["replay"]),
    )
    profile = acceptance_profile(own, temperature=settings["temperature"])
    first, second, third, exported = said(explored)
    assert first == advice(profile, costs)
    thresholds = explored.tables["thresholds"]
    best = thresholds.loc[thresholds["speedup"].idxmax()]
    assert f"best static threshold is {best['threshold']:g}: {best['speedup']:.2f} " in second
    here = explored.tables["load"]
    here = here[here["concurrency"] == settings["requests"]]
    in_order = sorted(zip(here["policy"].map(third.index), here["throughput"], strict=True))
    falling = [throughput for _, throughput in in_order]
    assert len(falling) == 4 and falling == sorted(falling, reverse=True)
    for row in here.itertuples():
        words = f"{row.policy} {row.throughput:.0f} tokens/s, {row.per_user:.0f} for each user"
        assert words in third
    chosen = ServingSettings(settings["draft_length"], settings["threshold"])
    assert exported == export(chosen, "json")


def test_the_advice_follows_temperature_and_load(explored):
    heard = set()
    for temperature in (0.0, 1.0):
        for requests in (1, 64):
            put(explored, temperature=temperature, requests=requests, replay=False)
            heard.add(said(explored)[0])
    assert len(heard) == 4
    put(explored, temperature=0.0, requests=1)
    assert said(explored)[0].startswith("Draft 3 a round")
    put(explored, temperature=1.0, requests=64)
    assert said(explored)[0].startswith("Do not draft")


def test_every_move_but_the_exports_draws_another_picture(explored):
    put(explored, **SETTINGS[0], export="json")
    seen = {explored._frame.png}
    for name, value in SETTINGS[1].items():
        put(explored, **{name: value})
        assert explored._frame.png not in seen, name
        seen.add(explored._frame.png)
    put(explored, export="dspark-lab")
    assert explored._frame.png in seen


def test_the_picture_is_the_composite_of_what_the_tables_hold(monkeypatch):
    drawn = []
    original = serving_module.plot_serving

    def watched(speedups: Any, load: Any, **options: Any) -> Any:
        drawn.append((speedups, load, options))
        return original(speedups, load, **options)

    monkeypatch.setattr(serving_module, "plot_serving", watched)
    explorer = explore(draft_length=2, temperature=0.0, requests=8, replay=True)
    [(speedups, load, options)] = drawn
    assert list(speedups) == ["T 0", "T 1"]
    for temperature, table in zip((0.0, 1.0), speedups.values(), strict=True):
        profile = acceptance_profile(part(temperature))
        wanted = speedup_table(profile, ENGINE.costs(8, replay=True))
        pd.testing.assert_frame_equal(table, wanted)
    pd.testing.assert_frame_equal(load, explorer.tables["load"])
    assert options == {"bold": "T 0", "draft_length": 2, "requests": 8, "replay": True}
    image = Image.open(io.BytesIO(explorer._frame.png))
    assert image.size == (950, 560)


def test_what_was_worked_out_once_is_not_worked_out_again(monkeypatch):
    calls: list[str] = []

    def counting(name: str) -> None:
        original = getattr(serving_module, name)

        def counted(*given: Any, **options: Any) -> Any:
            calls.append(name)
            return original(*given, **options)

        monkeypatch.setattr(serving_module, name, counted)

    for name in ("acceptance_profile", "answers_of", "load_table", "plot_serving"):
        counting(name)
    explorer = explore()
    # Of each temperature once; plain decoding, three lengths, one threshold and the scheduler.
    assert calls.count("acceptance_profile") == calls.count("answers_of") == 2
    assert calls.count("load_table") == 2 * 6 and calls.count("plot_serving") == 1
    calls.clear()
    put(explorer, draft_length=1, temperature=0.0, requests=8, replay=True, export="json")
    assert calls == ["plot_serving"]
    calls.clear()
    put(explorer, threshold=0.45)
    assert sorted(calls) == ["load_table", "plot_serving"]
    calls.clear()
    put(explorer, threshold=0.3)
    put(explorer, threshold=0.45)
    assert calls == []


@pytest.mark.parametrize("kind", ["json", *SERVERS])
def test_the_chosen_values_are_exported_for_each_server_as_text(explored, kind):
    put(explored, **SETTINGS[0] | {"threshold": 0.0}, export=kind)
    assert said(explored)[-1] == export(ServingSettings(3), kind)
    assert "<pre>" in picture(explored).value
    block = picture(explored).value.split("<pre>")[1]
    assert '"' not in block and "'" not in block, "escaped"


def test_a_server_without_thresholds_has_a_sentence_below_the_picture(explored):
    put(explored, **SETTINGS[0], export="vllm")
    assert "vllm has no threshold on the confidence of a slot" in said(explored)[-1]
    assert 'role="alert"' in picture(explored).value and explored.tables
    put(explored, threshold=0.0)
    assert said(explored)[-1].startswith("--speculative-config")


def test_a_drafter_without_a_confidence_head_has_neither_threshold_nor_scheduler():
    bare = TRACE.assign(confidence=np.nan)
    explorer = explore(trace=bare, export="vllm")
    assert "thresholds" not in explorer.tables
    pd.testing.assert_frame_equal(explorer.tables["load"], loads(HOT, SLOTS, None))
    assert "no confidence head: no threshold and no scheduler" in said(explorer)[1]
    assert explorer.controls["threshold"].disabled
    assert said(explorer)[-1] == export(ServingSettings(SLOTS), "vllm")
    assert explorer.tables["settings"]["threshold"].tolist() == [0.0]


def test_an_engine_of_shorter_blocks_limits_the_length_and_leaves_whole_blocks_out():
    short = Engine.of(STEPS, 2, draft_seconds=0.002)
    explorer = explore(engine=short)
    assert explorer.controls["draft_length"].max == explorer.settings["draft_length"] == 2
    assert "Blocks have 3 slots and the engine knows 2" in said(explorer)[1]
    assert set(explorer.tables["load"]["policy"]) == {"plain decoding", "fixed 2"}
    long = Engine.of(STEPS, 9, draft_seconds=0.002)
    assert explore(engine=long).controls["draft_length"].max == SLOTS


def test_controls_start_where_they_are_told_and_reach_what_the_trace_has():
    explorer = explore(draft_length=2, temperature=0.0, requests=8, threshold=0.65, export="json")
    assert explorer.settings == {
        "draft_length": 2,
        "temperature": 0.0,
        "requests": 8,
        "threshold": 0.65,
        "replay": False,
        "export": "json",
    }
    assert explorer.controls["temperature"].options == (0.0, 1.0)
    assert explorer.controls["requests"].options == LEVELS
    assert explorer.controls["export"].options == ("json", *SERVERS)
    assert (explorer.controls["threshold"].min, explorer.controls["threshold"].max) == (0, 1)
    assert explorer.controls["draft_length"].min == 1
    for name, control in explorer.controls.items():
        assert control.description == name


def test_by_default_the_longest_draft_and_the_highest_temperature_are_shown():
    explorer = explore()
    assert explorer.settings == SETTINGS[0] | {"export": "dspark-lab"}
    assert not explorer.controls["threshold"].disabled
    cold = explore(trace=TRACE[TRACE["temperature"] == 0.0])
    assert cold.controls["temperature"].options == (0.0,)
    assert cold.settings["temperature"] == 0.0


def test_trace_and_engine_may_be_files(tmp_path, explored):
    save_trace(TRACE, tmp_path / "trace.parquet")
    ENGINE.save(tmp_path / "engine.csv")
    put(explored, **SETTINGS[0])
    for kind in (Path, str):
        explorer = explore(
            trace=kind(tmp_path / "trace.parquet"), engine=kind(tmp_path / "engine.csv")
        )
        for name in ("speedup", "load", "thresholds"):
            pd.testing.assert_frame_equal(explorer.tables[name], explored.tables[name])


def test_a_trace_of_one_temperature_needs_to_be_told_which():
    explorer = explore(trace=HOT, temperature=0.7)
    assert explorer.controls["temperature"].options == (0.7,)
    pd.testing.assert_frame_equal(
        explorer.table, speedup_table(acceptance_profile(HOT), ENGINE.costs())
    )
    with pytest.raises(ValueError, match="trace must have a column temperature, or temperature"):
        explore(trace=HOT)


def test_of_several_drafters_one_is_named():
    both = pd.concat(
        [TRACE.assign(drafter="one"), HOT.assign(drafter="two", temperature=1.0)],
        ignore_index=True,
    )
    two = explore(trace=both, drafter="two")
    assert two.controls["temperature"].options == (1.0,)
    assert two.tables["settings"]["drafter"].tolist() == ["two"]
    one = explore(trace=both, drafter="runs/one")
    assert one.controls["temperature"].options == (0.0, 1.0)
    assert one.tables["settings"]["drafter"].tolist() == ["runs/one"]
    alone = explore(trace=both[both["drafter"] == "one"])
    pd.testing.assert_frame_equal(alone.table, one.table)
    for given, shown in ((None, "DRAFTER"), ("three", "three")):
        with pytest.raises(ValueError, match=rf"name of one of \['one', 'two'\], got '{shown}'"):
            explore(trace=both, drafter=given)
    with pytest.raises(ValueError, match=r"name of one of \['one'\], got 'two'"):
        explore(trace=TRACE.assign(drafter="one"), drafter="two")


def test_confidences_are_scaled_for_the_threshold_and_the_load(explored):
    calibrated = SequentialTemperatures((0.25,) * SLOTS)
    put(explored, **SETTINGS[0])
    scaled, raw = explore(calibrated=calibrated), explored
    wanted = threshold_table(HOT, ENGINE.costs(), draft_lengths=[SLOTS], calibrated=calibrated)
    pd.testing.assert_frame_equal(scaled.tables["thresholds"], wanted)
    assert not scaled.tables["thresholds"].equals(raw.tables["thresholds"])
    verified = [e.tables["load"].set_index("policy")["verified_per_request"] for e in (scaled, raw)]
    assert not verified[0]["threshold 0.3"].equals(verified[1]["threshold 0.3"])
    assert verified[0]["fixed 3"].equals(verified[1]["fixed 3"])


def test_the_simulated_requests_are_as_many_as_told_and_of_the_seed():
    explorer = explore(requests_simulated=7, seed=5)
    wanted = loads(HOT, SLOTS, 0.3, requests=7, seed=5)
    pd.testing.assert_frame_equal(explorer.tables["load"], wanted)


@cache
def decoded() -> Explorer:
    return explore_serving(
        target(),
        drafter(),
        TEXTS,
        engine=Engine.of(STEPS, 2, draft_seconds=0.002),
        temperatures=(0.5, 1.5),
        max_new_tokens=12,
        requests_simulated=2,
        seed=3,
    )


def test_a_target_and_a_drafter_are_decoded_at_each_temperature():
    assert decoded().controls["temperature"].options == (0.5, 1.5)
    for temperature in (0.5, 1.5):
        decoded().controls["temperature"].value = temperature
        run = answers(drafter(), TEXTS, temperature=temperature, max_new_tokens=12, seed=3)
        profile = acceptance_profile(run.trace).table()
        pd.testing.assert_frame_equal(decoded().tables["profile"], profile)


def test_an_engine_that_is_not_given_is_measured_on_these_models(monkeypatch):
    asked = []

    def measured(*models: Any, seed: int) -> Engine:
        asked.append((*models, seed))
        return ENGINE

    monkeypatch.setattr(serving_module, "measure_engine", measured)
    monkeypatch.setattr(serving_module, "decode", None)
    explorer = explore_serving(
        target(), {"mine": drafter()}, TEXTS, trace=TRACE, requests_simulated=2, seed=4
    )
    assert asked == [(target(), drafter(), 4)]
    pd.testing.assert_frame_equal(explorer.tables["steps"], STEPS.table)
    assert explorer.tables["settings"]["drafter"].tolist() == ["mine"]


def test_with_trace_and_engine_no_model_is_loaded(monkeypatch):
    for name in ("load_models", "load_pair", "load_traces", "load_engine", "decode"):
        monkeypatch.setattr(serving_module, name, None)
    explorer = explore_serving("no/such-target", "no/such-drafter", **OPTIONS)
    assert explorer.tables["settings"]["drafter"].tolist() == ["no/such-drafter"]


@pytest.fixture(scope="module")
def shipped(few_concurrencies: None) -> Explorer:
    return explore_serving(requests_simulated=2)


def test_without_arguments_the_pocket_pair_is_shown(shipped):
    traces = load_traces("pocket")
    own = traces[(traces["drafter"] == "dspark-k7") & (traces["temperature"] == 1.0)]
    costs = load_engine().costs()
    pd.testing.assert_frame_equal(shipped.table, speedup_table(acceptance_profile(own), costs))
    assert shipped.settings["draft_length"] == shipped.controls["draft_length"].max == 7
    assert shipped.tables["settings"]["drafter"].tolist() == ["dspark-k7"]
    pd.testing.assert_frame_equal(shipped.tables["steps"], load_engine().sps.table)


def test_wins_at_temperature_0_that_replay_and_temperature_1_take_away_are_visible():
    both = {"trace": load_traces("smollm2"), "engine": load_engine("smollm2")}
    explorer = explore_serving(requests=1, temperature=1.0, **both)
    table = explorer.tables["temperatures"].set_index("temperature")
    assert table["speedup"][0.0] > 1 > table["speedup"][1.0]
    assert "Do not draft" in said(explorer)[0]
    put(explorer, temperature=0.0, replay=True)
    table = explorer.tables["temperatures"].set_index("temperature")
    assert table["without_replay"][0.0] > 1 > table["speedup"][0.0]
    assert "only a model that forgets the cost of rejections" in said(explorer)[0]


def test_prompts_alone_are_put_to_the_pocket_pair():
    explorer = explore_serving(
        prompts=["Hello", "What is 2 + 3?"],
        temperatures=(1.0,),
        max_new_tokens=6,
        requests_simulated=2,
    )
    assert explorer.tables["settings"]["drafter"].tolist() == ["dspark-k7"]
    assert explorer.controls["temperature"].options == (1.0,)
    pd.testing.assert_frame_equal(explorer.tables["steps"], load_engine().sps.table)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"export": "sglang"}, ValueError, r"export must be one of \('json', .*, got 'sglang'"),
        ({"requests": 3}, ValueError, r"requests must be one of \(1, 8, 64\), got 3"),
        ({"threshold": 1.5}, ValueError, r"threshold must be in \[0, 1\], got 1.5"),
        ({"threshold": "low"}, TypeError, "threshold must be a number, got 'low'"),
        ({"temperature": 0.3}, ValueError, r"one of the trace's \[0.0, 1.0\], got 0.3"),
        ({"draft_length": 0}, ValueError, "draft_length must be >= 1, got 0"),
        ({"draft_length": 4}, ValueError, "draft_length must be at most 3, got 4"),
        ({"trace": 3}, TypeError, "trace must be a pandas DataFrame or a file, got int"),
        ({"engine": 3}, TypeError, "engine must be an Engine or a file, got int"),
        ({"engine": None}, ValueError, "engine must be given with a trace, or a target"),
        ({"requests_simulated": 0}, ValueError, "requests must be >= 1, got 0"),
        ({"trace": "no-such.parquet"}, OSError, "no-such"),
        ({"engine": "no-such.csv"}, OSError, "no-such"),
        (
            {"trace": None, "target": target(), "drafter": drafter(), "prompts": TEXTS}
            | {"temperatures": ()},
            ValueError,
            "temperatures must hold at least one temperature, got none",
        ),
        (
            {"trace": None, "target": target(), "prompts": TEXTS}
            | {"drafter": {"a": drafter(), "b": drafter(2)}},
            ValueError,
            r"drafter must be one, got \['a', 'b'\]",
        ),
        (
            {"trace": None, "target": target()},
            ValueError,
            "target and drafter must be given together",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_explored_is_refused_in_one_sentence(arguments, error, match):
    with pytest.raises(error, match=match):
        explore(**arguments)


def test_a_trace_that_a_threshold_cut_is_refused():
    cut = TRACE.assign(verified=TRACE["verified"] & (TRACE["slot"] < 2))
    cut["accepted"] &= cut["verified"]
    with pytest.raises(ValueError, match="trace must be of whole blocks"):
        explore(trace=cut.assign(accepted=False))


def test_the_explorer_is_named_by_its_call_and_has_a_picture_without_widgets(explored):
    put(explored, **SETTINGS[0], export="json")
    assert repr(explored) == (
        "explore_serving(draft_length=3, temperature=1.0, requests=1, threshold=0.3, "
        "replay=False, export='json')"
    )
    bundle = explored._repr_mimebundle_()
    assert {WIDGET, "text/plain", "image/png"} <= set(bundle)
    json.dumps(bundle["text/plain"])
