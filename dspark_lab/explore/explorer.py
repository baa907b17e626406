"""``Explorer``: controls, and a picture that follows them; and the controls themselves."""

import asyncio
import gc
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from types import SimpleNamespace
from typing import Annotated, Any

import ipywidgets
import pandas as pd
from ipywidgets import ValueWidget

from dspark_lab.checks import Within, checked, require
from dspark_lab.explore.style import require_one_of

# Changes that arrive within this time become one redraw, of the newest values only.
SETTLE_SECONDS = 0.01

_WIDE = {"style": {"description_width": "9em"}, "layout": {"width": "27em"}}


@checked
@dataclass(frozen=True)
class Frame:
    """A picture (a PNG file and its description), HTML or both, and the tables behind them.

    Without tables, ``problem`` says why this setting of the controls cannot be shown.
    """

    tables: dict[str, pd.DataFrame]
    html: str = ""
    png: bytes = b""
    alt: str = ""
    problem: str = ""

    def as_html(self) -> str:
        """All that is shown as HTML, a picture included."""
        if not self.png:
            return self.html
        source = f"data:image/png;base64,{b64encode(self.png).decode('ascii')}"
        picture = f'<img alt="{escape(self.alt)}" style="max-width:100%" src="{source}">'
        return picture + self.html


def alert(problem: object) -> str:
    """A sentence in HTML that stands where something cannot be shown."""
    return f'<p role="alert">{escape(str(problem))}</p>'


def marked_text(text: str, kinds: Iterable[str], facts: Iterable[str] = ()) -> str:
    """Text in HTML in the classes of its kinds; facts are shown when the pointer is over it."""
    classes = " ".join(f"dspark-{kind.replace(' ', '-')}" for kind in kinds)
    title = escape(" · ".join(facts))
    tip = f' title="{title}"' if title else ""
    return f'<span class="{classes}"{tip}>{escape(text)}</span>'


@checked
class Explorer(ipywidgets.VBox):
    """Controls above a picture, which is replaced in place when a control moves.

    While changes keep coming, as in a fast drag, only the newest values are drawn. ``draw`` makes a
    frame from the controls' values, attributes named by the controls' descriptions. Where it raises
    ValueError, the sentence is shown, and there is no table.
    """

    def __init__(
        self, name: str, controls: Sequence[ValueWidget], draw: Callable[[SimpleNamespace], Frame]
    ) -> None:
        self.name, self._draw = name, draw
        self.controls: dict[str, Any] = {control.description: control for control in controls}
        self._picture = ipywidgets.HTML(layout={"width": "100%"})
        self._stale, self._scheduled = True, False
        self._frame = Frame({})
        self.frames_drawn = 0
        for control in controls:
            control.observe(self._changed, names="value")
        super().__init__([control_box(controls), self._picture])
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
        """The first of :attr:`tables`; ValueError where the setting cannot be drawn."""
        tables = self.tables
        if not tables:
            raise ValueError(f"{self.name} has nothing to show: {self._frame.problem}")
        return next(iter(tables.values()))

    def redraw(self) -> None:
        """Draw the controls' present values now."""
        collects = gc.isenabled()
        # No garbage collection while drawing: a full one takes longer than the picture.
        gc.disable()
        try:
            self._frame = self._draw(SimpleNamespace(**self.settings))
        except (ValueError, TypeError) as problem:
            self._frame = Frame({}, html=alert(problem), problem=str(problem))
        finally:
            if collects:
                gc.enable()
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
        return call_text(self.name, self.settings)

    def _repr_mimebundle_(self, **options: object) -> dict[str, Any]:
        """The widget, and its present picture for readers that run no widgets."""
        if self._stale:
            self.redraw()
        bundle = super()._repr_mimebundle_(**options) | {"text/plain": repr(self)}
        if self._frame.png:
            return bundle | {"image/png": b64encode(self._frame.png).decode("ascii")}
        return bundle | {"text/html": self._frame.html}


def call_text(name: str, settings: dict[str, Any]) -> str:
    """A call as text, such as ``explore_anchors(seed=1)``."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"


def control_box(controls: Sequence[ipywidgets.Widget]) -> ipywidgets.Box:
    """Controls side by side, on as many lines as they need."""
    return ipywidgets.Box(list(controls), layout={"flex_flow": "row wrap"})


def checkbox(name: str, value: bool) -> ipywidgets.Checkbox:
    return ipywidgets.Checkbox(value, description=name, **_WIDE)


def slider(name: str, value: int, low: int, high: int, step: int = 1) -> ipywidgets.IntSlider:
    """A slider that reaches from ``low`` to ``high``, and further if it starts further out."""
    require(name, value, Annotated[int, Within(low)])
    return ipywidgets.IntSlider(value, low, max(high, value), step, description=name, **_WIDE)


def number_slider(
    name: str, value: float, low: float, high: float, **options: Any
) -> ipywidgets.FloatSlider:
    """A slider of numbers in steps of 0.05, which reaches further if it starts further out."""
    require(name, value, Annotated[float, Within(low)])
    return ipywidgets.FloatSlider(
        value, min=low, max=max(high, value), step=0.05, description=name, **_WIDE, **options
    )


def dropdown(name: str, value: Any, options: Sequence[Any]) -> ipywidgets.Dropdown:
    require_one_of(name, value, options)
    return ipywidgets.Dropdown(options=options, value=value, description=name, **_WIDE)


def selection_slider(name: str, value: Any, options: Sequence[Any]) -> ipywidgets.SelectionSlider:
    require_one_of(name, value, options)
    return ipywidgets.SelectionSlider(options=options, value=value, description=name, **_WIDE)
