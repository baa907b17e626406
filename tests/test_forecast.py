"""Learning curves and their extrapolation, forecasts of a run, and how they are judged."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dspark_lab as lab
from data.make.learned import learned
from dspark_lab.training import History, TrainConfig
from dspark_lab.tuning import (
    Reference,
    evaluation_steps,
    extrapolate,
    extrapolation,
    forecast_summary,
    judge_forecasts,
    learn_curves,
    learning_rates,
    shipped_growth,
    shipped_reference,
    window_ends,
)

CURVES = shipped_reference().tau
SCHEDULES = ("cosine", "linear", "constant")
# level, growth, annealing, offset of training
USUAL = (0.3, 0.95, 0.3, 1.0)


def curve(rates: np.ndarray, level: float, growth: float, annealing: float) -> list[float]:
    """y after each step, by the formula at the head of the module."""
    y, area, whole, peak = [], 0.0, sum(rates), max(rates)
    risen = False
    for rate in rates:
        area += rate
        risen = risen or rate == peak
        fallen = 1 - rate / peak if risen else 0.0
        y.append(level + growth * 2 * (math.sqrt(area / whole) - 1) + annealing * fallen)
    return y


def tau_of(y: Any, slots: int | None = None) -> Any:
    """Tau of blocks of which every slot is accepted with the log-odds y; None: of endless ones."""
    if slots is None:
        return 1 + np.exp(y)
    return sum((1 / (1 + np.exp(-y))) ** number for number in range(slots + 1))


def points_of(
    rates: np.ndarray,
    coefficients: Any = USUAL,
    noise: float = 0.0,
    seed: int = 0,
    slots: int | None = None,
) -> pd.DataFrame:
    """Evaluations and training windows of a run that goes by the formula, with noise on y."""
    *own, offset = coefficients
    y, rng, steps = curve(rates, *own), np.random.default_rng(seed), len(rates)
    lines, first = [], 0
    for step in evaluation_steps(steps, 12):
        lines.append((step, "held_out", y[step - 1]))
    for step in window_ends(steps):
        lines.append((step, "train", offset + float(np.mean(y[first:step]))))
        first = step
    table = pd.DataFrame(lines, columns=["step", "kind", "y"])
    table["y"] += noise * rng.standard_normal(len(table))
    return table.assign(tau=tau_of(table["y"], slots)).drop(columns="y")


def rates_of(steps: int = 400, schedule: Any = "cosine") -> np.ndarray:
    return learning_rates(TrainConfig(steps=steps, warmup_steps=steps // 20, schedule=schedule))


def usual_reference(noise: float = 0.05, longer: float = 0.0) -> Reference:
    """Curves that are around USUAL, the level higher by ``longer`` with each e-fold of length."""
    curves = replace(
        CURVES,
        mean=np.array([USUAL, (longer, 0, 0, 0)]),
        covariance=np.diag([1.0, 0.01, 0.01, 0.01]),
        noise=noise,
        lengths=(1.0, 1e6),
        scale=np.ones((2, len(extrapolation.SHARES))),
    )
    return Reference(curves, None, "a test")


def simulated_runs(amounts: Any = (20.0, 60.0), each: int = 12, seed: int = 0) -> pd.DataFrame:
    """Finished runs as a sweep has them, around USUAL, for every budget and two mixes."""
    rng, tables = np.random.default_rng(seed), []
    for amount in amounts:
        for mix in ("all", "code"):
            for number in range(each):
                steps = int(rng.integers(60, 90) * amount / 20)
                rates = rates_of(steps)
                own = np.array(USUAL) + np.array([0.3, 0.1, 0.05, 0.1]) * rng.standard_normal(4)
                seeded = int(rng.integers(2**31))
                table = points_of(rates, own, noise=0.03, seed=seeded, slots=7)
                held = table["kind"] == "held_out"
                accept = [[0.4, 0.2]] * len(table)
                table["accept"] = pd.Series(accept, dtype=object).where(held, None)
                table["domain"] = np.where(held, "all", None)
                table["lr"] = rates[table["step"] - 1]
                run = {"budget": "seconds", "amount": amount, "mix": mix, "batch_size": 2}
                run |= {"num_anchors": number, "block_size": 7, "seed": 0, "steps": steps}
                tables.append(table.assign(**run))
    return pd.concat(tables, ignore_index=True)


@pytest.fixture(scope="module")
def runs() -> pd.DataFrame:
    return simulated_runs()


# -- the model


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.9, 1])
def test_a_run_that_goes_by_the_formula_ends_as_forecast(schedule: str, share: float) -> None:
    rates = rates_of(400, schedule)
    points = points_of(rates)
    end = points[points["kind"] == "held_out"]["tau"].iloc[-1]
    seen = points[points["step"] <= share * 400]
    found = extrapolate(seen, rates, reference=usual_reference())
    assert found.tau == pytest.approx(end, rel=0.02)
    assert found.low < end < found.high and found.kind == "held_out"
    assert (found.step, found.steps) == (seen["step"].max(), 400)


def test_training_alone_says_where_its_own_tau_ends() -> None:
    rates = rates_of()
    points = points_of(rates)
    points = points[points["kind"] == "train"]
    found = extrapolate(points[points["step"] <= 100], rates, reference=usual_reference())
    assert found.kind == "train" and "training" in found.reason
    assert found.tau == pytest.approx(points["tau"].iloc[-1], rel=0.03)


def test_the_end_is_that_of_normal_variables_given_the_points(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against the covariances of all points and the end, pair by pair, with a level of any size."""
    monkeypatch.setattr(extrapolation, "_NOISES", (1.0,))
    monkeypatch.setattr(extrapolation, "_POWERS", ())
    rates, reference = rates_of(300), usual_reference(noise=0.1)
    seen = points_of(rates, (0.1, 0.7, 0.2, 1.2), noise=0.05)
    seen = seen[seen["step"] <= 90].sort_values("step", kind="stable")
    curves, area = reference.tau, rates.cumsum() / rates.sum()
    rows, xs, noise, y, first = [], [], [], [], 0
    for step, kind, tau in seen[["step", "kind", "tau"]].itertuples(index=False):
        steps = range(first, step) if kind == "train" else [step - 1]
        growth = sum(2 * (area[i] ** 0.5 - 1) for i in steps) / len(steps)
        highest = int(rates.argmax())
        fallen = sum(1 - rates[i] / max(rates) if i > highest else 0.0 for i in steps) / len(steps)
        rows.append((1.0, growth, fallen, float(kind == "train")))
        xs.append(2 * math.log(1 + growth / 2))
        own = 1 + 10 / step
        noise.append(0.1**2 * own * (4 * 300 / 40 / len(steps) if kind == "train" else 1))
        y.append(math.log(tau - 1))
        first = step if kind == "train" else first
    rows.append((1.0, 0.0, 1 - rates[-1] / max(rates), 0.0))
    xs.append(0.0)
    prior = curves.covariance + np.diag([1e6, 0, 0, 0])
    size = len(rows)
    joint = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            wander = 0.1**2 * 4 * math.exp(-abs(xs[i] - xs[j]) / 1.5)
            joint[i, j] = np.array(rows[i]) @ prior @ np.array(rows[j]) + wander
    known = joint[:-1, :-1] + np.diag(noise)
    weights = np.linalg.solve(known, joint[:-1, -1])
    means = np.array(rows) @ curves.mean[0]
    end = means[-1] + weights @ (np.array(y) - means[:-1])
    variance = joint[-1, -1] - weights @ joint[:-1, -1] + (0.02 / math.exp(end)) ** 2
    found = extrapolate(seen, rates, reference=reference)
    assert math.log(found.tau - 1) == pytest.approx(end, abs=1e-4)
    half = 1.6448536 * variance**0.5
    assert math.log(found.high - 1) == pytest.approx(end + half, abs=1e-4)
    assert math.log(found.low - 1) == pytest.approx(end - half, abs=1e-4)


