"""Checks of rows that all metrics share: what cannot be scored is refused by name before Arrow can change it.

One file for all metrics: `recipes.spaces.publish` copies it into the folder of each that it publishes. It knows
nothing of what is measured.
"""

from collections import Counter
from collections.abc import Iterable


def name_row(column: str, row: int, ids: list | None) -> str:
    """What an error calls an entry: "`predictions[3]`", and its id where there is one."""
    return f"`{column}[{row}]`" + (f" (id {ids[row]!r})" if ids else "")


def as_rows(name: str, values: Iterable) -> list:
    """The entries of a column, which may be a list, an array or a column of `datasets`."""
    if isinstance(values, str | bytes | dict) or not isinstance(values, Iterable):
        raise TypeError(
            f"`{name}` must be a list with one entry per row, got {type(values).__name__}. Put one row in a list too."
        )
    return list(values)


def check_ids(ids: Iterable | None, n_rows: int) -> list | None:
    """The ids as a list: strings or integers, one per row, each once."""
    if ids is None:
        return None
    ids = as_rows("ids", ids)
    for row, name in enumerate(ids):
        if not isinstance(name, str | int):
            raise TypeError(f"`ids[{row}]` must be a string or an integer, got {name!r}. Give the row a name.")
    if len(ids) != n_rows:
        raise ValueError(f"`ids` must have one entry per row ({n_rows}), got {len(ids)}. Pass the ids of these rows.")
    if len(set(ids)) < n_rows:
        name, count = Counter(ids).most_common(1)[0]
        raise ValueError(f"`ids` must be unique, got {name!r} {count} times. Score every row once.")
    return ids


def check_text(text: str, where: str, remedy: str) -> None:
    """Refuses what is no string, is blank or cannot be stored as UTF-8; `where` and `remedy` go into the message."""
    if not isinstance(text, str):
        raise TypeError(f"{where} must be a string, got {text!r}. {remedy}")
    if not text or text.isspace():
        raise ValueError(f"{where} must not be blank, got {text!r}. {remedy}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where} must be valid Unicode, got {text!r}. Decode it with errors='replace'."
            ) from error


def pair_rows(predictions: Iterable, references: Iterable, ids: Iterable | None) -> tuple[list, list, list | None]:
    """Columns of one length with at least one row, and the ids."""
    predictions, references = as_rows("predictions", predictions), as_rows("references", references)
    if len(predictions) != len(references):
        raise ValueError(
            f"`references` must have one entry per prediction ({len(predictions)}), got {len(references)}. "
            "Pass the same rows in both."
        )
    if not predictions:
        raise ValueError("`predictions` must have at least one row, got 0. Check what was meant to be scored.")
    return predictions, references, check_ids(ids, len(predictions))


class CheckedRows:
    """Mixed into an `evaluate.Metric` whose `check_rows(predictions, references, ids=None)` returns both columns."""

    def compute(self, *, predictions=None, references=None, **kwargs):
        """Scores these rows and those added before; rows are checked before Arrow turns None or NaN into text."""
        if predictions is not None or references is not None:
            alone = self.writer is None and self.num_process == 1  # no rows added before or by other processes
            predictions, references = self.check_rows(predictions, references, kwargs.get("ids") if alone else None)
        return super().compute(predictions=predictions, references=references, **kwargs)

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Adds checked rows; an error counts the rows of this batch."""
        predictions, references = self.check_rows(predictions, references)
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Adds one checked row."""
        self.check_rows([prediction], [reference])
        super().add(prediction=prediction, reference=reference, **kwargs)
