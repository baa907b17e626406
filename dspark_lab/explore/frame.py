"""``Frame``: what an explorer shows of one setting, its tables and its picture."""

import gc
import io
import threading
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from dspark_lab.checks import checked
from dspark_lab.explore import style

# Drawing, and the pause of the garbage collector meanwhile, are one thread's at a time.
_drawing = threading.RLock()

Tables = Mapping[str, pd.DataFrame]


@checked
@dataclass(frozen=True)
class Frame:
    """What an explorer shows of one setting of its controls.

    ``tables`` and ``figure`` are made when they are first read. ``state`` is what the explorer's
    widget is given, ``html`` a short text under the picture, ``alt`` the picture in words.
    ``recommended`` are settings of the controls that the picture recommends.
    """

    tables: Tables | Callable[[], Tables]
    figure: Callable[[], Figure] | None = None
    alt: str = ""
    html: str = ""
    state: dict[str, Any] | None = None
    recommended: Mapping[str, Any] = field(default_factory=dict)
    # Whether it was cancelled before its end, so that one may want it again.
    incomplete: bool = False
    # What the explorer keeps of it beside.
    detail: Any = None

    _made: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def made_tables(self) -> dict[str, pd.DataFrame]:
        """The tables by name."""
        tables = self.tables
        return self._once("tables", lambda: dict(tables() if callable(tables) else tables))

    @property
    def png(self) -> bytes:
        """The picture as a PNG file; empty where there is none."""
        return self._once("png", lambda: style.png(self.figure()) if self.figure else b"")

    @property
    def svg(self) -> bytes:
        """The picture as an SVG file; empty where there is none."""

        def draw() -> bytes:
            buffer = io.BytesIO()
            if self.figure:
                self.figure().savefig(buffer, format="svg", metadata={"Date": None})
            return buffer.getvalue()

        return self._once("svg", draw)

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """Make it when it is first asked for, in whatever thread that is."""
        with drawing():
            if name not in self._made:
                self._made[name] = make()
            return self._made[name]

    def as_html(self) -> str:
        """All that is shown as HTML, a picture included."""
        if not self.png:
            return self.html
        # The size is told, so that nothing moves before the picture is there.
        width, height = (int.from_bytes(self.png[i : i + 4], "big") for i in (16, 20))
        source = f"data:image/png;base64,{b64encode(self.png).decode('ascii')}"
        size = f'width="{width}" height="{height}" style="max-width:100%;height:auto"'
        look = f'alt="{escape(self.alt)}" {size}'
        return f'<img {look} src="{source}">{self.html}'


@contextmanager
def drawing() -> Any:
    """For drawing: matplotlib has state of its own, and a garbage collection outlasts a picture."""
    with _drawing:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


def alert(problem: object) -> str:
    """A sentence in HTML that stands where something cannot be shown."""
    return f'<p role="alert">{escape(str(problem))}</p>'


def export_texts(
    program: str,
    recommended: Any,
    now: Any,
    write: Callable[[Any, str], str],
    label: str = "recommended",
) -> str:
    """In HTML, what to give a program: what is recommended, and the controls' settings."""
    parts = []
    for words, settings in ((label, recommended), ("your setting now", now)):
        if settings is None or (settings is now and now == recommended):
            continue
        if recommended == now:
            words += ", and your setting now"
        try:
            text = f"<pre>{escape(write(settings, program))}</pre>"
        except ValueError as problem:
            text = alert(problem)
        parts.append(f"<p><b>For {escape(program)}, {words}:</b></p>{text}")
    return "".join(parts)
