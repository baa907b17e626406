"""How the trained pairs in data/ were made, each as one command that goes on where it stopped.

    python -m data.make.recipes pocket       the pocket target and its six drafters
    python -m data.make.recipes smollm2      the drafter of SmolLM2-135M-Instruct
    python -m data.make.recipes pocket --traces    their traces alone
    python -m data.make.recipes pocket --engine    what decoding takes on this machine, alone

A recipe is a list of stages; each writes its files into the work folder and is skipped where they
are there already.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from data.make.cards import pocket_card, smollm2_card
from data.make.generate import (
    Prompt,
    Sampling,
    complete_folder,
    distinct_prompts,
    generate,
    make_prompts,
    model_answer,
    write_records,
)
from data.make.pocket import (
    MASK,
    PocketConfig,
    answer_again,
    perplexity,
    sharpen_,
    train_target,
    train_tokenizer,
)
from dspark_lab.chats import SHIPPED_CHATS, Chat, Encoded, encode, load_chats
from dspark_lab.decoding import decode, save_trace
from dspark_lab.model import (
    Drafter,
    MarkovKind,
    Target,
    load_drafter,
    load_smollm2,
    load_target,
    save_drafter,
    save_tokenizer,
)
from dspark_lab.pairs import TRACES, drafter_names, in_turns, load_pair, question, split_chats
from dspark_lab.rates import evaluate
from dspark_lab.serving import ENGINE, measure_engine
from dspark_lab.training import TrainConfig, new_drafter, train


@dataclass(frozen=True)
class Corpus:
    """More conversations of SmolLM2: prompts of a seed, without second questions."""

    seed: int
    sampling: Sampling
    count: int = 576


# At temperature 1 with nothing cut off, as in a teacher-forced evaluation at temperature 1.
UNCUT = Sampling(temperature=1.0, top_k=49152, top_p=1.0, max_new_tokens=256)
CORPORA = (
    *(Corpus(seed, Sampling()) for seed in (1, 2, 3)),
    Corpus(4, Sampling(temperature=0.3)),
    *(Corpus(seed, UNCUT, count=384) for seed in (5, 6)),
)


def make_corpora(work: Path, corpora: Sequence[Corpus] = CORPORA) -> list[Path]:
    """SmolLM2 answers the prompts, in bfloat16, one attempt each; about ten minutes a corpus."""
    paths = []
    for corpus in corpora:
        path = work / "corpus" / f"seed-{corpus.seed}.jsonl"
        paths.append(path)
        if path.exists() and len(load_chats(path)) == corpus.count:
            continue
        model, tokenizer = load_smollm2(dtype=torch.bfloat16)
        answer = model_answer(model, tokenizer, corpus.sampling)
        prompts = make_prompts(corpus.count, corpus.seed, follow_up_share=0.0)
        generate(path, prompts, answer, corpus.seed, batch_size=192, attempts=1)
    return paths


# The questions of the pocket pair: templates whose answers are short and mostly end.
POCKET_TEMPLATES = {
    "math": (0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 17, 24),
    "code": (2, 3, 5, 6, 7, 12, 13, 15, 17, 34, 37, 38),
    "chat": (0, 1, 2, 4, 5, 6, 7, 9, 10, 11, 24, 44),
}
POCKET_QUESTIONS = Sampling(temperature=0.2, max_new_tokens=160)


def make_pocket_corpus(work: Path, most: int = 60) -> Path:
    """``corpus.jsonl``: SmolLM2's answers to up to ``most`` questions of each template."""
    path = work / "corpus.jsonl"
    if not path.exists():
        answer = model_answer(*load_smollm2(dtype=torch.bfloat16), POCKET_QUESTIONS)
        prompts = distinct_prompts(POCKET_TEMPLATES, most, seed=0)
        partial = path.with_suffix(".growing")
        generate(partial, prompts, answer, seed=0, batch_size=192, attempts=1)
        os.replace(partial, path)
    return path


