"""The recipes, in a reduced form from end to end, and the rules that keep training data apart."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from data.make.generate import distinct_prompts
from data.make.pocket import perplexity, train_tokenizer
from data.make.recipes import (
    POCKET_DRAFTERS,
    POCKET_TEMPLATES,
    REDUCED_POCKET,
    make_pocket_pair,
    pocket_drafter,
    split_questions,
    trace_pair,
    write_chats,
)
from dspark_lab.chats import Chat, encode, load_chats
from dspark_lab.decoding import TRACE_COLUMNS, decode, load_trace
from dspark_lab.model import load_drafter, load_target
from dspark_lab.pairs import drafter_names, in_turns, load_pair, question, split_chats
from dspark_lab.rates import evaluate
from tests.samples import random_chats, tiny_target


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The reduced recipe's work folder and what would ship."""
    work = tmp_path_factory.mktemp("work")
    chats = [chat for chat in load_chats()[:160] if len(chat.messages) == 2][:80]
    write_chats(chats, work / "corpus.jsonl")
    make_pocket_pair(work, work / "out", REDUCED_POCKET, progress=False)
    return work, work / "out"


def test_every_stage_runs_and_its_results_load(made: tuple[Path, Path]) -> None:
    _, out = made
    target = load_target(out / "target", local_files_only=True)
    assert target.tokenizer is not None
    held_out = [encode(chat, target.tokenizer) for chat in load_chats(out / "held_out.jsonl")]
    for name in REDUCED_POCKET.drafters:
        drafter = load_drafter(out / name, target=target, dtype=torch.float32)
        assert drafter.config.markov_rank == (0 if name.startswith("dflash") else 64)
        assert (evaluate(drafter, target, held_out)["tau"] >= 1).all()
    card = (out / "README.md").read_text()
    assert "| dspark-k7 |" in card and "vanilla Markov head, K 7" in card and "nan" not in card


def test_no_question_is_trained_on_and_held_out(made: tuple[Path, Path]) -> None:
    work, _ = made
    asked, held_out = split_questions(work / "corpus.jsonl")
    answers = [load_chats(work / f"{name}.jsonl") for name in ("train", "held_out")]
    assert [question(chat) for chat in asked] == [question(chat) for chat in answers[0]]
    assert [question(chat) for chat in held_out] == [question(chat) for chat in answers[1]]
    assert (len(asked), len(held_out)) == (70, 10)
    for train, others in ((asked, held_out), split_chats()):
        assert not {question(chat) for chat in train} & {question(chat) for chat in others}


def test_the_pocket_questions_are_distinct_and_follow_from_the_seed() -> None:
    prompts = distinct_prompts(POCKET_TEMPLATES, 60, seed=0)
    assert len({prompt.users[0] for prompt in prompts}) == len(prompts) > 1000
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert prompts == distinct_prompts(POCKET_TEMPLATES, 60, seed=0)
    assert prompts != distinct_prompts(POCKET_TEMPLATES, 60, seed=1)


def test_a_second_call_makes_nothing_anew(made: tuple[Path, Path]) -> None:
    work, _ = made
    kept = [p for p in work.rglob("*") if p.is_file() and "out" not in p.relative_to(work).parts]
    before = {path: path.stat().st_mtime_ns for path in kept}
    make_pocket_pair(work, work / "again", REDUCED_POCKET, progress=False)
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_drafters_of_a_block_size_differ_in_the_markov_head_alone(made: tuple[Path, Path]) -> None:
    target = load_target(made[1] / "target", local_files_only=True)
    shapes = []
    for recipe in POCKET_DRAFTERS.values():
        if recipe.block_size != 7:
            continue
        named = pocket_drafter(target, recipe).named_parameters()
        shapes.append({n: p.shape for n, p in named if not n.startswith(("markov", "confidence"))})
    assert all(shape == shapes[0] for shape in shapes)
    assert {r.num_anchors * r.block_size for r in POCKET_DRAFTERS.values()} == {112, 120}


