"""What data/ promises: intact files, enough conversations, a tokenizer that does what it should."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data.make.generate import card_numbers, checksums, make_prompts

DATA = Path(__file__).resolve().parent.parent / "data"
TEXT = "a  b\n\n   c\td\n1234  5\n\n1. x = [1, 22]\n    return x  \n é ü 日本 🌱 "


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    lines = (DATA / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DATA / "tokenizer", local_files_only=True)


def test_checksums_hold_for_every_file() -> None:
    assert (DATA / "SHA256SUMS").read_text(encoding="utf-8") == checksums(DATA)


def test_files_are_small() -> None:
    sizes = [path.stat().st_size for path in DATA.rglob("*") if path.is_file()]
    assert sum(sizes) < 96_000_000
    assert max(sizes) < 40_000_000


def test_there_are_enough_conversations_of_three_domains_and_few_unfinished(
    records: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    counts = Counter(record["domain"] for record in records)
    assert set(counts) == {"math", "code", "chat"}
    assert min(counts.values()) >= 200
    assert sum(record["finished"] for record in records) >= 0.9 * len(records)
    messages = [message for record in records for message in record["messages"]]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    tokens = tokenizer(answers, add_special_tokens=False)["input_ids"]
    assert sum(map(len, tokens)) >= 100_000


def test_card_shows_the_numbers_of_the_file(
    records: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    assert card_numbers(records, tokenizer) in (DATA / "README.md").read_text(encoding="utf-8")


def test_conversations_answer_the_prompts_of_seed_0(records: list[dict[str, Any]]) -> None:
    for record, prompt in zip(records, make_prompts(len(records), seed=0), strict=True):
        users = [m["content"] for m in record["messages"] if m["role"] == "user"]
        assert record["id"] == prompt.id
        assert users == list(prompt.users[: len(users)])
        assert len(users) == len(prompt.users) or not record["finished"]


def test_user_and_assistant_take_turns_and_no_answer_is_empty(
    records: list[dict[str, Any]],
) -> None:
    for record in records:
        roles = [message["role"] for message in record["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns in (["user", "assistant"], ["user", "assistant"] * 2), record["id"]
        assert all(message["content"].strip() for message in record["messages"]), record["id"]


def test_tokenizer_gives_text_back_and_cuts_digits_off_before_spaces(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert tokenizer.tokenize("a\n\n12  3") == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]


def test_markers_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer("<|im_start|>")["input_ids"] == [tokenizer.bos_token_id] == [1]
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id] == [2]
    assert tokenizer.pad_token_id is not None


def test_chat_template_writes_chatml(tokenizer: PreTrainedTokenizerBase) -> None:
    system = {"role": "system", "content": "Be kind."}
    user = {"role": "user", "content": "Hello."}
    text = tokenizer.apply_chat_template([system, user], tokenize=False, add_generation_prompt=True)
    turns = "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n"
    assert text == "<|im_start|>system\nBe kind.<|im_end|>\n" + turns
    default = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert default.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert default.endswith("<|im_end|>\n" + turns)
