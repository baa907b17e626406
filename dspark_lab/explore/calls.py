"""A view as code: the call that makes it again."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from dspark_lab.explore.controls import Control


def call_text(name: str, settings: Mapping[str, Any]) -> str:
    """A call as text, such as ``explore_anchors(seed=1)``."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"


def view_code(
    name: str, given: Mapping[str, Any], controls: Mapping[str, Control], starts: Mapping[str, Any]
) -> str:
    """The call that makes a view, and lines of settings that none of its arguments names.

    ``given`` are the arguments of the call that made the explorer, ``starts`` where its controls
    started.
    """
    written = written_arguments(name, given, controls, starts)
    lines = [call_text(f"lab.{name}", written)]
    for each, control in controls.items():
        if each not in written and control.value != starts[each]:
            lines.append(f"explorer.controls[{each!r}].value = {control.value!r}")
    return lines[0] if len(lines) == 1 else "\n".join([f"explorer = {lines[0]}", *lines[1:]])


def written_arguments(
    name: str,
    given: Mapping[str, Any],
    controls: Mapping[str, Control] | None = None,
    starts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The call's arguments that can be written and are not their defaults, then the settings.

    Other objects are written as the names of their arguments.
    """
    call = getattr(importlib.import_module("dspark_lab"), name, None)
    taken = inspect.signature(call).parameters if call is not None else {}
    shown = {n: c.value for n, c in (controls or {}).items() if c.argument}
    written: dict[str, Any] = {}
    for argument, value in given.items():
        if argument in taken and argument not in shown:
            if not _same(value, taken[argument].default):
                written[argument] = value if _can_be_written(value) else _Name(argument)
    for argument, value in shown.items():
        # Where a control starts at an object, its value is a word for that.
        if not _can_be_written(given.get(argument)) and value == (starts or {})[argument]:
            written[argument] = _Name(argument)
        elif argument in taken or call is None:
            written[argument] = value
    return written


class _Name(str):
    """An argument that cannot be written, as the name of a variable."""

    def __repr__(self) -> str:
        return str(self)


def _can_be_written(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) < 20 and all(map(_can_be_written, value))
    return value is None or type(value) in (bool, int, float, str)


def _same(value: object, default: object) -> bool:
    return value is default or (_can_be_written(value) and value == default)
