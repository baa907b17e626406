"""Decoding: an answer as text, distributions, and the explorer that decodes while you watch."""

import asyncio
import re
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.text import Text

from dspark_lab import explore
from dspark_lab.chats import load_chats
from dspark_lab.decoding import (
    OTHERS,
    OUTCOMES,
    Decoded,
    Round,
    decode,
    decode_rounds,
    distribution_table,
    outcome_table,
)
from dspark_lab.explore import (
    DecodingExplorer,
    explore_decoding,
    outcome_legend,
    outcome_text,
    plot_outcomes,
)
from dspark_lab.explore import decoding as decoding_module
from dspark_lab.model import Drafter, save_drafter
from dspark_lab.pairs import drafter_names, load_pair, question
from dspark_lab.serving import speed_table
from tests.explorers import WIDGET
from tests.gallery import BONUS, NAN, REJECTED, UNASKED
from tests.pages import ANY_TEXT, ODD, Page
from tests.pictures import points, tick_names, title, words
from tests.samples import tiny_drafter, tiny_target
from tests.word_pair import HEADLESS, TEXTS, VOCAB, drafter, target, to_text

pytestmark = pytest.mark.usefixtures("one_thread", "unplaced")


@pytest.mark.parametrize("table", [REJECTED, BONUS], ids=["rejected", "bonus"])
def test_distributions_are_pairs_of_bars_filled_where_they_overlap(table):
    [ax] = explore.plot_distributions(table).axes
    filled, draft, also_filled, target = ax.containers
    columns = ("overlap", "draft", "overlap", "target")
    for bars, column in zip(ax.containers, columns, strict=True):
        assert [bar.get_width() for bar in bars] == table[column].tolist()
        assert [round(bar.get_y() + 0.17) for bar in bars] == [0, 1, 2, 3]
        assert {bar.get_facecolor()[3] for bar in bars} == {1.0 if column == "overlap" else 0.0}
    assert {bar.get_hatch() for bar in filled} != {bar.get_hatch() for bar in also_filled}
    both = zip(draft, target, strict=True)
    assert all(a.get_y() + a.get_height() <= b.get_y() + 1e-9 for a, b in both)
    [diamonds] = ax.lines
    assert points(diamonds) == [[x, row] for row, x in enumerate(table["residual"]) if x > 0]


def test_the_title_names_the_drafted_token_and_the_accept_rate():
    for table, drafted, expected in (
        (REJECTED, None, "drafted ␣the   accept rate 0.540"),
        (REJECTED, " 7$", r"drafted ␣7\$   accept rate 0.540"),
        (UNASKED, None, "drafted ␣the   the target was not asked"),
        (BONUS, None, "nothing drafted"),
    ):
        assert title(explore.plot_distributions(table, drafted).axes[0]) == expected


def test_tokens_are_named_as_they_are_written_and_the_drafted_and_the_drawn_marked_in_words():
    [ax] = explore.plot_distributions(REJECTED).axes
    assert tick_names(ax.yaxis) == ["␣the", r"\$x\$", "⏎", "(all others)"]
    assert ax.yaxis_inverted(), "the likeliest token on top"
    marks = {text.xy[1]: text.get_text() for text in ax.texts}
    assert marks == {0: "← drafted", 1: "← drawn by the target"}
    [both] = explore.plot_distributions(REJECTED.assign(drawn=REJECTED["drafted"])).axes
    assert words(both) == ["← drafted,\n    drawn by the target"]
    assert words(explore.plot_distributions(UNASKED).axes[0]) == ["← drafted"]
    [ax] = explore.plot_distributions(REJECTED.assign(text=["", "a", "b", OTHERS])).axes
    assert tick_names(ax.yaxis)[0] == "(id 3)"


