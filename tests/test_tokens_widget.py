"""The text of explore_anchors in Chromium, on a page that needs no kernel."""

import json
import re
from base64 import b64encode

import pytest
import torch

from dspark_lab import explore
from dspark_lab.blocks import cut_blocks, draw_blocks
from dspark_lab.chats import collate, pack
from dspark_lab.explore.tokens import TokensView
from tests.browsers import open_widget, take_screenshot
from tests.draws import PAD
from tests.pictures import contrast
from tests.samples import documents
from tests.screen import hard_to_read, unnamed

pytestmark = pytest.mark.browser

WORDS = " the sky is blue for light of short waves is scattered most , so blue reaches us .\n"


def to_text(token_id):
    words = WORDS.split(" ")
    return f" {words[1 + token_id % (len(words) - 1)]}"


def state_of(batch, blocks, own=None):
    """A state as the explorer makes it, of the first row; ``own`` are blocks of another mask."""
    state = explore.token_state(batch, blocks, name="given mask") | {"own": None, "frame": 1}
    row = explore.token_row(batch, to_text)
    if own is not None:
        state["own"] = explore.token_state(batch, own, name="the lab's own mask")
    return state | {"row": row | {"own": row if own is not None else None}}


def small():
    """Anchors 20, 22 and 30 of two documents, the second from 40 on."""
    batch = pack(documents("." * 18 + "a" * 22, "." * 4 + "a" * 16), 63, PAD)
    anchors, keep = torch.tensor([[20, 22, 30, 0]]), torch.tensor([[True, True, True, False]])
    return batch, cut_blocks(batch, anchors, keep, 4)


def long(marks=200, seed=0, num_anchors=64):
    batch = pack(documents(*["." * 8 + "a" * 40] * marks), 48 * marks, PAD)
    return batch, draw_blocks(batch, num_anchors, 7, seed=seed)


def opened(open_page, state, **where):
    """A page with the widget, whose model is ``window.model``."""
    return open_widget(open_page, TokensView(state=state), **where)


def change(shown, state, frame):
    """Give the widget another state, as a slider does."""
    given = json.dumps(state, default=lambda v: {"base64": b64encode(v).decode("ascii")})
    shown.evaluate(
        "([state, frame]) => model.set('state', { ...revived(JSON.parse(state)), frame })",
        [given, frame],
    )
    shown.wait_for_function(
        "frame => document.querySelector('.widget').dataset.frame === String(frame)", arg=frame
    )


def token(shown, number):
    return shown.locator(f".t[data-token='{number}']").first


def with_class(shown, name):
    found = shown.locator(f".tokens-lines .t.{name}").evaluate_all(
        "all => all.map(one => Number(one.dataset.token))"
    )
    return sorted(set(found))


def card(shown):
    return shown.locator(".tokens-card").inner_text()


def top(shown):
    return shown.locator(".tokens-text").evaluate("box => box.scrollTop")


def first_in_view(shown):
    """The number at the beginning of the first line in view."""
    return shown.locator(".tokens-text").evaluate(
        """box => Math.min(...[...box.querySelectorAll(".tokens-line")]
            .filter(line => line.offsetTop + line.offsetHeight > box.scrollTop + 1)
            .map(line => Number(line.querySelector(".t")?.dataset.token ?? 1e9)))"""
    )


@pytest.mark.parametrize(("theme", "width"), [("light", 700), ("dark", 1600)])
def test_hover_tells_of_a_token_and_lights_up_the_blocks_that_cover_it(open_page, theme, width):
    shown = opened(open_page, state_of(*small()), theme=theme, width=width)
    token(shown, 24).hover()
    said = shown.locator(".dspark-tokens > [aria-hidden]").last.inner_text()
    for fact in ("position 24", "id 24", "document 0", "supervised 2 times", "can be an anchor"):
        assert fact in said
    assert "by block 0, slot 3, anchor 20" in said and "by block 1, slot 1, anchor 22" in said
    assert with_class(shown, "chosen") == [20, 22]
    assert with_class(shown, "label") == [21, 23, 24, 25, 26]
    assert hard_to_read(shown.locator("body")) == []
    assert unnamed(shown.locator(".dspark-tokens")) == []
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shown.mouse.move(1, 1)
    assert with_class(shown, "chosen") == [] and not shown.locator(".t.label").count()
    take_screenshot(shown, f"tokens-{theme}-{width}")


