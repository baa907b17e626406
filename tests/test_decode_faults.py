"""The tests of decoding can fail: with a fault planted in it, each fault is seen.

A fault is a replacement in the source of `dspark_lab.decoding.loop`, which then runs as a module beside
the real one. None makes anything crash. What must see it is the enumeration of every answer, or,
where the answers stay right and only the draft gets worse, the training forward.
"""

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from test_decode import ALPHA, chance_of_draws, draft_error
from test_decode_exact import (
    PROMPT,
    distance,
    enumerate_answers,
    exact_drafter,
    exact_target,
    own_answers,
    undecided,
)

import dspark_lab.decoding.loop as lab
from dspark_lab.decoding import Decoded, Round
from dspark_lab.pairs import load_pair

pytestmark = pytest.mark.usefixtures("one_thread")

Decode = Callable[..., Decoded]

# What decode.py says, and what it says with the fault.
FAULTS = {
    "what is rejected is drawn from p": (
        "own = self._chance.owns(residual(p[row, accepted], refused), self._going)",
        "own = self._chance.owns(p[row, accepted], self._going)",
    ),
    "the residual is that of the next slot": (
        "residual(p[row, accepted], refused)",
        "residual(p[row, (accepted + 1).clamp(max=p.shape[1] - 1)], refused)",
    ),
    "the acceptance ratio is inverted": (
        "(target_prob / draft_prob[:, :most])",
        "(draft_prob[:, :most] / target_prob)",
    ),
    "every slot is accepted on its own": (
        "accepted = lucky.cumprod(dim=1).sum(dim=1)",
        "accepted = lucky.sum(dim=1)",
    ),
    "the bonus token is drawn one slot early": (
        "residual(p[row, accepted], refused)",
        "residual(p[row, (accepted - 1).clamp(min=0)], refused)",
    ),
    "the target keeps what was rejected": (
        "self._cache.commit(counts, kept)",
        "self._cache.commit([context.shape[1]] * len(counts), kept)",
    ),
    "the target forgets an accepted token": (
        "self._cache.commit(counts, kept)",
        "self._cache.commit([max(count - 1, 1) for count in counts], kept)",
    ),
    "a slot that was not verified is taken off": (
        "refused = refused * (accepted < length).unsqueeze(1)",
        "refused = torch.cat([draft.probs, torch.zeros_like(p[:, :1])], dim=1)[row, accepted]",
    ),
    "what was not verified is accepted": (
        "lucky = self._chance.accepts(accept_prob, self._going) & asked_about",
        "lucky = self._chance.accepts(accept_prob, self._going)",
    ),
    "the threshold reads the confidence behind the token": (
        "sure = (draft.confidence >= self.threshold)",
        "sure = (draft.confidence.roll(-1, dims=1) >= self.threshold)",
    ),
    "an end of turn ends nothing among the accepted": (
        "if t in self._ends), len(new) - 1)",
        "if t in self._ends and i == len(new) - 1), len(new) - 1)",
    ),
    "the drafter's probability is another's than the one it drew from": (
        "            probs.append(q)",
        "            probs.append(q.roll(1, dims=1))",
    ),
}
# The answers stay right with these.
DRAFT_FAULTS = {
    "the drafter's context is a token short": (
        "self.drafter.read(new_context, self._context, [counts[row] for row in kept])",
        "self.drafter.read(new_context, self._context, [counts[row] - 1 for row in kept])",
    ),
    "the drafter's context is that of the token before": (
        "counts = [count + 1 for count in accepted]",
        "counts = [count + 1 for count in accepted]; context = context.roll(1, dims=1)",
    ),
    "the Markov head reads the anchor again": (
        "previous = token.to(previous.device)",
        "token.to(previous.device)",
    ),
    "the drafter reads the prompt without its last token": (
        "self.drafter.read(self._to_drafter(features.context), self._context, lengths)",
        "self.drafter.read(self._to_drafter(features.context), self._context, "
        "[n - 1 for n in lengths])",
    ),
}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Decode]:
    """The `decode` of a copy of the module in which ``right`` reads ``wrong``."""

    def plant(right: str, wrong: str) -> Decode:
        source = Path(lab.__file__).read_text(encoding="utf-8")
        assert source.count(right) == 1, f"decode.py must hold this once: {right}"
        module = types.ModuleType("faulty_decode")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(source.replace(right, wrong), "faulty_decode.py", "exec"), module.__dict__)
        return module.decode

    return plant


def answers_differ(decode: Decode) -> bool:
    """Whether an answer's probability is off, in a run with a threshold or one without."""
    target = exact_target()
    drafter = undecided(target, exact_drafter(seed=8), PROMPT, median=0.5)
    settings = {"temperature": 1.0, "max_new_tokens": 4, "end_ids": [1]}
    expected = own_answers(target, PROMPT, **settings)
    runs = ({"threshold": 0.5}, {})
    return any(
        distance(
            enumerate_answers(target, drafter, PROMPT, decode=decode, **settings, **options),
            expected,
        )
        > 1e-6
        for options in runs
    )


def drafts_differ(decode: Decode) -> bool:
    """Whether q is off from what the training forward gives for the same tokens."""
    target, drafter, prompts = exact_target(5), exact_drafter(5), [[0, 3, 1], [2]]
    rounds: list[Round] = []
    decoded = decode(
        target, drafter, prompts, on_round=rounds.append, temperature=1.0, max_new_tokens=12
    )
    return draft_error(target, drafter, prompts, decoded, rounds) > 1e-9


def test_without_a_fault_nothing_differs(planted):
    right, _ = FAULTS["the acceptance ratio is inverted"]
    same = planted(right, right)
    assert not answers_differ(same) and not drafts_differ(same)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_decoding_changes_the_answers(fault, planted):
    assert answers_differ(planted(*FAULTS[fault]))


@pytest.mark.parametrize("fault", DRAFT_FAULTS)
def test_a_fault_in_drafting_changes_the_draft(fault, planted):
    assert drafts_differ(planted(*DRAFT_FAULTS[fault]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "what is rejected is drawn from p",
        "the acceptance ratio is inverted",
        "the bonus token is drawn one slot early",
        "the target keeps what was rejected",
    ],
)
def test_a_fault_in_decoding_is_seen_in_draws_of_the_pocket_pair(fault, planted):
    assert chance_of_draws(load_pair("pocket"), 40_000, planted(*FAULTS[fault])) < ALPHA
