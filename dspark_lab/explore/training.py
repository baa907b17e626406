"""Training: loss, accept rate and tau step by step, also while a run goes on."""

import math
import time
from base64 import b64encode
from typing import Any

import ipywidgets
import pandas as pd
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dspark_lab.checks import checked
from dspark_lab.explore.frame import Frame
from dspark_lab.explore.style import BLUE, INK, RED, WIDEST, add_title, new_figure

# A training curve is drawn again when it is so old, and then costs a run a tenth of its time.
_REDRAW_SECONDS, _TIMES_ITS_DRAWING = 0.5, 9


def plot_training(table: pd.DataFrame) -> Figure:
    """Loss, accept rate and tau of :meth:`dspark_lab.training.History.table` by step.

    Each value is a dot, their moving average a line.
    """
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
    return figure


@checked
class LiveCurve(ipywidgets.VBox):
    """A training run as it goes on: hand it to :func:`dspark_lab.train` as ``on_metrics``.

        curve = LiveCurve()
        display(curve)
        train(..., on_metrics=curve)

    The picture is redrawn at most twice a second, and costs a run at most a tenth of its time.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._due, self._png = -math.inf, b""
        self._line, self._picture = ipywidgets.HTML(), ipywidgets.HTML(layout={"width": "100%"})
        super().__init__([self._line, self._picture])

    def __call__(self, row: dict[str, Any]) -> None:
        """Takes a line of the run's metrics."""
        if "loss" not in row:
            return
        self._rows.append(row)
        if time.monotonic() > self._due:
            self.redraw()

    @property
    def table(self) -> pd.DataFrame:
        """One row for each step so far."""
        return pd.DataFrame(self._rows, columns=["step", "loss", "accept_rate", "tau"])

    def redraw(self) -> None:
        """Draw what there is now."""
        begin = time.monotonic()
        table = self.table
        frame = Frame({}, lambda: plot_training(table), alt="loss, accept rate and tau")
        self._png = frame.png
        drawn = time.monotonic()
        self._due = drawn + max(_REDRAW_SECONDS, _TIMES_ITS_DRAWING * (drawn - begin))
        self._picture.value = frame.as_html()
        if self._rows:
            words = "step {step}: loss {loss:.3f}, accept rate {accept_rate:.3f}, tau {tau:.2f}"
            self._line.value = words.format(**self._rows[-1])

    def __repr__(self) -> str:
        return "LiveCurve()"

    def _repr_mimebundle_(self, **options: object) -> dict[str, Any]:
        """The widget, and its picture, once there is one, for readers that run no widgets."""
        self.redraw()
        bundle = super()._repr_mimebundle_(**options) | {"text/plain": repr(self)}
        if self._rows:
            bundle["image/png"] = b64encode(self._png).decode("ascii")
        return bundle

    def _ipython_display_(self) -> None:
        """Show the widget; once its cell has run, the output also holds the last picture."""
        shown = display(self._repr_mimebundle_(), raw=True, display_id=True)
        shell = get_ipython()
        if shell is None or shown is None:
            return

        def keep(_: object) -> None:
            shell.events.unregister("post_run_cell", keep)
            shown.update(self._repr_mimebundle_(), raw=True)

        shell.events.register("post_run_cell", keep)
