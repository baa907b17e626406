"""`dspark_lab.explore`: what the explorers of decoding show, and how a run is driven.

The models are tiny and random, and a token is a word; two words hold what markup and maths are made
of. What is shown must be what the library's functions say of `decode` with the same settings. A
run beside other work is driven by a real loop; no test depends on how long anything takes.
"""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd
import pytest
import torch
from test_target import random_target
from test_widgets import WIDGET, alert, make_tokenizer, picture

from data.make.recipes import write_chats
from dspark_lab.chats import Chat, load_chats
from dspark_lab.decoding import (
    Decoded,
    Round,
    decode,
    distribution_table,
    encode_prompt,
    outcome_table,
    token_kinds,
)
from dspark_lab.explore import (
    VIEWS,
    DecodingExplorer,
    Explorer,
    explore_acceptance,
    explore_decoding,
    outcome_legend,
    outcome_text,
)
from dspark_lab.explore import acceptance as acceptance_module
from dspark_lab.explore import decoding as decoding_module
from dspark_lab.model import Drafter, Target, save_drafter
from dspark_lab.pairs import drafter_names, load_pair, question
from dspark_lab.rates import (
    rate_table,
    reliability_tables,
    split_prompts,
    study,
    tau_table,
    threshold_sweep,
    trace_sums,
)
from dspark_lab.serving import speed_table
from tests.samples import tiny_drafter, tiny_target

pytestmark = pytest.mark.usefixtures("one_thread")

POCKET = Path(__file__).resolve().parents[1] / "data" / "pocket"
VOCAB = 66
TOKENIZER = make_tokenizer()
HEADLESS = {"enable_confidence_head": False, "confidence_head_with_markov": False}
CONFIDENT = ("reliability", "domains", "token kinds", "thresholds")
# Hot, so that the drafter of a random pair is accepted often enough to have a calibration.
HOT = {"temperature": 1.5, "max_new_tokens": 12}
TEXTS = ["w1 w2 w3", "<b> $x$", "w7 ! w9"]


@cache
def target() -> Target:
    return Target(tiny_target(vocab_size=VOCAB).model, TOKENIZER)


@cache
def drafter(seed: int = 1, **options: Any) -> Drafter:
    made = tiny_drafter(seed, **({"vocab_size": VOCAB, "block_size": 2} | options))
    made.use_target_embeddings(target().embed_weight, target().head_weight)
    if made.confidence_head is not None:
        # A fresh head says 1/2 of everything.
        generator = torch.Generator().manual_seed(seed)
        weight = made.confidence_head.proj.weight
        torch.nn.init.normal_(weight, std=0.1, generator=generator)
    return made.eval()


def to_text(token: int) -> str:
    return str(TOKENIZER.decode([token]))


def ask(text: str, domain: str | None = None, name: str = "chat") -> Chat:
    messages = ({"role": "user", "content": text}, {"role": "assistant", "content": "w5"})
    return Chat(messages, id=name, domain=domain)


CHATS = [ask(f"w{i} w{i + 7} <b>", ("math", "code")[i % 2], f"c{i}") for i in range(24)]


def acceptance(prompts: Any = CHATS, drafters: Any = None, **options: Any) -> Explorer:
    return explore_acceptance(target(), drafters or drafter(), prompts, **(HOT | options))


def answers(one: Drafter | None, prompts: Any = CHATS, **options: Any) -> Decoded:
    """What `decode` says to the same questions."""
    asked = [question(p) if isinstance(p, Chat) else p for p in prompts]
    domains = [(p.domain if isinstance(p, Chat) else None) or "none" for p in prompts]
    settings = HOT | {"batch_size": 40} | options
    return decode(target(), one, asked, domains=domains, **settings)


def expected(view: str, run: Decoded, conversation: int = 0) -> pd.DataFrame:
    """The table behind a view, from the library's functions."""
    trace = run.trace
    if view in ("rates", "survival"):
        return rate_table(trace_sums(trace))
    if view == "reliability":
        raw, scaled = reliability_tables(*split_prompts(trace)).values()
        both = [t.assign(bin=range(len(t))) for t in (raw, scaled)]
        named = [t.assign(values=v) for t, v in zip(both, ("raw", "scaled"), strict=True)]
        table = pd.concat(named, ignore_index=True)
        return table[["values", "bin", *raw.columns]]
    if view == "thresholds":
        return threshold_sweep(trace, [i / 20 for i in range(20)])
    if view == "text":
        return outcome_table(run, to_text, conversation)
    if view == "token kinds":
        trace = trace.assign(kind=token_kinds(trace["token"], to_text))
    return study(trace, by=["domain" if view == "domains" else "kind"])


@pytest.fixture(scope="module")
def explored() -> Explorer:
    """An explorer of one drafter, whose view every test sets."""
    return acceptance()


@pytest.mark.parametrize("view", VIEWS)
def test_a_views_table_is_what_the_library_says_of_the_same_trace(explored, view):
    explored.controls["view"].value = view
    run = answers(drafter())
    pd.testing.assert_frame_equal(explored.table, expected(view, run), check_dtype=False)
    pd.testing.assert_frame_equal(explored.tables["trace"], run.trace)
    pd.testing.assert_frame_equal(explored.tables["tau"], tau_table(trace_sums(run.trace)))
    assert list(explored.tables)[1:] == ["trace", "tau"]


