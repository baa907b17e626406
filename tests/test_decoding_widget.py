"""An answer in Chromium, on a page that needs no kernel: its slots, its rounds, its drafts."""

import json
from functools import cache
from typing import Any

import pytest

from dspark_lab.decoding import OTHERS, distribution_table, outcome_table
from dspark_lab.explore import DecodingExplorer, explore_decoding
from dspark_lab.explore.decoding import DecodingView
from dspark_lab.explore.widget import page
from tests.browsers import take_screenshot
from tests.screen import hard_to_read, unnamed
from tests.word_pair import TEXTS, drafter, target, to_text

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("one_thread", "unplaced")]


@cache
def explored() -> DecodingExplorer:
    """An answer with all outcomes, and so hot that drafts are accepted."""
    one = drafter(2, block_size=3)
    settings: dict[str, Any] = {"temperature": 8.0, "threshold": 0.4, "seed": 1}
    explorer = explore_decoding(target(), one, TEXTS[:1], max_new_tokens=24, **settings)
    assert set(explorer.table["outcome"]) == {
        *("accepted", "rejected", "not reached", "not verified", "corrected", "bonus", "first")
    }
    return explorer


def opened(open_page, state=None, **where):
    """A page with the widget, whose model is ``window.model``."""
    state = (state or explored().frame.state) | {"frame": 1}
    html, begin = page("answer", [DecodingView(state=state)]), "loaded[number].render({ model: "
    assert begin in html
    html = html.replace(begin, "window.revived = revived; loaded[number].render({ model: model = ")
    shown = open_page(html.replace("const loaded", "var model; const loaded"), **where)
    shown.wait_for_function("() => document.querySelector('.widget').dataset.frame === '1'")
    return shown


def change(shown, state, frame):
    """Give the widget another state, as an answer that grows does."""
    shown.evaluate(
        "([state, frame]) => model.set('state', { ...JSON.parse(state), frame })",
        [json.dumps(state), frame],
    )
    shown.wait_for_function(
        "frame => document.querySelector('.widget').dataset.frame === String(frame)", arg=frame
    )


def text(shown):
    return shown.locator(".dspark-answer-text")


def word(shown, number):
    """The token in a row of the table."""
    return shown.locator(f".dspark-answer-text .dspark-word[data-i='{number}']")


def words(shown):
    """Rows of the table whose tokens stand in the text, with how they do."""
    return [
        (int(i), name)
        for i, name in text(shown)
        .locator(".dspark-word")
        .evaluate_all("all => all.map(one => [one.dataset.i, one.classList[1]])")
    ]


def chosen(shown):
    return shown.evaluate("model.get('selection')")


def card_rows(shown):
    """The cells of the open slot's table, without its bars."""
    return shown.locator(".dspark-slot tbody tr").evaluate_all(
        """rows => rows.map(row => [...row.querySelectorAll("th, td:not([aria-hidden])")]
             .map(cell => cell.textContent))"""
    )


def as_shown(table):
    """What a distribution table reads like."""
    rows = []
    for row in table.itertuples():
        name = row.text if row.token < 0 else row.text.replace(" ", "␣")
        values = [row.draft, row.target, row.overlap, row.residual]
        marks = ["drafted"] * row.drafted + ["drawn by the target"] * row.drawn
        numbers = ["" if value != value else f"{value:.3f}" for value in values]
        rows.append([name, *numbers, ", ".join(marks)])
    return rows


def kept_rows(table):
    return table.index[table["kept"]].tolist()


