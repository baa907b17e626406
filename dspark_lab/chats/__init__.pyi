from .chat import Chat, Encoded
from .display import TokenText, token_texts
from .reading import SHIPPED_CHATS, Chats, Skipped, load_chats
from .rows import Batch, collate, describe, fill_rows, one_row, pack, packed_places, packed_rows
from .tokens import SHIPPED_TOKENIZER, encode, encode_answers, load_tokenizer

__all__ = [
    "SHIPPED_CHATS",
    "SHIPPED_TOKENIZER",
    "Batch",
    "Chat",
    "Chats",
    "Encoded",
    "Skipped",
    "TokenText",
    "collate",
    "describe",
    "encode",
    "encode_answers",
    "fill_rows",
    "load_chats",
    "load_tokenizer",
    "one_row",
    "pack",
    "packed_places",
    "packed_rows",
    "token_texts",
]