def test_a_click_on_an_anchor_lights_its_block_context_and_labels_until_escape(open_page):
    shown = opened(open_page, state_of(*small()))
    token(shown, 22).click()
    shown.mouse.move(1, 1)
    assert "Block 1: anchor 22" in card(shown) and "context 0 to 21 (22 tokens)" in card(shown)
    assert "labels 23 to 26, 4 of 4 supervised" in card(shown)
    assert with_class(shown, "context") == list(range(22))
    assert with_class(shown, "label") == [23, 24, 25, 26] and with_class(shown, "chosen") == [22]
    assert shown.evaluate("model.get('selection')") == {"token": 22, "block": 1, "text": 0}
    # The block that covers it, too, is a click away.
    shown.get_by_role("button", name="block 0, slot 1, anchor 20").click()
    assert "Block 0: anchor 20" in card(shown)
    shown.locator(".tokens-text").focus()
    shown.keyboard.press("Escape")
    assert "Block" not in card(shown) and "position 22" in card(shown)
    shown.keyboard.press("Escape")
    assert "Point at a token" in card(shown)
    assert shown.evaluate("model.get('selection')") is None


def test_keys_move_a_cursor_and_light_the_blocks_one_by_one(open_page):
    shown = opened(open_page, state_of(*long()))
    box = shown.locator(".tokens-text")
    box.focus()
    spoken = shown.locator("[aria-live=polite]").last
    for keys, at in [
        ("ArrowRight", 0), ("ArrowRight", 1), ("ArrowLeft", 0), ("End", None), ("Home", 0),
        ("Control+End", 9599), ("Control+Home", 0),
    ]:  # fmt: skip
        shown.keyboard.press(keys)
        if at is not None:
            assert with_class(shown, "cursor") == [at]
            assert f"position {at:,}" in spoken.inner_text() and f"position {at:,}" in card(shown)
    before = top(shown)
    for _ in range(3):
        shown.keyboard.press("PageDown")
    assert top(shown) > before
    (down,) = with_class(shown, "cursor")
    shown.keyboard.press("ArrowUp")
    (up,) = with_class(shown, "cursor")
    assert up < down
    shown.keyboard.press("/")
    assert shown.evaluate("document.activeElement.type") == "search"


def test_enter_goes_through_the_blocks_that_cover_a_token(open_page):
    shown = opened(open_page, state_of(*small()))
    token(shown, 24).click()
    shown.locator(".tokens-text").focus()
    for block in (0, 1, 0):
        shown.keyboard.press("Enter")
        assert f"Block {block}: anchor" in card(shown)


def test_search_counts_and_goes_round(open_page):
    shown = opened(open_page, state_of(*long()))
    words = [to_text(i) for i in range(9600)]
    total = "".join(words).count(" sky is")
    search = shown.get_by_label("search the text")
    search.fill("SKY is")
    output = shown.locator(".tokens-bar output")
    assert output.inner_text() == f"1 of {total}"
    assert with_class(shown, "current") == [1, 2]
    search.press("Shift+Enter")
    assert output.inner_text() == f"{total} of {total}"
    assert words[with_class(shown, "current")[0]] == " sky" and top(shown) > 1000
    shown.get_by_role("button", name="next match").click()
    assert output.inner_text() == f"1 of {total}" and top(shown) < 100
    search.fill("no such words")
    assert output.inner_text() == "none" and not with_class(shown, "match")


