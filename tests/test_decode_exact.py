"""Decoding changes nothing: every way that chance can fall, weighed, against the target by itself.

Where `decode` would draw, an `Enumerator` gives every choice in turn: the weight of an answer's
paths is its probability, without sampling error. It should be that of transformers' model alone: a
full forward for every token, no cache. Vocabularies of two to four tokens, models in float64.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from dspark_lab.decoding import (
    RandomNumbers,
    Round,
    decode,
    distribution,
    loop,
    residual,
    verification,
)
from dspark_lab.model import Drafter, Target
from dspark_lab.serving import StepsPerSecond, prefix_scheduler
from tests.samples import tiny_drafter, tiny_target

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = ["vanilla", "gated", "rnn", "none"]
PROMPT = [0, 1, 1, 0]
SAMPLED = {"temperature": 1.0, "max_new_tokens": 4, "end_ids": []}
Answer = tuple[int, ...]
Place = tuple[int, int, str, int]


@dataclass(frozen=True)
class Path:
    """What came out at each place where something was drawn, and how likely all of it was.

    A place is the prompt, the round, the kind of choice and the slot, so that it is the same one
    whatever else happens in the batch.
    """

    choices: dict[Place, int]
    weight: float


class Enumerator(RandomNumbers):
    """Chooses instead of drawing: a path gives the choices, and where it ends, the first way.

    A path is of ``prompts`` rows. ``paths`` are those gone in the end, ``others`` turn off where
    one of these was the first to go on. A random number says whose it is: twice the prompt's
    number, plus one for the target's own token. `accepts` and `draw` replace the library's.
    """

    def __init__(self, paths: Sequence[Path], prompts: int) -> None:
        self.paths, self._prompts = list(paths), prompts
        self._rounds, self._drafts = Counter[int](), Counter[int]()
        self.others: list[Path] = []

    def draft(self, prompts: Sequence[int]) -> Tensor:
        return 2 * torch.tensor(prompts).double()

    def accept(self, prompts: Sequence[int]) -> Tensor:
        return self.draft(prompts).unsqueeze(1).expand(-1, 9)

    def target(self, prompts: Sequence[int]) -> Tensor:
        return self.draft(prompts) + 1

    def _choose(self, row: int, kind: str, slot: int, probs: Sequence[float]) -> int:
        n, prompt = divmod(row, self._prompts)
        path, place = self.paths[n], (prompt, self._rounds[row], kind, slot)
        if place not in path.choices:
            # What rounding leaves of nothing is nothing.
            ways = [
                Path(path.choices | {place: way}, path.weight * p)
                for way, p in enumerate(probs)
                if p > 1e-13
            ]
            self.paths[n], *others = ways
            self.others += others
        return self.paths[n].choices[place]

    def accepts(self, probs: Tensor, numbers: Tensor) -> Tensor:
        chosen = torch.zeros(probs.shape, dtype=torch.bool)
        for row, slots in enumerate(probs.tolist()):
            for slot, p in enumerate(slots):
                i = int(numbers[row, slot]) // 2
                chosen[row, slot] = bool(self._choose(i, "accept", slot, [1 - p, p]))
        return chosen

    def draw(self, probs: Tensor, numbers: Tensor) -> Tensor:
        chosen = []
        for number, p in zip(numbers.long().tolist(), probs.tolist(), strict=True):
            i, own = divmod(number, 2)
            if own:
                chosen.append(self._choose(i, "own", 0, p))
                self._rounds[i] += 1
                self._drafts[i] = 0
            else:
                self._drafts[i] += 1
                chosen.append(self._choose(i, "draft", self._drafts[i], p))
        return torch.tensor(chosen)


def enumerate_answers(
    target: Target, drafter: Drafter | None, *prompts: list[int], at_once: int = 600, **options: Any
) -> dict[tuple[Answer, ...], float]:
    """What each tuple of answers to the prompts weighs, over all paths, ``at_once`` in a batch."""
    found: dict[tuple[Answer, ...], float] = defaultdict(float)
    paths = [Path({}, 1.0)]
    while paths:
        now, paths = paths[-at_once:], paths[:-at_once]
        enumerator = Enumerator(now, len(prompts))
        with (
            mock.patch.object(verification, "accepts", enumerator.accepts),
            mock.patch.object(verification, "draw", enumerator.draw),
            mock.patch.object(loop, "draw", enumerator.draw),
        ):
            answers = decode(
                target, drafter, [*prompts] * len(now), random_numbers=enumerator, **options
            ).tokens
        for n, path in enumerate(enumerator.paths):
            rows = answers[n * len(prompts) : (n + 1) * len(prompts)]
            found[tuple(map(tuple, rows))] += path.weight
        paths += enumerator.others
    return found


def enumerate_rounds(*models_and_prompts: Any, **options: Any) -> tuple[dict, list[Round]]:
    """The same, and all rounds of all paths."""
    rounds: list[Round] = []
    return enumerate_answers(*models_and_prompts, on_round=rounds.append, **options), rounds


def own_answers(
    target: Target,
    *prompts: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    end_ids: Sequence[int] = (),
) -> dict[tuple[Answer, ...], float]:
    """The same from the target alone, one full forward a token, answer after answer."""
    each = []
    for prompt in prompts:
        going, over = {(): 1.0}, {}
        for _ in range(max_new_tokens):
            rows = torch.tensor([[*prompt, *answer] for answer in going])
            logits = target.model(rows, use_cache=False).logits[:, -1].tolist()
            grown = {
                (*answer, token): weight * p
                for (answer, weight), row in zip(going.items(), logits, strict=True)
                for token, p in enumerate(probabilities(row, temperature, top_p))
                if p > 0
            }
            over |= {answer: w for answer, w in grown.items() if answer[-1] in end_ids}
            going = {answer: w for answer, w in grown.items() if answer[-1] not in end_ids}
            if not going:
                break
        each.append(over | going)
    return {
        tuple(answer for answer, _ in one): math.prod(weight for _, weight in one)
        for one in product(*(answers.items() for answers in each))
    }


def probabilities(logits: Sequence[float], temperature: float, top_p: float) -> list[float]:
    """Softmax at a temperature; the likeliest tokens until they hold ``top_p``, scaled up to 1."""
    weights = [math.exp(x / temperature) for x in logits]
    probs = [w / sum(weights) for w in weights]
    kept: set[int] = set()
    for token in sorted(range(len(probs)), key=lambda token: -probs[token]):
        if sum(probs[t] for t in kept) < top_p:
            kept.add(token)
    mass = sum(probs[t] for t in kept)
    return [p / mass if token in kept else 0.0 for token, p in enumerate(probs)]


def distance(found: dict, expected: dict) -> float:
    """The largest difference of two distributions in any answer."""
    return max(abs(found.get(a, 0.0) - expected.get(a, 0.0)) for a in {*found, *expected})


def exact_target(vocab_size: int = 3, seed: int = 0, **options: Any) -> Target:
    """A tiny Llama in float64 throughout: the norm of transformers would round to float32."""
    target = tiny_target(seed, vocab_size, **options)
    target.model.double()
    for name, module in list(target.model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            size, eps = module.weight.shape, module.variance_epsilon
            target.model.set_submodule(name, torch.nn.RMSNorm(size, eps, dtype=torch.float64))
    return target


def exact_drafter(vocab_size: int = 3, head: str = "vanilla", seed: int = 1, **options) -> Drafter:
    """A tiny drafter in float64, random in every parameter, that knows nothing of the target."""
    options = {"block_size": 2, "confidence_head_with_markov": head != "none"} | options
    drafter = tiny_drafter(
        vocab_size=vocab_size, mask_token_id=vocab_size - 1, markov_head_type=head, **options
    ).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            norm = name.endswith(("norm.weight", "layernorm.weight"))
            parameter.copy_(norm + 0.4 * torch.randn(parameter.shape))
    return drafter


def undecided(target: Target, drafter: Drafter, *prompts: list[int], median: float) -> Drafter:
    """The drafter with a confidence head that varies, around ``median`` at the first slot."""
    rounds: list[Round] = []
    head = drafter.confidence_head.proj
    with torch.no_grad():
        head.weight.mul_(3)
    options = {"temperature": 2.0, "max_new_tokens": 4, "end_ids": []}
    decode(target, drafter, [*prompts] * 30, on_round=rounds.append, **options)
    logits = torch.stack([r.confidence[0] for r in rounds if r.number == 0]).double().logit()
    with torch.no_grad():
        head.bias.add_(math.log(median / (1 - median)) - logits.median())
    return drafter


# Steps a second of an imaginary engine that verifies no slot, one or two.
SPEEDS = StepsPerSecond(np.array([1, 2, 3]), np.array([1.0, 0.55, 0.5]), 0, "imaginary")
scheduler = prefix_scheduler(SPEEDS)


def early_stopping(confidence: Tensor) -> Tensor:
    """DSpark's prefix scheduler for rows that run alone: slots until one does not pay."""
    different, index = confidence.unique(dim=0, return_inverse=True)
    return torch.cat([scheduler(row) for row in different.split(1)])[index]


