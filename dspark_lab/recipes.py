"""How the trained pairs in data/ were made, each as one command that goes on where it stopped.

    python -m dspark_lab.recipes pocket       the pocket target and its six drafters
    python -m dspark_lab.recipes smollm2      the drafter of SmolLM2-135M-Instruct

A recipe is a row of stages; each writes its files into the work folder and is skipped where they
are there already. This file knows the recipes' settings; what a stage does is known elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dspark_lab.chats import Chat, encode, load_chats
from dspark_lab.generate import Sampling, generate, make_prompts, model_answer
from dspark_lab.pocket import PocketConfig, perplexity, train_target, train_tokenizer
from dspark_lab.target import load_smollm2

# The shipped conversations of each domain from this number on are held out, and so is whoever asks
# the same question.
FIRST_HELD_OUT = 201


@dataclass(frozen=True)
class Corpus:
    """More conversations of SmolLM2: prompts of a seed, without second questions."""

    seed: int
    temperature: float
    count: int = 576


CORPORA = (Corpus(1, 0.7), Corpus(2, 0.7), Corpus(3, 0.7), Corpus(4, 0.3))


def make_corpora(work: Path, corpora: Sequence[Corpus] = CORPORA) -> list[Path]:
    """SmolLM2 answers the prompts, in bfloat16, one attempt each; about ten minutes a corpus."""
    paths = []
    for corpus in corpora:
        path = work / "corpus" / f"seed-{corpus.seed}.jsonl"
        paths.append(path)
        if path.exists() and len(load_chats(path)) == corpus.count:
            continue
        model, tokenizer = load_smollm2(dtype=torch.bfloat16)
        answer = model_answer(model, tokenizer, Sampling(temperature=corpus.temperature))
        prompts = make_prompts(corpus.count, corpus.seed, follow_up_share=0.0)
        generate(path, prompts, answer, corpus.seed, batch_size=192, attempts=1)
    return paths


def split_chats(paths: Sequence[Path]) -> tuple[list[Chat], list[Chat]]:
    """Conversations to train on, and the held-out ones; no question is in both."""
    shipped = load_chats()
    held_out = [chat for chat in shipped if _number(chat) >= FIRST_HELD_OUT]
    train = [chat for chat in shipped if _number(chat) < FIRST_HELD_OUT]
    for path in paths:
        train += [
            Chat(chat.messages, f"{path.stem}/{chat.id}", chat.domain, chat.finished)
            for chat in load_chats(path)
        ]
    seen = {_question(chat) for chat in held_out}
    kept = []
    for chat in train:
        if _question(chat) not in seen:
            seen.add(_question(chat))
            kept.append(chat)
    return kept, held_out


def make_pocket_target(
    train: Sequence[Chat], held_out: Sequence[Chat], folder: Path, config: PocketConfig
) -> None:
    """Tokenizer and target, with ``facts.json`` for the card."""
    if folder.exists():
        return
    tokenizer = train_tokenizer(train, config.vocab_size)
    encoded = [encode(chat, tokenizer) for chat in train]
    others = [encode(chat, tokenizer) for chat in held_out]
    model = train_target(encoded, config)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "conversations": len(train),
        "tokens": sum(map(len, encoded)),
        "tokens_seen": config.steps * config.rows * config.row_length,
        "held_out_conversations": len(held_out),
        "held_out_perplexity": round(perplexity(model, others), 3),
        "train_perplexity": round(perplexity(model, encoded[: len(others)]), 3),
    }
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder)


def _number(chat: Chat) -> int:
    return int(chat.id.rsplit("-", 1)[1])


def _question(chat: Chat) -> str:
    return next(m["content"] for m in chat.messages if m["role"] == "user")
