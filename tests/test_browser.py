"""The notebooks and explorers in a browser: JupyterLab as `make lab` starts it, and saved pages.

Screenshots are kept in test-output/, one for each explorer, theme and width. What a picture should
show is tested elsewhere, here it must be there, be legible, follow its controls, and say what
Python says.
"""

import json
import random
import re
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from PIL import Image
from playwright.sync_api import expect

from dspark_lab.explore.widget import module
from tests.browsers import ROOT, take_screenshot, write_notebook
from tests.pictures import contrast
from tests.screen import (
    SMALLEST,
    WATCH_CANVASES,
    faint_marks,
    hard_to_read,
    painted_contrasts,
    unnamed,
)

NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
EXPLORER = ".jp-OutputArea-output:has(.dspark-panel)"
# matplotlib's smallest words, and the dots per inch that explorers' pictures are drawn with.
SMALLEST_POINTS, DOTS = 8, 110

# A mask, and two explorers made by hand: one that fails where n is 3, one that waits to be let go.
TRIAL = """\
import threading
import pandas as pd
from dspark_lab import explore_masks
from dspark_lab.explore.controls import slider
from dspark_lab.explore.explorer import Explorer
from dspark_lab.explore.frame import Frame

def draw(chosen):
    if chosen.n == 3:
        raise ValueError("n must not be 3, got 3")
    table = pd.DataFrame({"n": [chosen.n]})
    return Frame({"one": table}, html=f"<p>n is {chosen.n}</p>", recommended={"n": 7})

go = threading.Event()

def draw_slowly(chosen, progress):
    while not go.wait(0.01):
        progress(1, 4, "waiting")
    return draw(chosen)
"""
CELLS = (
    TRIAL,
    "mask = explore_masks(num_anchors=4, block_size=3, context=24)\nmask",
    "failing = Explorer('explore_failing', [slider('n', 1, 1, 9)], draw)\nfailing",
)
# A packed row of two short conversations and padding, more anchors than candidates, a comparison.
TOUCH = (
    """\
import json
import dspark_lab as lab
from dspark_lab.attention import training_dense_mask
from dspark_lab.blocks import draw_blocks
from dspark_lab.chats import Chat, TokenText, pack
from dspark_lab.explore import block_table, plot_mask

said = ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye")
said += (("assistant", "See you soon!"),)
chat = Chat(messages=tuple({"role": one, "content": text} for one, text in said), id="greeting")
tokenizer = lab.load_tokenizer()
to_text = TokenText(tokenizer)
row = pack([lab.encode(chat, tokenizer)] * 2, 88, tokenizer.pad_token_id).row(0)
blocks = draw_blocks(row, 16, 3, seed=0)
where = blocks.anchor_positions, blocks.block_keep_mask
sizes = {"seq_len": 88, "block_size": 3, "doc_ids": blocks.doc_ids}
dense = training_dense_mask(*where, **sizes)[0].int().tolist()
slots = block_table(blocks, to_text).to_dict("records")""",
    """\
mask = plot_mask(
    blocks, batch=row, to_text=to_text, compare="context with the anchor", tile_size=16
)
mask""",
    "text = lab.explore_anchors([chat], num_anchors=4, block_size=3)\ntext",
)
SLOW_CELLS = (
    TRIAL,
    "slow = Explorer('explore_slow', [slider('n', 1, 1, 9)], draw_slowly, slow=True)\nslow",
)

pytestmark = pytest.mark.browser


def open_notebook(open_page, lab, notebook, theme="light", **size):
    """A page with a notebook of the folder, all of its cells run without a fault."""
    lab.choose_theme(theme)
    page = open_page(**size)
    page.add_init_script(WATCH_CANVASES)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    lab.open(page, notebook)
    content = nbformat.read(lab.folder / notebook, as_version=4)
    lab.run_all(page, sum(cell.cell_type == "code" for cell in content.cells))
    nothing_went_wrong(page)
    return page


@pytest.fixture
def trial(open_page, lab):
    """A page with the explorers of ``CELLS``."""
    write_notebook(lab.folder / "trial.ipynb", *CELLS)
    return open_notebook(open_page, lab, "trial.ipynb")


