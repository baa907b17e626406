"""The tests of decoding can fail: with a fault planted in it, each fault is seen.

None makes anything crash. What must see it is the enumeration of every answer, or, where the
answers stay right and only the draft gets worse, the training forward.
"""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from dspark_lab.model import Drafter, Proposal, Target, TargetCache
from dspark_lab.model.drafter import DraftCache
from dspark_lab.pairs import load_pair
from tests import faults
from tests.faults import Fault, Function, changed_result, plant
from tests.test_decode import ALPHA, chance_of_draws, draft_error, play
from tests.test_decode_exact import (
    PROMPT,
    SAMPLED,
    distance,
    enumerate_answers,
    exact_drafter,
    exact_target,
    own_answers,
    undecided,
)

pytestmark = pytest.mark.usefixtures("one_thread")

VERIFY = "decoding.verification:"


def forgets_an_accepted_token(
    commit: Function, cache: TargetCache, counts: list[int], kept: list[int] | None = None
) -> None:
    if kept is not None:
        counts = [count - (count > 1) for count in counts]
    commit(cache, counts, kept)


def reads_less(rounds: bool) -> Function:
    """Lacks the last token of a prompt, or of each round."""

    def wrong(read: Function, drafter: Drafter, context: Tensor, cache: DraftCache, counts) -> None:
        in_round = any(cache.rows.lengths)
        read(drafter, context, cache, [count - (in_round == rounds) for count in counts])

    return wrong


def reads_the_anchor_again(
    propose: Function, drafter: Drafter, anchor_ids: Tensor, cache: DraftCache, choose, length
) -> Proposal:
    chosen: list[Tensor] = []

    def choose_in_vain(logits: Tensor) -> Tensor:
        chosen.append(choose(logits))
        return anchor_ids

    proposal = propose(drafter, anchor_ids, cache, choose_in_vain, length)
    return replace(proposal, tokens=torch.stack(chosen, dim=1))


THRESHOLD = "the threshold reads the confidence behind the token"
CONTEXT = "the drafter's context is that of the token before"
SHARED = [
    "a rejected token is drawn from p",
    "the acceptance ratio is inverted",
    "the bonus token is drawn one slot early",
    "the target keeps what was rejected",
]
FAULTS = {name: faults.FAULTS[name] for name in [*SHARED, THRESHOLD]} | {
    "the residual is that of the next slot": Fault(
        VERIFY + "next_distribution",
        lambda right, p, *rest: right(torch.cat([p[:, 1:], p[:, -1:]], dim=1), *rest),
    ),
    "every slot is accepted on its own": Fault(
        VERIFY + "accepted_prefix",
        lambda right, accepted, lengths: right(
            accepted.sort(dim=1, descending=True).values, lengths
        ),
    ),
    "the target forgets an accepted token": Fault(
        "model.target:TargetCache.commit", forgets_an_accepted_token
    ),
    "a slot that was not verified is taken off": Fault(
        VERIFY + "next_distribution",
        lambda right, p, q, accepted, lengths: right(p, q, accepted, lengths + 1),
    ),
    "what was not verified is accepted": Fault(
        VERIFY + "accepted_prefix",
        lambda right, accepted, lengths: right(accepted, lengths + accepted.shape[1]),
    ),
    "an end of turn ends nothing among the accepted": Fault(
        "decoding.text:up_to_end", lambda right, tokens, ends: right(tokens, ())
    ),
    "the drafter's probability is another's than the one it drew from": Fault(
        "decoding.loop:Decoding._draft",
        changed_result(lambda block: replace(block, probs=block.probs.roll(1, dims=2))),
    ),
}
# The answers stay right with these.
DRAFT_FAULTS = {
    CONTEXT: faults.FAULTS[CONTEXT],
    "the drafter's context is a token short": Fault(
        "model.drafter:Drafter.read", reads_less(rounds=True)
    ),
    "the Markov head reads the anchor again": Fault(
        "model.drafter:Drafter.propose", reads_the_anchor_again
    ),
    "the drafter reads the prompt without its last token": Fault(
        "model.drafter:Drafter.read", reads_less(rounds=False)
    ),
}


@cache
def undecided_pair() -> tuple[Target, Drafter]:
    """A target and a drafter whose confidence varies, without a fault."""
    target = exact_target()
    return target, undecided(target, exact_drafter(seed=8), PROMPT, median=0.5)


def answers_differ() -> bool:
    """Whether an answer's probability is off, with a threshold or without; short ones first."""
    target, drafter = undecided_pair()
    for length, options in product((3, 4), ({"threshold": 0.5}, {})):
        settings = SAMPLED | {"end_ids": [1], "max_new_tokens": length}
        found = enumerate_answers(target, drafter, PROMPT, **settings, **options)
        if distance(found, own_answers(target, PROMPT, **settings)) > 1e-6:
            return True
    return False


def drafts_differ() -> bool:
    """Whether q is off from what the training forward gives for the same tokens."""
    target, drafter, prompts = exact_target(5), exact_drafter(5), [[0, 3, 1], [2]]
    decoded, rounds = play(target, drafter, prompts, temperature=1.0, max_new_tokens=12)
    return draft_error(target, drafter, prompts, decoded, rounds) > 1e-9


def test_without_a_fault_nothing_differs():
    assert not answers_differ() and not drafts_differ()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_decoding_changes_the_answers(name, monkeypatch):
    undecided_pair()
    plant(monkeypatch, FAULTS[name])
    assert answers_differ()


@pytest.mark.parametrize("name", DRAFT_FAULTS)
def test_a_fault_in_drafting_changes_the_draft(name, monkeypatch):
    plant(monkeypatch, DRAFT_FAULTS[name])
    assert drafts_differ()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_a_fault_in_decoding_is_seen_in_draws_of_the_pocket_pair(name, monkeypatch):
    plant(monkeypatch, FAULTS[name])
    assert chance_of_draws(load_pair("pocket"), 40_000) < ALPHA
