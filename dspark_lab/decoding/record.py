"""The rounds of a decoding run as they are recorded: answers, tables, and seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dspark_lab.decoding.text import StreamedText, up_to_end
from dspark_lab.decoding.trace import TRACE_COLUMNS
from dspark_lab.decoding.verification import Verdict
from dspark_lab.model import Target

_ROUND_COLUMNS = ("prompt", "domain", "round", "drafted", "verified", "accepted", "tokens")
_NAN = float("nan")


@dataclass(frozen=True, eq=False)
class Round:
    """One round of one prompt.

    ``tokens``, ``text``: what the answer grew by, the accepted tokens and one of the target's own,
    cut at the end of the turn. The target was shown the first ``verified`` tokens of ``drafted``
    and accepted the first ``accepted``. ``draft_probs`` is q, ``target_probs`` p.
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

    @property
    def last_slot(self) -> int:
        """The last slot with a distribution: the bonus slot counts, where all were verified."""
        return max(len(self.drafted) - 1, self.verified)


@dataclass(frozen=True, eq=False)
class Decoded:
    """The answers of :func:`dspark_lab.decoding.decode`, and its tables.

    ``tokens``: the answer to each prompt, end-of-turn included. ``texts``: the same as text, empty
    without a tokenizer. ``seconds``: by ``prompt``, ``draft``, ``verify`` and the ``rest``.

    ``rounds``: a row for each round, with its numbers of slots and of ``tokens`` that the answer
    grew by.

    ``trace``: a row for each drafted slot: ``position`` of its ``token`` in the answer,
    ``draft_prob`` q(token), ``target_prob`` p(token), ``accept_prob`` min(1, p / q),
    ``accept_rate`` sum of min(p, q) over the vocabulary, ``accepted`` (with all before it), and
    ``resampled``, the token drawn in place of a rejected one. ``top_prob`` is the largest
    probability of the drafter's softmax at temperature 1, whatever that of decoding, and ``margin``
    the difference of its two largest logits. What was not verified has no target
    and no rates (NaN). Slots past ``max_new_tokens`` are left out, those behind an accepted
    end-of-turn count as not verified.
    """

    tokens: list[list[int]]
    texts: list[str]
    trace: pd.DataFrame
    rounds: pd.DataFrame
    seconds: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        """Without reading the prompts and drawing their first tokens."""
        seconds = sum(self.seconds.values()) - self.seconds["prompt"]
        return float(self.rounds["tokens"].sum()) / seconds if seconds > 0 else _NAN

    @property
    def tau(self) -> float:
        """Mean tokens of a round, the target's own among them."""
        return float(self.rounds["tokens"].mean())

    @property
    def summary(self) -> pd.Series:
        """Tokens and rounds of all answers, tau, slots a round and their ratio; NaN of none."""
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
    """A drafted block of each row.

    ``probs`` is q; ``sureness`` its ``top_prob`` and ``margin``, as in :class:`Decoded`;
    ``confidence`` is None without such a head.
    """

    tokens: Int[Tensor, "batch slot"]
    probs: Float[Tensor, "batch slot vocab"]
    sureness: Float[Tensor, "batch slot 2"]
    confidence: Float[Tensor, "batch slot"] | None


