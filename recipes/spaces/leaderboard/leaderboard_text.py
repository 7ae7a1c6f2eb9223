"""Makes text that strangers wrote safe to show: as letters, as HTML, as a link.

Nothing of a results.json reaches a page on another way.
"""

import html
import re

from huggingface_hub import constants
from validation import REPO_ID, REVISION, URL

MAX_LENGTH = 80  # letters of one name
TEMPLATE_LETTERS = {ord(letter): f"&#{ord(letter)};" for letter in "{}$`\\"}  # gr.HTML fills in templates


def plain(text: object, limit: int = MAX_LENGTH) -> str:
    """The text on one line, without letters that cannot be seen or turn the direction, cut at `limit` letters."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text))
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def escaped(text: object, limit: int = MAX_LENGTH) -> str:
    """The text as HTML that shows just these letters, also inside an attribute and inside a template of gr.HTML."""
    return html.escape(plain(text, limit)).translate(TEMPLATE_LETTERS)


def link(text: object, url: str) -> str:
    """HTML of a link that opens in a new tab; of the text alone where the address is none of http or https."""
    if URL.fullmatch(url) is None:
        return escaped(text)
    address = escaped(url, limit=len(url))
    return f'<a href="{address}" target="_blank" rel="noopener noreferrer nofollow">{escaped(text)}</a>'


def card_url(repo: str, revision: str) -> str:
    """The model card on the Hub at its revision; nothing where there is no such place."""
    if REPO_ID.fullmatch(repo) is None or REVISION.fullmatch(revision) is None:
        return ""
    return f"{constants.ENDPOINT}/{repo}/blob/{revision}/README.md"


def data_name(data: dict) -> str:
    """The name of the data, with the half of the questions where it was not all of them."""
    half = data.get("half")
    return f"{data['name']} ({half} half)" if half else data["name"]


def safe_name(text: str) -> str:
    """A name for a file or a folder: letters, digits, `.`, `_` and `-`, never hidden, never empty, never a way up."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text.replace("/", "__"))
    return re.sub(r"\.{2,}", ".", name).strip(".-")[:60].strip(".-") or "unnamed"
