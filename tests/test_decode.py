"""What `decode` promises beside exactness: greedy answers, caches, the trace, streams, refusals.

The oracles are transformers' own `generate`, full forwards without any cache, the drafter's
training forward, and plain Python over the rounds. That the answers are distributed as the target's
own is enumerated in `test_decode_exact`; here it is sampled, with the draws that users get.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import chi2

from dspark_lab.decoding import (
    TRACE_COLUMNS,
    Decoded,
    Round,
    decode,
    decode_rounds,
    distribution,
    encode_prompt,
    greedy_differences,
    load_trace,
    save_trace,
)
from dspark_lab.decoding.record import Record
from dspark_lab.decoding.settings import scheduled
from dspark_lab.model import Drafter, Target
from dspark_lab.pairs import Pair, load_pair, question
from dspark_lab.serving import StepsPerSecond, prefix_scheduler
from tests.test_decode_exact import (
    HEADS,
    early_stopping,
    exact_drafter,
    exact_target,
    own_answers,
    undecided,
)
from tests.test_target import random_target

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 5
PROMPTS = [[0, 3, 1], [2], [4, 4, 1, 0, 2, 3, 1], [1, 0]]
END = 2
NO_CONFIDENCE = exact_drafter(
    VOCAB, enable_confidence_head=False, confidence_head_with_markov=False
)
SAMPLED = {"temperature": 1.0, "max_new_tokens": 12, "end_ids": [END]}


def named(value: object) -> str:
    """A parameter as a test's name: a function's address, which changes, is left out."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))[:60]


# The error rate of every test by chi-square.
ALPHA = 1e-4


@pytest.fixture(scope="module")
def pocket() -> Pair:
    return load_pair("pocket")


def play(
    target: Target, drafter: Drafter | None, prompts: Sequence[Any], **options: Any
) -> tuple[Decoded, list[Round]]:
    """The answers, and the rounds that made them."""
    rounds: list[Round] = []
    return decode(target, drafter, prompts, on_round=rounds.append, **options), rounds


def with_befores(decoded: Decoded, rounds: Sequence[Round]) -> list[tuple[Round, list[int]]]:
    """Each round, and the answer as it was before."""
    grown = {prompt: answer[:1] for prompt, answer in enumerate(decoded.tokens)}
    found = []
    for r in rounds:
        found.append((r, grown[r.prompt]))
        grown[r.prompt] = grown[r.prompt] + r.tokens
    assert grown == dict(enumerate(decoded.tokens)), "the rounds must add up to the answers"
    return found


def draft_error(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[list[int]],
    decoded: Decoded,
    rounds: Sequence[Round],
) -> float:
    """By how much q or a confidence differs from the training forward's, at temperature 1."""
    worst = 0.0
    for r, before in with_befores(decoded, rounds):
        if not r.drafted:
            continue
        known = [*prompts[r.prompt], *before]
        row = torch.tensor([known + r.drafted])
        output = drafter(
            row,
            target.features(row, drafter.config.target_layer_ids).context,
            torch.ones_like(row),
            anchor_positions=torch.tensor([[len(known) - 1]]),
            block_keep_mask=torch.tensor([[True]]),
        )
        q = output.draft_logits[0, 0, : len(r.drafted)].softmax(dim=-1)
        worst = max(worst, (q - r.draft_probs).abs().max().item())
        if r.confidence is not None:
            sure = output.confidence_pred[0, 0, : len(r.drafted)].float().sigmoid()
            # Confidences are in fp32.
            worst = max(worst, 1e-3 * (sure - r.confidence).abs().max().item())
    return worst


def generated(target: Target, prompt: list[int], length: int, end_ids: list[int]) -> list[int]:
    """The greedy answer of transformers."""
    target.model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    answer = target.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=end_ids or None,
        pad_token_id=0,
    )
    return answer[0, len(prompt) :].tolist()


@cache
def greedy_answers(*end_ids: int) -> list[list[int]]:
    """The greedy answers of transformers, which are those of plain decoding."""
    target = exact_target(VOCAB)
    answers = [generated(target, prompt, 20, list(end_ids)) for prompt in PROMPTS]
    plain = decode(target, None, PROMPTS, max_new_tokens=20, end_ids=end_ids)
    assert plain.tokens == answers
    return answers


