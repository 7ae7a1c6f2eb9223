"""Turns valid results into one pandas frame, filters it, and lays it out for gr.Dataframe.

The frame holds numbers, the layout adds what a cell shows in their place; text in HTML cells is escaped here.
"""

import re
from typing import NamedTuple

import pandas as pd
from leaderboard_source import Entry
from leaderboard_text import card_url, data_name, escaped, link, plain
from validation import parse_time

SETTINGS = ("normal", "oracle", "corpus", "gold_only", "closed_book")
METRICS = ("f1", "em", "containment", "bag_containment", "recall", "hit", "ndcg", "precision", "mrr", "abstention")
METRIC = re.compile(r"em|f1|containment|bag_containment|mrr|abstention|(recall|hit|ndcg|precision)@\d{1,4}")
MAX_METRICS = 24  # columns of one table: one file must not widen it without end
NOTHING = "–"
ALL = "all"


class Column(NamedTuple):
    """A column: its header, its key in the frame, pixels, how a number is written, and whether a small one is good."""

    header: str
    key: str
    width: int = 90
    form: str | None = None  # None for text
    is_low_good: bool = False

    @property
    def datatype(self) -> str:
        """What gr.Dataframe is told of it."""
        return "number" if self.form else "html" if self.key in ("system", "model") else "str"


FIRST = (Column("System", "system", 190), Column("Model", "model", 210), Column("Data", "data", 130))
LAST = (
    Column("Bytes/span", "bytes_per_span", 122, "{:,.0f}", is_low_good=True),
    Column("Tokens read", "tokens_read", 131, "{:,.1f}", is_low_good=True),
    Column("p50 ms", "p50", 90, "{:,.1f}", is_low_good=True),
    Column("p95 ms", "p95", 90, "{:,.1f}", is_low_good=True),
    Column("k read", "memory_size", 90, "{:.0f}"),
    Column("k compared", "retrieval_memory_size", 122, "{:.0f}"),
    Column("Codec", "codec"),
    Column("Documents", "top_k", 113, "{:.0f}"),
    Column("Corpus", "corpus"),
    Column("Retriever", "retriever", 120),
    Column("Kind", "kind", 110),
    Column("Failed", "failed", 90, "{:,.0f}"),
    Column("Questions", "questions", 113, "{:,.0f}"),
    Column("Backbone", "backbone", 170),
    Column("Date", "date", 120),
    Column("Revision", "revision", 150),
)


def columns_of(metrics: list[str]) -> list[Column]:
    """The columns of a table with these metrics, from left to right."""
    return [*FIRST, *(Column(name, name, 165, "{:.3f}") for name in metrics), *LAST]


def make_frame(entries: list[Entry]) -> pd.DataFrame:
    """One row a result: text as it is, numbers as floats with NaN for none, metrics as `f1`, `f1 low`, `f1 high`."""
    rows = [_row(entry) for entry in entries]
    columns = columns_of([])
    names = ["setting", "url", "repo", "commit", "path", "time", "search", *(column.key for column in columns)]
    frame = pd.DataFrame(rows, columns=list(dict.fromkeys([*names, *(key for row in rows for key in row)])))
    numbers = [column.key for column in columns if column.form] + [name for name in frame.columns if name not in names]
    return frame.astype(dict.fromkeys(numbers, "float64"))


def _row(entry: Entry) -> dict:
    results = entry.results
    system, model, efficiency = results["system"], results["model"], results["efficiency"]
    latency = (efficiency["latency_ms"] or {}).get("total") or {}
    revision, corpus = model["revision"], results["corpus"]
    row = {
        **{name: system[name] for name in ("kind", "memory_size", "retrieval_memory_size", "top_k")},
        **{name: plain(system[name] or NOTHING) for name in ("codec", "retriever")},
        **{name: efficiency[name] for name in ("bytes_per_span", "tokens_read")},
        **{name: latency.get(name) for name in ("p50", "p95")},
        **{name: results["counts"][name] for name in ("failed", "questions")},
        "system": plain(system["name"]),
        "url": system["url"] or "",
        "model": plain(model["repo"] or NOTHING),
        "repo": model["repo"] or "",
        "commit": revision or "",
        "revision": f"{revision[:7]} {entry.model_state}" if revision else NOTHING,
        "backbone": plain(model["backbone"] or NOTHING),
        "corpus": f"{plain(corpus['repo'] or 'unnamed')} ({corpus['documents']:,})" if corpus else NOTHING,
        "data": plain(data_name(results["data"])),
        "setting": results["setting"],
        "date": results["created"][:10],
        "time": parse_time(results["created"]).timestamp(),
        "path": entry.path,
    }
    for name, metric in results["metrics"].items():
        if METRIC.fullmatch(name):  # another is not documented, and must not take the place of a column
            row |= {name: metric["value"], f"{name} low": metric["low"], f"{name} high": metric["high"]}
    words = [row[name] for name in ("system", "model", "backbone", "data", "retriever", "codec", "kind", "path")]
    return row | {"search": "\n".join(words).casefold()}


