"""A conversation, and the same as a row of tokens with a loss mask."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from dspark_lab.checks import checked

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@checked
@dataclass(frozen=True)
class Chat:
    """One conversation.

    A message is a dictionary with ``role`` and ``content`` (two strings) and whatever else a chat
    template may write: ``reasoning_content``, ``tool_calls``, ``name``, ``tool_call_id``. Without a
    message of the assistant it is a prompt, which has nothing to train on.

    Attributes:
        id: the name of the conversation in errors and tables.
        domain: what tables count it under.
        finished: False where the last answer was cut off, so that what a template writes behind it
            to close the turn was never generated.
        tools: the tools that the template writes, as JSON schemas.
        supervised: one bool for each message; the loss leaves out an answer that has False.
    """

    messages: Sequence[dict[str, Any]]
    id: str
    domain: str | None = None
    finished: bool = True
    tools: Sequence[dict[str, Any]] | None = None
    supervised: Sequence[bool] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        object.__setattr__(self, "tools", tuple(self.tools) if self.tools else None)
        if not self.messages:
            raise ValueError("messages must hold at least one message, got none")
        for index, message in enumerate(self.messages):
            _check_message(f"messages[{index}]", message)
        if self.tools:
            check_unicode("tools", self.tools)
        if self.supervised is not None:
            object.__setattr__(self, "supervised", tuple(self.supervised))
            given, wanted = len(self.supervised), len(self.messages)
            if given != wanted:
                raise ValueError(
                    f"supervised must hold a bool for each of {wanted} messages, got {given}"
                )

    @property
    def answers(self) -> list[int]:
        """The indices of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    def up_to(self, answer: int) -> Chat:
        """The conversation as it stood when message ``answer`` was its last."""
        last = answer == self.answers[-1]
        return replace(
            self,
            messages=self.messages[: answer + 1],
            finished=self.finished or not last,
            supervised=None if self.supervised is None else self.supervised[: answer + 1],
        )


@checked
@dataclass(frozen=True, eq=False)
class Encoded:
    """A conversation as tokens, at least one; ``loss_mask`` is True on supervised tokens.

    Attributes:
        chat: the conversation, where it is known; its ``id`` and ``domain`` are the row's.
        left_out: answers that the row does not hold as they were generated, because the template
            leaves parts of them out (thinking) where later messages follow.
        marker_differences: tokens that the rule supervises and the template's ``{% generation %}``
            markers do not, or the other way round; 0 for a template without markers.
    """

    input_ids: Int[Tensor, " seq"]
    loss_mask: Bool[Tensor, " seq"]
    chat: Chat | None = None
    id: str | None = None
    domain: str | None = None
    left_out: int = 0
    marker_differences: int = 0

    def __post_init__(self) -> None:
        if self.chat is not None:
            object.__setattr__(self, "id", self.chat.id)
            object.__setattr__(self, "domain", self.chat.domain)
        if not len(self):
            raise ValueError(f"conversation {self.id!r} must hold a token, got none")

    def __len__(self) -> int:
        return len(self.input_ids)


def _check_message(where: str, message: dict[str, Any]) -> None:
    for key in ("role", "content"):
        if not isinstance(message, dict) or key not in message:
            raise ValueError(f"{where} must have 'role' and 'content', got {message!r}")
        if not isinstance(message[key], str):
            kind = type(message[key]).__name__
            raise ValueError(f"{where}.{key} must be a string, got {kind}")
    if message["role"] not in ROLES:
        raise ValueError(f"{where} must have a role of {ROLES}, got {message['role']!r}")
    check_unicode(f"{where}.content", message["content"])
    if len(message) > 2:
        check_unicode(where, message)
    calls = message.get("tool_calls") or []
    if not (isinstance(calls, list) and all(map(_is_call, calls))):
        what = (
            f"{where}.tool_calls must be a list of objects, each with an object as its 'function'"
        )
        raise ValueError(f"{what} if it has one, got {calls!r}")


def _is_call(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(call.get("function", {}), dict)


def check_unicode(where: str, value: Any) -> None:
    """Refuse half a surrogate pair, which JSON can spell and no tokenizer reads."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        got = f"half a surrogate pair at {error.start}"
        raise ValueError(f"{where} must be Unicode text, got {got}") from None
