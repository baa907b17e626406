"""Conversations from JSONL files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dspark_lab.chats.chat import Chat
from dspark_lab.checks import checked
from dspark_lab.files import DATA

SHIPPED_CHATS = DATA / "conversations.jsonl"

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}

# What these keys say would be lost, because a message here is a role and a text. Empty is fine.
_LOST_IN_MESSAGE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
_LOST_IN_RECORD = ("tools", "functions", "system")


@checked
def load_chats(path: str | os.PathLike[str] | None = None) -> list[Chat]:
    """Reads a JSONL file, one conversation a line; without a path, the shipped conversations.

    A line is an object with one of

    - ``messages`` or ``conversations``: a list of ``{"role", "content"}``, or of ShareGPT's
      ``{"from", "value"}`` where ``human`` is the user and ``gpt`` the assistant. ``content`` is a
      string, or a list of ``{"type": "text", "text": ...}`` parts, which are joined.
    - ``prompt`` and ``response``: two strings.

    ``id`` (a string or an integer) defaults to ``"<file stem>:<line>"``; ``domain`` is a string or
    absent; ``finished`` is true, false or absent (true). Other keys are metadata and not read,
    except those whose content would be lost, which are refused unless empty: tools, tool calls,
    reasoning beside the content, a message ``weight`` other than 1. Blank lines may end the file. A
    line that is anything else or repeats an id is a ValueError, ``"path:line: ..."``.
    """
    path = Path(SHIPPED_CHATS if path is None else path)
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: no conversations, expected one JSON object a line")
    chats: list[Chat] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            chat = _chat_from_record(_record_from_line(line), f"{path.stem}:{number}")
            if chat.id in line_of_id:
                raise ValueError(f"id {chat.id!r} is already that of line {line_of_id[chat.id]}")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        line_of_id[chat.id] = number
        chats.append(chat)
    return chats


def _record_from_line(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise ValueError("blank line, which only the end of a file may have")
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object, got {_kind(record)}")
    return record


def _chat_from_record(record: dict[str, Any], default_id: str) -> Chat:
    _refuse_if_not_empty(record, _LOST_IN_RECORD)
    lists = [key for key in ("messages", "conversations") if key in record]
    if len(lists) == 2:
        raise ValueError("has both 'messages' and 'conversations', only one is allowed")
    if lists:
        raw = record[lists[0]]
        if not isinstance(raw, list):
            raise ValueError(f"{lists[0]} must be a list, got {_kind(raw)}")
        messages = [_message(f"{lists[0]}[{i}]", message) for i, message in enumerate(raw)]
    elif "prompt" in record and "response" in record:
        prompt, response = (_string(key, record[key]) for key in ("prompt", "response"))
        messages = [{"role": "user", "content": prompt}]
        messages += [{"role": "assistant", "content": response}]
    else:
        wanted = "'messages', 'conversations', or 'prompt' and 'response'"
        raise ValueError(f"must have {wanted}, got keys {sorted(record)}")
    name, domain = record.get("id"), record.get("domain")
    if name is None:
        name = default_id
    elif isinstance(name, bool) or not isinstance(name, (str, int)):
        raise ValueError(f"id must be a string or an integer, got {_kind(name)}")
    if domain is not None:
        _string("domain", domain)
    finished = record.get("finished", True)
    if not isinstance(finished, bool):
        raise ValueError(f"finished must be true or false, got {_kind(finished)}")
    return Chat(messages, str(name), domain, finished)


def _message(where: str, raw: Any) -> dict[str, str]:
    if not isinstance(raw, dict):
        raise ValueError(f"{where} must be an object, got {_kind(raw)}")
    role_key, content_key = ("from", "value") if "from" in raw else ("role", "content")
    for key in (role_key, content_key):
        if key not in raw:
            raise ValueError(f"{where} must have {key!r}, got keys {sorted(raw)}")
    _refuse_if_not_empty(raw, _LOST_IN_MESSAGE, where + " ")
    if raw.get("weight", 1) != 1:
        raise ValueError(f"{where} has weight {raw['weight']!r}, only 1 is supported")
    role = _string(f"{where}.{role_key}", raw[role_key])
    if role_key == "from":
        role = _SHAREGPT_ROLES.get(role, role)
    content = raw[content_key]
    if isinstance(content, list):
        content = "".join(_text_part(f"{where}.{content_key}", part) for part in content)
    message = {"role": role, "content": content}
    return message


def _text_part(where: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = repr(part.get("type")) if isinstance(part, dict) else _kind(part)
        raise ValueError(f"{where} may only have parts of type 'text', got {kind}")
    return _string(f"{where} of type 'text'", part.get("text"))


def _string(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, got {_kind(value)}")
    return value


def _refuse_if_not_empty(record: dict[str, Any], keys: Sequence[str], where: str = "") -> None:
    for key in keys:
        if record.get(key):
            raise ValueError(f"{where}has {key!r}, which is not supported and would be lost")


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def raw_items(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def item_of(number: int, raw: bytes, path: Path) -> Chat:
    """The conversation of a line."""
    return _chat_from_record(_record_from_line(raw), f"{path.stem}:{number}")
