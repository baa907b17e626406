"""Anchors: which tokens of a conversation are anchors, covered, or never a label."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch.nn.functional import pad

from dspark_lab.attention import FULL, ContextRanges, View
from dspark_lab.blocks import LAYOUTS, Blocks, Layout, Per, draw_blocks
from dspark_lab.chats import (
    Batch,
    Chat,
    Encoded,
    EncodedChats,
    Like,
    TokenText,
    encode_rows,
    load_tokenizer,
    one_row,
    token_texts,
)
from dspark_lab.checks import Within, checked, require, require_columns
from dspark_lab.explore import style
from dspark_lab.explore.controls import checkbox, dropdown, slider
from dspark_lab.explore.explorer import Explorer
from dspark_lab.explore.frame import Frame
from dspark_lab.explore.tokens import TokensView, plot_tokens, token_row, token_state, token_table
from dspark_lab.training import ChatsLike, open_chats


@checked
def block_table(
    blocks: Blocks, to_text: Callable[[int], str], *, row: int = 0, view: View = FULL
) -> pd.DataFrame:
    """Each slot of one row's blocks: its input, its position, and its label.

    ``input`` is from :func:`slot_inputs`, ``context`` counts the context tokens that a slot sees in
    a layer of this ``view``. ``label`` is empty past the row and in dummy blocks; an anchor that is
    given predicts nothing, so its ``label_position`` is -1.
    """
    drawn, block_size = blocks.row(row), blocks.block_size
    ranges = ContextRanges.of(drawn, view)
    ends = ranges.end.repeat_interleave(block_size, dim=1)
    given = block_size - drawn.predicted
    table = pd.DataFrame(
        {
            "block": np.repeat(np.arange(drawn.num_anchors), block_size),
            "kept": drawn.block_keep_mask[0].repeat_interleave(block_size).tolist(),
            "slot": np.tile(np.arange(block_size), drawn.num_anchors),
            "position_id": drawn.position_ids.flatten().tolist(),
            "input": slot_inputs(drawn, to_text),
            "context": (ends - ranges.slot_start)[0].clamp(min=0).tolist(),
            "label_position": pad(drawn.label_indices, (given, 0), value=-1).flatten().tolist(),
            "label": _labels(drawn, to_text),
            "supervised": pad(drawn.eval_mask, (given, 0)).flatten().tolist(),
        }
    )
    labelled = table["kept"] & table["label_position"].between(0, drawn.seq_len - 1)
    return table.assign(label=table["label"].where(labelled, ""))


def _labels(drawn: Blocks, to_text: Callable[[int], str]) -> list[str]:
    """The slots' labels as texts; a block's first may end a character that its anchor begins."""
    texts = []
    given = [""] * (drawn.block_size - drawn.predicted)
    for first, labels in zip(
        drawn.prev_ids[0, :, 0].tolist(), drawn.target_ids[0].tolist(), strict=True
    ):
        texts += given + token_texts(to_text, [first, *labels])[1:]
    return texts


@checked
def slot_inputs(blocks: Blocks, to_text: Callable[[int], str]) -> list[str]:
    """The input of each slot of the first row's blocks as text: ``[mask]`` for the mask token.

    Slot 0 of a kept block reads a token of the conversation, whatever its id.
    """
    masked = blocks.noise_ids[0] == blocks.mask_token_id
    masked[:, 0] &= ~blocks.block_keep_mask[0]
    ids = zip(blocks.noise_ids[0].flatten().tolist(), masked.flatten().tolist(), strict=True)
    return ["[mask]" if hidden else to_text(token_id) for token_id, hidden in ids]


def plot_coverage(table: pd.DataFrame, *, goal: float | None = 0.9) -> Figure:
    """Coverage, from :func:`dspark_lab.tuning.coverage_table`, and ``goal``, a share, dotted."""
    require_columns("table", table, ["block_size", "num_anchors", "expected", "sampled"])
    figure, ax = style.new_figure(7, 3.6)
    for i, (block_size, part) in enumerate(table.groupby("block_size")):
        mark = style.line_look(i) | {"fillstyle": "none", "linestyle": "none"}
        label = f"block {block_size}"
        ax.plot(part["num_anchors"], part["expected"], color=mark["color"], label=label)
        ax.plot(part["num_anchors"], part["sampled"], **mark)
    if goal is not None:
        ax.axhline(goal, color=style.INK, linestyle=":", linewidth=1)
        style.add_note(ax, f"{goal:.0%}", (0, goal), (3, 2), x="axes fraction")
    style.doubling_axis(ax, table["num_anchors"])
    ax.set(xlabel="anchors per row (num_anchors)", ylim=(0, 1.02))
    style.percent_axis(ax, "supervised tokens covered in one pass")
    style.add_title(ax, "line: expected (closed form)   mark: sampled")
    style.add_legend(ax, loc="lower right")
    return figure


def plot_packing(table: pd.DataFrame) -> Figure:
    """Coverage, ``expected``, by ``num_anchors`` for each ``row``, a name of what a row holds.

    ``anchors per`` says whether they are per ``row`` or per ``document``.
    """
    require_columns("table", table, ["row", "anchors per", "num_anchors", "expected"])
    figure, ax = style.new_figure(7, 3.4)
    for i, ((row, per), part) in enumerate(table.groupby(["row", "anchors per"], sort=False)):
        look = style.line_look(i) | {"linestyle": "--" if per == "document" else "-"}
        ax.plot(part["num_anchors"], part["expected"], label=f"{row}, per {per}", **look)
    style.doubling_axis(ax, table["num_anchors"])
    ax.set(xlabel="anchors (num_anchors)", ylim=(0, 1.02))
    style.percent_axis(ax, "supervised tokens covered")
    style.add_legend(ax)
    return figure


@checked
def explore_anchors(
    chats: ChatsLike | None = None,
    tokenizer: Any = None,
    *,
    num_anchors: int = 16,
    block_size: int = 7,
    seed: int = 0,
    conversation: int = 0,
    packed: bool = False,
    row_length: int = 1024,
    per: Per = "row",
    layout: Layout = "anchor_predicts",
    like: Like | None = None,
) -> Explorer:
    """Which tokens of a conversation are anchors, covered, or never a label.

    The tables are ``tokens``, ``blocks``, and ``own``: the tokens under the lab's own mask, which
    is shown beside the mask of another trainer where the conversation is known.

    Args:
        chats: conversations, encoded or not, or a file of them; the shipped ones where None.
        tokenizer: a tokenizer, its name or folder; the shipped one where None.
        like: encode the conversations as another trainer does, see :func:`dspark_lab.encode`. From
            the same seed, its run draws the anchors that are shown. ``conversation`` counts rows.
        num_anchors, block_size, seed, conversation, packed, row_length, per, layout: where the
            controls start. Packed, as many conversations share a row as fit, the chosen one first
            in line. ``num_anchors`` counts ``per`` row or document; "anchor_given" is the layout of
            blocks whose first slot is the anchor's own.
    """
    given = dict(locals())
    rows = ConversationRows(chats, tokenizer, like)

    @lru_cache(maxsize=4)
    def row_of(*chosen: Any) -> tuple[dict[str, Batch], dict[str, Any]]:
        """A row, and the lab's own where there is one; and both as the widget is given them."""
        batches = {"tokens": rows.row(*chosen)}
        own = None if chosen[1] else rows.own_row(chosen[0])
        if own is not None:
            batches["own"] = own
        row, *others = [token_row(batch, rows.to_text) for batch in batches.values()]
        return batches, row | {"own": others[0] if others else None}

    def draw(chosen: SimpleNamespace) -> Frame:
        batches, row = row_of(chosen.conversation, chosen.packed, chosen.row_length)
        drawn = {name: drawn_blocks(batch, chosen) for name, batch in batches.items()}
        counted: dict[str, Any] = {"num_anchors": chosen.num_anchors, "per": chosen.per}
        names = {"tokens": f"{like or 'given'} mask", "own": "the lab's own mask"}
        state, *others = [
            token_state(batches[name], drawn[name], name=names[name], **counted) for name in drawn
        ]
        state |= {"row": row, "own": others[0] if others else None}

        @cache
        def tokens() -> dict[str, pd.DataFrame]:
            return {
                name: token_table(batches[name], drawn[name], rows.to_text, **counted)
                for name in drawn
            }

        def tables() -> dict[str, pd.DataFrame]:
            first, *others = tokens().items()
            return dict([first, ("blocks", block_table(drawn["tokens"], rows.to_text)), *others])

        def figure() -> Figure:
            titled = {names[name] if others else "": each for name, each in tokens().items()}
            return plot_tokens(titled)

        alt = "the tokens of the row in the colours of their states"
        return Frame(tables, figure, alt=alt, state=state)

    drawn = (num_anchors, block_size, seed, per, layout)
    controls = rows.controls(conversation, packed, row_length, *drawn)
    return Explorer(
        "explore_anchors", controls, draw, view=TokensView, reasons=rows.reasons, given=given
    )


