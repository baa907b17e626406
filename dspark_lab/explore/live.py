"""A picture of what goes on: drawn again as numbers come, kept in the output of its cell."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import ipywidgets
from IPython import get_ipython
from IPython.display import display

from dspark_lab.explore.frame import Frame


class LivePicture(ipywidgets.VBox):
    """A line of words and a picture; a subclass draws them in :meth:`redraw`.

    Readers that run no widgets get the picture, once there is something to see.
    """

    def __init__(self) -> None:
        self._png = b""
        self._line, self._picture = ipywidgets.HTML(), ipywidgets.HTML(layout={"width": "100%"})
        super().__init__([self._line, self._picture])

    def redraw(self) -> None:
        """Draw what there is now."""
        raise NotImplementedError

    def _show(self, frame: Frame) -> None:
        self._png = frame.png
        self._picture.value = frame.as_html()

    def _empty(self) -> bool:
        """Whether there is nothing to see yet."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **options: object) -> dict[str, Any]:
        self.redraw()
        bundle = super()._repr_mimebundle_(**options) | {"text/plain": repr(self)}
        if not self._empty():
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
