"""A tokenizer's chat template, and the texts that it writes of messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]

# The arguments of ``apply_chat_template`` that are no options of the template.
_RESERVED = {"conversation", "conversations", "messages", "tools", "documents", "chat_template"}
_RESERVED |= {"add_generation_prompt", "continue_final_message", "tokenize", "tokenizer_kwargs"}
_RESERVED |= {"return_dict", "return_tensors", "return_assistant_tokens_mask", "padding"}
_RESERVED |= {"truncation", "max_length", "sanitize_control_tokens"}


class Template:
    """A tokenizer's chat template with the tools and options that it is to write."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        tools: Sequence[dict[str, Any]] | None,
        options: Mapping[str, Any],
    ) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.tools = list(tools) if tools else None

    def check_options(self) -> None:
        """Refuse options that the template does not read."""
        for name in self.options:
            if name in _RESERVED or not re.search(rf"\b{re.escape(name)}\b", self.source):
                raise ValueError(f"template_options: the chat template reads no option {name!r}")

    @cached_property
    def source(self) -> str:
        options: dict[str, Any] = {"tools": self.tools}
        return str(self.tokenizer.get_chat_template(**options))

    @cached_property
    def has_markers(self) -> bool:
        return _has_markers(self.source)

    @cached_property
    def plain(self) -> Callable[..., str] | None:
        """Write messages of plain text as ``apply_chat_template`` does, without a copy of each.

        None where tools or options go with them, or the tokenizer has its own way of writing.
        """
        from transformers import PreTrainedTokenizerBase
        from transformers.utils import chat_template_utils

        written_by = getattr(self.tokenizer.apply_chat_template, "__func__", None)
        compiled = getattr(chat_template_utils, "_compile_jinja_template", None)
        own = written_by is not PreTrainedTokenizerBase.apply_chat_template
        if own or compiled is None or self.tools or self.options:
            return None
        render = compiled(self.source).render
        return partial(render, tools=None, documents=None, **self.tokenizer.special_tokens_map)

    def without(self, tool: int) -> Template:
        tools = [other for index, other in enumerate(self.tools or ()) if index != tool]
        return Template(self.tokenizer, tools, self.options)

    def write(self, messages: Messages, prompt: bool = False) -> str:
        """The text of some messages, with the generation prompt behind it if asked for."""
        options = {**self.options, "tools": self.tools, "add_generation_prompt": prompt}
        try:
            if self.plain is not None and messages and all(map(_is_plain, messages)):
                return self.plain(messages=list(messages), add_generation_prompt=prompt)
            return str(
                self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
            )
        except Exception as error:  # templates raise what they like, and Python what they do wrong
            raise ValueError(f"the chat template refuses it: {error}") from error

    def write_marked(self, messages: Messages) -> tuple[str, list[Span]]:
        """The text, and the spans that lie between the template's generation markers.

        Not transformers' own ``assistant_masks``, which lose the last bytes of an answer that ends
        in a character of several tokens.
        """
        from transformers.utils import chat_template_utils

        # Its annotations promise a text alone.
        render: Callable[..., Any] = chat_template_utils.render_jinja_template
        said = [{k: v for k, v in message.items() if v is not None} for message in messages]
        try:
            texts, spans = render(
                conversations=[said],
                tools=self.tools,
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                **(self.tokenizer.special_tokens_map | dict(self.options)),
            )
        except Exception as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        return texts[0], spans[0]

    @property
    def markers(self) -> frozenset[str]:
        """The texts of the tokens that the tokenizer looks for before all others."""
        return _markers(self.tokenizer, len(self.tokenizer))

    def shared(self, prompt: str, text: str) -> int:
        """The length of the longest common prefix, where markers are shared whole or not at all."""
        shared = common_prefix(prompt, text)
        if shared == len(prompt):
            return shared
        markers = self.markers
        longest = max(map(len, markers), default=0)
        for start in range(max(0, shared - longest), shared):
            if any(prompt[start:end] in markers for end in range(shared + 1, start + longest + 1)):
                return start
        return shared

    def first_marker(self, text: str) -> int:
        """How long the marker is, with the space before it, that a text begins with; 0 for none."""
        rest = text.lstrip()
        found = max(map(len, filter(rest.startswith, self.markers)), default=0)
        return len(text) - len(rest) + found if found else 0


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of the longest common prefix of two texts or two lists."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _is_plain(message: Mapping[str, Any]) -> bool:
    return len(message) == 2 and type(message["role"]) is type(message["content"]) is str


@lru_cache(maxsize=16)
def _has_markers(source: str) -> bool:
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None


@lru_cache(maxsize=16)
def _markers(tokenizer: Tokenizer, size: int) -> frozenset[str]:
    return frozenset(token.content for token in tokenizer.added_tokens_decoder.values())
