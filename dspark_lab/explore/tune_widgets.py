"""An explorer of choosing for training: what a setting covers, costs and needs, what is advised.

    explore_training_budget(chats, "config.json", tokenizer)

Anchors, block size, row length, packing and card are controls; coverage, gain, cost and what fits
follow them, and below stand the recommendation and the chosen setting for the user's own trainer.
It shows the shipped conversations where nothing is given. Nothing is worked out here: tables come
from ``tune``, ``coverage``, ``cost`` and ``memory``, pictures from ``tune_plots``, text from
``export``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from html import escape
from typing import Any

import ipywidgets
import pandas as pd

from dspark_lab.chats import Chat, Encoded, encode, load_chats, load_tokenizer
from dspark_lab.explore.explorer import WIDE, Explorer, Frame, checkbox, slider
from dspark_lab.explore.plots import png
from dspark_lab.explore.tune_plots import plot_budget
from dspark_lab.model import DrafterConfig
from dspark_lab.tuning import (
    CARDS,
    PER,
    TRAINERS,
    Dtype,
    Per,
    Shape,
    Spans,
    Step,
    StepTime,
    TrainingChoice,
    TrainingSettings,
    choose_training,
    fit_table,
    memory_table,
    never_table,
    row_blocks,
    slot_table,
    supervision_table,
    training_cost,
    usable_bytes,
)
from dspark_lab.tuning import export as exported

__all__ = ["MEASURED", "explore_training_budget"]

# The entry among the cards that stands for the user's own measurement.
MEASURED = "measured here"
_SEQ_LENS = tuple(2**power for power in range(8, 16))
_NUM_ANCHORS = tuple(2**power for power in range(2, 16))
_EXPORTS = ("json", *TRAINERS)
# A row of more blocks takes longer to look at than a slider may.
_MOST_BLOCKS = 2**17

_Chats = str | os.PathLike[str] | Sequence[Chat] | Sequence[Encoded]


def explore_training_budget(
    chats: _Chats | None = None,
    model: Shape | str | os.PathLike[str] | Mapping[str, Any] | DrafterConfig = "qwen3-4b",
    tokenizer: Any = None,
    *,
    num_anchors: int = 512,
    block_size: int = 7,
    seq_len: int = 4096,
    packed: bool = True,
    per: Per = "row",
    batch_size: int = 1,
    card: str | None = None,
    time: StepTime | None = None,
    memory: float | None = None,
    gamma: float = 4.0,
    dtype: Dtype = "bf16",
    export: str = "dspark-lab",
    **options: Any,
) -> Explorer:
    """What a training step on these conversations covers, gains, costs and needs.

    Args:
        chats: conversations, tokens already or not, or a JSONL file of them; the shipped ones where
            None.
        model: a shape, or what :meth:`dspark_lab.tuning.shape.Shape.of` makes one of.
        tokenizer: a tokenizer, its name or folder; the shipped one where None.
        num_anchors, block_size, seq_len, packed, per, batch_size: where the controls start.
        card: where that control starts, one of :data:`~dspark_lab.tuning.shape.CARDS` or, with ``time``,
            "measured here"; the latter or an H100 where None. Of a card's peak a share is assumed.
        time: of steps, as fitted on the user's own device; the choice "measured here".
        memory: bytes of that device; everything fits there where None.
        gamma: of the slots' weights.
        dtype, options: see :class:`dspark_lab.tuning.memory.Step`.
        export: where the control of the text starts: "json", or one of
            :data:`~dspark_lab.tuning.settings.TRAINERS`.

    Returns:
        an explorer whose ``table`` has a line per number of anchors, see
        :func:`dspark_lab.tuning.choice.training`. ``tables`` also has ``recommended`` (its best line, with
        the reason), ``settings`` (the chosen ones), ``coverage``, ``slots`` and ``never`` (of
        tokens), ``cost``, ``memory`` and ``fit``.

    Raises:
        ValueError, TypeError, OSError: conversations, a tokenizer or a model that cannot be read,
            or a start value that cannot be.
    """
    shape = model if isinstance(model, Shape) else Shape.of(model)
    TrainingSettings(num_anchors, block_size, seq_len, batch_size, gamma)
    sizes: dict[str, Any] = {"dtype": dtype, **options}
    Step.of(shape, seq_len, num_anchors, block_size, batch_size=batch_size, **sizes)
    if time is None and memory is not None:
        raise ValueError(f"memory must come with a time, got {memory} without")
    if time is not None and not isinstance(time, StepTime):
        raise TypeError(f"time must be a StepTime, got {type(time).__name__}")
    cards: dict[str, tuple[Any, Any]] = {} if time is None else {MEASURED: (time, memory)}
    cards |= {name: (name, name) for name in CARDS}
    if memory is not None:
        usable_bytes(memory)
    encoded = _encoded(chats, tokenizer)

    @lru_cache(maxsize=8)
    def spans_of(seq_len: int, packed: bool) -> Spans:
        return Spans.of(encoded, seq_len=seq_len, row_length=seq_len if packed else None)

    @lru_cache(maxsize=8)
    def choice_of(
        tried: tuple[int, ...],
        block_size: int,
        seq_len: int,
        packed: bool,
        per: Per,
        batch_size: int,
        card: str,
    ) -> TrainingChoice:
        of_card, its_memory = cards[card]
        return choose_training(
            spans_of(seq_len, packed),
            shape,
            time=of_card,
            memory=its_memory,
            num_anchors=tried,
            block_sizes=(block_size,),
            per=per,
            batch_size=batch_size,
            gamma=gamma,
            **sizes,
        )

    def draw(
        num_anchors: int,
        block_size: int,
        seq_len: int,
        packed: bool,
        per: Per,
        batch_size: int,
        card: str,
        export: str,
    ) -> Frame:
        spans = spans_of(seq_len, packed)
        candidates = int(spans.candidates(per).max())
        if not candidates:
            raise ValueError(
                f"No conversation has two supervised tokens in a row among its first {seq_len:,}: "
                "there is nothing to learn from. Choose a longer row."
            )
        blocks = row_blocks(spans, num_anchors, per)
        if blocks > _MOST_BLOCKS:
            raise ValueError(
                f"{num_anchors:,} anchors for each document are {blocks:,} blocks a row, more than "
                f"{_MOST_BLOCKS:,}. Choose fewer."
            )
        tried = tuple(sorted({num_anchors, *(n for n in _NUM_ANCHORS if n <= candidates)}))
        choice = choice_of(tried, block_size, seq_len, packed, per, batch_size, card)
        chosen = choice.table[choice.table["num_anchors"] == num_anchors].iloc[0]
        longest = int(chosen["seq_len"])
        step = {"num_anchors": blocks, "block_size": block_size, "batch_size": batch_size, **sizes}
        cost = training_cost(shape, seq_len=max(1, round(chosen["row_tokens"])), **step)
        room = cards[card][1] or math.inf
        fit = fit_table(shape, room, _SEQ_LENS, (block_size,), batch_size=batch_size, **sizes)
        settings = TrainingSettings(num_anchors, block_size, seq_len, batch_size, gamma)
        figure = plot_budget(choice.table, cost, fit, num_anchors=num_anchors, at=(longest, blocks))
        return Frame(
            {
                "options": choice.table,
                "recommended": _recommended(choice),
                "settings": pd.DataFrame([asdict(settings)]),
                "coverage": supervision_table(spans, tried, (block_size,), gamma=gamma, per=per),
                "slots": slot_table(spans, num_anchors, block_size, gamma=gamma, per=per),
                "never": never_table(spans),
                "cost": cost,
                "memory": memory_table(shape, seq_len=longest, **step),
                "fit": fit,
            },
            html=_in_words(choice, chosen, settings, per, card, usable_bytes(room))
            + f"<pre>{escape(exported(settings, export))}</pre>",
            png=png(figure, dpi=100),
            alt="what the chosen setting covers, gains, costs and leaves room for",
        )

    controls: dict[str, Any] = {
        "num_anchors": _doublings("num_anchors", num_anchors, _NUM_ANCHORS),
        "block_size": slider("block_size", block_size, 1, 16),
        "seq_len": _doublings("seq_len", seq_len, _SEQ_LENS),
        "packed": checkbox("packed", packed),
        "per": _one_of("per", per, PER),
        "batch_size": slider("batch_size", batch_size, 1, 64),
        "card": _one_of("card", card or (MEASURED if time else "H100"), tuple(cards)),
        "export": _one_of("export", export, _EXPORTS),
    }
    return Explorer("explore_training_budget", controls, draw)


def _encoded(chats: _Chats | None, tokenizer: Any) -> list[Encoded]:
    if chats is None or isinstance(chats, (str, os.PathLike)):
        chats = load_chats(chats)
    if len(chats) == 0:
        raise ValueError("chats must hold at least one conversation, got none")
    if not all(isinstance(chat, Encoded) for chat in chats):
        if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = load_tokenizer(tokenizer)
        return [chat if isinstance(chat, Encoded) else encode(chat, tokenizer) for chat in chats]
    return [chat for chat in chats if isinstance(chat, Encoded)]


def _recommended(choice: TrainingChoice) -> pd.DataFrame:
    best = {} if choice.best is None else choice.best.to_dict()
    return pd.DataFrame([{**best, "sure": choice.sure, "reason": choice.reason}])


def _in_words(
    choice: TrainingChoice,
    chosen: pd.Series,
    settings: TrainingSettings,
    per: Per,
    card: str,
    limit: float,
) -> str:
    """The recommendation, and the chosen setting, in a sentence each."""
    counted = " for each document" if per == "document" else ""
    held, seconds = chosen["memory_bytes"] / 1e9, chosen["seconds"]
    place = "on the device that was measured" if card == MEASURED else f"on {card}"
    room = "" if math.isinf(limit) else f" of {limit / 1e9:.1f} GB that it may take"
    said = (
        f"Chosen: N {settings.num_anchors:,}{counted}, K {settings.block_size}, S "
        f"{settings.seq_len:,} covers {chosen['share']:.0%} of the supervised tokens in a pass; a "
        f"step {place} takes {seconds:.3g} s and {held:.1f} GB{room}"
    )
    if chosen["seq_len"] < settings.seq_len:
        said += f", as the longest row has {chosen['seq_len']:,.0f} tokens"
    said += "." if chosen["fits"] else ": it does not fit."
    return f"<p>{escape(choice.reason)}</p><p>{escape(said)}</p>"


def _doublings(name: str, value: int, options: Sequence[int]) -> ipywidgets.SelectionSlider:
    """A slider of doublings, and of the value that it starts from."""
    return ipywidgets.SelectionSlider(
        options=sorted({*options, value}), value=value, description=name, **WIDE
    )


def _one_of(name: str, value: str, options: Sequence[str]) -> ipywidgets.Dropdown:
    if value not in options:
        raise ValueError(f"{name} must be one of {tuple(options)}, got {value!r}")
    return ipywidgets.Dropdown(options=options, value=value, description=name, **WIDE)