class Clock:
    """The seconds of :class:`Decoded`, so far, on the target's device.

    On CUDA the device itself notes its times, which are read when somebody asks: no part waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = dict.fromkeys(("prompt", "draft", "verify", "rest"), 0.0)
        self._noted: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begin = self._now()
        yield
        self._noted.append((part, begin, self._now()))

    @property
    def seconds(self) -> dict[str, float]:
        on_cuda = self._device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(self._device)
        for part, begin, end in self._noted:
            spent = begin.elapsed_time(end) / 1000 if on_cuda else end - begin
            self._seconds[part] += spent
            if part in ("draft", "verify"):
                # They lie within the clock of the rest.
                self._seconds["rest"] -= spent
        self._noted.clear()
        return dict(self._seconds)

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class Record:
    """The answers of a run as they grow, and its tables."""

    def __init__(
        self, target: Target, domains: Sequence[str], ends: set[int], max_new_tokens: int
    ) -> None:
        self._domains, self._ends, self.max_new_tokens = domains, ends, max_new_tokens
        self._answers: list[list[int]] = [[] for _ in domains]
        self._texts = [StreamedText(target, ends) for _ in domains]
        self._numbers = [0] * len(domains)
        self._trace: list[list] = []
        self._rounds: list[tuple] = []

    def room(self, prompt: int) -> int:
        """How many drafted tokens still fit into an answer, with one of the target's own."""
        return self.max_new_tokens - len(self._answers[prompt]) - 1

    def is_over(self, prompt: int) -> bool:
        answer = self._answers[prompt]
        return answer[-1] in self._ends or len(answer) >= self.max_new_tokens

    def begin(self, prompts: Sequence[int], tokens: Sequence[int]) -> None:
        """The first token of each answer, which belongs to no round."""
        for prompt, token in zip(prompts, tokens, strict=True):
            self._answers[prompt].append(token)

    def add(
        self,
        prompts: Sequence[int],
        block: Block,
        drafted: Sequence[int],
        lengths: Int[Tensor, " batch"],
        verdict: Verdict,
        p: Float[Tensor, "batch read vocab"],
    ) -> tuple[list[Round], list[int]]:
        """A round of each prompt, and how many of its tokens the target accepted.

        ``drafted`` slots fit its answer, ``lengths`` of them were verified.
        """
        confidence = block.confidence
        if confidence is None:
            confidence = torch.full_like(block.probs[..., 0], torch.nan)
        draft_prob = block.probs.gather(2, block.tokens.unsqueeze(2)).squeeze(2)
        rates = (verdict.target_prob, verdict.accept_prob, verdict.accept_rate)
        whole = torch.stack([lengths, verdict.accepted, verdict.next_token], dim=1)
        # All that the host has to know comes to it at once: the only time that a round waits.
        parts = [whole, block.tokens, draft_prob, confidence, *block.sureness.unbind(2), *rates]
        numbers = torch.cat([part.double() for part in parts], dim=1).cpu()
        host = numbers.split([part.shape[1] for part in parts], dim=1)
        (wholes, batch_tokens), figures = (x.long().tolist() for x in host[:2]), host[2:]
        draft_probs = figures[0].tolist()
        own_figures, target_rates = (
            torch.stack(part, dim=2).tolist() for part in (figures[1:4], figures[4:])
        )
        rounds, counts = [], []
        for row, (verified, accepted, own) in enumerate(wholes):
            counts.append(accepted)
            prompt, slots = prompts[row], drafted[row]
            tokens, answer = batch_tokens[row][:slots], self._answers[prompt]
            key = (prompt, self._domains[prompt], self._numbers[prompt])
            new = up_to_end([*tokens[:accepted], own], self._ends)
            if len(new) <= accepted:
                # Behind an accepted end of turn nothing counts.
                verified = accepted = len(new)
            self._rounds.append((*key, slots, verified, accepted, len(new)))
            for slot, token in enumerate(tokens):
                asked = slot < verified
                line = [*key, slot, len(answer) + slot, token, draft_probs[row][slot]]
                line += target_rates[row][slot] if asked else [_NAN] * len(rates)
                line += [*own_figures[row][slot], asked, slot < accepted]
                self._trace.append([*line, own if slot == accepted and asked else None])
            answer += new
            self._numbers[prompt] += 1
            rounds.append(
                Round(
                    prompt=prompt,
                    number=key[-1],
                    tokens=new,
                    text=self._texts[prompt].new(answer, self.is_over(prompt)),
                    drafted=tokens,
                    verified=verified,
                    accepted=accepted,
                    draft_probs=block.probs[row, :slots],
                    target_probs=p[row, : verified + 1],
                    confidence=None if block.confidence is None else block.confidence[row, :slots],
                )
            )
        return rounds, counts

    def result(self, seconds: dict[str, float]) -> Decoded:
        """The record so far, its tables by prompt and round."""
        trace = pd.DataFrame(self._trace, columns=list(TRACE_COLUMNS)).astype(TRACE_COLUMNS)
        rounds = pd.DataFrame(self._rounds, columns=list(_ROUND_COLUMNS))
        answers = [list(answer) for answer in self._answers]
        return Decoded(
            tokens=answers,
            texts=[text.whole(a) for text, a in zip(self._texts, answers, strict=True)],
            trace=trace.sort_values(["prompt", "round", "slot"], ignore_index=True),
            rounds=rounds.sort_values(["prompt", "round"], ignore_index=True),
            seconds=dict(seconds),
        )
