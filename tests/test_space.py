"""The Space, in a headless browser and beside it: visitors get streamed text and cannot ask for too
much.

With SPACE_CHECKPOINT and SPACE_PROMPT another model is asked, and screenshots go to the folder
SCREENSHOTS names.
"""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import GPT2, ROOT, TINY_FLAGS
from safetensors.torch import load, save_file

import export_hf
import sample
import train
from parts.run.checkpoint import load_checkpoint
from parts.text.vocabulary import encode_prompt, saved_tokenizer

if importlib.util.find_spec("gradio") is None:  # the page imports it, in a process of its own
    pytest.skip("needs gradio (space/requirements.txt)", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("space")]  # one page for all visitors
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
PAGES = """
import sys
from pathlib import Path
import app
for folder in sys.argv[1:]:
    _, address, _ = app.page(Path(folder)).launch(prevent_thread_lock=True, quiet=True)
    print(address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An exported model: the run that SPACE_CHECKPOINT names, or a tiny one."""
    path = tmp_path_factory.mktemp("space")
    checkpoint = os.environ.get("SPACE_CHECKPOINT")
    if checkpoint is None:
        text = "".join(
            f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(200)
        )
        (path / "text.txt").write_text(text, encoding="utf-8", newline="\n")
        flags = [
            *TINY_FLAGS,
            GPT2,
            "--block_size=256",
            "--seq_len=256",
            "--steps=15",
            "--batch_size=1",
            "--lr=0.02",
        ]
        flags += ["--save_every=15", "--sample_every=15"]
        assert (
            train.main([*flags, f"--input_file={path / 'text.txt'}", f"--out_dir={path / 'run'}"])
            == 0
        )
        checkpoint = path / "run/checkpoints/best.pt"
    assert export_hf.main([f"--checkpoint={ROOT / checkpoint}", f"--out={path / 'hf'}"]) == 0
    return path / "hf"