def nothing_went_wrong(page):
    """No traceback, no red box of warnings, no sentence in place of a picture, no dialog."""
    for trouble in (
        "[data-mime-type='application/vnd.jupyter.error']",
        "[data-mime-type='application/vnd.jupyter.stderr']",
        ".jp-OutputArea [role=alert]",
        ".jupyter-widgets-error-widget",
        ".jp-Dialog",
    ):
        expect(page.locator(trouble)).to_have_count(0)


def change_theme(page, theme):
    """Choose a theme in the menu of an open page."""
    name = f"JupyterLab {theme.title()}"
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Settings$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Theme$")).hover()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{name}$")).click()
    expect(page.locator("body")).to_have_attribute("data-jp-theme-name", name)


def repaint(page):
    """Have all canvases painted anew, watched."""
    page.evaluate(
        """async () => {
            window.canvasWords.length = 0;
            window.watchCanvases = true;
            window.dispatchEvent(new Event("resize"));
            for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame);
            window.watchCanvases = false;
        }"""
    )


def drag(page, slider, share):
    """Pull a slider in many quick steps, to its end and back to a share of its track."""
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    height = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, height)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 2, height, steps=30)
    page.mouse.move(box["x"] + box["width"] * share, height, steps=30)
    page.mouse.up()


def read_aloud_wrongly(output):
    """Sliders whose value, as a screen reader says it, is not the one that stands beside."""
    return output.evaluate(
        """output => [...output.querySelectorAll(".dspark-control")].map((control) => {
            const range = control.querySelector("input[type=range]:not([hidden])");
            const typed = control.querySelector("input[type=number], output");
            const said = range?.getAttribute("aria-valuetext")?.replaceAll(",", "") ?? range?.value;
            return !range || Number(said) === Number(typed.value) || said === typed.value
                ? [] : [`slider says ${said} beside ${typed.value}`];
        }).flat()"""
    )


def picture_of(output):
    """What an explorer shows first: a canvas or an image."""
    return output.locator("canvas:visible, img:visible").first


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_is_legible_and_named_in_both_themes(open_page, lab, notebook):
    page = open_notebook(open_page, lab, notebook, height=1000)
    outputs = page.locator(EXPLORER)
    troubles = {}
    for theme in ("light", "dark"):
        if theme == "dark":
            change_theme(page, theme)
        for i in range(outputs.count()):
            output = outputs.nth(i)
            output.scroll_into_view_if_needed()
            repaint(page)
            found = unnamed(output) + hard_to_read(output) + read_aloud_wrongly(output)
            found += faint_marks(output)
            for image in output.locator("img:not([alt=''])").all():
                wide, shown = image.evaluate("img => [img.naturalWidth, img.clientWidth]")
                if shown and SMALLEST_POINTS * DOTS / 72 * shown / wide < SMALLEST:
                    found.append(f"a picture of {wide} pixels shown at {shown}")
            if found:
                troubles[theme, i] = found
            output.evaluate("output => output.closest('.jp-Cell').scrollIntoView()")
            take_screenshot(page, f"{Path(notebook).stem}-{i}-{theme}")
    nothing_went_wrong(page)
    assert not troubles, "\n".join(f"{where}: {what}" for where, what in troubles.items())


@pytest.mark.parametrize("width", [1024, 1600])
@pytest.mark.parametrize("notebook", ["01_anchors.ipynb", "02_block_masks.ipynb"])
def test_the_first_screen_holds_the_picture(open_page, lab, notebook, width):
    page = open_notebook(open_page, lab, notebook, width=width, height=768)
    output = page.locator(EXPLORER).first
    output.evaluate("output => output.scrollIntoView()")
    panel = page.locator(".jp-NotebookPanel:visible").bounding_box()
    picture = picture_of(output).bounding_box()
    take_screenshot(page, f"{Path(notebook).stem}-{width}")
    assert picture["x"] >= panel["x"]
    assert picture["x"] + picture["width"] <= panel["x"] + panel["width"] + 1
    seen = min(768, picture["y"] + picture["height"]) - picture["y"]
    assert seen >= 0.6 * picture["height"], "more than a third of the picture is below the screen"


