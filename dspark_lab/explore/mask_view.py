"""The mask as a widget that can be touched: what travels to the browser is its geometry."""

from base64 import b64encode
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from dspark_lab.chats import Batch, token_texts
from dspark_lab.checks import checked
from dspark_lab.explore import style
from dspark_lab.explore.mask_geometry import RuleMask
from dspark_lab.explore.widget import HAS_ANYWIDGET, RowView


class MaskView(RowView):
    """A mask on a canvas.

    ``figure`` draws the picture that stands in a stored notebook.
    """

    names: ClassVar[tuple[str, ...]] = ("shared", "rule", "mask_paint", "mask")
    figure: Callable[[], Figure] | None = None

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle: Any = super()._repr_mimebundle_(**options) if HAS_ANYWIDGET else {}
        if self.figure is None:
            return bundle
        # anywidget gives data and metadata, or nothing where it may not be shown.
        data, *more = bundle if isinstance(bundle, tuple) else (bundle or {},)
        picture = b64encode(style.png(self.figure())).decode("ascii")
        data = data | {"image/png": picture, "text/plain": "MaskView"}
        return (data, *more) if more else data


@checked
def mask_row(batch: Batch, to_text: Callable[[int], str], *, row: int = 0) -> dict[str, Any]:
    """The tokens of one row as the browser is given them, once: texts, ids, which are labels."""
    ids = batch.input_ids[row]
    supervised = batch.loss_mask[row].cpu().numpy() > 0.5
    labels = np.flatnonzero(np.diff(supervised, prepend=False, append=False))
    texts = token_texts(to_text, ids.tolist())
    return {"texts": texts, "ids": _bytes(ids), "labels": _bytes(labels), "title": ""}


@checked
def mask_state(
    mask: RuleMask,
    *,
    tile_size: int = 128,
    other: RuleMask | None = None,
    row: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What the browser needs to know of a mask, and of another to compare it with: a few kB."""
    blocks = mask.blocks
    facts = {
        "positions": _bytes(blocks.position_ids[0, :, 0]),
        "supervised": _bytes(blocks.eval_mask[0].sum(1)),
    }
    state: dict[str, Any] = {"tile_size": tile_size, "mask": _described(mask), "blocks": facts}
    state["other"] = None if other is None else _described(other)
    return state if row is None else state | {"row": row}


def _described(mask: RuleMask) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": mask.name,
        "seq_len": mask.seq_len,
        "block_size": mask.blocks.block_size,
        "layout": mask.blocks.layout,
        "window": mask.view.window or 0,
        "causal": mask.view.causal,
        "dummies": True,
        "reach": mask.reach,
        "length": mask.seq_len if mask.length is None else mask.length,
        "anchors": _bytes(mask.anchors),
        "keep": _bytes(mask.keep),
        "documents": _bytes(mask.documents),
    }
    if mask.given is not None:
        query, key = np.divmod(mask.given, mask.stride)
        described["runs"] = _bytes(key)
        described["offsets"] = _bytes(np.searchsorted(query[::2], np.arange(mask.shape[0] + 1)))
    return described


def _bytes(values: np.ndarray | Tensor) -> bytes:
    """Whole numbers as the bytes of 32-bit integers."""
    array = values.cpu().numpy() if isinstance(values, Tensor) else values
    return array.astype(np.int32).tobytes()
