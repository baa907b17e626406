"""Decoding: an answer as a picture, distributions, and the explorer that decodes as you watch."""

import json
import re
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import pytest
import torch

import dspark_lab as lab
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
from dspark_lab.explore import DecodingExplorer, explore_decoding, plot_outcomes
from dspark_lab.explore import decoding as decoding_module
from dspark_lab.explore.decoding import REPEATS, short_prompt
from dspark_lab.model import Drafter, save_drafter
from dspark_lab.pairs import drafter_names, load_pair, question
from dspark_lab.serving import repeated_speeds
from tests.explorers import WIDGET, alert, edit, panel
from tests.gallery import ANSWER, BONUS, REJECTED, UNASKED
from tests.pictures import points, tick_names, title
from tests.pictures import words as words_on
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
    assert words_on(both) == ["← drafted,\n    drawn by the target"]
    assert words_on(explore.plot_distributions(UNASKED).axes[0]) == ["← drafted"]
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


def written(table: pd.DataFrame) -> list[str]:
    """The key of the picture, and its text row by row."""
    [ax] = plot_outcomes(table).axes
    return [" ".join(text.get_text().split()) for text in ax.texts]


def test_the_picture_reads_as_the_answer_under_its_key():
    key = "accepted 2 corrected 1 bonus 1 first 1"
    assert written(ANSWER) == [key, "To add we⏎", "!"]


def test_drafts_in_vain_say_that_they_were_not_said(monkeypatch):
    drawn = mock.Mock(side_effect=decoding_module.text_figure)
    monkeypatch.setattr(decoding_module, "text_figure", drawn)
    plot_outcomes(ANSWER, drafts=True)
    pieces, key = drawn.call_args.args
    assert "".join(text for text, _ in pieces) == "To add not said: <b>⏎  we\n not said: x !"
    assert sorted(name for name, _ in key) == sorted(
        f"{outcome} {(ANSWER['outcome'] == outcome).sum()}" for outcome in OUTCOMES
    )


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
    explorers = [explore_decoding(target(), drafter()) for _ in range(2)]
    labels, again = (e.controls["example"].labels for e in explorers)
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


def words(explorer: DecodingExplorer) -> str:
    """The line above the answer."""
    assert explorer.frame.state is not None
    return explorer.frame.state["words"]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.7, "seed": 1, "max_new_tokens": 15},
        {"threshold": 0.5, "temperature": 1.5},
    ],
    ids=str,
)
def test_an_answer_is_what_decode_gives_with_the_same_settings(settings):
    moved = decoding()
    moved.choose(**settings)
    alone = {name: value for name, value in settings.items() if name != "threshold"}
    # Settings that start an explorer are those of its first answer.
    for explorer in (moved, decoding(**settings)):
        same_answer(explorer, TEXTS[0], drafter(), **settings)
        assert explorer.plain.tokens == answer(TEXTS[0], None, **alone)[0].tokens
    further_out = decoding(temperature=3.0, max_new_tokens=600).settings
    assert (further_out["temperature"], further_out["max_new_tokens"]) == (3.0, 600)


def test_every_drafter_can_be_chosen():
    both = {"one": drafter(1), "two": drafter(2, block_size=3)}
    explorer = decoding(drafters=both)
    for name, one in both.items():
        assert explorer.controls["drafter"].options == tuple(both)
        edit(explorer, drafter=list(both).index(name))
        same_answer(explorer, TEXTS[0], one)


def test_a_typed_prompt_wins_over_the_example_which_says_so(monkeypatch):
    prompts = [*TEXTS, [4, 5, 6]]
    explorer = decoding(prompts)
    counted = mock.Mock(side_effect=decode_rounds)
    monkeypatch.setattr("dspark_lab.decoding.decode_rounds", counted)
    assert explorer.controls["example"].labels == [*TEXTS, "[4, 5, 6]"]
    # White space is part of a prompt, and alone it is none.
    for example, typed, asked in (
        (2, "", TEXTS[2]), (3, "", prompts[3]), (3, " w40\n\n", " w40\n\n"), (3, " \n", prompts[3]),
    ):  # fmt: skip
        counted.reset_mock()
        explorer.choose(example=example, prompt=typed)
        assert explorer.decoded is not None
        assert [call.args[2] for call in counted.call_args_list] == [[asked]] * (1 + 2 * REPEATS)
        assert bool(typed.strip()) == explorer.controls["example"].disabled
        assert explorer.frame.state["asked"] == short_prompt(asked)
    same_answer(explorer, prompts[3], drafter())