@pytest.mark.parametrize("head", HEADS)
def test_the_answers_are_distributed_as_the_targets_own(head):
    target, drafter = exact_target(), exact_drafter(head=head)
    found, rounds = enumerate_rounds(target, drafter, PROMPT, **SAMPLED)
    assert distance(found, own_answers(target, PROMPT, **SAMPLED)) < 1e-6
    assert len(found) == 3**4
    whole = {(r.verified, r.accepted) for r in rounds if len(r.drafted) == 2}
    assert whole == {(2, 0), (2, 1), (2, 2)}


RNN = exact_drafter(head="rnn", seed=4)
LONG = exact_drafter(2, "gated", block_size=3)
SETTINGS: list[tuple[int, Drafter | None, dict[str, Any]]] = [
    (3, RNN, {"temperature": 0.6}),
    (3, RNN, {"temperature": 1.7}),
    (3, RNN, {"top_p": 0.7}),
    (3, RNN, {"temperature": 1.4, "top_p": 0.9}),
    (3, RNN, {"end_ids": [0, 2], "temperature": 0.8}),
    (3, RNN, {"draft_length": 1}),
    (3, exact_drafter(head="rnn").float(), {"max_new_tokens": 3}),
    (3, None, {"temperature": 0.9, "end_ids": [2]}),
    *((4, exact_drafter(4), {"max_new_tokens": limit, "end_ids": [3]}) for limit in (1, 2, 3)),
    (2, LONG, {"max_new_tokens": 5, "end_ids": [0]}),
]