@settings(max_examples=8, deadline=None)
@given(
    factor=st.floats(1e-6, 1e3),
    steps=st.integers(40, 500),
    schedule=st.sampled_from(SCHEDULES),
    share=st.floats(0.05, 1),
)
def test_the_unit_of_the_learning_rate_means_nothing_and_intervals_are_in_order(
    factor: float, steps: int, schedule: str, share: float
) -> None:
    rates = rates_of(steps, schedule)
    points = points_of(rates, noise=0.1, seed=steps)
    seen = points[points["step"] <= max(2, share * steps)]
    one, other = extrapolate(seen, rates), extrapolate(seen, factor * rates)
    assert other.tau == pytest.approx(one.tau, rel=1e-6)
    table = one.table
    assert (table["low"] <= table["tau"]).all() and (table["tau"] <= table["high"]).all()
    assert table["step"].iloc[-1] == steps and table["low"].min() >= 1
    assert not table["ahead"][table["step"] <= one.step].any()


def test_a_wider_level_has_a_wider_interval_and_more_of_the_run_a_narrower_one() -> None:
    rates = rates_of()
    points = points_of(rates, noise=0.1)
    widths = [
        (found.high - found.low) / (found.tau - 1)
        for share in (0.1, 0.4, 1)
        for found in [extrapolate(points[points["step"] <= share * 400], rates)]
    ]
    assert widths[0] > widths[1] > widths[2]
    half, most = (extrapolate(points, rates, level=level) for level in (0.5, 0.95))
    assert half.tau == most.tau and most.low < half.low and half.high < most.high


