"""Explorers: one call, sliders, and a picture that follows them.

An explorer holds controls and shows what ``dspark_lab.tables`` and ``dspark_lab.plots`` make of
their values; it works nothing out itself. Each takes the shipped conversations, or the user's own
file and tokenizer. ``explorer.table`` is the table behind the picture, ``explorer.tables`` has all.
"""

import asyncio
import math
import os
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from typing import Any

import ipywidgets
import pandas as pd
import torch

from dspark_lab.attention import training_block_mask
from dspark_lab.blocks import Blocks, cut_blocks, draw_blocks
from dspark_lab.chats import Batch, Chat, Encoded, encode, load_chats, load_tokenizer, one_row
from dspark_lab.checks import require_int
from dspark_lab.common import context_doc_ids
from dspark_lab.plots import mask_and_tiles, plot_training, png, token_legend, token_text
from dspark_lab.tables import (
    block_table,
    mask_regions,
    mask_table,
    slot_inputs,
    tile_states,
    tile_table,
    token_table,
)

__all__ = ["Explorer", "Frame", "LiveCurve", "explore_anchors", "explore_masks"]

# Changes that arrive within this time become one redraw, of the newest values only.
SETTLE_SECONDS = 0.01
# A training curve is drawn again when it is at least so old.
REDRAW_SECONDS = 0.5
TILE_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Frame:
    """What an explorer shows for one setting of its controls, and the tables behind it.

    The show is HTML, or a picture: a PNG file and what it is in words; or, without tables, the
    problem with the setting.
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
        return f'<img alt="{escape(self.alt)}" style="max-width:100%" src="{source}">'


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


class LiveCurve(ipywidgets.VBox):
    """A training run as it goes on: hand it to :func:`dspark_lab.train.train` as ``on_metrics``.

        curve = LiveCurve()
        display(curve)
        train(..., on_metrics=curve)

    The picture is redrawn at most twice a second, so that it costs a run little.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._drawn_at, self._png = -math.inf, b""
        self._line, self._picture = ipywidgets.HTML(), ipywidgets.HTML(layout={"width": "100%"})
        super().__init__([self._line, self._picture])

    def __call__(self, row: dict[str, Any]) -> None:
        """Takes a line of the run's metrics."""
        if "loss" not in row:
            return
        self._rows.append(row)
        if time.monotonic() - self._drawn_at > REDRAW_SECONDS:
            self.redraw()

    @property
    def table(self) -> pd.DataFrame:
        """One row for each step so far."""
        return pd.DataFrame(self._rows, columns=["step", "loss", "accept_rate", "tau"])

    def redraw(self) -> None:
        """Draw what there is now."""
        self._drawn_at = time.monotonic()
        frame = Frame({}, png=png(plot_training(self.table)), alt="loss, accept rate and tau")
        self._png = frame.png
        self._picture.value = frame.as_html()
        if self._rows:
            last = self._rows[-1]
            self._line.value = (
                f"step {last['step']}: loss {last['loss']:.3f}, accept rate "
                f"{last['accept_rate']:.3f}, tau {last['tau']:.2f}"
            )

    def __repr__(self) -> str:
        return "LiveCurve()"

    def _repr_mimebundle_(self, **options: object) -> dict[str, Any]:
        """The widget, and its picture, once there is one, for readers that run no widgets."""
        self.redraw()
        bundle = super()._repr_mimebundle_(**options)
        if not self._rows:
            return bundle | {"text/plain": repr(self)}
        picture = b64encode(self._png).decode("ascii")
        return bundle | {"text/plain": repr(self), "image/png": picture}


