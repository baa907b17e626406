"""The notebooks in a browser: JupyterLab as `make lab` starts it, every cell run, a slider dragged.

Drives Chromium through Playwright and keeps screenshots in test-output/, one for each notebook and
theme. What a picture should show is tested elsewhere, here it must follow its slider.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import TimeoutError, expect, sync_playwright

from dspark_lab.explore import Explorer, explore_decoding
from tests import test_packaging

ROOT = Path(__file__).resolve().parents[1]
SCREENSHOTS = ROOT / "test-output"
BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
BROWSERS += [f"/Applications/{n}.app/Contents/MacOS/{n}" for n in ("Google Chrome", "Chromium")]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--no-first-run"]
SECONDS = 1000  # Playwright counts in milliseconds.
LOADED = 120 * SECONDS
SETTLED = 5 * SECONDS

pytestmark = pytest.mark.browser


@pytest.fixture
def page():
    """An empty page of a headless browser; without one the test is skipped, in CI it fails."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        sentence = "no Chromium or Chrome is installed, so the notebooks are not seen in a browser"
        if os.environ.get("CI"):
            pytest.fail(sentence)
        pytest.skip(sentence)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.set_default_timeout(LOADED)
            yield page
        finally:
            browser.close()


@pytest.fixture
def lab(tmp_path, theme):
    """JupyterLab in one theme on a copy of the notebooks without outputs: its address and token."""
    notebooks = tmp_path / "notebooks"
    shutil.copytree(ROOT / "notebooks", notebooks, ignore=shutil.ignore_patterns(".*"))
    for file in notebooks.glob("*.ipynb"):
        notebook = nbformat.read(file, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.update(outputs=[], execution_count=None)
        nbformat.write(notebook, file)
    settings = tmp_path / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    chosen = {"themes": {"theme": f"JupyterLab {theme.title()}"}}
    for plugin, values in (chosen | {"notification": {"fetchNews": "false"}}).items():
        (settings / f"{plugin}.jupyterlab-settings").write_text(json.dumps(values))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for kind in (
        "JUPYTER_CONFIG JUPYTER_RUNTIME JUPYTERLAB_SETTINGS JUPYTERLAB_WORKSPACES"
    ).split():
        environment[f"{kind}_DIR"] = str(tmp_path / kind.partition("_")[2].lower())
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            lab_command(), cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield wait_for_address(server, tmp_path)
        finally:
            server.terminate()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def lab_command():
    """The command of `make lab` on a machine without a display, on a port that it finds itself."""
    command = shlex.split(test_packaging.lab_command(PORT="0"))
    assert command[1:3] == ["-m", "jupyterlab"]
    if "--no-browser" not in command:  # macOS always has a display
        command.append("--no-browser")
    return [sys.executable, *command[1:]]


def wait_for_address(server, folder):
    deadline = time.monotonic() + LOADED / SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        for file in (folder / "runtime").glob("jpserver-*.json"):
            try:
                info = json.loads(file.read_text())
            except json.JSONDecodeError:  # still being written
                continue
            assert info["token"] and info["hostname"] == "127.0.0.1"
            return info["url"], info["token"]
        time.sleep(0.1)
    raise AssertionError("JupyterLab did not start:\n" + (folder / "log").read_text())


def run_all_cells(page, lab, notebook):
    """Open a notebook and run it; every cell must have run, and none failed."""
    url, token = lab
    content = nbformat.read(ROOT / "notebooks" / notebook, as_version=4)
    cells = sum(cell.cell_type == "code" for cell in content.cells)
    page.goto(f"{url}lab/tree/{notebook}?token={token}")
    prompts = page.locator(".jp-CodeCell .jp-InputArea-prompt")
    idle = page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")
    expect(prompts).to_have_text(["[ ]:"] * cells, timeout=LOADED)
    expect(idle).to_be_visible(timeout=LOADED)
    # Idle before it has a kernel, a notebook asks which one to run its cells with.
    expect(page.locator("#jp-main-statusbar")).to_contain_text(") | Idle", timeout=LOADED)
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator("[data-command='runmenu:run-all']").click()
    expect(prompts).to_have_text([re.compile(r"^\[\d+\]:$")] * cells, timeout=LOADED)
    expect(idle).to_be_visible(timeout=LOADED)
    nothing_went_wrong(page)


def nothing_went_wrong(page):
    """No traceback, no red box of warnings, no sentence in place of a picture, no dialog."""
    for trouble in (
        "[data-mime-type='application/vnd.jupyter.error']",
        "[data-mime-type='application/vnd.jupyter.stderr']",
        ".jupyter-widgets [role=alert]",
        ".jupyter-widgets-error-widget",
        ".jp-Dialog",
    ):
        expect(page.locator(trouble)).to_have_count(0)


def drag(page, slider, share):
    """Pull a slider's handle in many quick steps to a share of its track."""
    slider.scroll_into_view_if_needed()
    handle = slider.locator("[role=slider]").bounding_box()
    track = slider.locator(".noUi-target").bounding_box()
    height = handle["y"] + handle["height"] / 2
    page.mouse.move(handle["x"] + handle["width"] / 2, height)
    page.mouse.down()
    page.mouse.move(track["x"] + track["width"], height, steps=30)
    page.mouse.move(track["x"] + track["width"] * share, height, steps=30)
    page.mouse.up()


def wait_for_html(element, html):
    """Wait until an element's content is this HTML, as the browser reads it."""
    try:
        element.page.wait_for_function(
            """([element, html]) => {
                const wanted = document.createElement("div");
                wanted.innerHTML = html;
                return element.innerHTML === wanted.innerHTML;
            }""",
            arg=[element.element_handle(), html],
            timeout=SETTLED,
        )
    except TimeoutError:
        pytest.fail("the picture on the page is not the one that the controls' values make")


def take_screenshot(page, output, name):
    output.evaluate("output => output.closest('.jp-Cell').scrollIntoView()")
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / name)


