"""The leaderboard's page in a real browser: sorting, filters, tabs, submission, no request to elsewhere.

It stands on headless Chromium and on the app as a process of its own; both are stopped at the end of each test.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import board
import pytest
from huggingface_hub import HfApi
from results_factory import DATA_FILES, metric, valid_results

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser; pip install playwright")
pytest.importorskip(
    "gradio", reason="the page is made with gradio; pip install -r recipes/spaces/leaderboard/requirements.txt"
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH; install Debian's package chromium"),
]
APP = board.FOLDER / "app.py"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
WAIT = 45_000  # milliseconds; of two cores that do other things as well
ATTACK = "<img src=x onerror=alert(1)>"


def write(folder: Path, n: int) -> None:
    """n valid results, a third of them with their settings changed, and five that are refused."""
    files: dict[str, object] = {"data_files.json": DATA_FILES}
    for i in range(n):
        setting = "oracle" if i % 3 == 0 else "normal"
        f1, size = round(0.9 - 0.8 * i / n, 4), float((i * 7919) % 30_000 + 5)
        scores = {"em": f1 / 2, "f1": f1, "recall@5": 0.5}
        changes = {"setting": setting, "metrics": scores, "efficiency__bytes_per_span": size}
        kind = {"system__kind": "text", "system__codec": None, "system__memory_size": None} if i % 2 else {}
        files[f"results/{i % 20}/{i}.json"] = valid_results(system__name=f"system-{i}", **changes, **kind)
    files["results/attack.json"] = valid_results(system__name=ATTACK, metrics={"f1": metric(0.95)})
    files["results/bad/newer.json"] = valid_results(schema_version=2)
    files["results/bad/wrong.json"] = valid_results(metrics={"em": 0.5, "f1": 0.4})
    files["results/bad/attack.json"] = valid_results(system__url=f"javascript:{ATTACK}")
    files["results/bad/broken.json"] = "{"
    files["results/bad/large.json"] = " " * 2_000_000
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """The app in a process of its own; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(APP), "--results", str(folder), "--port", str(port), "--no-revision-check"]
    log = folder.parent / "app.log"
    with log.open("w") as file:
        process = subprocess.Popen([*command, *options], stdout=file, stderr=subprocess.STDOUT, env=os.environ)
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                opener.open(f"http://127.0.0.1:{port}/", timeout=5).close()
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)
    assert "Traceback" not in log.read_text(), log.read_text()


@contextlib.contextmanager
def browsing(address: str, profile: Path) -> Iterator[object]:
    """A page of a new browser; at the end nothing may have left the machine or gone wrong."""
    requests, errors = [], []
    with playwright.sync_playwright() as driver:
        options = {"executable_path": CHROMIUM, "args": FLAGS, "viewport": {"width": 1400, "height": 1100}}
        browser = driver.chromium.launch_persistent_context(str(profile), **options)
        try:
            page = browser.pages[0]
            page.set_default_timeout(WAIT)
            page.on("request", lambda request: requests.append(request.url))
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("dialog", lambda dialog: (errors.append(dialog.message), dialog.dismiss()))
            page.goto(address)
            yield page
        finally:
            browser.close()
    assert errors == []
    away = [url for url in requests if not url.startswith((f"{address}/", "data:", "blob:", "about:"))]
    assert requests and away == []


def wait_for(page, setting: str, count: str) -> None:
    """Until the line above the table begins so, and the table has been drawn."""
    script = "([id, count]) => document.querySelector(id)?.innerText.split('\\n')[0].startsWith(count)"
    page.wait_for_function(script, arg=[f"#table-{setting}", count])


def column(page, setting: str, header: str) -> list[str]:
    """The cells of a column as they are shown, from the top."""
    script = """([id, title]) => {
        const table = document.querySelector(id);
        const heads = [...table.querySelectorAll("th")].map(th => th.title.replace(/ [▲▼]$/, ""));
        return [...table.querySelectorAll("[role=row]")].map(row => [...row.querySelectorAll("[role=gridcell]")])
          .filter(cells => cells.length).map(cells => cells[heads.indexOf(title)].innerText);
    }"""
    return page.evaluate(script, [f"#table-{setting}", header])


def sort_by(page, setting: str, header: str, arrow: str) -> list[str]:
    """Clicks on the header, and waits for the order."""
    page.locator(f"#table-{setting} th[title^='{header}']").first.click()
    page.wait_for_selector(f"#table-{setting} th[title='{header} {arrow}']")
    page.wait_for_timeout(200)
    return column(page, setting, header)


def numbers(cells: list[str]) -> list[float]:
    return [float(cell.split(" ")[0].replace(",", "")) for cell in cells]