def test_written_chats_are_read_back(tmp_path: Path) -> None:
    chats = [
        Chat(({"role": "user", "content": "ä\n"}, {"role": "assistant", "content": ""}), "a", "x"),
        Chat(({"role": "assistant", "content": "hé"},), "b", None, finished=False),
    ]
    write_chats(chats, tmp_path / "some" / "chats.jsonl")
    assert load_chats(tmp_path / "some" / "chats.jsonl") == chats


def test_the_pocket_tokenizer_keeps_text_and_marks_answers() -> None:
    chats = load_chats()[:60]
    tokenizer = train_tokenizer(chats, 600)
    assert len(tokenizer) == 600
    for chat in chats[:20]:
        encoded = encode(chat, tokenizer)
        supervised = tokenizer.decode(encoded.input_ids[encoded.loss_mask])
        answers = [m["content"] for m in chat.messages if m["role"] == "assistant"]
        expected = "".join(answer + "<|im_end|>" for answer in answers)
        assert supervised == (expected if chat.finished else expected.removesuffix("<|im_end|>"))
        assert tokenizer.mask_token_id not in encoded.input_ids


@torch.no_grad()
def test_perplexity_is_of_the_answers_alone() -> None:
    target, chats = tiny_target(), random_chats(5)
    losses = []
    for item in chats:
        log_probs = target.model(item.input_ids[None]).logits[0].log_softmax(dim=-1)
        for place in range(1, len(item)):
            if item.loss_mask[place]:
                losses.append(-log_probs[place - 1, item.input_ids[place]].item())
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(target.model, chats, batch_size=2) == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket pair's answers of eight tokens to four questions, at two temperatures."""
    path = tmp_path_factory.mktemp("traced") / "traces.parquet"
    trace_pair("pocket", path, [0.0, 1.0], most=4, tokens=8)
    return path


def test_a_traced_pair_is_one_file_that_load_trace_reads(traced: Path) -> None:
    trace = load_trace(traced)
    assert [path.name for path in traced.parent.iterdir()] == [traced.name]
    assert list(trace.columns) == [*TRACE_COLUMNS, "drafter", "temperature"]
    assert trace.dtypes[list(TRACE_COLUMNS)].astype(str).to_dict() == TRACE_COLUMNS
    runs = trace.groupby(["drafter", "temperature"])["prompt"].unique()
    assert set(runs.index) == {(name, t) for name in drafter_names() for t in (0.0, 1.0)}
    assert all(prompts.tolist() == [0, 1, 2, 3] for prompts in runs)
    assert trace["position"].max() < 8
    # Probabilities and margins, and nothing else, are stored in float32.
    stored = pd.read_parquet(traced).dtypes.astype(str).to_dict()
    narrow = {name: "float32" for name, kind in TRACE_COLUMNS.items() if kind == "float64"}
    assert len(narrow) == 7
    expected = TRACE_COLUMNS | narrow | {"temperature": "float64"}
    assert expected.pop("domain") and expected.items() <= stored.items()


@pytest.mark.parametrize("name, temperature", [("rnn-k7", 1.0), ("dspark-k15", 0.0)])
def test_a_traced_run_is_what_decode_traces(traced: Path, name: str, temperature: float) -> None:
    pair = load_pair("pocket", name)
    chats = in_turns(pair.held_out)[:4]
    options = {"domains": [chat.domain for chat in chats], "temperature": temperature}
    prompts = [question(chat) for chat in chats]
    own = decode(pair.target, pair.drafter, prompts, max_new_tokens=8, **options).trace
    trace = load_trace(traced)
    found = trace[(trace["drafter"] == name) & (trace["temperature"] == temperature)]
    found = found[list(TRACE_COLUMNS)].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, own, check_exact=False, rtol=1e-6)