@pytest.mark.parametrize(
    "end_ids, options",
    [([], {}), ([1], {}), ([], {"threshold": 0.5}), ([], {"scheduler": early_stopping})],
    ids=named,
)
@pytest.mark.parametrize("head", HEADS)
def test_greedy_answers_are_those_of_transformers(head, end_ids, options):
    target, drafter = exact_target(VOCAB), exact_drafter(VOCAB, head, block_size=3)
    if options:
        undecided(target, drafter, *PROMPTS, median=0.7)
    settings = {"max_new_tokens": 20, "end_ids": end_ids}
    decoded, rounds = play(target, drafter, PROMPTS, **settings, **options)
    assert decoded.tokens == greedy_answers(*end_ids)
    # Alone, too: each prompt with one of the heads.
    own = HEADS.index(head)
    alone = decode(target, drafter, PROMPTS[own : own + 1], **settings, **options)
    assert alone.tokens == decoded.tokens[own : own + 1]
    lengths, outcomes = {r.verified for r in rounds}, {r.accepted == r.verified for r in rounds}
    assert len(lengths) > 1 and (outcomes == {True, False} or end_ids), "both ways must occur"


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "windows"])
def test_greedy_answers_are_right_for_other_families_of_models(family):
    """A window of four tokens is decoded a row at a time; the others in a batch, too."""
    options = {"vocab_size": VOCAB, "tie_word_embeddings": False}
    target = random_target(family, torch.float64, **options)
    with torch.no_grad():
        for weight in target.model.parameters():
            # Else all that a random GPT-2 says is one token.
            weight.mul_(3 if weight.dim() == 2 else 1)
    drafter = exact_drafter(VOCAB, seed=2)
    batches = [PROMPTS] if family != "windows" else [[prompt] for prompt in PROMPTS]
    accepted, said = 0, set()
    for batch in batches:
        decoded = decode(target, drafter, batch, max_new_tokens=16, end_ids=[])
        assert decoded.tokens == [generated(target, prompt, 16, []) for prompt in batch]
        accepted += decoded.rounds["accepted"].sum()
        said.update(*decoded.tokens)
    assert accepted > 0 and len(said) > 2


def test_a_model_with_windows_decodes_its_prompts_one_by_one():
    target = random_target("windows", torch.float64, vocab_size=VOCAB)
    drafter = exact_drafter(VOCAB)
    assert not target.decodes_batches
    decoded = decode(target, drafter, PROMPTS, **SAMPLED)
    assert decoded.tokens == decode(target, drafter, PROMPTS, batch_size=1, **SAMPLED).tokens
    assert decoded.trace["prompt"].nunique() > 1
    with pytest.raises(ValueError, match="decodes one row at a time, got 2"):
        decode(target, drafter, PROMPTS, batch_size=2, **SAMPLED)


def test_the_summary_counts_all_rounds():
    decoded = decode(exact_target(VOCAB), exact_drafter(VOCAB), PROMPTS, **SAMPLED)
    rounds, summary = decoded.rounds, decoded.summary
    count, verified, accepted = len(rounds), sum(rounds["verified"]), sum(rounds["accepted"])
    figures = [sum(map(len, decoded.tokens)), count, sum(rounds["tokens"]) / count]
    figures += [verified / count, accepted / count, accepted / verified]
    assert summary.tolist() == pytest.approx(figures)
    names = ["tokens", "rounds", "tau", "verified", "accepted", "acceptance_rate"]
    assert list(summary.index) == names and decoded.tau == summary["tau"]
    plain = decode(exact_target(VOCAB), None, PROMPTS, **SAMPLED).summary
    assert plain["verified"] == 0 and math.isnan(plain["acceptance_rate"]) and plain["tau"] == 1


def test_temperatures_scale_the_confidences_that_threshold_and_trace_see():
    target, drafter = exact_target(VOCAB), exact_drafter(VOCAB)
    scales = [0.5, 3.0, 1.0, 2.0][: drafter.config.block_size]
    raw = decode(target, drafter, PROMPTS, **SAMPLED).trace
    scaled = decode(target, drafter, PROMPTS, confidence_temperatures=scales, **SAMPLED).trace
    assert scaled["token"].tolist() == raw["token"].tolist()
    odds = (1 / raw["confidence"] - 1) ** (1 / np.array(scales)[raw["slot"]])
    assert scaled["confidence"].tolist() == pytest.approx((1 / (1 + odds)).tolist(), abs=1e-6)
    options = {"confidence_temperatures": scales, "threshold": 0.5}
    cut = decode(target, drafter, PROMPTS, **options, **SAMPLED).trace
    sure = (cut["confidence"] >= 0.5).groupby([cut["prompt"], cut["round"]]).cummin()
    assert not cut["verified"][~sure].any() and cut["verified"].any()


