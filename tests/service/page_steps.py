"""What a visitor of the page does and sees, for the tests in a browser."""

from pathlib import Path


def told(page, text: str, place: str = "#told") -> None:
    """Wait until the page says so."""
    script = "([place, text]) => document.querySelector(place)?.innerText.includes(text)"
    page.wait_for_function(script, arg=[place, text])


def ask(page, question: str, end: str = "from the full text.") -> None:
    page.fill("#question input", question)
    page.press("#question input", "Enter")
    told(page, "Searching")
    told(page, end)
    page.wait_for_selector(".clara-passage")


def value(page, place: str) -> str:
    return page.locator(f"{place} textarea").input_value()


def is_wide(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


def open_files(page) -> None:
    page.get_by_role("button", name="Ask your own files").click()
    page.wait_for_selector("#files input[type=file]", state="attached")


def upload(page, *paths: Path, end: str = "Compressed:") -> None:
    """Choose files that were not there before, and compress them."""
    page.set_input_files("#files input[type=file]", list(paths))
    for path in paths:
        page.wait_for_selector(f"#files :text('{path.suffix}')")
    page.click("#compress")
    told(page, end, "#files-told")


def cell(page, row: str, column: int) -> float:
    text = page.locator(f"#costs tr:has(th:text-is('{row}')) td").nth(column).inner_text()
    return float(text.split()[0].replace(",", ""))


def contrast(page, place: str) -> float:
    """Of a text with what is painted behind it, as WCAG counts; colours are drawn to be read as RGB."""
    return page.evaluate(
        """place => {
          const draw = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
          const chain = [];
          for (let e = document.querySelector(place); e; e = e.parentElement) chain.unshift(e);
          const fill = color => { draw.fillStyle = color; draw.fillRect(0, 0, 1, 1); };
          const light = () => { const [r, g, b] = [...draw.getImageData(0, 0, 1, 1).data].map(v => {
            v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
          fill("white");
          for (const e of chain) fill(getComputedStyle(e).backgroundColor);
          const back = light();
          fill(getComputedStyle(chain.at(-1)).color);
          const [low, high] = [back, light()].sort((a, b) => a - b);
          return (high + 0.05) / (low + 0.05);
        }""",
        place,
    )


def tab_to(page, place: str) -> None:
    """Press Tab until the focus is there, and see that it shows."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("place => document.activeElement.matches(place)", place):
            outline = page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)")
            assert outline >= 2, place
            return
    raise AssertionError(f"Tab does not reach {place}")
