"""Which characters of a rendered conversation the model itself has to generate.

The rule, in words. An answer is generated from where its generation prompt ends, which is the
rendering of the messages before it with ``add_generation_prompt=True``, to the last marker that
closes its turn. What the template only writes between turns is not generated: white space behind
the end of turn, the role header of the next turn. Two things follow that a template can do.

- It may change what came before, once more follows. Where the generation prompt is therefore no
  prefix of the rendered conversation, the two are compared from the end of the last message in it,
  and what they share there counts, a marker whole or not at all. Where that ends inside the answer,
  nothing is right. The head of an answer is not generated, even if the answer before it closes with
  another marker than in the prompt.
- It may close a turn with another marker when more follows. The one that is written counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dspark_lab.chats.chat import Chat
from dspark_lab.chats.template import Messages, Span, Template, common_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# Of a message, what is no field that a template must write: these name it or its speaker.
_NAMES = {
    "role",
    "content",
    "name",
    "tool_call_id",
    "id",
    "index",
    "turn",
    "timestamp",
    "created_at",
    "date",
    "model",
}
_NAMES |= {"source", "lang", "language", "tokens", "num_tokens"}


@dataclass(frozen=True)
class Rendered:
    """The template's text, and where in it the supervised characters are, in order.

    Attributes:
        left_out: answers of which the text does not hold all that was generated.
        others: what the template's ``{% generation %}`` markers enclose, or, where ``spans`` are
            that, what the rule supervises; None where one of the two is not to be had.
    """

    text: str
    spans: list[Span]
    left_out: int = 0
    others: list[Span] | None = None


def render(
    chat: Chat,
    tokenizer: Tokenizer,
    *,
    markers: bool = False,
    last_answer_only: bool = False,
    template_options: Mapping[str, Any] | None = None,
) -> Rendered:
    """Render a conversation and find what is supervised of it; a ValueError says why it cannot."""
    template = Template(tokenizer, chat.tools, template_options or {})
    try:
        template.check_options()
        written = _Written.of(chat, template)
        return _supervise(chat, written, markers, last_answer_only)
    except ValueError as error:
        raise ValueError(f"conversation {chat.id!r}: {error}") from error


def _supervise(chat: Chat, written: _Written, markers: bool, last_answer_only: bool) -> Rendered:
    answers = chat.answers[-1:] if last_answer_only else chat.answers
    if not answers:
        raise ValueError("it holds no answer of the assistant, so there is nothing to supervise")
    if chat.supervised is not None:
        answers = [answer for answer in answers if chat.supervised[answer]]
    marked = written.marked
    if markers and not marked:
        lacks = "are none in the chat template" if marked is None else "enclose nothing of it"
        raise ValueError(f"markers, {{% generation %}}, {lacks}")
    less = _check_nothing_vanishes(written)
    every = chat.finished and not last_answer_only and all(chat.supervised or ())
    try:
        turns = [_turn(written, answer) for answer in answers]
    except ValueError:
        if marked is None or not markers or not every:
            raise
        return Rendered(written.text, marked)
    spans = [(start, end) for start, end, _ in turns]
    if not chat.finished and answers[-1:] == chat.answers[-1:]:
        spans[-1] = (spans[-1][0], _words_end(written, answers[-1], spans[-1]))
    left_out = len({a for a, (_, _, part) in zip(answers, turns, strict=True) if part or a in less})
    if marked is not None and not every:
        cut = len(written.text) if chat.finished or not spans else spans[-1][1]
        marked = [
            (a, min(b, cut))
            for a, b in marked
            if any(a < end and b > start for start, end in spans)
        ]
    if markers and marked is not None:
        return Rendered(written.text, marked, left_out, spans)
    return Rendered(written.text, spans, left_out, marked)


@dataclass
class _Written:
    """Messages, and what a template makes of them."""

    template: Template
    messages: list[Mapping[str, Any]]
    text: str
    marked: list[Span] | None

    @classmethod
    def of(cls, chat: Chat, template: Template) -> _Written:
        messages: list[Mapping[str, Any]] = list(chat.messages)
        if template.has_markers:
            return cls(template, messages, *template.write_marked(messages))
        return cls(template, messages, template.write(messages), None)

    @cached_property
    def placeholder(self) -> str:
        """A character that neither the messages nor the template contain."""
        used = {*self.text, *self.template.source, *json.dumps(self.messages, ensure_ascii=False)}
        mark = next((chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used), None)
        if mark is None:
            raise ValueError("uses every private-use character, none is left for a placeholder")
        return mark

    def up_to(self, index: int) -> str:
        """The conversation as it stood when message ``index`` was its last."""
        last = index == len(self.messages) - 1
        return self.text if last else self.template.write(self.messages[: index + 1])

    def probe(
        self, index: int, end: int | None = None, prompt: bool = False, alone: bool = True
    ) -> str:
        """The text of the first ``end`` messages with a placeholder for the words of one.

        An answer's tool calls and thinking go with its words, if ``alone``.
        """
        message = self.messages[index]
        bare = alone and message["role"] == "assistant"
        said = {**({} if bare else message), "role": message["role"], "content": self.placeholder}
        before, after = self.messages[:index], self.messages[index + 1 : end]
        return self.template.write([*before, said, *after], prompt)

    def vanishes(self, index: int, end: int | None = None) -> bool:
        """Whether the template writes a message without its words."""
        try:
            return self.placeholder not in self.probe(index, end, alone=False)
        except ValueError:
            return False

    def around(
        self, index: int, end: int | None = None, prompt: bool = False
    ) -> tuple[str, str] | None:
        """The text around the words of a message; None where a placeholder does not find it."""
        try:
            parts = self.probe(index, end, prompt).split(self.placeholder)
        except ValueError:
            return None
        return (parts[0], parts[-1]) if len(parts) > 1 else None

    def words_end(self, index: int) -> int | None:
        """Where the words of a message end, by the text behind them."""
        around = self.around(index)
        if around is None or not self.text.endswith(around[1]):
            return None
        return len(self.text) - len(around[1])

    def words_start(self, index: int) -> int | None:
        around = self.around(index)
        return None if around is None else common_prefix(around[0], self.text)


def _turn(written: _Written, answer: int) -> tuple[int, int, bool]:
    """Where an answer is generated, and whether the text leaves out a part of it."""
    text, said = written.text, written.messages[answer]["content"].strip()
    start, prompt = _prompt_end(written, answer)
    own = written.up_to(answer)
    seen = own.rstrip()
    left_out = False
    if (found := _end_before_a_prompt(written, answer, start, own, prompt)) is not None:
        end = found
    elif text.startswith(seen) and len(seen) > start and not (said and seen.endswith(said)):
        end = len(seen)
    else:
        end, left_out = _turn_end(written, answer, start, own, prompt)
    if said and said not in text[start:end] and not _spells(text, start, end, said):
        left_out = True
        if written.vanishes(answer, answer + 1):
            what = f"the words of the answer in messages[{answer}]"
            raise ValueError(f"{what} are not written by the chat template")
    return start, end, left_out


def _prompt_end(written: _Written, answer: int) -> tuple[int, str]:
    """Where in the text the generation prompt of an answer ends, and that prompt."""
    text, prompt = written.text, ""
    if answer:
        with suppress(ValueError):
            prompt = written.template.write(written.messages[:answer], prompt=True)
    if prompt and text.startswith(prompt):
        # Some templates write no generation prompt right behind the system's message.
        if written.messages[answer - 1]["role"] == "system":
            with suppress(ValueError):
                if prompt == written.template.write(written.messages[:answer]):
                    return _end_behind_a_user(written, answer), prompt
        return len(prompt), prompt
    begin, shared = written.words_start(answer), written.template.shared
    if not prompt:
        start = _end_behind_a_user(written, answer)
    else:
        start = shared(prompt, text)
        asked, said = written.around(answer - 1, answer, prompt=True), written.words_end(answer - 1)
        if said is None or asked is None or not prompt.endswith(asked[1]):
            raise _rewritten(answer)
        if start < said:
            start = said + shared(asked[1], text[said:])
        if written.messages[answer - 1]["role"] == "assistant" and begin is not None:
            before = written.messages[:answer]
            start = max(start, _head_end(written, before, prompt, (said, begin)))
    if begin is not None and start > begin:
        raise ValueError(
            f"the generation prompt of messages[{answer}] is no prefix of the conversation, and "
            "what the two share ends inside the answer"
        )
    return start, prompt


def _head_end(written: _Written, before: Messages, prompt: str, between: Span) -> int:
    """Where an answer's head ends that stands between its words and those before; 0 for nowhere.

    The head is what the generation prompt behind some messages adds to them; how the last of these
    is closed may differ there.
    """
    template, markers = written.template, written.template.markers
    plain = template.write(before)
    head = prompt[template.shared(plain, prompt) :]
    # The answer need not have the markers that the head ends with.
    ends = {len(head), *(head.find(marker) for marker in markers if marker in head)}
    for end in sorted(ends - {0}, reverse=True):
        place = written.text.find(head[:end], *between)
        if place >= 0:
            return place + end
    return 0


def _end_behind_a_user(written: _Written, answer: int) -> int:
    """Where the generation prompt ends of an answer that the template writes no prompt for.

    It opens the conversation, or follows on the system's message. The prompt is that behind a
    user's message which is put before the answer.
    """
    text, messages, mark = written.text, written.messages, written.placeholder
    asked = [*messages[:answer], {"role": "user", "content": mark}]
    try:
        whole = written.template.write(asked, prompt=True)
        prompt = whole.rpartition(mark)[2]
        answered = written.template.write([*asked, *messages[answer:]]).rpartition(mark)[2]
    except ValueError:
        raise _rewritten(answer) from None
    rest = answered[written.template.shared(prompt, answered) :]
    if text.endswith(rest):
        return len(text) - len(rest)
    # Behind the user's message the template may write more of the answer.
    begin, said = written.words_start(answer), written.words_end(answer - 1) if answer else 0
    start = begin and said is not None and _head_end(written, asked, whole, (said, begin))
    if not start:
        raise _rewritten(answer)
    return start


def _end_before_a_prompt(
    written: _Written, answer: int, start: int, own: str, prompt: str
) -> int | None:
    """Where a turn ends that a generation prompt follows though none was asked for; else None."""
    asks = prompt.rstrip()[-8:]
    if len(asks) < 8 or not own.rstrip().endswith(asks):
        return None
    around, begin = written.around(answer, answer + 1), written.words_start(answer)
    if around is None or begin is None or start < begin or not own.endswith(around[1]):
        return None
    words = len(own) - len(around[1])
    again = written.template.write(written.messages[: answer + 1], prompt=True)
    if again != own or asks not in around[1] or not written.text.startswith(own[:words]):
        return None
    return words + written.template.first_marker(around[1])


def _turn_end(
    written: _Written, answer: int, start: int, own: str, prompt: str
) -> tuple[int, bool]:
    """Where the last marker ends that closes a turn, and whether a part of the turn is left out.

    For a turn whose text is not simply that of the conversation so far, white space aside. Either
    it closes with another marker, or none, where it is the last; or thinking is left out of turns
    that are not; or there is no marker at all.
    """
    text, rest = written.text, len(written.messages) - answer - 1
    found = written.words_end(answer)
    words = start if found is None else max(start, found)
    if not rest:
        return max(words, len(text.rstrip())), False
    around, closing, left_out = written.around(answer, answer + 1), "", False
    if around is not None and own.endswith(around[1]):
        closing = around[1].rstrip()
        generated = own[common_prefix(prompt, own) : len(own) - len(around[1])]
        left_out = prompt != "" and generated.strip() != text[start:words].strip()
    if closing and text.startswith(closing, words):
        return words + len(closing), left_out
    following = written.around(answer + 1)
    end = len(text) if following is None else common_prefix(following[0], text)
    between = text[words:end]
    for header in _headers(written, written.messages[answer + 1]["role"]):
        if between.endswith(header):
            return words + len(between.removesuffix(header).rstrip()), left_out
    if found is None and between.strip():
        # Such as a call of a tool, which no placeholder stands for.
        shared = _overlap(own.rstrip(), text[start:])
        if not shared:
            raise ValueError(f"where messages[{answer}] ends in the template's text cannot be told")
        return start + shared, True
    return words + written.template.first_marker(between), left_out


def _headers(written: _Written, role: str) -> list[str]:
    """What may open a turn of this role: what follows on the end of another, and on nothing."""
    mark, headers = written.placeholder, []
    opened = {"role": role, "content": mark}
    for before in ("user", "system"):
        said = {"role": before, "content": mark}
        with suppress(ValueError):
            closing = written.template.write([said]).split(mark)[-1].rstrip()
            parts = written.template.write([said, opened]).split(mark)
            if len(parts) == 3 and parts[1].startswith(closing):
                headers.append(parts[1].removeprefix(closing).lstrip())
    with suppress(ValueError):
        headers += written.template.write([opened]).split(mark)[:-1]
    return [header for header in headers if header]


def _words_end(written: _Written, answer: int, span: Span) -> int:
    """Where an answer ends that was cut off: no marker that closes the turn is its own."""
    words, message = written.words_end(answer), written.messages[answer]
    if not message["content"].strip() and not message.get("tool_calls"):
        # Cut off while thinking: the marker that closes that is not its own either.
        thoughts = (message[key] for key in _fields(message) if isinstance(message[key], str))
        for thought in map(str.strip, thoughts):
            found = written.text.rfind(thought, *span) if thought else -1
            words = found + len(thought) if found >= 0 else words
    if words is None:
        said = message["content"].rstrip()
        found = written.text.rfind(said, *span) if said else -1
        if found < 0:
            raise ValueError(f"the end of messages[{answer}], which was cut off, cannot be told")
        words = found + len(said)
    return min(max(span[0], words), span[1])


def _check_nothing_vanishes(written: _Written) -> set[int]:
    """Refuse what the template does not write: tools, messages, fields of messages.

    Returns:
        the answers that have a field which is not written because more messages follow.
    """
    template, text, place = written.template, written.text, 0
    for tool in range(len(template.tools or ())):
        if _unchanged(text, template.without(tool), written.messages):
            raise ValueError(f"tools[{tool}] is not written by the chat template")
    less = set()
    for index, message in enumerate(written.messages):
        role, words = message["role"], message["content"].strip()
        found = text.find(words, place)
        if found >= 0 and role in ("user", "assistant"):
            place = found + len(words)
        elif words and role != "assistant" and written.vanishes(index):
            raise ValueError(
                f"messages[{index}] of role {role!r} is not written by the chat template"
            )
        less |= {index for key in _fields(message) if _is_left_out(written, index, key)}
    return less


def _fields(message: Mapping[str, Any]) -> list[str]:
    """What a message holds beside its words, for the template to write."""
    return [key for key, value in message.items() if key not in _NAMES and not _nothing(value)]


def _nothing(value: Any) -> bool:
    return value is None or value in ("", [], {})


def _is_left_out(written: _Written, index: int, key: str) -> bool:
    """Whether a field of an answer is only written while that is the last; refused if never."""
    message = written.messages[index]
    value, ends = message[key], len(written.messages)
    last = index + 1 if message["role"] == "assistant" else ends
    parts = range(len(value)) if isinstance(value, list) and len(value) > 1 else [None]
    for part in parts:
        # Some files say the same under two names.
        less = {k: v for k, v in message.items() if k in ("role", "content") or v != value}
        if part is not None:
            less[key] = [v for number, v in enumerate(value) if number != part]
        changed = [*written.messages[:index], less, *written.messages[index + 1 :]]
        if _unchanged(written.up_to(last - 1), written.template, changed[:last]):
            name = key if part is None else f"{key}[{part}]"
            raise ValueError(
                f"messages[{index}] has {name!r}, which the chat template does not write"
            )
        if last < ends and _unchanged(written.text, written.template, changed):
            return True
    return False


def _unchanged(text: str, template: Template, messages: Messages) -> bool:
    try:
        return template.write(messages) == text
    except ValueError:
        return False


def _spells(text: str, start: int, end: int, words: str) -> bool:
    """Whether a text holds words, white space aside; they may have begun right before it."""
    begun = next(
        (n for n in range(min(len(words), 32), 0, -1) if text.endswith(words[:n], 0, start)), 0
    )
    characters = iter(text[start:end])
    return all(c in characters for c in words[begun:] if not c.isspace())


def _overlap(one: str, other: str) -> int:
    """The length of the longest end of one text that the other begins with."""
    lengths = range(min(len(one), len(other)), 0, -1)
    return next((length for length in lengths if other.startswith(one[-length:])), 0)


def _rewritten(answer: int) -> ValueError:
    what = f"the chat template changes what stands before messages[{answer}] beyond recognition"
    return ValueError(f"{what}; encode_answers gives a row for each answer as it was generated")
