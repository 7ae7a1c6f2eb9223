"""Turns valid results into one pandas frame, filters it, and lays it out for gr.Dataframe.
It stands between reading and showing: the frame holds numbers, the layout adds what a cell shows in their place.
It does not know files, the Hub or the interface; text in HTML cells is escaped here.
"""

import re
from collections import Counter
from typing import NamedTuple

import pandas as pd
from leaderboard_source import Entry
from leaderboard_text import card_url, data_name, escaped, link, plain
from validation import parse_time

SETTINGS = ("normal", "oracle", "corpus", "gold_only", "closed_book")
METRIC_ORDER = (
    "f1",
    "em",
    "containment",
    "bag_containment",
    "recall",
    "hit",
    "ndcg",
    "precision",
    "mrr",
    "abstention",
)
METRIC = re.compile(r"em|f1|containment|bag_containment|mrr|abstention|(recall|hit|ndcg|precision)@\d{1,4}")
MAX_METRICS = 24  # columns of one table: one file must not widen it without end
NOTHING = "–"
ALL = "all"


class Column(NamedTuple):
    """A column: its header, its key in the frame, how a number is written, and whether a small one is good."""

    header: str
    key: str
    form: str | None = None  # None for text
    is_low_good: bool = False


FIRST = (Column("System", "system"), Column("Model", "model"), Column("Data", "data"))
LAST = (
    Column("Bytes/span", "bytes_per_span", "{:,.0f}", is_low_good=True),
    Column("Tokens read", "tokens_read", "{:,.1f}", is_low_good=True),
    Column("p50 ms", "p50", "{:,.1f}", is_low_good=True),
    Column("p95 ms", "p95", "{:,.1f}", is_low_good=True),
    Column("k read", "memory_size", "{:.0f}"),
    Column("k compared", "retrieval_memory_size", "{:.0f}"),
    Column("Codec", "codec"),
    Column("Documents", "top_k", "{:.0f}"),
    Column("Corpus", "corpus"),
    Column("Retriever", "retriever"),
    Column("Kind", "kind"),
    Column("Failed", "failed", "{:,.0f}"),
    Column("Questions", "questions", "{:,.0f}"),
    Column("Backbone", "backbone"),
    Column("Date", "date"),
    Column("Revision", "revision"),
)
LINKED = ("system", "model")  # shown as HTML


def make_frame(entries: list[Entry]) -> pd.DataFrame:
    """One row a result: text as it is, numbers as floats with NaN for none, metrics as `f1`, `f1 low`, `f1 high`."""
    rows = [_row(entry) for entry in entries]
    columns = [*FIRST, *LAST]
    names = ["setting", "url", "repo", "commit", "path", "time", "search", *(column.key for column in columns)]
    frame = pd.DataFrame(rows, columns=list(dict.fromkeys([*names, *(key for row in rows for key in row)])))
    numbers = [column.key for column in columns if column.form] + [name for name in frame.columns if name not in names]
    return frame.astype(dict.fromkeys(numbers, "float64"))


def _row(entry: Entry) -> dict:
    results = entry.results
    system, model, efficiency = results["system"], results["model"], results["efficiency"]
    total = (efficiency["latency_ms"] or {}).get("total") or {}
    row = {
        **{name: system[name] for name in ("kind", "memory_size", "retrieval_memory_size", "top_k")},
        **{name: plain(system[name] or NOTHING) for name in ("codec", "retriever")},
        "system": plain(system["name"]),
        "url": system["url"] or "",
        "model": plain(model["repo"] or NOTHING),
        "repo": model["repo"] or "",
        "commit": model["revision"] or "",
        "revision": f"{(model['revision'] or NOTHING)[:7]} {entry.model_state if model['revision'] else ''}".strip(),
        "backbone": plain(model["backbone"] or NOTHING),
        "corpus": _corpus(results["corpus"]),
        "data": plain(data_name(results["data"])),
        "setting": results["setting"],
        "bytes_per_span": efficiency["bytes_per_span"],
        "tokens_read": efficiency["tokens_read"],
        "p50": total.get("p50"),
        "p95": total.get("p95"),
        "failed": results["counts"]["failed"],
        "questions": results["counts"]["questions"],
        "date": results["created"][:10],
        "time": parse_time(results["created"]).timestamp(),
        "path": entry.path,
    }
    for name, metric in results["metrics"].items():
        if METRIC.fullmatch(name) is None:  # not documented: it has no column, and must not take the place of another
            continue
        row |= {name: metric["value"], f"{name} low": metric["low"], f"{name} high": metric["high"]}
    words = [row[name] for name in ("system", "model", "backbone", "data", "retriever", "codec", "kind", "path")]
    row["search"] = "\n".join(words).casefold()
    return row


def _corpus(corpus: dict | None) -> str:
    """Which corpus was searched, and how large it is."""
    return NOTHING if corpus is None else f"{plain(corpus['repo'] or 'unnamed')} ({corpus['documents']:,})"


def metric_names(frame: pd.DataFrame) -> list[str]:
    """The metrics of these rows that get a column, best known first; the rarest stay away when there are too many."""
    names = [name.removesuffix(" low") for name in frame.columns if name.endswith(" low")]
    counts = Counter({name: int(frame[name].notna().sum()) for name in names})
    kept = [name for name, count in sorted(counts.items(), key=lambda item: (-item[1], _metric_key(item[0]))) if count]
    return sorted(kept[:MAX_METRICS], key=_metric_key)