def served(folder: Path):
    """The page on a port of its own; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | OFFLINE | {"MODEL_DIR": str(folder), "GRADIO_SERVER_PORT": str(port)}
    environment |= {
        "HTTP_PROXY": "http://127.0.0.1:9",
        "no_proxy": "example.org",
    }  # nobody is there
    process = subprocess.Popen([sys.executable, str(ROOT / "space/app.py")], env=environment)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 400
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
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
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


def settled(page) -> str:
    """The text when it has not changed for a while."""
    text, since, deadline = value(page), time.monotonic(), time.monotonic() + 90
    while time.monotonic() - since < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        if (now := value(page)) != text:
            text, since = now, time.monotonic()
    return text


def grown(page, length: int) -> str:
    """The text as soon as it has more characters than that."""
    longer = f"document.querySelector('#text textarea').value.length > {length}"
    page.wait_for_function(longer, timeout=90_000)
    return value(page)


def screenshot(page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(exist_ok=True)
        page.screenshot(path=str(Path(folder) / name))


def set_length(page, tokens: int) -> None:
    page.get_by_text("How it writes", exact=True).click()
    page.get_by_label("number input for tokens to add").fill(str(tokens))
    page.keyboard.press("Tab")


def test_text_streams(visit):
    page = visit(viewport={"width": 1200, "height": 900})
    page.wait_for_selector("text=Beginnings")
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
    set_length(page, 240)
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
    grown(page, 20)


def test_too_long_a_prompt_is_refused(visit):
    page = visit()
    """The box takes no more than the server does; a text that has grown beyond that stays as it
    is."""
    page.fill("#text textarea", "x" * 8001)
    assert value(page) == "x" * 8000
    page.click("#go button, button#go")
    text = settled(page)
    assert len(text) > 8000
    page.click("#go button, button#go")
    page.wait_for_selector("text=8,000 are the most")
    assert settled(page) == text


def test_no_seed_is_one_too(visit):
    page = visit()
    set_length(page, 20)
    page.get_by_label("seed").fill("")
    page.keyboard.press("Tab")
    page.fill("#text textarea", "Line 1:")
    page.click("#go button, button#go")
    assert grown(page, len("Line 1:")).startswith("Line 1:")


def ask(address: str, path: str, body: bytes, kind: str = "application/json") -> tuple[int, bytes]:
    """What the server answers to a request that no page would send."""
    request = urllib.request.Request(address + path, body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=100) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_what_no_page_would_ask_holds_nobody_up(address):
    """Each is answered with text, or refused, at once."""
    for values in (
        [10**9, 0.9, 50, 1],
        [20, 1e-300, 50, 1],
        [20, float("nan"), 50, None],
        [20, 0.9, -5, -1],
    ):
        _, answer = ask(
            address, "/gradio_api/call/write", json.dumps({"data": ["Line", *values]}).encode()
        )
        event = json.loads(answer).get("event_id")
        with urllib.request.urlopen(
            f"{address}/gradio_api/call/write/{event}", timeout=100
        ) as stream:
            assert b"event: " in stream.read()


def test_nobody_jumps_the_queue_or_fills_the_disk(address):
    body = json.dumps({"data": ["Line", 20, 0.9, 50, 1], "session_hash": "x"}).encode()
    assert ask(address, "/gradio_api/run/write", body)[0] >= 400
    large = (
        b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n'
        + b"x" * 10**6
        + b"\r\n--b--"
    )
    assert ask(address, "/gradio_api/upload", large, "multipart/form-data; boundary=b")[0] >= 400
    assert (
        ask(
            address,
            "/gradio_api/call/write",
            json.dumps({"data": ["x" * 10**6, 20, 0.9, 50, 1]}).encode(),
        )[0]
        >= 400
    )


def test_two_visitors_both_get_their_text(visit):
    pages = [visit(), visit()]
    for number, page in enumerate(pages):
        page.fill("#text textarea", f"Line {number}:")
    for page in pages:
        page.click("#go button, button#go")
    for number, page in enumerate(pages):
        assert re.match(rf"Line {number}:.{{40}}", grown(page, 60), re.DOTALL)


def test_on_a_phone_nothing_sticks_out(visit):
    page = visit(viewport={"width": 390, "height": 844}, device_scale_factor=2)
    page.click("#go button, button#go")
    settled(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    screenshot(page, "space-phone.png")


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory) -> Path:
    """An exported model whose tokens are single bytes, of a text whose characters have three."""
    path = tmp_path_factory.mktemp("bytes")
    (path / "text.txt").write_text("漢字を書く。" * 100, encoding="utf-8")
    flags = [
        *TINY_FLAGS,
        "--tokenizer=bpe:257",
        "--block_size=64",
        "--seq_len=64",
        "--steps=60",
        "--lr=0.02",
    ]
    flags += ["--save_every=60", "--sample_every=60", f"--cache_dir={path / 'cache'}"]
    assert (
        train.main([*flags, f"--input_file={path / 'text.txt'}", f"--out_dir={path / 'run'}"]) == 0
    )
    assert export_hf.main([f"--checkpoint={path / 'run'}", f"--out={path / 'hf'}"]) == 0
    return path / "hf"


def writer_of(folder: Path):
    """What the page writes with, in this process."""
    specification = importlib.util.spec_from_file_location("app", ROOT / "space/app.py")
    app = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(app)
    return app.Storyteller(folder)


def test_text_ends_where_the_exported_model_ends_a_document(tmp_path, monkeypatch, capsys):
    """That of the page, of sample.py, and of the run; a prompt can begin a document."""
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for number in range(60):
        Path(f"texts/{number}.txt").write_bytes(b"One: two 3.\n")
    flags = [
        *TINY_FLAGS,
        "--input_file=texts",
        "--out_dir=run",
        "--block_size=64",
        "--seq_len=64",
        "--steps=60",
    ]
    flags += [
        "--lr=0.02",
        "--save_every=60",
        "--sample_every=60",
        "--temperature=0",
        "--max_new_tokens=40",
    ]
    assert train.main([*flags, "--prompt=One: two"]) == 0
    assert export_hf.main(["--checkpoint=run", "--out=hf"]) == 0
    writer, whole = writer_of(Path("hf")), "One: two 3.\n"
    ids = writer.tokenizer("One: two", return_tensors="pt")
    (row,) = writer.model.generate(**ids, max_length=64, do_sample=False).tolist()
    assert row[-1] == writer.model.generation_config.eos_token_id
    assert writer.tokenizer.decode(row, skip_special_tokens=True) == whole, "the reference"
    assert list(writer.write("One: two", 40, 0, 50, 1))[-1] == whole
    samples = Path("run/samples/samples.txt").read_text(encoding="utf-8")
    assert samples.rpartition("STEP 60\n\n")[2] == f"PROMPT:\nOne: two\nOUTPUT:\n{whole}\n\n" * 2

    def sampled(*more: str) -> tuple[str, str]:
        capsys.readouterr()
        assert (
            sample.main(["--checkpoint=run", "--temperature=0", "--max_new_tokens=40", *more]) == 0
        )
        return capsys.readouterr()

    text, told = sampled("--prompt=One: two")
    assert text == whole + "\n" and "[4 tokens, " in told and ", the end of a document]" in told
    text, told = sampled("--prompt=One: two", "--keep_going")
    assert text.startswith(f"{whole}<|endoftext|>{whole}<|endoftext|>") and "[40 tokens, " in told
    assert sampled("--prompt=<|endoftext|>")[0] == f"<|endoftext|>{whole}\n"
    given = "<|endoftext|>One<|endoftext|>"
    assert (
        encode_prompt(given, saved_tokenizer(load_checkpoint(Path("run/checkpoints/best.pt"))))
        == (writer.tokenizer(given)["input_ids"])
    )


def test_text_ends_in_whole_characters(bytes_model):
    """Wherever the last token cuts, and whenever the visitor stops."""
    writer, prompt = writer_of(bytes_model), "漢字"
    for length in range(7, 13):
        *_, text = shown = list(writer.write(prompt, length, 0, 50, 1))
        assert text == prompt + "を書く。"[: length // 3], "three bytes, three tokens a character"
        assert all(text.startswith(part) and not part.endswith("\ufffd") for part in shown)
    writing = writer.write(prompt, 30, 0, 50, 1)
    stopped = [next(writing), next(writing)][-1]
    writing.close()
    assert stopped.startswith(prompt) and "\ufffd" not in stopped


def test_without_a_model_it_says_so(browser, model, tmp_path):
    """No folder, weights that were cut short, a weight that is missing: a page for each, from one
    process."""
    folders = [tmp_path / name for name in ("none", "cut", "missing")]
    for folder in folders[1:]:
        shutil.copytree(model, folder)
    cut, missing = (folder / "model.safetensors" for folder in folders[1:])
    cut.write_bytes(cut.read_bytes()[:-100])
    weights = load(missing.read_bytes())  # not mapped, or Windows would not let it be written
    del weights["ln_f.bias"]
    save_file(weights, missing, {"format": "pt"})
    command = [sys.executable, "-c", PAGES, *map(str, folders)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    process = subprocess.Popen(command, cwd=ROOT / "space", env=os.environ | OFFLINE, **pipes)
    try:
        for _ in folders:
            page = browser.new_page()
            page.goto(process.stdout.readline().strip())
            page.wait_for_selector("text=There is no model here yet")
            assert "export_hf.py" in page.inner_text("body")
            page.close()
    finally:
        process.kill()
        process.communicate()