def test_what_the_browser_shows_is_what_python_says(trial, lab):
    output = trial.locator(EXPLORER).nth(0)
    slider = output.get_by_role("slider", name="num_anchors")
    typed = output.get_by_role("spinbutton", name="num_anchors")
    view = output.locator("[data-frame]").first

    def agreed(value=None):
        shown = int(typed.input_value())
        assert int(slider.get_attribute("aria-valuetext")) == shown
        assert value is None or shown == value
        expect_python(lab, "mask.controls['num_anchors'].value", str(shown))
        expect(view).to_have_attribute("data-frame", lab.python("print(mask.frames_drawn)").strip())
        return shown

    before = agreed()
    drag(trial, slider, 0.03)
    dragged = agreed()
    assert dragged != before
    assert int(lab.python("print(mask.frames_drawn)")) < 60  # 60 moves, the newest alone are drawn

    typed.fill("6")
    typed.press("Enter")
    agreed(6)
    typed.fill("1000000")
    typed.press("Enter")
    assert agreed() == int(lab.python("print(mask.controls['num_anchors'].max)"))
    typed.fill("2")
    typed.press("Enter")
    agreed(2)

    output.get_by_role("button", name="Copy code").click()
    expect(output.get_by_text("clipboard")).to_be_visible()
    code = trial.evaluate("navigator.clipboard.readText()")
    same = f"import dspark_lab as lab\nprint(eval({code!r}).settings == mask.settings)"
    assert lab.python(same) == "True\n"

    output.get_by_role("button", name="Reset").click()
    agreed(before)
    nothing_went_wrong(trial)


@pytest.fixture
def touched(open_page, lab):
    """A page with the widgets of ``TOUCH``."""
    write_notebook(lab.folder / "touch.ipynb", *TOUCH)
    return open_notebook(open_page, lab, "touch.ipynb", height=1100)


def cell_places(view, cells):
    """Where the centres of cells lie on the canvas."""
    (wide, high), box = view["cell"], view["box"]
    left, top = box["left"] - view["x"] * wide, box["top"] - view["y"] * high
    return [[left + (key + 0.5) * wide, top + (query + 0.5) * high] for query, key in cells]


def hovered(widget, cells):
    """The lines that are said of each cell when the pointer is over it."""
    return widget.locator("canvas[role=application]").evaluate(
        """(canvas, places) => {
            const { left, top } = canvas.getBoundingClientRect();
            const tip = canvas.closest(".mask-stage").querySelector("[aria-hidden]:not(.mask-layer,"
                + ".mask-layer *)");
            return places.map(([x, y]) => {
                const where = { clientX: left + x, clientY: top + y, bubbles: true };
                canvas.dispatchEvent(new PointerEvent("pointermove", where));
                return [...tip.children].map((line) => line.textContent);
            });
        }""",
        cell_places(json.loads(widget.get_attribute("data-view")), cells),
    )


def visible(text):
    return text.replace(" ", "␣").replace("\n", "⏎")


def test_what_hover_says_of_500_cells_is_what_python_says(touched, lab):
    widget = touched.locator("[data-view]")
    code = "json.dumps([slots, dense, blocks.doc_ids[0].tolist()])"
    slots, dense, documents = json.loads(lab.python(f"print({code})"))
    assert {slot["kept"] for slot in slots} == {True, False} and len(set(documents)) == 3
    luck = random.Random(0)
    cells = [(luck.randrange(len(dense)), luck.randrange(len(dense[0]))) for _ in range(500)]
    for (query, key), lines in zip(cells, hovered(widget, cells), strict=True):
        slot = slots[query]
        kept = slot["kept"]
        found = re.fullmatch(
            r"query: block (\d+) \((.+)\), slot (\d), reads “(.+)”, position (\d+)", lines[0]
        )
        assert found, lines[0]
        assert [int(found[i]) for i in (1, 3, 5)] == [
            slot["block"],
            slot["slot"],
            slot["position_id"],
        ]
        assert found[4] == visible(slot["input"])
        if kept:
            aim = f"predicts token {slot['label_position']} “{visible(slot['label'])}”: "
            assert found[2].startswith("anchor ") and lines[1].startswith(aim)
        assert lines[1].endswith(": supervised") == slot["supervised"]
        if key < 88:
            assert re.fullmatch(rf"key: token {key} “.*”, document {documents[key]}", lines[2])
        else:
            block, place = divmod(key - 88, 3)
            assert re.match(rf"key: block {block} \(.+\), slot {place}, reads", lines[2])
        assert lines[3].startswith("visible: " if dense[query][key] else "hidden: ")
        at_anchor = kept and key == slot["label_position"] - slot["slot"] - 1
        more = "visible" if dense[query][key] or at_anchor else "hidden"
        assert lines[4].startswith(f"context with the anchor: {more}: ")