@pytest.mark.parametrize("largest", [1.0 + 1e-7, 1.0, 0.3])
def test_the_words_beside_a_bar_begin_behind_it_and_end_inside_the_axes(largest):
    both = REJECTED.assign(drawn=REJECTED["drafted"], residual=0.0, target=[largest, 0, 0, 0])
    figure = explore.plot_distributions(both.assign(draft=[largest, 0, 0, 0]))
    figure.draw_without_rendering()
    [ax] = figure.axes
    [mark] = ax.texts
    box, end = mark.get_window_extent(), ax.transData.transform((largest, 0))[0]
    assert end + 2 < box.x0 and box.x1 < ax.get_window_extent().x1
    ticks = ax.get_xticks()
    assert len(ticks) > 3 and max(ticks) <= 1


def outcomes(*tokens: tuple[int, int, str, str], **numbers: float) -> pd.DataFrame:
    """An outcome table of tokens (round, slot, outcome, text)."""
    table = pd.DataFrame(tokens, columns=["round", "slot", "outcome", "text"])
    for name in ("confidence", "accept_rate", "accept_prob", "draft_prob", "target_prob"):
        table[name] = numbers.get(name, NAN)
    kept = ["accepted", "corrected", "bonus", "first"]
    return table.assign(token=table.index, position=0, kept=table["outcome"].isin(kept))


ROUNDS = outcomes(
    (-1, -1, "first", "To"),
    (0, 0, "accepted", " add"),
    (0, 1, "rejected", " <b>"),
    (0, 2, "not reached", "\n"),
    (0, -1, "corrected", " we"),
    (1, 0, "accepted", "\n"),
    (1, 1, "not verified", " x"),
    (1, -1, "bonus", "!"),
)


def test_each_draft_stands_before_what_came_in_its_place_in_the_class_of_its_outcome():
    page = Page(outcome_text(ROUNDS))
    assert page.text == "To add <b>⏎ we⏎\n x!"
    assert Page(outcome_text(ROUNDS, drafts=False)).text == "To add we⏎\n!"
    assert set(ROUNDS["outcome"]) == set(OUTCOMES)
    assert page.classes == [f"dspark-{outcome.replace(' ', '-')}" for outcome in ROUNDS["outcome"]]
    for source in (outcome_text(ROUNDS), outcome_legend(ROUNDS)):
        assert all(f".{name}{{" in source for name in Page(source).classes)


def test_what_is_not_part_of_the_answer_is_small_and_struck_through_or_faint():
    style = outcome_text(ROUNDS).partition("</style>")[0]
    rules = {line.partition("{")[0]: line for line in style.replace("\n ", " ").splitlines()}
    for outcome in OUTCOMES:
        rule = rules[f".dspark-{outcome.replace(' ', '-')}"]
        dropped = outcome in ("rejected", "not reached", "not verified")
        assert ("font-size:11px" in rule) == dropped
        assert ("line-through" in rule) == (outcome in ("rejected", "not reached"))
        assert ("opacity" in rule) == (outcome in ("not reached", "not verified"))


def test_the_tip_of_a_token_tells_its_place_and_its_numbers():
    numbers = {"confidence": 0.834, "accept_rate": 0.711, "draft_prob": 0.4, "target_prob": 0.125}
    [tip] = Page(outcome_text(outcomes((3, 2, "rejected", "a"), **numbers))).tips
    rates = "confidence 0.83, accept rate 0.71 · draft probability 0.40, target probability 0.12"
    assert tip == f"round.slot 3.2 · rejected · {rates}"
    unknown = outcomes((3, 2, "not verified", "a"), confidence=0.2, draft_prob=0.4)
    [tip] = Page(outcome_text(unknown)).tips
    assert tip == "round.slot 3.2 · not verified · confidence 0.20 · draft probability 0.40"
    tips = Page(outcome_text(ROUNDS)).tips
    assert tips[0] == "first token · first" and tips[4] == "round 0 · corrected"


def test_the_legend_counts_the_tokens_of_each_outcome():
    for table in (ROUNDS, ROUNDS.head(2)):
        counts = table["outcome"].value_counts()
        shown = [word for word in Page(outcome_legend(table)).words if word.strip()]
        assert shown == [f"{name} {counts[name]}" for name in OUTCOMES if name in counts]


