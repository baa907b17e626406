"""Tokens and their edges in a text, without asking a byte-level tokenizer for offsets.

Where the bytes of the tokens, one after the other, are the text's, they say where each token lies;
tracking offsets costs a tokenizer a fifth of its time, and reading them as much again.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
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
    """The bytes of each token of a byte-level tokenizer."""

    def __init__(self, tokenizer: Tokenizer, trims: bool) -> None:
        self.tokenizer = tokenizer
        # What is in no such token stands for 256, which is no byte.
        spelled = dict.fromkeys(range(256), 256)
        spelled |= {ord(character): byte for character, byte in byte_alphabet().items()}
        added = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items()}
        vocabulary = tokenizer.get_vocab()
        # No text holds what has no bytes here, so a token without any is found out.
        self.bytes = [b"\xff"] * (1 + max(vocabulary.values()))
        for token, id in vocabulary.items():
            if id in added:
                self.bytes[id] = added[id].encode()
                continue
            with suppress(UnicodeEncodeError):
                self.bytes[id] = token.translate(spelled).encode("latin-1")
            # The offsets of such a token leave the space at its end out.
            if trims and self.bytes[id][-1:] == b" " and self.bytes[id].strip(b" "):
                self.bytes[id] = b"\xff"
        self.lengths = np.array([len(written) for written in self.bytes])

    @staticmethod
    @lru_cache(maxsize=4)
    def of(tokenizer: Tokenizer, written: str) -> ByteLevel | None:
        """The bytes of a tokenizer's tokens; None where it is of another kind.

        ``written`` is its backend as JSON.
        """
        state = json.loads(written)
        kinds = list(_parts(state.get("pre_tokenizer"))) + list(_parts(state.get("decoder")))
        if not any(part.get("type") == "ByteLevel" for part in kinds):
            return None
        after = _parts(state.get("post_processor"))
        return ByteLevel(tokenizer, any(part.get("trim_offsets") for part in after))

    def encode(self, texts: list[str]) -> list[Any]:
        """Tokens of rendered texts, which have their special tokens already."""
        backend = self.tokenizer.backend_tokenizer
        found = [
            self._aligned(text, encoding.ids)
            for text, encoding in zip(
                texts, backend.encode_batch_fast(texts, add_special_tokens=False), strict=True
            )
        ]
        odd = [text for text, tokens in zip(texts, found, strict=True) if tokens is None]
        others = iter(backend.encode_batch(odd, add_special_tokens=False) if odd else [])
        return [next(others) if tokens is None else tokens for tokens in found]

    def _aligned(self, text: str, ids: list[int]) -> Tokens | None:
        written = text.encode()
        if b"".join([self.bytes[id] for id in ids]) != written:
            return None
        ends = self.lengths[ids].cumsum() if ids else np.empty(0, np.int64)
        offsets = np.stack([np.concatenate([[0], ends[:-1]])[: len(ids)], ends], axis=1)
        if len(written) != len(text):
            # The character of each byte, from the bytes that begin one.
            character = ((np.frombuffer(written, np.uint8) & 0xC0) != 0x80).cumsum() - 1
            offsets[:, 0] = character[offsets[:, 0]]
            offsets[:, 1] = character[ends - 1] + 1
        return Tokens(ids, offsets, self.tokenizer)


def _parts(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A component of a tokenizer's file, or those of a sequence."""
    if component is None:
        return []
    for name in ("pretokenizers", "processors", "decoders"):
        if name in component:
            return [part for inner in component[name] for part in _parts(inner)]
    return [component]