def test_greedy_answers_of_the_pocket_pair_are_the_targets_own(pocket):
    """Of 200 prompts; in fp32, where the two best logits tie, shapes decide: at most a few."""
    prompts = sorted({question(chat) for chat in pocket.held_out + pocket.chats}, key=len)[:200]
    assert len(prompts) == 200
    differences = []
    accepted = 0
    for first in range(0, 200, 50):
        batch = prompts[first : first + 50]
        decoded = decode(pocket.target, pocket.drafter, batch, max_new_tokens=12)
        plain = decode(pocket.target, None, batch, max_new_tokens=12)
        differences.append(greedy_differences(pocket.target, decoded, plain, batch))
        accepted += decoded.rounds["accepted"].sum()
    found = pd.concat(differences)
    assert len(found) <= 4
    assert (found["margin"] < 64).all()
    assert accepted > 500


def test_greedy_differences_are_found_and_weighed():
    target = exact_target(VOCAB)
    plain = decode(target, None, PROMPTS, max_new_tokens=6, end_ids=[])
    answers = [list(answer) for answer in plain.tokens]
    answers[1][3] = (answers[1][3] + 1) % VOCAB
    answers[2] = answers[2][:5]
    found = greedy_differences(target, replace(plain, tokens=answers), plain, PROMPTS)
    assert found[["prompt", "position"]].to_numpy().tolist() == [[1, 3], [2, 5]]
    for row in found.itertuples():
        ids = [*PROMPTS[row.prompt], *plain.tokens[row.prompt][: row.position]]
        logits = target.model(torch.tensor([ids])).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        expected = (best - second) / (2.0**-52 * max(abs(best), abs(second)))
        assert row.margin == pytest.approx(expected, rel=1e-6)
    same = greedy_differences(target, plain, plain, PROMPTS)
    assert same.empty and list(same) == ["prompt", "position", "margin"]


@pytest.mark.parametrize("options", [{}, {"threshold": 0.5}], ids=named)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["ragged", "single"])
@pytest.mark.parametrize("head", HEADS)
def test_caches_after_rejections_are_as_good_as_none(head, prompts, options):
    """Every p and every q is that of a forward over all the row's tokens."""
    target = exact_target(VOCAB)
    drafter = exact_drafter(VOCAB, head, block_size=3)
    if options:
        undecided(target, drafter, *prompts, median=0.6)
    settings = SAMPLED | ({"max_new_tokens": 30, "end_ids": []} if len(prompts) == 1 else {})
    decoded, rounds = play(target, drafter, prompts, **settings, seed=2, **options)
    for r, before in with_befores(decoded, rounds):
        row = torch.tensor([[*prompts[r.prompt], *before, *r.drafted[: r.verified]]])
        logits = target.model(row, use_cache=False).logits[0, -r.verified - 1 :]
        torch.testing.assert_close(logits.softmax(-1), r.target_probs, rtol=0, atol=1e-9)
    assert draft_error(target, drafter, prompts, decoded, rounds) < 1e-9
    last = {r.prompt: r.number for r in rounds}
    assert any(r.accepted < r.verified and r.number < last[r.prompt] for r in rounds)
    assert len(prompts) == 1 or len(set(last.values())) > 1, "rows must leave at different times"


def test_caches_are_allocated_once_though_rows_are_uneven_and_leave():
    target, drafter = exact_target(VOCAB), exact_drafter(VOCAB, block_size=3)
    decoding = decode_rounds(target, drafter, PROMPTS, **SAMPLED, seed=2)
    memory = set()
    for _ in decoding:
        layers = [layer.states for layer in decoding._cache.states.layers]
        stores = [x for held in (*layers, *decoding._context.states) for x in vars(held).values()]
        memory.add(tuple(x.data_ptr() for x in stores if isinstance(x, torch.Tensor)))
        uneven = len(set(decoding._cache.rows.lengths)) > 1
    assert len(memory) == 1 and len(set(*memory)) == 2 * (3 + 2)
    assert len({len(answer) for answer in decoding.result().tokens}) > 1 and not uneven