def test_long_and_broken_prompts_are_short_labels():
    prompts = ["w1\n\n  w2", "w3 " * 50, [5] * 60, torch.tensor([4, 5])]
    first, second, third, tensor = decoding(prompts).controls["example"].labels
    assert first == "w1 w2" and tensor == "[4, 5]"
    assert second.endswith("…") and third.endswith("…") and len(second) <= len(third) == 90


def test_controls_without_effect_say_why_and_have_none():
    explorer = decoding(drafters={"sure": drafter(), "bare": drafter(3, **HEADLESS)})
    explorer.choose(drafter="bare", threshold=0.5, temperature=0.0)
    _ = explorer.frame
    reasons = {
        name: control.reason for name, control in explorer.controls.items() if control.reason
    }
    assert reasons == {
        "threshold": "this drafter has no confidence head",
        "seed": "at temperature 0 nothing is drawn",
    }
    same_answer(explorer, TEXTS[0], drafter(3, **HEADLESS), temperature=0.0)
    explorer.choose(drafter="sure", temperature=1.0)
    same_answer(explorer, TEXTS[0], drafter(), threshold=0.5)
    assert not any(control.reason for control in explorer.controls.values())


def test_the_tables_and_the_line_above_are_those_of_the_runs():
    explorer = decoding()
    run, rounds = answer(TEXTS[0], drafter())
    runs = explorer.frame.detail
    assert len(runs.plain) == len(runs.drafted) == REPEATS
    assert [one.tokens for one in runs.drafted] == [run.tokens] * REPEATS
    speed = repeated_speeds(runs.plain, runs.drafted, 2)
    wanted = {
        "tokens": outcome_table(run, to_text),
        "distributions": distribution_table(rounds[0], rounds[0].accepted, to_text),
        "rounds": run.rounds,
        "trace": run.trace,
        "speed": speed,
    }
    assert list(explorer.tables) == list(wanted)
    for name, table in wanted.items():
        pd.testing.assert_frame_equal(explorer.tables[name], table)
    middle, low, high = (row for _, row in speed.iterrows())
    assert re.findall(r"\d+(?:\.\d+)?", words(explorer).replace(",", "")) == [
        f"{len(run.tokens[0])}",
        f"{len(rounds)}",
        f"{run.tau:.2f}",
        f"{middle['break_even_tau']:.2f}",
        f"{middle['tokens_per_second']:.0f}",
        f"{middle['plain_tokens_per_second']:.0f}",
        f"{middle['speedup']:.2f}",
        f"{REPEATS}",
        f"{low['speedup']:.2f}",
        f"{high['speedup']:.2f}",
        *(f"{100 * middle[part]:.0f}" for part in ("draft", "verify", "rest")),
    ]


def test_every_slot_of_every_round_can_be_opened():
    explorer = decoding(drafters=drafter(2, block_size=3), max_new_tokens=10, threshold=0.4, seed=3)
    rounds = explorer.rounds
    assert len({r.accepted for r in rounds}) > 1 and len({r.verified for r in rounds}) > 1
    for number, one in enumerate(rounds):
        explorer.select(number)
        assert explorer.selection == {"round": number, "slot": one.accepted}
        last = max(len(one.drafted) - 1, one.verified)
        for slot in range(last + 1):
            explorer.select(number, slot)
            wanted = distribution_table(one, slot, to_text)
            pd.testing.assert_frame_equal(explorer.tables["distributions"], wanted)
        with pytest.raises(ValueError, match=rf"slot must be in \[0, {last}\], got {last + 1}"):
            explorer.select(number, last + 1)
    with pytest.raises(ValueError, match=f"round must be below {len(rounds)}, got"):
        explorer.select(len(rounds))
    # The first token has no distributions, and a slot may be gone from the next answer.
    for gone in ({"round": -1, "slot": -1}, {"round": 99, "slot": 0}, {"round": 0, "slot": 99}):
        explorer.view.selection = gone
        first = distribution_table(rounds[0], rounds[0].accepted, to_text)
        pd.testing.assert_frame_equal(explorer.tables["distributions"], first)


def test_an_answer_of_one_token_has_no_round():
    explorer = decoding(max_new_tokens=1)
    assert list(explorer.tables) == ["tokens", "rounds", "trace"]
    assert explorer.table["outcome"].tolist() == ["first"]
    assert explorer.rounds == [] and words(explorer) == "1 tokens, no round"
    with pytest.raises(ValueError, match="round must be below 0, got 0"):
        explorer.select(0)


