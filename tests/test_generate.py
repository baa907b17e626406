"""Making conversations: the file that grows, and the sampling. No real model is needed."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from data.make import generate as lab
from data.make.generate import Message, Prompt
from dspark_lab.chats import SHIPPED_CHATS, load_tokenizer
from tests.samples import tiny_target

PROMPTS = lab.make_prompts(30, seed=3)


def echo(conversations: list[list[Message]], seed: int) -> list[tuple[str, bool]]:
    """Answers that depend on the seed and on the whole batch, as real samples do."""
    rng = random.Random(seed)
    return [(f"{len(c)} {c[-1]['content']} {rng.random()}", True) for c in conversations]


class Interrupted(Exception):
    pass


def interrupted_after(calls: int) -> lab.Answer:
    left = iter(range(calls))

    def answer(conversations: list[list[Message]], seed: int) -> list[tuple[str, bool]]:
        if next(left, None) is None:
            raise Interrupted
        return echo(conversations, seed)

    return answer


def run(out: Path, answer: lab.Answer = echo, seed: int = 3) -> bytes:
    """What is in the file at the end."""
    lab.generate(out, lab.make_prompts(30, seed), answer, seed=seed, batch_size=4)
    return out.read_bytes()


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """What one run without interruption writes."""
    return run(tmp_path / "whole.jsonl")


def test_every_prompt_is_answered_in_order(whole: bytes) -> None:
    records = [json.loads(line) for line in whole.splitlines()]
    assert [record["id"] for record in records] == [prompt.id for prompt in PROMPTS]
    for record, prompt in zip(records, PROMPTS, strict=True):
        users = [m["content"] for m in record["messages"] if m["role"] == "user"]
        assert users == list(prompt.users)
        assert record["messages"][-1]["role"] == "assistant"


@pytest.mark.parametrize("calls", [0, 1, 3, 7])
def test_interrupted_run_ends_with_the_same_file(calls: int, whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(Interrupted):
        run(out, interrupted_after(calls))
    assert run(out) == whole


def test_torn_last_line_is_dropped_and_made_again(whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for length in (1, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        out.write_bytes(whole[:length])
        assert run(out) == whole
    # Torn inside a character.
    out.write_bytes('{"id": "math-0001"}\n{"id": "é'.encode()[:-1])
    assert lab.read_records(out) == [{"id": "math-0001"}]
    assert out.read_bytes() == b'{"id": "math-0001"}\n'


def test_written_lines_are_kept(whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    first, *_ = whole.splitlines(keepends=True)
    changed = first.replace(b'"assistant", "content": "', b'"assistant", "content": "kept ')
    assert changed != first
    out.write_bytes(changed)
    assert run(out) == whole.replace(first, changed)


def test_complete_file_asks_the_model_nothing_and_is_of_one_seed(
    whole: bytes, tmp_path: Path
) -> None:
    assert run(tmp_path / "whole.jsonl", interrupted_after(0)) == whole
    with pytest.raises(ValueError, match="was started with other settings"):
        run(tmp_path / "whole.jsonl", seed=4)


def test_answer_that_was_cut_off_is_tried_again() -> None:
    texts = iter(["cut", "whole"])

    def answer(conversations: list[list[Message]], seed: int) -> list[tuple[str, bool]]:
        assert [m["role"] for m in conversations[0]] == ["system", "user"]
        text = next(texts)
        return [(text, text == "whole")]

    (record,) = lab.converse([Prompt("chat-0001", "chat", 0, "Be kind.", ("Hello.",))], answer, 0)
    assert record["messages"][-1] == {"role": "assistant", "content": "whole"}
    assert record["finished"] is True


def test_conversation_ends_at_an_answer_that_never_ended() -> None:
    prompts = [
        Prompt("chat-0001", "chat", 0, None, ("Endless?", "More?")),
        Prompt("chat-0002", "chat", 0, None, ("Short?", "More?")),
    ]

    def answer(conversations: list[list[Message]], seed: int) -> list[tuple[str, bool]]:
        return [("text", c[0]["content"] != "Endless?") for c in conversations]

    endless, short = lab.converse(prompts, answer, 0)
    assert [m["content"] for m in endless["messages"]] == ["Endless?", "text"]
    assert [m["content"] for m in short["messages"]] == ["Short?", "text", "More?", "text"]
    assert (endless["finished"], short["finished"]) == (False, True)


def test_prompts_are_distinct_and_follow_from_the_seed() -> None:
    prompts = lab.make_prompts(720, seed=0)
    assert prompts == lab.make_prompts(720, seed=0)
    assert prompts[:90] == lab.make_prompts(90, seed=0)
    assert len({prompt.users[0] for prompt in prompts}) == len({p.id for p in prompts}) == 720
    assert not any("{" in user and "}" in user for p in prompts for user in p.users)


def test_batches_hold_every_prompt_once_and_one_kind_each() -> None:
    batches = lab.make_batches(PROMPTS, batch_size=4)
    assert sorted(p.id for batch in batches for p in batch) == sorted(p.id for p in PROMPTS)
    assert all(len({(p.domain, len(p.users)) for p in batch}) == 1 for batch in batches)
    assert max(len(batch) for batch in batches) <= 4


def test_an_answer_is_readable_text_without_markers() -> None:
    tokenizer = load_tokenizer(SHIPPED_CHATS.parent / "pocket" / "target")
    model: Any = tiny_target(2, len(tokenizer)).model
    # This model likes a marker best, then the end of the turn, then a line break.
    liked = [tokenizer.get_vocab()[text] for text in ("<|im_start|>", "<|im_end|>", "\u010a")]
    model.lm_head = torch.nn.Linear(32, len(tokenizer))
    with torch.no_grad():
        model.lm_head.bias[liked] = torch.tensor([300.0, 200.0, 100.0])
    how = lab.Sampling(temperature=1.0, top_k=8, top_p=1.0, max_new_tokens=6)
    answer = lab.model_answer(model, tokenizer, how)
    asked = [[{"role": "user", "content": text}] for text in ("Hi", "How are you today?")]
    state = torch.random.get_rng_state()
    found = answer(asked, 5)
    assert torch.equal(state, torch.random.get_rng_state())
    assert found == answer(asked, 5) != answer(asked, 6)
    for text, finished in found:
        assert finished and text.strip() and "<|" not in text
    # One that reaches the limit before its turn ends is not finished.
    model.lm_head.bias.data[liked[1]] = -300
    assert not any(finished for _, finished in lab.model_answer(model, tokenizer, how)(asked, 5))


def test_card_and_checksums_describe_the_folder(whole: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_bytes(b"abc")
    (folder / "SHA256SUMS").write_text("old")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert lab.checksums(folder) == f"{abc}  sub/a.txt\n"

    def words(texts: list[str], add_special_tokens: bool) -> dict[str, list[list[str]]]:
        return {"input_ids": [text.split() for text in texts]}

    asked, said = ({"role": r, "content": "one two three"} for r in ("user", "assistant"))
    one = {"domain": "math", "messages": [asked, said]}
    numbers = lab.card_numbers([one | {"finished": index > 0} for index in range(4)], words)
    assert "| math | 4 | 0 | 0 | 4 | 12 | 75.0% |" in numbers
    assert "| code | 0 | 0 | 0 | 0 | 0 | 0.0% |" in numbers
    assert "| all | 4 | 0 | 0 | 4 | 12 | 75.0% |" in numbers
