"""Conversations made by hand, with tokens that tell where they come from, and tiny models."""

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dspark_lab.chats import Chat, Encoded
from dspark_lab.model import Drafter, DrafterConfig, Slots, Target

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


def tiny_target(seed: int = 0, vocab_size: int = 64, **options: Any) -> Target:
    """A random Llama of three layers, 32 wide."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        **options,
    )
    return Target(LlamaForCausalLM(config))


def tiny_drafter(seed: int = 0, **options: Any) -> Drafter:
    """A drafter of two layers for the tiny target."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "target_layer_ids": (0, 1),
        "block_size": 3,
        "mask_token_id": 63,
        "num_anchors": 6,
        "markov_rank": 8,
    }
    return Drafter(DrafterConfig(**(values | options)))


def random_chats(count: int, seed: int = 0, low: int = 12, high: int = 40) -> list[Encoded]:
    """Conversations of random tokens, the first four of each a prompt."""
    generator = torch.Generator().manual_seed(seed)
    encoded = []
    for number in range(count):
        length = int(torch.randint(low, high, (1,), generator=generator))
        ids = torch.randint(0, 60, (length,), generator=generator)
        chat = Chat(CHAT.messages, id=f"chat-{number}", domain=("math", "code")[number % 2])
        encoded.append(Encoded(ids, torch.arange(length) > 3, chat))
    return encoded


def slots_of(drafter: Drafter, *arguments: Any, **options: Any) -> Slots:
    """The slots that a training forward makes before it turns them into logits."""
    with mock.patch.object(drafter, "output", lambda slots: slots):
        return drafter(*arguments, **options)


def tell_clock(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[tuple[Any, str], Callable[..., float]]
) -> None:
    """From here on time passes in calls of these functions alone, as many seconds as they say."""
    now = [0.0]

    def timed(call: Callable[..., Any], spent: Callable[..., float]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            now[0] += spent(*args)
            return call(*args, **kwargs)

        return wrapped

    for (owner, name), spent in seconds.items():
        monkeypatch.setattr(owner, name, timed(getattr(owner, name), spent))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
