"""What every explorer is made of: controls, and a show that follows them.

An explorer holds controls and shows what tables and pictures make of their values; it works nothing
out itself. ``explorer.table`` is the table behind the picture, ``explorer.tables`` has all. This
file knows widgets; it does not know what is shown.
"""

import asyncio
import gc
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import ipywidgets
import pandas as pd

from dspark_lab.checks import require_int

__all__ = ["WIDE", "Explorer", "Frame", "checkbox", "slider"]

# Changes that arrive within this time become one redraw, of the newest values only.
SETTLE_SECONDS = 0.01

WIDE = {"style": {"description_width": "9em"}, "layout": {"width": "27em"}}


@dataclass(frozen=True)
class Frame:
    """What an explorer shows for one setting of its controls, and the tables behind it.

    The show is a picture, a PNG file and what it is in words, or HTML, or both, the HTML below the
    picture; or, without tables, the problem with the setting.
    """

    tables: dict[str, pd.DataFrame]
    html: str = ""
    png: bytes = b""
    alt: str = ""
    problem: str = ""

    def as_html(self) -> str:
        """The show as HTML, a picture included."""
        if not self.png:
            return self.html
        source = f"data:image/png;base64,{b64encode(self.png).decode('ascii')}"
        picture = f'<img alt="{escape(self.alt)}" style="max-width:100%" src="{source}">'
        return picture + self.html


class Explorer(ipywidgets.VBox):
    """Controls above a picture. The picture is replaced in place when a control moves.

    While changes keep coming, as in a fast drag, only the newest values are drawn. A setting that
    cannot be drawn shows a sentence that says why, and leaves no table.

    Args:
        name: how the explorer is called in text.
        controls: widgets with a ``value``, by the name of the argument they feed.
        draw: makes a frame from the controls' values, or raises ValueError with a sentence.
    """

    def __init__(
        self,
        name: str,
        controls: dict[str, ipywidgets.ValueWidget],
        draw: Callable[..., Frame],
    ) -> None:
        self.name, self.controls, self._draw = name, controls, draw
        self._picture = ipywidgets.HTML(layout={"width": "100%"})
        self._stale, self._scheduled = True, False
        self._frame = Frame({})
        self.frames_drawn = 0
        for control in controls.values():
            control.observe(self._changed, names="value")
        box = ipywidgets.Box(list(controls.values()), layout={"flex_flow": "row wrap"})
        super().__init__([box, self._picture])
        self.redraw()

    @property
    def settings(self) -> dict[str, Any]:
        """The controls' values by name."""
        return {name: control.value for name, control in self.controls.items()}

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables behind the picture, by name; empty where the setting cannot be drawn."""
        if self._stale:
            self.redraw()
        return self._frame.tables

    @property
    def table(self) -> pd.DataFrame:
        """The first of :attr:`tables`.

        Raises:
            ValueError: the setting cannot be drawn.
        """
        tables = self.tables
        if not tables:
            raise ValueError(f"{self.name} has nothing to show: {self._frame.problem}")
        return next(iter(tables.values()))

    def redraw(self) -> None:
        """Draw the controls' present values now."""
        with _garbage_left():
            try:
                self._frame = self._draw(**self.settings)
            except (ValueError, TypeError) as problem:
                text = str(problem)
                self._frame = Frame({}, html=f'<p role="alert">{escape(text)}</p>', problem=text)
            self._stale = False
            self._picture.value = self._frame.as_html()
        self.frames_drawn += 1

    def _changed(self, _change: object) -> None:
        self._stale = True
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.redraw()
            return
        if not self._scheduled:
            self._scheduled = True
            loop.call_later(SETTLE_SECONDS, self._redraw_if_stale)

    def _redraw_if_stale(self) -> None:
        self._scheduled = False
        if self._stale:
            self.redraw()

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{self.name}({settings})"

    def _repr_mimebundle_(self, **options: object) -> dict[str, Any]:
        """The widget, and its present picture for readers that run no widgets."""
        if self._stale:
            self.redraw()
        bundle = super()._repr_mimebundle_(**options) | {"text/plain": repr(self)}
        if self._frame.png:
            return bundle | {"image/png": b64encode(self._frame.png).decode("ascii")}
        return bundle | {"text/html": self._frame.html}


@contextmanager
def _garbage_left() -> Iterator[None]:
    """A full collection of garbage takes longer than a picture: it has time after the picture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def checkbox(name: str, value: bool) -> ipywidgets.Checkbox:
    return ipywidgets.Checkbox(value, description=name, **WIDE)


def slider(name: str, value: int, low: int, high: int, step: int = 1) -> ipywidgets.IntSlider:
    """A slider that reaches from ``low`` to ``high``, and further if it starts further out."""
    require_int(name, value, low)
    high = max(high, value)
    return ipywidgets.IntSlider(value, low, high, step, description=name, **WIDE)