def test_every_view_has_a_picture_of_its_own(explored):
    shown, words = set(), set()
    for view in VIEWS:
        explored.controls["view"].value = view
        if view == "text":
            continue
        found = re.match(
            r'<img alt="([^"]+)" .*src="(data:image/png[^"]+)"', picture(explored).value
        )
        words.add(found[1])
        shown.add(found[2])
    assert len(shown) == len(words) == len(VIEWS) - 1


def test_the_text_view_is_the_chosen_conversation(explored):
    explored.controls["view"].value = "text"
    run = answers(drafter())
    for conversation in (0, 5, len(CHATS) - 1):
        explored.controls["conversation"].value = conversation
        table = expected("text", run, conversation)
        pd.testing.assert_frame_equal(explored.table, table)
        assert picture(explored).value == outcome_legend(table) + outcome_text(table)
    explored.controls["conversation"].value = len(CHATS)
    assert explored.settings["conversation"] == len(CHATS) - 1


@pytest.mark.parametrize("view", VIEWS)
def test_the_view_to_start_with_can_be_chosen(view):
    explorer = acceptance(CHATS[:12], view=view, max_new_tokens=12)
    assert explorer.settings == {
        "view": view,
        "drafter": "drafter",
        "temperature": 1.5,
        "conversation": 0,
    }
    run = answers(drafter(), CHATS[:12])
    pd.testing.assert_frame_equal(explorer.table, expected(view, run), check_dtype=False)


def test_a_moved_control_draws_anew_and_answers_are_decoded_once(monkeypatch):
    calls = []

    def counted(target: Target, drafter: Drafter, prompts: Any, **options: Any) -> Decoded:
        calls.append((drafter, options["temperature"]))
        return decode(target, drafter, prompts, **options)

    monkeypatch.setattr(acceptance_module, "decode", counted)
    both = {"one": drafter(1), "two": drafter(2)}
    explorer = acceptance(CHATS[:4], both, max_new_tokens=5)
    moves: list[tuple[str, Any]] = [
        ("drafter", "two"),
        ("temperature", 0.0),
        ("view", "text"),
        ("conversation", 2),
        ("drafter", "one"),
        ("view", "survival"),
        ("temperature", 1.5),
        ("view", "rates"),
    ]
    for number, (name, value) in enumerate(moves):
        before = picture(explorer).value
        explorer.controls[name].value = value
        assert picture(explorer).value != before and explorer.frames_drawn == 2 + number
        settings = explorer.settings
        run = answers(
            both[settings["drafter"]],
            CHATS[:4],
            temperature=settings["temperature"],
            max_new_tokens=5,
        )
        pd.testing.assert_frame_equal(explorer.tables["trace"], run.trace)
    kinds = [(one, t) for one in both.values() for t in (1.5, 0.0)]
    assert sorted(map(str, calls)) == sorted(map(str, kinds)) and len(calls) == 4


def test_the_domains_of_conversations_reach_the_tables():
    chats = [ask("w1", "math"), ask("w2", "code"), ask("w3"), ask("w4", "math")]
    explorer = acceptance(chats, view="domains")
    domains = explorer.tables["trace"].groupby("prompt")["domain"].unique()
    assert [list(own) for own in domains] == [["math"], ["code"], ["none"], ["math"]]
    found = explorer.table.set_index("domain")["conversations"].to_dict()
    assert found == {"code": 1, "math": 2, "none": 1}
    assert set(acceptance(TEXTS).tables["trace"]["domain"]) == {"none"}


def test_prompts_may_be_text_ids_conversations_or_a_file_of_them(tmp_path):
    ids = [encode_prompt(target(), text) for text in TEXTS]
    chats = [ask(text, name=text) for text in TEXTS]
    write_chats(chats, tmp_path / "chats.jsonl")
    ways = [
        TEXTS,
        ids,
        [torch.tensor(own) for own in ids],
        chats,
        [TEXTS[0], ids[1], chats[2]],
        tmp_path / "chats.jsonl",
        str(tmp_path / "chats.jsonl"),
    ]
    trace = answers(drafter(), TEXTS).trace
    for prompts in ways:
        pd.testing.assert_frame_equal(acceptance(prompts).tables["trace"], trace)


