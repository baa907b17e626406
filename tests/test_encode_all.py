"""`encode_all`: the rows of `encode`, on disk, whatever interrupts it."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dspark_lab.chats import (
    Chat,
    Encoded,
    collate,
    describe,
    encode,
    encode_all,
    load_chats,
    load_tokenizer,
    pack,
    rows_with_labels,
    seen_tokens,
    stream,
    token_chunks,
    token_counts,
)
from dspark_lab.chats import store as module
from dspark_lab.chats.edges import ByteLevel
from dspark_lab.chats.plans import tokenize
from dspark_lab.explore import explore_anchors
from dspark_lab.training import encode_chats
from dspark_lab.training.start import mask_token_id
from dspark_lab.training.state import digest
from dspark_lab.tuning import (
    Shape,
    Spans,
    choose_training,
    packing_table,
    supervision,
    supervision_table,
)
from tests.runs import CONFIG, losses
from tests.samples import random_chats, tiny_target

TOKENIZER = load_tokenizer()


def talk(*turns: str, id: str = "a", **facts) -> Chat:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return Chat(tuple(messages), id, **facts)


def some(count: int) -> list[Chat]:
    """Conversations of one to three answers, some of them cut off or partly left out."""
    chats = []
    for i in range(count):
        turns = [f"Question {i}, {'é🎉 ' * (i % 3)}part {t}" for t in range(2 * (1 + i % 3))]
        facts = {"domain": ("math", "code", None)[i % 3], "finished": i % 5 > 0}
        if i % 4 == 0:
            facts["supervised"] = [t % 4 != 1 for t in range(len(turns))]
        chats.append(talk(*turns, id=f"chat {i}", **facts))
    return chats


def write(path: Path, chats: list[Chat]) -> Path:
    lines = [
        json.dumps({"id": c.id, "domain": c.domain, "messages": c.messages, "finished": c.finished})
        for c in chats
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def small_parts(monkeypatch) -> None:
    """Parts of two conversations, or one line."""
    monkeypatch.setattr(module, "_PART_CHATS", (2, 2))
    monkeypatch.setattr(module, "_PART_BYTES", (1, 1))


def quietly(call, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **options)


def loop(chats, **options) -> list[Encoded]:
    rows = []
    for chat in chats:
        row = quietly(encode, chat, TOKENIZER, **options)
        rows += row if isinstance(row, list) else [row]
    return rows


def assert_same(found, expected) -> None:
    assert len(found) == len(expected)
    for row, one in zip(found, expected, strict=True):
        assert row.input_ids.dtype == torch.long and row.loss_mask.dtype == torch.bool
        assert row.input_ids.equal(one.input_ids) and row.loss_mask.equal(one.loss_mask)
        assert (row.id, row.domain) == (one.id, one.domain)
        assert row.left_out == one.left_out
        assert row.marker_differences == one.marker_differences


def made(chats, cache, **options):
    given = {"cache": cache, "progress": False, "workers": 1} | options
    return quietly(encode_all, chats, TOKENIZER, **given)


OPTIONS = [
    {},
    {"max_length": 30},
    {"last_answer_only": True},
    {"last_answer_only": True, "max_length": 45},
    *({"like": like} for like in ("automodel", "deepspec", "specforge", "speculators")),
    {"like": "speculators", "max_length": 40},
    {"like": "automodel", "max_length": 33},
    {"like": "specforge", "last_answer_only": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_row_is_that_of_encode(options, tmp_path, small_parts):
    chats = some(9)
    expected = loop(chats, **options)
    assert_same(made(chats, tmp_path, **options), expected)
    found = made(chats, tmp_path / "other", workers=2, **options)
    assert_same(found, expected)
    assert all(row.chat in chats for row in found)


def test_a_file_gives_the_rows_of_its_list(tmp_path, small_parts):
    chats = some(7)
    path = write(tmp_path / "chats.jsonl", chats)
    rows = made(path, tmp_path / "cache", workers=2)
    assert_same(rows, loop(load_chats(path)))
    assert rows[0].chat is None and rows.skipped == []
    packed = tmp_path / "chats.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert_same(made(packed, tmp_path / "cache"), loop(load_chats(packed)))
    array = tmp_path / "chats.json"
    array.write_text(json.dumps([json.loads(line) for line in path.read_text().splitlines()]))
    assert_same(made(array, tmp_path / "cache"), loop(load_chats(array)))

    records = [json.loads(line) for line in path.read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "chats.parquet")
    found = made(tmp_path / "chats.parquet", tmp_path / "cache")
    assert_same(found, loop(load_chats(tmp_path / "chats.parquet")))


def test_rows_that_are_encoded_already_pass_through(tmp_path):
    ids, mask = torch.tensor([5, 6, 7]), torch.tensor([False, True, True])
    counts = {"left_out": 2, "marker_differences": 1}
    rows = [Encoded(ids, mask, id="own", domain="d", **counts), talk("Hi", "Yes")]
    rows.append(Encoded(ids, mask))
    found = made(rows, tmp_path, max_length=2)
    facts = [["d", None, None], [2, 0, 0], [1, 0, 0]]
    assert [list(column) for column in found.row_facts()] == facts
    assert_same(found, loop(rows, max_length=2))
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"id": 3, "input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}) + "\n")
    assert_same(made(path, tmp_path), loop(load_chats(path)))


def test_the_result_is_a_sequence_with_views(tmp_path):
    chats = some(6)
    rows, expected = made(chats, tmp_path), loop(chats)
    assert_same(rows[2:5], expected[2:5])
    assert_same(rows[::-2], expected[::-2])
    assert_same([rows[-1]], expected[-1:])
    with pytest.raises(IndexError):
        rows[6]
    assert rows.row_facts()[0] == [row.domain for row in expected]
    for part, full in ((rows, expected), (rows[1:4], expected[1:4]), (rows[::2], expected[::2])):
        for length in (None, 1, 12, 10**6):
            shorter = [encode(row, TOKENIZER, length) for row in full]
            assert_same(part.cut(length), shorter)
            assert part.cut(length).lengths.tolist() == [len(row) for row in shorter]
            assert_same(part.cut(length).cut(12), part.cut(12).cut(length))
            assert max(part.cut(length).cut(12).lengths) == min(length or 12, 12)


@pytest.fixture(scope="module")
def in_three_parts(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_PART_CHATS", (3, 3))
        return made(some(8), tmp_path_factory.mktemp("parts"))


@settings(max_examples=20)
@example(size=100, length=None, listed=False, place=slice(None))
@given(
    st.integers(1, 300),
    st.none() | st.integers(1, 40),
    st.booleans(),
    st.builds(slice, st.integers(0, 7), st.integers(0, 8), st.sampled_from([1, 1, 1, 2, -1])),
)
def test_chunks_hold_all_tokens_in_order(in_three_parts, size, length, listed, place):
    whole = in_three_parts
    rows = whole[place].cut(length)
    expected = [encode(row, TOKENIZER, length) for row in list(whole)[place]]
    assert rows.lengths.tolist() == [len(row) for row in expected]
    assert rows.row_facts()[0] == [row.domain for row in expected]
    chunks = list(token_chunks(expected if listed else rows, size))
    assert [n for chunk in chunks for n in chunk.lengths] == [len(row) for row in expected]
    for name, column in (("input_ids", "input_ids"), ("loss_mask", "loss_mask")):
        found = [token for chunk in chunks for token in getattr(chunk, column).tolist()]
        assert found == [token for row in expected for token in getattr(row, name).tolist()]
    read = not listed and rows._rows.step == 1
    assert all(len(c.input_ids) <= size or len(c.lengths) == 1 for c in chunks if read)
    masks = [row.loss_mask.tolist() for row in expected]
    labels = [any(a and b for a, b in zip(mask, mask[1:], strict=False)) for mask in masks]
    assert rows_with_labels(rows).tolist() == labels
    assert token_counts(rows).tolist() == [len(row) for row in expected]
    held = {token for row in expected for token in row.input_ids.tolist()}
    assert set(np.flatnonzero(seen_tokens(rows, len(TOKENIZER))).tolist()) == held


def test_a_label_needs_both_its_tokens_in_one_row():
    ids = torch.tensor([5, 6])
    rows = [Encoded(ids, torch.tensor(mask)) for mask in ([False, True], [True, False], [True] * 2)]
    assert rows_with_labels(rows).tolist() == [False, False, True]


class Stop(Exception):
    pass


def counting(monkeypatch, chats, cache, stop_at: int | None = None):
    """The rows, and how many parts were encoded; a run may be stopped at one of them."""
    count, encoded = 0, module._encoded_part

    def counted(request, **given):
        nonlocal count
        if count == stop_at:
            raise Stop
        count += 1
        return encoded(request, **given)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_encoded_part", counted)
        return made(chats, cache), count


def test_an_interrupted_run_goes_on_behind_every_part(tmp_path, monkeypatch, small_parts):
    path = write(tmp_path / "chats.jsonl", some(5))
    expected = loop(load_chats(path))
    for stop_at in range(5):
        cache = tmp_path / f"cache {stop_at}"
        with pytest.raises(Stop):
            counting(monkeypatch, path, cache, stop_at)
        (folder,) = cache.iterdir()
        # Parts are torn wherever a kill falls.
        torn = [folder / f"{stop_at:06}-00000000.safetensors", folder / ".done.json.partial-1"]
        for file in torn:
            file.write_bytes(b"torn")
        rows, count = counting(monkeypatch, path, cache)
        assert count == 5 - stop_at, "what was made before is not made again"
        assert_same(rows, expected)
        assert not any(file.exists() for file in torn)


def test_a_part_that_lost_or_changed_bytes_is_made_again(tmp_path, monkeypatch, small_parts):
    chats = some(6)
    expected = list(made(chats, tmp_path))
    (folder,) = tmp_path.iterdir()
    parts = sorted(folder.glob("*.safetensors"))
    assert len(parts) == 3
    for number, path in enumerate(parts):
        data = path.read_bytes()
        for changed in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), None):
            if changed is None:
                path.unlink()
            else:
                path.write_bytes(changed)
                if len(changed) == len(data):
                    (folder / "done.json").unlink()
            rows, count = counting(monkeypatch, chats, tmp_path)
            assert count == 3 - number
            assert_same(rows, expected)
            assert path.read_bytes() == data


def test_a_finished_set_is_found_and_not_made_again(tmp_path, monkeypatch):
    chats = some(3)
    first = made(chats, tmp_path)
    monkeypatch.setattr(module, "_make", None)
    assert_same(made(some(3), tmp_path), list(first))


KILLED = """
import sys, time
from dspark_lab.chats import encode_all, load_tokenizer, store
store._PART_BYTES = 1, 1
encoded = store._encoded_part
def slow(request, **given):
    time.sleep(0.05)
    return encoded(request, **given)
