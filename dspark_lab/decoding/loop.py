"""Lossless speculative decoding, and a trace of every round.

    prompt -> the target reads it and draws the first anchor -> rounds, until the turn ends

A round (Leviathan et al. 2022, arXiv 2211.17192, algorithm 1; DSpark, section 3):

    draft:   the drafter's backbone runs once for a block behind the anchor; slot k's token x_k is
             drawn from q_k, which depends on the tokens drawn before it through the Markov head;
    length:  a threshold or a scheduler says how many slots the target verifies;
    read:    the target reads the anchor and those slots at once, which gives p_0, ..., p_length;
    verify:  a prefix of the tokens is accepted, and the target's own token behind it is the next
             anchor, see :mod:`dspark_lab.decoding.verification`;
    commit:  the caches keep the anchor and the accepted tokens.

p and q are both at the decoding temperature, top-p applied; temperature 0 is greedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dspark_lab.checks import Count, NonNegative, NotEmpty, Positive, Share, Size, checked
from dspark_lab.decoding.random_numbers import RandomNumbers
from dspark_lab.decoding.record import Block, Clock, Decoded, Record, Round
from dspark_lab.decoding.settings import Scheduler, Settings, confident_prefix, scheduled
from dspark_lab.decoding.text import Prompt, encode_prompt, end_tokens, require_tokens
from dspark_lab.decoding.verification import (
    TopP,
    Verdict,
    distribution,
    draw,
    top_and_margin,
    verify,
)
from dspark_lab.files import upload
from dspark_lab.model import BlockDrafter, Target


def decode(
    target: Target,
    drafter: BlockDrafter | None,
    prompts: Sequence[Prompt],
    *,
    domains: Sequence[str] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    threshold: float | None = None,
    scheduler: Scheduler | None = None,
    draft_length: int | None = None,
    confidence_temperatures: Sequence[float] | None = None,
    batch_size: int | None = None,
    end_ids: Sequence[int] | None = None,
    seed: int = 0,
    random_numbers: RandomNumbers | None = None,
    on_round: Callable[[Round], None] | None = None,
) -> Decoded:
    """Answer the prompts, all in one batch, as the target alone would.

    Args:
        drafter: None for plain decoding with a cache.
        prompts: user messages, or token ids.
        temperature: 0 takes the likeliest token.
        top_p: draw from the smallest set of likeliest tokens that holds so much probability.
        threshold: verify up to the first slot whose confidence is below. On a GPU the target still
            reads the whole block, since the host would have to wait to know the length.
        scheduler: returns how many slots to verify of each row; slots that do not fit into the
            answer have confidence 0. The output stays the target's own as long as it decides
            whether slot k is verified from what is known before x_k is drawn: the confidences up to
            slot k, of any row, and smaller ones alone later.
        max_new_tokens, draft_length: of an answer, and of a round's block (by default a whole one).
        confidence_temperatures: as in ``SequentialTemperatures.temperatures``; threshold, scheduler
            and trace get the calibrated confidences.
        batch_size: by default all prompts, or one where the target's attention cannot tell rows of
            unequal length apart.
        end_ids: tokens that end an answer; by default the tokenizer's and the model's own.
        on_round: called with each round as soon as it is over, for text that streams.
    """
    arguments = {name: value for name, value in locals().items() if name != "on_round"}
    decoding = decode_rounds(**arguments)
    for round_ in decoding:
        if on_round is not None:
            on_round(round_)
    return decoding.result()


@checked
def decode_rounds(
    target: Target,
    drafter: BlockDrafter | None,
    prompts: Annotated[Sequence[Prompt], NotEmpty()],
    *,
    domains: Sequence[str] | None = None,
    temperature: NonNegative = 0.0,
    top_p: TopP = 1.0,
    max_new_tokens: Count = 256,
    threshold: Share | None = None,
    scheduler: Scheduler | None = None,
    draft_length: Count | None = None,
    confidence_temperatures: Sequence[Positive] | None = None,
    batch_size: Count | None = None,
    end_ids: Sequence[int] | None = None,
    seed: Size = 0,
    random_numbers: RandomNumbers | None = None,
) -> Decoding:
    """Return the rounds of :func:`decode` one after the other, as they happen; arguments as there.

    The first token of an answer is the target's own and belongs to no round.
    """
    settings = Settings(
        temperature, top_p, threshold, scheduler, draft_length, confidence_temperatures
    )
    settings.check_models(target, drafter)
    if end_ids is not None:
        require_tokens("each of end_ids", end_ids, target.vocab_size)
    ids = [encode_prompt(target, prompt) for prompt in prompts]
    target.require_room("a prompt and its answer", max(map(len, ids)) + max_new_tokens)
    if domains is not None and len(domains) != len(ids):
        raise ValueError(f"domains must be one for each of {len(ids)} prompts, got {len(domains)}")
    if random_numbers is None:
        slots = 0 if drafter is None else drafter.config.predicted
        random_numbers = RandomNumbers(len(ids), seed, slots)
    ends = end_tokens(target) if end_ids is None else set(end_ids)
    record = Record(target, domains or ["none"] * len(ids), ends, max_new_tokens)
    together = batch_size or (len(ids) if target.decodes_batches else 1)
    return Decoding(target, drafter, ids, settings, random_numbers, record, together)


@checked
class Decoding(Iterator[Round]):
    """A run of :func:`decode_rounds`. Row r of every tensor is the prompt ``_going[r]``."""

    def __init__(
        self,
        target: Target,
        drafter: BlockDrafter | None,
        ids: list[list[int]],
        settings: Settings,
        random_numbers: RandomNumbers,
        record: Record,
        batch_size: int,
    ) -> None:
        self.target, self.drafter, self.settings = target, drafter, settings
        self._ids, self._random = ids, random_numbers
        self._record, self._batch_size = record, batch_size
        self._layers = [] if drafter is None else list(drafter.config.target_layer_ids)
        self._clock = Clock(target.device)
        given = settings.confidence_temperatures
        self._temperatures = None
        if given is not None:
            self._temperatures = torch.tensor(given, dtype=torch.float32, device=target.device)
        self._rounds = self._run()

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of :class:`Decoded` so far."""
        return self._clock.seconds

    def __next__(self) -> Round:
        return next(self._rounds)

    def result(self) -> Decoded:
        """Return what there is so far."""
        return self._record.result(self.seconds)

    def _run(self) -> Iterator[Round]:
        every = range(len(self._ids))
        for first in every[:: self._batch_size]:
            with torch.inference_mode(), self._clock("prompt"):
                self._read_prompts(list(every[first : first + self._batch_size]))
            while self._going:
                with torch.inference_mode(), self._clock("rest"):
                    rounds = self._round()
                yield from rounds

    def _round(self) -> list[Round]:
        """One round of every row: draft, length, read, verify, commit."""
        device = self.target.device
        room = [self._record.room(prompt) for prompt in self._going]
        with self._clock("draft"):
            block = self._draft(room)
            most = block.tokens.shape[1]
            room = [min(slots, most) for slots in room]
            lengths = self._lengths(block.confidence, room)
        with self._clock("verify"):
            # A GPU is not asked: there the target reads all that there is room for.
            longest = int(lengths.max()) if lengths.device.type == "cpu" else max(room)
            read = torch.cat([self._anchors.unsqueeze(1), block.tokens[:, :longest]], dim=1)
            features = self.target.advance(read, self._cache, self._layers)
            p = self._distribution(features.last)
        lengths = upload(lengths, device)
        verdict = verify(
            p,
            block.probs,
            block.tokens,
            lengths,
            upload(self._random.accept(self._going)[:, :most], device),
            upload(self._random.target(self._going), device),
        )
        rounds, accepted = self._record.add(self._going, block, room, lengths, verdict, p)
        self._commit(verdict, accepted, features.context)
        return rounds

    def _draft(self, room: Sequence[int]) -> Block:
        """A block of each row; one without slots where no answer has room for a drafted token."""
        drafter, settings, device = self.drafter, self.settings, self.target.device
        if drafter is None or not any(room):
            nothing = self.target.head_weight.new_empty(len(room), 0, self.target.hidden_size)
            tokens, none = self._anchors.new_empty(len(room), 0), nothing.new_empty(len(room), 0, 2)
            return Block(tokens, self._distribution(nothing), none, None)
        probs: list[Tensor] = []
        sureness: list[Tensor] = []

        def choose(logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
            q = distribution(logits, settings.temperature, settings.top_p).to(device)
            probs.append(q)
            sureness.append(top_and_margin(logits).to(device))
            return draw(q, upload(self._random.draft(self._going), device))

        proposal = drafter.propose(self._anchors, self._context, choose, settings.draft_length)
        confidence = proposal.confidence
        if confidence is not None:
            confidence = confidence.float().to(device)
            if self._temperatures is not None:
                confidence /= self._temperatures[: len(probs)]
            confidence = confidence.sigmoid()
        q, sure = (torch.stack(parts, dim=1) for parts in (probs, sureness))
        return Block(proposal.tokens, q, sure, confidence)

    def _lengths(
        self, confidence: Float[Tensor, "batch slot"] | None, room: Sequence[int]
    ) -> Int[Tensor, " batch"]:
        """How many slots of each row to verify, where the answer is at hand without waiting."""
        lengths, settings = torch.tensor(room), self.settings
        if confidence is not None and settings.threshold is not None:
            sure = confident_prefix(confidence, settings.threshold)
            lengths = upload(lengths, sure.device).minimum(sure)
        if confidence is not None and settings.scheduler is not None:
            # It is the caller's own, and decides on the host.
            wanted = scheduled(settings.scheduler, confidence, torch.tensor(room))
            lengths = lengths.cpu().minimum(wanted)
        return lengths

    def _distribution(self, states: Float[Tensor, "*axes hidden"]) -> Float[Tensor, "*axes vocab"]:
        return distribution(
            self.target.logits(states), self.settings.temperature, self.settings.top_p
        )

    def _read_prompts(self, prompts: list[int]) -> None:
        """Read a batch of prompts, and draw the first token of each answer."""
        self._going = prompts
        ids = [torch.tensor(self._ids[prompt]) for prompt in prompts]
        lengths = [len(row) for row in ids]
        # A row's tokens, and those that a last round may try and not keep.
        block_size = 0 if self.drafter is None else self.drafter.config.block_size
        capacity = max(lengths) + self._record.max_new_tokens + block_size + 1
        self._cache = self.target.start_cache(len(prompts), capacity)
        rows = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        rows = upload(rows, self.target.device)
        features = self.target.advance(rows, self._cache, self._layers)
        self._cache.commit(lengths)
        if self.drafter is not None:
            self._context = self.drafter.start_cache(len(prompts), capacity)
            self._read_context(features.context, lengths)
        row = torch.arange(len(lengths), device=rows.device)
        last = features.last[row, upload(torch.tensor(lengths), rows.device) - 1]
        numbers = upload(self._random.target(prompts), rows.device)
        self._anchors = draw(self._distribution(last), numbers)
        self._record.begin(prompts, self._anchors.tolist())
        self._keep_going([0] * len(prompts))

    def _commit(
        self, verdict: Verdict, accepted: list[int], context: Float[Tensor, "batch read features"]
    ) -> None:
        """Both caches keep the anchor and the accepted tokens; answers that are over leave."""
        counts = [count + 1 for count in accepted]
        self._anchors = verdict.next_token
        before = len(counts)
        kept = self._keep_going(counts)
        if kept:
            counts = [counts[row] for row in kept]
            context = context[:, : max(counts)]
            if len(kept) < before:
                context = context[upload(torch.tensor(kept), context.device)]
            self._read_context(context, counts)

    def _keep_going(self, counts: list[int]) -> list[int]:
        """The rows that go on. The target's cache keeps ``counts`` of each row's last tokens."""
        kept = [row for row, prompt in enumerate(self._going) if not self._record.is_over(prompt)]
        self._cache.commit(counts, kept)
        if len(kept) < len(self._going):
            if self.drafter is not None:
                self._context.keep(kept)
            self._going = [self._going[row] for row in kept]
            rows = torch.tensor(kept, dtype=torch.long)
            self._anchors = self._anchors[upload(rows, self._anchors.device)]
        return kept

    def _read_context(
        self, context: Float[Tensor, "batch new features"], counts: list[int]
    ) -> None:
        if self.drafter is not None:
            self.drafter.read(context.to(self.drafter.device), self._context, counts)
