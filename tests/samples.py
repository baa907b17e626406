"""Conversations made by hand, with tokens that tell where they come from."""

import torch

from dspark_lab.chats import Chat, Encoded

CHAT = Chat(({"role": "assistant", "content": ""},), id="hand-made")


def documents(*marks: str) -> list[Encoded]:
    """Documents of as many tokens as there are characters, supervised where they are ``a``.

    No two tokens have the same id, so that a token tells where it comes from.
    """
    encoded, first = [], 0
    for mark in marks:
        ids = torch.arange(first, first + len(mark))
        encoded.append(Encoded(ids, torch.tensor([c == "a" for c in mark]), CHAT))
        first += len(mark)
    return encoded