def test_pointer_wheel_and_keys_reach_the_mask_and_not_the_notebook(touched, lab):
    widget = touched.locator("[data-view]")
    canvas = widget.locator("canvas[role=application]")
    canvas.scroll_into_view_if_needed()
    count = touched.locator(".jp-Cell").count()

    def view():
        return json.loads(widget.get_attribute("data-view"))

    def move_to(query, key):
        box = canvas.bounding_box()
        [[x, y]] = cell_places(view(), [(query, key)])
        touched.mouse.move(box["x"] + x, box["y"] + y)
        return box["x"] + x, box["y"] + y

    place = move_to(4, 10)
    expect(widget.get_by_text("query: block 1 ").first).to_be_visible()
    before = view()["cell"]
    touched.mouse.wheel(0, -200)
    touched.wait_for_function(
        "([el, wide]) => JSON.parse(el.dataset.view).cell[0] > 1.2 * wide",
        arg=[widget.element_handle(), before[0]],
    )
    assert move_to(4, 10) == pytest.approx(place, abs=1.5)
    touched.mouse.click(*place)
    expect_python(lab, "mask.selection", "{'query': 4, 'key': 10}")
    # Each of these is a command of JupyterLab's, too: twice 0 restarts the kernel.
    for key in ("0", "0", "ArrowDown", "ArrowRight"):
        touched.keyboard.press(key)
    expect_python(lab, "mask.selection", "{'query': 5, 'key': 11}")
    expect(widget.locator("[aria-live=polite]").first).to_contain_text("key: token 11")
    touched.keyboard.press("n")
    expect_python(lab, "mask.selection == {'query': 5, 'key': 11}", "False")
    seen = lab.python("print(json.dumps(mask.selection))")
    query, key = (json.loads(seen)[name] for name in ("query", "key"))
    first = "dense[{query}][{key}], slots[{query}]['label_position'] - slots[{query}]['slot'] - 1"
    assert lab.python("print(" + first.format(query=query, key=key) + ")") == f"0 {key}\n"
    touched.keyboard.press("Escape")
    expect_python(lab, "mask.selection", "None")

    tokens = touched.locator(".dspark-tokens")
    table = json.loads(lab.python("print(text.table.to_json(orient='records'))"))
    tokens.locator(".tokens-text").focus()
    touched.keyboard.press("Control+Home")
    for at in range(len(table)):
        said = tokens.locator("[aria-live=polite]").last
        expect(said).to_contain_text(f"position {at} · id {table[at]['token_id']}")
        state = table[at]["state"]
        assert (state in ("covered", "not covered", "never a label")) == (
            "probability" in said.inner_text()
        )
        if state == "covered":
            assert f"{table[at]['p_covered']:.3f}" in said.inner_text()
        touched.keyboard.press("ArrowRight")
    touched.keyboard.press("d")
    touched.keyboard.press("d")
    assert touched.locator(".jp-Cell").count() == count
    nothing_went_wrong(touched)


