"""The mask on its canvas, in Chromium, on a page that needs no kernel."""

import json
import re
from typing import Any, ClassVar

import numpy as np
import pytest

from dspark_lab.explore.mask_view import MaskView
from dspark_lab.explore.widget import WidgetView, module, page
from tests.browsers import take_screenshot

pytestmark = pytest.mark.browser

WORDS = (
    "Why is the sky blue ? \n Light of short waves is scattered most , so blue reaches us .".split(
        " "
    )
)


class Mask(WidgetView):
    names: ClassVar[tuple[str, ...]] = MaskView.names


def described(name="", seq_len=20, block_size=4, anchors=(7, 9, 14), dummies=1, **more):
    """A mask as Python sends it: kept anchors, then dummies; all of the answer is supervised."""
    given = {"name": name, "seq_len": seq_len, "block_size": block_size, "window": 0}
    given |= {"layout": "anchor_predicts", "causal": False, "dummies": True, "reach": 0}
    keep = [1] * len(anchors) + [0] * dummies
    given |= {"length": seq_len, "documents": np.int32([0]).tobytes()}
    given["anchors"] = np.int32([*anchors, *[0] * dummies]).tobytes()
    given["keep"] = np.int32(keep).tobytes()
    return given | more


def state_of(mask, other=None, words=WORDS, tile_size=8):
    anchors = np.frombuffer(mask["anchors"], np.int32)
    keep = np.frombuffer(mask["keep"], np.int32)
    supervised = np.clip(mask["seq_len"] - 1 - anchors, 0, mask["block_size"]) * keep
    texts = [words[i % len(words)] + " " for i in range(mask["seq_len"])]
    row = {"texts": texts, "ids": np.arange(len(texts), dtype=np.int32).tobytes(), "title": ""}
    row["labels"] = np.int32([7, mask["seq_len"]]).tobytes()
    blocks = {"positions": anchors.tobytes(), "supervised": np.int32(supervised).tobytes()}
    state = {"frame": 1, "tile_size": tile_size, "mask": mask, "other": other, "blocks": blocks}
    return state | {"row": row}


def large(seq_len, count, block_size, documents=8):
    anchors = np.sort(np.random.default_rng(0).choice(seq_len - 1, count, replace=False))
    starts = np.linspace(0, seq_len, documents, endpoint=False).astype(np.int32)
    sizes: dict[str, Any] = {"seq_len": seq_len, "block_size": block_size, "dummies": 0}
    return described("this mask", anchors=anchors, **sizes) | {
        "documents": starts.tobytes(),
        "dummies": True,
    }


def shown(open_page, mask, other=None, **where):
    tile_size = where.pop("tile_size", 8)
    page_of = open_page(
        page("mask", [Mask(state=state_of(mask, other, tile_size=tile_size))]), **where
    )
    page_of.wait_for_function("document.querySelector('.widget').dataset.frame === '1'")
    return page_of


def view_of(page):
    return json.loads(page.locator(".widget").get_attribute("data-view"))


def cell(page, query, key):
    """Where a cell's centre is on the page."""
    canvas = page.locator("canvas[role=application]").bounding_box()
    view = view_of(page)
    (wide, high), box = view["cell"], view["box"]
    x = canvas["x"] + box["left"] + (key + 0.5 - view["x"]) * wide
    return x, canvas["y"] + box["top"] + (query + 0.5 - view["y"]) * high


def painted(page):
    """Wait until what was asked for has been drawn."""
    page.evaluate(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )


def tip_of(page):
    return page.locator(".mask-stage > div[aria-hidden=true]:not(.mask-layer)")


def announced(page):
    return page.locator(".mask > [aria-live=polite]").inner_text()


def press(page, *keys):
    page.locator("canvas[role=application]").focus()
    for key in keys:
        page.keyboard.press(key)
    painted(page)


@pytest.mark.parametrize("theme, width", [("light", 1280), ("dark", 700)])
def test_hover_says_what_a_cell_is_and_why(open_page, theme, width):
    page = shown(open_page, described(), theme=theme, width=width)
    page.mouse.move(*cell(page, 5, 3))
    tip = tip_of(page).inner_text()
    assert "query: block 1 (anchor 9), slot 1, reads “[mask]”, position 10" in tip
    assert "predicts token 11 “is␣”: supervised" in tip
    assert "key: token 3 “sky␣”, document 0" in tip
    assert "visible: token 3 is before the anchor 9" in tip
    assert "tile 0, 0 of 8: partial" in tip
    page.mouse.move(*cell(page, 5, 9))
    assert "hidden: token 9 is the anchor itself" in tip_of(page).inner_text()
    page.mouse.move(*cell(page, 0, 20 + 5))
    assert "hidden: another block" in tip_of(page).inner_text()
    page.mouse.move(*cell(page, 13, 2))
    assert "hidden: a dummy block sees no context" in tip_of(page).inner_text()
    # Both tokens stand marked in the text.
    page.mouse.move(*cell(page, 5, 3))
    assert page.locator(".mask-strip mark.key").first.get_attribute("data-token") == "3"
    assert page.locator(".mask-strip mark.anchor").first.get_attribute("data-token") == "9"
    assert page.locator(".mask-strip mark.label").first.get_attribute("data-token") == "11"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    take_screenshot(page, f"mask-{theme}-{width}")


