"""Lossless speculative decoding, and a trace of every round.

    prompt -> the target reads it and draws the first anchor -> rounds, until the turn ends

A round, in words (Leviathan et al. 2022, arXiv 2211.17192, algorithm 1; DSpark, section 3):

    draft:   the drafter's backbone runs once for a block behind the anchor; slot k's token x_k is
             drawn from q_k, which depends on the tokens drawn before it through the Markov head;
    length:  a threshold or a scheduler says how many slots the target is asked about;
    verify:  the target reads the anchor and those slots at once, which gives p_0, ..., p_length;
    accept:  x_k with probability min(1, p_k(x_k) / q_k(x_k)), given that all before it were;
    correct: the first rejected token is drawn anew from max(0, p_k - q_k); where there is none, one
             more token is drawn from p_length. This token is the next anchor.

p and q are both at the decoding temperature, top-p applied; temperature 0 is greedy. Whatever the
drafter is, the tokens are distributed as the target's own. This file knows tokens, probabilities
and caches that are cut back; it does not know what the traces are good for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dspark_lab.checks import require_int, require_number
from dspark_lab.decoding.trace import TRACE_COLUMNS
from dspark_lab.files import now
from dspark_lab.model import Drafter, Target

if TYPE_CHECKING:
    import pandas

__all__ = [
    "Chance",
    "Decoded",
    "Decoding",
    "Round",
    "Scheduler",
    "decode",
    "decode_rounds",
    "distribution",
    "encode_prompt",
    "greedy_differences",
    "residual",
]

# How many slots of each row to verify, from the confidences of them all.
Scheduler = Callable[[Float[Tensor, "batch slot"]], Int[Tensor, " batch"]]
Prompt = str | Sequence[int] | Int[Tensor, " seq"]


@runtime_checkable
class Chance(Protocol):
    """Where random choices come from; ``prompts`` are the numbers of the rows' prompts."""

    def drafts(
        self, probs: Float[Tensor, "batch vocab"], prompts: Sequence[int]
    ) -> Int[Tensor, " batch"]:
        """A token of each row's next slot, drawn with these probabilities."""

    def accepts(
        self, probs: Float[Tensor, "batch slot"], prompts: Sequence[int]
    ) -> Bool[Tensor, "batch slot"]:
        """Whether each slot's token is accepted, with these probabilities."""

    def owns(
        self, probs: Float[Tensor, "batch vocab"], prompts: Sequence[int]
    ) -> Int[Tensor, " batch"]:
        """The target's own token of each row, drawn with these probabilities."""


class Streams:
    """Random numbers from a seed. A prompt's do not depend on the others beside it."""

    def __init__(self, count: int, seed: int, block_size: int) -> None:
        self._block_size = block_size
        self._drafts, self._accepts, self._owns = (
            [_generator(seed, i, kind) for i in range(count)] for kind in range(3)
        )

    def drafts(
        self, probs: Float[Tensor, "batch vocab"], prompts: Sequence[int]
    ) -> Int[Tensor, " batch"]:
        return _draw(probs, _uniform(self._drafts, prompts, 1))

    def accepts(
        self, probs: Float[Tensor, "batch slot"], prompts: Sequence[int]
    ) -> Bool[Tensor, "batch slot"]:
        # As many numbers every time, however many slots the other prompts have.
        point = _uniform(self._accepts, prompts, self._block_size)[:, : probs.shape[1]]
        return point.to(probs.device) < probs

    def owns(
        self, probs: Float[Tensor, "batch vocab"], prompts: Sequence[int]
    ) -> Int[Tensor, " batch"]:
        return _draw(probs, _uniform(self._owns, prompts, 1))


def _generator(*key: int) -> torch.Generator:
    # torch reads 32 bits of a seed and no more.
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def _uniform(
    streams: Sequence[torch.Generator], prompts: Sequence[int], count: int
) -> Float[Tensor, "batch count"]:
    draws = [torch.rand(count, generator=streams[i], dtype=torch.float64) for i in prompts]
    return torch.stack(draws)


