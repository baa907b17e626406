"""Tokens as text that people can read, though a token may end inside a character."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
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
    whole, text, broken, place = begun + own, "", b"", 0
    while place < len(whole):
        character = _character(whole[place : place + 4])
        if character:
            text += _hexadecimal(broken) + character
            broken, place = b"", place + len(character.encode("utf-8"))
        elif _may_go_on(whole[place:]):
            return text + _hexadecimal(broken + whole[max(place, len(begun)) :]), whole[place:]
        else:
            # What a token before this one began, it has shown.
            broken += whole[place : place + 1] if place >= len(begun) else b""
            place += 1
    return text + _hexadecimal(broken), b""


def _character(some: bytes) -> str:
    """The character that bytes begin with; empty for none."""
    for length in range(1, len(some) + 1):
        with suppress(UnicodeDecodeError):
            return some[:length].decode("utf-8")
    return ""


def _may_go_on(some: bytes) -> bool:
    """Whether bytes are the beginning of a character."""
    try:
        return not codecs.getincrementaldecoder("utf-8")().decode(some)
    except UnicodeDecodeError:
        return False


def _hexadecimal(some: bytes) -> str:
    return f"<0x{some.hex().upper()}>" if some else ""


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