class Reached(Exception):
    """The host is about to get a round's figures."""


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0, "top_p": 0.9}, {"threshold": 0.5}, {"draft_length": 2}, "plain"],
    ids=named,
)
def test_until_its_figures_come_to_the_host_a_round_asks_the_device_nothing(options, monkeypatch):
    """On the meta device no tensor has a value: what asks for one fails."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: asked.append(x.shape) or [0] * len(x))
    monkeypatch.setattr(Record, "add", lambda *_: (_ for _ in ()).throw(Reached))
    target = Target(exact_target(VOCAB).model.to("meta"))
    drafter = None if options == "plain" else exact_drafter(VOCAB, block_size=3).to("meta")
    settings = {"end_ids": [END], "max_new_tokens": 9} | ({} if options == "plain" else options)
    with pytest.raises(Reached):
        next(decode_rounds(target, drafter, PROMPTS, **settings))
    # The first token of each answer, which the prompt's own reading gives.
    assert asked == [(len(PROMPTS),)]


def test_only_once_a_round_its_figures_come_to_the_host(monkeypatch):
    target, drafter = exact_target(VOCAB), exact_drafter(VOCAB, block_size=3)
    moved = Counter()
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: moved.update(["cpu"]) or x.to("cpu"))
    monkeypatch.setattr(torch.Tensor, "item", lambda x: moved.update(["item"]))
    decoding = decode_rounds(target, drafter, PROMPTS[:1], **SAMPLED, threshold=0.5, seed=2)
    rounds = sum(1 for _ in decoding)
    assert moved == {"cpu": rounds} and rounds > 2


OPTIONS: list[dict[str, Any]] = [{}, {"threshold": 0.5}, {"draft_length": 1}]
OPTIONS += [{"scheduler": early_stopping, "draft_length": 2}, {"temperature": 0.5, "top_p": 0.8}]


def seen_sureness(
    drafter: Drafter, monkeypatch: pytest.MonkeyPatch
) -> list[list[tuple[float, float]]]:
    """The largest probability at temperature 1 and the margin, slot by slot of each coming round.

    Rounds are in the order in which they are played.
    """
    found: list[list[tuple[float, float]]] = []
    propose = drafter.propose

    def watched(anchors: Any, cache: Any, choose: Any, length: Any = None) -> Any:
        begin = len(found)
        found.extend([] for _ in anchors)

        def seen(logits: torch.Tensor) -> torch.Tensor:
            for place, row in enumerate(logits.tolist()):
                second, first = sorted(row)[-2:]
                weights = [math.exp(logit - first) for logit in row]
                found[begin + place].append((1 / math.fsum(weights), first - second))
            return choose(logits)

        return propose(anchors, cache, seen, length)

    monkeypatch.setattr(drafter, "propose", watched)
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_both_tables_follow_from_the_rounds(options, monkeypatch):
    target = exact_target(VOCAB)
    drafter = undecided(target, exact_drafter(VOCAB, block_size=3), *PROMPTS, median=0.7)
    domains = ["math", "chat", "math", "code"]
    settings = SAMPLED | options
    sureness = seen_sureness(drafter, monkeypatch)
    decoded, rounds = play(target, drafter, PROMPTS, domains=domains, seed=1, **settings)
    numbers, by_slot, by_round, nan = Counter[int](), [], [], float("nan")
    # All rows play a round together; where none has room for a draft, no drafter is asked.
    steps: list[list[Round]] = []
    for r in rounds:
        if not steps or r.prompt <= steps[-1][-1].prompt:
            steps.append([])
        steps[-1].append(r)
    asked = [r for step in steps if any(one.drafted for one in step) for r in step]
    sure_of = dict(zip(map(id, asked), sureness, strict=True))
    for r, before in with_befores(decoded, rounds):
        place = [r.prompt, domains[r.prompt], numbers[r.prompt]]
        numbers[r.prompt] += 1
        assert r.number == place[-1]
        by_round.append([*place, len(r.drafted), r.verified, r.accepted, len(r.tokens)])
        for slot, token in enumerate(r.drafted):
            q, verified = r.draft_probs[slot].tolist(), slot < r.verified
            p = r.target_probs[slot].tolist() if verified else [nan] * VOCAB
            rate = sum(min(pair) for pair in zip(p, q, strict=True)) if verified else nan
            entry = [*place, slot, len(before) + slot, token]
            entry += [q[token], p[token], min(1, p[token] / q[token]) if verified else nan, rate]
            entry += [r.confidence[slot].item(), *sure_of[id(r)][slot], verified, slot < r.accepted]
            entry += [r.tokens[-1] if verified and slot == r.accepted else None]
            by_slot.append(entry)
    names = ["prompt", "domain", "round", "drafted", "verified", "accepted", "tokens"]
    by_round.sort(key=lambda row: (row[0], row[2]))
    assert list(decoded.rounds) == names and decoded.rounds.to_numpy().tolist() == by_round
    table = pd.DataFrame(by_slot, columns=list(TRACE_COLUMNS)).astype(TRACE_COLUMNS)
    table = table.sort_values(["prompt", "round", "slot"], ignore_index=True)
    pd.testing.assert_frame_equal(decoded.trace, table, rtol=1e-12, atol=0)
    assert decoded.trace.dtypes.astype(str).to_dict() == TRACE_COLUMNS
    assert decoded.trace["resampled"].notna().any() and decoded.trace["accepted"].any()
    assert max(len(r.drafted) for r in rounds) == options.get("draft_length", 3)


def everything(confidence: torch.Tensor) -> torch.Tensor:
    """More slots of each row than there are."""
    return torch.full((len(confidence),), 99)


def verified_by(options: dict, confidence: Sequence[float]) -> int:
    """How many slots the target should be asked about, were it not for the answer's end."""
    if "scheduler" in options:
        wanted = options["scheduler"](torch.tensor([confidence])).item()
        return min(wanted, len(confidence))
    bar = options.get("threshold", 0)
    return next((k for k, sure in enumerate(confidence) if sure < bar), len(confidence))


