"""Rows as other trainers make them of a conversation: their tokens and their own loss masks.

Written from what the public sources of these programs do:

- ``automodel`` (NeMo AutoModel): the assistant mask of transformers where the template has
  generation markers. Otherwise each answer from the end of the rendering before it, without a
  generation prompt, to the end of the rendering with it, so that its role header and what follows
  its end of turn are supervised.
- ``deepspec``: what lies behind the assistant's header up to the end of turn and its line break, or
  up to the end of the text; a system message goes in front where there is none.
- ``specforge``: the same for more families; texts to ignore are taken out again, and messages in an
  order that it does not know end the conversation.
- ``speculators``: a row for each answer but one that opens the conversation: the rendering up to
  the answer, supervised beyond the rendering with generation prompt.

None of them reads a switch of the file for the loss, or whether an answer was finished.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from dspark_lab.chats.chat import Chat
from dspark_lab.chats.plans import Plan
from dspark_lab.chats.template import Span, Template, common_prefix

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase as Tokenizer

Like = Literal["automodel", "deepspec", "specforge", "speculators"]
LIKE: tuple[Like, ...] = get_args(Like)

# A row, and the messages and the tools whose rendering it is.
Shown = tuple[list[int], list[bool], Sequence[dict[str, Any]], Any]
_Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """What a trainer looks for in the text of one family of chat templates.

    ``system`` goes in front where there is no system message (None: one that is not known here); an
    answer is supervised behind ``header``, and behind ``prefix`` where that follows, through
    ``end``, but for ``ignored``.
    """

    name: str
    header: str
    end: str
    system: str | None = ""
    prefix: str = ""
    ignored: str = ""
    thinks: bool = False


_HELPFUL = "You are a helpful assistant."
_CHATML = ("<|im_start|>assistant\n", "<|im_end|>\n")
DEEPSPEC = (
    Family("qwen", *_CHATML, _HELPFUL),
    Family("gemma4", "<|turn>model\n", "<turn|>\n", prefix="<|channel>thought\n<channel|>"),
)
# The first that fits is taken, so one whose header begins with another's stands before it.
SPECFORGE = (
    Family("qwen3.5", _CHATML[0] + "<think>\n", _CHATML[1], thinks=True),
    Family("qwen3-instruct", *_CHATML, _HELPFUL, ignored="<think>\n\n</think>\n\n"),
    Family("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", None),
    Family("llama4", "<|header_start|>assistant<|header_end|>\n\n", "<|eot|>", _HELPFUL),
    Family("phi3", "<|assistant|>\n", "<|end|>\n", _HELPFUL),
    Family("phi4", "<|im_start|>assistant<|im_sep|>", "<|im_end|>", _HELPFUL),
    Family("phi4-mini", "<|assistant|>", "<|end|>", _HELPFUL),
    Family("kimi-k2", "<|im_assistant|>assistant<|im_middle|>", "<|im_end|>", _HELPFUL),
    Family("deepseek-v3", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", _HELPFUL),
    Family("ling-flash-2.0", "<role>ASSISTANT</role>", "<|role_end|>", _HELPFUL),
    Family("gemma", "<start_of_turn>model\n", "<end_of_turn>\n", _HELPFUL),
)


def trainer_plan(
    chat: Chat,
    tokenizer: Tokenizer,
    like: Like,
    max_length: int | None = None,
    *,
    last_answer_only: bool = False,
    template_options: Mapping[str, Any] | None = None,
) -> Plan[Shown]:
    """How to get the rows that ``like`` makes of a conversation, cut to ``max_length`` tokens.

    One row, but of ``speculators``, which may make several or none. A ValueError says what the
    trainer refuses, or that it has no markers for the template.
    """
    if last_answer_only and like in ("deepspec", "speculators"):
        raise ValueError(f"last_answer_only is no setting of {like}, whose rows are as they are")
    plans = {
        "automodel": _automodel,
        "deepspec": _deepspec,
        "specforge": _specforge,
        "speculators": _speculators,
    }
    template = Template(tokenizer, chat.tools, template_options or {})
    try:
        template.check_options()
        rows = yield from plans[like](chat, template, max_length, last_answer_only)
    except ValueError as error:
        raise ValueError(f"conversation {chat.id!r}: {error}") from error
    return rows


def _automodel(chat: Chat, template: Template, length: int | None, last_only: bool) -> Plan[Shown]:
    messages = list(chat.messages)
    if re.search(r"\{%-?\s+generation\s+-?%\}", template.source):
        text, spans = template.write_marked(messages)
        (encoding,) = yield [text]
        mask = [False] * len(encoding.ids)
        for start, end in spans:
            if end == 0:
                raise ValueError("automodel refuses an empty answer that opens the text")
            first, last = (encoding.char_to_token(place) for place in (start, end - 1))
            if first is None:
                break
            # A last character without a token of its own, or in token 0, leaves no end.
            stop = last + 1 if last else len(mask)
            mask[first:stop] = [True] * (stop - first)
    else:
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise ValueError("automodel needs an answer, got none")
        if answers[0] == 0:
            what = "an answer that opens the conversation: there is nothing to render before it"
            raise ValueError(f"automodel refuses {what}")
        counts = sorted({count for turn in answers for count in (turn, turn + 1)} - {len(messages)})
        prefixes = [template.write(messages[:count]) for count in counts]
        encoding, *encodings = yield [template.write(messages), *prefixes]
        ids = encoding.ids[:length]
        ends = {len(messages): len(ids)}
        for count, prefix in zip(counts, encodings, strict=True):
            cut = prefix.ids[:length]
            # The prefix may close with an end of text that the next message replaces.
            closed = len(cut) > 1 and cut[-1] == template.tokenizer.eos_token_id
            same = len(cut) - closed
            if len(cut) > len(ids) or (ids[: len(cut)] != cut and ids[:same] != cut[:same]):
                raise ValueError(
                    f"automodel refuses the chat template: the rendering of the first {count} "
                    "messages is no prefix of the rendering of the whole, so answers cannot be "
                    "located; put {% generation %} ... {% endgeneration %} around them"
                )
            ends[count] = len(cut)
        mask = [False] * len(ids)
        for turn in answers:
            mask[ends[turn] : ends[turn + 1]] = [True] * (ends[turn + 1] - ends[turn])
    mask = mask[:length]
    if last_only:
        stop = len(mask) - mask[::-1].index(True) if True in mask else 0
        start = next((i + 1 for i in range(stop - 1, -1, -1) if not mask[i]), 0)
        mask[:start] = [False] * start
    return [(encoding.ids[:length], mask, messages, chat.tools)]


def _deepspec(chat: Chat, template: Template, length: int | None, last_only: bool) -> Plan[Shown]:
    family = _family(template.tokenizer, template.source, "deepspec", DEEPSPEC)
    messages = _with_system(chat.messages, family)
    if (first := messages[_has_system(messages) :]) and first[0]["role"] != "user":
        raise ValueError(f"deepspec needs the user to begin, got {first[0]['role']!r}")
    # The empty thought is written into each answer, where the template may take it out again.
    for message in messages:
        content = message.get("content") or ""
        if message["role"] == "assistant" and not content.startswith(family.prefix):
            message["content"] = family.prefix + content
    text = Template(template.tokenizer, None, template.options).write(messages)
    ids, mask = yield from _between_markers(text, family, length, last_only)
    return [(ids, mask, messages, None)]


def _specforge(chat: Chat, template: Template, length: int | None, last_only: bool) -> Plan[Shown]:
    family = _family(template.tokenizer, template.source, "specforge", SPECFORGE)
    thinks = template.options.get("enable_thinking", family.thinks)
    messages = _with_system(chat.messages, family)
    kept = messages[: _has_system(messages)]
    rest = messages[len(kept) :]
    while rest and rest[0]["role"] != "user":
        del rest[0]
    before = ""
    for message in rest:
        role = message["role"]
        if (role == "tool" and before not in ("assistant", "tool")) or (
            role == "assistant" and before not in ("user", "tool")
        ):
            break
        kept.append(_plain(message, keep_reasoning=thinks))
        before = role
    if not kept:
        raise ValueError("specforge needs a user message or a system message, got neither")
    if thinks:
        options = {**template.options, "enable_thinking": True}
        template = Template(template.tokenizer, chat.tools, options)
    text = template.write(kept)
    ids, mask = yield from _between_markers(text, family, length, last_only)
    if family.ignored and not thinks:
        places = [match.span() for match in re.finditer(re.escape(family.ignored), text)]
        for start, end in (yield from _borders(text, places, length)):
            mask[start:end] = [False] * len(mask[start:end])
    return [(ids, mask, kept, chat.tools)]


def _speculators(
    chat: Chat, template: Template, length: int | None, last_only: bool
) -> Plan[Shown]:
    messages = [_with_thought(message) for message in chat.messages]
    rows: list[Shown] = []
    for turn, message in enumerate(messages):
        if turn == 0 or message["role"] != "assistant":
            continue
        before = messages[:turn]
        texts = [template.write(before), template.write(before, prompt=True)]
        texts.append(template.write(messages[: turn + 1]))
        history, prompt, full = (encoding.ids for encoding in (yield texts))
        if length is not None and len(prompt) >= length:
            continue
        border = common_prefix(prompt, full)
        if border < len(prompt) and (border < len(history) or full[: len(history)] != history):
            raise ValueError(
                f"speculators refuses the chat template: before the answer in messages[{turn}] "
                "the rendering with generation prompt and the rendering with the answer differ "
                "within the history"
            )
        full = full[:length]
        # A row without a supervised token is dropped.
        if border < len(full):
            mask = [place >= border for place in range(len(full))]
            rows.append((full, mask, messages[: turn + 1], chat.tools))
    return rows


def _between_markers(
    text: str, family: Family, length: int | None, last_only: bool
) -> Generator[list[str], list[Encoding], tuple[list[int], list[bool]]]:
    """Tokens of the text, those of the answers supervised; of the last answer if ``last_only``."""
    spans = list(_answers(text, family))
    (encoding,) = yield [text]
    ids = encoding.ids[:length]
    mask = [False] * len(ids)
    for start, end in (yield from _borders(text, spans[-1:] if last_only else spans, length)):
        mask[start:end] = [True] * (min(end, len(ids)) - start)
    return ids, mask


def _answers(text: str, family: Family) -> Iterator[Span]:
    """Where answers are supervised, in characters."""
    place = text.find(family.header)
    while place >= 0:
        start = place + len(family.header)
        found = text.find(family.end, start)
        # Without its marker an answer ends with the text, but for a last line break.
        stop = found + len(family.end) if found >= 0 else max(start, len(text.removesuffix("\n")))
        if family.prefix and text.startswith(family.prefix, start):
            start += len(family.prefix)
        yield start, stop
        place = text.find(family.header, stop)


def _borders(
    text: str, spans: Sequence[Span], length: int | None
) -> Generator[list[str], list[Encoding], list[Span]]:
    """Spans in tokens: how many tokens the text has up to each border, cut to ``length``."""
    encodings = yield [text[:place] for span in spans for place in span]
    counts = [len(encoding.ids[:length]) for encoding in encodings]
    return [pair for pair in zip(counts[::2], counts[1::2], strict=True) if pair[0] < pair[1]]


@lru_cache(maxsize=64)
def _family(tokenizer: Tokenizer, source: str, like: str, families: tuple[Family, ...]) -> Family:
    """The first family whose header and end of turn the template writes."""
    question = {"role": "user", "content": "a"}
    plain = Template(tokenizer, None, {})
    try:
        text = plain.write([question, {"role": "assistant", "content": "b"}])
        prompt = plain.write([question], prompt=True)
    except ValueError:
        text = prompt = ""
    for family in families:
        _, header, behind = text.partition(family.header)
        if header and family.end in behind and (not family.thinks or prompt.endswith("<think>\n")):
            return family
    names = ", ".join(family.name for family in families)
    raise ValueError(
        f"{like} has no markers for this chat template: it must be of a family that it knows, "
        f"{names}"
    )


def _with_system(messages: Sequence[Mapping[str, Any]], family: Family) -> _Messages:
    """Copies of the messages with a system message in front where the family has one."""
    copies = [dict(message) for message in messages]
    if _has_system(copies):
        copies[0] = {"role": "system", "content": copies[0].get("content")}
    elif family.system is None:
        raise ValueError(
            f"the trainer puts a system message of its own in front of a {family.name} "
            "conversation without one: give the conversation a system message"
        )
    elif family.system:
        copies.insert(0, {"role": "system", "content": family.system})
    return copies


def _has_system(messages: _Messages) -> bool:
    return bool(messages) and messages[0]["role"] == "system"


def _plain(message: dict[str, Any], keep_reasoning: bool) -> dict[str, Any]:
    """The fields of a message that SpecForge hands to the template."""
    plain = {"role": message["role"], "content": message.get("content") or ""}
    if keep_reasoning and "reasoning_content" in message:
        plain["reasoning_content"] = message["reasoning_content"]
    if "tool_calls" in message:
        plain["tool_calls"] = []
        for call in message["tool_calls"]:
            function = call.get("function", {})
            arguments = function.get("arguments", {})
            if isinstance(arguments, str):
                try:
                    arguments = json.loads(arguments)
                except json.JSONDecodeError:
                    arguments = {}
            named = {"name": function.get("name", ""), "arguments": arguments}
            kind = {"id": call.get("id", ""), "type": call.get("type", "function")}
            plain["tool_calls"].append(kind | {"function": named})
    return plain


def _with_thought(message: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a message that speculators hands to the template."""
    kept = {"role": message["role"], "content": message.get("content") or ""}
    kept |= {key: message[key] for key in ("tool_calls", "tool_call_id") if message.get(key)}
    if thought := message.get("thinking") or message.get("reasoning_content"):
        kept |= {"thinking": thought, "reasoning_content": thought}
    return kept
