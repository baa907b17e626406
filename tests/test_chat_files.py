"""Conversations from files: every shape that people hold, and nothing lost in silence."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dspark_lab.chats import Chat, Encoded, load_chats, reading
from tests.templates import said

TALK = said("Hi", "One.", "And?", "Two.")
USER, ANSWER = TALK[:2]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in TALK
]
PARTS = [{"type": "text", "text": "O"}, {"type": "text", "text": "ne."}]
SILENT = {"role": "assistant", "content": ""}
CALL = {"name": "add", "arguments": {"a": 1}}


def write_lines(path, *lines):
    """Objects become JSON, strings and bytes go in as they are."""
    raw = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in raw))
    return path


def load(tmp_path, *lines):
    return load_chats(write_lines(tmp_path / "mine.jsonl", *lines))


TWO = [USER, ANSWER]
# A row, and its messages.
SHAPES = {
    "messages": ({"messages": TALK}, TALK),
    "conversations": ({"conversations": TALK}, TALK),
    "conversations of ShareGPT": ({"conversations": SHAREGPT}, TALK),
    "an empty key beside the real one": ({"messages": TALK, "conversations": None}, TALK),
    "keys of two kinds": (
        {"messages": [{"from": "human", "content": "Hi"}, ANSWER | {"from": None, "value": None}]},
        TWO,
    ),
    "parts of a text": ({"messages": [USER, ANSWER | {"content": PARTS}]}, TWO),
    "keys that say nothing": ({"messages": [USER, ANSWER | {"tool_calls": None, "x": []}]}, TWO),
    "prompt and response": ({"prompt": "Hi", "response": "One."}, TWO),
    "prompt and completion": ({"prompt": "Hi", "completion": "One."}, TWO),
    "both as lists": ({"prompt": [USER], "completion": [ANSWER]}, TWO),
    "a list and a text": ({"prompt": [USER], "completion": "One."}, TWO),
    "an instruction": ({"instruction": "Hi", "input": "", "output": "One."}, TWO),
    "an instruction with an input": (
        {"instruction": "Add", "input": "1, 2", "output": "3"}, said("Add\n1, 2", "3")
    ),
    "a history": (
        {"instruction": "And?", "output": "Two.", "history": [["Hi", "One."]], "system": "Go"},
        said("Hi", "One.", "And?", "Two.", system="Go"),
    ),
    "the system's message beside": (
        {"messages": TALK, "system": "Be kind."},
        said("Hi", "One.", "And?", "Two.", system="Be kind."),
    ),
    "the same twice": (
        {"messages": said("Hi", "One.", system="Go"), "system": "Go", "prompt": "Hi"},
        said("Hi", "One.", system="Go"),
    ),
    "turns": ({"turns": ["First", "Then?"]}, said("First", "user=Then?")),
    "a prompt alone": ({"prompt": "Hi"}, [USER]),
    "a prompt of messages": ({"prompt": [USER], "completion": None}, [USER]),
    "calls as messages": (
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "2"},
            ]
        },
        [
            USER,
            SILENT | {"tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "content": "2"},
        ],
    ),
    "calls as JSON text, and no content": (
        {"messages": [USER, SILENT | {"content": None, "tool_calls": json.dumps([CALL])}]},
        [USER, SILENT | {"tool_calls": [CALL]}],
    ),
    "what a template may write": (
        {"messages": [USER, ANSWER | {"reasoning_content": "hm", "name": "Bo"}]},
        [USER, ANSWER | {"reasoning_content": "hm", "name": "Bo"}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_a_row_is_read(tmp_path, name):
    row, messages = SHAPES[name]
    (chat,) = load(tmp_path, row)
    assert isinstance(chat, Chat) and chat.messages == tuple(messages)
    assert (chat.id, chat.domain, chat.finished, chat.tools) == ("mine:1", None, True, None)
    assert chat.supervised is None


def test_what_stands_beside_the_messages_is_read(tmp_path):
    tools = [{"name": "add"}]
    rows = [
        {"id": 7, "domain": "math", "finished": False, "tools": tools},
        {"id": "b", "finish_reason": "length", "tools": json.dumps(tools), "source": "web"},
        {"finish_reason": "stop", "tools": "[]", "label": True, "images": []},
        {"messages": [USER, ANSWER | {"finish_reason": "length"}]},
        *({"stop_reason": reason} for reason in ("length", "max_tokens", "</s>", 7, None)),
    ]
    chats = load(tmp_path, *({"messages": TWO} | row for row in rows), "", " \r").conversations
    assert [chat.id for chat in chats[:5]] == ["7", "b", "mine:3", "mine:4", "mine:5"]
    assert [chat.domain for chat in chats[:3]] == ["math", None, None]
    assert "".join("fT"[chat.finished] for chat in chats) == "ffTfffTTT"
    assert [chat.tools for chat in chats[:3]] == [tuple(tools), tuple(tools), None]
    assert all(chat.messages == tuple(TWO) for chat in chats)


@pytest.mark.parametrize("off", [0, False, 0.0])
@pytest.mark.parametrize("switch", ["weight", "train", "training", "loss", "loss_mask"])
def test_every_switch_of_the_loss_is_honoured(tmp_path, switch, off):
    on = True if off is False else 1
    rows = [
        {"messages": [USER, ANSWER | {switch: off}, *TALK[2:]]},
        {"messages": [USER, ANSWER | {switch: on}, *TALK[2:]]},
        {"messages": [USER | {switch: off}, ANSWER | {switch: None}, *TALK[2:]]},
        {"messages": TALK, switch: off},
        {"messages": TALK, switch: on},
        {"conversations": SHAREGPT, "system": "Go", "loss_mask": [off, off, 0, on]},
    ]
    if switch != "loss_mask":
        (tokens,) = load(tmp_path, {"input_ids": [5, 6], "loss_mask": [0, 1], switch: off})
        assert not tokens.loss_mask.any()
    chats = load(tmp_path, *rows).conversations
    kept = [chat.supervised and [i for i in chat.answers if chat.supervised[i]] for chat in chats]
    assert kept == [[3], None, [1, 3], [], None, [4]]


def test_tokens_with_a_mask_are_a_row_with_or_without_their_words(tmp_path):
    ids = {"input_ids": [5, 6, 7]}
    rows = [
        ids | {"id": "a", "domain": "math", "loss_mask": [0, 1, 1], "seq_lens": [3]},
        ids | {"labels": [-100, 6, 7], "attention_mask": [1, 1, 1], "position_ids": [0, 1, 2]},
        ids | {"loss_mask": [False, True, 1.0], "attention_mask": [1, 1, 0]},
        ids | {"loss_mask": [0, 1, 1], "labels": [-100, 6, 7], "messages": TWO},
    ]
    chats = load(tmp_path, *rows)
    assert all(isinstance(item, Encoded) for item in chats)
    assert [item.input_ids.tolist() for item in chats] == [[5, 6, 7], [5, 6, 7], [5, 6], [5, 6, 7]]
    masks = [item.loss_mask.tolist() for item in chats]
    assert masks == [[False, True, True]] * 2 + [[False, True], [False, True, True]]
    assert chats[0].input_ids.dtype == torch.long and chats[0].loss_mask.dtype == torch.bool
    assert [item.id for item in chats] == ["a", "mine:2", "mine:3", "mine:4"]
    assert chats[0].domain == "math" and chats[0].chat is None
    assert chats[3].chat.messages == tuple(TWO)
    with pytest.raises(ValueError, match="'a' must have messages, got tokens alone"):
        print(chats.conversations)


def test_answers_in_a_prompt_are_not_supervised(tmp_path):
    (chat,) = load(tmp_path, {"prompt": TALK[:3], "completion": "Two."}).conversations
    assert chat.messages == tuple(TALK) and chat.supervised == (True, False, True, True)


MANY = [{"id": str(n), "messages": said("Hi", f"Number {n}. 🎉")} for n in range(2500)]


def kinds_of_files(folder):
    text = "\n".join(map(json.dumps, MANY)).encode()
    table = pa.Table.from_pylist(MANY)
    (folder / "lines.jsonl").write_bytes(b"\xef\xbb\xbf" + text + b"\r\n\n")
    (folder / "array.json").write_text("\n " + json.dumps(MANY, indent=1))
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(text))
    (folder / "array.gz").write_bytes(gzip.compress(json.dumps(MANY).encode()))
    pq.write_table(table, folder / "rows.parquet")
    pq.write_table(table, folder / "misnamed.jsonl")
    with (
        pa.OSFile(str(folder / "rows.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as out,
    ):
        out.write_table(table)
    saved = folder / "saved"
    saved.mkdir()
    files = []
    for part in range(2):
        files.append({"filename": f"data-0000{part}-of-00002.arrow"})
        piece = table.slice(part * 1250, 1250)
        with pa.OSFile(str(saved / files[-1]["filename"]), "wb") as file:
            with pa.ipc.new_stream(file, table.schema) as out:
                out.write_table(piece, max_chunksize=500)
    (saved / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    (saved / "dataset_info.json").write_text("{}")
    return sorted(path for path in folder.iterdir())


def test_every_kind_of_file_gives_the_same_conversations(tmp_path):
    paths = kinds_of_files(tmp_path)
    assert len(paths) == 8
    for path in paths:
        chats = load_chats(path)
        assert [chat.id for chat in chats] == [row["id"] for row in MANY], path
        assert [list(chat.messages) for chat in chats] == [row["messages"] for row in MANY], path
        assert chats.skipped == []


def test_only_newlines_end_a_line(tmp_path):
    line = json.dumps({"prompt": "a\u2028b\u0085c", "response": ""}, ensure_ascii=False)
    (chat,) = load(tmp_path, line + "\r\n")
    assert chat.messages[0]["content"] == "a\u2028b\u0085c"


def test_a_file_of_another_kind_says_what_it_is(tmp_path):
    text = json.dumps({"messages": TWO}).encode()
    whole = gzip.compress(text)
    for content, complaint in (
        (text.decode().encode("utf-16"), "UTF-16"),
        (text.decode().encode("utf-16-le"), "UTF-16"),
        (text.decode().encode("utf-16-be"), "UTF-16"),
        (text.decode().encode("utf-32"), "UTF-32"),
        (b"PK\x03\x04rest", "zip"),
        (b"\x28\xb5\x2f\xfdrest", "zstd"),
        (b"\xfd7zXZ\x00", "xz"),
        (b"BZh91AY", "bzip2"),
        (b"\x80\x04\x95", "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (whole[:-9], "broken gzip"),
        (whole[:12] + b"junk" + whole[16:], "broken gzip"),
        (gzip.compress(b"PAR1junk"), "compressed Parquet"),
        (b"PAR1junkPAR1", "broken Parquet"),
        (b"ARROW1\x00\x00junk", "broken Arrow"),
        (b'[{"messages": [', "JSON array, but is none"),
        (b"", "no conversations"),
        (b"\n \n", "no conversations"),
        (b"[]", "no conversations"),
        (b'{\n "messages": []}', "goes on over several lines: write one object a line"),
    ):
        path = tmp_path / "x.jsonl"
        path.write_bytes(content)
        for on_error in ("raise", "skip"):
            with pytest.raises(ValueError, match=f"^{path}.*{complaint}"):
                load_chats(path, on_error=on_error)
    with pytest.raises(FileNotFoundError):
        load_chats(tmp_path / "nowhere.jsonl")


def test_a_folder_is_a_saved_data_set_or_refused(tmp_path):
    with pytest.raises(ValueError, match="saved Hugging Face data set"):
        load_chats(tmp_path)
    for name, content, complaint in (
        ("state", {"_data_files": []}, "list the data set's files"),
        ("state", {"_indices_data_files": [{}]}, "flatten_indices"),
        ("state", {"_data_files": [{"filename": "a.arrow"}]}, r"a\.arrow"),
        ("dataset_dict", {"splits": ["train", "test"]}, r"splits: .*\['train', 'test'\]"),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        with pytest.raises((ValueError, FileNotFoundError), match=complaint):
            load_chats(tmp_path)


TOKENS = {"input_ids": [1, 2], "loss_mask": [0, 1]}
BAD = [
    ('{"messages": [', "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    (b'{"prompt": "\xff", "response": ""}', "not valid UTF-8: .* at byte 12"),
    ("", "blank line"),
    (TWO, "must be a JSON object, got a list"),
    ({"text": "hello"}, r"must have 'messages', .* got keys \['text'\]"),
    ({"prompt": "Hi", "response": 1}, "response must be a string, got a number"),
    ({"prompt": "Hi", "response": "a", "completion": "b"}, "both 'completion' and 'response'"),
    ({"messages": "hello"}, "messages must be a list, got a string"),
    ({"messages": []}, "at least one message"),
    ({"turns": []}, "at least one"),
    (TOKENS | {"response": "One."}, r"must have 'messages', .*'response'"),
    ({"turns": [1]}, r"turns\[0\] must be a string"),
    ({"messages": [USER, "the"]}, r"messages\[1\] must be an object, got a string"),
    ({"messages": [{"role": "user"}, ANSWER]}, r"messages\[0\] must have 'content'"),
    ({"messages": [{"content": "x"}, ANSWER]}, r"messages\[0\] must have 'role'"),
    ({"messages": [{"role": "narrator", "content": ""}]}, "got 'narrator'"),
    ({"messages": [{"role": 3, "content": ""}]}, "role must be a string, got a number"),
    ({"messages": [USER, ANSWER | {"content": ["the"]}]}, "'text', got a string"),
    ({"messages": [USER, ANSWER | {"value": "b"}]}, r"\[1\] has both 'content' and 'value'"),
    ({"messages": [USER | {"from": "human"}, ANSWER]}, "has both 'role' and 'from'"),
    (
        {"messages": [{"from": "tool_call", "value": json.dumps(CALL), "tool_calls": [CALL]}]},
        "'tool_calls' beside a call of its own",
    ),
    ({"messages": [USER | {"content": [{"type": "image_url"}]}]}, "got 'image_url'"),
    ({"messages": [USER | {"content": [{"type": "text"}]}]}, "string, got null"),
    ({"messages": [USER, ANSWER | {"content": None}]}, "content must be a string, got null"),
    ({"messages": [USER, ANSWER | {"weight": 0.5}]}, r"messages\[1\] has weight 0.5"),
    ({"messages": [USER, ANSWER | {"train": "no"}]}, r"messages\[1\] has train 'no'"),
    ({"messages": [USER, ANSWER | {"train": True, "weight": 0}]}, "contradict"),
    ({"messages": [USER | {"train": True}, ANSWER]}, r"messages\[0\] has train True"),
    ({"messages": TWO, "weight": 2}, "the row has weight 2"),
    ({"messages": TWO, "loss_mask": [0]}, "loss_mask must have a value for each of 2 messages"),
    ({"messages": TWO, "loss_mask": [1, 1]}, "message 0 has loss_mask 1"),
    ({"messages": [USER, ANSWER | {"images": ["a.jpg"]}]}, r"messages\[1\] has 'images'"),
    ({"messages": TWO, "tools": "[{"}, "tools must be a list or its JSON text"),
    ({"messages": TWO, "tools": ["add"]}, r"tools\[0\] must be an object"),
    ({"messages": [USER, ANSWER | {"tool_calls": "x"}]}, r"messages\[1\].tool_calls must be"),
    ({"messages": [{"role": "function_call", "content": "x"}]}, "a call as JSON"),
    ({"messages": [{"role": "function_call", "content": "{}"}]}, "calls with 'name'"),
    ({"messages": said("Hi", system="Go"), "system": "Stop"}, "another message of the system"),
    ({"messages": TWO, "conversations": TWO}, "only one is allowed"),
    ({"messages": TWO, "response": "Two."}, "'response' beside"),
    ({"messages": [USER], "output": "One."}, "'output' beside"),
    ({"prompt": "Hi", "response": "One.", "history": [["a", "b"]]}, "'history' beside"),
    ({"instruction": "Hi", "history": [["a"]]}, r"history\[0\] must be a question and an answer"),
    ({"messages": TWO, "id": [1]}, "id must be a string or an integer"),
    ({"messages": TWO, "domain": 1}, "domain must be a string, got a number"),
    ({"messages": TWO, "id": "first"}, "'first' is already that of line 1"),
    ({"messages": TWO, "finished": 1}, "finished must be true or false"),
    ({"messages": TWO, "finished": True, "finish_reason": "length"}, "finished true"),
    ({"messages": TWO, "finish_reason": "error"}, "finish_reason 'error'"),
    ({"messages": [USER, ANSWER | {"finish_reason": "length"}, *TALK[2:]]}, "is not the last"),
    ({"messages": TWO, "label": False}, "'label' false"),
    ('{"prompt": "Hi", "response": "One.", "prompt": "Ho"}', "the key 'prompt' twice"),
    ({"messages": TWO, "tools": '[{"name": "a", "name": "b"}]'}, "the key 'name' twice"),
    ({"messages": [USER, ANSWER | {"tool_calls": [{"function": "f"}]}]}, "'function' if it has"),
    ('{"prompt": "\\ud83c", "response": ""}', "surrogate"),
    ({"messages": [USER, ANSWER | {"reasoning_content": "\ud83c"}]}, "surrogate"),
    ({"messages": [USER, ANSWER | {"tool_calls": [CALL | {"id": "\ud83c"}]}]}, "surrogate"),
    ({"messages": TWO, "tools": [{"name": "\ud83c"}]}, "tools must be Unicode"),
    ({"messages": TWO, "id": "\ud83c"}, "id must be Unicode"),
    (TOKENS | {"loss_mask": None}, "without 'loss_mask' or 'labels'"),
    (TOKENS | {"loss_mask": [1]}, "loss_mask must have 2 values"),
    (TOKENS | {"loss_mask": "01"}, "loss_mask must be a list"),
    (TOKENS | {"loss_mask": [float("nan"), 1]}, "loss_mask must be a list of numbers"),
    (TOKENS | {"input_ids": [1, -2]}, "input_ids must be integers"),
    (TOKENS | {"input_ids": [1, 2.5]}, "input_ids must be integers"),
    (TOKENS | {"input_ids": [1, 2**40]}, "input_ids must be integers"),
    (TOKENS | {"labels": [1, 3]}, "labels must be those of input_ids"),
    (TOKENS | {"labels": [1, -100]}, "that differ"),
    (TOKENS | {"attention_mask": [0, 1]}, "attention_mask must be 1 on tokens"),
    (TOKENS | {"attention_mask": [1, 10**30]}, "attention_mask must be 1 on tokens"),
    (TOKENS | {"position_ids": [0, 0]}, "several documents"),
    (TOKENS | {"segment_ids": [1, 2]}, "'segment_ids' of several documents"),
    (TOKENS | {"cu_seqlens": [0, 1, 2]}, "'cu_seqlens' of several documents"),
    (TOKENS | {"position_ids": 0}, "position_ids must be a list"),
    ({"input_ids": [], "loss_mask": []}, "at least one"),
]  # fmt: skip
REFUSED = "images image videos video audios audio objects chosen rejected functions documents "
REFUSED += "chosen_response rejected_messages reasoning_content tool_calls enable_thinking"
BAD += [({"messages": TWO, key: ["x"]}, f"has '{key}'") for key in REFUSED.split()]


def test_a_row_that_cannot_be_read_is_named_with_its_file_and_line(tmp_path):
    good = {"messages": TWO}
    for line, complaint in BAD:
        path = write_lines(tmp_path / "x.jsonl", good | {"id": "first"}, line, good)
        with pytest.raises(ValueError, match=complaint) as caught:
            load_chats(path)
        assert str(caught.value).startswith(f"{path}, line 2: "), complaint
        rest = load_chats(path, on_error="skip")
        assert [chat.id for chat in rest] == ["first", "x:3"]
        (skipped,) = rest.skipped
        assert (skipped.file, skipped.line) == (str(path), 2)
        assert f"{path}, line 2: {skipped.reason}" == str(caught.value)


@pytest.mark.parametrize("piece", [1, 7, 10**6])
def test_an_array_is_read_in_pieces_as_it_is_read_whole(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(reading, "_PIECE", piece)
    path = tmp_path / "array.json"
    said = {"messages": [{"role": "user", "content": 'é🎉 "], [{,' + 5000 * "x"}], "a": [1e5, {}]}
    for text in (
        "[]",
        " [ ] \n",
        json.dumps([said] * 3),
        json.dumps([[], 12.5, said, "]"], indent=1),
    ):
        path.write_text("\ufeff" + text, encoding="utf-8")
        found = [json.loads(raw) for _, raw in reading.raw_rows(path)]
        assert found == json.loads(text)
    good = json.dumps([said, said])
    for text in (good[:-1], good + "]", good[:-1] + ",]", "[,]", good.replace("}, {", "} {")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="JSON array, but is none"):
            list(reading.raw_rows(path))


def test_rows_of_tables_and_arrays_are_counted_as_rows(tmp_path):
    rows = [{"messages": TWO, "label": True}, {"messages": TWO, "label": False}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=f"^{path}, row 2: has 'label' false"):
            load_chats(path)
        (skipped,) = load_chats(path, on_error="skip").skipped
        assert skipped.line == 2


# What may stand in a row and a message. Each is changed in turn; the conversation must change with
# it, or be refused, unless the key is one of those that say nothing of the conversation.
ROW = {
    "messages": TALK, "id": "a", "domain": "math", "finished": False, "finish_reason": "length",
    "tools": [{"name": "add"}], "system": "Go", "system_prompt": "Go", "loss_mask": [0, 1, 0, 0],
    "weight": 0, "train": False, "training": False, "loss": False, "images": ["a"], "image": "a",
    "videos": ["a"], "video": "a", "audios": ["a"], "audio": "a", "objects": {"a": 1},
    "chosen": "a", "rejected": "a", "rejected_response": "a", "label": False, "kto_tag": False,
    "conversations": [ANSWER], "prompt": "a", "completion": "a", "response": "a",
    "instruction": "a", "input": "a", "output": "a", "history": [["a", "b"]], "turns": ["a"],
    "input_ids": [1, 2, 3, 4], "functions": [{"name": "add"}], "documents": ["a"],
    "chat_template": "a", "chat_template_kwargs": {"a": 1}, "enable_thinking": False,
    "reasoning_content": "hm", "tool_calls": [CALL], "rejected_messages": [ANSWER],
}  # fmt: skip
MESSAGE = {
    "role": "system", "content": "changed", "weight": 0, "train": False, "training": False,
    "loss": False, "loss_mask": 0, "finish_reason": "length", "images": ["a"], "audio": "a",
    "reasoning_content": "hm", "reasoning": "hm", "thinking": "hm", "tool_calls": [CALL],
    "function_call": CALL, "name": "Bo", "tool_call_id": "7", "prefix": True, "unknown": False,
}  # fmt: skip


def seen(tmp_path, row):
    (item,) = load(tmp_path, row)
    chat = item if isinstance(item, Chat) else item.chat
    tokens = None if isinstance(item, Chat) else item.input_ids.tolist()
    fields = (chat.messages, chat.id, chat.domain, chat.finished, chat.tools, chat.supervised)
    return json.dumps([fields, tokens])


def test_no_field_is_lost_in_silence(tmp_path):
    plain = {"messages": TALK}
    before = seen(tmp_path, plain)
    for key, value in ROW.items():
        row = {"messages": said("Hi", "changed")} if key == "messages" else plain | {key: value}
        try:
            assert seen(tmp_path, row) != before, key
        except ValueError as error:
            assert repr(key) in str(error) or key in str(error), (key, error)
    for key in ("source", "url", "score", "meta"):
        assert seen(tmp_path, plain | {key: "x"}) == before
    for key, value in MESSAGE.items():
        row = {"messages": [*TALK[:3], TALK[3] | {key: value}]}
        try:
            assert seen(tmp_path, row) != before, key
        except ValueError as error:
            assert repr(key) in str(error), (key, error)


def test_a_table_gives_no_object_the_fields_of_others(tmp_path):
    # A column has one set of fields, so that a call has an empty one for each argument of others.
    calls = [{"type": "function", "function": {"name": n, "arguments": {n: [n]}}} for n in "ab"]
    row = {"messages": [USER, SILENT | {"tool_calls": calls}]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "calls.parquet")
    assert load_chats(tmp_path / "calls.parquet")[0].messages[1]["tool_calls"] == calls