def test_a_click_selects_arrows_move_and_escape_lets_go(open_page):
    page = shown(open_page, described())
    card = page.locator(".mask-card")
    page.mouse.click(*cell(page, 2, 3))
    assert "visible: token 3 is before the anchor 7" in card.inner_text()
    press(page, "ArrowDown", "ArrowDown", "ArrowRight")
    assert re.search(r"query\s+block 1, slot 0", card.inner_text())
    assert re.search(r"key\s+token 4 blue", card.inner_text())
    assert "key: token 4" in announced(page)
    press(page, "PageDown")
    assert re.search(r"query\s+block 2, slot 0", card.inner_text())
    press(page, "Escape")
    assert "No cell selected" in card.inner_text()


def test_the_wheel_zooms_at_the_pointer_and_dragging_moves(open_page):
    page = shown(open_page, large(4096, 128, 7), tile_size=128)
    x, y = cell(page, 400, 2000)
    page.mouse.move(x, y)
    whole = view_of(page)["cell"]
    under = tip_of(page).inner_text()
    assert "This pixel holds about" in under
    for _ in range(6):
        page.mouse.wheel(0, -100)
    page.wait_for_function(
        f"JSON.parse(document.querySelector('.widget').dataset.view).cell[0] > {2 * whole[0]}"
    )
    assert "query: block 57" in tip_of(page).inner_text()
    # A wheel tells whole pixels, and what is beside the pointer moves away from it.
    assert cell(page, 400, 2000) == pytest.approx((x, y), abs=6)
    before = view_of(page)
    page.mouse.down()
    page.mouse.move(x - 60, y - 40, steps=4)
    page.mouse.up()
    painted(page)
    after = view_of(page)
    assert (after["x"] - before["x"]) * before["cell"][0] == pytest.approx(60, abs=1)
    assert (after["y"] - before["y"]) * before["cell"][1] == pytest.approx(40, abs=1)
    assert "No cell selected" in page.locator(".mask-card").inner_text()
    press(page, "0")
    assert view_of(page)["cell"] == whole


def test_keys_zoom_from_the_whole_mask_to_one_cell(open_page):
    page = shown(open_page, large(131072, 64, 7), tile_size=128)
    press(page, "ArrowDown")
    press(page, *["+"] * 40)
    view = view_of(page)
    assert view["zoom"] == 1 and min(view["cell"]) > 200
    press(page, "0", "Enter")
    assert min(view_of(page)["cell"]) > 12  # room for names
    before = view_of(page)["x"]
    press(page, "Shift+ArrowRight")
    assert view_of(page)["x"] > before
    press(page, "?")
    assert page.locator(".mask-help").is_visible()
    press(page, "Escape")
    assert not page.locator(".mask-help").is_visible()


def test_layers_are_counted(open_page):
    page = shown(open_page, described(), tile_size=4)
    legend = page.locator(".mask-legend")
    # Anchors 7, 9 and 14 under blocks of 4 slots, and a dummy block.
    assert "context prefix 120" in legend.inner_text().replace("\n", " ")
    page.get_by_role("button", name="layer: tiles").click()
    text = legend.inner_text().replace("\n", " ")
    # Tiles of contexts: 1 full and 1 partial, 2 and 1, 3 and 1; of own blocks: 4 full.
    assert "empty tiles of 4 23" in text and "partial tiles of 4 3" in text
    assert "full tiles of 4 10" in text
    press(page, "1", "3")
    text = legend.inner_text()
    assert "context prefix" not in text and "supervised" not in text
    page.get_by_label("tile size").select_option("8")
    assert "tiles of 8" in legend.inner_text()


def test_differences_are_counted_and_walked(open_page):
    other = described("context with the anchor", reach=1)
    page = shown(open_page, described("this mask"), other)
    legend = page.locator(".mask-legend").inner_text().replace("\n", " ")
    assert "only this mask 0" in legend and "only context with the anchor 12" in legend
    assert "first at block 0, slot 0, token 7" in legend
    go, card = page.get_by_role("button", name="next difference"), page.locator(".mask-card")
    for block, anchor in ((0, 7), (1, 9), (2, 14), (0, 7)):
        go.click()
        assert re.search(rf"query\s+block {block}, slot 0", card.inner_text())
        assert f"hidden: token {anchor} is the anchor itself" in card.inner_text()
        assert f"visible: token {anchor} is the anchor" in card.inner_text()
    press(page, "p")
    assert re.search(r"query\s+block 2, slot 0", card.inner_text())
    page.get_by_label("which mask is drawn").select_option("other")
    counts = page.locator(".mask-legend").inner_text().replace("\n", " ")
    assert "context prefix 132" in counts