def split_questions(path: Path) -> tuple[list[Chat], list[Chat]]:
    """Conversations to train on, and every eighth, which is held out."""
    chats = load_chats(path).conversations
    return [chat for number, chat in enumerate(chats) if number % 8 != 7], chats[7::8]


def make_pocket_target(
    train: Sequence[Chat], held_out: Sequence[Chat], folder: Path, config: PocketConfig
) -> None:
    """Tokenizer and target, with ``facts.json`` for the card."""
    if folder.exists():
        return
    tokenizer = train_tokenizer(train, config.vocab_size)
    encoded = [encode(chat, tokenizer) for chat in train]
    others = [encode(chat, tokenizer) for chat in held_out]
    begin = time.perf_counter()
    # Rounded to what ships, before anything is measured or answered with it.
    model = train_target(encoded, config).bfloat16().float()
    seconds = time.perf_counter() - begin
    sharp = perplexity(model, others)
    trained = perplexity(sharpen_(copy.deepcopy(model), 1 / config.temperature), others)
    facts = {
        "seconds": round(seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "conversations": len(train),
        "tokens": sum(map(len, encoded)),
        "tokens_seen": config.steps * config.rows * config.row_length,
        "temperature": config.temperature,
        "held_out_conversations": len(held_out),
        "held_out_perplexity": round(sharp, 2),
        "trained_perplexity": round(trained, 2),
    }
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.bfloat16().save_pretrained(partial)
    save_tokenizer(tokenizer, partial)
    _write_facts(partial, facts)
    os.replace(partial, folder)


def make_answers(target: Target, chats: Sequence[Chat], path: Path, *, samples: int = 1) -> None:
    """The target's own answers to the conversations' first questions, ``samples`` to each."""
    assert target.tokenizer is not None
    if path.exists():
        return
    prompts = [
        Prompt(f"{chat.id}-{sample}", chat.domain or "none", 0, None, (question(chat),))
        for sample in range(samples)
        for chat in chats
    ]
    write_chats(answer_again(target.model, target.tokenizer, prompts, seed=0), path)


def write_chats(chats: Sequence[Chat], path: Path) -> None:
    """Write conversations as :func:`dspark_lab.chats.load_chats` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = ("id", "domain", "messages", "finished")
    write_records(({name: getattr(chat, name) for name in fields} for chat in chats), path)


@dataclass(frozen=True)
class Recipe:
    """A drafter of the pocket target; ``num_anchors`` times ``block_size`` is about the same."""

    kind: MarkovKind
    block_size: int
    num_anchors: int


POCKET_DRAFTERS = {
    "dspark-k7": Recipe("vanilla", 7, 16),
    "dflash-k7": Recipe("none", 7, 16),
    "dspark-k15": Recipe("vanilla", 15, 8),
    "dflash-k15": Recipe("none", 15, 8),
    "gated-k7": Recipe("gated", 7, 16),
    "rnn-k7": Recipe("rnn", 7, 16),
}


def pocket_drafter(target: Target, recipe: Recipe) -> Drafter:
    """A fresh drafter for the pocket target."""
    assert target.tokenizer is not None
    return new_drafter(
        target,
        mask_token_id=target.tokenizer.get_vocab()[MASK],
        block_size=recipe.block_size,
        markov_head_type=recipe.kind,
        num_anchors=recipe.num_anchors,
    )


POCKET_TARGET = PocketConfig(steps=1000, rows=4, learning_rate=3e-3)
POCKET_TRAINING = TrainConfig(
    steps=1000,
    batch_size=16,
    num_anchors=16,
    max_length=512,
    learning_rate=3e-3,
    warmup_steps=40,
    weight_decay=0.01,
    precision="bf16",
    checkpoint_every=100,
    keep_checkpoints=1,
)


def make_pocket_drafter(
    target: Target, folder: Path, name: str, config: TrainConfig, *, progress: bool = True
) -> None:
    """Train one of ``POCKET_DRAFTERS`` on ``folder/train.jsonl`` into ``folder/<name>``."""
    if (folder / name).exists():
        return
    recipe = POCKET_DRAFTERS[name]
    torch.manual_seed(config.seed)
    drafter = pocket_drafter(target, recipe)
    config = replace(config, num_anchors=recipe.num_anchors)
    chats = load_chats(folder / "train.jsonl")
    run = folder / "runs" / name
    facts = _train(drafter, target, chats, config, run, folder / "features", progress)
    _write_facts(run, facts)
    save_drafter(drafter, folder / name, dtype=torch.bfloat16)


SMOLLM2_LAYER_IDS = (1, 8, 15, 22, 28)
# A token of SmolLM2's vocabulary that no conversation contains.
SMOLLM2_MASK = "<empty_output>"


def smollm2_drafter(target: Target) -> Drafter:
    """A fresh drafter for SmolLM2, 15 million weights."""
    assert target.tokenizer is not None
    return new_drafter(
        target,
        mask_token_id=target.tokenizer.get_vocab()[SMOLLM2_MASK],
        target_layer_ids=SMOLLM2_LAYER_IDS,
        num_anchors=32,
    )


# Both softmaxes over the tokens that occur in the conversations alone, a quarter of the vocabulary,
# are much faster than over all of it.
SMOLLM2_TRAINING = TrainConfig(
    steps=3500,
    batch_size=8,
    num_anchors=32,
    max_length=512,
    learning_rate=2e-3,
    warmup_steps=60,
    final_lr_ratio=0.02,
    weight_decay=0.01,
    precision="bf16",
    vocabulary="seen",
    checkpoint_every=100,
)


def make_smollm2_drafter(
    work: Path, chats: Sequence[Chat], config: TrainConfig = SMOLLM2_TRAINING, progress: bool = True
) -> None:
    """Train the drafter of SmolLM2 into ``work/dspark-k7``."""
    if (work / "dspark-k7").exists():
        return
    target = load_target("smollm2", dtype=torch.bfloat16)
    assert target.tokenizer is not None
    torch.manual_seed(config.seed)
    drafter = smollm2_drafter(target)
    encoded = [encode(chat, target.tokenizer, config.max_length) for chat in chats]
    facts = _train(drafter, target, encoded, config, work / "run", work / "features", progress)
    facts |= {
        "parameters": sum(p.numel() for p in drafter.parameters() if p.requires_grad),
        "conversations": len(encoded),
        "supervised_tokens": sum(int(item.loss_mask.sum()) for item in encoded),
        "seen_tokens": len(torch.cat([item.input_ids for item in encoded]).unique()),
    }
    _write_facts(work, facts)
    save_drafter(drafter, work / "dspark-k7", dtype=torch.bfloat16)


def answer_prompts(
    target: Target, prompts: Path, sampling: Sampling, *, limit: int, seed: int = 0
) -> list[Chat]:
    """The target's own answers to a JSONL file of ``{"turns": [question, ...]}``, first turns only.

    The first ``limit`` prompts of at most 512 tokens; their domain is the file's name.
    """
    assert target.tokenizer is not None
    chosen: list[Prompt] = []
    for number, line in enumerate(prompts.read_text(encoding="utf-8").splitlines(), start=1):
        question = json.loads(line)["turns"][0]
        if len(chosen) < limit and len(target.tokenizer(question)["input_ids"]) <= 512:
            chosen.append(Prompt(f"{prompts.stem}-{number}", prompts.stem, 0, None, (question,)))
    return answer_again(target.model, target.tokenizer, chosen, seed=seed, sampling=sampling)


@dataclass(frozen=True)
class PocketRecipe:
    """How much of everything; the reduced one shows in seconds that all stages run."""

    target: PocketConfig = POCKET_TARGET
    samples: int = 2
    drafter: TrainConfig = POCKET_TRAINING
    drafters: tuple[str, ...] = tuple(POCKET_DRAFTERS)


REDUCED_POCKET = PocketRecipe(
    target=PocketConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        steps=20,
        rows=4,
        row_length=128,
        warmup_steps=5,
    ),
    samples=1,
    drafter=replace(POCKET_TRAINING, steps=4, batch_size=4, max_length=128),
    drafters=("dspark-k7", "dflash-k7"),
)


def make_pocket_pair(
    work: Path, out: Path, recipe: PocketRecipe = PocketRecipe(), *, progress: bool = True
) -> None:
    """Run all stages, and copy what ships into ``out``, with its card."""
    chats, held_out = split_questions(make_pocket_corpus(work))
    make_pocket_target(chats, held_out, work / "target", recipe.target)
    target = load_target(work / "target", local_files_only=True)
    make_answers(target, chats, work / "train.jsonl", samples=recipe.samples)
    make_answers(target, held_out, work / "held_out.jsonl")
    for name in recipe.drafters:
        make_pocket_drafter(target, work, name, recipe.drafter, progress=progress)
    for name in ("target", *recipe.drafters):
        shutil.copytree(work / name, out / name, dirs_exist_ok=True)
    for name in ("train", "held_out"):
        shutil.copy(work / f"{name}.jsonl", out / f"{name}.jsonl")
    card_pocket_pair(work, out, recipe)


def card_pocket_pair(work: Path, out: Path, recipe: PocketRecipe) -> None:
    """Evaluate what ships, and write its card."""
    target = load_target(out / "target", local_files_only=True)
    assert target.tokenizer is not None
    held_out = [encode(chat, target.tokenizer, 512) for chat in load_chats(out / "held_out.jsonl")]
    evaluations, runs = {}, {}
    for name in recipe.drafters:
        drafter = load_drafter(out / name, target=target, dtype=torch.float32)
        evaluations[name] = evaluate(drafter, target, held_out, num_anchors=32)
        runs[name] = _facts(work / "runs" / name)
    text = pocket_card(_facts(work / "target"), runs, evaluations)
    (out / "README.md").write_text(text, encoding="utf-8")


def make_smollm2_pair(work: Path, out: Path, prompts: Sequence[Path]) -> None:
    """Run all stages, and copy what ships into ``out``, with its card where there are prompts."""
    chats, _ = split_chats(make_corpora(work))
    make_smollm2_drafter(work, chats)
    shutil.copytree(work / "dspark-k7", out / "dspark-k7", dirs_exist_ok=True)
    if prompts:
        card_smollm2_pair(work, out, prompts)


# How the answers are drawn that the drafter of SmolLM2 is evaluated on.
ANSWERS = {
    "temperature 1, nothing cut off": replace(UNCUT, max_new_tokens=320),
    "temperature 0.7, top-p 0.9": Sampling(),
    "greedy": Sampling(top_k=1),
}


def card_smollm2_pair(work: Path, out: Path, prompts: Sequence[Path], limit: int = 24) -> None:
    """Evaluate what ships on the target's own answers, and write the card.

    The answers stay in the work folder: the prompts are not the project's.
    """
    target = load_target("smollm2")
    assert target.tokenizer is not None
    drafter = load_drafter(out / "dspark-k7", target=target, dtype=torch.float32)
    evaluations = {}
    for number, (name, sampling) in enumerate(ANSWERS.items()):
        path = work / f"answers-{number}.jsonl"
        if not path.exists():
            answers = [answer_prompts(target, file, sampling, limit=limit) for file in prompts]
            write_chats(list(chain.from_iterable(answers)), path)
        encoded = [encode(chat, target.tokenizer, 1024) for chat in load_chats(path)]
        evaluations[name] = evaluate(drafter, target, encoded, num_anchors=16)
    text = smollm2_card(_facts(work), evaluations)
    (out / "README.md").write_text(text, encoding="utf-8")


# Decoding temperatures of the shipped traces.
TRACED = {"pocket": (0.0, 1.0), "smollm2": (0.0, 0.7, 1.0)}


def trace_pair(
    name: str, path: Path, temperatures: Sequence[float], *, most: int = 120, tokens: int = 64
) -> None:
    """Decode held-out questions with each drafter of a pair, and keep the traces in one file.

    It has two more columns, ``drafter`` and ``temperature``; probabilities are in float32. A
    question has the same number as a prompt in each of them; domains take turns.
    """
    pair = load_pair(name)
    chats = in_turns(pair.held_out)[:most]
    traces = []
    for drafter_name in drafter_names(name):
        drafter = pair.load_drafter(drafter_name)
        for temperature in temperatures:
            decoded = decode(
                pair.target,
                drafter,
                [question(chat) for chat in chats],
                domains=[chat.domain or "none" for chat in chats],
                temperature=temperature,
                max_new_tokens=tokens,
                batch_size=40,
            )
            trace = decoded.trace.assign(drafter=drafter_name, temperature=temperature)
            traces.append(trace)
    trace = pd.concat(traces, ignore_index=True)
    wide = trace.columns[trace.dtypes == "float64"].drop("temperature")
    save_trace(trace.astype(dict.fromkeys(wide, "float32")), path)


# Where an engine is timed: how many requests decode together, in how many rounds, on how many
# threads.
TIMED: dict[str, tuple[tuple[int, ...], int, int]] = {
    "pocket": ((1, 2, 4, 8, 16, 32, 64), 41, 1),
    "smollm2": ((1, 2, 4, 8, 16), 11, 2),
}


def time_pair(name: str, path: Path) -> None:
    """Time decoding on this machine, and keep the engine in one file."""
    requests, repeats, threads = TIMED[name]
    torch.set_num_threads(threads)
    pair = load_pair(name)
    engine = measure_engine(
        pair.target, pair.drafter, requests=requests, temperature=1.0, repeats=repeats
    )
    engine.save(path)


def _train(
    drafter: Drafter,
    target: Target,
    chats: Sequence[Chat | Encoded],
    config: TrainConfig,
    run: Path,
    cache: Path,
    progress: bool,
) -> dict[str, Any]:
    """Train to the end; return the facts for the card."""
    options: dict[str, Any] = {"features": "cached", "cache": cache, "progress": progress}
    history = train(drafter, target, chats, config, out=run, **options)
    if history.interrupted:
        raise KeyboardInterrupt
    steps = history.table()
    return {
        "steps": len(steps),
        "slots": int(steps["slots"].sum()),
        "seconds": round(float(steps["seconds"].sum())),
    }


def _write_facts(folder: Path, facts: dict[str, Any]) -> None:
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "facts.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", choices=("pocket", "smollm2"))
    parser.add_argument("--work", type=Path, help="default: build/<pair>")
    parser.add_argument("--out", type=Path, help="default: data/<pair>")
    parser.add_argument(
        "--prompts", type=Path, nargs="*", default=[], help="smollm2: JSONL files to evaluate on"
    )
    parser.add_argument("--traces", action="store_true", help="trace what ships, and no more")
    parser.add_argument(
        "--engine", action="store_true", help="time what ships on this machine, and no more"
    )
    options = parser.parse_args()
    work = options.work or Path("build") / options.pair
    out = options.out or SHIPPED_CHATS.parent / options.pair
    everything = not (options.traces or options.engine)
    if everything and options.pair == "pocket":
        make_pocket_pair(work, out)
    elif everything:
        make_smollm2_pair(work, out, options.prompts)
    if everything or options.traces:
        trace_pair(options.pair, out / TRACES, TRACED[options.pair])
    if everything or options.engine:
        time_pair(options.pair, out / ENGINE)
    complete_folder(SHIPPED_CHATS)


if __name__ == "__main__":
    main()