def test_a_click_on_a_token_of_a_saved_page_opens_its_slot_in_place(open_page, tmp_path):
    explorer = explored()
    explorer.save_html(tmp_path / "answer.html")
    shown = open_page(tmp_path / "answer.html")
    table, rounds = explorer.table, explorer.rounds
    shown.get_by_label("drafts in vain").check()
    card = shown.locator(".dspark-slot")
    for number, token in table.iterrows():
        if card.count():
            shown.get_by_role("button", name="close", exact=True).click()
        word(shown, number).click()
        if token["round"] < 0:
            assert "nothing was drafted" in card.inner_text()
            continue
        one = rounds[token["round"]]
        # The target's own token stands where the round was decided.
        slot = token["slot"] if token["slot"] >= 0 else one.accepted
        assert card.get_attribute("data-round") == str(one.number)
        assert card.get_attribute("data-slot") == str(slot)
        assert token["outcome"] in card.locator("h3").inner_text()
        held = distribution_table(one, slot, to_text)
        assert held["text"].iloc[-1] == OTHERS and card_rows(shown) == as_shown(held)
        if slot < one.verified:
            assert f"in all {held['overlap'].sum():.3f}" in card.inner_text()
        below = word(shown, number).bounding_box()
        assert card.bounding_box()["y"] >= below["y"] + below["height"] - 4
        word(shown, number).click()
        assert card.count() == 0
        word(shown, number).click()


def test_a_card_stands_under_the_line_of_its_token(open_page):
    shown = opened(open_page, width=700)
    first = word(shown, 0)
    first.click()
    after = [i for i, _ in words(shown) if i > 0]
    tops = [word(shown, i).bounding_box() for i in after]
    card, line = shown.locator(".dspark-slot").bounding_box(), first.bounding_box()
    for box in tops:
        assert box["y"] < line["y"] + line["height"] or box["y"] >= card["y"] + card["height"] - 4


def test_arrows_step_through_slots_and_rounds_and_escape_closes(open_page):
    shown, rounds = opened(open_page), explored().rounds
    text(shown).focus()
    spoken = shown.locator("[aria-live=polite]").last
    slots = [(r.number, slot) for r in rounds for slot in range(r.last_slot + 1)]
    shown.keyboard.press("Home")
    assert chosen(shown) == {"round": -1, "slot": -1}
    for number, slot in slots:
        shown.keyboard.press("ArrowRight")
        assert chosen(shown) == {"round": number, "slot": slot}
        assert f"round {number}, slot {slot}: " in spoken.inner_text()
        held = distribution_table(rounds[number], slot, to_text)
        assert card_rows(shown) == as_shown(held)
    shown.keyboard.press("ArrowLeft")
    assert tuple(chosen(shown).values()) == slots[-2]
    shown.keyboard.press("ArrowUp")
    before = rounds[slots[-2][0] - 1]
    assert chosen(shown) == {"round": before.number, "slot": before.accepted}
    shown.keyboard.press("Escape")
    assert chosen(shown) is None and not shown.locator(".dspark-slot").count()
    shown.get_by_role("button", name="a round on").click()
    assert chosen(shown) == {"round": 0, "slot": rounds[0].accepted}
    shown.get_by_role("button", name="close", exact=True).click()
    assert chosen(shown) is None


