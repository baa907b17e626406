"""`dspark_lab.decoding.outcomes`: every token of a run is accounted for, and every probability.

The oracles are the rounds themselves, read token by token in plain loops, and sums over whole
vocabularies in lists.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_lab.decoding import (
    OTHERS,
    OUTCOMES,
    TOKEN_KINDS,
    Decoded,
    Round,
    decode,
    distribution_table,
    distribution_tables,
    outcome_table,
    token_kind,
    token_kinds,
)
from tests.test_decode_exact import early_stopping, exact_drafter, exact_target, undecided

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 5
END = 2
PROMPTS = [[0, 3, 1], [2], [4, 4, 1, 0, 2, 3, 1], [1, 0]] * 2
FROM_TRACE = ["confidence", "accept_rate", "accept_prob", "draft_prob", "target_prob"]


def to_text(token_id: int) -> str:
    return f"<{token_id}>"


@cache
def run_of(name: str) -> tuple[Decoded, list[Round]]:
    """Answers of a tiny random pair, and their rounds. Both heads disagree often."""
    options = dict(RUNS[name])
    drafted = options.pop("drafted", True)
    target = exact_target(VOCAB)
    drafter = exact_drafter(VOCAB, block_size=3) if drafted else None
    if drafter is not None and {"threshold", "scheduler"} & options.keys():
        undecided(target, drafter, *PROMPTS[:4], median=0.6)
    rounds: list[Round] = []
    settings = {"temperature": 1.0, "max_new_tokens": 12, "end_ids": [END]} | options
    return decode(target, drafter, PROMPTS, on_round=rounds.append, **settings), rounds


RUNS: dict[str, dict[str, Any]] = {
    "everything verified": {},
    "a threshold": {"threshold": 0.5},
    "a scheduler": {"scheduler": early_stopping, "draft_length": 2},
    "no end": {"end_ids": [], "max_new_tokens": 9},
    "greedy": {"temperature": 0.0, "end_ids": []},
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
    "nothing drafted": {"drafted": False},
}
every_run = pytest.mark.parametrize("name", RUNS)


def read_rounds(first: int, rounds: Sequence[Round]) -> list[tuple[int, int, int, int, str]]:
    """Round, slot, position, token and outcome of all tokens of one answer, one after the other."""
    found = [(-1, -1, 0, first, "first")]
    length = 1
    for r in rounds:
        for slot, token in enumerate(r.drafted):
            if slot >= r.verified:
                outcome = "not verified"
            elif slot > r.accepted:
                outcome = "not reached"
            else:
                outcome = "accepted" if slot < r.accepted else "rejected"
            found.append((r.number, slot, length + slot, token, outcome))
        for i, token in enumerate(r.tokens):
            if i == r.accepted:
                outcome = "corrected" if r.accepted < r.verified else "bonus"
                found.append((r.number, -1, length + i, token, outcome))
        length += len(r.tokens)
    return found


@every_run
def test_each_token_stands_in_its_round_and_drafted_ones_alone_have_the_traces_numbers(name):
    decoded, rounds = run_of(name)
    tables = [outcome_table(decoded, to_text, prompt) for prompt in range(len(PROMPTS))]
    for prompt, (answer, table) in enumerate(zip(decoded.tokens, tables, strict=True)):
        own = [r for r in rounds if r.prompt == prompt]
        columns = ["round", "slot", "position", "token", "outcome"]
        lines = list(table[columns].itertuples(index=False, name=None))
        assert lines == read_rounds(answer[0], own)
        assert table["text"].tolist() == [to_text(token) for token in table["token"]]
        kept = table[table["kept"]]
        assert kept["token"].tolist() == answer
        assert kept["position"].tolist() == list(range(len(answer)))
        dropped = set(table.loc[~table["kept"], "outcome"])
        assert dropped <= {"rejected", "not reached", "not verified"}
    table = pd.concat(tables, ignore_index=True)
    drafted = table[table["slot"] >= 0].reset_index(drop=True)
    columns = ["round", "slot", "position", "token", *FROM_TRACE]
    pd.testing.assert_frame_equal(drafted[columns], decoded.trace[columns])
    assert table.loc[table["slot"] < 0, FROM_TRACE].isna().all(axis=None)


def test_every_outcome_occurs_and_no_other():
    seen = Counter[str]()
    for name in RUNS:
        decoded, _ = run_of(name)
        for prompt in range(len(PROMPTS)):
            seen.update(outcome_table(decoded, to_text, prompt)["outcome"])
    assert set(seen) == set(OUTCOMES)
    assert min(seen.values()) > 5, "each must occur for these tests to say anything"


def test_the_outcome_table_has_the_same_types_whatever_is_in_it():
    full = outcome_table(run_of("everything verified")[0], to_text)
    short = outcome_table(run_of("one token")[0], to_text)
    assert len(short) == 1 < len(full)
    assert full.dtypes.to_dict() == short.dtypes.to_dict()
    assert full.dtypes["kept"] == "bool" and full.dtypes["token"] == "int64"


def test_where_draft_and_target_are_one_there_is_no_residual():
    draft, target = torch.tensor([[0.25, 0.75]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    same = Round(0, 3, [1, 0], "", [1], 1, 1, draft.double(), target.double(), None)
    table = distribution_table(same, 0, to_text)
    assert table["residual"].tolist() == [0, 0, 0]
    assert table["overlap"].sum() == pytest.approx(1)


@every_run
def test_the_distributions_of_a_run_are_those_of_its_trace(name):
    decoded, rounds = run_of(name)
    trace = decoded.trace.set_index(["prompt", "round", "slot"])
    for r in rounds:
        for slot in range(max(len(r.drafted), r.verified + 1)):
            table = distribution_table(r, slot, to_text, top=2)
            check(table, r, slot, top=2)
            if slot < len(r.drafted):
                known = trace.loc[(r.prompt, r.number, slot)]
                drafted = table[table["drafted"]].iloc[0]
                assert drafted["draft"] == pytest.approx(known["draft_prob"], abs=1e-6)
            if slot < r.verified:
                assert table["overlap"].sum() == pytest.approx(known["accept_rate"], abs=1e-6)
                assert drafted["target"] == pytest.approx(known["target_prob"], abs=1e-6)


def check(table: pd.DataFrame, r: Round, slot: int, top: int) -> None:
    """Every column, from the two distributions as lists; past the bonus slot there is no p."""
    nothing, unknown = [0.0] * VOCAB, [math.nan] * VOCAB
    q = r.draft_probs[slot].tolist() if slot < len(r.drafted) else nothing
    p = r.target_probs[slot].tolist() if slot <= r.verified else unknown
    off = q if slot < r.verified else nothing
    more = [max(0.0, a - b) for a, b in zip(p, off, strict=True)]
    columns = {"draft": q, "target": p, "overlap": unknown, "residual": unknown}
    if slot <= r.verified:
        columns["overlap"] = list(map(min, p, q))
        columns["residual"] = [x / sum(more) if sum(more) else 0.0 for x in more]
    drafted = r.drafted[slot : slot + 1]
    own = r.tokens[-1:] if slot == r.accepted < len(r.tokens) else []
    best = {*drafted, *own}
    for values in (q, p):
        order = sorted(range(VOCAB), key=lambda token: -values[token])
        best.update(token for token in order[:top] if values[token] > 0)
    shown = table["token"].tolist()
    assert shown[-1] == -1 and set(shown[:-1]) == best and len(shown) == len(best) + 1
    assert table["text"].tolist() == [*map(to_text, shown[:-1]), OTHERS]
    heights = [max(q[token], p[token] if slot <= r.verified else 0.0) for token in shown[:-1]]
    assert heights == sorted(heights, reverse=True)
    for name, values in columns.items():
        rest = sum(values) - sum(values[token] for token in shown[:-1])
        expected = [*(values[token] for token in shown[:-1]), rest]
        assert table[name].tolist() == pytest.approx(expected, abs=1e-9, nan_ok=True)
    for name, tokens in (("drafted", drafted), ("drawn", own)):
        assert table.loc[table[name], "token"].tolist() == tokens


def test_a_prompt_or_a_slot_that_is_not_there_is_refused():
    decoded, rounds = run_of("everything verified")
    with pytest.raises(ValueError, match="prompt must be below 8, got 8"):
        outcome_table(decoded, to_text, 8)
    with pytest.raises(ValueError, match=r"slot must be in \[0, 3\], got 4"):
        distribution_table(rounds[0], 4, to_text)


KINDS = {
    "word": [" the", "The", "A", "\n    return", " é", "\nÉ", " 你", "ǅ"],
    "inside a word": ["ing", "tion", "the", "é", "你", "ि", "x1", "n't"],
    "number": ["7", " 42", "٣", "½", "1st", "\n3"],
    "punctuation": [".", " (", "'s", "__", "```", "->", "\ufffd", "€", "<", "<b>", "[x]", "\u200b"],
    "white space": [" ", "\n", "\n   ", "\t", "\u00a0", "\r\n"],
    "special": ["", "<|im_end|>", "<|x\ny|>", "<s>", "</s>", "<pad>", "<unk>", "[MASK]", "[UNK1]"],
}


def test_every_kind_of_token_is_told_by_its_text():
    assert tuple(KINDS) == TOKEN_KINDS
    for kind, texts in KINDS.items():
        assert {text: token_kind(text) for text in texts} == dict.fromkeys(texts, kind)


@given(st.text() | st.lists(st.sampled_from("aZ1. \n<|>/[]é你")).map("".join))
def test_every_text_is_of_one_kind(text):
    kind = token_kind(text)
    assert kind in TOKEN_KINDS
    rest = text.lstrip()
    assert (kind == "white space") == (text != "" and rest == "")
    if kind == "inside a word":
        assert rest == text and not text[0].isupper()
    if kind == "number":
        assert rest[0].isnumeric()
    if rest[:1].isalpha():
        begins = rest != text or text[0].isupper() or text[0].istitle()
        assert kind == ("word" if begins else "inside a word")


def test_token_kinds_keep_the_index_ask_for_each_token_once_and_take_ids_alone():
    asked = Counter[int]()
    texts = {5: " so", 6: "ing", 7: "8"}

    def ask(token_id: int) -> str:
        asked[token_id] += 1
        return texts[token_id]

    tokens = pd.Series([7, 5, 5, 6, None, 7], index=list("abcdef"), dtype="Int64")
    kinds = token_kinds(tokens, ask)
    assert kinds.index.tolist() == tokens.index.tolist()
    assert kinds.drop("e").tolist() == ["number", "word", "word", "inside a word", "number"]
    assert kinds.isna().tolist() == [False] * 4 + [True, False]
    assert set(asked.values()) == {1}
    assert token_kinds(pd.Series([], dtype="int64"), ask).tolist() == []
    for wrong in ([1, 2], pd.Series(["a"]), pd.Series([1.5])):
        with pytest.raises(TypeError, match="tokens must .*, got"):
            token_kinds(wrong, to_text)


@every_run
def test_the_tables_of_a_round_are_those_of_its_slots_one_below_the_other(name):
    for round_ in run_of(name)[1][:8]:
        table = distribution_tables(round_, to_text, top=2)
        slots = max(len(round_.drafted) - 1, round_.verified) + 1
        assert table["slot"].unique().tolist() == list(range(slots))
        for slot, rows in table.groupby("slot"):
            wanted = distribution_table(round_, int(slot), to_text, top=2)
            rows = rows.drop(columns="slot").reset_index(drop=True)
            pd.testing.assert_frame_equal(rows, wanted)