def test_a_refused_setting_shows_a_sentence_beside_the_last_answer_and_can_be_left():
    explorer = decoding()
    before = explorer.frame.state
    explorer.controls["prompt"].value = "w1 " * 2045
    assert "must have at most 2048 tokens" in alert(explorer)
    assert explorer.decoded is None and explorer.rounds == []
    assert explorer.view.state["tokens"] == before["tokens"]
    explorer.reset()
    same_answer(explorer, TEXTS[0], drafter())


def test_the_widget_is_given_the_tables():
    explorer = decoding(drafters=drafter(2, block_size=3), max_new_tokens=10, threshold=0.4, seed=3)
    given, table = explorer.frame.state, explorer.table
    tokens = pd.DataFrame(given["tokens"])
    tokens["outcome"] = [OUTCOMES[number] for number in tokens["outcome"]]
    pd.testing.assert_frame_equal(tokens, table[list(tokens)], check_dtype=False, atol=1e-6)
    for one, slots in zip(explorer.rounds, given["slots"], strict=True):
        assert len(slots) == max(len(one.drafted) - 1, one.verified) + 1
        for slot, held in enumerate(slots):
            wanted = distribution_table(one, slot, to_text)
            assert held["ids"] == wanted["token"].tolist()
            assert held["texts"] == wanted["text"].tolist()
            for name in ("drafted", "drawn"):
                marked = wanted.index[wanted[name]].tolist()
                assert [held[name]] == (marked or [-1])
            for name in ("draft", "target", "overlap", "residual"):
                if held[name] is None:
                    assert slot > one.verified and wanted[name].isna().all()
                else:
                    assert held[name] == pytest.approx(wanted[name].tolist(), abs=1e-6)
    assert json.loads(json.dumps(given)) == given