def _draw(
    probs: Float[Tensor, "batch vocab"], point: Float[Tensor, "batch 1"]
) -> Int[Tensor, " batch"]:
    """The token in whose share of [0, 1) the point lies."""
    edges = probs.double().cumsum(dim=-1)
    point = point.to(edges.device) * edges[:, -1:]
    return torch.searchsorted(edges, point, right=True).squeeze(1)


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
    target_probs: Float[Tensor, "asked vocab"]
    confidence: Float[Tensor, " slot"] | None


@dataclass(frozen=True, eq=False)
class Decoded:
    """What :func:`decode` returns.

    ``tokens``: the answer to each prompt, end-of-turn included. ``texts``: the same as text, empty
    without a tokenizer. ``trace``: see :func:`decode`. ``rounds``: a row for each round, with
    ``prompt``, ``domain``, ``round``, ``drafted``, ``verified``, ``accepted`` slots and ``tokens``
    that the answer grew by. ``seconds``: spent on the ``prompt``, on ``draft``, on ``verify`` and
    on the ``rest``.
    """

    tokens: list[list[int]]
    texts: list[str]
    trace: pandas.DataFrame
    rounds: pandas.DataFrame
    seconds: dict[str, float]

    @property
    def tokens_per_second(self) -> float:
        """Over all prompts, the reading of the prompts and their first tokens left out."""
        seconds = sum(self.seconds.values()) - self.seconds["prompt"]
        return float(self.rounds["tokens"].sum()) / seconds if seconds > 0 else float("nan")

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
                "acceptance_rate": accepted.sum() / (verified.sum() or float("nan")),
            }
        )


def decode(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Prompt],
    *,
    on_round: Callable[[Round], None] | None = None,
    **options: Any,
) -> Decoded:
    """Answers the prompts, all in one batch, as the target alone would.

    The trace is a table with a row for each drafted slot: ``prompt``, ``domain``, ``round``,
    ``slot``, ``position`` (of the slot's token in the answer), ``token``, ``draft_prob`` q(token),
    ``target_prob`` p(token), ``accept_prob`` min(1, p / q), ``accept_rate`` sum of min(p, q) over
    the vocabulary, ``confidence``, ``verified``, ``accepted`` (with all before it), and
    ``resampled``, the token drawn in place of a rejected one. What was not verified has no target
    and no rates (NaN). Slots past ``max_new_tokens`` are left out, those behind an accepted
    end-of-turn count as not verified.

    Args:
        target: what decides.
        drafter: what proposes; None for plain decoding with a cache.
        prompts: user messages, or token ids.
        on_round: called with each round as soon as it is over, for text that streams.
        options: see :func:`decode_rounds`.

    Raises:
        TypeError, ValueError: as :func:`decode_rounds`.
    """
    decoding = decode_rounds(target, drafter, prompts, **options)
    for round_ in decoding:
        if on_round is not None:
            on_round(round_)
    return decoding.result()


def decode_rounds(
    target: Target, drafter: Drafter | None, prompts: Sequence[Prompt], **options: Any
) -> Decoding:
    """The rounds of :func:`decode`, one after the other, as they happen.

    An iterator of :class:`Round` whose ``result()`` is what there is so far; to stop, ask for no
    more.

    The first token of an answer is the target's own and belongs to no round: it stands before the
    first round's tokens.

    Args:
        target, drafter, prompts: see :func:`decode`.
        domains: of the prompts, for the tables.
        temperature: 0 (the default) takes the likeliest token.
        top_p: draw from the smallest set of likeliest tokens that holds so much probability.
        max_new_tokens: of each answer.
        threshold: verify up to the first slot whose confidence is below.
        scheduler: given the confidences ``[batch, slot]``, returns how many slots to verify of each
            row. The output stays the target's own as long as it decides whether slot k is verified
            from what is known before x_k is drawn: the confidences up to slot k, of any row, and
            smaller ones alone later.
        draft_length: draft at most so many slots of a block.
        temperatures: of the confidences, one for each slot, as calibration finds them
            (``SequentialTemperatures.temperatures``); threshold, scheduler and trace get what they
            give.
        batch_size: prompts decoded together; by default all, or one where the target's attention
            cannot tell rows of unequal length apart.
        end_ids: tokens that end an answer; by default the tokenizer's and the model's own.
        seed: of the draws; those of a prompt do not depend on the other prompts.
        chance: where draws come from instead.

    Raises:
        TypeError, ValueError: a drafter of another vocabulary or other context than the target's,
            a setting out of range, an empty prompt, or one that with its answer is too long for the
            model, ``domains`` of another length, a threshold or scheduler without a drafter that
            has a confidence head.
    """
    return Decoding(target, drafter, prompts, **options)