def test_a_conversations_first_question_is_asked():
    messages = [("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5")]
    chat = Chat(tuple({"role": role, "content": text} for role, text in messages), id="long")
    trace = acceptance([chat]).tables["trace"]
    pd.testing.assert_frame_equal(trace, answers(drafter(), ["w1 w2"]).trace)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a random drafter for the shipped pocket target."""
    pocket = load_pair().target
    made = tiny_drafter(vocab_size=pocket.vocab_size, hidden_size=pocket.hidden_size)
    path = tmp_path_factory.mktemp("checkpoints") / "mine"
    save_drafter(made, path)
    return path


def test_target_and_drafter_may_be_folders(folder):
    texts = ["What is 2 + 3?", "Hello"]
    pair = load_pair()
    made = tiny_drafter(vocab_size=pair.target.vocab_size, hidden_size=pair.target.hidden_size)
    made.use_target_embeddings(pair.target.embed_weight, pair.target.head_weight)
    run = decode(pair.target, made.eval(), texts, max_new_tokens=4, temperature=1.0)
    for own in (folder, str(folder), f"{folder}/"):
        explorer = explore_acceptance(POCKET / "target", own, texts, max_new_tokens=4)
        assert explorer.controls["drafter"].options == ("mine",)
        pd.testing.assert_frame_equal(explorer.tables["trace"], run.trace)
    both = {"shipped": POCKET / "dflash-k7", "made": made}
    explorer = explore_decoding(str(POCKET / "target"), both, texts, max_new_tokens=4, run=False)
    assert explorer.controls["drafter"].options == ("shipped", "made")
    explorer.controls["drafter"].value = "made"
    explorer.run()
    greedy = decode(pair.target, made, texts[:1], max_new_tokens=4)
    pd.testing.assert_frame_equal(explorer.tables["trace"], greedy.trace)


def test_a_drafter_without_a_confidence_head_has_rates_and_elsewhere_a_sentence():
    bare = drafter(3, **HEADLESS)
    explorer = acceptance(drafters={"sure": drafter(), "bare": bare})
    explorer.controls["drafter"].value = "bare"
    run = answers(bare)
    for view in VIEWS:
        explorer.controls["view"].value = view
        if view in CONFIDENT:
            assert alert(explorer) == (f"{view} needs a drafter with a confidence head, got bare")
            assert explorer.tables == {}
        else:
            found = explorer.table
            pd.testing.assert_frame_equal(found, expected(view, run), check_dtype=False)
    explorer.controls["view"].value = "thresholds"
    explorer.controls["drafter"].value = "sure"
    assert explorer.table["verified"].notna().all()


def test_every_drafter_with_a_head_has_every_view_if_its_rounds_are_enough():
    explorer = acceptance(CHATS[:1], max_new_tokens=2)
    for view in VIEWS:
        explorer.controls["view"].value = view
        # What cannot be told from one conversation is a sentence, and not an error.
        assert explorer.tables or alert(explorer)
    explorer.controls["view"].value = "reliability"
    assert "conversations leaves one side empty" in alert(explorer)


@pytest.mark.parametrize("explore", [explore_acceptance, explore_decoding])
@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"drafter": None}, ValueError, "must be given together, got one of them"),
        ({"target": None}, ValueError, "must be given together, got one of them"),
        ({"prompts": []}, ValueError, "a prompt and a drafter at least, got 0 and 1"),
        ({"drafter": {}}, ValueError, "a prompt and a drafter at least, got 3 and 0"),
        ({"temperature": -0.5}, ValueError, "temperature must be a finite .* >= 0.*, got -0.5"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a finite .*, got nan"),
        ({"temperature": float("inf")}, ValueError, "temperature must be a finite .*, got inf"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
        ({"prompts": [[1, VOCAB]]}, ValueError, f"tokens must be < {VOCAB}, got {VOCAB}"),
        ({"prompts": [[]]}, ValueError, "a prompt must hold at least one token, got none"),
        ({"prompts": [7]}, TypeError, "a prompt must be text or token ids, got 7"),
        ({"drafter": tiny_drafter()}, ValueError, "must share a vocabulary, got 64 and 66"),
        ({"target": "no/such-target"}, OSError, None),
        ({"drafter": "no/such-drafter"}, OSError, "such-drafter"),
        ({"prompts": "no-such-file.jsonl"}, OSError, "no-such-file"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_explored_is_refused_in_one_sentence(explore, arguments, error, match):
    given = {"target": target(), "drafter": drafter(), "prompts": TEXTS} | arguments
    with pytest.raises(error, match=match):
        explore(**given)


def test_a_view_that_there_is_none_of_is_refused():
    with pytest.raises(ValueError, match="view must be one of .*'rates'.*, got 'mood'"):
        acceptance(view="mood")


def test_an_explorer_can_start_further_out_than_its_sliders_reach():
    assert acceptance(TEXTS, temperature=2.5).settings["temperature"] == 2.5
    explorer = decoding(temperature=3.0, max_new_tokens=600, run=False)
    assert explorer.settings["temperature"] == 3.0
    assert explorer.settings["max_new_tokens"] == 600


def test_a_target_that_decodes_one_row_at_a_time_is_explored_too():
    windows = random_target("windows")
    made = tiny_drafter(1)
    made.use_target_embeddings(windows.embed_weight, windows.head_weight)
    explorer = explore_acceptance(windows, made, [[1, 2, 3], [4, 5]], max_new_tokens=4)
    options = {"temperature": 1.0, "max_new_tokens": 4}
    expected = decode(windows, made.eval(), [[1, 2, 3], [4, 5]], **options).trace
    pd.testing.assert_frame_equal(explorer.tables["trace"], expected)


def test_the_pocket_pair_is_explored_where_nothing_is_given():
    explorer = explore_acceptance(max_new_tokens=4)
    assert list(explorer.controls["drafter"].options) == drafter_names("pocket")
    pair = load_pair()
    asked = pair.held_out[:: len(pair.held_out) // 40]
    run = decode(
        pair.target,
        pair.drafter,
        [question(chat) for chat in asked],
        domains=[chat.domain for chat in asked],
        temperature=1.0,
        max_new_tokens=4,
        batch_size=40,
    )
    assert 40 <= len(run.tokens) < 60 and len(set(run.trace["domain"])) > 2
    assert explorer.settings["view"] == "rates"
    pd.testing.assert_frame_equal(explorer.tables["trace"], run.trace)
    one = explore_decoding(max_new_tokens=4)
    assert list(one.controls["drafter"].options) == drafter_names("pocket")
    greedy = decode(pair.target, pair.drafter, [question(asked[0])], max_new_tokens=4)
    pd.testing.assert_frame_equal(one.tables["trace"], greedy.trace)


def test_some_of_the_shipped_conversations_are_asked_of_a_target_of_ones_own():
    explorer = explore_decoding(target(), drafter(), run=False)
    domains = {" ".join(question(chat).split())[:80]: chat.domain for chat in load_chats()}
    labels = [label for label, _ in explorer.controls["example"].options]
    assert len(labels) == 40 < len(domains)
    assert {domains[label[:80]] for label in labels} == set(domains.values())
    again = explore_decoding(target(), drafter(), run=False)
    assert again.controls["example"].options == explorer.controls["example"].options


def decoding(prompts: Any = TEXTS, drafters: Any = None, **options: Any) -> DecodingExplorer:
    settings = {"temperature": 1.0, "max_new_tokens": 9} | options
    return explore_decoding(target(), drafters or drafter(), prompts, **settings)


def answer(prompt: Any, one: Drafter | None = None, **options: Any) -> tuple[Decoded, list[Round]]:
    """What `decode` answers to one prompt, and its rounds."""
    rounds: list[Round] = []
    settings = {"temperature": 1.0, "max_new_tokens": 9} | options
    return decode(target(), one, [prompt], on_round=rounds.append, **settings), rounds


def status_line(explorer: DecodingExplorer) -> ipywidgets.HTML:
    _, _, status, _, _, _ = explorer.children
    return status


def text_box(explorer: DecodingExplorer) -> ipywidgets.HTML:
    _, _, _, text, _, _ = explorer.children
    return text


def text_of(explorer: DecodingExplorer) -> str:
    return text_box(explorer).value


def status_of(explorer: DecodingExplorer) -> str:
    return status_line(explorer).value


def step_picture(explorer: DecodingExplorer) -> str:
    return explorer.children[-1].value


def buttons(explorer: DecodingExplorer) -> tuple[bool, bool]:
    """Which of Run and Stop can be clicked."""
    run, stop, drafts = explorer.children[1].children
    assert [run, stop, drafts] == [explorer.run_button, explorer.stop_button, explorer.drafts]
    return not run.disabled, not stop.disabled


IDLE, BUSY = (True, False), (False, True)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"seed": 3},
        {"temperature": 1.7, "seed": 1, "max_new_tokens": 15},
        {"threshold": 0.5, "temperature": 1.5},
    ],
    ids=str,
)
def test_a_run_gives_what_decode_gives_with_the_same_settings(settings):
    explorer = decoding(run=False)
    for name, value in settings.items():
        explorer.controls[name].value = value
    explorer.run()
    run, rounds = answer(TEXTS[0], drafter(), **settings)
    assert explorer.decoded.tokens == run.tokens
    pd.testing.assert_frame_equal(explorer.decoded.trace, run.trace)
    assert [r.tokens for r in explorer.rounds] == [r.tokens for r in rounds]
    alone = {name: value for name, value in settings.items() if name != "threshold"}
    assert explorer.plain.tokens == answer(TEXTS[0], None, **alone)[0].tokens
    # Settings that start an explorer are those of its first run.
    assert decoding(**settings).decoded.tokens == run.tokens


def test_nothing_is_run_before_it_is_asked_for():
    explorer = decoding(run=False)
    assert explorer.tables == {} and explorer.decoded is None and explorer.rounds == []
    with pytest.raises(ValueError, match="explore_decoding has nothing to show: not run yet"):
        explorer.table  # noqa: B018
    assert text_of(explorer) == "" and step_picture(explorer) == ""
    assert buttons(explorer) == IDLE
    explorer.run_button.click()
    assert explorer.decoded.tokens == answer(TEXTS[0], drafter())[0].tokens


def test_the_answer_of_the_chosen_drafter_is_shown():
    both = {"one": drafter(1), "two": drafter(2, block_size=3)}
    explorer = decoding(drafters=both)
    pd.testing.assert_frame_equal(explorer.tables["trace"], answer(TEXTS[0], both["one"])[0].trace)
    explorer.controls["drafter"].value = "two"
    explorer.run()
    pd.testing.assert_frame_equal(explorer.tables["trace"], answer(TEXTS[0], both["two"])[0].trace)


def test_choosing_an_example_fills_in_its_text():
    explorer = decoding([*TEXTS, [4, 5, 6]], run=False)
    example, prompt = explorer.controls["example"], explorer.controls["prompt"]
    assert [label for label, _ in example.options] == [*TEXTS, "[4, 5, 6]"]
    assert prompt.value == TEXTS[0]
    prompt.value = "w30"
    example.value = 2
    assert prompt.value == TEXTS[2]
    explorer.run()
    assert explorer.decoded.tokens == answer(TEXTS[2], drafter())[0].tokens
    example.value = 3
    assert prompt.value == ""
    explorer.run()
    assert explorer.decoded.tokens == answer([4, 5, 6], drafter())[0].tokens


def test_a_typed_prompt_wins_over_the_example():
    explorer = decoding([*TEXTS, [4, 5, 6]], run=False)
    for example in (0, 3):
        explorer.controls["example"].value = example
        explorer.controls["prompt"].value = "w40 w41"
        explorer.run()
        assert explorer.decoded.tokens == answer("w40 w41", drafter())[0].tokens
        # White space alone is no prompt.
        explorer.controls["prompt"].value = " \n"
        explorer.run()
        wanted = answer([*TEXTS, [4, 5, 6]][example], drafter())[0]
        assert explorer.decoded.tokens == wanted.tokens


def test_white_space_around_a_prompt_is_part_of_it():
    pocket = load_pair()
    text = "What is 2 + 3?\n\n"
    explorer = explore_decoding(pocket.target, pocket.drafter, [text], max_new_tokens=8)
    run = decode(pocket.target, pocket.drafter, [text], max_new_tokens=8)
    stripped = decode(pocket.target, pocket.drafter, [text.strip()], max_new_tokens=8)
    assert explorer.decoded.trace["confidence"].equals(run.trace["confidence"])
    assert not run.trace["confidence"].equals(stripped.trace["confidence"])


def test_long_and_broken_prompts_are_short_labels():
    explorer = decoding(["w1\n\n  w2", "w3 " * 50, [5] * 60], run=False)
    first, second, third = (label for label, _ in explorer.controls["example"].options)
    assert first == "w1 w2"
    assert second.endswith("…") and third.endswith("…") and len(second) <= len(third) == 90
    assert explorer.controls["prompt"].value == "w1\n\n  w2"
    tensors = decoding([torch.tensor([4, 5])], run=False)
    assert [label for label, _ in tensors.controls["example"].options] == ["[4, 5]"]


def test_a_threshold_of_0_verifies_every_slot():
    explorer = decoding(max_new_tokens=12)
    run, _ = answer(TEXTS[0], drafter(), max_new_tokens=12, threshold=None)
    pd.testing.assert_frame_equal(explorer.tables["rounds"], run.rounds)
    rounds = explorer.tables["rounds"]
    assert (rounds["verified"] == rounds["drafted"]).all() and rounds["verified"].sum() > 0
    explorer.controls["threshold"].value = 1.0
    explorer.run()
    assert explorer.tables["rounds"]["verified"].sum() == 0
    # And a drafter whose head there is none of can be looked at without one.
    bare = decoding(drafters=drafter(3, **HEADLESS))
    assert bare.tables["trace"]["confidence"].isna().all() and len(bare.tables["trace"])


def test_the_tables_are_those_of_the_run():
    explorer = decoding()
    run, rounds = answer(TEXTS[0], drafter())
    tables = explorer.tables
    assert list(tables) == ["tokens", "distributions", "rounds", "trace", "speed"]
    pd.testing.assert_frame_equal(tables["tokens"], outcome_table(run, to_text))
    pd.testing.assert_frame_equal(explorer.table, tables["tokens"])
    pd.testing.assert_frame_equal(tables["rounds"], run.rounds)
    pd.testing.assert_frame_equal(tables["trace"], run.trace)
    wanted = distribution_table(rounds[0], rounds[0].accepted, to_text)
    pd.testing.assert_frame_equal(tables["distributions"], wanted)
    speed = speed_table([explorer.plain], [explorer.decoded], 2)
    pd.testing.assert_frame_equal(tables["speed"], speed.to_frame().T)
    assert text_of(explorer) == outcome_legend(explorer.table) + outcome_text(explorer.table)


def test_the_line_below_a_run_says_how_fast_it_was():
    explorer = decoding()
    speed = explorer.tables["speed"].iloc[0]
    numbers = [float(n) for n in re.findall(r"\d+(?:\.\d+)?", status_of(explorer))]
    assert numbers == [
        len(explorer.decoded.tokens[0]),
        len(explorer.rounds),
        round(speed["tau"], 2),
        round(speed["tokens_per_second"]),
        round(speed["plain_tokens_per_second"]),
        round(speed["gain"], 2),
        *(round(100 * speed[part]) for part in ("draft", "verify", "rest")),
    ]


def test_every_slot_of_every_round_can_be_stepped_to():
    explorer = decoding(drafters=drafter(2, block_size=3), max_new_tokens=8, threshold=0.4, seed=3)
    rounds = explorer.rounds
    step = explorer.step
    assert len({r.accepted for r in rounds}) > 1 and len({r.verified for r in rounds}) > 1
    assert step["round"].max == len(rounds) - 1 and step["round"].value == 0
    for number in [*range(len(rounds)), 0]:
        step["round"].value = number
        assert step["slot"].max == rounds[number].verified
        assert step["slot"].value == rounds[number].accepted
        pictures = set()
        for slot in range(rounds[number].verified + 1):
            step["slot"].value = slot
            wanted = distribution_table(rounds[number], slot, to_text)
            pd.testing.assert_frame_equal(explorer.tables["distributions"], wanted)
            pictures.add(step_picture(explorer))
        assert len(pictures) == rounds[number].verified + 1
        assert all(shown.startswith("<img alt=") for shown in pictures)
    step["round"].value, step["slot"].value = 1000, 1000
    assert step["round"].value == len(rounds) - 1
    assert step["slot"].value == rounds[-1].verified


def test_a_step_draws_one_picture(monkeypatch):
    drawn = []
    draw = decoding_module.plot_distributions
    monkeypatch.setattr(
        decoding_module, "plot_distributions", lambda table: (drawn.append(table), draw(table))[1]
    )
    explorer = decoding(drafters=drafter(2, block_size=3), max_new_tokens=14, threshold=0.4, seed=3)
    assert len(drawn) == 1
    for number in range(1, len(explorer.rounds)):
        before = len(drawn)
        explorer.step["round"].value = number
        assert len(drawn) == before + 1
        pd.testing.assert_frame_equal(drawn[-1], explorer.tables["distributions"])
    before = len(drawn)
    explorer.run()
    assert len(drawn) == before + 1


def test_a_run_with_fewer_rounds_takes_the_steps_back():
    explorer = decoding(max_new_tokens=15)
    last = len(explorer.rounds) - 1
    explorer.step["round"].value = last
    explorer.step["slot"].value = explorer.step["slot"].max
    explorer.controls["max_new_tokens"].value = 3
    explorer.run()
    assert 1 <= len(explorer.rounds) < last
    step = explorer.step
    assert (step["round"].value, step["round"].max) == (0, len(explorer.rounds) - 1)
    assert step["slot"].value == explorer.rounds[0].accepted
    wanted = distribution_table(explorer.rounds[0], step["slot"].value, to_text)
    pd.testing.assert_frame_equal(explorer.tables["distributions"], wanted)
    explorer.controls["max_new_tokens"].value = 15
    explorer.run()
    assert step["round"].max == last and step["round"].value == 0


def test_an_answer_of_one_token_has_no_round_to_step_through():
    explorer = decoding(max_new_tokens=12)
    explorer.controls["max_new_tokens"].value = 1
    explorer.run()
    assert list(explorer.tables) == ["tokens", "rounds", "trace"]
    assert explorer.table["outcome"].tolist() == ["first"]
    assert len(explorer.tables["rounds"]) == len(explorer.tables["trace"]) == 0
    assert step_picture(explorer) == ""
    assert [(s.value, s.max) for s in explorer.step.values()] == [(0, 0), (0, 0)]
    assert "no round" in status_of(explorer) and "dspark-first" in text_of(explorer)
    assert buttons(explorer) == IDLE
    explorer.controls["max_new_tokens"].value = 9
    explorer.run()
    assert "speed" in explorer.tables


def refusal(explorer: DecodingExplorer) -> str:
    """The sentence that stands in place of an answer, of which nothing is left."""
    found = re.fullmatch(r'<p role="alert">(.*)</p>', status_of(explorer))
    assert found and "\n" not in found[1]
    assert explorer.tables == {} and explorer.decoded is None
    assert text_of(explorer) == "" and step_picture(explorer) == ""
    assert buttons(explorer) == IDLE
    return found[1]


def test_a_refused_setting_shows_a_sentence_and_can_be_left():
    explorer = decoding(drafters={"sure": drafter(), "bare": drafter(3, **HEADLESS)})
    explorer.controls["drafter"].value = "bare"
    explorer.controls["threshold"].value = 0.5
    explorer.run()
    assert "need a drafter with a confidence head" in refusal(explorer)
    with pytest.raises(ValueError, match="explore_decoding has nothing to show: threshold, sch"):
        explorer.table  # noqa: B018
    shown = explorer._repr_mimebundle_()["text/html"]
    assert 'role="alert"' in shown and "need a drafter with a confidence head" in shown
    for step in explorer.step.values():
        step.value = 1
    explorer.controls["threshold"].value = 0.0
    explorer.run_button.click()
    assert explorer.decoded.tokens == answer(TEXTS[0], drafter(3, **HEADLESS))[0].tokens
    assert "alert" not in status_of(explorer)


def test_an_answer_that_is_too_long_for_the_model_is_refused_in_the_loop_too():
    explorer = decoding(run=False)
    explorer.controls["prompt"].value = "w1 " * 2045

    async def click() -> None:
        explorer.run_button.click()
        await finished(explorer)

    asyncio.run(click())
    assert "must have at most 2048 tokens" in refusal(explorer)
    explorer.controls["prompt"].value = "w1"
    asyncio.run(click())
    assert explorer.decoded.tokens == answer("w1", drafter())[0].tokens


def failing(problem: Exception) -> Callable[..., Iterator[Round]]:
    def decode_rounds(*_: object, **__: object) -> Iterator[Round]:
        raise problem

    return decode_rounds


def test_a_sentence_is_shown_as_text(monkeypatch):
    explorer = decoding()
    monkeypatch.setattr(decoding_module, "decode_rounds", failing(ValueError("no <b>bold</b> & x")))
    explorer.run()
    assert refusal(explorer) == "no &lt;b&gt;bold&lt;/b&gt; &amp; x"


def test_an_error_that_is_no_refusal_is_not_hidden_and_leaves_the_buttons(monkeypatch):
    explorer = decoding()
    monkeypatch.setattr(decoding_module, "decode_rounds", failing(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        explorer.run()
    assert buttons(explorer) == IDLE and explorer.tables == {}
    monkeypatch.undo()
    explorer.run()
    assert explorer.tables["tokens"]["kept"].sum() == len(explorer.decoded.tokens[0])


async def finished(explorer: DecodingExplorer) -> None:
    """Waits until no run goes on."""
    for _ in range(10_000):
        if buttons(explorer) == IDLE:
            return
        await asyncio.sleep(0.001)
    raise AssertionError("the run does not end")


@pytest.fixture
def always_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that grows is shown after every round, however fast they are."""
    monkeypatch.setattr(decoding_module, "REDRAW_SECONDS", -1.0)