def explore_anchors(
    chats: str | os.PathLike[str] | Sequence[Chat] | None = None,
    tokenizer: Any = None,
    *,
    num_anchors: int = 16,
    block_size: int = 7,
    seed: int = 0,
    conversation: int = 0,
    packed: bool = False,
    row_length: int = 1024,
) -> Explorer:
    """Which tokens of a conversation are anchors, covered, or never a label.

    Args:
        chats: conversations, or a JSONL file of them; the shipped ones where None.
        tokenizer: a tokenizer, its name or folder; the shipped one where None.
        num_anchors, block_size, seed, conversation, packed, row_length: where the controls start.
            Packed, as many conversations share a row as fit, the chosen one first in line.

    Returns:
        an explorer whose ``table`` is :func:`dspark_lab.tables.token_table`.

    Raises:
        ValueError, TypeError, OSError: conversations or a tokenizer that cannot be read.
    """
    rows = _Rows(chats, tokenizer)
    controls = rows.controls(conversation, packed, row_length)
    controls |= _draw_controls(num_anchors, block_size, seed)

    def draw(
        conversation: int,
        packed: bool,
        row_length: int,
        num_anchors: int,
        block_size: int,
        seed: int,
    ) -> Frame:
        batch = rows.row(conversation, packed, row_length)
        blocks = draw_blocks(batch, num_anchors, block_size, seed=seed)
        tokens = token_table(batch, blocks, rows.to_text)
        return Frame(
            {"tokens": tokens, "blocks": block_table(batch, blocks, rows.to_text)},
            html=token_legend(tokens) + token_text(tokens),
        )

    return Explorer("explore_anchors", controls, draw)


def explore_masks(
    chats: str | os.PathLike[str] | Sequence[Chat] | None = None,
    tokenizer: Any = None,
    *,
    num_anchors: int = 16,
    block_size: int = 7,
    tile_size: int = 128,
    seed: int = 0,
    conversation: int = 0,
    packed: bool = False,
    row_length: int = 512,
    context: int = 512,
) -> Explorer:
    """What each block of a conversation sees, pair by pair and tile by tile.

    Args:
        chats, tokenizer: see :func:`explore_anchors`.
        num_anchors, block_size, tile_size, seed, conversation, packed, row_length: where the
            controls start.
        context: how many tokens around the first answer to keep; with few tokens and blocks the
            mask is drawn cell by cell.

    Returns:
        an explorer whose ``tables`` are ``mask``, ``tiles`` and ``blocks``.

    Raises:
        ValueError, TypeError, OSError: conversations or a tokenizer that cannot be read.
    """
    if tile_size not in TILE_SIZES:
        raise ValueError(f"tile_size must be one of {TILE_SIZES}, got {tile_size}")
    rows = _Rows(chats, tokenizer)
    controls = rows.controls(conversation, packed, row_length)
    controls["context"] = _slider("context", context, 8, 1024)
    controls |= _draw_controls(num_anchors, block_size, seed)
    controls["tile_size"] = ipywidgets.SelectionSlider(
        description="tile_size", options=TILE_SIZES, value=tile_size, **_WIDE
    )
    controls["shuffled"] = _checkbox("shuffled", False)

    def draw(
        conversation: int,
        packed: bool,
        row_length: int,
        context: int,
        num_anchors: int,
        block_size: int,
        seed: int,
        tile_size: int,
        shuffled: bool,
    ) -> Frame:
        batch = rows.row(conversation, packed, row_length, context)
        blocks = draw_blocks(batch, num_anchors, block_size, seed=seed)
        if shuffled:
            blocks = _shuffle(batch, blocks, seed)
        seq_len = batch.input_ids.shape[1]
        doc_ids = context_doc_ids(batch.seq_lens, seq_len, "cpu")
        regions = mask_regions(blocks, seq_len=seq_len, doc_ids=doc_ids)
        tiles = tile_states(
            training_block_mask(
                blocks.anchor_positions,
                blocks.block_keep_mask,
                seq_len=seq_len,
                block_size=block_size,
                doc_ids=doc_ids,
                tile_size=tile_size,
            )
        )
        figure = mask_and_tiles(
            regions,
            tiles,
            seq_len=seq_len,
            block_size=block_size,
            tile_size=tile_size,
            context_text=[rows.to_text(token_id) for token_id in batch.input_ids[0].tolist()],
            slot_text=slot_inputs(blocks, rows.to_text),
        )
        return Frame(
            {
                "mask": mask_table(regions),
                "tiles": tile_table(tiles),
                "blocks": block_table(batch, blocks, rows.to_text),
            },
            png=png(figure),
            alt="the attention mask with its regions, and its tiles",
        )

    return Explorer("explore_masks", controls, draw)