@pytest.mark.parametrize("vocab, drafter, options", SETTINGS)
def test_so_they_are_with_every_setting_and_drafter(vocab, drafter, options):
    target, settings = exact_target(vocab, seed=3), SAMPLED | options
    found, rounds = enumerate_rounds(target, drafter, PROMPT, **settings)
    settings.pop("draft_length", None)
    expected = own_answers(target, PROMPT, **settings)
    assert distance(found, expected) < 1e-6 and found.keys() == expected.keys()
    assert drafter is not LONG or 3 in {r.accepted for r in rounds}


def test_so_they_are_where_draft_and_target_are_one():
    """Nothing is ever rejected, so no residual is asked for that would be nothing."""
    target, drafter = exact_target(), exact_drafter(head="none")
    with torch.no_grad():
        target.head_weight.zero_()
        drafter.lm_head.weight.zero_()
    found, rounds = enumerate_rounds(target, drafter, PROMPT, **SAMPLED)
    assert distance(found, dict.fromkeys(own_answers(target, PROMPT, **SAMPLED), 3**-4)) < 1e-6
    assert all(r.accepted == r.verified for r in rounds)


@pytest.mark.parametrize("head, seed", [("vanilla", 8), ("gated", 5), ("rnn", 7), ("none", 6)])
@pytest.mark.parametrize(
    "options, median",
    [({"threshold": 0.5}, 0.5), ({"scheduler": early_stopping}, 0.85)],
    ids=["threshold", "scheduler"],
)
def test_a_threshold_or_the_early_stopping_scheduler_changes_nothing(options, median, head, seed):
    target = exact_target()
    drafter = undecided(target, exact_drafter(head=head, seed=seed), PROMPT, median=median)
    settings = SAMPLED | {"end_ids": [1]}
    found, rounds = enumerate_rounds(target, drafter, PROMPT, **settings, **options)
    assert distance(found, own_answers(target, PROMPT, **settings)) < 1e-6
    lengths = {r.verified for r in rounds if len(r.drafted) == 2 and 1 not in r.tokens}
    assert len(lengths) > 1, "the length must vary for this to say anything"