def test_marks_stand_out_in_both_themes(touched, lab):
    widget = touched.locator("[data-view]")
    slots = json.loads(lab.python("print(json.dumps(slots))"))
    dummy = next(i for i, slot in enumerate(slots) if not slot["kept"])
    anchor = slots[0]["label_position"] - 1

    def contrasts(*cells):
        repaint(touched)
        view = json.loads(widget.get_attribute("data-view"))
        wide, high = (size - 2 for size in view["cell"])
        places = cell_places(view, cells)
        boxes = [[x - wide / 2, y - high / 2, wide, high] for x, y in places]
        return painted_contrasts(widget.locator("canvas[role=application]"), boxes)

    def toggle(name):
        widget.get_by_role("button", name=f"layer: {name}").click()

    for theme in ("light", "dark"):
        if theme == "dark":
            change_theme(touched, theme)
        # Of two masks, and of queries without supervision, the regions are fainter in part.
        marks = [(0, 0), (0, 88), (dummy, 88 + dummy)]
        compared = contrasts((0, anchor), *marks)
        toggle("difference")
        toggle("supervision")
        *regions, hidden = contrasts(*marks, (0, anchor + 1))
        toggle("difference")
        toggle("supervision")
        assert min(*compared, *regions) >= 3 > hidden, (theme, compared, regions, hidden)
        for output in touched.locator(".jp-OutputArea-output").all():
            found = faint_marks(output) + hard_to_read(output) + unnamed(output)
            assert not found, (theme, found)


def test_a_mask_is_compared_and_its_files_are_what_python_has(trial, lab, tmp_path):
    output = trial.locator(EXPLORER).nth(0)
    output.get_by_role("combobox", name="compare").select_option("causal block")
    expect(output.locator(".mask-legend")).to_contain_text("only causal block 0")
    only = int(lab.python("print(mask.tables['difference']['pairs'].sum())"))
    # Of each block of 3 slots, kept or not, 3 pairs of earlier slots and later ones.
    assert only == 4 * 3
    expect(output.locator(".mask-legend")).to_contain_text(f"only this mask {only}")

    def saved(name):
        output.get_by_role("button", name="Save", exact=True).click()
        with trial.expect_download() as download:
            output.get_by_role("button", name=name, exact=True).click()
        file = tmp_path / download.value.suggested_filename
        download.value.save_as(file)
        expect(output.get_by_text(f"{file.name} goes to your downloads")).to_be_visible()
        return file

    assert saved("picture, SVG").suffix == ".svg"
    assert ElementTree.parse(tmp_path / "masks.svg").getroot().tag.endswith("}svg")
    with Image.open(saved("picture, PNG")) as picture:
        assert picture.size[0] > 600 and len(picture.convert("L").getcolors()) > 10
    for name in json.loads(lab.python("import json; print(json.dumps(list(mask.tables)))")):
        file = saved(f"table {name}, CSV")
        assert file.name == f"masks-{name}.csv"
        assert file.read_text() == lab.python(
            f"print(mask.tables[{name!r}].to_csv(index=False), end='')"
        )
    nothing_went_wrong(trial)


def expect_python(lab, expression, value):
    """Wait until an expression in the kernel has a value; the kernel answers in turn."""
    for _ in range(100):
        if (said := lab.python(f"print({expression})").strip()) == value:
            return
    raise AssertionError(f"{expression} is {said} in Python, {value} in the browser")


def test_a_saved_page_is_alive_without_kernel_and_network(trial, lab, open_page, tmp_path):
    output = trial.locator(EXPLORER).nth(0)
    output.get_by_role("button", name="Save").click()
    with trial.expect_download() as download:
        output.get_by_role("button", name="page").click()
    saved = tmp_path / "saved.html"
    download.value.save_as(saved)
    assert "://" not in re.sub(r"http://www\.w3\.org/\S+", "", saved.read_text())
    for theme, width in (("light", 1280), ("dark", 640)):
        page = open_page(saved, theme=theme, width=width)
        canvas = page.locator("canvas[role=application]").first
        box = canvas.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        middle = box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5
        page.mouse.move(*middle)
        expect(page.get_by_text("query: block").first).to_be_visible()
        page.mouse.click(*middle)
        expect(page.locator("[aria-live=polite]", has_text="query: block")).to_have_count(1)
        before = canvas.evaluate("canvas => canvas.toDataURL()")
        page.mouse.wheel(0, -300)
        page.wait_for_function(
            "([canvas, before]) => canvas.toDataURL() !== before",
            arg=[canvas.element_handle(), before],
        )
        assert not unnamed(page.locator("body"))
        take_screenshot(page, f"saved-mask-{theme}-{width}")


