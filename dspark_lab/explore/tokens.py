"""One row's tokens under a draw of blocks: as a table, as text in colour, and as a widget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from dspark_lab.blocks import Blocks, Per, times_supervised
from dspark_lab.chats import Batch, token_texts
from dspark_lab.checks import Count, checked, require_columns
from dspark_lab.common import build_anchor_candidate_mask
from dspark_lab.explore.style import BLUE, INK, PAPER, RED, tables_by_name
from dspark_lab.explore.textpicture import COLUMNS, MOST_ROWS, Look, text_figure, text_parts
from dspark_lab.explore.widget import RowView
from dspark_lab.tuning import token_coverage

TOKEN_STATES = ("prompt", "not covered", "covered", "never a label", "padding")
TOKEN_LISTS = ("worst covered", "never a label", "longest gap")

LOOKS = {
    "prompt": Look(PAPER, ink=INK),
    "covered": Look("#D6EAF8", "underline", BLUE),
    "not covered": Look("#FBE7BF", "dashed", "#8A6000"),
    "never a label": Look("#F6DDEB", "double", "#A0437A"),
}
_ANCHOR = Look("#D6EAF8", "frame", RED, strong=True)
_NOTE = Look(PAPER, ink=INK, heading=True)
# A text that is longer than a picture begins so many characters before its first answer.
_BEFORE_ANSWER = 6 * COLUMNS


class TokensView(RowView):
    """The text of a row that can be touched: what covers a token, lists to jump to, a map."""

    names: ClassVar[tuple[str, ...]] = ("shared", "tokens", "tokens_view")


@checked
def token_table(
    batch: Batch,
    blocks: Blocks,
    to_text: Callable[[int], str],
    *,
    row: int = 0,
    num_anchors: Count | None = None,
    per: Per = "row",
) -> pd.DataFrame:
    """The state of each token of one row, before and after a draw of blocks.

    ``to_text`` is ``TokenText(tokenizer)``, or gives the text of a token id. ``document`` is -1 on
    padding, ``p_covered`` the probability that a draw covers the token, of ``num_anchors`` (as many
    as ``blocks`` where None) for the row or for each document (``per``).
    ``state`` is *prompt*, *not covered* or *covered* by this draw, *never a label* (supervised but
    first of its run, so that no anchor reaches it) or *padding*.
    """
    one, drawn = batch.row(row), blocks.row(row)
    found = _token_facts(one, drawn, num_anchors, per)
    token_ids = one.input_ids[0].tolist()
    state = np.array(TOKEN_STATES, dtype=object)[found.pop("state")]
    table = {"position": np.arange(drawn.seq_len), "document": found.pop("document")}
    table |= {"token_id": token_ids, "text": token_texts(to_text, token_ids)}
    return pd.DataFrame(table | found | {"state": state})


def _token_facts(one: Batch, drawn: Blocks, num_anchors: int | None, per: Per) -> dict[str, Any]:
    """Columns of :func:`token_table` as arrays; ``state`` is an index into ``TOKEN_STATES``."""
    seq_len = drawn.seq_len
    supervised = one.loss_mask[0].cpu().numpy()
    candidate = np.zeros(seq_len, dtype=bool)
    candidates = build_anchor_candidate_mask(seq_len, one.loss_mask, one.doc_remaining)
    candidate[: seq_len - 1] = candidates[0].cpu().numpy()
    anchor = np.zeros(seq_len, dtype=bool)
    anchor[drawn.anchor_positions[drawn.block_keep_mask].cpu().numpy()] = True
    padding = ~one.attention_mask[0].cpu().numpy()
    times = times_supervised(drawn)[0].cpu().numpy()
    drawn_of: dict[str, Any] = {"per": per, "layout": drawn.layout}
    chances = token_coverage(one, num_anchors or drawn.num_anchors, drawn.block_size, **drawn_of)
    p_covered = chances[0].cpu().numpy()
    return {
        "document": np.where(padding, -1, drawn.doc_ids[0].cpu().numpy()),
        "supervised": supervised,
        "candidate": candidate,
        "anchor": anchor,
        "times_supervised": times,
        "p_covered": p_covered,
        "state": np.select([padding, ~supervised, times > 0, p_covered <= 0], [4, 0, 2, 3], 1),
    }


@checked
def token_lists(table: pd.DataFrame, *, most: Count = 200) -> pd.DataFrame:
    """Where to look first in a :func:`token_table`: at most ``most`` places of each ``list``.

    *worst covered* are supervised tokens by their probability of being covered, the lowest first,
    *never a label* those that no anchor reaches, *longest gap* runs of tokens that this draw does
    not cover. ``position`` is where a place begins, ``tokens`` how long it is.
    """
    needed = {"position", "document", "text", "p_covered", "state"}
    if missing := sorted(needed - set(table.columns)):
        raise ValueError(f"table must be a token_table, got one without {missing}")
    table = table.assign(tokens=1)
    chance = table["p_covered"].astype(np.float32)
    reached = table[table["state"].isin(["covered", "not covered"])]
    worst = reached.loc[chance[reached.index].sort_values(kind="stable").index]
    open_ = table["state"] == "not covered"
    # A gap never goes on in another document, whose first label has no anchor before it.
    begins = open_ & ~open_.shift(fill_value=False)
    run = begins.cumsum()[open_]
    gaps = table[open_].groupby(run, sort=False)
    longest = table.loc[begins].assign(
        tokens=gaps.size().to_numpy(), text=gaps["text"].sum().to_numpy()
    )
    places = [worst, table[table["state"] == "never a label"]]
    places.append(longest.sort_values("tokens", ascending=False, kind="stable"))
    columns = ["list", "position", "tokens", "text", "p_covered", "document"]
    found = [
        part.head(most).assign(list=name) for name, part in zip(TOKEN_LISTS, places, strict=True)
    ]
    return pd.concat(found, ignore_index=True)[columns]


@checked
def token_row(batch: Batch, to_text: Callable[[int], str], *, row: int = 0) -> dict[str, Any]:
    """One row's tokens as the browser is given them, once: texts, ids, where documents begin."""
    one = batch.row(row)
    ids, lengths = one.input_ids[0], one.seq_lens[0][one.seq_lens[0] > 0]
    return {
        "texts": token_texts(to_text, ids.tolist()),
        "ids": _bytes(ids, np.int32),
        "documents": _bytes(lengths.cumsum(0) - lengths, np.int32),
        "length": int(one.attention_mask[0].sum()),
    }


