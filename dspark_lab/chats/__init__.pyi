from .chat import Chat, Encoded
from .reading import SHIPPED_CHATS, Chats, Skipped, load_chats
from .rows import Batch, collate, describe, one_row, pack, packed_places
from .tokens import SHIPPED_TOKENIZER, encode, encode_answers, load_tokenizer

__all__ = [
    "Batch",
    "Chat",
    "Chats",
    "Encoded",
    "SHIPPED_CHATS",
    "SHIPPED_TOKENIZER",
    "Skipped",
    "collate",
    "describe",
    "encode",
    "encode_answers",
    "load_chats",
    "load_tokenizer",
    "one_row",
    "pack",
    "packed_places",
]