def distribution(
    logits: Float[Tensor, "*axes vocab"], temperature: float, top_p: float = 1.0
) -> Float[Tensor, "*axes vocab"]:
    """Probabilities, in fp32 at least: the softmax at a temperature, then top-p.

    Temperature 0 puts everything on the likeliest token, the first of several. Top-p keeps the
    smallest set of likeliest tokens whose probabilities sum to at least ``top_p``.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return torch.zeros_like(wide).scatter_(-1, wide.argmax(dim=-1, keepdim=True), 1)
    probs = (wide / temperature).softmax(dim=-1)
    if top_p < 1:
        values, order = probs.sort(dim=-1, descending=True)
        values[values.cumsum(dim=-1) - values >= top_p] = 0
        probs = torch.zeros_like(probs).scatter_(-1, order, values)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def residual(
    target_probs: Float[Tensor, "*axes vocab"], draft_probs: Float[Tensor, "*axes vocab"]
) -> Float[Tensor, "*axes vocab"]:
    """What a rejected token is drawn from: max(0, p - q), normalised (Leviathan et al. 2022).

    Where p is q, no token is ever rejected, and p itself stands in.
    """
    rest = (target_probs - draft_probs).clamp(min=0)
    total = rest.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, rest / total, target_probs)


def encode_prompt(target: Target, prompt: Prompt) -> list[int]:
    """A prompt's tokens: a user message goes through the chat template where there is one.

    Raises:
        TypeError, ValueError: text for a target without a tokenizer, something that is neither text
            nor token ids, no token at all, or an id outside the vocabulary.
    """
    if isinstance(prompt, str):
        if target.tokenizer is None:
            raise ValueError(f"{target.name} has no tokenizer: a prompt must be token ids")
        if target.tokenizer.chat_template is None:
            encoding: Any = target.tokenizer(prompt)
        else:
            encoding = target.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_dict=True,
            )
        ids = list(encoding["input_ids"])
    elif isinstance(prompt, Tensor):
        ids = prompt.tolist()
    elif isinstance(prompt, Sequence):
        ids = list(prompt)
    else:
        raise TypeError(f"a prompt must be text or token ids, got {prompt!r}")
    if not ids:
        raise ValueError("a prompt must hold at least one token, got none")
    for token in ids:
        require_int("a prompt's token", token, 0)
    if max(ids) >= target.vocab_size:
        raise ValueError(f"a prompt's tokens must be < {target.vocab_size}, got {max(ids)}")
    return ids


def greedy_differences(
    target: Target, decoded: Decoded, plain: Decoded, prompts: Sequence[Prompt]
) -> pandas.DataFrame:
    """Where two greedy answers part, one row for each prompt whose answers do.

    ``position``: of the first token that differs, in the answer. ``margin``: by how much the
    target's best logit exceeds its second best there, in units of the rounding of the best in the
    target's dtype. Where that is a handful, the two are a tie that shapes of a matrix product
    decide.
    """
    import pandas as pd

    rows = []
    for index, (one, other) in enumerate(zip(decoded.tokens, plain.tokens, strict=True)):
        if one == other:
            continue
        same = min(len(one), len(other))
        place = next((i for i in range(same) if one[i] != other[i]), same)
        ids = encode_prompt(target, prompts[index]) + plain.tokens[index][:place]
        last = target.features(torch.tensor([ids]), [0]).last[0, -1]
        best, second = torch.mv(target.head_weight, last).topk(2).values.tolist()
        rounding = torch.finfo(target.dtype).eps * max(abs(best), abs(second))
        rows.append({"prompt": index, "position": place, "margin": (best - second) / rounding})
    return pd.DataFrame(rows, columns=["prompt", "position", "margin"])


@dataclass
class _Draft:
    """A block of each row: tokens ``[batch, slot]``, q ``[batch, slot, vocab]``, confidences."""

    tokens: Tensor
    probs: Tensor
    confidence: Tensor | None


@dataclass(eq=False)
class Decoding(Iterator[Round]):
    """A run of :func:`decode_rounds` and its state between rounds.

    Row r of every tensor is the prompt ``_going[r]``.
    """

    target: Target
    drafter: Drafter | None
    prompts: Sequence[Prompt]
    domains: Sequence[str] | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    threshold: float | None = None
    scheduler: Scheduler | None = None
    draft_length: int | None = None
    end_ids: Sequence[int] | None = None
    temperatures: Sequence[float] | None = None
    batch_size: int | None = None
    seed: int = 0
    chance: Chance | None = None

    def __post_init__(self) -> None:
        self._ids = self._check()
        count = len(self._ids)
        self._answers: list[list[int]] = [[] for _ in range(count)]
        self._shown = [""] * count
        self._numbers = [0] * count
        self._ends = _end_ids(self.target) if self.end_ids is None else set(self.end_ids)
        block_size = 0 if self.drafter is None else self.drafter.config.block_size
        self._chance: Chance = self.chance or Streams(count, self.seed, block_size)
        self._layers = [] if self.drafter is None else list(self.drafter.config.target_layer_ids)
        self._rows: list[dict[str, Any]] = []
        self._round_rows: list[dict[str, int]] = []
        self._clock = {"prompt": 0.0, "draft": 0.0, "verify": 0.0, "total": 0.0}
        self._rounds = self._decode()

    def __next__(self) -> Round:
        return next(self._rounds)

    def result(self) -> Decoded:
        """The answers, the trace and the rounds so far."""
        trace, rounds = self._tables()
        answers = [list(answer) for answer in self._answers]
        return Decoded(answers, list(map(self._text, answers)), trace, rounds, self.seconds)

    def _decode(self) -> Iterator[Round]:
        count = len(self._ids)
        step = self.batch_size or (count if self.target.decodes_batches else 1)
        for first in range(0, count, step):
            with torch.inference_mode():
                begin = now(self.target.device)
                self._read_prompts(list(range(first, min(first + step, count))))
                self._clock["prompt"] += now(self.target.device) - begin
            while self._going:
                with torch.inference_mode():
                    begin = now(self.target.device)
                    rounds = self._round()
                    self._clock["total"] += now(self.target.device) - begin
                yield from rounds

    def _text(self, tokens: Sequence[int]) -> str:
        if self.target.tokenizer is None:
            return ""
        return str(self.target.tokenizer.decode([t for t in tokens if t not in self._ends]))

    @property
    def seconds(self) -> dict[str, float]:
        """Those of :class:`Decoded`, so far."""
        clock = self._clock
        parts = {name: clock[name] for name in ("prompt", "draft", "verify")}
        return parts | {"rest": clock["total"] - clock["draft"] - clock["verify"]}

    def _tables(self) -> tuple[pandas.DataFrame, pandas.DataFrame]:
        """The trace and the rounds, by prompt and round."""
        import pandas as pd

        counts = ["prompt", "round", "drafted", "verified", "accepted", "tokens"]
        rounds = pd.DataFrame(self._round_rows, columns=counts)
        columns = [name for name in TRACE_COLUMNS if name != "domain"]
        trace = pd.DataFrame(self._rows, columns=columns)
        domains = ["none"] * len(self._ids) if self.domains is None else self.domains
        for table in (rounds, trace):
            table.insert(1, "domain", table["prompt"].map(dict(enumerate(domains))))
        trace = trace.astype(TRACE_COLUMNS)
        trace = trace.sort_values(["prompt", "round", "slot"], ignore_index=True)
        return trace, rounds.sort_values(["prompt", "round"], ignore_index=True)

    def _read_prompts(self, prompts: list[int]) -> None:
        """The target and the drafter read a batch of prompts, and the target draws a token."""
        self._going = prompts
        self._cache = self.target.start_cache(len(prompts))
        self._context = None if self.drafter is None else self.drafter.start_cache(len(prompts))
        lengths = [len(self._ids[prompt]) for prompt in prompts]
        rows = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            rows[row, : lengths[row]] = torch.tensor(self._ids[prompt])
        features = self.target.advance(rows.to(self.target.device), self._cache, self._layers)
        self._cache.commit(lengths)
        if self.drafter is not None and self._context is not None:
            self.drafter.read(self._to_drafter(features.context), self._context, lengths)
        last = torch.tensor(lengths, device=self.target.device) - 1
        states = features.last[torch.arange(len(lengths), device=last.device), last]
        self._anchors = self._chance.owns(self._target_probs(states), self._going)
        ended = []
        for prompt, token in zip(prompts, self._anchors.tolist(), strict=True):
            self._answers[prompt].append(token)
            ended.append(self._over(self._answers[prompt]))
        if any(ended):
            kept = [row for row, over in enumerate(ended) if not over]
            self._cache.commit([0] * len(lengths), kept)
            if self._context is not None:
                self._context.keep(kept)
            self._going, self._anchors = [prompts[row] for row in kept], self._anchors[kept]

    def _round(self) -> list[Round]:
        # A round yields one token at least beside the accepted ones.
        limits = [self.max_new_tokens - len(self._answers[prompt]) - 1 for prompt in self._going]
        begin = now(self.target.device)
        draft = self._draft(max(limits))
        slots = draft.tokens.shape[1]
        drafted = [min(limit, slots) for limit in limits]
        lengths = self._lengths(draft, drafted)
        self._clock["draft"] += now(self.target.device) - begin

        begin = now(self.target.device)
        most = max(lengths)
        asked = torch.cat([self._anchors.unsqueeze(1), draft.tokens[:, :most]], dim=1)
        features = self.target.advance(asked, self._cache, self._layers)
        p = self._target_probs(features.last)
        self._clock["verify"] += now(self.target.device) - begin

        q, tokens = draft.probs[:, :most], draft.tokens[:, :most].unsqueeze(2)
        draft_prob = draft.probs.gather(2, draft.tokens.unsqueeze(2)).squeeze(2)
        target_prob = p[:, :most].gather(2, tokens).squeeze(2)
        accept_prob = (target_prob / draft_prob[:, :most]).clamp(max=1)
        # A sum of probabilities may end a rounding above 1.
        accept_rate = torch.minimum(p[:, :most], q).sum(dim=2).clamp(max=1)
        length = torch.tensor(lengths, device=p.device)
        asked_about = torch.arange(most, device=p.device) < length.unsqueeze(1)
        lucky = self._chance.accepts(accept_prob, self._going) & asked_about
        accepted = lucky.cumprod(dim=1).sum(dim=1)
        row = torch.arange(len(p), device=p.device)
        # A slot that the target was not asked about is not taken off what comes in its place.
        refused = torch.cat([q, torch.zeros_like(p[:, :1])], dim=1)[row, accepted]
        refused = refused * (accepted < length).unsqueeze(1)
        own = self._chance.owns(residual(p[row, accepted], refused), self._going)
        return self._settle(
            draft,
            drafted,
            lengths,
            accepted.tolist(),
            own,
            p,
            {
                "draft_prob": draft_prob.tolist(),
                "target_prob": target_prob.tolist(),
                "accept_prob": accept_prob.tolist(),
                "accept_rate": accept_rate.tolist(),
            },
            features.context,
        )

    def _settle(
        self,
        draft: _Draft,
        drafted: list[int],
        lengths: list[int],
        accepted: list[int],
        own: Tensor,
        p: Tensor,
        values: dict[str, list[list[float]]],
        context: Tensor,
    ) -> list[Round]:
        """Answers grow, rows that are over leave, both caches keep what was accepted."""
        rounds, kept = [], []
        block = draft.tokens.tolist()
        confidence = None if draft.confidence is None else draft.confidence.tolist()
        for row, (prompt, token) in enumerate(zip(self._going, own.tolist(), strict=True)):
            answer, count = self._answers[prompt], accepted[row]
            new = [*block[row][:count], token]
            end = next((i for i, t in enumerate(new) if t in self._ends), len(new) - 1)
            new = new[: end + 1]
            # Behind an end of turn nothing counts.
            verified = lengths[row] if end == count else end + 1
            count = min(count, verified)
            for slot in range(drafted[row]):
                asked = slot < verified
                entry: dict[str, Any] = {
                    name: value[row][slot] if asked or name == "draft_prob" else float("nan")
                    for name, value in values.items()
                }
                entry |= {
                    "prompt": prompt,
                    "round": self._numbers[prompt],
                    "slot": slot,
                    "position": len(answer) + slot,
                    "token": block[row][slot],
                    "confidence": float("nan") if confidence is None else confidence[row][slot],
                    "verified": asked,
                    "accepted": slot < count,
                    "resampled": token if slot == count and asked else None,
                }
                self._rows.append(entry)
            self._round_rows.append(
                {
                    "prompt": prompt,
                    "round": self._numbers[prompt],
                    "drafted": drafted[row],
                    "verified": verified,
                    "accepted": count,
                    "tokens": len(new),
                }
            )
            answer += new
            rounds.append(
                Round(
                    prompt=prompt,
                    number=self._numbers[prompt],
                    tokens=new,
                    text=self._new_text(prompt),
                    drafted=block[row][: drafted[row]],
                    verified=verified,
                    accepted=count,
                    draft_probs=draft.probs[row, : drafted[row]],
                    target_probs=p[row, : verified + 1],
                    confidence=(
                        None if draft.confidence is None else draft.confidence[row, : drafted[row]]
                    ),
                )
            )
            self._numbers[prompt] += 1
            if not self._over(answer):
                kept.append(row)
        # The anchor was read, and so was every accepted token; the target's own comes next.
        counts = [count + 1 for count in accepted]
        self._cache.commit(counts, kept)
        self._going = [self._going[row] for row in kept]
        self._anchors = own[kept]
        if self.drafter is not None and self._context is not None and kept:
            self._context.keep(kept)
            most = max(counts[row] for row in kept)
            new_context = self._to_drafter(context[kept, :most])
            self.drafter.read(new_context, self._context, [counts[row] for row in kept])
        return rounds

    def _draft(self, limit: int) -> _Draft:
        anchors = self._anchors
        if self.drafter is None or self._context is None or limit == 0:
            nothing = anchors.new_empty(len(anchors), 0)
            none = self.target.head_weight.new_empty(len(anchors), 0, self.target.vocab_size)
            return _Draft(nothing, none.to(torch.promote_types(none.dtype, torch.float32)), None)
        drafter, markov = self.drafter, self.drafter.markov_head
        previous = anchors.to(drafter.fc.weight.device)
        states = drafter.draft(previous, self._context)[:, : self.draft_length]
        state = None
        tokens, probs, embeddings = [], [], []
        for hidden, logits in zip(states.unbind(1), drafter.lm_head(states).unbind(1), strict=True):
            if markov is not None:
                embeddings.append(markov.embed(previous))
                state, latent = markov.step(state, embeddings[-1], hidden)
                logits = logits + markov.markov_w2(latent)
            q = distribution(logits, self.temperature, self.top_p).to(self.target.device)
            token = self._chance.drafts(q, self._going)
            previous = token.to(previous.device)
            tokens.append(token)
            probs.append(q)
        before = torch.stack(embeddings, dim=1) if embeddings else None
        confidence = drafter.confidence(states, before)
        if confidence is not None:
            confidence = confidence.float().to(self.target.device)
            if self.temperatures is not None:
                confidence /= confidence.new_tensor(self.temperatures[: states.shape[1]])
            confidence = confidence.sigmoid()
        return _Draft(torch.stack(tokens, dim=1), torch.stack(probs, dim=1), confidence)

    def _lengths(self, draft: _Draft, drafted: list[int]) -> list[int]:
        """How many slots of each row the target is asked about."""
        chosen = drafted
        if draft.confidence is not None and self.threshold is not None:
            sure = (draft.confidence >= self.threshold).cumprod(dim=1).sum(dim=1)
            chosen = [min(a, b) for a, b in zip(chosen, sure.tolist(), strict=True)]
        if draft.confidence is not None and self.scheduler is not None:
            wanted = torch.as_tensor(self.scheduler(draft.confidence))
            if wanted.shape != (len(chosen),) or wanted.is_floating_point() or (wanted < 0).any():
                raise ValueError(
                    f"scheduler must return {len(chosen)} whole numbers of slots, at least 0, "
                    f"got {wanted.tolist()}"
                )
            chosen = [min(a, int(b)) for a, b in zip(chosen, wanted.tolist(), strict=True)]
        return chosen

    def _target_probs(self, states: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(states, self.target.head_weight)
        return distribution(logits, self.temperature, self.top_p)

    def _to_drafter(self, context: Tensor) -> Tensor:
        assert self.drafter is not None
        return context.to(self.drafter.fc.weight.device)

    def _over(self, answer: list[int]) -> bool:
        return answer[-1] in self._ends or len(answer) >= self.max_new_tokens

    def _new_text(self, prompt: int) -> str:
        """The text since the last call, up to the last whole character."""
        text = self._text(self._answers[prompt])
        if text.endswith("\ufffd") and not self._over(self._answers[prompt]):
            return ""
        shown, self._shown[prompt] = self._shown[prompt], text
        return text[len(shown) :]

    def _check(self) -> list[list[int]]:
        _require_numbers(self.temperature, self.top_p, self.threshold)
        require_int("max_new_tokens", self.max_new_tokens, 1)
        require_int("seed", self.seed, 0)
        if isinstance(self.prompts, str) or len(self.prompts) == 0:
            raise ValueError(f"prompts must be a list with at least one, got {self.prompts!r}")
        if self.domains is not None and len(self.domains) != len(self.prompts):
            raise ValueError(
                f"domains must be one for each of {len(self.prompts)} prompts, "
                f"got {len(self.domains)}"
            )
        ids = [encode_prompt(self.target, prompt) for prompt in self.prompts]
        limit = self.target.model.config.get_text_config().max_position_embeddings
        longest = max(map(len, ids)) + self.max_new_tokens
        if longest > limit:
            raise ValueError(
                f"a prompt and its answer must have at most {limit} tokens "
                f"(max_position_embeddings), got up to {longest}"
            )
        if self.batch_size is not None:
            require_int("batch_size", self.batch_size, 1)
        if self.drafter is None:
            for name in ("threshold", "scheduler", "draft_length", "temperatures"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs a drafter, got none")
            return ids
        c = self.drafter.config
        if self.draft_length is not None:
            require_int("draft_length", self.draft_length, 1)
            if self.draft_length > c.block_size:
                raise ValueError(
                    f"draft_length must be at most block_size, {c.block_size}, "
                    f"got {self.draft_length}"
                )
        if c.vocab_size != self.target.vocab_size:
            raise ValueError(
                f"drafter and target must share a vocabulary, got {c.vocab_size} and "
                f"{self.target.vocab_size} tokens"
            )
        width = len(c.target_layer_ids) * self.target.hidden_size
        if c.context_size != width or max(c.target_layer_ids) >= self.target.num_layers:
            raise ValueError(
                f"drafter must read layers {list(c.target_layer_ids)} as {c.context_size} numbers, "
                f"got a target with {self.target.num_layers} layers of {self.target.hidden_size}"
            )
        asked = (self.threshold, self.scheduler, self.temperatures)
        if not c.enable_confidence_head and asked != (None, None, None):
            raise ValueError(
                "threshold, scheduler and temperatures need a drafter with a confidence head"
            )
        _require_temperatures(self.temperatures, self.draft_length or c.block_size)
        return ids


def _require_numbers(temperature: float, top_p: float, threshold: float | None) -> None:
    require_number("temperature", temperature)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")
    require_number("top_p", top_p)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if threshold is not None:
        require_number("threshold", threshold)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")


def _require_temperatures(temperatures: Sequence[float] | None, slots: int) -> None:
    if temperatures is None:
        return
    if len(temperatures) < slots:
        raise ValueError(
            f"temperatures must be one for each of {slots} slots, got {len(temperatures)}"
        )
    for value in temperatures:
        require_number("each of temperatures", value)
        if not 0 < value < float("inf"):
            raise ValueError(f"each of temperatures must be a finite number > 0, got {value}")


def _end_ids(target: Target) -> set[int]:
    """What ends an answer: the tokenizer's eos token, and those of the model's own settings."""
    found: list[Any] = [getattr(target.tokenizer, "eos_token_id", None)]
    for source in (target.model.config, getattr(target.model, "generation_config", None)):
        ids = getattr(source, "eos_token_id", None)
        found += ids if isinstance(ids, list) else [ids]
    return {token for token in found if token is not None}
