"""Explorers: one call, sliders, and a picture that follows them.

An explorer holds controls and shows what ``dspark_lab.explore.tables`` and ``dspark_lab.explore.plots`` make of
their values; it works nothing out itself. Each takes the shipped conversations, or the user's own
file and tokenizer. ``explorer.table`` is the table behind the picture, ``explorer.tables`` has all.
"""

import math
import os
import time
from base64 import b64encode
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import ipywidgets
import pandas as pd
import torch

from dspark_lab.attention import training_block_mask
from dspark_lab.blocks import Blocks, cut_blocks, draw_blocks
from dspark_lab.chats import Batch, Chat, Encoded, encode, load_chats, load_tokenizer, one_row
from dspark_lab.common import context_doc_ids
from dspark_lab.explore.explorer import WIDE, Explorer, Frame, checkbox, slider
from dspark_lab.explore.plots import mask_and_tiles, plot_training, png, token_legend, token_text
from dspark_lab.explore.tables import (
    block_table,
    mask_regions,
    mask_table,
    slot_inputs,
    tile_states,
    tile_table,
    token_table,
)

__all__ = ["Explorer", "Frame", "LiveCurve", "explore_anchors", "explore_masks"]

# A training curve is drawn again when it is at least so old.
REDRAW_SECONDS = 0.5
TILE_SIZES = (16, 32, 64, 128, 256)


class LiveCurve(ipywidgets.VBox):
    """A training run as it goes on: hand it to :func:`dspark_lab.training.loop.train` as ``on_metrics``.

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
        an explorer whose ``table`` is :func:`dspark_lab.explore.tables.token_table`.

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
    controls["context"] = slider("context", context, 8, 1024)
    controls |= _draw_controls(num_anchors, block_size, seed)
    controls["tile_size"] = ipywidgets.SelectionSlider(
        description="tile_size", options=TILE_SIZES, value=tile_size, **WIDE
    )
    controls["shuffled"] = checkbox("shuffled", False)

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
            "conversation": slider("conversation", conversation, 0, last),
            "packed": checkbox("packed", packed),
            "row_length": slider("row_length", row_length, 64, 4096, step=64),
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


def _draw_controls(num_anchors: int, block_size: int, seed: int) -> dict[str, Any]:
    return {
        "num_anchors": slider("num_anchors", num_anchors, 1, 128),
        "block_size": slider("block_size", block_size, 1, 32),
        "seed": slider("seed", seed, 0, 99),
    }