store._encoded_part = slow
encode_all(sys.argv[1], load_tokenizer(), cache=sys.argv[2], workers=2, progress=False)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_and_leaves_no_process(tmp_path, monkeypatch, small_parts):
    path = write(tmp_path / "chats.jsonl", some(60))
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, str(path), str(cache)]
    process = subprocess.Popen(command, start_new_session=True)
    while (done := len([*cache.glob("*/0*.safetensors")])) < 5:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert done < 60
    # The lock is free once the last worker has seen its parent go.
    rows, count = counting(monkeypatch, path, cache)
    assert count <= 60 - done
    assert_same(rows, loop(load_chats(path)))


def test_the_fingerprint_knows_every_ingredient(tmp_path):
    path = write(tmp_path / "chats.jsonl", some(3))
    folders = set()

    def folder(chats=path, tokenizer=TOKENIZER, **options) -> str:
        found = quietly(
            encode_all, chats, tokenizer, cache=tmp_path / "c", progress=False, **options
        )
        return found.folder.name

    folders.add(folder())
    assert folder() in folders
    same = tmp_path / "elsewhere" / "chats.jsonl"
    same.parent.mkdir()
    same.write_bytes(path.read_bytes())
    assert folder(same) in folders
    other = load_tokenizer()
    other.chat_template = other.chat_template.replace("SmolLM", "Nobody")
    grown = load_tokenizer()
    grown.add_tokens(["Question"])
    renamed = tmp_path / "named.jsonl"
    renamed.write_bytes(path.read_bytes())
    variants = [
        {"tokenizer": other},
        {"tokenizer": grown},
        {"max_length": 20},
        {"last_answer_only": True},
        {"like": "automodel"},
        {"like": "deepspec"},
        {"on_error": "skip"},
        {"chats": renamed},  # ids of rows without one are made of the file's name
        {"chats": some(3)},
        {"chats": some(4)},
        {"chats": [*some(2), talk("Question 2", "x", id="chat 2")]},
        {"chats": write(tmp_path / "elsewhere" / "chats.jsonl", some(4))},
    ]
    for variant in variants:
        name = folder(**variant)
        assert name not in folders, variant
        folders.add(name)


