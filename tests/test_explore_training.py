"""The training curve, and its picture."""

from base64 import b64decode
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure

from dspark_lab.explore import plot_training, style, training
from dspark_lab.training import TrainConfig
from dspark_lab.tuning import forecast

pytestmark = pytest.mark.usefixtures("one_thread")


def step_row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 3.0 / step, "accept_rate": 0.1 * step, "tau": 1 + 0.1 * step}


def test_training_shows_every_step_and_can_be_empty() -> None:
    table = pd.DataFrame([step_row(step) for step in (1, 2, 3)])
    axes = plot_training(table).axes
    for ax, name in zip(axes, ("loss", "accept_rate", "tau"), strict=True):
        dots, course = ax.lines
        assert list(dots.get_ydata()) == list(table[name]) and list(dots.get_xdata()) == [1, 2, 3]
        assert len(course.get_ydata()) == 3
    assert all(len(ax.lines) == 0 for ax in plot_training(table.iloc[:0]).axes)


def test_a_forecast_is_a_dashed_line_to_the_end_of_the_run_in_its_interval() -> None:
    rows = [step_row(step) | {"lr": 1e-3} for step in range(1, 21)]
    table = pd.DataFrame(rows)
    found = forecast(table, config=TrainConfig(steps=80, warmup_steps=2))
    ax = plot_training(table, found).axes[2]
    line, band = ax.lines[-1], ax.collections[0].get_paths()[0].vertices
    assert line.get_linestyle() == "--" and line.get_xdata()[[0, -1]].tolist() == [20, 80]
    assert line.get_ydata()[-1] == found.tau
    ends = band[band[:, 0] == 80][:, 1]
    assert (ends.min(), ends.max()) == (found.low, found.high)
    assert ax.texts[0].get_text() == f"at the end {found.tau:.2f}\n(training)"


def test_live_curve_says_where_tau_will_be_once_the_warm_up_is_over() -> None:
    curve = training.LiveCurve(TrainConfig(steps=100, warmup_steps=6))
    for step in range(1, 31):
        curve(step_row(step) | {"lr": 1e-3})
        assert (curve.forecast is None) == (step <= 6)
    curve.redraw()
    found = curve.forecast
    assert found is not None and found.steps == 100 and found.kind == "train"
    end = f"at the end tau {found.tau:.2f} ({found.low:.2f} to {found.high:.2f})"
    assert curve._line.value.endswith(end)
    curve({"step": 30, "held_out_tau": 2.0, "accept_by_slot": [0.5]})
    curve.redraw()
    assert curve.forecast is not None and curve.forecast.kind == "held_out"
    assert "at the end held-out tau" in curve._line.value


def test_live_curve_keeps_every_step_and_redraws_at_most_twice_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, drawn = [0.0], []
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    curve = training.LiveCurve()
    redraw = curve.redraw
    monkeypatch.setattr(curve, "redraw", lambda: (drawn.append(now[0]), redraw()))
    for step in range(1, 11):
        curve(step_row(step))
        now[0] += 0.2
    curve({"step": 10, "held_out_tau": 2.0})
    assert curve.table["step"].tolist() == list(range(1, 11))
    assert len(drawn) == 4 and all(b - a > 0.5 for a, b in zip(drawn, drawn[1:], strict=False))


def test_live_curve_costs_a_run_at_most_a_tenth_of_its_time(monkeypatch: pytest.MonkeyPatch):
    """Each picture takes 2 seconds, each step 1."""
    now, drawn = [0.0], []
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])

    def slow_png(figure: Figure) -> bytes:
        drawn.append(now[0])
        now[0] += 2
        return png(figure)

    png = style.png
    monkeypatch.setattr(style, "png", slow_png)
    curve = training.LiveCurve()
    for step in range(1, 100):
        curve(step_row(step))
        now[0] += 1
    assert 2 * len(drawn) <= 0.1 * now[0] + 2 and len(drawn) >= 5


def test_live_curve_has_a_picture_once_there_are_steps() -> None:
    curve = training.LiveCurve()
    assert "image/png" not in curve._repr_mimebundle_()
    curve(step_row(2))
    bundle = curve._repr_mimebundle_()
    assert b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert "step 2: loss 1.500, accept rate 0.200, tau 1.20" in curve._line.value