def test_a_level_curve_is_flat_and_one_that_grows_is_not() -> None:
    rates = rates_of(20_000)
    level = points_of(rates, (1.1, 0.0, 0.0, 0.3), noise=0.01)
    grows = points_of(rates, USUAL, noise=0.01)
    known = {"reference": usual_reference(longer=0.5)}
    flat, other = extrapolate(level, rates, **known), extrapolate(grows, rates, **known)
    # In y a tenth more steps bring 0.5 ln(1.1), if growth is the usual one.
    gain = tau_of(math.log(other.tau - 1) + 0.5 * math.log(1.1)) / other.tau - 1
    assert other.gain == pytest.approx(gain, rel=0.1)
    assert flat.flat and abs(flat.gain) < 0.01 and "has flattened" in flat.reason
    assert not other.flat and other.gain > 0.01 and "has not flattened" in other.reason
    noisy, unsure = points_of(rates, (1.1, 0.95, 0, 0.3), noise=0.3), other
    longer = 0.1
    for _ in range(2):
        unsure = extrapolate(noisy, rates, reference=usual_reference(longer=longer))
        longer *= 0.0097 / unsure.gain
    assert unsure.gain < 0.01 <= unsure.gain_high and not unsure.flat
    early = extrapolate(level[level["step"] <= 6000], rates)
    assert early.low < 1 + math.exp(1.1) < early.high


@pytest.mark.parametrize("told", ["block_size", "accept"])
def test_no_more_than_all_slots_are_accepted(told: str) -> None:
    rates, steep = rates_of(400), (2.5, 0.95, 0.3, 1.0)
    points = points_of(rates, steep, slots=4)
    held = points["kind"] == "held_out"
    given: dict[str, Any] = {"block_size": 4}
    if told == "accept":
        given = {"accept": pd.Series([[0.5] * 4] * len(points), dtype=object).where(held, None)}
    reference = replace(usual_reference(), accept=None)
    seen = points.assign(**given).query("step <= 100")
    found = extrapolate(seen, rates, reference=reference)
    assert 1 <= found.low < found.tau < found.high < 5
    assert found.table[["tau", "low", "high"]].max().max() < 5
    assert found.tau == pytest.approx(float(tau_of(2.8, 4)), rel=0.05)


