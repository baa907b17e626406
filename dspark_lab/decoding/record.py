"""What a decoding run leaves behind: its rounds, its answers, and the trace of every slot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dspark_lab.decoding.text import StreamedText, up_to_end
from dspark_lab.decoding.trace import TRACE_COLUMNS
from dspark_lab.decoding.verification import Verdict
from dspark_lab.files import now
from dspark_lab.model import Target

if TYPE_CHECKING:
    import pandas

__all__ = ["Block", "Clock", "Decoded", "Record", "Round"]

_ROUND_COLUMNS = ("prompt", "round", "drafted", "verified", "accepted", "tokens")
_NAN = float("nan")


@dataclass(frozen=True, eq=False)
class Round:
    """One round of one prompt.

    ``tokens``: those that the answer grew by, the accepted ones and one of the target's own, cut at
    the end of the turn. ``text``: the text that it grew by, where the target has a tokenizer.
    ``drafted``: the block's tokens; the first ``verified`` of them were shown to the target, which
    accepted the first ``accepted``. ``draft_probs`` ``[slot, vocab]`` is q, ``target_probs``
    ``[verified + 1, vocab]`` is p, ``confidence`` ``[slot]`` or None.
    """

    prompt: int
    number: int
    tokens: list[int]
    text: str
    drafted: list[int]
    verified: int
    accepted: int
    draft_probs: Float[Tensor, "slot vocab"]
    target_probs: Float[Tensor, "verified+1 vocab"]
    confidence: Float[Tensor, " slot"] | None


@dataclass(frozen=True, eq=False)
class Decoded:
    """What :func:`dspark_lab.decoding.decode` returns.

    ``tokens``: the answer to each prompt, end-of-turn included. ``texts``: the same as text, empty
    without a tokenizer. ``trace``: a row for each drafted slot. ``rounds``: a row for each round,
    with ``prompt``, ``domain``, ``round``, ``drafted``, ``verified``, ``accepted`` slots and
    ``tokens`` that the answer grew by. ``seconds``: spent on the ``prompt``, on ``draft``, on
    ``verify`` and on the ``rest``.
    """

    tokens: list[list[int]]
    texts: list[str]
    trace: pandas.DataFrame
    rounds: pandas.DataFrame
    seconds: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        """Over all prompts, without reading the prompts and drawing their first tokens."""
        seconds = sum(self.seconds.values()) - self.seconds["prompt"]
        return float(self.rounds["tokens"].sum()) / seconds if seconds > 0 else _NAN

    @property
    def tau(self) -> float:
        """Tokens that a round yields on average, the target's own among them."""
        return float(self.rounds["tokens"].mean())

    @property
    def summary(self) -> pandas.Series:
        """``tokens`` of all answers, ``rounds``, ``tau``, slots ``verified`` and ``accepted`` a
        round, and ``acceptance_rate``, accepted over verified ones; NaN where there were none.
        """
        import pandas as pd

        verified, accepted = self.rounds["verified"], self.rounds["accepted"]
        return pd.Series(
            {
                "tokens": sum(map(len, self.tokens)),
                "rounds": len(self.rounds),
                "tau": self.tau,
                "verified": verified.mean(),
                "accepted": accepted.mean(),
                "acceptance_rate": accepted.sum() / (verified.sum() or _NAN),
            }
        )


@dataclass(frozen=True, eq=False)
class Block:
    """A drafted block of each row; ``probs`` is q, ``confidence`` None without such a head."""

    tokens: Int[Tensor, "batch slot"]
    probs: Float[Tensor, "batch slot vocab"]
    confidence: Float[Tensor, "batch slot"] | None