LENGTHS = [{}, {"threshold": 0.5}, {"threshold": 1.0}]
LENGTHS += [{"scheduler": early_stopping}, {"scheduler": everything}]


@pytest.mark.parametrize("options", LENGTHS, ids=named)
def test_so_many_slots_are_verified_as_threshold_or_scheduler_say(options):
    """But none behind an accepted end of turn, nor where the answer would be too long."""
    target = exact_target(VOCAB)
    drafter = undecided(target, exact_drafter(VOCAB), *PROMPTS, median=0.7)
    ended = 0
    for seed in range(4):
        decoded, rounds = play(target, drafter, PROMPTS, seed=seed, **SAMPLED, **options)
        for r, before in with_befores(decoded, rounds):
            room = SAMPLED["max_new_tokens"] - len(before) - 1
            assert len(r.drafted) == min(2, room)
            assert r.draft_probs.shape == (len(r.drafted), VOCAB)
            assert r.target_probs.shape == (r.verified + 1, VOCAB)
            assert r.tokens[: r.accepted] == r.drafted[: r.accepted]
            assert END not in r.tokens[:-1]
            # With room for one token alone, the scheduler still sees two confidences.
            if r.accepted and r.drafted[r.accepted - 1] == END:
                assert (r.verified, len(r.tokens)) == (r.accepted, r.accepted)
                ended += r.accepted < len(r.drafted)
            elif len(r.drafted) == 2 or (r.drafted and "scheduler" not in options):
                assert r.verified == verified_by(options, r.confidence.tolist())
                assert len(r.tokens) == r.accepted + 1
    assert ended or options, "an end of turn within a block must occur"


def test_answers_end_where_the_models_own_settings_say():
    target, drafter = exact_target(VOCAB, eos_token_id=3), exact_drafter(VOCAB)
    target.model.generation_config.eos_token_id = [1, 3]
    settings = {"temperature": 1.0, "max_new_tokens": 50}
    decoded = decode(target, drafter, PROMPTS * 3, **settings)
    named = decode(target, drafter, PROMPTS * 3, end_ids=[1, 3], **settings)
    assert decoded.tokens == named.tokens
    assert {answer[-1] for answer in decoded.tokens} == {1, 3}


def test_time_is_split_into_its_parts():
    target, drafter = exact_target(VOCAB), exact_drafter(VOCAB)
    decoded = decode(target, drafter, PROMPTS, **SAMPLED)
    assert list(decoded.seconds) == ["prompt", "draft", "verify", "rest"]
    assert all(part > 0 for part in decoded.seconds.values())
    in_rounds = sum(decoded.seconds.values()) - decoded.seconds["prompt"]
    expected = (sum(map(len, decoded.tokens)) - 4) / in_rounds
    assert decoded.tokens_per_second == pytest.approx(expected)


@pytest.mark.parametrize("options", [{"max_new_tokens": 1}, {"end_ids": range(VOCAB)}], ids=named)
def test_an_answer_of_one_token_needs_no_round(options):
    target, drafter = exact_target(VOCAB), exact_drafter(VOCAB)
    decoded, rounds = play(target, drafter, PROMPTS, **(SAMPLED | options))
    assert [len(answer) for answer in decoded.tokens] == [1] * 4
    assert rounds == [] and decoded.rounds.empty and decoded.trace.empty
    assert decoded.trace.dtypes.astype(str).to_dict() == TRACE_COLUMNS
    assert math.isnan(decoded.tau)


def test_without_drafter_head_or_tokenizer_there_is_no_draft_no_confidence_and_no_text():
    decoded, rounds = play(exact_target(VOCAB), None, PROMPTS, **SAMPLED)
    assert decoded.trace.empty and decoded.trace.dtypes.astype(str).to_dict() == TRACE_COLUMNS
    assert all(len(r.tokens) == 1 and not r.drafted and r.confidence is None for r in rounds)
    decoded, rounds = play(exact_target(VOCAB), NO_CONFIDENCE, PROMPTS, **SAMPLED)
    assert decoded.trace["confidence"].isna().all() and decoded.trace["accepted"].any()
    assert decoded.texts == [""] * 4 and {r.text for r in rounds} == {""}