def drawn_blocks(batch: Batch, chosen: SimpleNamespace) -> Blocks:
    """The draw that the controls of :class:`ConversationRows` ask for."""
    options: dict[str, Any] = {"seed": chosen.seed, "per": chosen.per, "layout": chosen.layout}
    return draw_blocks(batch, chosen.num_anchors, chosen.block_size, **options)


class ConversationRows:
    """Conversations as rows of tokens, encoded when they are first asked for."""

    def __init__(self, chats: Any, tokenizer: Any, like: Like | None = None) -> None:
        tokenizer = loaded_tokenizer(tokenizer)
        self.chats, self._like = open_chats(chats, tokenizer, like=like), like
        require_some(self.chats)
        # Of each row its conversation, and which of that conversation's rows it is.
        self._rows: Sequence[tuple[int, int]] | None = None
        if like == "speculators" and not isinstance(self.chats, EncodedChats):
            self._rows = [
                (index, row)
                for index, chat in enumerate(self.chats)
                for row in range(_rows_of(chat))
            ]
        if not len(self):
            raise ValueError("chats must hold an answer that speculators makes a row of, got none")
        pad_token_id = tokenizer.pad_token_id
        self.pad_token_id = tokenizer.eos_token_id if pad_token_id is None else pad_token_id
        self.to_text = TokenText(tokenizer)
        self._tokenizer = tokenizer
        self._encoded = lru_cache(maxsize=256)(self._encode)

    def __len__(self) -> int:
        return len(self.chats if self._rows is None else self._rows)

    def _encode(self, index: int) -> Encoded:
        number, row = (index, 0) if self._rows is None else self._rows[index]
        rows = encode_rows(self.chats[number], self._tokenizer, like=self._like)
        if row >= len(rows):
            raise ValueError(f"Of this answer {self._like} makes no row. Choose another.")
        return rows[row]

    def own_row(self, index: int) -> Batch | None:
        """The lab's own row beside one of another trainer, where it is known and not refused."""
        number, row = (index, 0) if self._rows is None else self._rows[index]
        item = self.chats[number]
        chat = item.chat if isinstance(item, Encoded) else item if self._like else None
        if chat is None:
            return None
        try:
            if self._rows is None or isinstance(item, Encoded):
                own = encode_rows(chat, self._tokenizer)[0]
            else:
                answers = [answer for answer in chat.answers if answer]
                part = chat.up_to(answers[row])
                own = encode_rows(part, self._tokenizer, last_answer_only=True)[0]
        except ValueError:
            return None
        return one_row([own], len(own), self.pad_token_id)

    def controls(
        self,
        conversation: int,
        packed: bool,
        row_length: int,
        num_anchors: int,
        block_size: int,
        seed: int,
        per: Per,
        layout: Layout,
    ) -> list[Any]:
        """The controls of a row and of a draw of blocks on it."""
        last = len(self) - 1
        require("conversation", conversation, Annotated[int, Within(0, last)])
        return [
            slider("conversation", conversation, 0, last),
            checkbox("packed", packed),
            slider("row_length", row_length, 64, 131072, growing=True),
            slider("num_anchors", num_anchors, 1, 4096, growing=True),
            slider("block_size", block_size, 1, 32),
            slider("seed", seed, 0, 99),
            dropdown("per", per, ("row", "document")),
            dropdown("layout", layout, LAYOUTS),
        ]

    def reasons(self, chosen: SimpleNamespace) -> dict[str, str]:
        """Why some of the controls have no effect on a row that holds one conversation."""
        if chosen.packed:
            return {}
        return {"row_length": "not packed", "per": "not packed"}

    def row(self, index: int, packed: bool, row_length: int, context: int | None = None) -> Batch:
        """One row: a conversation alone, or packed with those that follow while they fit."""
        chosen = [_around_answer(self._encoded(index), context)]
        length = len(chosen[0])
        if not packed:
            return one_row(chosen, length, self.pad_token_id)
        if length > row_length:
            what = f"Conversation {index} has {length} tokens and does not fit into a row of"
            raise ValueError(f"{what} {row_length}. Choose a longer row.")
        for later in range(index + 1, len(self)):
            following = _around_answer(self._encoded(later), context)
            length += len(following)
            if length > row_length:
                break
            chosen.append(following)
        return one_row(chosen, row_length, self.pad_token_id)


