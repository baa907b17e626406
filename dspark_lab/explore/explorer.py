"""``Explorer``: controls, and a picture and tables that follow them."""

import os
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import ipywidgets
import pandas as pd

from dspark_lab.checks import checked
from dspark_lab.explore import style
from dspark_lab.explore.calls import call_text, view_code, written_arguments
from dspark_lab.explore.controls import Control, Panel, plain_widget
from dspark_lab.explore.frame import Frame, alert, drawing
from dspark_lab.explore.widget import HAS_ANYWIDGET, WidgetView, page
from dspark_lab.explore.work import Cancelled, Progress, Worker, count_text
from dspark_lab.files import written_whole

WIDGET = "application/vnd.jupyter.widget-view+json"
# A progress bar moves at most so often.
_REPORT_SECONDS = 0.1


@checked
class Explorer(ipywidgets.VBox):
    """Controls above a picture that follows them.

    Args:
        name: the call that made it.
        controls: the controls. A slow explorer's may be made by its work: a function of its
            :class:`~dspark_lab.explore.work.Progress`.
        draw: makes a frame from the controls' values, attributes named by their descriptions. Where
            it raises ValueError, its sentence stands beside the last picture, and there is no
            table. A slow explorer's is also given its progress.
        view: the widget that shows a frame's ``state``; a picture is shown without one.
        slow: whether it works behind a progress bar.
        reasons: of the values, which controls have no effect, by name, and why.
        given: the call's arguments, for :attr:`code`.
    """

    def __init__(
        self,
        name: str,
        controls: Sequence[Control] | Callable[[Progress], Sequence[Control]],
        draw: Callable[..., Frame],
        *,
        view: type[WidgetView] | None = None,
        slow: bool = False,
        reasons: Callable[[SimpleNamespace], Mapping[str, str]] | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self._draw, self._reasons = name, draw, reasons
        self._given = dict(given or {})
        self._make_controls = controls if callable(controls) else None
        self._controls: dict[str, Control] = {}
        self._starts: dict[str, Any] = {}
        self._frame, self._problem = Frame({}), ""
        # What has been drawn last without a problem.
        self._last: Frame | None = None
        self._turn, self._held, self._stale, self._quiet = 0, False, False, False
        self._lock = threading.RLock()
        self.frames_drawn = 0
        self._worker = Worker(self._report)
        self._reported = 0.0, ""
        self._panel = Panel(self._act) if HAS_ANYWIDGET else None
        self._plain_controls = ipywidgets.Box(layout={"flex_flow": "row wrap"})
        self._status = ipywidgets.HTML()
        self.view = view() if view is not None and HAS_ANYWIDGET else None
        self._picture = ipywidgets.HTML(layout={"width": "100%"})
        above = [self._plain_controls, self._status] if self._panel is None else [self._panel]
        super().__init__([*above, *([self.view] if self.view else []), self._picture])
        if not callable(controls):
            self._install(controls)
        self._slow = slow
        self._text = (
            call_text(name, written_arguments(name, self._given)) if self._make_controls else ""
        )
        self.redraw()

    @property
    def controls(self) -> dict[str, Any]:
        """The controls by name."""
        if not self._controls:
            self._worker.wait()
            if not self._controls:
                raise ValueError(f"{self.name} has no controls: {self._problem}")
        return self._controls

    @property
    def settings(self) -> dict[str, Any]:
        """The controls' values by name."""
        return {name: control.value for name, control in self.controls.items()}

    @property
    def frame(self) -> Frame:
        """What is shown; empty where the setting cannot be drawn."""
        self._worker.wait()
        return Frame({}) if self._problem else self._frame

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables behind the picture, by name; empty where the setting cannot be drawn."""
        return self.frame.made_tables

    @property
    def table(self) -> pd.DataFrame:
        """The first of :attr:`tables`; ValueError where the setting cannot be drawn."""
        tables = self.tables
        if not tables:
            raise ValueError(f"{self.name} has nothing to show: {self._problem}")
        return next(iter(tables.values()))

    @property
    def selection(self) -> Any:
        """What is selected in the widget; None where there is nothing."""
        return None if self.view is None else self.view.selection

    def choose(self, **settings: Any) -> None:
        """Set several controls at once, and draw once."""
        unknown = sorted(set(settings) - set(self.controls))
        if unknown:
            raise ValueError(f"settings must be some of {list(self.controls)}, got {unknown}")
        with self._one_refresh():
            self._held, self._stale = True, False
            try:
                for name, value in settings.items():
                    self.controls[name].value = value
            finally:
                self._held = False
            if self._stale:
                self.redraw()

    def reset(self) -> None:
        """Set all controls back to where they started."""
        self.choose(**self._starts)

    def redraw(self) -> None:
        """Draw the controls' present values now; a slow explorer begins to."""
        if self._slow:
            self._problem = ""
            self._worker.start(self._work)
            self._refresh()
            return
        with self._one_refresh():
            chosen = SimpleNamespace(**self.settings)
            self._explain(chosen)
            try:
                with drawing():
                    frame = self._draw(chosen)
                    self._show(frame)
            except (ValueError, TypeError) as problem:
                self._fail(str(problem))

    def cancel(self) -> None:
        """Give up what is being worked on; the last picture stays."""
        self._worker.cancel()

    @property
    def code(self) -> str:
        """The present view as the call that makes it, and as settings that no argument names."""
        return view_code(self.name, self._given, self.controls, self._starts)

    def save_picture(self, path: str | os.PathLike[str]) -> None:
        """Write the picture to a file, ``.png`` or ``.svg``."""
        target = _path(path, ".png", ".svg")
        self._worker.wait()
        content = self._frame.svg if target.suffix == ".svg" else self._frame.png
        if self._problem or not content:
            raise ValueError(f"{self.name} has no picture: {self._problem or 'none is drawn'}")
        _write(target, content)

    def save_table(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Write the table of this name, or the first, to a file, ``.csv``."""
        target, table = _path(path, ".csv"), self.table
        if name is not None:
            style.require_one_of("name", name, self.tables)
            table = self.tables[name]
        _write(target, _csv(table))

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write the view to a page, ``.html``, that works without a kernel or a network."""
        target = _path(path, ".html")
        self._worker.wait()
        if self._problem:
            raise ValueError(f"{self.name} has nothing to show: {self._problem}")
        _write(target, self._page().encode())

    def _install(self, controls: Sequence[Control]) -> None:
        """Take controls, and follow them."""
        self._starts = {control.description: control.value for control in controls}
        for control in controls:
            control.observe(self._changed, names="value")
            control.observe(self._refresh, names=["reason", "min", "max", "options"])
        if self._panel is None:
            self._plain_controls.children = [plain_widget(control) for control in controls]
        self._controls = {control.description: control for control in controls}

    def _explain(self, chosen: SimpleNamespace) -> None:
        """Say of controls why they have no effect."""
        if self._reasons is not None:
            found = self._reasons(chosen)
            for name, control in self._controls.items():
                control.reason = found.get(name, "")

    def _changed(self, _change: object) -> None:
        if self._held:
            self._stale = True
        else:
            self.redraw()

    def _edit(self, turn: int, values: Mapping[str, Any]) -> None:
        """Take the values that the user set in the panel."""
        # Waiting for controls here would hold what the work needs to make them.
        if not self._controls:
            return
        with self._one_refresh():
            self._turn = turn
            known = {name: raw for name, raw in values.items() if name in self._controls}
            self.choose(**{name: self._controls[name].read(raw) for name, raw in known.items()})

    def _work(self, progress: Progress) -> None:
        """Draw on the worker's thread."""
        try:
            if not self._controls and self._make_controls is not None:
                progress(0, 0, "it begins")
                controls = self._make_controls(progress)
                with self._lock:
                    self._install(controls)
            with self._lock:
                chosen = SimpleNamespace(**self.settings)
                self._explain(chosen)
            frame = self._draw(chosen, progress)
            if self.view is None:
                progress(0, 0, "drawing")
                _ = frame.png
            if not self._worker.newest(progress):
                raise Cancelled
            # What a cancelled work leaves is shown, where it leaves something.
            with self._lock:
                self._show(frame)
        except Cancelled:
            self._end(progress, _CANCELLED)
        except (ValueError, TypeError, OSError) as problem:
            self._end(progress, str(problem))
        except BaseException as problem:
            self._end(progress, f"{type(problem).__name__}: {problem}")
            raise
        else:
            self._end(progress, "")

    def _end(self, progress: Progress, problem: str) -> None:
        """The end of a work; of one that a newer has replaced nothing is said."""
        with self._lock:
            if self._worker.newest(progress):
                self._fail(problem)
                self._say({})

    def _show(self, frame: Frame) -> None:
        self.frames_drawn += 1
        if self.view is not None and frame.state is not None:
            with self.view.hold_sync():
                self.view.state = frame.state | {"frame": self.frames_drawn}
            shown = frame.html
        else:
            shown = frame.as_html()
        self._frame, self._last, self._problem = frame, frame, ""
        self._picture.value = shown
        self._refresh()

    def _fail(self, problem: str) -> None:
        # One sentence, where some programs' errors are many lines.
        self._problem = " ".join(problem.split())
        self._refresh()

    def _report(self, done: float, total: float, words: str) -> None:
        now, (before, said) = time.monotonic(), self._reported
        if words != said or now - before > _REPORT_SECONDS:
            self._reported = now, words
            counts = count_text(done, total)
            self._say({"done": done, "total": total, "words": words, "counts": counts})

    def _say(self, progress: dict[str, Any]) -> None:
        if self._panel is not None:
            self._panel.progress = progress
        else:
            said = " ".join(progress[name] for name in ("words", "counts") if progress.get(name))
            self._status.value = escape(said) or self._problem_html()

    def _problem_html(self) -> str:
        return alert(self._problem) if self._problem else ""

    @contextmanager
    def _one_refresh(self) -> Any:
        """Alone, with one refresh of the panel at the end of it all."""
        with self._lock:
            outermost, self._quiet = not self._quiet, True
            try:
                yield
            finally:
                if outermost:
                    self._quiet = False
                    self._refresh()

    def _refresh(self, _change: object = None) -> None:
        """Bring the panel up to date."""
        if self._quiet:
            return
        if self._panel is None:
            self._status.value = self._problem_html()
            return
        controls, frame = self._controls, self._frame

        def coded(settings: Mapping[str, Any]) -> dict[str, Any]:
            return {name: controls[name].coded(value) for name, value in settings.items()}

        self._panel.state = {
            "controls": [control.state() for control in controls.values()],
            "starts": coded(self._starts),
            "recommended": coded(frame.recommended),
            "turn": self._turn,
            "code": self.code if controls else "",
            "problem": self._problem,
            "kept": bool(self._problem) and self._last is not None,
            "again": self._problem == _CANCELLED or frame.incomplete,
            "picture": frame.figure is not None,
        }

    def _act(self, asked: dict[str, Any]) -> None:
        """Do what the panel asks for."""
        action = asked.get("action")
        panel = cast(Panel, self._panel)
        if action == "set":
            self._edit(asked["turn"], asked["values"])
        elif action == "cancel":
            self.cancel()
        elif action == "again":
            self.redraw()
        elif action == "tables":
            panel.send({"tables": list(self.tables)})
        elif action == "save":
            try:
                name, kind, content = self._file(asked["what"], asked.get("table"))
            except (ValueError, TypeError, OSError) as problem:
                self._fail(str(problem))
                return
            panel.send({"name": name, "type": kind}, [content])

    def _file(self, what: str, table: str | None) -> tuple[str, str, bytes]:
        """A file's name, kind and bytes, for the browser to save."""
        subject = self.name.removeprefix("explore_")
        if what == "html":
            return f"{subject}.html", "text/html", self._page().encode()
        if what == "csv":
            name = table or next(iter(self.tables))
            return f"{subject}-{name}.csv", "text/csv", _csv(self.tables[name])
        if what == "svg":
            return f"{subject}.svg", "image/svg+xml", self._frame.svg
        return f"{subject}.png", "image/png", self._frame.png

    def _page(self) -> str:
        view = self.view if self._frame.state is not None else None
        html = self._frame.as_html() if view is None else self._frame.html
        parts: list[WidgetView | str] = [html] if view is None else [view, html]
        return page(self.code, [part for part in parts if part])

    def __repr__(self) -> str:
        # Controls that its work makes are not waited for.
        told = written_arguments(self.name, self._given) if self._make_controls else self.settings
        return call_text(self.name, told)

    def _repr_mimebundle_(self, **options: object) -> dict[str, Any]:
        """The widget, and its present picture for readers that run no widgets."""
        self._worker.wait()
        bundle = self._bundle(**options)
        if self._problem:
            return bundle | {"text/plain": f"{bundle['text/plain']}\n{self._problem}"}
        return bundle | self._stored_picture()

    def _bundle(self, **options: object) -> dict[str, Any]:
        return super()._repr_mimebundle_(**options) | {"text/plain": repr(self)}

    def _stored_picture(self) -> dict[str, str]:
        png = b"" if self._problem else self._frame.png
        return {"image/png": b64encode(png).decode("ascii")} if png else {}

    def _ipython_display_(self) -> None:
        """Show what there is of a slow explorer at once, and its picture when it is drawn."""
        if not self._worker.working:
            # Then IPython asks for the bundle above.
            raise NotImplementedError
        from IPython.display import display

        shown = self._bundle()
        handle = display(shown, raw=True, display_id=True)
        try:
            self._worker.wait()
        except KeyboardInterrupt:
            self.cancel()
            raise
        handle.update(shown | self._stored_picture(), raw=True)


_CANCELLED = "Cancelled. Go on with a change of a control, or try again."


def _csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False).encode()


def _path(path: str | os.PathLike[str], *suffixes: str) -> Path:
    found = Path(path)
    if found.suffix not in suffixes:
        raise ValueError(f"path must end in {' or '.join(suffixes)}, got {os.fspath(path)!r}")
    return found


def _write(path: Path, content: bytes) -> None:
    with written_whole(path) as partial:
        partial.write_bytes(content)
