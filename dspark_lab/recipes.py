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
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from dspark_lab.chats import Chat, encode, load_chats
from dspark_lab.checkpoint import save_drafter
from dspark_lab.drafter import Drafter, DrafterConfig
from dspark_lab.generate import Sampling, generate, make_prompts, model_answer
from dspark_lab.heads import MarkovKind
from dspark_lab.pocket import (
    PocketConfig,
    answer_again,
    perplexity,
    train_target,
    train_tokenizer,
)
from dspark_lab.target import Target, load_smollm2
from dspark_lab.train import TrainConfig, init_from_target, train

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


def make_answers(
    target: Target, taken: Sequence[Chat], folder: Path, *, train: int, held_out: int
) -> None:
    """``train.jsonl`` and ``held_out.jsonl``: fresh prompts, answered by the target itself.

    No question is in both, nor in ``taken``, what the target was trained on.
    """
    assert target.tokenizer is not None
    seen = {_question(chat) for chat in taken}
    for name, count, seed in (("held_out", held_out, 1000), ("train", train, 1001)):
        path = folder / f"{name}.jsonl"
        prompts = []
        for prompt in make_prompts(2 * count, seed):
            if prompt.users[0] not in seen and len(prompts) < count:
                seen.add(prompt.users[0])
                prompts.append(prompt)
        if path.exists():
            continue
        write_chats(answer_again(target.model, target.tokenizer, prompts, seed=seed), path)


def write_chats(chats: Sequence[Chat], path: Path) -> None:
    """As :func:`dspark_lab.chats.load_chats` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for chat in chats:
            record = {"id": chat.id, "domain": chat.domain, "messages": list(chat.messages)}
            line = json.dumps(record | {"finished": chat.finished}, ensure_ascii=False)
            file.write(line + "\n")
    os.replace(partial, path)


def pocket_drafter(
    target: Target, kind: MarkovKind, block_size: int, markov_rank: int = 64
) -> Drafter:
    """A fresh drafter for the pocket target: two layers of the target's own shape."""
    c = target.model.config
    config = DrafterConfig(
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=target.hidden_size // c.num_attention_heads,
        target_layer_ids=tuple(range(target.num_layers - 1)),
        block_size=block_size,
        mask_token_id=target.tokenizer.mask_token_id if target.tokenizer else 0,
        num_anchors=32,
        markov_rank=0 if kind == "none" else markov_rank,
        markov_head_type=kind,
        confidence_head_with_markov=kind != "none",
        rope_theta=10000.0,
        max_position_embeddings=2048,
    )
    drafter = Drafter(config)
    init_from_target(drafter, target)
    return drafter


@dataclass(frozen=True)
class Recipe:
    """A drafter of the pocket target; ``num_anchors`` times ``block_size`` is about the same."""

    kind: MarkovKind
    block_size: int
    num_anchors: int


POCKET_DRAFTERS = {
    "dspark-k7": Recipe("vanilla", 7, 32),
    "dflash-k7": Recipe("none", 7, 32),
    "dspark-k15": Recipe("vanilla", 15, 15),
    "dflash-k15": Recipe("none", 15, 15),
    "gated-k7": Recipe("gated", 7, 32),
    "rnn-k7": Recipe("rnn", 7, 32),
}


def make_pocket_drafter(
    target: Target, folder: Path, name: str, config: TrainConfig, *, progress: bool = True
) -> None:
    """Trains one of ``POCKET_DRAFTERS`` on ``folder/train.jsonl`` into ``folder/<name>``."""
    if (folder / name).exists():
        return
    recipe = POCKET_DRAFTERS[name]
    torch.manual_seed(config.seed)
    drafter = pocket_drafter(target, recipe.kind, recipe.block_size)
    config = replace(config, num_anchors=recipe.num_anchors)
    run = folder / "runs" / name
    begin = time.perf_counter()
    history = train(
        drafter, target, load_chats(folder / "train.jsonl"), config, out=run, progress=progress
    )
    facts = {"seconds": round(time.perf_counter() - begin), **asdict(config)}
    facts["slots"] = int(history.table()["slots"].sum())
    (run / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    save_drafter(drafter, folder / name, dtype=torch.bfloat16)


def _number(chat: Chat) -> int:
    return int(chat.id.rsplit("-", 1)[1])


def _question(chat: Chat) -> str:
    return next(m["content"] for m in chat.messages if m["role"] == "user")
