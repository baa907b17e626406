"""A row of a file as a conversation, or as tokens with a loss mask.

Everything that a row says is honoured, refused by name, or says nothing of the conversation
(``source`` and the like). Whether a template writes what a message holds shows on rendering.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dspark_lab.chats.chat import Chat, Encoded, check_unicode

# Names of roles in files of ShareGPT's kind.
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"}
_ROLES |= {"tool_response": "tool", "function_response": "tool"}
_CALLS = ("function_call", "tool_call")
# The keys for the role and the words of a message, in two kinds of files.
_MESSAGE = (("role", "from"), ("content", "value"))

_LISTS = ("messages", "conversations")
_ANSWERS = ("completion", "response")
_WORDS = (*_LISTS, "prompt", *_ANSWERS, "instruction", "input", "output", "history", "turns")
_SHAPES = (
    "'messages', 'conversations', 'prompt', 'instruction', 'turns', or 'input_ids' with 'loss_mask'"
)
# Switches of the loss, of a message or of all of a row's.
_SWITCHES = ("weight", "train", "training", "loss", "loss_mask")
# Of a message, what is read here; all else is for the template.
_READ = {*_MESSAGE[0], *_MESSAGE[1], *_SWITCHES}
# What would make a conversation another one, and cannot be honoured.
_MEDIA = {"images", "image", "videos", "video", "audios", "audio", "objects"}
_REFUSED = {*_MEDIA, "chosen", "rejected", "functions", "documents", "chat_template"}
_REFUSED |= {"chat_template_kwargs", "enable_thinking", "reasoning_content", "tool_calls"}
_GENERATED_WHOLE = ("stop", "eos", "eos_token", "end_turn", "stop_sequence", *_CALLS, "tool_calls")
_CUT_OFF = ("length", "max_tokens")
_DOCUMENTS = ("segment_ids", "doc_ids", "seq_lens", "cu_seqlens")

Turn = tuple[dict[str, Any], bool]


def read_record(record: Any, default_id: str) -> Chat | Encoded:
    """The conversation of a row, or its tokens; a ValueError says why there is none."""
    if not isinstance(record, Mapping):
        raise ValueError(f"must be a JSON object, got {_kind(record)}")
    for key, value in record.items():
        # Such as rejected_messages; a number is the score of an answer.
        other = key.startswith(("chosen", "rejected")) and isinstance(value, (str, list, dict))
        if (other or key in _REFUSED) and not _empty(value):
            raise ValueError(f"has {key!r}, which cannot be honoured")
    for key in ("label", "kto_tag"):
        if record.get(key) is False:
            raise ValueError(f"has {key!r} false, an answer not to learn, which cannot be honoured")
    name, domain = record.get("id"), record.get("domain")
    if name is None:
        name = default_id
    elif isinstance(name, bool) or not isinstance(name, (str, int)):
        raise ValueError(f"id must be a string or an integer, got {_kind(name)}")
    name = str(name)
    check_unicode("id", name)
    if domain is not None:
        check_unicode("domain", _string("domain", domain))
    if _empty(record.get("input_ids")):
        return _chat(record, name, domain)
    words = any(not _empty(record.get(key)) for key in _WORDS)
    said = {key: value for key, value in record.items() if key != "loss_mask"}
    return _tokens(record, _chat(said, name, domain) if words else None, name, domain)


def _tokens(record: Mapping[str, Any], chat: Chat | None, name: str, domain: str | None) -> Encoded:
    columns = ("input_ids", "loss_mask", "labels", "attention_mask", "position_ids")
    ids, mask, labels, padding, positions = (_numbers(key, record.get(key)) for key in columns)
    masks = []
    if mask is not None:
        masks.append([value > 0.5 for value in mask])
    if labels is not None:
        if any(label not in (-100, token) for label, token in zip(labels, ids, strict=False)):
            raise ValueError("labels must be those of input_ids, or -100 where there is none")
        masks.append([label != -100 for label in labels])
    if not masks:
        raise ValueError("has 'input_ids' without 'loss_mask' or 'labels'")
    if any(len(mask) != len(ids) for mask in masks):
        raise ValueError(
            f"loss_mask must have {len(ids)} values, as input_ids; got {len(masks[0])}"
        )
    if masks[0] != masks[-1]:
        raise ValueError("has 'loss_mask' and 'labels' that differ")
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise ValueError("input_ids must be integers in [0, 2**31)")
    length = len(ids) if padding is None else padding.count(1)
    if padding is not None and padding != [1] * length + [0] * (len(ids) - length):
        raise ValueError("attention_mask must be 1 on tokens and 0 on padding behind them")
    if not length:
        raise ValueError("input_ids must hold at least one token, got none")
    if positions is not None and positions[:length] != [*range(length)]:
        raise ValueError("has 'position_ids' of several documents, which cannot be honoured")
    for key, values in ((key, _numbers(key, record.get(key)) or []) for key in _DOCUMENTS):
        # The first two number the documents, the others measure them.
        count = len(set(values[:length])) if key in _DOCUMENTS[:2] else len(values)
        if count > (2 if key == "cu_seqlens" else 1):
            raise ValueError(f"has {key!r} of several documents, which cannot be honoured")
    switches = {key: value for key, value in record.items() if key != "loss_mask"}
    keep = _switch("the row", switches, answer=True)
    mask = torch.tensor(masks[0][:length]) & keep
    return Encoded(torch.tensor(ids[:length], dtype=torch.long), mask, chat, name, domain)


def _chat(record: Mapping[str, Any], name: str, domain: str | None) -> Chat:
    turns, used = _turns(record)
    _check_others(record, used, turns)
    turns = _with_row_switches(record, turns)
    finished = _finished(record, [said for said, _ in turns])
    for key in ("system_prompt", "system"):
        if _empty(record.get(key)):
            continue
        said = {"role": "system", "content": _string(key, record[key])}
        if not turns or turns[0][0]["role"] != "system":
            turns.insert(0, (said, True))
        elif turns[0][0]["content"] != said["content"]:
            raise ValueError(f"has {key!r} beside another message of the system")
    supervised = [keep for _, keep in turns]
    return Chat(
        [message for message, _ in turns],
        name,
        domain,
        finished=finished,
        tools=_objects("tools", record.get("tools")) or None,
        supervised=None if all(supervised) else supervised,
    )


def _turns(record: Mapping[str, Any]) -> tuple[list[Turn], set[str]]:
    """The messages of a row, each with whether the loss may see it, and the keys that hold them."""
    lists = [key for key in _LISTS if not _empty(record.get(key))]
    if len(lists) == 2:
        raise ValueError("has both 'messages' and 'conversations', only one is allowed")
    if lists:
        return _said(lists[0], record[lists[0]]), set(lists)
    if record.get("prompt") is not None:
        answers = [key for key in _ANSWERS if record.get(key) is not None]
        if len(answers) == 2:
            raise ValueError("has both 'completion' and 'response', only one is allowed")
        turns = _said("prompt", record["prompt"], "user")
        for key in answers:
            # The loss sees the completion alone.
            turns = [(message, keep and not _answers(message)) for message, keep in turns]
            turns += _said(key, record[key], "assistant")
        return turns, {"prompt", *answers}
    if record.get("instruction") is not None:
        asked = _string("instruction", record["instruction"])
        if not _empty(record.get("input")):
            asked += "\n" + _string("input", record["input"])
        turns = []
        for index, pair in enumerate(_list("history", record.get("history") or [])):
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"history[{index}] must be a question and an answer")
            for role, text in zip(("user", "assistant"), pair, strict=True):
                turns += _said(f"history[{index}]", _string(f"history[{index}]", text), role)
        turns += _said("instruction", asked, "user")
        if record.get("output") is not None:
            turns += _said("output", record["output"], "assistant")
        return turns, {"instruction", "input", "output", "history"}
    if not _empty(record.get("turns")):
        texts = _list("turns", record["turns"])
        said = [_string(f"turns[{index}]", text) for index, text in enumerate(texts)]
        return [turn for text in said for turn in _said("turns", text, "user")], {"turns"}
    for key in (*_LISTS, "turns", "input_ids"):
        if record.get(key) is not None and _empty(_list(key, record[key])):
            raise ValueError(f"{key} must hold at least one message or token, got none")
    raise ValueError(f"must have {_SHAPES}, got keys {sorted(map(str, record))}")


def _said(key: str, value: Any, role: str = "") -> list[Turn]:
    """Messages, or the text of one, of this ``role``."""
    if role and not isinstance(value, list):
        return [({"role": role, "content": _string(key, value)}, True)]
    return [_message(f"{key}[{index}]", said) for index, said in enumerate(_list(key, value))]


def _message(where: str, raw: Any) -> Turn:
    if not isinstance(raw, dict):
        raise ValueError(f"{where} must be an object, got {_kind(raw)}")
    role_key, content_key = (_one_of(where, raw, keys) for keys in _MESSAGE)
    if role_key not in raw:
        raise ValueError(f"{where} must have {role_key!r}, got keys {sorted(raw)}")
    more = {key: value for key, value in raw.items() if key not in _READ and not _empty(value)}
    for key in sorted(_MEDIA.intersection(more)):
        raise ValueError(f"{where} has {key!r}, which cannot be honoured")
    role = _string(f"{where}.{role_key}", raw[role_key])
    content = raw.get(content_key)
    if role in _CALLS and "tool_calls" in more:
        raise ValueError(f"{where} has 'tool_calls' beside a call of its own")
    if role in _CALLS:
        role, content, more = "assistant", "", more | {"tool_calls": _calls(where, content)}
    role = _ROLES.get(role, role)
    if "tool_calls" in more:
        more["tool_calls"] = _objects(f"{where}.tool_calls", more["tool_calls"])
    if isinstance(content, list):
        content = "".join(_text_part(f"{where}.{content_key}", part) for part in content)
    elif content is None and more.keys() - {"name", "id"}:
        content = ""
    elif content_key not in raw:
        raise ValueError(f"{where} must have {content_key!r}, got keys {sorted(raw)}")
    message = {"role": role, "content": _string(f"{where}.{content_key}", content), **more}
    return message, _switch(where, raw, _answers(message))


def _one_of(where: str, raw: Mapping[str, Any], keys: tuple[str, str]) -> str:
    """Which of two keys for the same a message has."""
    held = [key for key in keys if raw.get(key) is not None]
    if len(held) == 2:
        raise ValueError(f"{where} has both {keys[0]!r} and {keys[1]!r}, only one is allowed")
    return held[0] if held else keys[0]


def _answers(message: Mapping[str, Any]) -> bool:
    return bool(message["role"] == "assistant")


def _calls(where: str, value: Any) -> list[dict[str, Any]]:
    """The tool calls that a message of their own role writes as JSON text."""
    try:
        calls = parse_json(_string(where, value))
    except ValueError as error:
        raise ValueError(f"{where} must hold a call as JSON: {error}") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise ValueError(f"{where} must hold calls with 'name' and 'arguments'")
    return [{"type": "function", "function": call} for call in calls]


def _switch(where: str, raw: Mapping[str, Any], answer: bool) -> bool:
    """Whether the loss may see a message, by the switches that it has."""
    found = {key: raw[key] for key in _SWITCHES if raw.get(key) is not None}
    for key, value in found.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            allowed = "only 0 and 1, false and true can be honoured"
            raise ValueError(f"{where} has {key} {value!r}: {allowed}")
        if value and not answer and key != "weight":
            raise ValueError(f"{where} has {key} {value!r}, but the model generates answers alone")
    if len({bool(value) for value in found.values()}) == 2:
        raise ValueError(f"{where} has switches that contradict each other: {found}")
    return all(found.values())


def _with_row_switches(record: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    """The messages, those left out too that a switch of the whole row leaves out."""
    mask = record.get("loss_mask")
    if not isinstance(mask, list):
        keep_row = _switch("the row", record, answer=True)
        return [(message, keep and keep_row) for message, keep in turns]
    if len(mask) != len(turns):
        wanted = f"a value for each of {len(turns)} messages"
        raise ValueError(f"loss_mask must have {wanted}, got {len(mask)}")
    return [
        (said, keep and _switch(f"message {index}", {"loss_mask": value}, _answers(said)))
        for index, ((said, keep), value) in enumerate(zip(turns, mask, strict=True))
    ]


def _finished(record: Mapping[str, Any], messages: list[dict[str, Any]]) -> bool:
    """Whether the last answer ended by itself; what its message says of that is taken out."""
    last = max((i for i, message in enumerate(messages) if _answers(message)), default=-1)
    # Of servers, stop_reason is the token or the text that ended an answer, too.
    cut_off = _is_cut_off(record.get("finish_reason")) or record.get("stop_reason") in _CUT_OFF
    for index, message in enumerate(messages):
        if _is_cut_off(message.pop("finish_reason", None)):
            cut_off = True
            if index != last:
                raise ValueError(f"the answer in message {index} was cut off, but is not the last")
    finished = record.get("finished")
    if finished is not None and not isinstance(finished, bool):
        raise ValueError(f"finished must be true or false, got {_kind(finished)}")
    if finished and cut_off:
        raise ValueError("has finished true and finish_reason 'length'")
    return not cut_off and finished is not False


def _is_cut_off(reason: Any) -> bool:
    if reason is not None and reason not in _CUT_OFF + _GENERATED_WHOLE:
        raise ValueError(f"has finish_reason {reason!r}, which cannot be honoured")
    return reason in _CUT_OFF


def _check_others(record: Mapping[str, Any], used: set[str], turns: list[Turn]) -> None:
    """Refuse words in other keys than those that were read, unless they are the same words."""
    known = {message["content"].strip() for message, _ in turns}
    for key in _WORDS:
        value = record.get(key)
        if key in used or _empty(value):
            continue
        same = isinstance(value, str) and value.strip() in known
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            same = all(str(item.get("content")).strip() in known for item in value)
        if not same:
            raise ValueError(f"has {key!r} beside {sorted(used)}, and what it says is not there")


def parse_json(text: str) -> Any:
    """The value that a text holds; a key that stands twice would lose what it said first."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return item


