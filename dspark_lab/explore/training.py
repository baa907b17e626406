"""Training: loss, accept rate and tau step by step, also while a run goes on."""

import math
import time
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dspark_lab.checks import checked, require_columns
from dspark_lab.explore.frame import Frame
from dspark_lab.explore.live import LivePicture
from dspark_lab.explore.style import (
    BLUE,
    INK,
    RED,
    WIDEST,
    add_band,
    add_title,
    new_figure,
)
from dspark_lab.training import TrainConfig
from dspark_lab.tuning import Forecast, forecast

# A training curve is drawn again when it is so old, and then costs a run a tenth of its time.
_REDRAW_SECONDS, _TIMES_ITS_DRAWING = 0.5, 9


@checked
def plot_training(table: pd.DataFrame, forecast: Forecast | None = None) -> Figure:
    """Loss, accept rate and tau of :meth:`dspark_lab.training.History.table` by step.

    Each value is a dot, their moving average a line. A forecast (:func:`dspark_lab.forecast`) is a
    dashed line of tau to the end of the run, in its interval.
    """
    if len(table):
        require_columns("table", table, ["step", "loss", "accept_rate", "tau"])
    figure, axes = new_figure(WIDEST, 2.6, columns=3)
    smooth = table.ewm(span=max(2, len(table) // 12)).mean() if len(table) else table
    titles = {"loss": "loss", "accept_rate": "accept rate", "tau": "tau (accepted length)"}
    for ax, (name, title), colour in zip(axes, titles.items(), (INK, BLUE, RED), strict=True):
        if len(table):
            ax.plot(table["step"], table[name], ".", color=colour, alpha=0.35, markersize=4)
            ax.plot(table["step"], smooth[name], color=colour)
        add_title(ax, title)
        ax.set_xlabel("step")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if forecast is not None:
        _add_forecast(axes[2], forecast)
    return figure


def _add_forecast(ax: Axes, forecast: Forecast) -> None:
    """The forecast curve from the last step on; of held-out tau also so far, which has no dots."""
    ahead = forecast.table["step"] >= forecast.step
    curve, so_far = forecast.table[ahead], forecast.table[~ahead]
    kind, colour = ("held out", BLUE) if forecast.kind == "held_out" else ("training", RED)
    if forecast.kind == "held_out":
        ax.plot(so_far["step"], so_far["tau"], color=colour)
    ax.plot(curve["step"], curve["tau"], "--", color=colour)
    add_band(ax, curve["step"], curve["low"], curve["high"], colour)
    add_title(ax, f"tau; at the end {forecast.tau:.2f} ({kind})")


@checked
class LiveCurve(LivePicture):
    """A training run as it goes on: hand it to :func:`dspark_lab.train` as ``on_metrics``.

        curve = LiveCurve()
        display(curve)
        train(..., on_metrics=curve)

    The picture is redrawn at most twice a second, and costs a run at most a tenth of its time.
    ``config``: the run's; it also shows where tau will be at the end, once 5 % of the steps and the
    warm-up are over.
    """

    def __init__(self, config: TrainConfig | None = None) -> None:
        self._rows: list[dict[str, Any]] = []
        self._evaluations: list[dict[str, Any]] = []
        self._config = config
        self._due = -math.inf
        super().__init__()

    def __call__(self, row: dict[str, Any]) -> None:
        """Takes a line of the run's metrics."""
        if "loss" not in row:
            self._evaluations.append(row)
            return
        self._rows.append(row)
        if time.monotonic() > self._due:
            self.redraw()

    @property
    def table(self) -> pd.DataFrame:
        """One row for each step so far."""
        return pd.DataFrame(self._rows, columns=["step", "loss", "accept_rate", "tau"])

    @property
    def forecast(self) -> Forecast | None:
        """Where tau will be at the end; None as long as there is too little to say so."""
        config, done = self._config, len(self._rows)
        if config is None or done <= config.warmup_steps or done < 0.05 * config.steps:
            return None
        return forecast(pd.DataFrame(self._rows + self._evaluations), config=config)

    def redraw(self) -> None:
        begin = time.monotonic()
        table, found = self.table, self.forecast
        self._show(Frame({}, lambda: plot_training(table, found), alt="loss, accept rate and tau"))
        drawn = time.monotonic()
        self._due = drawn + max(_REDRAW_SECONDS, _TIMES_ITS_DRAWING * (drawn - begin))
        if self._rows:
            words = "step {step}: loss {loss:.3f}, accept rate {accept_rate:.3f}, tau {tau:.2f}"
            self._line.value = words.format(**self._rows[-1])
            if found is not None:
                end = f"{found.tau:.2f} ({found.low:.2f} to {found.high:.2f})"
                word = "held-out tau" if found.kind == "held_out" else "tau"
                self._line.value += f"; at the end {word} {end}"

    def __repr__(self) -> str:
        return "LiveCurve()"

    def _empty(self) -> bool:
        return not self._rows
