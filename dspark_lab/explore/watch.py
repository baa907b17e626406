"""Acceptance over depth, time and load, and a server's while it serves, from its metrics."""

from __future__ import annotations

import threading
import time
from typing import Any, cast

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dspark_lab.checks import Positive, checked, require_columns
from dspark_lab.explore.frame import Frame
from dspark_lab.explore.live import LivePicture
from dspark_lab.explore.style import BLUE, INK, RED, WIDEST, add_rules, add_title, new_figure
from dspark_lab.records import AcceptanceRecord, counted_since, load_acceptance

# How many looks are kept.
_MOST = 10_000


@checked
def plot_watch(table: pd.DataFrame) -> Figure:
    """Tau over time and the survival of the last look, of :attr:`AcceptanceWatch.table`."""
    require_columns("table", table, ["seconds", "tau", "survival"])
    figure, (left, right) = new_figure(WIDEST, 2.6, columns=2)
    left.plot(table["seconds"], table["tau"], ".-", color=RED, markersize=4)
    add_title(left, "tau (accepted length)")
    left.set_xlabel("seconds")
    left.set_ylabel("tokens a round")
    survival = table["survival"].iloc[-1] if len(table) else []
    right.plot(range(len(survival)), survival, "o-", color=BLUE, markersize=4)
    right.set_ylim(0, 1)
    add_title(right, "survival, at the last look")
    right.set_xlabel("slot")
    right.set_ylabel("share of rounds")
    right.set_xticks(range(len(survival)))
    return figure


@checked
def plot_stretches(
    table: pd.DataFrame, of: str = "position in the answer", *, ax: Axes | None = None
) -> Figure:
    """Tau in stretches, with 95 % intervals where there are any, and what it is at first.

    The table is from :func:`dspark_lab.rates.depth_table`, :func:`dspark_lab.rates.tau_by_stretch`
    or :func:`dspark_lab.records.acceptance_over`; ``of`` names what the stretches are of.
    """
    require_columns("table", table, ["begin", "end", "tau", "low", "high"])
    if ax is None:
        _, ax = new_figure(7, 2.8)
    middle = (table["begin"] + table["end"]) / 2
    ax.axhline(table["tau"].iloc[0], color=INK, linewidth=0.8, linestyle=":")
    ax.hlines(table["tau"], table["begin"], table["end"], color=RED, linewidth=2.5)
    ax.vlines(middle, table["low"], table["high"], color=RED, linewidth=1)
    ax.plot(middle, table["tau"], "o", color=RED, markersize=4)
    ax.set_xlabel(of)
    ax.set_ylabel("tau, tokens a round")
    ax.margins(y=0.15)
    add_rules(ax)
    return cast(Figure, ax.figure)


class AcceptanceWatch(LivePicture):
    """What a server accepts, look by look; see :func:`watch_acceptance`.

    ``table``: a line for each look that saw rounds: ``seconds`` since the first, ``rounds`` since
    the look before, their ``tau`` and their ``survival`` by slot, as a list.
    """

    def __init__(self, address: str, every: float) -> None:
        self._address, self._every = address, every
        self._rows: list[dict[str, Any]] = []
        self._last: AcceptanceRecord | None = None
        self._begin = time.monotonic()
        self._stopped = threading.Event()
        super().__init__()

    @property
    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self._rows, columns=["seconds", "rounds", "tau", "survival"])

    def look(self) -> None:
        """Ask the server once, and draw; an answer that fails is said in the line of words."""
        try:
            now = load_acceptance(self._address, timeout=max(self._every, 1.0))
        except (OSError, ValueError) as error:
            self._line.value = f"no answer: {error}"
        else:
            self._take(now)

    def _take(self, now: AcceptanceRecord) -> None:
        """Draw what was counted since the answer before."""
        seen = now if self._last is None else counted_since(self._last, now)
        first, self._last = self._last is None, now
        if first and now.kind != "SGLang metrics":
            self._line.value = f"{now.kind}: {now.rounds:,.0f} rounds before the first look"
        elif seen.rounds:
            survival = seen.survival.tolist()
            row = {"rounds": seen.rounds, "tau": seen.tau, "survival": survival}
            self._rows.append({"seconds": time.monotonic() - self._begin, **row})
            del self._rows[:-_MOST]
            self.redraw()

    def redraw(self) -> None:
        table = self.table
        self._show(Frame({}, lambda: plot_watch(table), alt="tau over time, survival by slot"))
        if len(table):
            last = table.iloc[-1]
            self._line.value = f"tau {last['tau']:.2f} over {last['rounds']:,.0f} rounds"

    def run(self) -> None:
        """Look until :meth:`stop`."""
        while not self._stopped.wait(self._every):
            self.look()

    def stop(self) -> None:
        self._stopped.set()

    def _empty(self) -> bool:
        return not self._rows

    def __repr__(self) -> str:
        return f"watch_acceptance({self._address!r})"


@checked
def watch_acceptance(
    address: str = "http://localhost:8000/metrics", *, every: Positive = 5.0
) -> AcceptanceWatch:
    """Poll a server's metrics and draw what it accepts between looks, until ``stop()``.

        watch = lab.watch_acceptance()
        watch

    Args:
        address: of the metrics of vLLM, llama.cpp or TensorRT-LLM, whose counters are told apart
            look by look, or of SGLang, of which each look is the server's own last interval.
        every: seconds between looks.

    Raises:
        OSError: there is no answer.
        ValueError: it has no counters of acceptance.
    """
    watch = AcceptanceWatch(address, every)
    watch._take(load_acceptance(address, timeout=max(every, 1.0)))
    threading.Thread(target=watch.run, daemon=True).start()
    return watch