@example(list(ODD))
@given(st.lists(ANY_TEXT, min_size=1, max_size=6))
def test_any_text_can_be_read_back_from_the_answer_and_is_no_markup(texts):
    table = outcomes(*((0, slot, "accepted", text) for slot, text in enumerate(texts)))
    page = Page(outcome_text(table))
    assert page.text.replace("⏎", "") == "".join(texts)
    assert page.tags == ["style", "div"] + ["span"] * len(texts)
    assert set(page.attributes) == {"class", "title"}


POCKET = str(Path(__file__).resolve().parents[1] / "data" / "pocket" / "target")


def test_target_and_drafter_may_be_folders(tmp_path):
    folder, pair = tmp_path / "mine", load_pair()
    made = tiny_drafter(vocab_size=pair.target.vocab_size, hidden_size=pair.target.hidden_size)
    save_drafter(made, folder)
    made.use_target_embeddings(pair.target.embed_weight, pair.target.head_weight)
    run = decode(pair.target, made.eval(), ["Hello"], max_new_tokens=4, temperature=1.0)
    for own in (folder, f"{folder}/", {"mine": folder}, {"mine": made}):
        explorer = explore.explore_acceptance(POCKET, own, ["Hello"], max_new_tokens=4)
        assert explorer.controls["drafter"].options == ("mine",)
        pd.testing.assert_frame_equal(explorer.tables["trace"], run.trace)


@pytest.mark.parametrize("explored", [explore.explore_acceptance, explore_decoding])
@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"drafter": None}, ValueError, "must be given together, got one of them"),
        ({"target": None}, ValueError, "must be given together, got one of them"),
        ({"prompts": []}, ValueError, "a prompt and a drafter at least, got 0 and 1"),
        ({"drafter": {}}, ValueError, "a prompt and a drafter at least, got 3 and 0"),
        ({"temperature": -0.5}, ValueError, "temperature must be >= 0.*, got -0.5"),
        ({"prompts": [7]}, TypeError, "each of prompts must be .*got 7"),
        ({"drafter": tiny_drafter()}, ValueError, "must share a vocabulary, got 64 and 66"),
        ({"target": "no/such-target"}, OSError, None),
        ({"drafter": "no/such-drafter"}, OSError, "such-drafter"),
        ({"prompts": "no-such-file.jsonl"}, OSError, "no-such-file"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_explored_is_refused_in_one_sentence(explored, arguments, error, match):
    given = {"target": target(), "drafter": drafter(), "prompts": TEXTS} | arguments
    # A slow explorer says of names on the hub when it has looked for them.
    with pytest.raises((error, ValueError), match=match):
        explored(**given).table  # noqa: B018


def test_the_pocket_pair_is_explored_where_nothing_is_given():
    explorer = explore.explore_acceptance(max_new_tokens=4)
    assert list(explorer.controls["drafter"].options) == drafter_names("pocket")
    pair = load_pair()
    asked = pair.held_out[:: len(pair.held_out) // 40]
    questions, domains = zip(*((question(chat), chat.domain) for chat in asked), strict=True)
    options = {"temperature": 1.0, "max_new_tokens": 4, "batch_size": 40}
    run = decode(pair.target, pair.drafter, questions, domains=domains, **options)
    assert 40 <= len(run.tokens) < 60 and len(set(run.trace["domain"])) > 2
    assert explorer.settings["view"] == "rates"
    pd.testing.assert_frame_equal(explorer.tables["trace"], run.trace)


def test_some_of_the_shipped_conversations_are_asked_of_a_target_of_ones_own():
    explorers = [explore_decoding(target(), drafter(), run=False) for _ in range(2)]
    labels, again = ([label for label, _ in e.controls["example"].options] for e in explorers)
    domains = {" ".join(question(chat).split())[:80]: chat.domain for chat in load_chats()}
    assert labels == again and len(labels) == 40 < len(domains)
    assert {domains[label[:80]] for label in labels} == set(domains.values())


def decoding(prompts: Any = TEXTS, drafters: Any = None, **options: Any) -> DecodingExplorer:
    settings = {"temperature": 1.0, "max_new_tokens": 9} | options
    return explore_decoding(target(), drafters or drafter(), prompts, **settings)


def answer(prompt: Any, one: Drafter | None = None, **options: Any) -> tuple[Decoded, list[Round]]:
    """What `decode` answers to one prompt, and its rounds."""
    rounds: list[Round] = []
    settings = {"temperature": 1.0, "max_new_tokens": 9} | options
    return decode(target(), one, [prompt], on_round=rounds.append, **settings), rounds


def same_answer(explorer: DecodingExplorer, prompt: Any, one: Drafter, **options: Any) -> None:
    """The explorer's last run is what `decode` answers."""
    run, rounds = answer(prompt, one, **options)
    assert explorer.decoded.tokens == run.tokens
    pd.testing.assert_frame_equal(explorer.tables["trace"], run.trace)
    assert [r.tokens for r in explorer.rounds] == [r.tokens for r in rounds]


STATUS, ANSWER, STEP = 2, 3, 5


def shown(explorer: DecodingExplorer, place: int) -> str:
    return explorer.children[place].value


def buttons(explorer: DecodingExplorer) -> tuple[bool, bool]:
    """Which of Run and Stop can be clicked."""
    return not explorer.run_button.disabled, not explorer.stop_button.disabled


IDLE, BUSY = (True, False), (False, True)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.7, "seed": 1, "max_new_tokens": 15},
        {"threshold": 0.5, "temperature": 1.5},
    ],
    ids=str,
)
def test_a_run_gives_what_decode_gives_with_the_same_settings(settings):
    moved = decoding(run=False)
    for name, value in settings.items():
        moved.controls[name].value = value
    moved.run()
    alone = {name: value for name, value in settings.items() if name != "threshold"}
    # Settings that start an explorer are those of its first run.
    for explorer in (moved, decoding(**settings)):
        same_answer(explorer, TEXTS[0], drafter(), **settings)
        assert explorer.plain.tokens == answer(TEXTS[0], None, **alone)[0].tokens
    further_out = decoding(temperature=3.0, max_new_tokens=600, run=False).settings
    assert (further_out["temperature"], further_out["max_new_tokens"]) == (3.0, 600)