def test_each_slot_ends_where_its_own_rates_lead() -> None:
    rates = rates_of(1000)
    held = points_of(rates)
    held = held[held["kind"] == "held_out"]
    y = np.log(held["tau"] - 1)
    held["accept"] = [[1 / (1 + math.exp(-v)), 1 / (1 + math.exp(1 - v))] for v in y]
    found = extrapolate(held, rates).by_slot
    assert found["slot"].tolist() == [0, 1]
    for line, actual in zip(found.itertuples(), held["accept"].iloc[-1], strict=True):
        assert line.low < line.accept < line.high
        assert line.accept == pytest.approx(actual, abs=0.03)
    assert extrapolate(held.drop(columns="accept"), rates).by_slot.empty


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"points": pd.DataFrame({"step": [1]})}, "points must have step and tau, got no tau"),
        ({"points": pd.DataFrame({"step": [401], "tau": [2.0]})}, "between 1 and 400"),
        ({"points": pd.DataFrame({"step": [1], "tau": [math.nan]})}, "got neither"),
        ({"learning_rates": np.array([0.0, 1.0])}, "the first above 0"),
        ({"learning_rates": np.array([])}, "must be finite"),
        ({"level": 1.0}, "level must be below 1"),
    ],
)
def test_what_cannot_be_extrapolated_is_refused(changed: dict[str, Any], error: str) -> None:
    rates = rates_of()
    given = {"points": points_of(rates), "learning_rates": rates} | changed
    with pytest.raises(ValueError, match=error):
        extrapolate(**given)


# -- learned from runs


def test_what_ships_is_what_the_shipped_runs_teach() -> None:
    growth, reference = learned()
    shipped = shipped_growth(), shipped_reference()
    pairs = [(growth, shipped[0]), (reference.tau, shipped[1].tau)]
    assert reference.source == shipped[1].source
    assert reference.accept is not None and shipped[1].accept is not None
    for one, other in [*pairs, (reference.accept, shipped[1].accept)]:
        for name, value in asdict(one).items():
            np.testing.assert_allclose(getattr(other, name), value, rtol=1e-3, atol=1e-5)


def test_what_is_learned_from_runs_is_what_they_were_made_of(runs: pd.DataFrame) -> None:
    """48 runs: the means' standard errors are below 0.03, so 0.1 is beyond three of them."""
    learned = learn_curves(runs)
    rates = rates_of(int(runs["steps"].iloc[0]))
    lines = runs[(runs["num_anchors"] == 0) & (runs["amount"] == 20) & (runs["mix"] == "all")]
    assert extrapolation.run_rates(lines) == pytest.approx(rates, rel=0.03)
    middle = np.log(np.exp(np.log([r for r in (40.0, 120.0)]).mean()))
    mean = np.array([1, middle]) @ learned.tau.mean
    assert mean[1:] == pytest.approx(USUAL[1:], abs=0.1)
    assert learned.tau.runs == 48 and learned.source == "48 runs"
    assert learned.accept is not None and learned.accept.runs == 96
    with pytest.raises(ValueError, match="at least 3 finished runs, got 1"):
        learn_curves(lines)


@pytest.mark.slow
def test_intervals_cover_as_often_as_they_say(runs: pd.DataFrame) -> None:
    """Of 120 new runs 90 % are covered: fewer than 96 or all of them in 1 of 1,000 seeds."""
    reference = learn_curves(runs, by_slot=False)
    fresh = simulated_runs(each=30, seed=1)
    hits = 0
    for _, lines in fresh.groupby(["amount", "mix", "num_anchors"]):
        rates = extrapolation.run_rates(lines)
        points = extrapolation.run_points(lines)
        seen = points[points["step"] <= len(rates) / 4]
        found = extrapolate(seen, rates, reference=reference)
        held = points[points["kind"] == "held_out"].sort_values("step")
        hits += found.low <= held["tau"].iloc[-1] <= found.high
    assert 96 <= hits < 120