def check_tables(page) -> None:
    """What is shown is escaped, and sorted by what it means."""
    wait_for(page, "normal", "41 of 41 results")
    assert column(page, "normal", "System")[:3] == [ATTACK, "system-1", "system-2"]
    assert page.locator("#table-normal img").count() == 0
    card = page.locator("#table-normal a").first
    assert card.get_attribute("target") == "_blank" and card.get_attribute("href").endswith("/README.md")
    for name in ("size", "time"):  # drawn behind the table
        page.wait_for_selector(f"#{name}-normal .js-plotly-plot", state="attached")
    assert len(page.query_selector_all("#size-normal .js-plotly-plot, #time-normal .js-plotly-plot")) == 2
    sizes = numbers(sort_by(page, "normal", "Bytes/span", "▲"))
    assert sizes == sorted(sizes) and [str(int(size)) for size in sizes] != sorted(str(int(size)) for size in sizes)
    sizes = numbers(sort_by(page, "normal", "Bytes/span", "▼"))
    assert len(sizes) > 5 and sizes == sorted(sizes, reverse=True)
    assert column(page, "normal", "System") != sorted(column(page, "normal", "System"))
    scores = numbers(sort_by(page, "normal", "f1", "▼"))
    assert scores == sorted(scores, reverse=True)


def check_filters(page) -> None:
    """Filters of one tab, and the other tabs."""
    page.locator("#search-normal textarea, #search-normal input").first.fill("system-1 MUSIQUE")
    wait_for(page, "normal", "8 of 41 results")
    assert all(name.startswith("system-1") for name in column(page, "normal", "System"))
    page.locator("#kind-normal input").click()
    page.get_by_role("option", name="text").first.click()
    wait_for(page, "normal", "5 of 41 results")
    assert set(column(page, "normal", "Kind")) == {"text"}
    page.get_by_role("tab", name="oracle (20)").click()
    wait_for(page, "oracle", "20 of 20 results")
    assert column(page, "oracle", "System")[0] == "system-0"
    page.get_by_role("tab", name="Invalid (5)").click()
    page.wait_for_selector("#refused [role=gridcell]")
    told = page.locator("#refused").inner_text()
    assert "results/bad/newer.json" in told and "schema_version must be 1, got 2: made by a newer" in told
    assert "metrics.em must be <= metrics.f1" in told and "is not a 'uri'" in told


def check_submission(page, refused: Path, upload: Path, request: str) -> None:
    """A refused file, and one that becomes a pull request."""
    page.get_by_role("tab", name="Submit").click()
    page.set_input_files("#upload input[type=file]", refused)
    page.wait_for_selector("#checked .problems li")
    assert "schema_version must be 1" in page.locator("#checked").inner_text()
    assert page.locator("#open-request").is_disabled()
    page.locator("#upload button[aria-label='Clear'], #upload button[aria-label*='emove']").first.click()
    page.set_input_files("#upload input[type=file]", upload)
    page.wait_for_selector("#checked .good")
    page.locator("#open-request:not([disabled])").click()
    page.wait_for_selector("#answer .good a")
    assert page.locator("#answer a").get_attribute("href") == request


def test_the_page(tmp_path, hub):
    repo = "loopback/board-of-the-page"
    HfApi().create_repo(repo, repo_type="dataset", exist_ok=True)
    write(tmp_path / "board", 60)
    upload = tmp_path / "mine.json"
    upload.write_text(json.dumps(valid_results(system__name="mine"), indent=1))
    served = serving(tmp_path / "board", "--submit-to", repo)
    with served as address, browsing(address, tmp_path / "profile") as page:
        check_tables(page)
        check_filters(page)
        bad = tmp_path / "board" / "results" / "bad" / "newer.json"
        check_submission(page, bad, upload, f"{hub.url}/datasets/{repo}/discussions/1")
        assert hub.token not in page.content()

        (tmp_path / "board" / "results" / "late.json").write_text(json.dumps(valid_results(system__name="late")))
        page.locator("#refresh").click()
        page.get_by_role("tab", name="normal (42)").click()
    sent_files = HfApi().list_repo_files(repo, repo_type="dataset", revision="refs/pr/1")
    (path,) = [path for path in sent_files if "mine" in path]
    sent = HfApi().hf_hub_download(repo, path, repo_type="dataset", revision="refs/pr/1")
    assert Path(sent).read_bytes() == upload.read_bytes()


def test_the_page_with_five_thousand_results(tmp_path):
    write(tmp_path / "board", 5000)
    with serving(tmp_path / "board") as address, browsing(address, tmp_path / "profile") as page:
        wait_for(page, "normal", "3,334 of 3,334 results, page 1 of 34")
        smallest = numbers(sort_by(page, "normal", "Bytes/span", "▲"))
        assert smallest == sorted(smallest) and smallest[0] < 30
        page.locator("#page-normal input").first.fill("34")
        wait_for(page, "normal", "3,334 of 3,334 results, page 34 of 34")
        assert numbers(column(page, "normal", "Bytes/span"))[0] > 29_000
        page.locator("#search-normal textarea, #search-normal input").first.fill("system-4999")
        wait_for(page, "normal", "1 of 3,334 results")
        assert column(page, "normal", "System") == ["system-4999"]