def test_rounds_come_as_they_happen_and_leave_no_mode_behind():
    target, drafter = exact_target(VOCAB), exact_drafter(VOCAB)
    forwards = 0

    def counts(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    target.model.base_model.register_forward_hook(counts)
    after = []
    for _ in decode_rounds(target, drafter, PROMPTS[:1], temperature=1.0, end_ids=[]):
        after.append(forwards)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        if len(after) == 3:
            break
    assert after == [2, 3, 4]


def test_text_streams(pocket):
    """What the rounds say, one after the other, is the answer; the first round says its first token
    too."""
    prompts = [question(chat) for chat in pocket.held_out[::40]]
    prompts.append("Écris « naïve » et 日本語, s'il te plaît 🙂")
    said = [""] * len(prompts)

    def show(r: Round) -> None:
        said[r.prompt] += r.text

    settings = {"temperature": 1.5, "max_new_tokens": 40}
    decoded = decode(pocket.target, pocket.drafter, prompts, on_round=show, **settings)
    assert said == decoded.texts
    ends = {pocket.tokenizer.eos_token_id}
    for text, tokens in zip(decoded.texts, decoded.tokens, strict=True):
        assert text == pocket.tokenizer.decode([t for t in tokens if t not in ends])


def test_a_prompt_goes_through_the_chat_template(pocket):
    text = "What is 2 + 3?"
    rendered = pocket.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    ids = pocket.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert encode_prompt(pocket.target, text) == ids
    assert encode_prompt(pocket.target, torch.tensor(ids)) == ids
    answers = decode(pocket.target, pocket.drafter, [text, ids], max_new_tokens=8).tokens
    assert answers[0] == answers[1]


@pytest.fixture
def trace() -> pd.DataFrame:
    """With names of domains that a reader of CSV could take for something else."""
    target = exact_target(VOCAB)
    drafter = undecided(target, exact_drafter(VOCAB), *PROMPTS, median=0.5)
    domains = ["none", "NA", "7", 'a, "b"']
    settings = {"threshold": 0.5, "temperature": 1.0, "max_new_tokens": 9}
    return decode(target, drafter, PROMPTS, domains=domains, **settings).trace


@pytest.mark.parametrize("rows", [None, 0])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_trace_survives_its_file(trace, suffix, rows, tmp_path):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"trace.{suffix}"
    save_trace(trace[:rows], str(path))
    pd.testing.assert_frame_equal(load_trace(path), trace[:rows], check_exact=True)
    assert list(tmp_path.iterdir()) == [path]


def test_a_trace_is_written_whole_or_not_at_all(trace, tmp_path, monkeypatch):
    path = tmp_path / "trace.csv"
    save_trace(trace[:5], path)
    before = path.read_bytes()

    def breaks(_: pd.DataFrame, path: Path, **__: Any) -> None:
        path.write_text("prompt,dom")
        raise OSError("no space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", breaks)
    with pytest.raises(OSError, match="no space"):
        save_trace(trace, path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_trace_is_refused_by_name(trace, tmp_path):
    for act in (lambda path: save_trace(trace, path), load_trace):
        with pytest.raises(ValueError, match=r"\.parquet.*\.csv.*got 'trace.json'"):
            act(tmp_path / "trace.json")
    contents = {
        "empty.csv": b"",
        "junk.csv": b"\xff\xfe\x00",
        "empty.parquet": b"",
        "junk.parquet": b"PAR1 junk PAR1",
        "words.csv": trace.assign(slot="first").to_csv(index=False).encode(),
        "other.csv": trace.drop(columns=["token", "slot"]).to_csv(index=False).encode(),
    }
    reasons = {"words.csv": " as csv: .*first", "other.csv": " as csv: it has no slot, token"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} must hold a trace{reasons.get(name, '')}"):
            load_trace(tmp_path / name)
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    for name in ("loop.csv", "nowhere.csv"):
        with pytest.raises(OSError, match=name):
            load_trace(tmp_path / name)


@pytest.mark.parametrize("options", [{}, {"threshold": 0.5}], ids=named)
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_what_becomes_of_a_prompt_does_not_depend_on_the_others(batch_size, options):
    target = exact_target(VOCAB)
    drafter = undecided(target, exact_drafter(VOCAB), *PROMPTS, median=0.5)
    settings = SAMPLED | {"seed": batch_size} | options
    together = decode(target, drafter, PROMPTS, **settings)
    apart = decode(target, drafter, PROMPTS, batch_size=batch_size, **settings)
    assert apart.tokens == together.tokens
    pd.testing.assert_frame_equal(apart.trace, together.trace)
    pd.testing.assert_frame_equal(apart.rounds, together.rounds)
    others = decode(target, drafter, [[3] * 9, PROMPTS[1], [1], [2, 2]], **settings)
    assert others.tokens[1] == together.tokens[1]


def test_a_seed_gives_one_answer_and_another_seed_another():
    target, drafter = exact_target(VOCAB), exact_drafter(VOCAB)
    settings = {"temperature": 1.0, "max_new_tokens": 20, "end_ids": []}
    prompts = [[1, 2]] * 4
    answers = {}
    for seed in (0, 1, 2, 12345, 2**32, 2**32 + 1):
        answers[seed] = decode(target, drafter, prompts, seed=seed, **settings).tokens
        assert decode(target, drafter, prompts, seed=seed, **settings).tokens == answers[seed]
    every = [tuple(answer) for of_seed in answers.values() for answer in of_seed]
    assert len(set(every)) == len(every)


def chi_square(observed: Counter, expected: dict) -> float:
    """The p-value of counts against expected counts; those below 5 count as one."""
    pooled = [(observed[key], n) for key, n in expected.items() if n >= 5]
    rest = [(observed[key], n) for key, n in expected.items() if n < 5]
    if rest:
        pooled.append((sum(o for o, _ in rest), sum(n for _, n in rest)))
    statistic = sum((o - n) ** 2 / n for o, n in pooled)
    return float(chi2.sf(statistic, len(pooled) - 1))


@pytest.mark.parametrize("options", [{}, {"threshold": 0.5}], ids=named)
def test_draws_from_a_seed_are_distributed_as_the_targets_own(options):
    """The numbers behind the draws, which the enumeration replaces; and they tell 1 from 1.2."""
    target = exact_target()
    drafter = undecided(target, exact_drafter(seed=7), [1, 0], median=0.5)
    settings = {"temperature": 1.0, "max_new_tokens": 3, "end_ids": []}
    drawn: Counter = Counter()
    for seed in range(6):
        answers = decode(target, drafter, [[1, 0]] * 500, seed=seed, **settings, **options).tokens
        drawn.update((tuple(answer),) for answer in answers)
    for temperature, same in ((1.0, True), (1.2, False)):
        expected = own_answers(target, [1, 0], max_new_tokens=3, temperature=temperature)
        expected = {key: 3000 * p for key, p in expected.items()}
        assert (chi_square(drawn, expected) > ALPHA) == same


def chance_of_draws(pair: Pair, draws: int, **options: Any) -> float:
    """The p-value of so many tokens, in sampled answers to many prompts, under the target.

    A token's place in [0, 1) is where it falls when the vocabulary is laid out by p, those first
    that the drafter likes better than the target (p - q ascending; q is 0 without a draft). It is
    uniform given all before it, whatever the drafter; a token not drawn as the target would moves
    it most. p is that of forwards without a cache; places are counted in 20 bins.
    """
    prompts = sorted((question(chat) for chat in pair.held_out), key=len)[:150]
    generator = torch.Generator().manual_seed(0)
    bins: Counter = Counter()
    for seed in count():
        drafted: list[list[torch.Tensor]] = [[] for _ in prompts]
        none = torch.zeros(pair.target.vocab_size)

        def keep(r: Round, drafted: list = drafted, none: torch.Tensor = none) -> None:
            for slot in range(len(r.tokens)):
                q = r.draft_probs[slot].clone() if slot < r.verified else none
                drafted[r.prompt].append(q)

        settings = {"temperature": 1.0, "max_new_tokens": 64, "seed": seed, "on_round": keep}
        answers = decode(pair.target, pair.drafter, prompts, **settings, **options).tokens
        for prompt, answer, qs in zip(prompts, answers, drafted, strict=True):
            ids = encode_prompt(pair.target, prompt)
            with torch.no_grad():
                logits = pair.target.model(torch.tensor([ids + answer]), use_cache=False).logits
            p = logits[0, len(ids) - 1 : -1].double().softmax(dim=-1)
            rank = p - torch.stack([none, *qs])
            token = torch.tensor(answer).unsqueeze(1)
            before = p.masked_fill(rank >= rank.gather(1, token), 0).sum(dim=1, keepdim=True)
            point = torch.rand(token.shape, generator=generator, dtype=torch.float64)
            place = before + point * p.gather(1, token)
            bins.update((20 * place).long().clamp(max=19).flatten().tolist())
        if bins.total() >= draws:
            return chi_square(bins, dict.fromkeys(range(20), bins.total() / 20))
    raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"threshold": 0.6}, {"scheduler": early_stopping, "draft_length": 2}], ids=named
)
def test_draws_of_the_pocket_pair_are_distributed_as_the_targets_own(pocket, options):
    """100,000 tokens at an error rate of 1 in 10,000; that a fault is seen: see the faults."""
    assert chance_of_draws(pocket, 100_000, **options) > ALPHA