def test_judging_never_looks_at_the_same_mix_nor_ahead(runs: pd.DataFrame) -> None:
    runs = runs[runs["num_anchors"] < 4]
    before = judge_forecasts(runs)
    shown = ["tau", "low", "high", "last", "power"]
    later = runs["step"] > 0.25 * runs["steps"]
    chosen = (runs["mix"] == "code") & (runs["num_anchors"] < 2) & later
    changed = runs.assign(tau=runs["tau"].where(~chosen, 1 + 2 * (runs["tau"] - 1)))
    after = judge_forecasts(changed)
    code = before["mix"] == "code"
    pd.testing.assert_frame_equal(before.loc[code, shown[:3]], after.loc[code, shown[:3]])
    assert (before.loc[~code, "tau"] != after.loc[~code, "tau"]).all()
    assert len(before) == 2 * 16 and set(before["kind"]) == {"held_out", "train"}
    held = before[before["kind"] == "held_out"]
    line = held.iloc[0]
    assert line["error"] == pytest.approx(line["tau"] / line["actual"] - 1)
    assert (before["covered"] == before["actual"].between(before["low"], before["high"])).all()
    assert held["error"].abs().median() < 0.5 * held["last"].abs().median()
    with pytest.raises(ValueError, match="two of amount or more, got .20.0."):
        judge_forecasts(runs[runs["amount"] == 20], by="amount")


def test_a_summary_counts_errors_and_covered_ends() -> None:
    """Three of four: scipy's exact interval, here from the beta distribution's quantiles."""
    from scipy.stats import beta

    judged = pd.DataFrame({"kind": ["held_out"] * 4, "error": [0.01, -0.02, 0.03, -0.1]})
    judged = judged.assign(tau=2.0, low=1.8, high=2.4, covered=[True, True, True, False])
    judged = judged.assign(last=[0.1, -0.3, 0.2, 0.4], power=0.5)
    line = forecast_summary(judged).iloc[0]
    assert line["runs"] == 4 and line["error"] == pytest.approx(0.025)
    assert (line["worst"], line["covered"]) == (0.1, 0.75)
    assert line["bias"] == pytest.approx(-0.005) and line["width"] == pytest.approx(0.3)
    assert line["last"] == pytest.approx(0.25) and line["power"] == 0.5
    assert line["low"] == pytest.approx(beta.ppf(0.025, 3, 2))
    assert line["high"] == pytest.approx(beta.ppf(0.975, 4, 1))


# -- a run's own metrics


CONFIG = TrainConfig(steps=200, warmup_steps=10, learning_rate=2e-3, batch_size=2, num_anchors=6)


def rows_of(steps: int, config: TrainConfig = CONFIG) -> list[dict[str, Any]]:
    y, rows = curve(learning_rates(config), *USUAL[:3]), []
    for step in range(1, steps + 1):
        tau = 1 + math.exp(y[step - 1])
        rows.append({"step": step, "loss": 1.0, "accept_rate": 0.5, "tau": 1.3 * tau})
        rows[-1]["lr"] = config.learning_rate_at(step - 1)
        if step % 20 == 0:
            rows.append({"step": step, "held_out_tau": tau, "low": 1.0, "high": 3.0})
            rows[-1]["accept_by_slot"] = [0.5, 0.4]
    return rows


def write_run(out: Path, rows: list[dict[str, Any]]) -> None:
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_read_from_its_folder_its_file_its_history_or_a_table(tmp_path: Path) -> None:
    rows = rows_of(100)
    write_run(tmp_path, rows)
    (tmp_path / "run.json").write_text(json.dumps(asdict(CONFIG)))
    found = [lab.forecast(tmp_path), lab.forecast(str(tmp_path / "metrics.jsonl"))]
    found.append(lab.forecast(History(tmp_path, rows)))
    found.append(lab.forecast(pd.DataFrame(rows), config=CONFIG))
    # From the learning rates so far and the number of steps, where the schedule is the usual one.
    found.append(lab.forecast(pd.DataFrame(rows), steps=200))
    for other in found:
        pd.testing.assert_frame_equal(other.table, found[0].table)
        assert other.kind == "held_out" and other.step == 100 and len(other.by_slot) == 2
    assert repr(found[0]) == found[0].reason


