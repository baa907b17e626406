"""The shipped pairs: what load_pair gives, and that the figures on the cards are theirs."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd
import pytest

import dspark_lab.pairs as lab
from data.make.recipes import POCKET_DRAFTERS, SMOLLM2_TRAINING, TRACED, make_smollm2_drafter
from dspark_lab.chats import Chat, encode, load_chats
from dspark_lab.decoding import TRACE_COLUMNS, decode
from dspark_lab.pairs import PAIRS, drafter_names, load_pair, load_traces, question
from dspark_lab.rates import compare_drafters, evaluate, tau_table, trace_sums


def test_every_pocket_drafter_shares_the_targets_frozen_embedding() -> None:
    assert drafter_names()[0] == "dspark-k7" and set(drafter_names()) == set(POCKET_DRAFTERS)
    for name, recipe in POCKET_DRAFTERS.items():
        pair = load_pair("pocket", name)
        config = pair.drafter.config
        assert config.block_size == recipe.block_size
        assert config.has_markov_head == (recipe.kind != "none")
        for own, shared in (
            (pair.drafter.embed_tokens.weight, pair.target.embed_weight),
            (pair.drafter.lm_head.weight, pair.target.head_weight),
        ):
            assert own.data_ptr() == shared.data_ptr() and not own.requires_grad
        assert not any(p.requires_grad for p in pair.target.model.parameters())


def test_the_markov_head_pays_on_held_out_conversations() -> None:
    """The gain's interval, over 40 conversations, excludes zero by far: see the card."""
    ours, baseline = (load_pair("pocket", name) for name in ("dspark-k7", "dflash-k7"))
    chats = [encode(chat, ours.tokenizer, 512) for chat in ours.held_out[:40]]
    tables = [evaluate(p.drafter, p.target, chats, num_anchors=16) for p in (ours, baseline)]
    gain = compare_drafters(*tables)
    assert gain["low"] > 0
    assert gain["ours"] > 2.5


def test_no_held_out_question_was_trained_on() -> None:
    pair = load_pair()
    trained, held_out = (set(map(question, chats)) for chats in (pair.chats, pair.held_out))
    assert not trained & held_out


def test_a_name_that_does_not_ship_is_refused() -> None:
    with pytest.raises(ValueError, match="pair must be one of .*'smollm3'"):
        load_pair("smollm3")
    with pytest.raises(ValueError, match="drafter must be one of .*'dspark-k7'.*'eagle'"):
        load_pair("pocket", "eagle")
    with pytest.raises(ValueError, match="pair must be one of .*'smollm3'"):
        load_traces("smollm3")


traces_of = cache(load_traces)


@pytest.mark.parametrize("name", PAIRS)
def test_every_drafter_of_a_pair_is_traced_at_every_temperature(name: str) -> None:
    traces = traces_of(name)
    assert traces.dtypes[list(TRACE_COLUMNS)].astype(str).to_dict() == TRACE_COLUMNS
    assert set(traces.columns) - set(TRACE_COLUMNS) == {"drafter", "temperature"}
    found = traces[["drafter", "temperature"]].drop_duplicates()
    expected = [(drafter, t) for drafter in drafter_names(name) for t in TRACED[name]]
    assert list(found.itertuples(index=False, name=None)) == expected


@pytest.mark.parametrize("name", PAIRS)
def test_a_prompt_number_means_one_question_in_all_traces_of_a_pair(name: str) -> None:
    asked = [
        dict(zip(run["prompt"], run["domain"], strict=True))
        for _, run in traces_of(name).groupby(["drafter", "temperature"])
    ]
    assert all(run == asked[0] for run in asked)
    assert sorted(asked[0]) == list(range(len(asked[0]))) and len(asked[0]) >= 100


@pytest.mark.parametrize("name", PAIRS)
def test_every_shipped_trace_is_one_that_acceptance_reads(name: str) -> None:
    for _, run in traces_of(name).groupby(["drafter", "temperature"]):
        sums = trace_sums(run)
        empirical = sums[sums["kind"] == "empirical"]
        assert empirical["passed"].sum() == run["accepted"].sum()
        tau = tau_table(sums, resamples=1).set_index("kind")["tau"]
        assert 1 < tau["empirical"] < run["slot"].max() + 2


@pytest.mark.parametrize("drafter", ["dspark-k7", "dflash-k15"])
def test_a_fresh_answer_is_the_one_that_was_traced(drafter: str) -> None:
    """Greedy answers to the first questions; blocks at the shorter one's end are cut."""
    pair = load_pair("pocket", drafter)
    chats = lab.in_turns(pair.held_out)[:5]
    assert len({chat.domain for chat in chats}) > 1
    options = {"domains": [chat.domain for chat in chats], "max_new_tokens": 16}
    fresh = decode(pair.target, pair.drafter, [question(chat) for chat in chats], **options)
    traces = traces_of("pocket")
    shipped = traces[(traces["drafter"] == drafter) & (traces["temperature"] == 0)]
    key = ["prompt", "round", "slot"]
    both = fresh.trace.merge(shipped, on=key, how="left", suffixes=("", "_shipped"))
    for name in ("domain", "position", "token"):
        assert (both[name] == both[f"{name}_shipped"]).all(), name
    error = (both["confidence"] - both["confidence_shipped"]).abs()
    assert error.max() < 1e-4
    # What the shipped trace says to be in an answer stands there: accepted and corrected tokens.
    early = shipped[shipped["prompt"] < len(chats)]
    corrected = early.dropna(subset="resampled").assign(token=early["resampled"])
    placed = pd.concat([early[early["accepted"]], corrected])
    seen = [row for row in placed.itertuples() if row.position < len(fresh.tokens[row.prompt])]
    assert all(fresh.tokens[row.prompt][row.position] == row.token for row in seen)
    assert len(seen) > 40


@pytest.mark.slow
def test_the_drafter_of_smollm2_predicts_its_answers() -> None:
    pair = load_pair("smollm2")
    assert pair.target.vocab_size == 49152
    chats = [encode(chat, pair.tokenizer, 512) for chat in pair.held_out[:12]]
    table = evaluate(pair.drafter, pair.target, chats, num_anchors=8)
    assert table["tau"].mean() > 1.5


@pytest.mark.slow
def test_the_recipe_of_smollm2_runs_in_a_reduced_form(tmp_path: Path) -> None:
    config = replace(
        SMOLLM2_TRAINING, steps=2, batch_size=2, num_anchors=4, max_length=96, checkpoint_every=0
    )
    make_smollm2_drafter(tmp_path, load_chats()[:6], config, progress=False)
    assert (tmp_path / "dspark-k7" / "model.safetensors").exists()
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert (facts["steps"], facts["conversations"]) == (2, 6)


def test_a_conversation_in_which_the_user_says_nothing_has_no_question() -> None:
    chat = Chat([{"role": "assistant", "content": "Hello"}], "greeting")
    with pytest.raises(ValueError, match="'greeting' must have a message of the user, got none"):
        question(chat)


def test_domains_take_turns_until_each_has_no_more():
    names = ["math", "math", "code", "math", None, "code", "math"]
    said = ({"role": "assistant", "content": ""},)
    chats = [Chat(said, str(n), d) for n, d in enumerate(names)]
    assert [chat.id for chat in lab.in_turns(chats)] == ["0", "2", "4", "1", "5", "3", "6"]