def test_nothing_is_run_before_it_is_asked_for_and_then_the_chosen_drafter():
    both = {"one": drafter(1), "two": drafter(2, block_size=3)}
    explorer = decoding(drafters=both, run=False)
    assert explorer.tables == {} and explorer.decoded is None and explorer.rounds == []
    with pytest.raises(ValueError, match="explore_decoding has nothing to show: not run yet"):
        explorer.table  # noqa: B018
    assert shown(explorer, ANSWER) == "" and shown(explorer, STEP) == ""
    assert buttons(explorer) == IDLE
    for name, one in both.items():
        explorer.controls["drafter"].value = name
        explorer.run_button.click()
        same_answer(explorer, TEXTS[0], one)


def test_choosing_an_example_fills_in_its_text_and_a_typed_prompt_wins_over_it(monkeypatch):
    prompts = [*TEXTS, [4, 5, 6]]
    explorer = decoding(prompts, run=False)
    counted = mock.Mock(side_effect=decode_rounds)
    monkeypatch.setattr("dspark_lab.decoding.decode_rounds", counted)
    example, prompt = explorer.controls["example"], explorer.controls["prompt"]
    assert [label for label, _ in example.options] == [*TEXTS, "[4, 5, 6]"]
    assert prompt.value == TEXTS[0]
    for chosen in (2, 3):
        example.value = chosen
        assert prompt.value == (prompts[chosen] if chosen < 3 else "")
        # White space is part of a prompt, and alone it is none.
        for typed, asked in (
            (prompt.value, prompts[chosen]),
            (" w40\n\n", " w40\n\n"),
            (" \n", prompts[chosen]),
        ):
            prompt.value = typed
            explorer.run()
            assert [call.args[2] for call in counted.call_args_list[-2:]] == [[asked]] * 2
    same_answer(explorer, prompts[3], drafter())


