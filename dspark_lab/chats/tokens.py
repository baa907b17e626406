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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dspark_lab.chats.answers import Rendered, render
from dspark_lab.chats.chat import Chat, Encoded
from dspark_lab.checks import Count, checked
from dspark_lab.files import DATA

if TYPE_CHECKING:
    from tokenizers import Encoding as TokenizersEncoding
    from transformers import PreTrainedTokenizerBase as Tokenizer

SHIPPED_TOKENIZER = DATA / "tokenizer"


@checked
def load_tokenizer(name_or_path: str | os.PathLike[str] | None = None) -> Tokenizer:
    """A fast tokenizer with a chat template, by default the shipped one. None runs its own code."""
    from transformers import AutoTokenizer

    if name_or_path is None:
        name_or_path = SHIPPED_TOKENIZER
    if str(name_or_path).startswith((".", "/", "~")) and not Path(name_or_path).is_dir():
        raise FileNotFoundError(f"there is no folder {name_or_path} with a tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    check_tokenizer(tokenizer)
    return tokenizer


@checked
def encode(
    chat: Chat | Encoded,
    tokenizer: Tokenizer,
    max_length: Count | None = None,
    *,
    markers: bool = False,
    last_answer_only: bool = False,
    template_options: dict[str, Any] | None = None,
) -> Encoded:
    """SKELETON."""
    if isinstance(chat, Encoded):
        return cut(chat, max_length)
    check_tokenizer(tokenizer)
    options = {"markers": markers, "last_answer_only": last_answer_only}
    rendered = render(chat, tokenizer, **options, template_options=template_options)
    encodings = tokenize([rendered.text], tokenizer)
    return encoded_row(rendered, encodings[0], tokenizer, chat, max_length)


def tokenize(texts: list[str], tokenizer: Tokenizer) -> Sequence[TokenizersEncoding]:
    """The tokens of each text with their offsets; special tokens are those in the text."""
    done: Any = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return done.encodings


def encoded_row(
    rendered: Rendered,
    encoding: TokenizersEncoding,
    tokenizer: Tokenizer,
    chat: Chat,
    max_length: int | None = None,
) -> Encoded:
    """The row of a rendered conversation from its text's tokens."""
    ids, mask = mask_tokens(rendered, encoding, tokenizer)
    rows = torch.tensor(ids, dtype=torch.long), torch.from_numpy(mask)
    return Encoded(rows[0][:max_length], rows[1][:max_length], chat, left_out=rendered.left_out)


def cut(encoded: Encoded, max_length: int | None) -> Encoded:
    """The first ``max_length`` tokens of a row."""
    if max_length is None or len(encoded) <= max_length:
        return encoded
    ids, mask = encoded.input_ids[:max_length], encoded.loss_mask[:max_length]
    return replace(encoded, input_ids=ids, loss_mask=mask)


def mask_tokens(
    rendered: Rendered, encoding: TokenizersEncoding, tokenizer: Tokenizer
) -> tuple[list[int], np.ndarray]:
    """Token ids, and which of them lie wholly inside one of the supervised spans."""
    ids = encoding.ids
    edges = _token_edges(encoding.offsets, encoding.tokens, rendered.text)
    starts, ends = np.array(edges).T
    mask = np.zeros(len(ids), dtype=bool)
    for start, end in rendered.spans:
        mask |= (starts >= start) & (ends > start) & (ends <= end)
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