LIVE = """([source, state]) => {
    const render = new Function(source.replace(/export default [^]*$/, "return render;"))();
    const held = { state, selection: null }, calls = {};
    window.model = {
        get: (name) => held[name],
        set: (name, value) => { held[name] = value; },
        save_changes() {}, off() {},
        on: (event, call) => { calls[event] = call; },
        change: (state) => { held.state = state; calls["change:state"](); },
    };
    render({ model, el: document.querySelector(".widget") });
}"""


def in_lists(value):
    """A state without bytes, as a page's script can be handed it."""
    if isinstance(value, dict):
        return {name: in_lists(one) for name, one in value.items()}
    return np.frombuffer(value, np.int32).tolist() if isinstance(value, bytes) else value


def test_a_new_state_keeps_zoom_and_selection(open_page):
    page = open_page("<div class=widget></div>")
    page.evaluate(LIVE, [module(*Mask.names), in_lists(state_of(described()))])
    page.wait_for_function("document.querySelector('.widget').dataset.frame === '1'")
    page.mouse.click(*cell(page, 2, 3))
    assert page.evaluate("model.get('selection')") == {"query": 2, "key": 3}
    press(page, "+", "+")
    zoom = view_of(page)["zoom"]
    assert zoom > 0
    page.evaluate(
        "state => model.change(state)", in_lists(state_of(described(anchors=(2, 9)))) | {"frame": 2}
    )
    page.wait_for_function("document.querySelector('.widget').dataset.frame === '2'")
    assert view_of(page)["zoom"] == zoom
    card = page.locator(".mask-card")
    assert "hidden: token 3 is not before the anchor 2" in card.inner_text()
    # A selection outside a smaller mask is let go.
    press(page, *["PageDown"] * 2)
    small = in_lists(state_of(described(anchors=(2,), dummies=0))) | {"frame": 3}
    page.evaluate("state => model.change(state)", small)
    page.wait_for_function("document.querySelector('.widget').dataset.frame === '3'")
    assert "No cell selected" in card.inner_text()


def test_everything_has_a_name(open_page):
    page = shown(open_page, described())
    for button in page.get_by_role("button").all():
        assert button.get_attribute("aria-label")
    assert "attention mask: 16 queries" in page.locator("canvas[role=application]").get_attribute(
        "aria-label"
    )


def test_two_fingers_zoom_where_they_are(open_page):
    page = shown(open_page, large(4096, 128, 7), tile_size=128)
    (x, y), before = cell(page, 400, 2000), view_of(page)["cell"]
    page.locator("canvas[role=application]").evaluate(
        """(canvas, [x, y]) => {
            const fire = (kind, pointerId, clientX) => canvas.dispatchEvent(new PointerEvent(
                kind, {pointerId, clientX, clientY: y, bubbles: true}));
            fire("pointerdown", 11, x - 20);
            fire("pointerdown", 12, x + 20);
            for (let i = 1; i <= 30; i++) {
                fire("pointermove", 11, x - 20 - 2 * i);
                fire("pointermove", 12, x + 20 + 2 * i);
            }
            fire("pointerup", 11, x - 80);
            fire("pointerup", 12, x + 80);
        }""",
        [x, y],
    )
    painted(page)
    assert view_of(page)["cell"][0] == pytest.approx(4 * before[0], rel=0.05)
    assert cell(page, 400, 2000)[0] == pytest.approx(x, abs=8)
    assert "No cell selected" in page.locator(".mask-card").inner_text()


def test_nothing_moves_on_the_page_while_one_explores(open_page):
    other = described("context with the anchor", reach=1)
    page = shown(open_page, described("this mask"), other, width=900)

    def places():
        boxes = [page.locator(f".mask-{name}") for name in ("stage", "card", "strip")]
        return [box.bounding_box() for box in boxes]

    before = places()
    page.mouse.click(*cell(page, 2, 3))
    page.mouse.move(*cell(page, 9, 30))
    assert places() == before
    press(page, "2", "n", "+", "+", "?")
    assert places() == before


def test_colours_follow_the_theme(open_page):
    page = shown(open_page, described())

    def ink():
        style = "element => getComputedStyle(element).color"
        return page.locator(".mask").evaluate(style)

    light = ink()
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        "was => getComputedStyle(document.querySelector('.mask')).color !== was", arg=light
    )
    assert light == "rgb(26, 26, 26)" and ink() == "rgb(236, 236, 236)"
