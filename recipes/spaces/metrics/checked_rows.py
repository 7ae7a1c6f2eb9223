"""What all metrics share: rows that cannot be scored are refused by name before Arrow can change them, and means.

One file for all metrics: `recipes.spaces.publish` copies it into the folder of each that it publishes.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence


def as_rows(name: str, values: Iterable) -> list:
    """The entries of a column, which may be a list, an array or a column of `datasets`."""
    if isinstance(values, str | bytes | dict) or not isinstance(values, Iterable):
        raise TypeError(
            f"`{name}` must be a list with one entry per row, got {type(values).__name__}. Put one row in a list too."
        )
    return list(values)


def check_ids(ids: Iterable, n_rows: int) -> list[str | int]:
    """The ids as a list: strings or integers, one per row, each once."""
    ids = as_rows("ids", ids)
    for row, name in enumerate(ids):
        if not isinstance(name, str | int):
            raise TypeError(f"`ids[{row}]` must be a string or an integer, got {name!r}. Give the row a name.")
    if len(ids) != n_rows:
        raise ValueError(f"`ids` must have one entry per row ({n_rows}), got {len(ids)}. Pass the ids of these rows.")
    name, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise ValueError(f"`ids` must be unique, got {name!r} {count} times. Score every row once.")
    return ids


def check_list(values: Sequence, where: str, things: str, remedy: str) -> None:
    """Refuses what is no list of `things`, such as a single string."""
    if not isinstance(values, list | tuple):
        raise TypeError(f"{where} must be a list of {things}, got {values!r}. {remedy}")


def check_string(text: str, where: str, remedy: str) -> None:
    """Refuses what is no string or cannot be stored as UTF-8; `where` and `remedy` go into the message."""
    if not isinstance(text, str):
        raise TypeError(f"{where} must be a string, got {text!r}. {remedy}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} must be valid Unicode, got {text!r}. Decode it with errors='replace'.") from error


def check_text(text: str, where: str, remedy: str) -> None:
    """Refuses a blank string as well."""
    check_string(text, where, remedy)
    if not text.strip():
        raise ValueError(f"{where} must not be blank, got {text!r}. {remedy}")


def summarize(rows: Sequence[Mapping[str, float | None]], per_question: bool, **counts: int) -> dict:
    """The mean of each measure over the rows that have it, None if none has, then the counts and the rows themselves.

    >>> summarize([{"f1": 1.0, "mrr": None}, {}, {"f1": 0.0}], False, questions=3)
    {'f1': 0.5, 'mrr': None, 'questions': 3}
    """
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    known = {name: [value for value in values if value is not None] for name, values in columns.items()}
    scores = {name: math.fsum(values) / len(values) if values else None for name, values in known.items()} | counts
    return scores | {f"{name}_per_question": values for name, values in columns.items() if per_question}


class CheckedRows:
    """Mixed into an `evaluate.Metric` that has `check_prediction` and `check_reference` of a value and its name."""

    def check_rows(self, predictions: Iterable, references: Iterable, ids: Iterable | None = None) -> dict[str, list]:
        """Both columns as lists of one length, after all that would make a score meaningless has been refused."""
        columns = {"predictions": as_rows("predictions", predictions), "references": as_rows("references", references)}
        n_rows, n_references = map(len, columns.values())
        if n_rows != n_references:
            raise ValueError(
                f"`references` must have one entry per prediction ({n_rows}), got {n_references}. "
                "Pass the same rows in both."
            )
        if not n_rows:
            raise ValueError("`predictions` must have at least one row, got 0. Check what was meant to be scored.")
        names = [""] * n_rows if ids is None else [f" (id {name!r})" for name in check_ids(ids, n_rows)]
        for row, name in enumerate(names):
            self.check_prediction(columns["predictions"][row], f"`predictions[{row}]`{name}")
            self.check_reference(columns["references"][row], f"`references[{row}]`{name}")
        return columns

    def compute(self, *, predictions=None, references=None, **kwargs):
        """Scores these rows and those added before; rows are checked before Arrow turns None or NaN into text."""
        columns = {"predictions": predictions, "references": references}
        if predictions is not None or references is not None:
            alone = self.writer is None and self.num_process == 1  # no rows added before or by other processes
            columns = self.check_rows(**columns, ids=kwargs.get("ids") if alone else None)
        return super().compute(**columns, **kwargs)

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Adds checked rows; an error counts the rows of this batch."""
        super().add_batch(**self.check_rows(predictions, references), **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Adds one checked row."""
        self.check_rows([prediction], [reference])
        super().add(prediction=prediction, reference=reference, **kwargs)