CONFIDENT: list[dict[str, Any]] = [
    {"threshold": 0.5},
    {"scheduler": early_stopping},
    {"confidence_temperatures": [1.0, 1.0]},
]
OTHER_LAYERS = exact_drafter(VOCAB, target_layer_ids=(0, 3))
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"target": "smollm2"}, "target must be a Target, got 'smollm2'"),
    ({"max_new_tokens": 2042}, r"at most 2048 tokens .*, got 2049"),
    ({"seed": -1}, "seed must be >= 0, got -1"),
    ({"draft_length": 3}, "draft_length must be at most block_size 2, got 3"),
    ({"domains": ["a"]}, "domains must be one for each of 4 prompts, got 1"),
    ({"end_ids": [VOCAB]}, r"each of end_ids must lie in \[0, 4\], got 5"),
    ({"confidence_temperatures": [1.0]}, "one for each of 2 slots, got 1"),
    ({"drafter": exact_drafter(VOCAB + 1)}, "a vocabulary, got 6 and 5"),
    ({"drafter": OTHER_LAYERS}, r"must read layers \[0, 3\]"),
    ({"drafter": exact_drafter(VOCAB, target_hidden_size=16)}, "as 32 numbers, got a target with"),
    *(({"drafter": None} | one, "needs a drafter") for one in [{"draft_length": 1}, *CONFIDENT]),
    *(({"drafter": NO_CONFIDENCE} | one, "a drafter with a confidence head") for one in CONFIDENT),
    ({"prompts": []}, "prompts must not be empty"),
    ({"prompts": ["Hello"]}, "in memory has no tokenizer: a prompt must be token ids"),
    ({"prompts": [[1], []]}, "a prompt must hold at least one token, got none"),
    ({"prompts": [[1, VOCAB]]}, r"token of a prompt must lie in \[0, 4\], got 5"),
    ({"prompts": [torch.ones(1, 2).long()]}, r"must be \[seq\], got shape \(1, 2\)"),
]