def test_long_and_broken_prompts_are_short_labels():
    prompts = ["w1\n\n  w2", "w3 " * 50, [5] * 60, torch.tensor([4, 5])]
    explorer = decoding(prompts, run=False)
    first, second, third, tensor = (label for label, _ in explorer.controls["example"].options)
    assert first == "w1 w2" and tensor == "[4, 5]"
    assert second.endswith("…") and third.endswith("…") and len(second) <= len(third) == 90
    assert explorer.controls["prompt"].value == "w1\n\n  w2"


def test_the_tables_and_the_line_below_are_those_of_the_run():
    explorer = decoding()
    run, rounds = answer(TEXTS[0], drafter())
    speed = speed_table([explorer.plain], [explorer.decoded], 2)
    wanted = {
        "tokens": outcome_table(run, to_text),
        "distributions": distribution_table(rounds[0], rounds[0].accepted, to_text),
        "rounds": run.rounds,
        "trace": run.trace,
        "speed": speed.to_frame().T,
    }
    assert list(explorer.tables) == list(wanted)
    for name, table in wanted.items():
        pd.testing.assert_frame_equal(explorer.tables[name], table)
    pd.testing.assert_frame_equal(explorer.table, wanted["tokens"])
    assert shown(explorer, ANSWER) == outcome_legend(explorer.table) + outcome_text(explorer.table)
    numbers = [float(n) for n in re.findall(r"\d+(?:\.\d+)?", shown(explorer, STATUS))]
    assert numbers == [
        len(explorer.decoded.tokens[0]),
        len(explorer.rounds),
        round(speed["tau"], 2),
        round(speed["tokens_per_second"]),
        round(speed["plain_tokens_per_second"]),
        round(speed["gain"], 2),
        *(round(100 * speed[part]) for part in ("draft", "verify", "rest")),
    ]


def test_every_slot_of_every_round_can_be_stepped_to_and_a_step_draws_one_picture(monkeypatch):
    drawn = mock.Mock(side_effect=explore.plot_distributions)
    monkeypatch.setattr(decoding_module, "plot_distributions", drawn)
    explorer = decoding(drafters=drafter(2, block_size=3), max_new_tokens=10, threshold=0.4, seed=3)
    rounds, step = explorer.rounds, explorer.step
    assert len({r.accepted for r in rounds}) > 1 and len({r.verified for r in rounds}) > 1
    assert step["round"].max == len(rounds) - 1 and step["round"].value == 0
    assert drawn.call_count == 1
    for number in [*range(1, len(rounds)), 0]:
        drawn.reset_mock()
        step["round"].value = number
        assert drawn.call_count == 1
        assert step["slot"].value == rounds[number].accepted
        assert step["slot"].max == rounds[number].verified
        pictures = set()
        for slot in range(rounds[number].verified + 1):
            step["slot"].value = slot
            wanted = distribution_table(rounds[number], slot, to_text)
            pd.testing.assert_frame_equal(drawn.call_args.args[0], wanted)
            pictures.add(shown(explorer, STEP))
        pd.testing.assert_frame_equal(explorer.tables["distributions"], wanted)
        assert len(pictures) == rounds[number].verified + 1
        assert all(source.startswith("<img ") for source in pictures)
    step["round"].value, step["slot"].value = 1000, 1000
    assert step["round"].value == len(rounds) - 1
    assert step["slot"].value == rounds[-1].verified
    drawn.reset_mock()
    explorer.run()
    assert drawn.call_count == 1


