"""Chromium and JupyterLab for tests and benchmarks: pages, what went wrong on them, screenshots.

A page asks no network: requests that leave this machine are refused and count as trouble, as do
errors on the browser's console. Playwright is imported where a browser starts, so that the quick
tests need none.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import nbformat
import pytest
from jupyter_client.blocking import BlockingKernelClient

ROOT = Path(__file__).resolve().parents[1]
SCREENSHOTS = ROOT / "test-output"
BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
BROWSERS += [f"/Applications/{n}.app/Contents/MacOS/{n}" for n in ("Google Chrome", "Chromium")]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
# A container's shared memory may be too small for a page.
FLAGS += ["--disable-dev-shm-usage"]
FLAGS += ["--disable-component-update", "--disable-sync", "--no-first-run"]
SECONDS = 1000  # Playwright counts in milliseconds.
LOADED, RUN = 120 * SECONDS, 600 * SECONDS
HERE = {"localhost", "127.0.0.1"}


def find_browser() -> str | None:
    """The path of an installed Chromium or Chrome."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def started_browser(flags: Sequence[str] = FLAGS) -> Iterator[Any]:
    """A headless Chromium, closed at the end; FileNotFoundError where none is installed."""
    from playwright.sync_api import expect, sync_playwright

    # A busy machine is no fault.
    expect.set_options(timeout=LOADED)
    path = find_browser()
    if path is None:
        raise FileNotFoundError("no Chromium or Chrome is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(flags))
        try:
            yield browser
        finally:
            browser.close()


def new_page(browser: Any, *, theme: str = "light", width: int = 1280, height: int = 900) -> Any:
    """An empty page in a context of its own; ``page.troubles`` lists what went wrong on it."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=theme, accept_downloads=True
    )
    page = context.new_page()
    page.set_default_timeout(LOADED)
    troubles: list[str] = []
    page.troubles = troubles

    def stay_here(route: Any) -> None:
        address = urlsplit(route.request.url)
        if address.scheme in ("http", "https", "ws", "wss") and address.hostname not in HERE:
            troubles.append(f"asked the network for {route.request.url}")
            route.abort()
        else:
            route.continue_()

    context.route("**/*", stay_here)
    page.on("pageerror", lambda error: troubles.append(f"uncaught: {error}"))
    page.on(
        "console",
        lambda message: (
            troubles.append(f"console: {message.text} ({message.location.get('url', '')})")
            if message.type == "error"
            else None
        ),
    )
    return page


@pytest.fixture
def browser():
    """A headless browser; without one the test is skipped, in CI it fails."""
    if find_browser() is None:
        sentence = "no Chromium or Chrome is installed, so nothing is seen in a browser"
        if os.environ.get("CI"):
            pytest.fail(sentence)
        pytest.skip(sentence)
    with started_browser() as browser:
        yield browser


@pytest.fixture
def open_page(browser):
    """Open an HTML file, or HTML itself, in a theme at a size; at the end nothing went wrong."""
    pages = []

    def open_one(html="", theme="light", width=1280, height=900):
        page = new_page(browser, theme=theme, width=width, height=height)
        pages.append(page)
        if isinstance(html, Path):
            page.goto(html.resolve().as_uri())
        elif html:
            page.set_content(html)
        return page

    yield open_one
    troubles = [trouble for page in pages for trouble in page.troubles]
    assert not troubles, "\n".join(troubles)


def take_screenshot(page: Any, name: str, **options: Any) -> Path:
    """The page as a PNG file in test-output/."""
    SCREENSHOTS.mkdir(exist_ok=True)
    path = SCREENSHOTS / f"{name}.png"
    page.screenshot(path=path, **options)
    return path


def wait_for_frame(element: Any, frame: int, timeout: float = LOADED) -> None:
    """Wait until a widget has painted this frame, or a later one."""
    element.page.wait_for_function(
        "([element, frame]) => Number(element.dataset.frame) >= frame",
        arg=[element.element_handle(), frame],
        timeout=timeout,
    )


class Lab:
    """A running JupyterLab: its address, its token, and what its server can be asked to do."""

    def __init__(self, url: str, token: str, folder: Path) -> None:
        self.url, self.token, self.folder = url, token, folder

    def ask(self, method: str, path: str, content: object = None) -> Any:
        headers = {"Authorization": f"token {self.token}", "Content-Type": "application/json"}
        data = None if content is None else json.dumps(content).encode()
        with urlopen(Request(self.url + path, data, headers, method=method)) as answer:
            return json.loads(answer.read() or "null")

    def stop_kernels(self) -> None:
        for session in self.ask("GET", "api/sessions"):
            self.ask("DELETE", f"api/sessions/{session['id']}")

    def python(self, code: str) -> str:
        """What some code prints in the only running kernel."""
        (session,) = self.ask("GET", "api/sessions")
        file = self.folder.parent / "runtime" / f"kernel-{session['kernel']['id']}.json"
        # Playwright's loop runs in this thread, so that another must wait for the kernel.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(_ask_kernel, file, code).result()

    def choose_theme(self, theme: str) -> None:
        """The theme of the pages that are opened from now on."""
        plugin = "@jupyterlab/apputils-extension:themes"
        raw = json.dumps({"theme": f"JupyterLab {theme.title()}"})
        self.ask("PUT", f"lab/api/settings/{plugin}", {"raw": raw})

    def open(self, page: Any, notebook: str) -> None:
        """Open a notebook of the folder and wait until its kernel is there."""
        from playwright.sync_api import expect

        page.goto(f"{self.url}lab/tree/{notebook}?reset&token={self.token}")
        idle = page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")
        expect(idle).to_be_visible(timeout=LOADED)
        # Idle before it has a kernel, a notebook asks which one to run its cells with.
        expect(page.locator("#jp-main-statusbar")).to_contain_text(") | Idle", timeout=LOADED)

    def start_all(self, page: Any) -> None:
        """Begin to run the open notebook."""
        page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
        page.locator("[data-command='runmenu:run-all']").click()

    def run_all(self, page: Any, cells: int) -> None:
        """Run the open notebook; each of its ``cells`` must have run."""
        self.start_all(page)
        self.wait_for(page, cells)

    def wait_for(self, page: Any, cells: int) -> None:
        """Wait until each of the ``cells`` has run."""
        from playwright.sync_api import expect

        prompts = page.locator(".jp-CodeCell .jp-InputArea-prompt")
        expect(prompts).to_have_text([re.compile(r"^\[\d+\]:$")] * cells, timeout=RUN)
        idle = page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")
        expect(idle).to_be_visible(timeout=LOADED)


def _ask_kernel(file: Path, code: str) -> str:
    client = BlockingKernelClient()
    client.load_connection_file(str(file))
    client.start_channels()
    printed: list[str] = []

    def collect(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            printed.append(message["content"]["text"])

    try:
        answer = client.execute_interactive(code, output_hook=collect, timeout=LOADED / SECONDS)
    finally:
        client.stop_channels()
    if answer["content"]["status"] != "ok":
        raise AssertionError("\n".join(answer["content"]["traceback"]))
    return "".join(printed)


def write_notebook(path: Path, *cells: str) -> None:
    """A notebook of cells of code."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


@contextmanager
def started_lab(folder: Path, command: list[str] | None = None) -> Iterator[Lab]:
    """JupyterLab on ``folder/notebooks``, with settings of its own that lie in ``folder``."""
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for kind in (
        "JUPYTER_CONFIG JUPYTER_RUNTIME JUPYTERLAB_SETTINGS JUPYTERLAB_WORKSPACES"
    ).split():
        environment[f"{kind}_DIR"] = str(folder / kind.partition("_")[2].lower())
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            command or lab_command(), cwd=folder, env=environment, stdout=log, stderr=log
        )
        try:
            yield Lab(*_wait_for_address(server, folder), folder / "notebooks")
        finally:
            server.terminate()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def lab_command() -> list[str]:
    """The command of `make lab` on a machine without a display, on a port that it finds itself."""
    hidden = {"DISPLAY", "WAYLAND_DISPLAY", "MAKEFLAGS"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    lines = subprocess.check_output(
        ["make", "--dry-run", "--no-print-directory", "lab"],
        cwd=ROOT,
        env=environment | {"PORT": "0"},
        text=True,
    ).splitlines()
    command = shlex.split(next(line for line in lines if "-m jupyterlab" in line))
    command = command[command.index("-m") :]
    if "--no-browser" not in command:  # macOS always has a display
        command.append("--no-browser")
    return [sys.executable, *command]


def _wait_for_address(server: subprocess.Popen, folder: Path) -> tuple[str, str]:
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


def copy_notebooks(folder: Path) -> None:
    """The repository's notebooks without their outputs."""
    shutil.copytree(ROOT / "notebooks", folder, ignore=shutil.ignore_patterns(".*"))
    for file in folder.glob("*.ipynb"):
        notebook = nbformat.read(file, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.update(outputs=[], execution_count=None)
        nbformat.write(notebook, file)


@pytest.fixture(scope="session")
def lab_server(tmp_path_factory):
    """One JupyterLab for all tests, on a copy of the notebooks without outputs."""
    folder = tmp_path_factory.mktemp("lab")
    copy_notebooks(folder / "notebooks")
    with started_lab(folder) as lab:
        yield lab


@pytest.fixture
def lab(lab_server):
    """The JupyterLab of all tests; its kernels are stopped at the end."""
    yield lab_server
    lab_server.stop_kernels()