def test_a_run_without_configuration_asks_for_its_steps(tmp_path: Path) -> None:
    write_run(tmp_path, rows_of(50))
    with pytest.raises(ValueError, match=r"say how many steps the run has \(steps=\)"):
        lab.forecast(tmp_path)
    with pytest.raises(ValueError, match="steps must be at least those of the metrics, 50, got 20"):
        lab.forecast(tmp_path, steps=20)
    with pytest.raises(ValueError, match="must hold the tau and lr of one training step"):
        lab.forecast(pd.DataFrame({"step": []}), steps=20)
    assert lab.forecast(tmp_path, steps=300).steps == 300
    # What was trained with another schedule stays as it was.
    longer = learning_rates(replace(CONFIG, steps=300, warmup_steps=100))
    longer[:50] = learning_rates(CONFIG)[:50]
    rows = pd.DataFrame(rows_of(50))
    found = lab.forecast(rows, config=replace(CONFIG, steps=300, warmup_steps=100))
    means = lab.tuning.forecasts._points(rows_of(50), [r for r in rows_of(50) if "loss" in r])
    pd.testing.assert_frame_equal(found.table, extrapolate(means, longer).table)


def test_a_checkpoint_says_the_configuration_where_nothing_else_does(tmp_path: Path) -> None:
    write_run(tmp_path, rows_of(50))
    folder = tmp_path / "checkpoint-000050"
    folder.mkdir()
    state = {"step": 50, "config": asdict(CONFIG)}
    (folder / "state.json").write_text(json.dumps(state))
    assert lab.forecast(tmp_path).steps == 200


def test_training_windows_are_means_since_the_window_before() -> None:
    rows = [row for row in rows_of(7) if "loss" in row]
    table = lab.tuning.forecasts._points(rows, rows)
    first = 0
    for step, tau in table[["step", "tau"]].itertuples(index=False):
        part = [row["tau"] for row in rows[first:step]]
        assert tau == pytest.approx(sum(part) / len(part))
        first = step
    assert first == 7 and (table["kind"] == "train").all()


def test_another_choice_is_worth_as_many_more_steps_as_it_teaches_faster() -> None:
    rows = rows_of(100)
    progress = pd.DataFrame(
        {"batch_size": [2, 2, 2], "num_anchors": [6, 24, 96], "block_size": [7, 7, 7]}
    ).assign(rate=[1.0, 1.5, 0.5], low=[0.9, 1.2, 0.4], high=[1.1, 1.8, 0.6])
    alone = lab.forecast(pd.DataFrame(rows), config=CONFIG)
    found = lab.forecast(pd.DataFrame(rows), config=CONFIG, progress=progress)
    assert alone.options is None and found.options is not None
    options = found.options.set_index("num_anchors")
    assert options["speed"].tolist() == [1, 1.5, 0.5]
    assert options["tau"][6] == pytest.approx(alone.tau)
    assert options["tau"][96] < alone.tau < options["tau"][24]
    assert (options["low"] <= options["tau"]).all() and (options["tau"] <= options["high"]).all()
    assert "24 anchors and 2 rows instead of 6 and 2 would teach 1.50 times" in found.reason
    slow = lab.forecast(pd.DataFrame(rows), config=CONFIG, progress=progress.iloc[[0, 2]])
    assert slow.reason.endswith("No other choice of rows and anchors would teach faster from here.")
    with pytest.raises(ValueError, match="one line of 2 rows and 6 anchors, got .7. and 0 lines"):
        lab.forecast(pd.DataFrame(rows), config=CONFIG, progress=progress.iloc[1:])
    with pytest.raises(ValueError, match="give its config"):
        lab.forecast(pd.DataFrame(rows), steps=200, progress=progress)
