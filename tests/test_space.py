"""The Space, in a headless browser: visitors get streamed text and cannot ask for too much.

With SPACE_CHECKPOINT and SPACE_PROMPT another model is asked, and screenshots go to the folder SCREENSHOTS names.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, TINY_FLAGS, run_script

import train

pytest.importorskip("gradio", reason="needs gradio (space/requirements.txt)")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An exported model: the run that SPACE_CHECKPOINT names, or a tiny one."""
    path = tmp_path_factory.mktemp("space")
    checkpoint = os.environ.get("SPACE_CHECKPOINT")
    if checkpoint is None:
        text = "".join(f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(200))
        (path / "text.txt").write_text(text, encoding="utf-8")
        flags = [*TINY_FLAGS, "--block_size=256", "--seq_len=256", "--steps=30", "--lr=0.02"]
        assert train.main([*flags, f"--input_file={path / 'text.txt'}", f"--out_dir={path / 'run'}"]) == 0
        checkpoint = path / "run/checkpoints/best.pt"
    result = run_script(f"--checkpoint={checkpoint}", f"--out={path / 'hf'}", cwd=ROOT, script="export_hf.py")
    assert result.returncode == 0, result.stderr
    return path / "hf"


def served(folder: Path):
    """The page on a port of its own; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MODEL_DIR": str(folder), "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, str(ROOT / "space/app.py")], env=environment)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            try:
                urllib.request.urlopen(address, timeout=5)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.3)
        yield address
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def address(model):
    yield from served(model)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    contexts = []

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.goto(address)
        page.wait_for_selector("#text textarea")
        return page

    yield open_page
    for context in contexts:
        context.close()


def value(page) -> str:
    return page.input_value("#text textarea")


def settled(page, patience: float = 3.0) -> str:
    """The text when it has not changed for a while."""
    text, since, deadline = value(page), time.monotonic(), time.monotonic() + 90
    while time.monotonic() - since < patience:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        if (now := value(page)) != text:
            text, since = now, time.monotonic()
    return text


def screenshot(page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(exist_ok=True)
        page.screenshot(path=str(Path(folder) / name))


def set_length(page, tokens: int) -> None:
    page.get_by_text("How", exact=True).click()
    page.get_by_label("number input for tokens to add").fill(str(tokens))
    page.keyboard.press("Tab")


def test_text_streams(visit):
    page = visit(viewport={"width": 1200, "height": 900})
    assert "Beginnings" in page.inner_text("body")
    prompt = os.environ.get("SPACE_PROMPT", "Line 1:")
    page.fill("#text textarea", prompt)
    page.click("#go button, button#go")
    seen = set()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(seen) < 4:
        seen.add(value(page))
    text = settled(page)
    assert len(seen) >= 4 and all(text.startswith(part) for part in seen), "it grows"
    assert text.startswith(prompt) and len(text) > 60
    screenshot(page, "space.png")


def test_stop_stops(visit):
    page = visit()
    set_length(page, 120)
    page.fill("#text textarea", "Line 1:")
    page.click("#go button, button#go")
    while len(value(page)) < 12:
        time.sleep(0.02)
    page.click("#stop button, button#stop")
    stopped = settled(page)
    page.fill("#text textarea", "Line 1:")
    page.click("#go button, button#go")
    assert len(settled(page)) > len(stopped), "left alone, it writes more"


def test_nothing_at_all_is_a_prompt(visit):
    page = visit()
    page.click("#go button, button#go")
    assert len(settled(page)) > 20


def test_too_long_a_prompt_is_refused(visit):
    page = visit()
    page.fill("#text textarea", "x" * 2001)
    page.click("#go button, button#go")
    page.wait_for_selector("text=2,000 are the most")
    assert value(page) == "x" * 2001


def test_two_visitors_both_get_their_text(visit):
    pages = [visit(), visit()]
    for number, page in enumerate(pages):
        page.fill("#text textarea", f"Line {number}:")
    for page in pages:
        page.click("#go button, button#go")
    for number, page in enumerate(pages):
        assert re.match(rf"Line {number}:.{{40}}", settled(page, 12.0), re.DOTALL)


def test_on_a_phone_nothing_sticks_out(visit):
    page = visit(viewport={"width": 390, "height": 844}, device_scale_factor=2)
    page.click("#go button, button#go")
    settled(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    screenshot(page, "space-phone.png")


def test_without_a_model_it_says_so(browser, tmp_path):
    for address in served(tmp_path / "none"):
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("text=There is no model here yet")
        assert "export_hf.py" in page.inner_text("body")
        page.close()
