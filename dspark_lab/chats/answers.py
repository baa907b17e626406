"""Where the assistant's answers are in the text of a chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from dspark_lab.chats.chat import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Messages = list[dict[str, str]]
Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """The template's text, and where in it the supervised characters are, in order.

    ``left_out``: answers that it does not hold as they were generated.
    """

    text: str
    spans: list[Span]
    left_out: int = 0


def render(
    chat: Chat,
    tokenizer: Tokenizer,
    *,
    markers: bool = False,
    last_answer_only: bool = False,
    template_options: Mapping[str, Any] | None = None,
) -> Rendered:
    """SKELETON."""
    text, spans = _unmarked_answers(tokenizer, list(chat.messages))
    return Rendered(text, spans)


def _marked_answers(tokenizer: Tokenizer, messages: Messages) -> tuple[str, list[Span], bool]:
    # Not transformers' own ``assistant_masks``, which lose the last bytes of an answer that ends
    # in a character of several tokens.
    text, spans = _render_marked(tokenizer, messages)
    if not spans:
        raise ValueError("the chat template's {% generation %} markers enclose nothing of it")
    placeholders = _placeholders(messages, text)
    probe, probe_spans = _render_marked(tokenizer, _with_answers(messages, placeholders))
    last_words = tuple(placeholders.values())
    return text, spans, not any(probe[a:b].rstrip().endswith(last_words) for a, b in probe_spans)


def _unmarked_answers(tokenizer: Tokenizer, messages: Messages) -> tuple[str, list[Span]]:
    """Text and spans, from a second rendering with a placeholder for each answer.

    Where what stands around the placeholders, joined with the answers, gives the text, the spans
    are known by arithmetic; else the template changes some answer, and they are located one by one.
    """
    text = _render(tokenizer, messages)
    placeholders = _placeholders(messages, text)
    probe = _render(tokenizer, _with_answers(messages, placeholders))
    turn_of = {placeholder: turn for turn, placeholder in placeholders.items()}
    found = re.findall("|".join(turn_of), probe)
    if found != list(turn_of):
        writes = f"of {list(placeholders)} it writes {[turn_of[text] for text in found]}"
        raise ValueError(f"the chat template must write every answer once, in order, but {writes}")
    pieces = re.split("|".join(turn_of), probe)
    answers = [messages[turn]["content"] for turn in placeholders]
    parts = [part for pair in zip(pieces, [*answers, ""], strict=True) for part in pair]
    if "".join(parts) == text:
        ends = list(accumulate(len(part) for part in parts))
        return text, list(zip(ends[0:-2:2], ends[1:-2:2], strict=True))
    spans = [_locate_one(tokenizer, messages, text, *answer) for answer in placeholders.items()]
    if any(end > start for (_, end), (start, _) in zip(spans, spans[1:], strict=False)):
        raise _cannot_locate(*placeholders)
    return text, spans


def _locate_one(
    tokenizer: Tokenizer, messages: Messages, text: str, turn: int, placeholder: str
) -> Span:
    """The span of one answer that the template does not copy as it is.

    The text around a placeholder is the text around the answer, unless what the template writes
    before depends on what it says (a block of thinking). Then the answer starts where it can be
    read word for word, or else where the generation prompt ends.
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


def _cannot_locate(*turns: int) -> ValueError:
    where = ", ".join(f"messages[{turn}]" for turn in turns)
    advice = "put {% generation %} ... {% endgeneration %} around answers in the template"
    return ValueError(f"the chat template rewrites the answer in {where} too much; {advice}")


def _assistant_turns(messages: Messages) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _placeholders(messages: Messages, text: str) -> dict[int, str]:
    """A text for each assistant turn that neither the messages nor the template contain."""
    used = {character for message in messages for character in message["content"]}.union(text)
    mark = next((chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used), None)
    if mark is None:
        raise ValueError("uses every private-use character, none is left for a placeholder")
    return {turn: f"{mark}{turn}{mark}" for turn in _assistant_turns(messages)}


def _with_answers(messages: Messages, answers: dict[int, str]) -> Messages:
    return [
        {"role": message["role"], "content": answers.get(turn, message["content"])}
        for turn, message in enumerate(messages)
    ]


def _generation_prompt(tokenizer: Tokenizer, messages: Messages, turn: int) -> str:
    """The text that the template adds to the messages before ``turn`` to make the model answer."""
    if turn == 0:
        return ""
    said = _render(tokenizer, messages[:turn])
    asked = _render(tokenizer, messages[:turn], add_generation_prompt=True)
    return asked[len(said) :] if asked.startswith(said) else ""


def _render(tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = False) -> str:
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    return str(tokenizer.apply_chat_template(messages, **options))


def _render_marked(tokenizer: Tokenizer, messages: Messages) -> tuple[str, list[Span]]:
    """The text, and the spans that lie between the template's generation markers."""
    from transformers.utils import chat_template_utils

    # Its annotations promise a text alone.
    render: Callable[..., Any] = chat_template_utils.render_jinja_template
    texts, spans = render(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return texts[0], spans[0]