def kept_tokens(shown: str) -> int:
    """Tokens of the answer that the text shows."""
    return len(re.findall(r'<span class="dspark-(?:accepted|corrected|bonus|first)" ', shown))


def test_a_click_in_a_loop_returns_at_once_and_the_answer_grows(always_redrawn):
    explorer = decoding(max_new_tokens=15, run=False)
    seen: list[tuple[bool, int]] = []
    text_box(explorer).observe(
        lambda change: seen.append((explorer.decoded is None, kept_tokens(change["new"]))),
        names="value",
    )
    turns = 0

    async def click() -> None:
        nonlocal turns
        explorer.run_button.click()
        assert explorer.decoded is None and explorer.rounds == [] and seen == []
        assert buttons(explorer) == BUSY
        while buttons(explorer) == BUSY:
            turns += 1
            await asyncio.sleep(0)

    asyncio.run(click())
    run, rounds = answer(TEXTS[0], drafter(), max_new_tokens=15)
    assert explorer.decoded.tokens == run.tokens
    # One token before the first round, and then what each round adds.
    grown = [1 + sum(len(r.tokens) for r in rounds[: i + 1]) for i in range(len(rounds))]
    early = [count for going, count in seen if going]
    # The text of the last round and that of the whole are the same.
    assert early == grown and len(grown) > 3
    # Other work had its turn after every round, with the drafter and without.
    assert turns > len(rounds) + len(explorer.plain.rounds)
    assert "tokens/s" in status_of(explorer)


