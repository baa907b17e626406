"""Tokens as text that people can read, though a token may end inside a character."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from dspark_lab.checks import checked


@checked
class TokenText:
    """The text of a tokenizer's tokens, each by itself or as they follow on each other.

    A token shows the characters that it completes, each of them once: the bytes of one character,
    split over several tokens, are joined, and shown with the last of these. Bytes that complete
    none are shown as hexadecimal, ``<0xF09F>``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._bytes = cache(_reader(tokenizer))
        self._alone = cache(lambda token: _read(b"", self._bytes(token)))

    def __call__(self, token: int) -> str:
        """The text of a token by itself."""
        return self._alone(token)[0]

    def of(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token of a sequence."""
        texts, begun = [], b""
        for token in tokens:
            text, begun = _read(begun, self._bytes(token)) if begun else self._alone(token)
            texts.append(text)
        return texts


@checked
def token_texts(to_text: Callable[[int], str], tokens: Sequence[int]) -> list[str]:
    """The text of each token of a sequence: as :class:`TokenText` joins them, or one by one."""
    return to_text.of(tokens) if isinstance(to_text, TokenText) else list(map(to_text, tokens))


def _read(begun: bytes, own: bytes) -> tuple[str, bytes]:
    """What a token shows, and the character that it begins, behind one that was begun before."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text = decoder.decode(begun + own)
    rest = decoder.getstate()[0]
    escaped = text + rest.decode("ascii", "surrogateescape")
    # What a token before this one began and none completes, that one has shown.
    shown = re.match(rf"[\udc80-\udcff]{{0,{len(begun)}}}", escaped)
    return re.sub(r"[\udc80-\udcff]+", _hexadecimal, escaped[shown.end() if shown else 0 :]), rest


def _hexadecimal(broken: re.Match[str]) -> str:
    return f"<0x{broken[0].encode('ascii', 'surrogateescape').hex().upper()}>"


def _reader(tokenizer: Any) -> Callable[[int], bytes]:
    """A function that gives the bytes a token stands for."""
    added = {
        id: token.content for id, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
    }
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    state = decoder.__getstate__().decode("utf-8") if decoder is not None else ""
    spelled = byte_alphabet()

    def read(token: int) -> bytes:
        piece = added.get(token) or (tokenizer.convert_ids_to_tokens(token) if state else None)
        if isinstance(piece, str):
            if "ByteFallback" in state and (found := re.fullmatch("<0x([0-9A-F]{2})>", piece)):
                return bytes.fromhex(found[1])
            if token in added:
                return piece.encode("utf-8")
            if "ByteLevel" in state and spelled.keys() >= set(piece):
                return bytes(spelled[character] for character in piece)
            if "▁" in state:
                return piece.replace("▁", " ").encode("utf-8")
        return str(tokenizer.decode([token])).encode("utf-8")

    return read


def byte_alphabet() -> dict[str, int]:
    """The character that byte-level tokens spell each byte with, as GPT-2 does."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }
