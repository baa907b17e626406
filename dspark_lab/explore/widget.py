"""Widgets of the lab's own JavaScript: in a notebook, and as one page that needs no kernel."""

import json
from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import traitlets

from dspark_lab.checks import checked

try:
    from anywidget import AnyWidget as Base
except ImportError:
    Base = traitlets.HasTraits  # type: ignore[assignment, misc]

# Whether a front end can be given widgets of the lab's own at all.
HAS_ANYWIDGET = Base is not traitlets.HasTraits
_SCRIPTS = Path(__file__).with_name("js")
# How a widget's last file ends; a page takes what it exports without a module.
_EXPORT = "export default { render };\n"


class WidgetView(Base):
    """A widget whose JavaScript is the files ``js/<name>.js`` of its ``names``, one by one.

    ``state`` is all that it shows: values of JSON, and the bytes of arrays. ``selection`` is what
    the user selected in it, or None.
    """

    names: ClassVar[tuple[str, ...]] = ()
    state = traitlets.Dict().tag(sync=True)
    # The browser that sent a selection needs no copy of it back.
    selection = traitlets.Any(None, allow_none=True).tag(sync=True, echo_update=False)

    @property
    def whole(self) -> dict[str, Any]:
        """The state for a page, with what a notebook sends apart from it."""
        return self.state

    def __init_subclass__(cls, **options: Any) -> None:
        # anywidget makes a class of its own for each widget, which has the script already.
        if HAS_ANYWIDGET and "_esm" not in vars(cls):
            cls._esm = module(*cls.names)
        super().__init_subclass__(**options)


@cache
def module(*names: str) -> str:
    """The JavaScript of a widget: the files of its names, one behind the other."""
    return "\n".join((_SCRIPTS / f"{name}.js").read_text(encoding="utf-8") for name in names)


class RowView(WidgetView):
    """A widget that shows a row of tokens: ``row`` of its states is sent when it changes."""

    row = traitlets.Dict().tag(sync=True)

    @traitlets.validate("state")
    def _keep_row(self, proposal: Any) -> dict[str, Any]:
        state = dict(proposal["value"])
        if "row" in state:
            self.row = state.pop("row")
        return state

    @property
    def whole(self) -> dict[str, Any]:
        return self.state | ({"row": self.row} if self.row else {})


@checked
def page(title: str, parts: Sequence[WidgetView | str]) -> str:
    """A page of HTML with widgets, alive without a kernel or a network, and HTML between them."""
    sources: dict[tuple[str, ...], str] = {}
    body, states = [f"<h1>{escape(title)}</h1>"], list[Any]()
    for part in parts:
        if isinstance(part, str):
            body.append(f"<div>{part}</div>")
            continue
        if part.names not in sources:
            source = module(*part.names)
            if not source.endswith(_EXPORT):
                raise ValueError(f"{part.names[-1]}.js must end in {_EXPORT!r}")
            sources[part.names] = source.removesuffix(_EXPORT) + "return { render };\n"
        body.append(f'<div class="widget" id="widget{len(states)}"></div>')
        number = list(sources).index(part.names)
        states.append([number, {"state": part.whole, "selection": part.selection}])
    modules = ",\n".join(f"() => {{\n{source}}}" for source in sources.values())
    held = json.dumps(states, default=_coded)
    script = f'"use strict";\nconst modules = [{modules}];\nconst states = {held};\n{_START}'
    # Nothing in a script may look like its end, or like markup that changes how one ends.
    script = script.replace("</script", r"<\/script").replace("<!--", r"<\!--")
    return _PAGE.format(title=escape(title), body="\n".join(body), script=script)


def _coded(value: Any) -> dict[str, str]:
    """Bytes as JSON."""
    return {"base64": b64encode(memoryview(value)).decode("ascii")}


# All of a page may come from itself alone, so that it shows what it needs from nowhere else.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #121212; --ink: #ececec; }} }}
body {{ background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 1200px; margin: 0 auto; padding: 12px 16px; }}
h1 {{ font-size: 17px; margin: 0 0 10px; overflow-wrap: anywhere; }}
img {{ max-width: 100%; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
</style>
</head>
<body>
{body}
<script>
{script}</script>
</body>
</html>
"""

_START = """// Bytes travel as text; a widget is given them as a notebook gives them.
const revived = (value) => {
  if (Array.isArray(value)) return value.map(revived);
  if (value === null || typeof value !== "object") return value;
  const names = Object.keys(value);
  if (names.length === 1 && names[0] === "base64" && typeof value.base64 === "string") {
    return new DataView(Uint8Array.from(atob(value.base64), (one) => one.charCodeAt(0)).buffer);
  }
  return Object.fromEntries(names.map((name) => [name, revived(value[name])]));
};
const modelOf = (held) => {
  const handlers = [];
  return {
    get: (name) => held[name],
    set: (name, value) => {
      held[name] = value;
      handlers.filter(([event]) => event === `change:${name}`).forEach(([, call]) => call());
    },
    save_changes: () => {},
    send: () => {},
    on: (event, call) => handlers.push([event, call]),
    off: (event, call) => {
      const kept = handlers.filter(([e, c]) => e !== event || (call && c !== call));
      handlers.splice(0, handlers.length, ...kept);
    },
  };
};
const loaded = modules.map(() => null);
states.forEach(([number, held], i) => {
  loaded[number] ??= modules[number]();
  const el = document.getElementById(`widget${i}`);
  loaded[number].render({ model: modelOf(revived(held)), el });
});
"""