def test_without_a_redraw_due_the_answer_is_shown_at_its_start_and_its_end(monkeypatch):
    monkeypatch.setattr(decoding_module, "REDRAW_SECONDS", 1e9)
    explorer = decoding(max_new_tokens=15, run=False)
    seen: list[int] = []
    text_box(explorer).observe(lambda c: seen.append(kept_tokens(c["new"])), names="value")
    explorer.run()
    assert seen == [1 + len(explorer.rounds[0].tokens), len(explorer.decoded.tokens[0])]


def test_stop_ends_a_run_early_and_leaves_what_was_decoded(always_redrawn):
    explorer = decoding(max_new_tokens=200, run=False, temperature=1.3, seed=10)
    whole, rounds = answer(TEXTS[0], drafter(), max_new_tokens=200, temperature=1.3, seed=10)
    assert len(rounds) > 20

    async def click_and_stop() -> None:
        explorer.run_button.click()
        while len(explorer.rounds) < 3:
            await asyncio.sleep(0)
        explorer.stop_button.click()
        await finished(explorer)

    asyncio.run(click_and_stop())
    count = len(explorer.rounds)
    assert 3 <= count <= 4
    said = 1 + sum(len(r.tokens) for r in rounds[:count])
    assert explorer.decoded.tokens == [whole.tokens[0][:said]]
    assert len(explorer.tables["rounds"]) == count == explorer.step["round"].max + 1
    assert kept_tokens(text_of(explorer)) == said
    assert buttons(explorer) == IDLE
    # Neither does the answer without the drafter go on.
    assert len(explorer.plain.rounds) == 1
    explorer.controls["max_new_tokens"].value = 9
    explorer.run()
    whole = answer(TEXTS[0], drafter(), max_new_tokens=9, temperature=1.3, seed=10)[0]
    assert explorer.decoded.tokens == whole.tokens