def _rows_of(item: Chat | Encoded) -> int:
    """How many rows speculators makes of a conversation: one for each answer but an opening one."""
    return 1 if isinstance(item, Encoded) else sum(answer > 0 for answer in item.answers)


def require_some(chats: Sequence[Chat | Encoded]) -> None:
    if len(chats) == 0:
        raise ValueError("chats must hold at least one conversation, got none")


def loaded_tokenizer(tokenizer: Any) -> Any:
    """A tokenizer from itself, its name or folder, or the shipped one."""
    if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
        return load_tokenizer(tokenizer)
    if not hasattr(tokenizer, "pad_token_id"):
        kind = type(tokenizer).__name__
        raise TypeError(f"tokenizer must be a tokenizer, its name or its folder, got {kind}")
    return tokenizer


def _around_answer(encoded: Encoded, context: int | None) -> Encoded:
    """At most ``context`` tokens of a conversation, a third of them before its first answer."""
    if context is None or len(encoded) <= context:
        return encoded
    first_answer = int(encoded.loss_mask.int().argmax())
    first = min(max(0, first_answer - context // 3), len(encoded) - context)
    kept = slice(first, first + context)
    ids, mask = encoded.input_ids[kept], encoded.loss_mask[kept]
    return replace(encoded, input_ids=ids, loss_mask=mask)