def shown(explorer):
    """The HTML under an explorer's controls."""
    explorer.redraw()
    _, picture = explorer.children
    return picture.value


def first_explorer(notebook):
    """The notebook's first explorer, made here as its cells make it."""
    names = {}
    for cell in nbformat.read(ROOT / "notebooks" / notebook, as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
            for value in names.values():
                if isinstance(value, Explorer):
                    return value
    raise AssertionError(f"{notebook} has no explorer")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    "notebook, control, share",
    [
        ("01_anchors.ipynb", "num_anchors", 0.05),
        ("02_block_masks.ipynb", "block_size", 0.25),
        ("06_tune_training.ipynb", "block_size", 0.8),
        ("07_tune_serving.ipynb", "draft_length", 0.3),
    ],
)
def test_the_picture_follows_a_dragged_slider(page, lab, theme, notebook, control, share):
    run_all_cells(page, lab, notebook)
    output = page.locator(".jp-OutputArea-output:has(.widget-hslider)").first
    slider = output.locator(".widget-hslider", has_text=control)
    picture = output.locator(".widget-html-content").last
    explorer = first_explorer(notebook)
    before = explorer.settings[control]
    wait_for_html(picture, shown(explorer))

    drag(page, slider, share)
    value = int(slider.locator(".widget-readout").inner_text())
    assert value != before
    explorer.controls[control].value = value
    wait_for_html(picture, shown(explorer))
    nothing_went_wrong(page)

    take_screenshot(page, output, f"{Path(notebook).stem}-{theme}.png")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_tokens_appear_when_a_typed_prompt_is_run(page, lab, theme):
    run_all_cells(page, lab, "05_decode.ipynb")
    output = page.locator(".jp-OutputArea-output:has(textarea)").first
    output.scroll_into_view_if_needed()
    text = output.locator(".dspark-answer").first
    expect(text).to_be_visible()
    box = output.locator(".widget-html-content:has(.dspark-answer)").first
    # What the reader sees of the answer, each time that it changes.
    box.evaluate(
        """box => {
            window.seen = [];
            new MutationObserver(() => window.seen.push(box.innerText.length))
                .observe(box, {childList: true, subtree: true, characterData: true});
        }"""
    )
    explorer = explore_decoding(temperature=1.0, max_new_tokens=64, run=False)
    explorer.controls["prompt"].value = "Why is the sky blue?"
    explorer.run()
    tokens, rounds = len(explorer.decoded.tokens[0]), len(explorer.rounds)

    output.locator("textarea").fill("Why is the sky blue?")
    output.get_by_role("button", name="Run").click()
    expect(output).to_contain_text(f"{tokens} tokens in {rounds} rounds, tau", timeout=LOADED)
    *_, shown_text, _, _ = explorer.children
    wait_for_html(box, shown_text.value)
    lengths = page.evaluate("window.seen")
    assert len(set(lengths)) > 2, f"the answer did not grow before the reader's eyes: {lengths}"
    nothing_went_wrong(page)

    take_screenshot(page, output, f"05_decode-{theme}.png")