@checked
def token_state(
    batch: Batch,
    blocks: Blocks,
    *,
    row: int = 0,
    num_anchors: Count | None = None,
    per: Per = "row",
    name: str = "",
) -> dict[str, Any]:
    """What the browser is told of a draw on one row; arguments as :func:`token_table`.

    ``name`` is the mask's, where another stands beside it.
    """
    one, drawn = batch.row(row), blocks.row(row)
    found = _token_facts(one, drawn, num_anchors, per)
    return {
        "name": name,
        "block_size": drawn.block_size,
        "predicted": drawn.predicted,
        "anchors": _bytes(drawn.anchor_positions[0], np.int32),
        "keep": _bytes(drawn.block_keep_mask[0], np.uint8),
        "supervised": _bytes(drawn.eval_mask[0].sum(-1), np.int32),
        "states": _bytes(found["state"], np.uint8),
        "candidates": _bytes(found["candidate"], np.uint8),
        "times": _bytes(found["times_supervised"], np.int32),
        "chances": _bytes(found["p_covered"], np.float32),
    }


def _bytes(values: Any, kind: type) -> bytes:
    array = values.cpu().numpy() if isinstance(values, torch.Tensor) else values
    return array.astype(kind).tobytes()


@checked
def plot_tokens(tables: pd.DataFrame | Mapping[str, pd.DataFrame]) -> Figure:
    """A :func:`token_table` as text in the colours and signs of its states, anchors framed.

    Several tables by name stand one under the other. What is more than a page is left out, first
    of all what stands before the first answer; a note says how much.
    """
    named = tables_by_name(tables, ["text", "state", "anchor", "document"])
    counted = pd.concat(named.values())
    counts = counted["state"].value_counts()
    legend = [(f"{state} {counts[state]:,}", LOOKS[state]) for state in LOOKS if state in counts]
    if counted["anchor"].any():
        legend.append((f"anchor {counted['anchor'].sum():,}", _ANCHOR))
    pieces = []
    for name, table in named.items():
        pieces += [(name, _NOTE)] if name else []
        pieces += _text_pieces(table[table["state"] != "padding"], MOST_ROWS // len(named) - 2)
    return text_figure(pieces, legend, most_rows=2 * MOST_ROWS)


def _text_pieces(table: pd.DataFrame, rows: int) -> list[tuple[str, Look]]:
    """The pieces of a text that fit into so many rows, around its first answer where not all do."""
    pieces = _looked_at(table, 0, rows)
    first = 0
    if _fitting(pieces, rows) < len(pieces) or len(table) > rows * COLUMNS:
        require_columns("tables", table, ["supervised"])
        ends = table["text"].str.len().cumsum()
        answer = ends[table["supervised"]].min() - _BEFORE_ANSWER
        first = int(np.searchsorted(ends, answer)) if answer > 0 else 0
        pieces = _looked_at(table, first, rows)
    pieces = pieces[: _fitting(pieces, rows)]
    left = len(table) - first - sum(not look.heading for _, look in pieces)
    before = [(f"… {first:,} tokens before", _NOTE)] if first else []
    return before + pieces + ([(f"… and {left:,} more tokens", _NOTE)] if left else [])


def _looked_at(table: pd.DataFrame, first: int, rows: int) -> list[tuple[str, Look]]:
    """Tokens from a ``first`` on in their looks, at least as many as fill so many rows."""
    pieces, document = [], 0
    for token in table.iloc[first : first + rows * COLUMNS].itertuples(index=False):
        if token.document != document:
            document = token.document
            pieces.append((f"{'─' * 12} document {document}", _NOTE))
        look = LOOKS[token.state]
        if token.anchor:
            look = replace(look, sign="frame", line=RED, strong=True)
        pieces.append((token.text, look))
    return pieces


def _fitting(pieces: Sequence[tuple[str, Look]], rows: int) -> int:
    """How many pieces stand in so many rows."""
    for part in text_parts(pieces):
        if part.row >= rows:
            return part.number
    return len(pieces)