@pytest.fixture
def always_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that grows is shown after every round, however fast they are."""
    monkeypatch.setattr(decoding_module, "REDRAW_SECONDS", -1.0)


def said_tokens(state: dict[str, Any]) -> int:
    """Tokens of the answer that the widget is given."""
    kept = [OUTCOMES.index(name) for name in ("accepted", "corrected", "bonus", "first")]
    return sum(outcome in kept for outcome in state["tokens"]["outcome"])


def seen_states(explorer: DecodingExplorer) -> list[dict[str, Any]]:
    """A list that will hold each state that the widget is given."""
    seen: list[dict[str, Any]] = []
    assert explorer.view is not None
    explorer.view.observe(lambda change: seen.append(change["new"]), names="state")
    return seen


def test_an_answer_grows_and_can_be_opened_before_its_speed_is_known(always_redrawn):
    explorer = decoding()
    _ = explorer.frame
    seen = seen_states(explorer)
    explorer.controls["max_new_tokens"].value = 15
    same_answer(explorer, TEXTS[0], drafter(), max_new_tokens=15)
    # One token before the first round, and then what each round adds.
    grown = list(accumulate((len(r.tokens) for r in explorer.rounds), initial=1))[1:]
    *growing, whole, end = seen
    assert [said_tokens(state) for state in growing] == grown and len(grown) > 3
    assert all(state["running"] and state["slots"] == [] for state in growing)
    assert whole["running"] and not end["running"] and "tokens/s" not in whole["words"]
    assert whole["slots"] == end["slots"] and len(end["slots"]) == len(explorer.rounds)
    assert end["words"] == words(explorer) and "tokens/s" in end["words"]


def test_without_a_redraw_due_the_answer_is_shown_at_its_start_and_its_end(monkeypatch):
    monkeypatch.setattr(decoding_module, "REDRAW_SECONDS", 1e9)
    explorer = decoding()
    _ = explorer.frame
    seen = seen_states(explorer)
    explorer.controls["max_new_tokens"].value = 15
    whole = len(explorer.decoded.tokens[0])
    assert [said_tokens(s) for s in seen] == [1 + len(explorer.rounds[0].tokens), whole, whole]


def cancelled(monkeypatch: pytest.MonkeyPatch, calls: int, **settings: Any) -> DecodingExplorer:
    """An explorer whose user cancels at so many tellings of its progress."""
    explorer = decoding(**settings)
    _ = explorer.frame
    told = 0

    def tell(*said: Any) -> None:
        nonlocal told
        told += said[0] > 0
        if told == calls:
            explorer.cancel()

    monkeypatch.setattr(explorer._worker, "_report", tell)
    explorer.redraw()
    return explorer


@pytest.mark.parametrize("after", [1, 3])
def test_cancel_ends_an_answer_early_and_leaves_what_was_decoded(monkeypatch, after):
    settings = {"max_new_tokens": 60, "temperature": 1.3, "seed": 10}
    whole, rounds = answer(TEXTS[0], drafter(), **settings)
    explorer = cancelled(monkeypatch, after, **settings)
    # The round that was under way is kept.
    said = 1 + sum(len(r.tokens) for r in rounds[: after + 1])
    assert explorer.decoded.tokens == [whole.tokens[0][:said]] and explorer.plain is None
    assert len(explorer.tables["rounds"]) == len(explorer.rounds) == after + 1 < len(rounds)
    assert "speed" not in explorer.tables and said_tokens(explorer.view.state) == said
    assert words(explorer).endswith("The answer was cancelled.")
    assert panel(explorer).state["again"] and panel(explorer).state["problem"] == ""
    monkeypatch.undo()
    explorer._act({"action": "again"})
    same_answer(explorer, TEXTS[0], drafter(), **settings)
    assert not panel(explorer).state["again"]


def test_cancel_of_the_measuring_leaves_the_answer_and_the_runs_that_ended(monkeypatch):
    run, rounds = answer(TEXTS[0], drafter())
    steps = len(answer(TEXTS[0], None)[1])
    for calls, runs in ((len(rounds), 0), (2 * len(rounds) + steps, 1)):
        explorer = cancelled(monkeypatch, calls)
        assert explorer.decoded.tokens == run.tokens
        assert ("speed" in explorer.tables) == bool(runs)
        if runs:
            assert explorer.tables["speed"]["runs"].tolist() == [runs] * 3
        assert words(explorer).endswith("The measuring of its speed was cancelled.")
        monkeypatch.undo()


def test_the_newest_setting_wins_over_an_answer_that_grows(always_redrawn):
    explorer = decoding(max_new_tokens=100)
    for seed in (1, 2, 3):
        explorer.controls["seed"].value = seed
    same_answer(explorer, TEXTS[0], drafter(), max_new_tokens=100, seed=3)
    assert explorer.view.state["tokens"] == explorer.frame.state["tokens"]


def test_an_error_that_is_no_refusal_is_not_hidden(monkeypatch):
    explorer = decoding()
    _ = explorer.frame
    failing = mock.Mock(side_effect=RuntimeError("out of memory"))
    monkeypatch.setattr("dspark_lab.decoding.decode_rounds", failing)
    explorer.redraw()
    with pytest.raises(RuntimeError, match="out of memory"):
        _ = explorer.frame
    monkeypatch.undo()
    explorer.redraw()
    same_answer(explorer, TEXTS[0], drafter())


def test_readers_that_run_no_widgets_get_the_answer_and_no_timing():
    explorer = decoding()
    one, other = explorer._repr_mimebundle_(include=None, exclude=None), decoding()
    assert one.pop(WIDGET)["model_id"] == explorer.model_id
    assert one.keys() == {"text/plain", "image/png"} and one["text/plain"] == repr(explorer)
    assert other._repr_mimebundle_()["image/png"] == one["image/png"]
    said = " ".join(written(explorer.table))
    assert "accepted" in said and not any(word in said for word in ("tokens/s", "times"))
    explorer.controls["seed"].value = 5
    assert explorer._repr_mimebundle_()["image/png"] != one["image/png"]


def test_the_view_as_code_makes_it_again():
    explorer = decoding()
    explorer.choose(seed=5, example=1, prompt="w9")
    names: dict[str, Any] = {"lab": lab, "target": target(), "drafter": drafter(), "prompts": TEXTS}
    exec(explorer.code, names)
    assert names["explorer"].settings == explorer.settings
    same_answer(names["explorer"], "w9", drafter(), seed=5)


def test_ids_are_decoded_for_a_target_without_a_tokenizer():
    bare, made = tiny_target(vocab_size=VOCAB), tiny_drafter(1, vocab_size=VOCAB, block_size=2)
    made.use_target_embeddings(bare.embed_weight, bare.head_weight)
    explorer = explore_decoding(bare, made.eval(), [[1, 2, 3]], temperature=1.0, max_new_tokens=9)
    run = decode(bare, made, [[1, 2, 3]], temperature=1.0, max_new_tokens=9)
    assert explorer.decoded.tokens == run.tokens
    assert explorer.table["text"].tolist() == [f"{token} " for token in explorer.table["token"]]
    explorer.controls["prompt"].value = "w1"
    assert alert(explorer) == "in memory has no tokenizer: a prompt must be token ids"
    rates = explore.explore_acceptance(
        bare, made, [[1, 2], [3]], max_new_tokens=6, view="token kinds"
    )
    assert set(rates.table["kind"]) <= {"number"}
    with pytest.raises(ValueError, match="in memory has no tokenizer: a prompt must be token ids"):
        explore.explore_acceptance(bare, made, ["w1"])
