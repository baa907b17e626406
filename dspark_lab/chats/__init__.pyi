from .chat import Chat, Encoded
from .reading import SHIPPED_CHATS, load_chats
from .rows import Batch, collate, describe, one_row, pack, packed_places
from .tokens import SHIPPED_TOKENIZER, encode, load_tokenizer

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
