"""Conversations as rows of tokens with a loss mask."""

from dspark_lab.chats.conversations import (
    SHIPPED_CHATS,
    SHIPPED_TOKENIZER,
    Batch,
    Chat,
    Encoded,
    collate,
    describe,
    encode,
    load_chats,
    load_tokenizer,
    one_row,
    pack,
    packed_places,
)

__all__ = [
    "Batch",
    "Chat",
    "Encoded",
    "SHIPPED_CHATS",
    "SHIPPED_TOKENIZER",
    "collate",
    "describe",
    "encode",
    "load_chats",
    "load_tokenizer",
    "one_row",
    "pack",
    "packed_places",
]
