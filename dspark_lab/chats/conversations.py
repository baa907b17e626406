"""Conversations become batches: the template's text, its tokens, and which of them are answers.

This file knows JSONL, chat templates and token ids. A conversation is rendered with the tokenizer's
own chat template, and a token is *supervised* where the assistant wrote it. It knows nothing about
models, anchors, blocks or losses. transformers and pandas are imported only by the functions that
need them.

    chats = load_chats("chats.jsonl")
    encoded = [encode(chat, tokenizer, max_length=2048) for chat in chats]
    batch = pack(encoded, length=4096, pad_token_id=tokenizer.pad_token_id)

The rule of the loss mask, in words. A token is supervised iff it lies wholly inside an assistant
answer as the template writes it, or is the end-of-turn that follows the answer. So a token that
holds characters of prompt and answer together is prompt: the model never generates it. One
exception keeps the first word of an answer: where a template puts a space before the answer that
its generation prompt does not end with, the token that joins that space to the answer is generated
by the model, and is supervised.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from dspark_lab.checks import checked, require_int
from dspark_lab.files import DATA

if TYPE_CHECKING:
    import pandas
    import transformers

__all__ = [
    "SHIPPED_CHATS",
    "SHIPPED_TOKENIZER",
    "Batch",
    "Chat",
    "Encoded",
    "collate",
    "describe",
    "encode",
    "load_chats",
    "load_tokenizer",
    "one_row",
    "pack",
    "packed_places",
]

SHIPPED_CHATS = DATA / "conversations.jsonl"
SHIPPED_TOKENIZER = DATA / "tokenizer"

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}

# What these keys say would be lost, because a message here is a role and a text. Empty is fine.
_UNSUPPORTED_IN_MESSAGE = (
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
)
_UNSUPPORTED_IN_RECORD = ("tools", "functions", "system")


@dataclass(frozen=True)
class Chat:
    """One conversation.

    Each message is ``{"role": ..., "content": ...}`` and nothing else; ``role`` is one of
    ``ROLES``, ``content`` is text, perhaps empty. At least one message is the assistant's. ``id``
    names the conversation in errors. ``finished`` is False where the last answer was cut off, so
    that the end-of-turn which a template writes behind it is not the assistant's. Raises ValueError
    where any of this does not hold.
    """

    messages: tuple[dict[str, str], ...]
    id: str
    domain: str | None = None
    finished: bool = True

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError("messages must hold at least one message, got none")
        for index, message in enumerate(self.messages):
            _check_message(f"messages[{index}]", message)
        if all(message["role"] != "assistant" for message in self.messages):
            raise ValueError("messages must hold at least one of role 'assistant', got none")


@dataclass(frozen=True, eq=False)
class Encoded:
    """One conversation as tokens.

    ``input_ids`` is long ``[seq]``, ``loss_mask`` bool ``[seq]``, True on supervised tokens.
    """

    input_ids: Int[Tensor, " seq"]
    loss_mask: Bool[Tensor, " seq"]
    chat: Chat

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.input_ids)


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one length, each holding one conversation or several (``doc``), then padding.

    ============== ================== =========================================================
    input_ids      long [batch, seq]  the pad token on padding
    loss_mask      bool [batch, seq]  True on supervised tokens
    attention_mask bool [batch, seq]  False on padding
    position_ids   long [batch, seq]  0, 1, 2, ... from the start of each document; 0 on padding
    doc_remaining  long [batch, seq]  tokens left in the document after this one; 0 on padding
    seq_lens       long [batch, doc]  length of each document, in order; 0 where there is none
    chat_index     long [batch, doc]  which of the given conversations it is; -1 where none
    ============== ================== =========================================================
    """

    input_ids: Int[Tensor, "batch seq"]
    loss_mask: Bool[Tensor, "batch seq"]
    attention_mask: Bool[Tensor, "batch seq"]
    position_ids: Int[Tensor, "batch seq"]
    doc_remaining: Int[Tensor, "batch seq"]
    seq_lens: Int[Tensor, "batch doc"]
    chat_index: Int[Tensor, "batch doc"]

    @classmethod
    @checked
    def of_tokens(
        cls,
        input_ids: Int[Tensor, "batch seq"],
        loss_mask: Shaped[Tensor, "batch seq"],
        *,
        doc_remaining: Int[Tensor, "batch seq"] | None = None,
        position_ids: Int[Tensor, "batch seq"] | None = None,
        seq_lens: Int[Tensor, "batch doc"] | None = None,
    ) -> "Batch":
        """Rows of tokens without padding, each one document or as the last three arguments say.

        ``loss_mask`` may have any dtype, see
        :func:`dspark_lab.common.build_anchor_candidate_mask`.
        """
        packing = {
            "doc_remaining": doc_remaining,
            "position_ids": position_ids,
            "seq_lens": seq_lens,
        }
        missing = [name for name, value in packing.items() if value is None]
        if 0 < len(missing) < 3:
            raise ValueError(f"{', '.join(packing)} go together, got no {', '.join(missing)}")
        if doc_remaining is None or position_ids is None or seq_lens is None:
            rows, seq_len = input_ids.shape
            position_ids = torch.arange(seq_len, device=input_ids.device).expand(rows, -1)
            doc_remaining = seq_len - 1 - position_ids
            seq_lens = position_ids.new_full((rows, 1), seq_len)
        return cls(
            input_ids=input_ids,
            loss_mask=loss_mask,
            attention_mask=torch.ones_like(input_ids, dtype=torch.bool),
            position_ids=position_ids,
            doc_remaining=doc_remaining,
            seq_lens=seq_lens,
            chat_index=torch.full_like(seq_lens, -1),
        )

    def to(self, device: str | torch.device) -> "Batch":
        """The same batch with every tensor on ``device``."""
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def row(self, index: int) -> "Batch":
        """The batch of one row alone. Raises ValueError where there is no such row."""
        require_int("row", index, 0)
        rows = len(self.input_ids)
        if index >= rows:
            raise ValueError(f"row must lie in [0, {rows - 1}], got {index}")
        return Batch(
            **{field.name: getattr(self, field.name)[index : index + 1] for field in fields(self)}
        )


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
    reasoning beside the content, a message ``weight`` other than 1. Blank lines may end the file
    and stand nowhere else; a byte order mark is fine.

    Raises ValueError ``"path:line: what was wrong, what is allowed"`` for the first line that is
    anything else, or that repeats an id; ValueError for a file without conversations; OSError
    (FileNotFoundError among them) where the file cannot be read.
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