def test_a_problem_stands_beside_the_last_good_picture(trial, lab):
    output = trial.locator(EXPLORER).nth(1)
    typed = output.get_by_role("spinbutton", name="n")
    alert = output.get_by_role("alert")
    expect(output.get_by_text("n is 1")).to_be_visible()

    def place():
        return picture.bounding_box()["y"] - output.bounding_box()["y"]

    picture = output.get_by_text("n is 1")
    before = place()
    typed.fill("3")
    typed.press("Enter")
    expect(alert).to_contain_text("n must not be 3, got 3")
    expect(picture).to_be_visible()
    assert place() == before, "the picture jumped"
    assert not hard_to_read(output) and not unnamed(output)
    take_screenshot(trial, "problem")
    output.get_by_role("button", name="Use it").click()
    expect(output.get_by_text("n is 7")).to_be_visible()
    expect(alert).to_have_count(0)
    expect_python(lab, "failing.settings", "{'n': 7}")


def test_slow_work_is_cancelled_and_its_bar_leaves(open_page, lab):
    write_notebook(lab.folder / "slow.ipynb", *SLOW_CELLS)
    page = open_page()
    lab.open(page, "slow.ipynb")
    lab.start_all(page)
    output = page.locator(EXPLORER)
    bar = output.get_by_role("progressbar")
    expect(bar).to_be_visible()
    expect(output.get_by_text("waiting")).to_be_visible()
    assert not hard_to_read(output) and not unnamed(output)
    take_screenshot(page, "progress")
    # The cell waits for its picture; the button is heard all the same.
    output.get_by_role("button", name="Cancel").click()
    expect(bar).to_be_hidden()
    lab.wait_for(page, len(SLOW_CELLS))
    output.get_by_role("button", name="Try again").click()
    expect(bar).to_be_visible()
    lab.python("go.set()")
    expect(output.get_by_text("n is 1")).to_be_visible()
    expect(bar).to_be_hidden()
    nothing_went_wrong(page)


def test_an_answer_grows_can_be_cut_short_and_its_open_slot_is_known_in_python(open_page, lab):
    call = "explorer = lab.explore_decoding(max_new_tokens=400, temperature=2.0)"
    write_notebook(lab.folder / "grow.ipynb", f"import dspark_lab as lab\n{call}\nexplorer")
    page = open_page()
    lab.open(page, "grow.ipynb")
    lab.start_all(page)
    output = page.locator(EXPLORER)
    words = output.locator(".dspark-answer-text .dspark-word")
    expect(words.nth(3)).to_be_visible()
    output.get_by_role("button", name="Cancel").click()
    expect(output.get_by_text("was cancelled.")).to_be_visible()
    expect(output.get_by_role("progressbar")).to_be_hidden()
    lab.wait_for(page, 1)
    words.nth(3).click()
    expect(output.locator(".dspark-slot table")).to_be_visible()
    card = output.locator(".dspark-slot")
    place = {name: int(card.get_attribute(f"data-{name}")) for name in ("round", "slot")}
    expect_python(lab, "explorer.selection", repr(place))
    assert not hard_to_read(output) and not unnamed(output)
    take_screenshot(page, "answer")
    output.get_by_role("button", name="Try again").click()
    expect(output.get_by_role("progressbar")).to_be_visible()
    output.get_by_role("button", name="Cancel").click()
    expect(output.get_by_role("progressbar")).to_be_hidden()
    nothing_went_wrong(page)


# JupyterLab's two themes, and dark ones of other programs that show notebooks.
@pytest.mark.parametrize(
    "paper", ["#ffffff", "#f3f3f3", "#111111", "#1f1f1f", "#0d1117", "#2b2b2b"]
)
def test_colours_stand_out_from_every_page(open_page, paper):
    page = open_page(f'<body style="background: {paper}"></body>')
    texts, marks, found = page.evaluate(
        f"""() => {{
            {module("shared")}
            return [TEXT_COLOURS, MARK_COLOURS].map(Object.keys).concat(palette(document.body));
        }}"""
    )
    assert rgb(found["paper"]) == pytest.approx(rgb(paper))
    faint = {name: contrast(rgb(found[name]), rgb(paper)) for name in (*texts, *marks)}
    assert not {name: ratio for name, ratio in faint.items() if ratio < 3}
    assert not {name: faint[name] for name in texts if faint[name] < 4.5}


def rgb(colour):
    """Red, green and blue of "#rrggbb", from 0 to 1."""
    return [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
