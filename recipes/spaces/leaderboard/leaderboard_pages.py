"""The words and the looks of the page: explanations, what is told of a file, theme and style.

Everything of a results.json is escaped here.
"""

import json
from pathlib import Path

import gradio as gr
from leaderboard_source import Loaded
from leaderboard_submit import Checked, Outcome
from leaderboard_table import FIRST, LAST
from leaderboard_text import escaped, link, plain

LONG = 2000  # letters of a reason or a warning

THEME = gr.themes.Base(
    primary_hue="blue",
    neutral_hue="slate",
    font=["ui-sans-serif", "system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)

CSS = """
#intro h1 { font-size: 1.5rem; font-weight: 650; margin: 0 0 .25rem; }
#intro p { margin: .15rem 0; color: var(--body-text-color); }
#intro .warning, .problems, .good { padding: .4rem .8rem; margin: .4rem 0; color: var(--body-text-color); }
#intro .warning, .problems { border-left: 4px solid #d97706; }
.good { border-left: 4px solid #059669; }
.problems ul { list-style: disc; padding-left: 1.2rem; }
#refresh { align-self: flex-start; }
.board [role=gridcell], .board [role=columnheader] { font-family: var(--font); font-variant-numeric: tabular-nums; }
.board a { color: var(--link-text-color); text-decoration: underline; }
.js-plotly-plot :is(.xtick, .ytick, .g-xtitle, .g-ytitle, .legend, .annotation) text {
  fill: var(--body-text-color) !important;
}
.board th { cursor: pointer; }
.board :is(th[data-testid=header-0], [role=gridcell][data-col="0"]) { position: sticky; left: 0; z-index: 1; }
.board [role=gridcell][data-col="0"] { background: var(--background-fill-primary); }
.board .cell-menu-button { display: none; }
#about-text :is(td, th) { border-color: var(--border-color-primary); }
.js-plotly-plot .modebar-btn--logo { display: none !important; }
"""

LOW_FIRST = [column.header for column in (*FIRST, *LAST) if column.form is None or column.is_low_good]
SCRIPT = Path(__file__).with_name("leaderboard_sort.js").read_text(encoding="utf-8")
HEAD = f"<script>const LOW_FIRST = {json.dumps(LOW_FIRST)};\n{SCRIPT}</script>"

ABOUT = """
### What this shows

Each row is one `results.json`: one system, on one data file, in one setting, made by `recipes.evaluate`.

| tab | what the system reads |
|---|---|
| normal | documents given with each question, gold ones among others; the system picks what it reads |
| oracle | as normal, and the gold documents are sure to be among them |
| corpus | the system searches one corpus of all documents |
| gold_only | the gold documents and nothing else |
| closed_book | the question alone |

Scores lie between 0 and 1 and come with their bootstrap interval over questions, as `0.412 [0.371, 0.455]`. Two
systems whose intervals overlap may still differ on the same questions: `comparisons` in the files say so.

| column | meaning |
|---|---|
| f1, em, containment, bag_containment | answer against the reference answers; containment: the answer contains one |
| recall@k, hit@k, ndcg@k, precision@k, mrr | the retrieved documents against the gold documents |
| abstention | share of questions without an answer that the system did not answer |
| Bytes/span | of one span as it was read: its stored memory, or its text |
| Tokens read | positions that the reader reads, mean over questions |
| p50 ms, p95 ms | one question at a time, from stored memories to the answer, on the machine of `hardware` |
| k read, k compared | memory vectors of a span that are read, and that are compared with the question |
| Documents | documents read at most |
| Failed | questions that ended in an error or without text; they count as wrong |
| Revision | commit of the model, and whether it was found on the Hub |

### Getting results

```
python -m recipes.evaluate --help
```

### Rules

1. `results.json` follows `results.schema.json`, schema_version 1.
2. Its numbers agree with each other: counts add up, low <= value <= high, em <= f1, recall rises with k, p50 <= p95.
3. The data are one of `data_files.json` of the results repository, with the same SHA-256 and all of
   the questions, or one half of them (`--half`).
4. The model is public on the Hub at a commit (40 hex digits), or the system is external and has a URL.
5. Of the same system, model, data and setting the newest file counts.

A file that breaks a rule is listed under Invalid with the reason.
"""


def intro_html(loaded: Loaded) -> str:
    """Title, what this is, where it was read, and warnings."""
    warnings = "".join(f"<p class='warning'>{escaped(text, LONG)}</p>" for text in loaded.warnings)
    return (
        "<h1>CLaRa leaderboard</h1>"
        "<p>Question answering over documents: quality of answers against what is stored and how long it takes. "
        "A tab is a setting, a row is one measurement; click a column's header to sort by it.</p>"
        f"<p>Read from {escaped(loaded.place, LONG)}.</p>{warnings}"
    )


def refused_table(loaded: Loaded) -> list[list[str]]:
    """Path and reasons of each file that is not shown."""
    return [[plain(item.path, 300), plain(" · ".join(item.reasons), LONG)] for item in loaded.refused]


def submit_html(repo: str | None) -> str:
    """How to submit, and to where."""
    if repo is None:
        return (
            "<p>Results are read from a folder: files are checked here, but there is no repository to submit them to. "
            "Start with <code>--submit-to owner/name</code> or read results from a dataset repo.</p>"
        )
    return (
        f"<p>Upload the results.json that recipes.evaluate wrote. It is checked here, and a pull request in the "
        f"dataset <b>{escaped(repo)}</b> adds it in your name.</p>"
    )


def checked_html(checked: Checked, repo: str | None) -> str:
    """The problems of an upload, or what its pull request will say."""
    if checked.problems:
        items = "".join(f"<li>{escaped(problem, LONG)}</li>" for problem in checked.problems)
        return f"<div class='problems'><b>This file cannot be submitted:</b><ul>{items}</ul></div>"
    notes = "".join(f"<p>{escaped(note, LONG)}</p>" for note in checked.notes)
    where = f" It will be added to {escaped(repo)} as <code>{escaped(checked.path, 400)}</code>." if repo else ""
    return f"<div class='good'><b>All checks passed.</b>{where}{notes}</div>"


def outcome_html(outcome: Outcome) -> str:
    """The address of the pull request, or why there is none."""
    style, address = ("good", f" {link(outcome.url, outcome.url)}") if outcome.url else ("problems", "")
    return f"<div class='{style}'>{escaped(outcome.message, LONG)}{address}</div>"
