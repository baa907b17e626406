"""A tiny random pair whose tokens are words, and what decoding with it gives."""

from functools import cache
from typing import Any

import torch

from dspark_lab.chats import Chat
from dspark_lab.decoding import Decoded, decode
from dspark_lab.model import Drafter, Target
from dspark_lab.pairs import question
from tests.explorers import TOKENIZER
from tests.samples import tiny_drafter, tiny_target

VOCAB = 66
HEADLESS = {"enable_confidence_head": False, "confidence_head_with_markov": False}
# Hot, so that the drafter of a random pair is accepted often enough to have a calibration.
HOT = {"temperature": 1.5, "max_new_tokens": 12}
TEXTS = ["w1 w2 w3", "<b> $x$", "w7 ! w9"]


@cache
def target() -> Target:
    return Target(tiny_target(vocab_size=VOCAB).model, TOKENIZER)


@cache
def drafter(seed: int = 1, **options: Any) -> Drafter:
    made = tiny_drafter(seed, **({"vocab_size": VOCAB, "block_size": 2} | options))
    made.use_target_embeddings(target().embed_weight, target().head_weight)
    if made.confidence_head is not None:
        # A fresh head says 1/2 of everything.
        generator = torch.Generator().manual_seed(seed)
        weight = made.confidence_head.proj.weight
        torch.nn.init.normal_(weight, std=0.1, generator=generator)
    return made.eval()


def to_text(token: int) -> str:
    return str(TOKENIZER.decode([token]))


def ask(text: str, domain: str | None = None, name: str = "chat") -> Chat:
    messages = ({"role": "user", "content": text}, {"role": "assistant", "content": "w5"})
    return Chat(messages, id=name, domain=domain)


QUESTIONS = [ask(f"w{i} w{i + 7} <b>", ("math", "code")[i % 2], f"c{i}") for i in range(24)]


def answers(one: Drafter | None, prompts: Any = QUESTIONS, **options: Any) -> Decoded:
    """What `decode` says to the same questions."""
    asked = [question(p) if isinstance(p, Chat) else p for p in prompts]
    domains = [(p.domain if isinstance(p, Chat) else None) or "none" for p in prompts]
    settings = HOT | {"batch_size": 40} | options
    return decode(target(), one, asked, domains=domains, **settings)