def test_a_scheduler_that_looks_at_later_confidences_is_not_lossless():
    """Why the early stop is in the contract; and that the enumeration sees what is not lossless."""
    target, drafter = exact_target(2), exact_drafter(2, seed=12)
    rounds: list[Round] = []
    decode(target, drafter, [PROMPT] * 50, on_round=rounds.append, **SAMPLED)
    median = torch.stack([r.confidence[1] for r in rounds if r.number == 0]).median()

    def looks_ahead(confidence: Tensor) -> Tensor:
        return 2 * (confidence[:, 1] > median)

    found = enumerate_answers(target, drafter, PROMPT, scheduler=looks_ahead, **SAMPLED)
    assert sum(found.values()) == pytest.approx(1)
    assert distance(found, own_answers(target, PROMPT, **SAMPLED)) > 1e-3


def test_rows_that_share_a_scheduler_are_still_independent():
    """Which of two rows is verified hangs on both; what either of them answers does not."""
    prompts = [PROMPT, [1]]
    target, drafter = exact_target(2), exact_drafter(2, seed=4)
    settings = SAMPLED | {"max_new_tokens": 3}
    seen = set()

    def the_surer_row(confidence: Tensor) -> Tensor:
        pairs = confidence.view(-1, len(prompts))
        first = pairs[:, 0] >= pairs[:, 1]
        seen.update(zip(pairs[:, 0].round(decimals=6).tolist(), first.tolist(), strict=True))
        return torch.stack([first, ~first], dim=1).flatten().long()

    options = {"scheduler": the_surer_row, "draft_length": 1}
    found = enumerate_answers(target, drafter, *prompts, **options, **settings)
    assert distance(found, own_answers(target, *prompts, **settings)) < 1e-6
    assert any((sure, True) in seen and (sure, False) in seen for sure, _ in seen), (
        "the other row must matter for this to say anything"
    )


def test_probabilities_at_temperature_zero_are_the_likeliest_token():
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, -1.0, 0.5]], dtype=torch.bfloat16)
    probs = distribution(logits, 0)
    assert probs.tolist() == [[0, 1, 0], [1, 0, 0]] and probs.dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.8, 1.0])
def test_probabilities_are_softmax_and_top_p(temperature, top_p):
    torch.manual_seed(0)
    logits = 2 * torch.randn(5, 4, 7, dtype=torch.float64)
    got = distribution(logits, temperature, top_p)
    for row, expected in zip(got.flatten(0, 1), logits.flatten(0, 1).tolist(), strict=True):
        assert row.tolist() == pytest.approx(probabilities(expected, temperature, top_p))


def test_top_p_keeps_the_smallest_set_that_holds_as_much():
    logits = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    assert distribution(logits, 1.0, 0.5).tolist() == [1, 0, 0]
    assert distribution(logits, 1.0, 0.51).count_nonzero() == 2


def test_the_residual_is_what_the_target_has_more_of():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.1, 0.9, 0.0]])
    q = torch.tensor([[0.2, 0.2, 0.6], [0.2, 0.3, 0.5], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.75, 0.25, 0.0], [0.2, 0.3, 0.5], [0.1, 0.9, 0.0]])
    torch.testing.assert_close(residual(p, q), expected)