def test_a_template_that_writes_the_date_makes_a_set_a_day(tmp_path, monkeypatch):
    from transformers.utils import chat_template_utils

    dated = load_tokenizer()
    dated.chat_template = "{{ day or strftime_now('%d %B') }}\n" + dated.chat_template
    folders = {}
    for day in (1, 2):
        now = datetime(2026, 5, day)
        monkeypatch.setattr(
            chat_template_utils, "datetime", SimpleNamespace(now=lambda now=now: now)
        )
        for options in (None, {"day": "Monday"}):
            found = encode_all(
                some(2), dated, cache=tmp_path, progress=False, template_options=options
            )
            row = encode(some(1)[0], dated, template_options=options)
            assert found[0].input_ids.equal(row.input_ids)
            folders[day, str(options)] = found.folder
    assert len(set(folders.values())) == 3
    assert folders[1, "{'day': 'Monday'}"] == folders[2, "{'day': 'Monday'}"]


def test_a_set_of_which_every_line_was_left_out_is_empty(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"turns": ["Hi"]}) + "\n")
    rows = made(path, tmp_path, on_error="skip")
    assert list(rows) == rows.lengths.tolist() == list(token_chunks(rows)) == []
    assert "no answer" in rows.skipped[0].reason
    path.write_text("")
    with pytest.raises(ValueError, match=r"prompts\.jsonl must hold at least one conversation"):
        made(path, tmp_path)


