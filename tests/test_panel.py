"""The panel of controls in Chromium: sliders and typed numbers, and that nothing below it moves."""

import json
from types import SimpleNamespace

import pytest
from playwright.sync_api import expect

from dspark_lab.explore.controls import dropdown, selection_slider, slider
from dspark_lab.explore.explorer import Explorer
from dspark_lab.explore.frame import Frame
from dspark_lab.explore.widget import module
from tests.browsers import take_screenshot
from tests.explorers import panel
from tests.screen import hard_to_read, unnamed

pytestmark = pytest.mark.browser

# A model that no kernel answers: a test sets what Python would, and reads what it would be sent.
PAGE = """<meta charset="utf-8"><style>:root {{ color-scheme: light dark }}
body {{ font-family: sans-serif; margin: 8px }}</style>
<div id="panel"></div><div id="below">the picture</div>
<script>{source}
const handlers = [];
window.held = {{ state: {state}, progress: {{}} }};
window.sent = [];
window.model = {{
  get: (name) => held[name],
  set: (name, value) => {{
    held[name] = value;
    handlers.filter(([event]) => event === "change:" + name).forEach(([, call]) => call());
  }},
  save_changes: () => {{}},
  send: (message) => sent.push(message),
  on: (event, call) => handlers.push([event, call]),
  off: () => {{}},
}};
render({{ model, el: document.getElementById("panel") }});
</script>"""

LONG = (
    "No conversation has two supervised tokens in a row among its first 256: there is nothing to "
    "learn from. Choose a longer row, or other conversations, or another template of the chat."
)


def state_of(reason=""):
    """What Python sends of some controls."""
    controls = [
        slider("num_anchors", 512, 1, 4096, growing=True),
        slider("block_size", 7, 1, 32),
        selection_slider("tile_size", 64, (16, 64, 256)),
        dropdown("per", "row", ("row", "document")),
    ]

    def draw(_chosen: SimpleNamespace) -> Frame:
        return Frame({}, recommended={"block_size": 3})

    reasons = {"per": reason} if reason else {}
    return panel(Explorer("explored", controls, draw, reasons=lambda _: reasons)).state


@pytest.fixture
def opened(open_page):
    def open_one(reason="", **where):
        source = module("shared", "controls").removesuffix("export default { render };\n")
        return open_page(PAGE.format(source=source, state=json.dumps(state_of(reason))), **where)

    return open_one


def chosen(page, name):
    """The value of a control that was sent last."""
    return page.evaluate("sent.at(-1).values")[name]


def test_a_wide_slider_grows_step_by_step_and_keeps_any_number_that_is_typed(opened):
    page = opened()
    wide = page.get_by_role("slider", name="num_anchors")
    typed = page.get_by_role("spinbutton", name="num_anchors")

    def shows(number):
        expect(wide).to_have_attribute("aria-valuetext", str(number))
        expect(typed).to_have_value(str(number))

    shows(512)
    page.evaluate("sent.push({ values: {} })")
    wide.press("ArrowRight")
    shows(576)
    wide.press("Home")
    shows(1)
    wide.press("ArrowRight")
    shows(2)
    wide.press("End")
    shows(4096)
    typed.fill("3001")
    typed.press("Enter")
    shows(3001)
    before = float(wide.input_value())
    # The next step is a stop again.
    wide.press("ArrowLeft")
    assert float(wide.input_value()) < before
    typed.fill("99999")
    typed.press("Enter")
    shows(4096)
    typed.fill("")
    typed.press("Enter")
    shows(4096)
    page.get_by_role("slider", name="tile_size").press("ArrowRight")
    expect(page.get_by_role("spinbutton", name="tile_size")).to_have_value("256")
    assert not unnamed(page.locator("#panel"))


def test_few_changes_are_on_their_way_at_once_and_the_last_is_sent(opened):
    page = opened()
    wide = page.get_by_role("slider", name="block_size")
    for _ in range(9):
        wide.press("ArrowRight")
    assert page.evaluate("sent.length") <= 3
    for turn in range(1, 9):
        page.evaluate("turn => model.set('state', { ...held.state, turn })", turn)
    assert chosen(page, "block_size") == 16
    # What is older than the user's last change does not move the slider back.
    expect(wide).to_have_attribute("aria-valuetext", "16")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 592, 430])
def test_nothing_moves_whatever_the_panel_says_and_all_of_it_is_legible(opened, theme, width):
    page = opened("not packed", theme=theme, width=width)
    boxes = """() => [...document.querySelectorAll(
        "#below, .dspark-control, .dspark-control > *")]
        .filter((el) => el.checkVisibility())
        .map((el) => JSON.stringify(el.getBoundingClientRect()))"""
    before = page.evaluate(boxes)
    [height] = {
        round(control.bounding_box()["height"]) for control in page.locator(".dspark-control").all()
    }
    assert height == 26, "a reason stands beside its control"
    working = {"done": 1234, "total": 5678, "counts": "1,234 of 5,678 (22 %)"}
    working |= {"words": "dspark-k7 answers 40 prompts at temperature 0.6: token"}
    for name, said in {
        "problem": {"problem": LONG, "kept": True},
        "again": {"problem": "Cancelled.", "again": True},
        "nothing": {"recommended": {}, "problem": "", "again": False},
        "progress": None,
    }.items():
        if said is None:
            page.evaluate("progress => model.set('progress', progress)", working)
        else:
            page.evaluate("said => model.set('state', { ...held.state, ...said })", said)
        assert page.evaluate(boxes)[: len(before)] == before, name
        take_screenshot(page, f"panel-{name}-{theme}-{width}")
        assert not hard_to_read(page.locator("#panel")) and not unnamed(page.locator("#panel"))
    page.get_by_role("button", name="Cancel").click()
    assert page.evaluate("sent.at(-1)") == {"action": "cancel"}
    page.evaluate("model.set('progress', {})")
    expect(page.get_by_role("progressbar")).to_have_count(0)
    assert page.evaluate(boxes) == before