def test_a_run_with_fewer_rounds_takes_the_steps_back_and_one_token_has_none():
    explorer = decoding(max_new_tokens=15)
    step, last = explorer.step, len(explorer.rounds) - 1
    step["round"].value = last
    step["slot"].value = step["slot"].max
    explorer.controls["max_new_tokens"].value = 3
    explorer.run()
    assert 1 <= len(explorer.rounds) < last
    assert (step["round"].value, step["round"].max) == (0, len(explorer.rounds) - 1)
    assert step["slot"].value == explorer.rounds[0].accepted
    explorer.controls["max_new_tokens"].value = 1
    explorer.run()
    assert list(explorer.tables) == ["tokens", "rounds", "trace"]
    assert explorer.table["outcome"].tolist() == ["first"]
    assert [(s.value, s.max) for s in step.values()] == [(0, 0), (0, 0)]
    assert "no round" in shown(explorer, STATUS) and "dspark-first" in shown(explorer, ANSWER)
    assert shown(explorer, STEP) == "" and buttons(explorer) == IDLE


def refusal(explorer: DecodingExplorer) -> str:
    """The sentence that stands in place of an answer, of which nothing is left."""
    found = re.fullmatch(r'<p role="alert">(.*)</p>', shown(explorer, STATUS))
    assert found and "\n" not in found[1]
    assert explorer.tables == {} and explorer.decoded is None
    assert shown(explorer, ANSWER) == "" and shown(explorer, STEP) == ""
    assert buttons(explorer) == IDLE
    return found[1]


def test_a_refused_setting_shows_a_sentence_and_can_be_left():
    explorer = decoding(drafters={"sure": drafter(), "bare": drafter(3, **HEADLESS)})
    explorer.controls["drafter"].value = "bare"
    explorer.controls["threshold"].value = 0.5
    for refused in (explorer.run, lambda: asyncio.run(clicked(explorer))):
        refused()
        assert "need a drafter with a confidence head" in refusal(explorer)
    with pytest.raises(ValueError, match="explore_decoding has nothing to show: threshold, sch"):
        explorer.table  # noqa: B018
    assert explorer._repr_mimebundle_()["text/html"] == shown(explorer, STATUS)
    for step in explorer.step.values():
        step.value = 1
    explorer.controls["threshold"].value = 0.0
    explorer.run_button.click()
    same_answer(explorer, TEXTS[0], drafter(3, **HEADLESS))
    assert "alert" not in shown(explorer, STATUS)