def metric_names(frame: pd.DataFrame) -> list[str]:
    """The metrics of these rows that get a column, best known first; the rarest stay away when there are too many."""

    def place(name: str) -> tuple[int, int]:
        family, _, depth = name.partition("@")
        return METRICS.index(family), int(depth or 0)

    names = [name.removesuffix(" low") for name in frame.columns if name.endswith(" low")]
    counts = frame[names].notna().sum()
    kept = sorted((name for name in names if counts[name]), key=lambda name: (-counts[name], place(name)))
    return sorted(kept[:MAX_METRICS], key=place)


def choices(frame: pd.DataFrame, key: str) -> list[str]:
    """What the column can be filtered by, `all` first; numbers in their order."""
    values = sorted(value for value in frame[key].dropna().unique() if value != NOTHING)
    return [ALL, *(value if isinstance(value, str) else f"{value:.0f}" for value in values)]


def filtered(frame: pd.DataFrame, text: str | None = None, **wanted: str | None) -> pd.DataFrame:
    """The rows with every word of the text, in any case, and the wanted values of columns (data, kind, codec ...).

    A value is one of `choices`; `all` or nothing wants anything.
    """
    keep = pd.Series(True, index=frame.index)
    for word in (text or "").casefold().split():
        keep &= frame["search"].str.contains(word, regex=False)
    for key, value in wanted.items():
        if not value or value == ALL:
            continue
        if pd.api.types.is_numeric_dtype(frame[key]):
            value = float(value) if re.fullmatch(r"\d{1,15}", value) else float("nan")
        keep &= frame[key] == value
    return frame[keep]


def ranked(frame: pd.DataFrame, metric: str | None) -> pd.DataFrame:
    """The rows by this metric, the best first, those without it last; the newest first where it is the same."""
    keys = [metric, "time"] if metric in frame.columns else ["time"]
    return frame.sort_values(keys, ascending=False, na_position="last", kind="stable")


def parse_order(text: str | None, columns: list[Column]) -> tuple[int, bool] | None:
    """`3 up` or `3 down` as the number of a column and whether its values rise; None if it says neither."""
    match = re.fullmatch(r"(\d{1,3}) (up|down)", text or "")
    if match is None or int(match[1]) >= len(columns):
        return None
    return int(match[1]), match[2] == "up"


def ordered(frame: pd.DataFrame, column: Column, is_rising: bool) -> pd.DataFrame:
    """The rows by this column, numbers as numbers and text without its case; those without a value last."""
    values = frame[column.key]
    if column.form is None:
        values = values.str.casefold().where(values != NOTHING)
    return frame.loc[values.sort_values(ascending=is_rising, na_position="last", kind="stable").index]


def layout(frame: pd.DataFrame, columns: list[Column], order: tuple[int, bool] | None = None) -> dict:
    """The value of a gr.Dataframe: numbers, beside them what is shown, and an arrow at the column of the order.

    The text of an HTML cell is escaped in `data` too: the widest cell of a column is also rendered from there.
    """
    data, shown = zip(*(_cells(frame, column) for column in columns), strict=True)
    headers = [column.header for column in columns]
    if order is not None:
        headers[order[0]] += " ▲" if order[1] else " ▼"
    return {
        "headers": headers,
        "data": [list(row) for row in zip(*data, strict=True)],
        "metadata": {"display_value": [list(row) for row in zip(*shown, strict=True)], "styling": None},
    }


def _cells(frame: pd.DataFrame, column: Column) -> tuple[list, list]:
    """A column's values and what is shown in their place, None if that is the value itself."""
    values = frame[column.key].tolist() if column.key in frame else [float("nan")] * len(frame)
    if column.key == "model":
        urls = [card_url(*place) for place in zip(frame["repo"], frame["commit"], strict=True)]
    else:
        urls = frame["url"]
    if column.datatype == "html":
        return [escaped(value) for value in values], [link(*pair) for pair in zip(values, urls, strict=True)]
    if column.form is None:
        return values, [None] * len(values)
    # an exponent where a number has no end otherwise
    forms = ["{:.3g}" if value >= 1e12 else column.form for value in values]
    texts = [NOTHING if value != value else form.format(value) for value, form in zip(values, forms, strict=True)]
    if f"{column.key} low" in frame:
        intervals = zip(values, texts, frame[f"{column.key} low"], frame[f"{column.key} high"], strict=True)
        texts = [text if value != value else f"{text} [{low:.3f}, {high:.3f}]" for value, text, low, high in intervals]
    return [None if value != value else value for value in values], texts