def test_values_of_a_table_that_json_has_not_are_no_text(tmp_path):
    said = [dict(message) for message in talk("Hi", "Yes").messages]
    rows = pa.table(
        {"messages": [said, said], "id": [b"one", None], "day": [datetime(2026, 5, 1)] * 2}
    )
    pq.write_table(rows, tmp_path / "odd.parquet")
    found = made(tmp_path / "odd.parquet", tmp_path, on_error="skip")
    assert [row.id for row in found] == ["odd:2"]
    assert found.skipped == load_chats(tmp_path / "odd.parquet", on_error="skip").skipped != []


def bad_file(tmp_path: Path) -> Path:
    good = json.dumps({"messages": talk("Hi", "Yes").messages})
    lines = [good, "{", good, json.dumps({"messages": []}), good]
    again = json.dumps({"id": "bad:1", "messages": talk("Hi", "Again").messages})
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([*lines, again, "[]"]) + "\n")
    return path


def test_the_first_bad_line_stops_the_run_with_its_number(tmp_path):
    path = bad_file(tmp_path)
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not valid JSON"):
        made(path, tmp_path)
    with pytest.raises(ValueError, match="conversation 'x'"):
        made([talk("Hi", "Yes"), Chat(({"role": "user", "content": "Hi"},), "x")], tmp_path)
    with pytest.raises(ValueError, match="at least one conversation"):
        made([], tmp_path)
    with pytest.raises(FileNotFoundError):
        made(tmp_path / "none.jsonl", tmp_path)
    with pytest.raises(ValueError, match="markers"):
        made(some(1), tmp_path, like="deepspec", markers=True)


@pytest.mark.parametrize("size", [1, 10**6])
def test_bad_lines_are_left_out_and_listed(tmp_path, monkeypatch, size):
    monkeypatch.setattr(module, "_PART_BYTES", (size, size))
    path = bad_file(tmp_path)
    rows, listed = made(path, tmp_path, on_error="skip"), load_chats(path, on_error="skip")
    assert_same(rows, loop(listed))
    assert [(s.file, s.line) for s in rows.skipped] == [(s.file, s.line) for s in listed.skipped]
    assert [s.line for s in rows.skipped] == [2, 4, 6, 7] and "id 'bad:1'" in rows.skipped[2].reason
    assert made(path, tmp_path, on_error="skip").skipped == rows.skipped


def test_repeated_ids_are_found_across_parts_and_runs(tmp_path, small_parts):
    chats = [talk("Hi", "Yes", id=f"id {i}") for i in (0, 1, 2, 3, 0)]
    path = write(tmp_path / "chats.jsonl", chats)
    for _ in range(2):  # the second run knows the ids of the first
        with pytest.raises(ValueError, match="line 5: id 'id 0' is already"):
            made(path, tmp_path / "cache")