def _metric_key(name: str) -> tuple[int, int, str]:
    family, _, depth = name.partition("@")
    order = METRIC_ORDER.index(family) if family in METRIC_ORDER else len(METRIC_ORDER)
    return order, int(depth or 0), name


def choices(frame: pd.DataFrame, key: str) -> list[str]:
    """What the column can be filtered by, `all` first; numbers in their order."""
    values = frame[key].dropna().unique()
    if pd.api.types.is_numeric_dtype(frame[key]):
        return [ALL, *(f"{value:.0f}" for value in sorted(values))]
    return [ALL, *sorted(value for value in values if value != NOTHING)]


def filtered(frame: pd.DataFrame, text: str | None = None, **wanted: str | None) -> pd.DataFrame:
    """The rows that contain every word of the text and have the wanted values; `all` or nothing wants anything.

    Args:
        frame: of `make_frame`.
        text: words, in any order and any case.
        **wanted: column -> its value as in `choices`, for columns such as data, kind, codec, memory_size.
    """
    keep = pd.Series(True, index=frame.index)
    for word in (text or "").casefold().split():
        keep &= frame["search"].str.contains(word, regex=False)
    for key, value in wanted.items():
        if not value or value == ALL:
            continue
        if pd.api.types.is_numeric_dtype(frame[key]):
            keep &= frame[key] == float(value if re.fullmatch(r"\d{1,15}", value) else "nan")
        else:
            keep &= frame[key] == value
    return frame[keep]


def ranked(frame: pd.DataFrame, metric: str | None) -> pd.DataFrame:
    """The rows by this metric, the best first, those without it last."""
    if metric not in frame.columns:
        return frame.sort_values("time", ascending=False, kind="stable")
    return frame.sort_values([metric, "time"], ascending=False, na_position="last", kind="stable")


def parse_order(text: str | None, columns: list[Column]) -> tuple[int, bool] | None:
    """`3 up` or `3 down` as the number of a column and whether its values rise; None where it says neither."""
    match = re.fullmatch(r"(\d{1,3}) (up|down)", text or "")
    if match is None or int(match[1]) >= len(columns):
        return None
    return int(match[1]), match[2] == "up"


def ordered(frame: pd.DataFrame, column: Column, is_rising: bool) -> pd.DataFrame:
    """The rows by this column, numbers as numbers and text without its case; those without a value last."""
    values = frame[column.key]
    if column.form is None:
        values = values.str.casefold().where(values != NOTHING)
    by_value = values.sort_values(ascending=is_rising, na_position="last", kind="stable")
    return frame.loc[by_value.index]


def columns_of(metrics: list[str]) -> list[Column]:
    """The columns of a table with these metrics, from left to right."""
    return [*FIRST, *(Column(name, name, "{:.3f}") for name in metrics), *LAST]


def datatypes(columns: list[Column]) -> list[str]:
    """What gr.Dataframe is told of each column."""
    return ["number" if column.form else "html" if column.key in LINKED else "str" for column in columns]


def widths(columns: list[Column]) -> list[int]:
    """Pixels of each column."""
    named = {
        "system": 190,
        "model": 210,
        "data": 130,
        "backbone": 170,
        "revision": 150,
        "retriever": 120,
        "date": 120,
        "kind": 110,
    }
    small = {column.key: max(90, 32 + 9 * len(column.header)) for column in LAST}
    return [named.get(column.key) or small.get(column.key) or 165 for column in columns]


def layout(frame: pd.DataFrame, columns: list[Column], order: tuple[int, bool] | None = None) -> dict:
    """The value of a gr.Dataframe: numbers, beside them what is shown, and an arrow at the column of the order.

    The text of an HTML cell is escaped in `data` too: the widest cell of a column is also rendered from there.
    """
    data, shown = [], []
    for column in columns:
        cells, texts = _cells(frame, column)
        data.append(cells)
        shown.append(texts)
    headers = [column.header for column in columns]
    if order is not None:
        headers[order[0]] += " ▲" if order[1] else " ▼"
    return {
        "headers": headers,
        "data": [list(row) for row in zip(*data, strict=True)],
        "metadata": {"display_value": [list(row) for row in zip(*shown, strict=True)], "styling": None},
    }


def _cells(frame: pd.DataFrame, column: Column) -> tuple[list, list]:
    """A column's values and what is shown in their place, None where that is the value itself."""
    values = frame[column.key].tolist() if column.key in frame else [float("nan")] * len(frame)
    if column.key == "model":
        places = zip(values, frame["repo"], frame["commit"], strict=True)
        return [escaped(value) for value in values], [link(value, card_url(*place)) for value, *place in places]
    if column.key == "system":
        return [escaped(value) for value in values], [link(*pair) for pair in zip(values, frame["url"], strict=True)]
    if column.form is None:
        return values, [None] * len(values)
    numbers = [None if value != value else value for value in values]
    texts = [NOTHING if value != value else _written(value, column.form) for value in values]
    if f"{column.key} low" in frame:
        intervals = zip(values, texts, frame[f"{column.key} low"], frame[f"{column.key} high"], strict=True)
        texts = [text if value != value else f"{text} [{low:.3f}, {high:.3f}]" for value, text, low, high in intervals]
    return numbers, texts


def _written(value: float, form: str) -> str:
    """The number in this form, or with an exponent where it has no end otherwise."""
    return form.format(value) if value < 1e12 else f"{value:.3g}"