def test_a_run_can_be_stopped_before_its_first_round():
    explorer = decoding(max_new_tokens=200, run=False, temperature=1.3, seed=10)

    async def click_and_stop() -> None:
        explorer.run_button.click()
        explorer.stop_button.click()
        await finished(explorer)

    asyncio.run(click_and_stop())
    assert len(explorer.rounds) == 1


def test_a_second_click_does_not_start_a_second_run(monkeypatch):
    begun = []
    original = decoding_module.decode_rounds

    def counted(target: Target, drafter: Drafter | None, *rest: Any, **options: Any) -> Any:
        begun.append(drafter is not None)
        return original(target, drafter, *rest, **options)

    explorer = decoding(max_new_tokens=15, run=False)
    monkeypatch.setattr(decoding_module, "decode_rounds", counted)

    async def click_twice(turns: int) -> None:
        explorer.run_button.click()
        for _ in range(turns):
            await asyncio.sleep(0.001)
        if buttons(explorer) == BUSY:
            explorer.run_button.click()
        await finished(explorer)
        await asyncio.sleep(0.01)

    run, rounds = answer(TEXTS[0], drafter(), max_new_tokens=15)
    for turns in (0, 2):
        begun.clear()
        asyncio.run(click_twice(turns))
        assert begun == [True, False]
        assert explorer.decoded.tokens == run.tokens
        assert [r.number for r in explorer.rounds] == [r.number for r in rounds]