def load_tokenizer(
    name_or_path: str | os.PathLike[str] | None = None,
) -> "transformers.PreTrainedTokenizerBase":
    """A fast tokenizer with a chat template; without a name, the shipped one of SmolLM2.

    Never runs code that comes with a tokenizer. Raises ValueError for a slow tokenizer or one
    without a chat template, FileNotFoundError where a folder is missing, and whatever
    ``AutoTokenizer.from_pretrained`` raises for a name that it cannot load.
    """
    from transformers import AutoTokenizer

    if name_or_path is None:
        name_or_path = SHIPPED_TOKENIZER
    if str(name_or_path).startswith((".", "/", "~")) and not Path(name_or_path).is_dir():
        raise FileNotFoundError(f"there is no folder {name_or_path} with a tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    _check_tokenizer(tokenizer)
    return tokenizer


def encode(
    chat: Chat,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    max_length: int | None = None,
) -> Encoded:
    """The tokens of a conversation, and which of them the assistant wrote.

    ``input_ids`` are those of ``tokenizer.apply_chat_template(messages, tokenize=True)``. With
    ``max_length`` the first ``max_length`` tokens are kept, and perhaps none of them supervised.

    The answers are found in the template's text: where its ``{% generation %}`` markers say, or,
    without markers, by rendering the conversation once more with a placeholder for each answer. An
    answer that the template shortens (white space, the thinking of earlier turns) is supervised as
    the template writes it. The end-of-turn is the special token right behind an answer, or the
    tokenizer's eos token behind white space; an empty answer has one too. Markers that already
    enclose the end-of-turn are taken as they are. Behind an answer that was cut off (a chat that is
    not ``finished``) the end-of-turn is not supervised.

    Raises ValueError where the tokenizer is slow or has no chat template, where the template
    refuses the conversation, or where it rewrites an answer beyond recognition.
    """
    if not isinstance(chat, Chat):
        raise TypeError(f"chat must be a Chat, got {type(chat).__name__}")
    if max_length is not None:
        require_int("max_length", max_length, 1)
    _check_tokenizer(tokenizer)
    try:
        rendered = _render_and_locate(tokenizer, list(chat.messages))
        input_ids, loss_mask = _tokenize_and_mask(tokenizer, rendered, chat.finished)
    except ValueError as error:
        raise ValueError(f"conversation {chat.id!r}: {error}") from error
    return Encoded(input_ids[:max_length], loss_mask[:max_length], chat)


def collate(encoded: Sequence[Encoded], pad_token_id: int, length: int | None = None) -> Batch:
    """One conversation a row, padded on the right to the longest or to ``length`` tokens.

    A tokenizer without a pad token can pad with its eos token: padding is never supervised and
    never attended to. Raises ValueError where a conversation is longer than ``length``.
    """
    _check_encoded(encoded, length)
    if length is None:
        length = max(len(item) for item in encoded)
    return _fill([[index] for index in range(len(encoded))], encoded, pad_token_id, length)


def pack(encoded: Sequence[Encoded], length: int, pad_token_id: int) -> Batch:
    """Several conversations a row of ``length`` tokens; none is split, each is there once.

    First-fit decreasing: the conversations, longest first (equal lengths in the given order), go
    each into the first row with room. Raises ValueError where one is longer than ``length``.
    """
    require_int("length", length, 1)
    _check_encoded(encoded, length)
    row, start = packed_places(np.array([len(item) for item in encoded]), length)
    rows: list[list[int]] = [[] for _ in range(row.max() + 1)]
    for index in np.argsort(start, kind="stable").tolist():
        rows[row[index]].append(index)
    return _fill(rows, encoded, pad_token_id, length)


def packed_places(
    lengths: Int[np.ndarray, " document"], row_length: int
) -> tuple[Int[np.ndarray, " document"], Int[np.ndarray, " document"]]:
    """In which row :func:`pack` puts documents of these lengths, and where in it each begins.

    All documents of one length go in one step: they fill the first row with room as far as it goes,
    then the next. No length may be above ``row_length``.
    """
    order = np.argsort(-lengths, kind="stable")
    _, first = np.unique(-lengths[order], return_index=True)
    # One row for each document is always enough.
    room = np.full(len(lengths), row_length)
    row, start = np.empty_like(lengths), np.empty_like(lengths)
    used = 0
    for alike in np.split(order, first[1:]):
        length = lengths[alike[0]]
        new = -(-len(alike) // (row_length // length))
        left = room[: used + new]
        fit = left // length
        behind = fit.cumsum()
        number = np.arange(len(alike))
        into = np.searchsorted(behind, number, side="right")
        row[alike] = into
        start[alike] = row_length - left[into] + (number - behind[into] + fit[into]) * length
        left -= np.bincount(into, minlength=len(left)) * length
        used = max(used, int(into[-1]) + 1)
    return row, start


def one_row(encoded: Sequence[Encoded], length: int, pad_token_id: int) -> Batch:
    """The given conversations in a single row of ``length`` tokens, in the given order.

    Raises ValueError where together they are longer than ``length``.
    """
    require_int("length", length, 1)
    _check_encoded(encoded, length)
    tokens = sum(len(item) for item in encoded)
    if tokens > length:
        raise ValueError(f"length must hold all conversations, {tokens} tokens, got {length}")
    return _fill([list(range(len(encoded)))], encoded, pad_token_id, length)


def describe(encoded: Sequence[Encoded]) -> "pandas.DataFrame":
    """One row for each domain, in order of appearance, and its counts of tokens.

    The index is ``domain`` ("none" for conversations without one); the columns are
    ``conversations``, ``tokens``, ``supervised_tokens``, ``median_length`` and ``longest``.
    """
    import pandas as pd

    table = pd.DataFrame(
        {
            "domain": [item.chat.domain or "none" for item in encoded],
            "length": [len(item) for item in encoded],
            "supervised": [int(item.loss_mask.sum()) for item in encoded],
        }
    )
    return table.groupby("domain", sort=False).agg(
        conversations=("length", "size"),
        tokens=("length", "sum"),
        supervised_tokens=("supervised", "sum"),
        median_length=("length", "median"),
        longest=("length", "max"),
    )


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
    _refuse_if_not_empty(record, _UNSUPPORTED_IN_RECORD)
    lists = [key for key in ("messages", "conversations") if key in record]
    if len(lists) == 2:
        raise ValueError("has both 'messages' and 'conversations', only one is allowed")
    if lists:
        raw = record[lists[0]]
        if not isinstance(raw, list):
            raise ValueError(f"{lists[0]} must be a list, got {_kind(raw)}")
        messages = [_message(f"{lists[0]}[{i}]", message) for i, message in enumerate(raw)]
    elif "prompt" in record and "response" in record:
        messages = [
            {"role": role, "content": _string(key, record[key])}
            for role, key in (("user", "prompt"), ("assistant", "response"))
        ]
    else:
        raise ValueError(
            "must have 'messages', 'conversations', or 'prompt' and 'response', "
            f"got keys {sorted(record)}"
        )
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
    return Chat(messages=tuple(messages), id=str(name), domain=domain, finished=finished)


def _message(where: str, raw: Any) -> dict[str, str]:
    """A message of a file, in either spelling, as a role and a text."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where} must be an object, got {_kind(raw)}")
    role_key, content_key = ("from", "value") if "from" in raw else ("role", "content")
    for key in (role_key, content_key):
        if key not in raw:
            raise ValueError(f"{where} must have {key!r}, got keys {sorted(raw)}")
    _refuse_if_not_empty(raw, _UNSUPPORTED_IN_MESSAGE, where + " ")
    if raw.get("weight", 1) != 1:
        raise ValueError(f"{where} has weight {raw['weight']!r}, only 1 is supported")
    role = _string(f"{where}.{role_key}", raw[role_key])
    if role_key == "from":
        role = _SHAREGPT_ROLES.get(role, role)
    content = raw[content_key]
    if isinstance(content, list):
        content = "".join(_text_part(f"{where}.{content_key}", part) for part in content)
    message = {"role": role, "content": content}
    _check_message(where, message)
    return message


def _text_part(where: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = repr(part.get("type")) if isinstance(part, dict) else _kind(part)
        raise ValueError(f"{where} may only have parts of type 'text', got {kind}")
    return _string(f"{where} of type 'text'", part.get("text"))


def _check_message(where: str, message: dict[str, str]) -> None:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise ValueError(f"{where} must have 'role' and 'content' alone, got {message!r}")
    if message["role"] not in ROLES:
        raise ValueError(f"{where} must have a role of {ROLES}, got {message['role']!r}")
    content = _string(f"{where}.content", message["content"])
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}.content must be Unicode text, got half a surrogate pair at {error.start}"
        ) from None


def _string(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, got {_kind(value)}")
    return value


def _refuse_if_not_empty(record: dict[str, Any], keys: Sequence[str], where: str = "") -> None:
    for key in keys:
        if record.get(key):
            raise ValueError(f"{where}has {key!r}, which is not supported and would be lost")


def _kind(value: Any) -> str:
    """What JSON calls it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _check_tokenizer(tokenizer: "transformers.PreTrainedTokenizerBase") -> None:
    kind = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer must be a fast one, which knows offsets; got {kind}")
    if not tokenizer.chat_template:
        raise ValueError(f"tokenizer must have a chat template, got {kind} without one")


@dataclass(frozen=True)
class _Rendered:
    """The template's text, and where in it the answers are, in characters, in order.

    ``ends_inside``: the answers' spans already hold the end-of-turn. ``spaced``: a space before
    an answer is the model's to generate, see the head of this file.
    """

    text: str
    spans: list[tuple[int, int]]
    ends_inside: bool
    spaced: bool


def _render_and_locate(
    tokenizer: "transformers.PreTrainedTokenizerBase", messages: list[dict[str, str]]
) -> _Rendered:
    if re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", tokenizer.get_chat_template()):
        text, spans, ends_inside = _marked_answers(tokenizer, messages)
    else:
        text, spans = _unmarked_answers(tokenizer, messages)
        ends_inside = False
    spaced = False
    if any(text[:start].endswith(" ") for start, _ in spans):
        prompt = _generation_prompt(tokenizer, messages, _assistant_turns(messages)[-1])
        spaced = not prompt.endswith(" ")
    return _Rendered(text, spans, ends_inside, spaced)


def _marked_answers(
    tokenizer: "transformers.PreTrainedTokenizerBase", messages: list[dict[str, str]]
) -> tuple[str, list[tuple[int, int]], bool]:
    """The template marks its answers with ``{% generation %}``: text, spans, ends inside them?

    The tokens are found from the characters by the one rule of this file, not by transformers'
    own ``assistant_masks``, which lose the last bytes of an answer that ends in a character of
    several tokens.
    """
    text, spans = _render_marked(tokenizer, messages)
    if not spans:
        raise ValueError("the chat template's {% generation %} markers enclose nothing of it")
    placeholders = _placeholders(messages, text)
    probe, probe_spans = _render_marked(tokenizer, _with_answers(messages, placeholders))
    last_words = tuple(placeholders.values())
    return text, spans, not any(probe[a:b].rstrip().endswith(last_words) for a, b in probe_spans)


def _unmarked_answers(
    tokenizer: "transformers.PreTrainedTokenizerBase", messages: list[dict[str, str]]
) -> tuple[str, list[tuple[int, int]]]:
    """Text and spans, from a second rendering with a placeholder for each answer.

    What stands around the placeholders is the template's own. Where that, joined with the answers,
    gives the text, the spans are known by arithmetic; where it does not, the template treats some
    answer specially, and they are located one by one.
    """
    text = _render(tokenizer, messages)
    placeholders = _placeholders(messages, text)
    probe = _render(tokenizer, _with_answers(messages, placeholders))
    turn_of = {placeholder: turn for turn, placeholder in placeholders.items()}
    found = re.findall("|".join(turn_of), probe)
    if found != list(turn_of):
        raise ValueError(
            "the chat template must write every answer once and in order, but of messages "
            f"{list(placeholders)} it writes {[turn_of[placeholder] for placeholder in found]}"
        )
    pieces = re.split("|".join(turn_of), probe)
    answers = [messages[turn]["content"] for turn in placeholders]
    parts = [part for pair in zip(pieces, [*answers, ""], strict=True) for part in pair]
    if "".join(parts) == text:
        ends = list(accumulate(len(part) for part in parts))
        return text, list(zip(ends[0:-2:2], ends[1:-2:2], strict=True))
    spans = [
        _locate_one(tokenizer, messages, text, turn, placeholder)
        for turn, placeholder in placeholders.items()
    ]
    if any(end > start for (_, end), (start, _) in zip(spans, spans[1:], strict=False)):
        raise _cannot_locate(*placeholders)
    return text, spans


def _cannot_locate(*turns: int) -> ValueError:
    where = ", ".join(f"messages[{turn}]" for turn in turns)
    return ValueError(
        f"the chat template rewrites the answer in {where} in a way that cannot be located; put "
        "{% generation %} ... {% endgeneration %} around answers in the template"
    )


def _locate_one(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    messages: list[dict[str, str]],
    text: str,
    turn: int,
    placeholder: str,
) -> tuple[int, int]:
    """The span of one answer that the template does not copy as it is.

    The other answers keep their place, so the text around the placeholder is the text around the
    answer. A template may also write something before an answer that depends on what it says (a
    block of thinking); then the answer starts where it can be read word for word, or else where
    the generation prompt ends.
    """
    answer = messages[turn]["content"]
    probe = _render(tokenizer, _with_answers(messages, {turn: placeholder}))
    before, _, after = probe.partition(placeholder)
    start, end = len(before), len(text) - len(after)
    if not text.endswith(after):
        raise _cannot_locate(turn)
    surrounded = text.startswith(before) and start <= end
    if surrounded and text[start:end].strip() == answer.strip():
        return start, end
    if answer and text.endswith(answer, 0, end):
        return end - len(answer), end
    if surrounded:
        return start, end
    prompt = _generation_prompt(tokenizer, messages, turn)
    head, prompt, _ = before.rpartition(prompt) if prompt else ("", "", "")
    start = len(head) + len(prompt)
    if not prompt or not text.startswith(head + prompt) or start > end:
        raise _cannot_locate(turn)
    return start, end


def _assistant_turns(messages: list[dict[str, str]]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _placeholders(messages: list[dict[str, str]], text: str) -> dict[int, str]:
    """A text for each assistant turn that neither the messages nor the template contain."""
    used = {character for message in messages for character in message["content"]}.union(text)
    unused = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
    mark = next(unused, None)
    if mark is None:
        raise ValueError("uses every private-use character, none is left for a placeholder")
    return {turn: f"{mark}{turn}{mark}" for turn in _assistant_turns(messages)}


def _with_answers(messages: list[dict[str, str]], answers: dict[int, str]) -> list[dict[str, str]]:
    """The messages, with the contents of some turns replaced."""
    return [
        {"role": message["role"], "content": answers.get(turn, message["content"])}
        for turn, message in enumerate(messages)
    ]


def _generation_prompt(
    tokenizer: "transformers.PreTrainedTokenizerBase", messages: list[dict[str, str]], turn: int
) -> str:
    """What the template adds to the messages before ``turn`` to make the model answer."""
    if turn == 0:
        return ""
    said = _render(tokenizer, messages[:turn])
    asked = _render(tokenizer, messages[:turn], add_generation_prompt=True)
    return asked[len(said) :] if asked.startswith(said) else ""


def _render(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    messages: list[dict[str, str]],
    add_generation_prompt: bool = False,
) -> str:
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error


def _render_marked(
    tokenizer: "transformers.PreTrainedTokenizerBase", messages: list[dict[str, str]]
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the spans that lie between the template's generation markers."""
    from jinja2 import TemplateError
    from transformers.utils import chat_template_utils

    # Its annotations promise a text alone.
    render: Callable[..., Any] = chat_template_utils.render_jinja_template
    try:
        texts, spans = render(
            conversations=[messages],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error
    return texts[0], spans[0]


def _tokenize_and_mask(
    tokenizer: "transformers.PreTrainedTokenizerBase", rendered: _Rendered, finished: bool
) -> tuple[Int[Tensor, " seq"], Bool[Tensor, " seq"]]:
    text = rendered.text
    encoding = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    ids = encoding["input_ids"]
    if not ids:
        raise ValueError("the chat template and the tokenizer give no tokens")
    edges = _token_edges(encoding["offset_mapping"], encoding.tokens(), text)
    starts, ends = np.array(edges).T
    closers = _closing_tokens(tokenizer, ids, edges, text)
    loss_mask = np.zeros(len(ids), dtype=bool)
    for start, end in rendered.spans:
        first = start - 1 if rendered.spaced and text.endswith(" ", 0, start) else start
        closer = next((index for index, word in closers if word >= end), None)
        if closer is not None and not rendered.ends_inside:
            gap = text[end : edges[closer][0]]
            if not gap or (gap.isspace() and ids[closer] == tokenizer.eos_token_id):
                loss_mask[closer] = True
                end = edges[closer][1]
        loss_mask |= (starts >= first) & (ends > start) & (ends <= end)
    last = int(loss_mask.nonzero()[0][-1]) if loss_mask.any() else None
    if not finished and any(index == last for index, _ in closers):
        loss_mask[last] = False
    return torch.tensor(ids, dtype=torch.long), torch.from_numpy(loss_mask)


def _closing_tokens(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    ids: list[int],
    edges: list[tuple[int, int]],
    text: str,
) -> list[tuple[int, int]]:
    """The tokens that may end a turn: special, and not the start of a sequence.

    Each with the character where it is written: a special token may swallow white space around it.
    """
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    special -= {tokenizer.bos_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    closers = []
    for index, (start, end) in enumerate(edges):
        if ids[index] in special:
            closers.append((index, end - len(text[start:end].lstrip())))
    return closers


def _token_edges(
    offsets: list[tuple[int, int]], tokens: list[str], text: str
) -> list[tuple[int, int]]:
    """First character and one past the last of each token, the spaces before a word included.

    Tokens that share a character have the same edges. Some byte-level tokenizers leave a token's
    leading spaces (written "Ġ") out of its offsets; they are put back, since they decide whether
    a token reaches into the prompt.
    """
    edges = []
    previous = 0
    for (start, end), token in zip(offsets, tokens, strict=True):
        if start > previous and token.startswith("Ġ"):
            spaces = len(token) - len(token.lstrip("Ġ"))
            while spaces and start > previous and text[start - 1] == " ":
                start, spaces = start - 1, spaces - 1
        edges.append((start, end))
        previous = end
    return edges


def _check_encoded(encoded: Sequence[Encoded], length: int | None) -> None:
    if not encoded:
        raise ValueError("encoded must hold at least one conversation, got none")
    if length is not None:
        require_int("length", length, 1)
    for item in encoded:
        if (
            item.input_ids.dim() != 1
            or item.loss_mask.shape != item.input_ids.shape
            or not len(item)
        ):
            raise ValueError(
                f"conversation {item.chat.id!r}: input_ids and loss_mask must be [seq], not empty, "
                f"got shapes {tuple(item.input_ids.shape)} and {tuple(item.loss_mask.shape)}"
            )
        if length is not None and len(item) > length:
            raise ValueError(
                f"conversation {item.chat.id!r} has {len(item)} tokens, more than length {length}; "
                f"truncate it with encode(..., max_length={length})"
            )


def _fill(
    rows: list[list[int]], encoded: Sequence[Encoded], pad_token_id: int, length: int
) -> Batch:
    """The batch whose row r holds the conversations with the indices ``rows[r]``, in order."""
    require_int("pad_token_id", pad_token_id, 0)
    tokens = (len(rows), length)
    docs = (len(rows), max(len(row) for row in rows))
    batch = Batch(
        input_ids=torch.full(tokens, pad_token_id),
        loss_mask=torch.zeros(tokens, dtype=torch.bool),
        attention_mask=torch.zeros(tokens, dtype=torch.bool),
        position_ids=torch.zeros(tokens, dtype=torch.long),
        doc_remaining=torch.zeros(tokens, dtype=torch.long),
        seq_lens=torch.zeros(docs, dtype=torch.long),
        chat_index=torch.full(docs, -1),
    )
    for row, indices in enumerate(rows):
        start = 0
        for doc, index in enumerate(indices):
            item = encoded[index]
            place = (row, slice(start, start + len(item)))
            batch.input_ids[place] = item.input_ids
            batch.loss_mask[place] = item.loss_mask
            batch.attention_mask[place] = True
            batch.position_ids[place] = torch.arange(len(item))
            batch.doc_remaining[place] = torch.arange(len(item)).flip(0)
            batch.seq_lens[row, doc] = len(item)
            batch.chat_index[row, doc] = index
            start += len(item)
    return batch
