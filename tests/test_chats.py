"""`dspark_lab.chats`: conversations, rows, padding and packing."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_lab.chats import (
    Chat,
    Encoded,
    collate,
    describe,
    encode,
    load_chats,
    load_tokenizer,
    one_row,
    pack,
)
from tests import oracle
from tests.samples import CHAT, documents
from tests.templates import CHATML, bytes_of, tokenizer

USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "the"}


def test_a_chat_is_checked_and_a_row_holds_a_token():
    for message in ({"role": "user"}, {"content": "x"}, USER | {"content": None}):
        with pytest.raises(ValueError, match=r"messages\[1\]"):
            Chat((USER, message), id="x")
    with pytest.raises(ValueError, match=r"got 'narrator'"):
        Chat((USER | {"role": "narrator"},), id="x")
    with pytest.raises(
        ValueError, match="supervised must hold a bool for each of 2 messages, got 1"
    ):
        Chat((USER, ASSISTANT), id="x", supervised=[True])
    with pytest.raises(ValueError, match="'odd' must hold a token"):
        Encoded(torch.zeros(0).long(), torch.zeros(0).bool(), Chat((USER, ASSISTANT), id="odd"))


def test_a_row_has_the_name_of_its_conversation_or_its_own():
    ids, mask = torch.arange(2), torch.ones(2).bool()
    chat = Chat((USER, ASSISTANT), id="a", domain="math")
    assert (Encoded(ids, mask, chat).id, Encoded(ids, mask, chat).domain) == ("a", "math")
    own = Encoded(ids, mask, id="b", domain="code")
    assert (own.chat, own.id, own.domain) == (None, "b", "code")


def test_a_tokenizer_is_loaded_from_a_folder(tmp_path):
    made = tokenizer("words", True)
    made.chat_template = CHATML
    made.save_pretrained(tmp_path / "good")
    loaded = load_tokenizer(tmp_path / "good")
    encoded = encode(Chat((USER, ASSISTANT), id="x"), loaded)
    supervised = loaded.convert_ids_to_tokens(encoded.input_ids[encoded.loss_mask])
    assert b"".join(map(bytes_of, supervised)) == b"the<|end|>"


def test_the_shipped_conversations_are_supervised_answer_by_answer():
    made = load_tokenizer()
    for chat in load_chats().conversations:
        encoded = encode(chat, made)
        text = made.apply_chat_template(list(chat.messages), tokenize=False)
        owner, place = [False] * len(text.encode()), 0
        for message in chat.messages:
            place = text.index(
                message["content"], text.index(f"<|im_start|>{message['role']}", place)
            )
            end = place + len(
                message["content"] + "<|im_end|>" * (chat.finished or message != chat.messages[-1])
            )
            start, stop = len(text[:place].encode()), len(text[:end].encode())
            owner[start:stop] = [message["role"] == "assistant"] * (stop - start)
        place, expected = 0, []
        for token in made.convert_ids_to_tokens(encoded.input_ids):
            size = len(token) if token.startswith("<|") else len(bytes_of(token))
            expected.append(all(owner[place : place + size]))
            place += size
        assert place == len(owner) and encoded.loss_mask.tolist() == expected


PAD = 1000


def test_one_row_keeps_the_order_and_no_row_takes_what_does_not_fit():
    encoded = documents("aaa", "a" * 7, "aa")
    batch = one_row(encoded, 14, pad_token_id=0)
    assert batch.input_ids.tolist() == [[*range(12), 0, 0]]
    assert batch.chat_index.tolist() == [[0, 1, 2]] and batch.seq_lens.tolist() == [[3, 7, 2]]
    with pytest.raises(ValueError, match="12 tokens, got 11"):
        one_row(encoded, 11, pad_token_id=0)
    match = "'hand-made' has 5 tokens, more than length 4; .*max_length=4"
    for make in (collate, pack):
        with pytest.raises(ValueError, match=match):
            make(documents("aa", "aaaaa"), length=4, pad_token_id=PAD)


@given(st.lists(st.text("a.", min_size=1, max_size=12), min_size=1), st.integers(12, 20))
def test_packing_keeps_every_conversation_whole_and_once_by_first_fit_decreasing(marks, length):
    encoded = documents(*marks)
    batch = pack(encoded, length, PAD)
    seen = []
    for row in range(len(batch.input_ids)):
        start = 0
        for n, index in zip(batch.seq_lens[row].tolist(), batch.chat_index[row], strict=True):
            assert (n == 0) == (index == -1)
            if n:
                here = slice(start, start + n)
                assert batch.input_ids[row, here].equal(encoded[index].input_ids)
                assert batch.loss_mask[row, here].equal(encoded[index].loss_mask)
                seen.append(int(index))
                start += n
        assert batch.attention_mask[row].tolist() == [p < start for p in range(length)]
        assert batch.input_ids[row, start:].tolist() == [PAD] * (length - start)
        assert not batch.loss_mask[row, start:].any()
    assert sorted(seen) == list(range(len(encoded)))
    remaining, positions = oracle.packed_rows(batch.seq_lens.tolist(), length)
    assert batch.doc_remaining.tolist() == remaining
    assert batch.position_ids.tolist() == positions
    rows: list[list[int]] = []
    for index in sorted(range(len(marks)), key=lambda i: (-len(marks[i]), i)):
        for row in rows:
            if sum(len(marks[i]) for i in row) + len(marks[index]) <= length:
                row.append(index)
                break
        else:
            rows.append([index])
    assert [[i for i in row if i >= 0] for row in batch.chat_index.tolist()] == rows


def test_collating_pads_on_the_right_to_the_longest_and_keeps_the_order():
    batch = collate(documents(".a", ".aa"), PAD)
    assert batch.input_ids.tolist() == [[0, 1, PAD], [2, 3, 4]]
    assert batch.loss_mask.tolist() == [[False, True, False], [False, True, True]]
    assert batch.attention_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.position_ids.tolist() == [[0, 1, 0], [0, 1, 2]]
    assert batch.doc_remaining.tolist() == [[1, 0, 0], [2, 1, 0]]
    assert batch.seq_lens.tolist() == [[2], [3]]
    assert batch.chat_index.tolist() == [[0], [1]]
    assert all(t.dtype in (torch.bool, torch.long) for t in vars(batch).values())


def test_a_batch_moves_with_all_its_tensors():
    batch = pack(documents("aa", "aaa"), 4, PAD).to("meta")
    assert {getattr(batch, field.name).device.type for field in fields(batch)} == {"meta"}


def test_describe_counts_each_domain():
    domains, marks = ["math", "code", "math", None], ["..aa", ".a", "...aaa", "a"]
    encoded = [
        replace(item, chat=replace(CHAT, domain=domain))
        for item, domain in zip(documents(*marks), domains, strict=True)
    ]
    table = describe(encoded)
    assert table.index.tolist() == ["math", "code", "none"] and table.index.name == "domain"
    assert table.to_dict("list") == {
        "conversations": [2, 1, 1],
        "tokens": [10, 2, 1],
        "supervised_tokens": [5, 1, 1],
        "median_length": [5.0, 2.0, 1.0],
        "longest": [6, 2, 1],
        # One supervised token by itself is no anchor and has none.
        "without_labels": [0, 1, 1],
    }
