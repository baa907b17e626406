"""Conversations from memory or from a file of any size, as rows of tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dspark_lab.chats import Chat, Encoded, EncodedChats, Like, encode_all, encode_rows, load_chats
from dspark_lab.checks import checked
from dspark_lab.files import files_of, require_found

ChatsLike = str | os.PathLike[str] | Sequence[Chat | Encoded]
# Larger files (bytes) are never in memory as a whole; smaller ones are read at once, and encoding
# them leaves nothing on disk.
LARGE_FILE = 2**24
# Is told how much is done, of how much, and what.
Counted = Callable[[float, float, str], None]


@checked
def open_chats(
    chats: ChatsLike | None,
    tokenizer: Any,
    max_length: int | None = None,
    like: Like | None = None,
    progress: Counted | None = None,
) -> Sequence[Chat | Encoded]:
    """Conversations as given, or those of a file; the shipped ones where None.

    A large file is encoded on all cores, with a bar or the given ``progress``, and kept in the
    cache of :func:`dspark_lab.encode_all`.
    """
    if chats is not None and not isinstance(chats, (str, os.PathLike)):
        return chats
    if chats is None:
        return load_chats()
    require_found(chats)
    if sum(file.stat().st_size for file in files_of(Path(chats)) if file.is_file()) <= LARGE_FILE:
        return load_chats(chats)

    def count(done: float, total: float) -> None:
        if progress is not None:
            progress(done / 1e6, total / 1e6, "encoding the file: MB")

    shown = True if progress is None else count
    return encode_all(chats, tokenizer, max_length, like=like, progress=shown)


@checked
def encode_chats(
    chats: ChatsLike | None,
    tokenizer: Any,
    max_length: int | None = None,
    like: Like | None = None,
    progress: Counted | None = None,
) -> Sequence[Encoded]:
    """The first ``max_length`` tokens of each conversation, or of each row that ``like`` makes.

    ``progress`` is told how much is done, of how much, and what, and may raise to end it.
    """
    opened = open_chats(chats, tokenizer, max_length, like, progress)
    if isinstance(opened, EncodedChats):
        return opened.cut(max_length)
    if tokenizer is None and any(isinstance(chat, Chat) for chat in opened):
        raise ValueError("the target has no tokenizer: pass encoded conversations")
    rows: list[Encoded] = []
    for done, chat in enumerate(opened):
        if progress is not None:
            progress(done, len(opened), "encoding conversation")
        rows += encode_rows(chat, tokenizer, max_length, like=like)
    return rows
