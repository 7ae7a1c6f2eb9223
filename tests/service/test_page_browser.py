"""The page in headless Chromium: each control, a phone, the keyboard alone, dark mode, hostile input, two sessions.

The command serves clara-pico over three fact sheets and a hostile one, in a process of its own.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser; pip install playwright")
pytest.importorskip("gradio", reason="the page is made with gradio; pip install -e '.[ui]'")

from page_steps import ask, cell, contrast, is_wide, open_files, tab_to, told, upload, value  # noqa: E402

from modeling_clara import CLaRaForRAG, CompressedCorpus  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH; install Debian's package chromium"),
]
ROOT = Path(__file__).parents[2]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
WAIT = 60_000  # milliseconds; of two cores that do other things as well
ATTACK = "<img src=x onerror=alert(1)><script>alert(2)</script>{{value}} ${alert(3)} [a](javascript:alert(4)) **b**"
SHEETS = [
    {"id": "otto", "title": "Otto Garner", "text": "Otto works as a pilot. Otto lives in Lima."},
    {"id": "mira", "title": "Mira Hollis", "text": "Mira is a baker by trade. Mira has a home in Oslo."},
    {"id": f"x{ATTACK}", "title": f"Ines {ATTACK}", "text": f"Ines speaks Danish at home. {ATTACK}"},
    {"id": "long", "title": "Hugo Archer", "text": " ".join(["Hugo is a miner by trade. Hugo keeps a goat."] * 14)},
]
QUESTION, ANSWER = "What is the job of Mira Hollis?", "baker"
UNKNOWN = "Vera Stone"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of clara-pico whose threshold lies between the two questions, and a corpus of it."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(ROOT / "model_cards" / "clara-pico", folder / "model")
    model = CLaRaForRAG.from_pretrained(folder / "model")
    corpus = CompressedCorpus.build(model, SHEETS, folder / "corpus")
    known, unknown = (row[0].score for row in model.retrieve([QUESTION, UNKNOWN], corpus=corpus, top_k=1))
    assert known > unknown + 0.1
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"min_score": (known + unknown) / 2}))
    return folder


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    """Where the page is; at the end nothing of it is left on the disk, and no error was logged."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    (folder / "tmp").mkdir()
    command = [sys.executable, "-m", "modeling_clara.cli", "ui", str(folder / "corpus"), "--json"]
    options = ["--model", str(folder / "model"), "--example", QUESTION, "--example", UNKNOWN]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=log, env=environment, text=True
        )
    try:
        line = process.stdout.readline()
        assert line, (folder / "log").read_text()
        yield json.loads(line)["url"].rstrip("/")
    finally:
        process.terminate()
        process.wait(30)
    assert "Traceback" not in (folder / "log").read_text(), (folder / "log").read_text()
    assert not list((folder / "tmp").glob("clara-ui-*"))


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def visiting(browser, address: str, logged=(), **options) -> Iterator[object]:
    """A page of a new visitor; at the end nothing may have left the machine or gone wrong but what is `logged`."""
    requests, errors = [], []
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    try:
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: (errors.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        page.wait_for_selector("#question input")
        page.wait_for_selector("#told [role=status]", state="attached")
        yield page
    finally:
        context.close()
    assert [error for error in errors if not error.startswith(tuple(logged))] == []
    away = [url for url in requests if not url.startswith((f"{address}/", "data:", "blob:", "about:"))]
    assert requests and away == []


def test_each_control(browser, address):
    with visiting(browser, address) as page:
        page.get_by_role("button", name=QUESTION).click()
        page.wait_for_function("text => document.querySelector('#question input').value === text", arg=QUESTION)
        page.click("#ask")
        told(page, "from the full text.")
        assert ANSWER in value(page, "#memory") and value(page, "#text")
        assert page.locator("#words li").count() > 3
        assert page.locator(".clara-passage h3").all_inner_texts() == ["1. Mira Hollis"]
        assert "mira" in page.locator(".clara-passage .place").inner_text()
        assert page.locator(".clara-passage mark").inner_text() == SHEETS[1]["text"]
        assert cell(page, "of these for the passages", 0) == 8 and cell(page, "Until the end", 1) > 0
        page.locator("#size input").focus()
        page.keyboard.press("ArrowLeft")
        told(page, "4 vectors", "#size")
        told(page, "4 vectors", "#picture")
        page.locator("#top-k input[type=number]").fill("3")
        page.locator("#expand input[type=number]").fill("1")
        page.locator("#expand input[type=number]").blur()
        ask(page, QUESTION)
        page.wait_for_function("() => document.querySelectorAll('.clara-passage').length === 3")
        read = page.locator(".clara-passage .place").all_inner_texts()
        assert "read as text" in read[0] and all("read from 4 vectors" in text for text in read[1:])
        page.get_by_role("button", name="What does the memory of passage 2 say?").click()
        said = page.get_by_label("Passage 2, from its memory alone")
        said.wait_for()
        page.wait_for_function("() => document.querySelectorAll('.passage textarea')[0]?.value.length > 5")
        page.get_by_text("What is counted").click()
        page.get_by_text("Both answers search.").wait_for()
        page.get_by_role("button", name="How much is lost").click()
        page.get_by_text("As a table").click()
        assert page.locator("#rates td:text-is('0.918')").is_visible()
        page.wait_for_selector("#rate canvas, #rate svg.marks")


def test_an_abstained_answer_and_errors_lose_nothing(browser, address):
    with visiting(browser, address) as page:
        ask(page, QUESTION)
        answer = value(page, "#memory")
        page.fill("#question input", " ")
        page.press("#question input", "Enter")
        told(page, "Write a question first.")
        page.fill("#question input", "x" * 3000)
        page.press("#question input", "Enter")
        told(page, "may have 2,000 characters, this one has 3,000")
        assert value(page, "#memory") == answer and page.input_value("#question input") == "x" * 3000
        ask(page, UNKNOWN, end="Not answered.")
        assert (
            "below" in page.locator("#told").inner_text() and "Nothing was read" in page.locator("#told").inner_text()
        )
        assert value(page, "#memory") == value(page, "#text") == "(no answer)"
        assert "not read" in page.locator(".clara-passage .place").first.inner_text()


def test_own_files(browser, address, folder, tmp_path):
    good, broken = tmp_path / "sheet.md", tmp_path / "broken.pdf"
    good.write_text("Nora Field works as a judge. Nora lives in Quito.\n" * 20)
    broken.write_bytes(b"%PDF-1.4 nothing")
    with visiting(browser, address) as page:
        open_files(page)
        page.click("#compress")
        told(page, "Choose at least one file first.", "#files-told")
        upload(page, good, broken)
        assert "broken.pdf cannot be read" in page.locator("#files-told .clara-problem").inner_text()
        assert page.locator("#where input:checked").get_attribute("value") == "Your files"
        ask(page, "What is the job of Nora Field?", end="nswered")
        page.get_by_text("from your files").wait_for()
        first = page.locator(".clara-passage").first
        assert "sheet" in first.locator("h3").inner_text() and "of" in first.locator(".place").inner_text()
        assert first.locator("mark").count() == 1 and first.locator(".near").count() >= 1
        page.locator("#where").get_by_label("corpus").check()
        ask(page, QUESTION)
        assert page.locator(".clara-passage h3").first.inner_text() == "1. Mira Hollis"
        page.get_by_text("Passages that were read, from corpus").wait_for()
        assert list((folder / "tmp").glob("clara-ui-*/*/files/sheet.md"))
        page.click("#remove")
        told(page, "Your files are removed.", "#files-told")
        assert not list((folder / "tmp").glob("clara-ui-*/*")) and not list((folder / "tmp").rglob("sheet.md"))
        page.locator("#where").wait_for(state="hidden")


def test_a_file_that_is_too_large(browser, address, tmp_path):
    good, large = tmp_path / "good.md", tmp_path / "large.txt"
    good.write_text("Nora Field works as a judge.")
    large.write_bytes(b"x" * 11 * 2**20)
    with visiting(
        browser, address, ("Failed to load resource: the server responded with a status of 404", "Response")
    ) as page:
        open_files(page)
        page.set_input_files("#files input[type=file]", large)
        page.get_by_text('exceed the maximum allowed size of 10.0 Mb: "large.txt"').wait_for()
        upload(page, good)
        ask(page, QUESTION, end="nswered")
        assert page.locator(".clara-passage h3").all_inner_texts() == ["1. good"]


def test_a_compression_can_be_stopped(browser, address, tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text('{"text": ""}\n' * 750_000)
    with visiting(browser, address) as page:
        open_files(page)
        page.set_input_files("#files input[type=file]", long)
        page.wait_for_selector("#files :text('.jsonl')")
        page.click("#compress")
        told(page, "Reading the files", "#files-told")
        assert page.locator("#files-told [aria-live=polite] p").count() >= 1
        page.click("#stop")
        told(page, "Stopped. Nothing was changed.", "#files-told")
        assert not page.locator("#where").is_visible()


def test_hostile_input_is_text(browser, address, tmp_path):
    path = tmp_path / "<img src=x onerror=alert(5)>.html"
    path.write_text(f"<title>{ATTACK.replace('<', '&lt;')}</title><p>Ines {ATTACK.replace('<', '&lt;')}</p>")
    with visiting(browser, address) as page:
        page.locator("#top-k input[type=number]").fill("4")
        page.locator("#top-k input[type=number]").blur()
        ask(page, f"Does Ines speak Danish? {ATTACK}", end="nswered")
        assert ATTACK in page.locator(".clara-passage:has-text('Danish') h3").inner_text()
        open_files(page)
        upload(page, path)
        ask(page, f"Ines {ATTACK}", end="nswered")
        told(page, ATTACK, ".clara-passage")
        page.wait_for_timeout(500)
        assert page.locator("img[src=x], script:text('alert'), a[href^='javascript']").count() == 0


def test_a_phone_and_dark_mode(browser, address, tmp_path):
    path = tmp_path / f"{'a long name ' * 8}.txt"
    path.write_text("Nora Field works as a judge. " + "w" * 300)
    options = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "has_touch": True, "is_mobile": True}
    with visiting(browser, address, **options) as page:
        assert not is_wide(page)
        ask(page, QUESTION)
        assert not is_wide(page)
        page.get_by_role("button", name="How much is lost").tap()
        page.get_by_text("As a table").tap()
        open_files(page)
        upload(page, path)
        ask(page, "What is the job of Nora Field?", end="nswered")
        page.wait_for_timeout(500)
        assert not is_wide(page)
        assert "dark" in page.locator("body").get_attribute("class")
        for place in ("h1", ".clara-passage mark", ".clara-passage .place", "#memory textarea", "#size output"):
            assert contrast(page, place) > 4.5, place
    with visiting(browser, address) as page:
        ask(page, QUESTION)
        assert "dark" not in (page.locator("body").get_attribute("class") or "")
        for place in ("h1", ".clara-passage mark", ".clara-passage .place", "#memory textarea", "#size output"):
            assert contrast(page, place) > 4.5, place


def test_the_keyboard_alone(browser, address):
    with visiting(browser, address) as page:
        page.wait_for_function("() => document.activeElement.matches('#question input')")
        page.keyboard.type(QUESTION)
        page.keyboard.press("Enter")
        told(page, "from the full text.")
        page.wait_for_selector(".clara-passage")
        tab_to(page, "#ask")
        tab_to(page, "#size input")
        page.keyboard.press("ArrowLeft")
        told(page, "4 vectors", "#size")
        assert page.evaluate("document.activeElement.getAttribute('aria-valuetext')") == "4 vectors"
        tab_to(page, "#top-k input[type=range]")
        page.keyboard.press("ArrowRight")
        tab_to(page, "#expand input[type=range]")
        tab_to(page, "#own button")
        page.keyboard.press("Enter")
        tab_to(page, "#files button")
        tab_to(page, "#compress")
        tab_to(page, "summary")
        page.keyboard.press("Enter")
        page.get_by_text("Both answers search.").wait_for()
        tab_to(page, ".passage button")
        page.keyboard.press("Enter")
        page.get_by_label("Passage 1, from its memory alone").wait_for()
        tab_to(page, "#rates button")
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("input, textarea, select")].filter(e => e.checkVisibility()
              && !e.getAttribute("aria-label") && ![...(e.labels ?? [])].some(l => l.innerText.trim()))
              .map(e => e.outerHTML)"""
        )
        assert unnamed == []


def test_two_sessions_at_once(browser, address, folder, tmp_path):
    path = tmp_path / "sheet.md"
    path.write_text("Nora Field works as a judge. Nora lives in Quito.")
    with visiting(browser, address) as one, visiting(browser, address) as other:
        open_files(one)
        upload(one, path)
        assert not other.locator("#where").is_visible()
        one.fill("#question input", "What is the job of Nora Field?")
        other.fill("#question input", QUESTION)
        one.press("#question input", "Enter")
        other.press("#question input", "Enter")
        for page in (one, other):
            told(page, "nswered")
            page.wait_for_selector(".clara-passage")
        assert one.locator(".clara-passage h3").all_inner_texts() == ["1. sheet"]
        assert other.locator(".clara-passage h3").all_inner_texts() == ["1. Mira Hollis"]
        told(other, "from the full text.")
        assert value(other, "#memory").startswith(ANSWER)


def test_the_space_serves_the_same_page(folder, browser, tmp_path):
    """Built into a folder that has all it needs, away from this checkout."""
    from recipes.spaces.publish import PAGE, build_space

    build_space(PAGE, tmp_path / "space")
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"CORPUS": str(folder / "corpus"), "MODEL": str(folder / "model"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "app.py", "--json"]
    with (tmp_path / "log").open("w") as log:
        pipes = {"stdout": subprocess.PIPE, "stderr": log, "text": True}
        process = subprocess.Popen(command, cwd=tmp_path / "space", env=environment, **pipes)
    try:
        line = process.stdout.readline()
        assert line, (tmp_path / "log").read_text()
        with visiting(browser, json.loads(line)["url"].rstrip("/")) as page:
            ask(page, QUESTION)
            assert value(page, "#memory").startswith(ANSWER)
    finally:
        process.terminate()
        process.wait(30)
    environment.pop("CORPUS")
    options = {"cwd": tmp_path / "space", "env": environment, "capture_output": True, "text": True, "check": False}
    refused = subprocess.run(command, **options)
    assert refused.returncode == 1 and "`CORPUS` must name" in refused.stderr