def _objects(where: str, value: Any) -> list[dict[str, Any]]:
    """A list of objects, or the JSON text of one; empty for none."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError as error:
            raise ValueError(f"{where} must be a list or its JSON text: {error}") from None
    if _empty(value):
        return []
    objects = _list(where, value)
    for index, item in enumerate(objects):
        if not isinstance(item, dict):
            raise ValueError(f"{where}[{index}] must be an object, got {_kind(item)}")
    return objects


def _text_part(where: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        found = repr(part.get("type")) if isinstance(part, dict) else _kind(part)
        raise ValueError(f"{where} may only have parts of type 'text', got {found}")
    return _string(f"{where} of type 'text'", part.get("text"))


def _numbers(where: str, value: Any) -> Any:
    """A list of numbers, or None; NaN is no number, and differs from itself."""
    if value is None:
        return None
    if not all(isinstance(n, (bool, int, float)) and n == n for n in _list(where, value)):
        raise ValueError(f"{where} must be a list of numbers")
    return value


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list, got {_kind(value)}")
    return value


def _string(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, got {_kind(value)}")
    return value


def _empty(value: Any) -> bool:
    if value is None or isinstance(value, str):
        return value is None or not value.strip()
    return isinstance(value, Sequence | Mapping) and not len(value)


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