class Clock:
    """Seconds of the parts of a run, on the target's device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spent = {"prompt": 0.0, "draft": 0.0, "verify": 0.0, "rounds": 0.0}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begin = now(self._device)
        yield
        self._spent[part] += now(self._device) - begin

    @property
    def seconds(self) -> dict[str, float]:
        """Of :class:`Decoded`, so far."""
        parts = {name: self._spent[name] for name in ("prompt", "draft", "verify")}
        return parts | {"rest": self._spent["rounds"] - parts["draft"] - parts["verify"]}


class Record:
    """The answers of a run as they grow, and its tables."""

    def __init__(
        self,
        target: Target,
        count: int,
        domains: Sequence[str] | None,
        ends: set[int],
        max_new_tokens: int,
    ) -> None:
        self._domains = ["none"] * count if domains is None else list(domains)
        self._ends, self._max_new_tokens = ends, max_new_tokens
        self._answers: list[list[int]] = [[] for _ in range(count)]
        self._texts = [StreamedText(target, ends) for _ in range(count)]
        self._numbers = [0] * count
        self._trace: dict[str, list] = {name: [] for name in TRACE_COLUMNS}
        self._rounds: list[tuple[int, ...]] = []

    def room(self, prompt: int) -> int:
        """How many drafted tokens still fit into an answer, with one of the target's own."""
        return self._max_new_tokens - len(self._answers[prompt]) - 1

    def is_over(self, prompt: int) -> bool:
        answer = self._answers[prompt]
        return answer[-1] in self._ends or len(answer) >= self._max_new_tokens

    def begin(self, prompts: Sequence[int], tokens: Sequence[int]) -> None:
        """The first token of each answer, which belongs to no round."""
        for prompt, token in zip(prompts, tokens, strict=True):
            self._answers[prompt].append(token)

    def add(
        self,
        prompts: Sequence[int],
        block: Block,
        drafted: Sequence[int],
        lengths: Sequence[int],
        verdict: Verdict,
        p: Float[Tensor, "batch verified+1 vocab"],
    ) -> list[Round]:
        """A round of each of these prompts, in the order of the rows.

        ``drafted``: how many slots of the block fit into each answer; ``lengths``: how many of them
        were verified; ``p``: the target's distributions.
        """
        values = {
            "token": block.tokens,
            "draft_prob": block.probs.gather(2, block.tokens.unsqueeze(2)).squeeze(2),
            "confidence": torch.full_like(block.probs[..., 0], torch.nan)
            if block.confidence is None
            else block.confidence,
            "target_prob": verdict.target_prob,
            "accept_prob": verdict.accept_prob,
            "accept_rate": verdict.accept_rate,
        }
        lists = {name: value.tolist() for name, value in values.items()}
        found = zip(verdict.accepted.tolist(), verdict.next_token.tolist(), strict=True)
        rounds = []
        for row, (accepted, token) in enumerate(found):
            prompt, slots, verified = prompts[row], drafted[row], lengths[row]
            slot_values = {name: value[row][:slots] for name, value in lists.items()}
            new = up_to_end([*slot_values["token"][:accepted], token], self._ends)
            if len(new) <= accepted:
                # Behind an accepted end of turn nothing counts.
                verified = accepted = len(new)
            self._add_slots(prompt, slot_values, verified, accepted, token)
            number, answer = self._numbers[prompt], self._answers[prompt]
            self._rounds.append((prompt, number, slots, verified, accepted, len(new)))
            answer += new
            self._numbers[prompt] += 1
            rounds.append(
                Round(
                    prompt=prompt,
                    number=number,
                    tokens=new,
                    text=self._texts[prompt].new(answer, self.is_over(prompt)),
                    drafted=slot_values["token"],
                    verified=verified,
                    accepted=accepted,
                    draft_probs=block.probs[row, :slots],
                    target_probs=p[row, : verified + 1],
                    confidence=None if block.confidence is None else block.confidence[row, :slots],
                )
            )
        return rounds

    def _add_slots(
        self, prompt: int, values: dict[str, list], verified: int, accepted: int, next_token: int
    ) -> None:
        """A round's rows of the trace; what was not verified has no target and no rates."""
        count, begin = len(values["token"]), len(self._answers[prompt])
        unknown = [_NAN] * (count - verified)
        columns: dict[str, Iterable] = {
            "prompt": [prompt] * count,
            "domain": [self._domains[prompt]] * count,
            "round": [self._numbers[prompt]] * count,
            "slot": range(count),
            "position": range(begin, begin + count),
            "token": values["token"],
            "draft_prob": values["draft_prob"],
            "target_prob": values["target_prob"][:verified] + unknown,
            "accept_prob": values["accept_prob"][:verified] + unknown,
            "accept_rate": values["accept_rate"][:verified] + unknown,
            "confidence": values["confidence"],
            "verified": [slot < verified for slot in range(count)],
            "accepted": [slot < accepted for slot in range(count)],
            "resampled": [next_token if s == accepted < verified else None for s in range(count)],
        }
        for name, column in columns.items():
            self._trace[name].extend(column)

    def result(self, seconds: dict[str, float]) -> Decoded:
        """What there is so far, its tables by prompt and round."""
        import pandas as pd

        trace = pd.DataFrame(self._trace).astype(TRACE_COLUMNS)
        rounds = pd.DataFrame(self._rounds, columns=list(_ROUND_COLUMNS))
        rounds.insert(1, "domain", rounds["prompt"].map(dict(enumerate(self._domains))))
        answers = [list(answer) for answer in self._answers]
        return Decoded(
            tokens=answers,
            texts=[text.whole(a) for text, a in zip(self._texts, answers, strict=True)],
            trace=trace.sort_values(["prompt", "round", "slot"], ignore_index=True),
            rounds=rounds.sort_values(["prompt", "round"], ignore_index=True),
            seconds=seconds,
        )
