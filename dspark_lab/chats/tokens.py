"""Conversations as tokens, and which of them the assistant wrote.

The rule of the loss mask, in words. A token is supervised iff it lies wholly inside an assistant
answer as the template writes it, or is the end-of-turn that follows the answer. So a token that
holds characters of prompt and answer together is prompt: the model never generates it. One
exception keeps the first word of an answer: where a template puts a space before the answer that
its generation prompt does not end with, the token that joins that space to the answer is generated
by the model, and is supervised.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dspark_lab.chats.answers import Rendered, render_and_locate
from dspark_lab.chats.reading import Chat
from dspark_lab.checks import Count, checked
from dspark_lab.files import DATA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

SHIPPED_TOKENIZER = DATA / "tokenizer"


@checked
@dataclass(frozen=True, eq=False)
class Encoded:
    """One conversation as tokens, at least one; ``loss_mask`` is True on supervised tokens."""

    input_ids: Int[Tensor, " seq"]
    loss_mask: Bool[Tensor, " seq"]
    chat: Chat

    def __post_init__(self) -> None:
        if not len(self):
            raise ValueError(f"conversation {self.chat.id!r} must hold a token, got none")

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def has_label(self) -> bool:
        """Whether there is anything to train on: two supervised tokens, one after the other."""
        return bool((self.loss_mask[1:] & self.loss_mask[:-1]).any())


@checked
def load_tokenizer(name_or_path: str | os.PathLike[str] | None = None) -> Tokenizer:
    """A fast tokenizer with a chat template, by default the shipped one. None runs its own code."""
    from transformers import AutoTokenizer

    if name_or_path is None:
        name_or_path = SHIPPED_TOKENIZER
    if str(name_or_path).startswith((".", "/", "~")) and not Path(name_or_path).is_dir():
        raise FileNotFoundError(f"there is no folder {name_or_path} with a tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    _check_tokenizer(tokenizer)
    return tokenizer


@checked
def encode(chat: Chat, tokenizer: Tokenizer, max_length: Count | None = None) -> Encoded:
    """The tokens of a conversation, and which of them the assistant wrote.

    ``input_ids`` are those of ``tokenizer.apply_chat_template(messages, tokenize=True)``, the first
    ``max_length`` of them, perhaps none of these supervised.

    The answers are found in the template's text: where its ``{% generation %}`` markers say, or,
    without markers, by rendering the conversation once more with a placeholder for each answer. An
    answer that the template shortens (white space, the thinking of earlier turns) is supervised as
    the template writes it; one that it rewrites beyond recognition is a ValueError. The end-of-turn
    is the special token right behind an answer, or the tokenizer's eos token behind white space;
    markers that enclose it are taken as they are. Behind a cut-off answer it is not supervised.
    """
    from jinja2 import TemplateError

    _check_tokenizer(tokenizer)
    try:
        rendered = render_and_locate(tokenizer, list(chat.messages))
        input_ids, loss_mask = _tokenize_and_mask(tokenizer, rendered, chat.finished)
    except (TemplateError, ValueError) as error:
        refusal = "the chat template refuses it: " if isinstance(error, TemplateError) else ""
        raise ValueError(f"conversation {chat.id!r}: {refusal}{error}") from error
    return Encoded(input_ids[:max_length], loss_mask[:max_length], chat)


def _tokenize_and_mask(
    tokenizer: Tokenizer, rendered: Rendered, finished: bool
) -> tuple[Tensor, Tensor]:
    text = rendered.text
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoding["input_ids"]
    if not ids:
        raise ValueError("the chat template and the tokenizer give no tokens")
    edges = _token_edges(encoding["offset_mapping"], encoding.tokens(), text)
    starts, ends = np.array(edges).T
    closers = _closing_tokens(tokenizer, ids, edges, text)
    loss_mask = np.zeros(len(ids), dtype=bool)
    for start, end in rendered.spans:
        first = start - 1 if rendered.spaced and text.endswith(" ", 0, start) else start
        closer = next((index for index, word in closers if word >= end), None)
        if closer is not None and not rendered.ends_inside:
            gap = text[end : edges[closer][0]]
            if not gap or (gap.isspace() and ids[closer] == tokenizer.eos_token_id):
                loss_mask[closer] = True
                end = edges[closer][1]
        loss_mask |= (starts >= first) & (ends > start) & (ends <= end)
    last = int(loss_mask.nonzero()[0][-1]) if loss_mask.any() else None
    if not finished and any(index == last for index, _ in closers):
        loss_mask[last] = False
    return torch.tensor(ids, dtype=torch.long), torch.from_numpy(loss_mask)


def _closing_tokens(
    tokenizer: Tokenizer, ids: list[int], edges: list[tuple[int, int]], text: str
) -> list[tuple[int, int]]:
    """The tokens that may end a turn: special, and not the start of a sequence.

    Each with the character where it is written: a special token may swallow white space around it.
    """
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    special -= {tokenizer.bos_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    return [
        (index, end - len(text[start:end].lstrip()))
        for index, (start, end) in enumerate(edges)
        if ids[index] in special
    ]


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


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    kind = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer must be a fast one, which knows offsets; got {kind}")
    if not tokenizer.chat_template:
        raise ValueError(f"tokenizer must have a chat template, got {kind} without one")