def test_lists_and_the_legend_go_to_their_places(open_page):
    batch, blocks = long()
    shown = opened(open_page, state_of(batch, blocks))
    table = explore.token_table(batch, blocks, to_text)
    lists = explore.token_lists(table)
    for name in explore.TOKEN_LISTS:
        shown.get_by_label("list", exact=True).select_option(name)
        buttons = shown.locator(".tokens-side li button")
        places = lists.loc[lists["list"] == name, "position"].tolist()
        assert buttons.count() == len(places)
        buttons.nth(len(places) // 2).click()
        assert with_class(shown, "cursor") == [places[len(places) // 2]]
        assert token(shown, places[len(places) // 2]).is_visible()
    shown.get_by_role("button", name="anchor 64").click()
    anchors = table.index[table["anchor"]].tolist()
    assert with_class(shown, "cursor")[0] in anchors
    assert "the anchor of block" in card(shown)
    counts = table["state"].value_counts()
    for state, number in counts.items():
        assert shown.get_by_role("button", name=f"{state} {number:,}", exact=True).count() == 1


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_candidate_begins_with_a_line_that_is_seen(open_page, theme):
    shown = opened(open_page, state_of(*small()), theme=theme)

    def colour(number, name):
        found = token(shown, number).evaluate(f"one => getComputedStyle(one).{name}")
        return [int(channel) / 255 for channel in re.findall(r"\d+", found)[:3]]

    # Tokens 18 to 38 can be anchors, 39 has no label behind it.
    lines = [colour(number, "borderLeftColor") for number in (21, 24, 5, 39)]
    assert lines[0] == lines[1] != lines[2] == lines[3]
    assert contrast(lines[0], colour(21, "backgroundColor")) >= 3


def test_a_click_on_the_map_goes_there(open_page):
    shown = opened(open_page, state_of(*long()))
    canvas = shown.locator(".tokens-map canvas").bounding_box()
    shown.mouse.click(canvas["x"] + canvas["width"] * 0.5, canvas["y"] + 20)
    assert abs(first_in_view(shown) - 4800) < 400
    view = shown.locator(".tokens-view").bounding_box()
    assert view["x"] <= canvas["x"] + canvas["width"] * 0.5 <= view["x"] + view["width"]


def test_a_slider_never_scrolls_the_text_away(open_page):
    shown = opened(open_page, state_of(*long()))
    shown.locator(".tokens-text").evaluate("box => { box.scrollTop = 3333; }")
    before = first_in_view(shown)
    batch, blocks = long(seed=5, num_anchors=300)
    changed = state_of(batch, blocks)
    change(shown, changed, 2)
    assert top(shown) == 3333 and first_in_view(shown) == before
    assert shown.get_by_role("button", name="anchor 300").count() == 1
    # A longer row begins alike; another width breaks other lines.
    change(shown, state_of(*long(marks=210)), 3)
    assert first_in_view(shown) == before
    shown.set_viewport_size({"width": 800, "height": 900})
    shown.wait_for_function("document.querySelector('.tokens-body').clientWidth < 800")
    shown.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
    in_line = shown.locator(".tokens-text").evaluate(
        """(box, before) => { const line = [...box.querySelectorAll(".tokens-line")]
            .find(one => one.querySelector(`[data-token='${before}']`));
            return line && Math.abs(line.offsetTop - box.scrollTop) <= line.offsetHeight; }""",
        before,
    )
    assert in_line


def test_a_pinned_block_is_known_by_its_anchor(open_page):
    shown = opened(open_page, state_of(*small()))
    token(shown, 30).click()
    assert "Block 2: anchor 30" in card(shown)
    batch, _ = small()
    anchors = torch.tensor([[19, 20, 22, 30]])
    change(shown, state_of(batch, cut_blocks(batch, anchors, anchors > 0, 4)), 2)
    assert "Block 3: anchor 30" in card(shown)
    change(shown, state_of(batch, cut_blocks(batch, anchors[:, :3], anchors[:, :3] > 0, 4)), 3)
    assert "Block" not in card(shown) and "position 30" in card(shown)


def test_the_second_mask_is_a_switch_away(open_page):
    batch, blocks = small()
    anchors = torch.tensor([[25]])
    own = cut_blocks(batch, anchors, anchors > 0, 4)
    shown = opened(open_page, state_of(batch, blocks, own))
    token(shown, 27).click()
    assert "not covered" in card(shown) and "Under the lab's own mask: covered" in card(shown)
    shown.get_by_label("mask", exact=True).select_option(label="the lab's own mask")
    assert with_class(shown, "anchor") == [25] and "Under given mask: not covered" in card(shown)


def test_documents_are_parted_by_a_line_with_their_number(open_page):
    shown = opened(open_page, state_of(*small()))
    assert shown.locator(".tokens-line.parts").all_inner_texts() == ["document 0", "document 1"]
    assert "padding 3" in shown.locator(".tokens-legend").inner_text()


def test_only_lines_near_the_view_are_elements_and_nothing_is_missing_in_it(open_page):
    batch = collate(documents("." * 100 + "a" * 130_972), PAD)
    shown = opened(open_page, state_of(batch, draw_blocks(batch, 1536, 7, seed=0)))
    box = shown.locator(".tokens-text")
    for share in (0.0, 0.37, 0.99, 1.0):
        box.evaluate("(box, share) => { box.scrollTop = share * box.scrollHeight; }", share)
        shown.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
        lines = box.evaluate(
            """box => { const { top, bottom } = box.getBoundingClientRect();
                const lines = [...box.querySelectorAll(".tokens-line")];
                const inside = lines.map(one => one.getBoundingClientRect());
                return [lines.length, Math.min(...inside.map(one => one.top)) - top,
                        Math.max(...inside.map(one => one.bottom)) - bottom]; }"""
        )
        assert lines[0] < 60 and lines[1] <= 2 and lines[2] >= -2
    assert token(shown, 131_071).is_visible()


def test_nothing_moves_when_the_pointer_or_a_slider_does(open_page):
    shown = opened(open_page, state_of(*small()))
    shape = """() => [...document.querySelectorAll(".tokens-map, .tokens-text, .tokens-side,"
        + ".tokens-card")].map(one => one.getBoundingClientRect().toJSON())"""
    before = shown.evaluate(shape)
    token(shown, 22).click()
    token(shown, 24).hover()
    batch, _ = small()
    change(shown, state_of(batch, draw_blocks(batch, 12, 7, seed=1)), 2)
    assert shown.evaluate(shape) == before