# A scheduler is only known to be wrong once it has been asked.
BAD_SCHEDULERS: list[tuple[Callable[[torch.Tensor], Any], str]] = [
    (lambda c: torch.ones(1).int(), "must return 4 whole numbers"),
    (lambda c: torch.full((4,), -1), r"at least 0, got \[-1, -1"),
    (lambda c: torch.ones(4), r"whole numbers .*, got \[1.0, 1.0"),
    (lambda c: None, "must return 4 whole numbers .*, got None"),
    (lambda c: ["a"] * 4, r"must return 4 whole numbers .*, got \['a'"),
]


@pytest.mark.parametrize("options, match", REFUSED, ids=named)
def test_what_cannot_be_decoded_is_refused_in_one_sentence(options, match):
    models = {"target": exact_target(VOCAB), "drafter": exact_drafter(VOCAB), "prompts": PROMPTS}
    with pytest.raises((ValueError, TypeError), match=match):
        decode_rounds(**(models | options))


@pytest.mark.parametrize("scheduler, match", BAD_SCHEDULERS)
def test_a_scheduler_that_does_not_count_slots_is_refused(scheduler, match):
    rounds = decode_rounds(
        exact_target(VOCAB), exact_drafter(VOCAB), PROMPTS, scheduler=scheduler, max_new_tokens=4
    )
    with pytest.raises(ValueError, match=match):
        next(rounds)


def test_slots_past_the_end_of_an_answer_take_no_room_from_other_requests():
    """At this speed the scheduler verifies five slots: of the second request, four."""
    sps = StepsPerSecond(np.arange(1, 17), 1 / (1 + 0.12 * np.arange(1, 17)), 0, "imaginary")
    confidence = torch.tensor([[0.99] * 7, [0.8] * 7])
    scheduler = prefix_scheduler(sps)
    assert scheduled(scheduler, confidence, torch.tensor([1, 7])).tolist() == [1, 4]
    assert scheduled(scheduler, confidence, torch.tensor([0, 7])).tolist()[0] == 0


def test_next_to_no_temperature_is_greedy():
    target, drafter = exact_target(VOCAB), exact_drafter(VOCAB)
    greedy = decode(target, drafter, PROMPTS, max_new_tokens=12)
    for temperature in (1e-9, 1e-38, 1e-320):
        cold = decode(target, drafter, PROMPTS, max_new_tokens=12, temperature=temperature)
        assert cold.tokens == greedy.tokens
        logits = torch.tensor([[3.0, -2.0, 3.0, 1.0]])
        assert distribution(logits, temperature).tolist() == [[0.5, 0, 0.5, 0]]


def test_the_last_token_that_fits_is_decoded():
    target, drafter = exact_target(VOCAB, max_position_embeddings=24), exact_drafter(VOCAB)
    answer = decode(target, drafter, [PROMPTS[2]], max_new_tokens=17, end_ids=[]).tokens[0]
    assert answer == generated(target, PROMPTS[2], 17, [])