def test_an_error_that_is_no_refusal_is_not_hidden_and_leaves_the_buttons(monkeypatch):
    explorer = decoding()
    failing = mock.Mock(side_effect=RuntimeError("out of memory"))
    monkeypatch.setattr("dspark_lab.decoding.decode_rounds", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        explorer.run()
    assert buttons(explorer) == IDLE and explorer.tables == {}
    monkeypatch.undo()
    explorer.run()
    same_answer(explorer, TEXTS[0], drafter())


async def clicked(explorer: DecodingExplorer, rounds: int = 0, then: Any = None) -> None:
    """Click Run, and when it has so many rounds do something, then wait until it is done."""
    explorer.run_button.click()
    while len(explorer.rounds) < rounds:
        await asyncio.sleep(0)
    if then is not None:
        assert buttons(explorer) == BUSY
        then()
    while buttons(explorer) != IDLE:
        await asyncio.sleep(0)


@pytest.fixture
def always_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that grows is shown after every round, however fast they are."""
    monkeypatch.setattr(decoding_module, "REDRAW_SECONDS", -1.0)


def kept_tokens(source: str) -> int:
    """Tokens of the answer that the text shows."""
    return len(re.findall(r'<span class="dspark-(?:accepted|corrected|bonus|first)" ', source))


def seen_texts(explorer: DecodingExplorer) -> list[tuple[bool, int]]:
    """A list that will tell of each text shown whether a run goes on, and how much it shows."""
    seen: list[tuple[bool, int]] = []

    def see(change: Any) -> None:
        seen.append((explorer.decoded is None, kept_tokens(change["new"])))

    explorer.children[ANSWER].observe(see, names="value")
    return seen


def test_a_click_in_a_loop_returns_at_once_and_the_answer_grows(always_redrawn):
    explorer = decoding(max_new_tokens=15, run=False)
    seen, turns = seen_texts(explorer), 0

    async def click() -> None:
        nonlocal turns
        explorer.run_button.click()
        assert explorer.decoded is None and explorer.rounds == [] and seen == []
        assert buttons(explorer) == BUSY
        while buttons(explorer) == BUSY:
            turns += 1
            await asyncio.sleep(0)

    asyncio.run(click())
    same_answer(explorer, TEXTS[0], drafter(), max_new_tokens=15)
    # One token before the first round, and then what each round adds.
    grown = list(accumulate((len(r.tokens) for r in explorer.rounds), initial=1))[1:]
    # The text of the last round and that of the whole are the same.
    assert [count for going, count in seen if going] == grown and len(grown) > 3
    # Other work had its turn after every round, with the drafter and without.
    assert turns > len(explorer.rounds) + len(explorer.plain.rounds)
    assert "tokens/s" in shown(explorer, STATUS)


def test_without_a_redraw_due_the_answer_is_shown_at_its_start_and_its_end(monkeypatch):
    monkeypatch.setattr(decoding_module, "REDRAW_SECONDS", 1e9)
    explorer = decoding(max_new_tokens=15, run=False)
    seen = seen_texts(explorer)
    explorer.run()
    first, whole = 1 + len(explorer.rounds[0].tokens), len(explorer.decoded.tokens[0])
    assert seen == [(True, first), (False, whole)]


@pytest.mark.parametrize("after", [0, 3])
def test_stop_ends_a_run_early_and_leaves_what_was_decoded(always_redrawn, after):
    settings = {"max_new_tokens": 200, "temperature": 1.3, "seed": 10}
    explorer = decoding(run=False, **settings)
    whole, rounds = answer(TEXTS[0], drafter(), **settings)
    assert len(rounds) > 20
    asyncio.run(clicked(explorer, after, explorer.stop_button.click))
    count = len(explorer.rounds)
    assert max(1, after) <= count <= after + 1
    said = 1 + sum(len(r.tokens) for r in rounds[:count])
    assert explorer.decoded.tokens == [whole.tokens[0][:said]]
    assert len(explorer.tables["rounds"]) == count == explorer.step["round"].max + 1
    assert kept_tokens(shown(explorer, ANSWER)) == said
    # Neither does the answer without the drafter go on.
    assert len(explorer.plain.rounds) == 1
    explorer.controls["max_new_tokens"].value = 9
    explorer.run()
    same_answer(explorer, TEXTS[0], drafter(), temperature=1.3, seed=10)


@pytest.mark.parametrize("after", [0, 2])
def test_a_run_that_goes_on_is_not_disturbed_by_another_or_by_steps(monkeypatch, after):
    explorer = decoding(max_new_tokens=15)
    explorer.step["round"].value = last = len(explorer.rounds) - 1
    counted = mock.Mock(side_effect=decode_rounds)
    monkeypatch.setattr("dspark_lab.decoding.decode_rounds", counted)

    def disturb() -> None:
        explorer.run_button.click()
        with pytest.raises(RuntimeError, match="a run must end or be stopped before the next"):
            explorer.run()
        assert explorer.tables == {} and shown(explorer, STEP) == ""
        with pytest.raises(ValueError, match="explore_decoding has nothing to show: it runs"):
            explorer.table  # noqa: B018
        explorer.step["round"].value, explorer.step["slot"].value = last, 2
        assert [step.value for step in explorer.step.values()] == [0, 0]

    asyncio.run(clicked(explorer, after, disturb))
    assert [call.args[1] is not None for call in counted.call_args_list] == [True, False]
    same_answer(explorer, TEXTS[0], drafter(), max_new_tokens=15)
    assert explorer.step["round"].max == last > 2 and shown(explorer, STEP) != ""


def test_run_and_stop_take_turns():
    explorer = decoding(run=False)
    seen: dict[str, tuple[bool, bool]] = {}

    def see(change: Any) -> None:
        seen[change["new"].split()[0]] = buttons(explorer)

    explorer.children[STATUS].observe(see, names="value")
    explorer.run()
    said = ["reading", "round", "and", f"{len(explorer.decoded.tokens[0])}"]
    assert seen == dict.fromkeys(said, BUSY) and buttons(explorer) == IDLE


def test_widgets_are_made_once_and_readers_that_run_none_get_the_answer_and_no_timing():
    explorer = decoding()
    above, buttons, *_, steps, _ = before = list(explorer.children)
    assert list(above.children) == list(explorer.controls.values())
    run, stop = explorer.run_button, explorer.stop_button
    assert list(buttons.children) == [run, stop, explorer.drafts]
    assert list(steps.children) == list(explorer.step.values())
    one, other = explorer._repr_mimebundle_(include=None, exclude=None), decoding()
    assert one.pop(WIDGET)["model_id"] == explorer.model_id
    assert one.keys() == {"text/plain", "image/png"} and one["text/plain"] == repr(explorer)
    assert other._repr_mimebundle_()["image/png"] == one["image/png"]
    assert explorer._repr_mimebundle_()["image/png"] != "" != shown(explorer, ANSWER)
    picture = plot_outcomes(explorer.table)
    said = " ".join(text.get_text() for text in picture.findobj(Text))
    assert "accepted" in said and not any(word in said for word in ("tokens/s", "times"))
    explorer.controls["seed"].value = 5
    explorer.run()
    assert explorer._repr_mimebundle_()["image/png"] != one["image/png"]
    assert all(a is b for a, b in zip(before, explorer.children, strict=True))
    assert repr(explorer) == (
        "explore_decoding(example=0, prompt='w1 w2 w3', drafter='drafter', temperature=1.0, "
        "threshold=0.0, max_new_tokens=9, seed=5)"
    )


def test_ids_are_decoded_for_a_target_without_a_tokenizer():
    bare, made = tiny_target(vocab_size=VOCAB), tiny_drafter(1, vocab_size=VOCAB, block_size=2)
    made.use_target_embeddings(bare.embed_weight, bare.head_weight)
    explorer = explore_decoding(bare, made.eval(), [[1, 2, 3]], temperature=1.0, max_new_tokens=9)
    run = decode(bare, made, [[1, 2, 3]], temperature=1.0, max_new_tokens=9)
    assert explorer.decoded.tokens == run.tokens
    assert explorer.table["text"].tolist() == [f"{token} " for token in explorer.table["token"]]
    explorer.controls["prompt"].value = "w1"
    explorer.run()
    assert refusal(explorer) == "in memory has no tokenizer: a prompt must be token ids"
    rates = explore.explore_acceptance(
        bare, made, [[1, 2], [3]], max_new_tokens=6, view="token kinds"
    )
    assert set(rates.table["kind"]) <= {"number"}
    with pytest.raises(ValueError, match="in memory has no tokenizer: a prompt must be token ids"):
        explore.explore_acceptance(bare, made, ["w1"])


def test_drafts_in_vain_can_be_hidden_and_are_still_in_the_tables():
    explorer = decoding(max_new_tokens=15)
    table, whole = explorer.table, shown(explorer, ANSWER)
    assert not table["kept"].all()
    explorer.drafts.value = False
    without = outcome_legend(table) + outcome_text(table, drafts=False)
    assert shown(explorer, ANSWER) == without != whole
    pd.testing.assert_frame_equal(explorer.table, table)
    explorer.run()
    assert shown(explorer, ANSWER) == without
    explorer.drafts.value = True
    assert shown(explorer, ANSWER) == whole
    explorer.controls["prompt"].value = "w1 " * 2045
    explorer.run()
    explorer.drafts.value = False
    assert "must have at most 2048 tokens" in refusal(explorer)