def test_a_call_while_a_run_goes_on_is_refused_and_does_not_disturb_it():
    explorer = decoding(max_new_tokens=15, run=False)

    async def click_and_call() -> None:
        explorer.run_button.click()
        with pytest.raises(RuntimeError, match="a run must end or be stopped before the next"):
            explorer.run()
        await asyncio.sleep(0.001)
        assert explorer.tables == {}
        with pytest.raises(ValueError, match="explore_decoding has nothing to show: it runs"):
            explorer.table  # noqa: B018
        await finished(explorer)

    asyncio.run(click_and_call())
    assert explorer.decoded.tokens == answer(TEXTS[0], drafter(), max_new_tokens=15)[0].tokens


def test_steps_of_the_last_run_are_gone_while_the_next_one_goes_on():
    explorer = decoding(max_new_tokens=15)
    explorer.step["round"].value = last = len(explorer.rounds) - 1
    wanted = explorer.decoded.tokens

    async def move_while_it_runs() -> None:
        explorer.run_button.click()
        while len(explorer.rounds) < 2:
            await asyncio.sleep(0)
        assert step_picture(explorer) == ""
        explorer.step["round"].value = last
        explorer.step["slot"].value = 2
        assert [s.value for s in explorer.step.values()] == [0, 0]
        await finished(explorer)

    asyncio.run(move_while_it_runs())
    assert explorer.decoded.tokens == wanted
    assert explorer.step["round"].max == last and step_picture(explorer) != ""


