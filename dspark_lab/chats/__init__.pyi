from .reading import SHIPPED_CHATS, Chat, load_chats
from .rows import Batch, collate, describe, fill_rows, one_row, pack, packed_places, packed_rows
from .tokens import SHIPPED_TOKENIZER, Encoded, encode, load_tokenizer

__all__ = [
    "Batch",
    "Chat",
    "Encoded",
    "SHIPPED_CHATS",
    "SHIPPED_TOKENIZER",
    "collate",
    "describe",
    "encode",
    "fill_rows",
    "load_chats",
    "load_tokenizer",
    "one_row",
    "pack",
    "packed_places",
    "packed_rows",
]
