"""Conversations as tokens, and which of them are supervised.

A token is supervised iff it lies wholly inside what the model itself generates
(:mod:`dspark_lab.chats.answers`). So a token that holds characters of prompt and answer together is
prompt: the model never generates it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch

from dspark_lab.chats.answers import Rendered, render
from dspark_lab.chats.chat import Chat, Encoded
from dspark_lab.chats.plans import Plan, run_plans, tokenize
from dspark_lab.chats.trainers import Like, trainer_plan
from dspark_lab.checks import Count, checked
from dspark_lab.files import DATA, not_in_folder

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase as Tokenizer

SHIPPED_TOKENIZER = DATA / "tokenizer"


@checked
def load_tokenizer(name_or_path: str | os.PathLike[str] | None = None) -> Tokenizer:
    """A fast tokenizer with a chat template, by default the shipped one. None runs its own code."""
    from transformers import AutoTokenizer

    if name_or_path is None:
        name_or_path = SHIPPED_TOKENIZER
    if str(name_or_path).startswith((".", "/", "~")) and not Path(name_or_path).is_dir():
        raise not_in_folder(Path(name_or_path), "a tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    check_tokenizer(tokenizer)
    return tokenizer


@overload
def encode(
    chat: Chat | Encoded,
    tokenizer: Tokenizer,
    max_length: int | None = None,
    *,
    like: Literal["speculators"],
    markers: bool = False,
    last_answer_only: bool = False,
    template_options: Mapping[str, Any] | None = None,
) -> list[Encoded]: ...


@overload
def encode(
    chat: Chat | Encoded,
    tokenizer: Tokenizer,
    max_length: int | None = None,
    *,
    like: Literal["automodel", "deepspec", "specforge"] | None = None,
    markers: bool = False,
    last_answer_only: bool = False,
    template_options: Mapping[str, Any] | None = None,
) -> Encoded: ...


@checked
def encode(
    chat: Chat | Encoded,
    tokenizer: Tokenizer,
    max_length: Count | None = None,
    *,
    like: Like | None = None,
    markers: bool = False,
    last_answer_only: bool = False,
    template_options: Mapping[str, Any] | None = None,
) -> Encoded | list[Encoded]:
    """Tokenize a conversation and mark which tokens are supervised: those that the model generates.

    ``input_ids`` are those of ``tokenizer.apply_chat_template(messages, tokenize=True)``, the first
    ``max_length`` of them, perhaps none of these supervised. A row that is encoded already passes
    through, cut to ``max_length``.

    A token is supervised where the model itself has to generate it when it serves: from the end of
    the generation prompt to the last marker that closes the turn, with what the template writes
    before the answer's words (channel markers, an empty block of thinking). Where the prompt is no
    prefix of the conversation, what the two share counts; where that ends inside the answer, the
    conversation is refused. So is one without an answer, and one of which the template does not
    write a message, a tool, or a field of a message. Messages that ``chat.supervised`` leaves out
    are not supervised, nor are the closing markers of a last answer that was cut off.

    Where the template leaves out thinking of answers that others follow, the row's ``left_out``
    counts these answers and a UserWarning says so, once for each place that calls.
    :func:`encode_answers` gives each answer as it was generated.

    Args:
        like: give the row that another trainer makes of the conversation, tokens and mask
            (:mod:`dspark_lab.chats.trainers`), and refuse what it refuses. ``"speculators"`` makes
            a list of rows, one for each answer. DeepSpec and SpecForge look for the markers of a
            family of chat templates, which is told by what the template writes; one of another
            family is refused. No trainer reads ``chat.supervised`` or ``chat.finished``.
        markers: supervise what the template's ``{% generation %}`` markers enclose instead.
        last_answer_only: supervise only the last answer.
        template_options: such as ``{"enable_thinking": False}``; the template must read them.
    """
    options: dict[str, Any] = {"markers": markers, "last_answer_only": last_answer_only}
    options["template_options"] = template_options
    rows = encode_rows(chat, tokenizer, max_length, like=like, **options)
    if like == "speculators":
        return rows
    (encoded,) = rows
    if encoded.left_out and isinstance(chat, Chat):
        warnings.warn(LEFT_OUT, stacklevel=3)
    return encoded


LEFT_OUT = (
    "the chat template leaves out a part of answers that others follow, such as thinking: their "
    "rows count them as left_out; encode_answers gives a row for each answer as it was generated"
)


@checked
def encode_answers(
    chat: Chat | Encoded,
    tokenizer: Tokenizer,
    max_length: Count | None = None,
    *,
    template_options: Mapping[str, Any] | None = None,
    last_answer_only: bool = False,
) -> list[Encoded]:
    """Encode each answer as it was generated: a row that ends with it and supervises it alone.

    A row's ``chat`` holds the messages up to the answer, and its ``id`` is the conversation's. An
    answer that ``chat.supervised`` leaves out has no row. A row that is encoded already stays one.
    """
    if isinstance(chat, Encoded):
        return [cut(chat, max_length)]
    rows = []
    answers = chat.answers
    for answer in answers[-1:] if last_answer_only else answers:
        if chat.supervised is None or chat.supervised[answer]:
            part = chat.up_to(answer)
            options: dict[str, Any] = {"template_options": template_options}
            rows += encode_rows(part, tokenizer, max_length, last_answer_only=True, **options)
    if not answers:
        raise ValueError(f"conversation {chat.id!r} holds no answer of the assistant")
    if any(row.left_out for row in rows):
        warnings.warn(
            "the chat template leaves out a part of answers, wherever they stand", stacklevel=3
        )
    return rows


@checked
def encode_rows(
    chat: Chat | Encoded,
    tokenizer: Tokenizer,
    max_length: Count | None = None,
    *,
    like: Like | None = None,
    markers: bool = False,
    last_answer_only: bool = False,
    template_options: Mapping[str, Any] | None = None,
) -> list[Encoded]:
    """What :func:`encode` gives, as a list in any case, and without its warning."""
    options: dict[str, Any] = {"like": like, "markers": markers}
    options |= {"last_answer_only": last_answer_only, "template_options": template_options}
    check_options(like, markers)
    if isinstance(chat, Encoded):
        return [cut(chat, max_length)]
    check_tokenizer(tokenizer)
    plan = row_plan(chat, tokenizer, max_length, **options)
    (rows,) = run_plans([plan], partial(tokenize, tokenizer=tokenizer))
    if isinstance(rows, ValueError):
        raise rows
    return [
        Encoded(
            torch.tensor(ids, dtype=torch.long),
            torch.as_tensor(mask, dtype=torch.bool),
            chat,
            left_out=left_out,
            marker_differences=differences,
        )
        for ids, mask, left_out, differences in rows
    ]


def check_options(like: Like | None, markers: bool) -> None:
    if like is not None and markers:
        raise ValueError(f"markers must be False with like={like!r}, which has a mask already")


def row_plan(
    chat: Chat | Encoded,
    tokenizer: Tokenizer,
    max_length: int | None,
    *,
    like: Like | None,
    markers: bool,
    last_answer_only: bool,
    template_options: Mapping[str, Any] | None,
) -> Plan[tuple[Any, Any, int, int]]:
    """The rows of one conversation: ids, mask, ``left_out`` and ``marker_differences``."""
    if isinstance(chat, Encoded):
        row = cut(chat, max_length)
        return [(row.input_ids, row.loss_mask, row.left_out, row.marker_differences)]
    options: dict[str, Any] = {"last_answer_only": last_answer_only}
    options["template_options"] = template_options
    if like is not None:
        rows = yield from trainer_plan(chat, tokenizer, like, max_length, **options)
        return [(ids, mask, 0, 0) for ids, mask, *_ in rows]
    rendered = render(chat, tokenizer, markers=markers, **options)
    (encoding,) = yield [rendered.text]
    ids, mask = mask_tokens(rendered, encoding)
    if not ids:
        what = "the chat template and the tokenizer give no tokens"
        raise ValueError(f"conversation {chat.id!r}: {what}")
    kept = slice(max_length)
    differences = 0
    if rendered.others is not None:
        others = mask_tokens(replace(rendered, spans=rendered.others), encoding)[1]
        differences = int((mask != others)[kept].sum())
    return [(ids[kept], mask[kept], rendered.left_out, differences)]


def cut(encoded: Encoded, max_length: int | None) -> Encoded:
    """The first ``max_length`` tokens of a row."""
    if max_length is None or len(encoded) <= max_length:
        return encoded
    ids, mask = encoded.input_ids[:max_length], encoded.loss_mask[:max_length]
    return replace(encoded, input_ids=ids, loss_mask=mask)


def mask_tokens(rendered: Rendered, encoding: Encoding) -> tuple[list[int], np.ndarray]:
    """Token ids, and which of the tokens lie wholly inside one of the supervised spans."""
    text, ids = rendered.text, encoding.ids
    starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    if len(ids) and (starts[0] > 0 or (starts[1:] > ends[:-1]).any()):
        starts, ends = np.array(_token_edges(encoding.offsets, encoding.tokens, text)).T
    mask = np.zeros(len(ids), dtype=bool)
    for first, last in rendered.spans:
        mask |= (starts >= first) & (ends > first) & (ends <= last)
        # A marker that swallows the white space beside it is written where its own text stands.
        for border in np.flatnonzero(((starts < first) & (ends > first)) | (ends > last)).tolist():
            if starts[border] >= last:
                break
            written = text[starts[border] : ends[border]]
            start = starts[border] + len(written) - len(written.lstrip())
            end = start + len(written.strip())
            inside = first <= start and end <= last
            mask[border] |= inside and encoding.tokens[border].strip() == written.strip()
    return ids, mask


def _token_edges(
    offsets: list[tuple[int, int]], tokens: list[str], text: str
) -> list[tuple[int, int]]:
    """First character and one past the last of each token, the spaces before a word included.

    Some byte-level tokenizers leave a token's leading spaces (written "Ġ") out of its offsets; they
    are put back, since they decide whether a token reaches into the prompt.
    """
    edges, previous = [], 0
    for (start, end), token in zip(offsets, tokens, strict=True):
        if start > previous and token.startswith("Ġ"):
            spaces = len(token) - len(token.lstrip("Ġ"))
            while spaces and start > previous and text[start - 1] == " ":
                start, spaces = start - 1, spaces - 1
        edges.append((start, end))
        previous = end
    return edges


def check_tokenizer(tokenizer: Tokenizer) -> None:
    kind = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer must be a fast one, which knows offsets; got {kind}")
    if not tokenizer.chat_template:
        raise ValueError(f"tokenizer must have a chat template, got {kind} without one")
