"""The controls of explorers: named values, and the panel in which a front end shows them."""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import ipywidgets
import traitlets

from dspark_lab.checks import Within, require
from dspark_lab.explore.style import require_one_of
from dspark_lab.explore.widget import WidgetView

_WIDE = {"style": {"description_width": "9em"}, "layout": {"width": "27em"}}


class Control(traitlets.HasTraits):
    """A named value that a user sets: ``value``, within ``min`` and ``max`` or one of ``options``.

    ``reason`` says why it has no effect now; "" where it has one.
    """

    value = traitlets.Any()
    reason = traitlets.Unicode("")
    min = traitlets.Any(None)
    max = traitlets.Any(None)
    options = traitlets.Tuple()

    def __init__(
        self,
        description: str,
        kind: str,
        value: Any,
        *,
        step: float = 1,
        growing: bool = False,
        labels: Sequence[str] | None = None,
        continuous_update: bool = True,
        argument: bool = True,
        **traits: Any,
    ) -> None:
        self.description, self.kind, self.step = description, kind, step
        # Whether a slider's steps grow with its value, so that a wide range is within its reach.
        self.growing = growing
        self.labels = labels
        # Whether a drag's values count before it ends.
        self.continuous_update = continuous_update
        # Whether the explorer's argument of this name is where it starts.
        self.argument = argument
        super().__init__(**traits)
        self.value = value

    @property
    def disabled(self) -> bool:
        return bool(self.reason)

    @traitlets.validate("value")
    def _allowed(self, proposal: Any) -> Any:
        """Numbers are moved into their range, all else must be allowed as it is."""
        value = proposal["value"]
        if self.kind in ("whole", "number"):
            require(self.description, value, int if self.kind == "whole" else float)
            return min(max(value, self.min), self.max)
        if self.kind in ("choice", "list"):
            require_one_of(self.description, value, self.options)
            return self.options[self.options.index(value)]
        require(self.description, value, bool if self.kind == "check" else str)
        return value

    @traitlets.observe("min", "max")
    def _move_into_range(self, _change: object) -> None:
        if self.value is not None:
            self.value = min(max(self.value, self.min), self.max)

    def state(self) -> dict[str, Any]:
        """All that a front end shows of it; a value that is one of several is its index."""
        labels = self.labels or [_label(option) for option in self.options]
        return {
            "name": self.description,
            "kind": self.kind,
            "value": self.coded(self.value),
            "low": self.min,
            "high": self.max,
            "step": self.step,
            "growing": self.growing,
            "labels": list(labels),
            "reason": self.reason,
            "continuous": self.continuous_update,
        }

    def coded(self, value: Any) -> Any:
        """A value of it as a front end knows it."""
        return self.options.index(value) if self.kind in ("choice", "list") else value

    def read(self, raw: Any) -> Any:
        """The value that a front end's is."""
        if self.kind in ("choice", "list"):
            return self.options[min(max(int(raw), 0), len(self.options) - 1)]
        if self.kind in ("whole", "number"):
            if not isinstance(raw, (int, float)) or not math.isfinite(raw):
                return self.value
            return round(raw) if self.kind == "whole" else float(raw)
        return bool(raw) if self.kind == "check" else str(raw)


def _label(option: Any) -> str:
    return f"{option:,}" if isinstance(option, int) else str(option)


def checkbox(name: str, value: bool) -> Control:
    return Control(name, "check", value)


def slider(name: str, value: int, low: int, high: int, *, growing: bool = False) -> Control:
    """A whole number from ``low`` to ``high``, and further if it starts further out."""
    require(name, value, Annotated[int, Within(low)])
    return Control(name, "whole", value, min=low, max=max(high, value), growing=growing)


def number_slider(name: str, value: float, low: float, high: float, **options: Any) -> Control:
    """A number in steps of 0.05, typed ones as they are, which reaches further if it starts so."""
    require(name, value, Annotated[float, Within(low)])
    options |= {"min": low, "max": max(high, value)}
    return Control(name, "number", float(value), step=0.05, **options)


def dropdown(name: str, value: Any, options: Sequence[Any], **more: Any) -> Control:
    require_one_of(name, value, options)
    return Control(name, "list", value, options=tuple(options), **more)


def selection_slider(name: str, value: Any, options: Sequence[Any]) -> Control:
    require_one_of(name, value, options)
    return Control(name, "choice", value, options=tuple(options))


def text_area(name: str, value: str) -> Control:
    return Control(name, "text", value, continuous_update=False)


class Panel(WidgetView):
    """Controls, a line for progress and problems, and buttons, in JavaScript.

    ``act`` is called with what it asks for: values that the user set, or what a button does.
    """

    names: ClassVar[tuple[str, ...]] = ("shared", "controls")
    progress = traitlets.Dict().tag(sync=True)

    def __init__(self, act: Callable[[dict[str, Any]], None], **traits: Any) -> None:
        super().__init__(**traits)
        self.on_msg(lambda _widget, content, _buffers: act(content))

    def open(self) -> None:
        super().open()
        answer_at_once(self.comm)


def answer_at_once(comm: Any) -> None:
    """Have a widget's messages wait for no cell, where the kernel can be asked for that.

    ipykernel 7 hands a message to the thread in which its widget spoke last. That may be the cell
    that waits for the work which the message cancels, and only this hook, which is not public, asks
    for another. Where there is none, Cancel may wait; the kernel's interrupt cancels as well.
    """
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda _data, default: default


def plain_widget(control: Control) -> ipywidgets.Widget:
    """The control as a widget of ipywidgets, where the panel cannot be shown."""
    options: dict[str, Any] = {"description": control.description, "value": control.value, **_WIDE}
    if control.kind in ("whole", "number"):
        make = ipywidgets.IntSlider if control.kind == "whole" else ipywidgets.FloatSlider
        options |= {"min": control.min, "max": control.max, "step": control.step}
        options["continuous_update"] = control.continuous_update
    elif control.kind in ("choice", "list"):
        make = ipywidgets.SelectionSlider if control.kind == "choice" else ipywidgets.Dropdown
        labels = control.labels or [_label(option) for option in control.options]
        options["options"] = list(zip(labels, control.options, strict=True))
    else:
        make = ipywidgets.Checkbox if control.kind == "check" else ipywidgets.Textarea
    shown = make(**options)
    if control.kind in ("whole", "number"):
        control.observe(
            lambda change: setattr(shown, change["name"], change["new"]), ["min", "max"]
        )
    traitlets.link((control, "value"), (shown, "value"))

    def disable(_change: object = None) -> None:
        shown.disabled, shown.tooltip = control.disabled, control.reason

    control.observe(disable, names="reason")
    disable()
    return shown
