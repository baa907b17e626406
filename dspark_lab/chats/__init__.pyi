from .chat import Chat, Encoded
from .compare import compare_masks
from .display import TokenText, token_texts
from .reading import SHIPPED_CHATS, Chats, Skipped, load_chats
from .rows import Batch, collate, describe, fill_rows, one_row, pack, packed_places, packed_rows
from .store import EncodedChats, encode_all
from .stream import offsets, rows_with_labels, seen_tokens, token_chunks, token_counts
from .tokens import SHIPPED_TOKENIZER, encode, encode_answers, encode_rows, load_tokenizer
from .trainers import LIKE, Like

__all__ = [
    "SHIPPED_CHATS",
    "SHIPPED_TOKENIZER",
    "Batch",
    "Chat",
    "Chats",
    "Encoded",
    "EncodedChats",
    "LIKE",
    "Like",
    "Skipped",
    "TokenText",
    "collate",
    "compare_masks",
    "describe",
    "encode",
    "encode_all",
    "encode_answers",
    "fill_rows",
    "encode_rows",
    "load_chats",
    "load_tokenizer",
    "offsets",
    "one_row",
    "pack",
    "packed_places",
    "packed_rows",
    "rows_with_labels",
    "seen_tokens",
    "token_chunks",
    "token_counts",
    "token_texts",
]