def test_run_and_stop_take_turns():
    explorer = decoding(run=False)
    seen: list[tuple[str, bool, bool]] = []
    status_line(explorer).observe(
        lambda change: seen.append((change["new"].split()[0], *buttons(explorer))), names="value"
    )
    explorer.run()
    said = ["reading", "round", "and", f"{len(explorer.decoded.tokens[0])}"]
    assert {word: (run, stop) for word, run, stop in seen} == dict.fromkeys(said, BUSY)
    assert buttons(explorer) == IDLE


def test_readers_that_run_no_widgets_get_the_answer_and_no_timing():
    explorer, again = decoding(), decoding()
    one, other = explorer._repr_mimebundle_(include=None, exclude=None), again._repr_mimebundle_()
    assert one[WIDGET]["model_id"] == explorer.model_id
    assert one["text/html"] == other["text/html"] == text_of(explorer) != ""
    assert one["text/plain"] == other["text/plain"] == repr(explorer)
    assert set(one) == set(other) == {WIDGET, "text/plain", "text/html"}
    shown = json.dumps({k: v for k, v in one.items() if k != WIDGET})
    assert "tokens/s" not in shown and "times" not in shown
    explorer.run()
    assert explorer._repr_mimebundle_() == one
    explorer.controls["seed"].value = 5
    explorer.run()
    assert explorer._repr_mimebundle_()["text/html"] != one["text/html"]


def test_an_explorer_of_decoding_is_named_by_its_call_and_its_settings():
    explorer = decoding(seed=4, threshold=0.25)
    assert repr(explorer) == (
        "explore_decoding(example=0, prompt='w1 w2 w3', drafter='drafter', temperature=1.0, "
        "threshold=0.25, max_new_tokens=9, seed=4)"
    )
    for name, control in explorer.controls.items():
        assert control.description == name


def test_words_that_are_markup_are_shown_as_words():
    # Greedy, from a target that says its own words for markup and maths again and again.
    made = Target(tiny_target(vocab_size=VOCAB, tie_word_embeddings=False).model, TOKENIZER)
    made.model.generation_config.eos_token_id = made.model.config.eos_token_id = None
    with torch.no_grad():
        made.head_weight[3:] = 0.0
    explorer = explore_decoding(made, drafter(), TEXTS, temperature=1.0, max_new_tokens=40)
    words = set(explorer.table["text"])
    assert {"<b>", "$x$"} <= words
    assert "&lt;b&gt;" in text_of(explorer) and "<b>" not in text_of(explorer)
    assert "<b>" not in step_picture(explorer)


def test_ids_are_decoded_for_a_target_without_a_tokenizer():
    bare = tiny_target(vocab_size=VOCAB)
    made = tiny_drafter(1, vocab_size=VOCAB, block_size=2)
    made.use_target_embeddings(bare.embed_weight, bare.head_weight)
    explorer = explore_decoding(bare, made.eval(), [[1, 2, 3]], temperature=1.0, max_new_tokens=9)
    run = decode(bare, made, [[1, 2, 3]], temperature=1.0, max_new_tokens=9)
    assert explorer.decoded.tokens == run.tokens
    assert explorer.table["text"].tolist() == [f"{token} " for token in explorer.table["token"]]
    assert explorer.tables["distributions"]["text"].iloc[0].strip().isdigit()
    explorer.controls["prompt"].value = "w1"
    explorer.run()
    assert refusal(explorer) == "in memory has no tokenizer: a prompt must be token ids"
    rates = explore_acceptance(bare, made, [[1, 2], [3]], max_new_tokens=6, view="token kinds")
    assert set(rates.table["kind"]) <= {"number"}
    with pytest.raises(ValueError, match="in memory has no tokenizer: a prompt must be token ids"):
        explore_acceptance(bare, made, ["w1"])


def test_the_explorer_is_made_of_widgets_once():
    explorer = decoding()
    before = [id(child) for child in explorer.children]
    assert all(isinstance(child, ipywidgets.Widget) for child in explorer.children)
    explorer.controls["seed"].value = 2
    explorer.run()
    assert [id(child) for child in explorer.children] == before
    assert list(explorer.children[0].children) == list(explorer.controls.values())
    assert list(explorer.children[4].children) == list(explorer.step.values())


def test_drafts_in_vain_can_be_hidden_and_are_still_in_the_tables():
    explorer = decoding(max_new_tokens=15)
    table, whole = explorer.table, text_of(explorer)
    assert not table["kept"].all()
    explorer.drafts.value = False
    shown = outcome_legend(table) + outcome_text(table, drafts=False)
    assert text_of(explorer) == shown != whole
    assert explorer._repr_mimebundle_()["text/html"] == shown
    pd.testing.assert_frame_equal(explorer.table, table)
    explorer.run()
    assert text_of(explorer) == shown
    explorer.drafts.value = True
    assert text_of(explorer) == whole
    explorer.controls["prompt"].value = "w1 " * 2045
    explorer.run()
    explorer.drafts.value = False
    assert "must have at most 2048 tokens" in refusal(explorer)