def test_space_plays_the_rounds_and_arrows_step_in_them(open_page):
    explorer = explored()
    shown, table = opened(open_page), explorer.table
    text(shown).focus()
    shown.keyboard.press("Space")
    assert words(shown)[0][0] == 0 and len(words(shown)) < 6
    # It goes on by itself, round by round.
    shown.wait_for_function("() => document.querySelectorAll('.dspark-word.drafted').length > 0")
    shown.wait_for_function(
        """() => [...document.querySelectorAll(".dspark-answer-line span")]
             .some(one => one.textContent.startsWith("round 1 of"))"""
    )
    shown.keyboard.press("Space")
    assert shown.get_by_role("button", name="play the rounds").inner_text() == "▶ Play"
    shown.keyboard.press("Home")
    assert [i for i, _ in words(shown)] == [0]
    for one in explorer.rounds:
        shown.keyboard.press("ArrowRight")
        drafted = table.index[(table["round"] == one.number) & (table["slot"] >= 0)].tolist()
        assert [i for i, how in words(shown) if how == "drafted"] == drafted
        shown.keyboard.press("ArrowRight")
        said = [i for i in kept_rows(table) if table["round"][i] <= one.number]
        in_vain = [i for i in drafted if i not in said]
        assert [i for i, how in words(shown) if how != "vain"] == said
        assert [i for i, how in words(shown) if how == "vain"] == in_vain
    shown.keyboard.press("ArrowUp")
    shown.keyboard.press("ArrowUp")
    last = len(explorer.rounds) - 1
    place = f"round {last - 2} of 0 to {last}: accepted {explorer.rounds[last - 2].accepted} of "
    assert shown.get_by_text(place).count() == 1
    shown.keyboard.press("Escape")
    assert [i for i, _ in words(shown)] == kept_rows(table)


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 700), ("light", 700)])
def test_drafts_in_vain_are_off_at_first_and_legible_when_on(open_page, theme, width):
    shown, table = opened(open_page, theme=theme, width=width), explored().table
    assert [i for i, _ in words(shown)] == kept_rows(table)
    assert not shown.locator(".dspark-vain").count()
    box = shown.get_by_label("drafts in vain")
    assert not box.is_checked()
    box.check()
    assert [i for i, _ in words(shown)] == table.index.tolist()
    assert [i for i, how in words(shown) if how == "vain"] == table.index[~table["kept"]].tolist()
    refused = [i for i in table.index if table["outcome"][i] == "rejected"]
    assert all(word(shown, i).inner_text().startswith("✗") for i in refused)
    assert shown.get_by_text("not said:").count() == shown.locator(".dspark-vain").count() > 0
    word(shown, refused[0]).click()
    assert hard_to_read(shown.locator("body")) == []
    assert unnamed(shown.locator(".dspark-answer")) == []
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    counts = table["outcome"].value_counts()
    for outcome, count in counts.items():
        assert shown.get_by_role("listitem").filter(has_text=f"{outcome} {count}").count() >= 1
    take_screenshot(shown, f"decoding-{theme}-{width}")
    box.uncheck()
    assert [i for i, _ in words(shown)] == kept_rows(table)


def test_hover_tells_of_a_token(open_page):
    shown, table = opened(open_page), explored().table
    number = table.index[table["outcome"] == "accepted"][0]
    word(shown, number).hover()
    said = shown.locator(".dspark-answer > [aria-hidden]").last.inner_text()
    token = table.loc[number]
    assert f"round.slot {token['round']}.{token['slot']}" in said
    assert "accepted: drafted, and the target agreed" in said
    assert f"accept rate {token['accept_rate']:.2f}" in said
    assert f"draft probability {token['draft_prob']:.2f}" in said


def test_the_open_slot_stays_while_the_answer_grows_and_goes_with_it(open_page):
    whole = explored().frame.state
    rounds = whole["tokens"]["round"]
    short = {
        name: [value for value, number in zip(column, rounds, strict=True) if number < 2]
        for name, column in whole["tokens"].items()
    }
    grown = whole | {"tokens": short, "slots": [], "running": True}
    shown = opened(open_page, grown)
    word(shown, 1).click()
    before = chosen(shown)
    assert "come when the answer is whole" in shown.locator(".dspark-slot").inner_text()
    change(shown, whole, 2)
    assert chosen(shown) == before and card_rows(shown)
    other = explore_decoding(target(), drafter(3), TEXTS[1:2], max_new_tokens=9, temperature=1.0)
    change(shown, other.frame.state, 3)
    assert chosen(shown) is None and not shown.locator(".dspark-slot").count()
    table = outcome_table(other.decoded, to_text)
    assert [i for i, _ in words(shown)] == kept_rows(table)


def test_a_slot_chosen_in_python_is_opened_and_one_that_is_not_there_is_not(open_page):
    shown = opened(open_page)
    shown.evaluate("model.set('selection', { round: 1, slot: 0 })")
    card = shown.locator(".dspark-slot")
    assert card.get_attribute("data-round") == "1" and card.get_attribute("data-slot") == "0"
    shown.evaluate("model.set('selection', { round: 99, slot: 0 })")
    assert card.count() == 0