fragments = st.sampled_from(
    ["hello", " the", "42", " ", "  ", "\n\n", "\t", "é", "e\u0301", "界", "👩\u200d👧", "Ġ"]
    + ["<|im_end|>", "<|im_start|>assistant\n", "\x00", "\u00a0", "<think>"]
)


@given(st.lists(fragments | st.text(max_size=3), max_size=8).map("".join))
def test_edges_from_bytes_are_the_offsets_of_the_tokenizer(text):
    (found,), (given,) = LEVEL.encode([text]), tokenize([text], TOKENIZER)
    assert found.ids == given.ids
    assert [tuple(edge) for edge in np.asarray(found.offsets).tolist()] == given.offsets
    tokens = [found.char_to_token(i) for i in range(len(text))]
    assert tokens == [given.char_to_token(i) for i in range(len(text))]


LEVEL = ByteLevel.of(TOKENIZER)


def test_a_token_whose_offsets_leave_its_last_space_out_is_left_to_the_tokenizer():
    class Odd:
        added_tokens_decoder = {}
        backend_tokenizer = SimpleNamespace(id_to_token=["aĠ", "Ġ", "Ġa", "ĠĠ", ""].__getitem__)

    for trims, first in ((False, b"a "), (True, b"\xff")):
        level = ByteLevel(Odd, trims)
        assert [level.bytes[id] for id in range(5)] == [first, b" ", b" a", b"  ", b"\xff"]


def test_the_environment_of_the_tokenizer_is_as_before(tmp_path, monkeypatch, small_parts):
    for before in (None, "true"):
        if before is None:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        else:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
        made(some(5), tmp_path / str(before), workers=2)
        assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_all_that_takes_a_list_takes_the_set(tmp_path, monkeypatch):
    listed = random_chats(11)
    rows = made(listed, tmp_path)
    assert Spans.of(rows, seq_len=20).run_tokens.tolist() == (
        Spans.of(listed, seq_len=20).run_tokens.tolist()
    )
    for call in (
        lambda data: supervision_table(data),
        lambda data: packing_table(data, (64,)),
        lambda data: describe(data),
        lambda data: choose_training(data, Shape.of("pocket"), time="H100").table,
        lambda data: (
            choose_training(
                data, Shape.of("pocket"), time="H100", seq_lens=(64,), packed=True
            ).table
        ),
    ):
        pd.testing.assert_frame_equal(call(rows), call(listed))
    assert digest(rows) == digest(listed)
    assert mask_token_id(None, tiny_target(), rows) == mask_token_id(None, tiny_target(), listed)
    for batch in (collate, lambda data, pad: pack(data, 64, pad)):
        assert batch(rows, 0).input_ids.equal(batch(listed, 0).input_ids)
    explorer = explore_anchors(rows, TOKENIZER, conversation=10)
    assert explorer.tables["tokens"]["token_id"].tolist() == listed[10].input_ids.tolist()
    # No call may ask for all rows to see of what kind they are.
    monkeypatch.setattr(type(rows), "__iter__", None, raising=False)
    assert supervision(rows, 4, 3).supervised == sum(int(r.loss_mask.sum()) for r in listed)


def test_spans_do_not_depend_on_where_a_stretch_ends(monkeypatch):
    listed = random_chats(9)
    expected = Spans.of(listed)
    for size in (1, 7, 50, 10**6):
        monkeypatch.setattr(stream, "STRETCH", size)
        found = Spans.of(listed)
        for name in ("run_document", "run_start", "run_tokens", "document_tokens"):
            assert getattr(found, name).tolist() == getattr(expected, name).tolist()


@pytest.mark.parametrize("options", [{}, {"features": "cached"}])
def test_a_run_on_the_set_is_the_run_on_the_list(options, tmp_path):
    config = replace(CONFIG, vocabulary="seen", max_length=20)
    rows = made(random_chats(11), tmp_path / "cache")
    found = losses(tmp_path / "a", config, chats=rows, **options)
    assert found == losses(tmp_path / "b", config, **options)


def test_a_run_supervises_as_the_trainer_that_it_is_told(tmp_path):
    for like in ("automodel", "speculators"):
        rows = encode_chats(some(4), TOKENIZER, 40, like)
        assert_same(rows, loop(some(4), like=like, max_length=40))
