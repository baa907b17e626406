"""Tokens and their edges in a text, without asking a byte-level tokenizer for offsets.

Where the bytes of the tokens, one after the other, are the text's, they say where each token lies;
tracking offsets costs a tokenizer a fifth of its time, and reading them as much again.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from dspark_lab.chats.display import byte_alphabet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass
class Tokens:
    """What masks read of an encoding; characters that several tokens share belong to each."""

    ids: list[int]
    offsets: Int[np.ndarray, "token 2"]
    tokenizer: Tokenizer

    @cached_property
    def tokens(self) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens(self.ids)

    def char_to_token(self, character: int) -> int | None:
        """The first token that holds a character."""
        inside = (self.offsets[:, 0] <= character) & (self.offsets[:, 1] > character)
        return int(inside.argmax()) if inside.any() else None


class ByteLevel:
    """The tokens of a byte-level tokenizer, with edges from the bytes that each stands for."""

    def __init__(self, tokenizer: Tokenizer, trims: bool) -> None:
        self.tokenizer = tokenizer
        self.bytes = _TokenBytes(tokenizer, trims)

    @staticmethod
    def of(tokenizer: Tokenizer) -> ByteLevel | None:
        """None for a tokenizer of another kind."""
        backend = tokenizer.backend_tokenizer
        if not any('"ByteLevel"' in _state(c) for c in (backend.pre_tokenizer, backend.decoder)):
            return None
        trims = re.search(r'"trim_offsets":\s*true', _state(backend.post_processor)) is not None
        return ByteLevel(tokenizer, trims)

    def encode(self, texts: list[str]) -> list[Any]:
        """Tokens of rendered texts, which have their special tokens already."""
        backend = self.tokenizer.backend_tokenizer
        fast = backend.encode_batch_fast(texts, add_special_tokens=False)
        found = [self._aligned(text, one.ids) for text, one in zip(texts, fast, strict=True)]
        odd = [text for text, tokens in zip(texts, found, strict=True) if tokens is None]
        others = iter(backend.encode_batch(odd, add_special_tokens=False) if odd else [])
        return [next(others) if tokens is None else tokens for tokens in found]

    def _aligned(self, text: str, ids: list[int]) -> Tokens | None:
        written, parts = text.encode(), [*map(self.bytes.__getitem__, ids)]
        if b"".join(parts) != written:
            return None
        edges = np.zeros(len(ids) + 1, np.int64)
        np.fromiter(map(len, parts), np.int64, len(ids)).cumsum(out=edges[1:])
        offsets = np.stack([edges[:-1], edges[1:]], axis=1)
        if len(written) != len(text):
            # The character of each byte, from the bytes that begin one.
            character = ((np.frombuffer(written, np.uint8) & 0xC0) != 0x80).cumsum() - 1
            offsets[:, 0] = character[edges[:-1]]
            offsets[:, 1] = character[edges[1:] - 1] + 1
        return Tokens(ids, offsets, self.tokenizer)


class _TokenBytes(dict[int, bytes]):
    """The bytes of each token, worked out when first asked for.

    No text holds those of a token without any here, which is so found out.
    """

    def __init__(self, tokenizer: Tokenizer, trims: bool) -> None:
        super().__init__(
            (id, str(token).encode()) for id, token in tokenizer.added_tokens_decoder.items()
        )
        self.token, self.trims = tokenizer.backend_tokenizer.id_to_token, trims
        # What is in no such token stands for 256, which is no byte.
        self.spelled = dict.fromkeys(range(256), 256)
        self.spelled |= {ord(character): byte for character, byte in byte_alphabet().items()}

    def __missing__(self, id: int) -> bytes:
        written = b"\xff"
        with suppress(UnicodeEncodeError):
            written = (self.token(id) or "").translate(self.spelled).encode("latin-1") or written
        # The offsets of such a token leave the space at its end out.
        if self.trims and written[-1:] == b" " and written.strip(b" "):
            written = b"\xff"
        self[id] = written
        return written


def _state(component: Any) -> str:
    """What a tokenizer's file says of one of its components."""
    return "" if component is None else component.__getstate__().decode()