class _Rows:
    """Conversations as rows of tokens, encoded when they are first asked for."""

    def __init__(self, chats: Any, tokenizer: Any) -> None:
        if chats is None or isinstance(chats, (str, os.PathLike)):
            chats = load_chats(chats)
        if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = load_tokenizer(tokenizer)
        if len(chats) == 0:
            raise ValueError("chats must hold at least one conversation, got none")
        self.chats, self.tokenizer = chats, tokenizer
        pad_token_id = tokenizer.pad_token_id
        self.pad_token_id = tokenizer.eos_token_id if pad_token_id is None else pad_token_id
        self.to_text = lru_cache(maxsize=None)(lambda token_id: tokenizer.decode([token_id]))
        self.encoded = lru_cache(maxsize=None)(lambda index: encode(chats[index], tokenizer))

    def controls(self, conversation: int, packed: bool, row_length: int) -> dict[str, Any]:
        last = len(self.chats) - 1
        if not 0 <= conversation <= last:
            raise ValueError(f"conversation must lie in [0, {last}], got {conversation}")
        return {
            "conversation": _slider("conversation", conversation, 0, last),
            "packed": _checkbox("packed", packed),
            "row_length": _slider("row_length", row_length, 64, 4096, step=64),
        }

    def row(self, index: int, packed: bool, row_length: int, context: int | None = None) -> Batch:
        """One row: a conversation alone, or packed with those that follow while they fit."""
        chosen = [_around_answer(self.encoded(index), context)]
        room = row_length - len(chosen[0])
        if packed and room < 0:
            raise ValueError(
                f"Conversation {index} has {len(chosen[0])} tokens and does not fit into a row of "
                f"{row_length}. Choose a longer row."
            )
        while packed and (index := index + 1) < len(self.chats):
            following = _around_answer(self.encoded(index), context)
            room -= len(following)
            if room < 0:
                break
            chosen.append(following)
        length = row_length if packed else len(chosen[0])
        return one_row(chosen, length, self.pad_token_id)


def _around_answer(encoded: Encoded, context: int | None) -> Encoded:
    """At most ``context`` tokens of a conversation, a third of them before its first answer."""
    if context is None or len(encoded) <= context:
        return encoded
    first_answer = int(encoded.loss_mask.int().argmax())
    first = min(max(0, first_answer - context // 3), len(encoded) - context)
    kept = slice(first, first + context)
    return Encoded(encoded.input_ids[kept], encoded.loss_mask[kept], encoded.chat)


def _shuffle(batch: Batch, blocks: Blocks, seed: int) -> Blocks:
    """The same blocks in another order."""
    anchors = blocks.anchor_positions.shape[1]
    order = torch.randperm(anchors, generator=torch.Generator().manual_seed(seed))
    return cut_blocks(
        batch,
        blocks.anchor_positions[:, order],
        blocks.block_keep_mask[:, order],
        blocks.eval_mask.shape[2],
    )


_WIDE = {"style": {"description_width": "8em"}, "layout": {"width": "27em"}}


def _draw_controls(num_anchors: int, block_size: int, seed: int) -> dict[str, Any]:
    return {
        "num_anchors": _slider("num_anchors", num_anchors, 1, 128),
        "block_size": _slider("block_size", block_size, 1, 32),
        "seed": _slider("seed", seed, 0, 99),
    }


def _checkbox(name: str, value: bool) -> ipywidgets.Checkbox:
    return ipywidgets.Checkbox(value, description=name, **_WIDE)


def _slider(name: str, value: int, low: int, high: int, step: int = 1) -> ipywidgets.IntSlider:
    """A slider that reaches from ``low`` to ``high``, and further if it starts further out."""
    require_int(name, value, low)
    high = max(high, value)
    return ipywidgets.IntSlider(value, low, high, step, description=name, **_WIDE)
