"""What the commands that change a corpus share: their options, the corpus with its model, and what they print."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence

from .models import add_model_options

COLUMNS = ("text_column", "title_column", "id_column", "split", "config_name")


def add_change_options(parser: argparse.ArgumentParser, *, has_datasets: bool = True) -> None:
    """The options of `add`, `update` and `sync`, which does not read data sets of the Hub."""
    add_model_options(parser, model=" (default: the one that made the corpus)", backbone="the corpus's")
    parser.add_argument("--batch-size", type=int, default=16, help="documents per pass (default: 16)")
    parser.add_argument("--shard-size", type=int, default=1024, help="chunks of a shard (default: 1024)")
    add_column_options(parser, has_datasets=has_datasets)
    parser.add_argument("--strict", action="store_true", help="status 1 if anything could not be read")


def add_column_options(parser: argparse.ArgumentParser, *, has_datasets: bool = True) -> None:
    """The options that say where the text stands in rows."""
    parser.add_argument("--text-column", default="text", help="column of the text (default: text)")
    parser.add_argument("--title-column", default="title", help="column of the title (default: title)")
    parser.add_argument("--id-column", help="column of the id (default: id or document_id)")
    if has_datasets:
        parser.add_argument("--split", default="train", help="of a data set on the Hub (default: train)")
        parser.add_argument("--config-name", help="of a data set on the Hub")


def change_options(arguments: argparse.Namespace) -> dict:
    """Keywords of `CompressedCorpus.add`."""
    options = {name: getattr(arguments, name) for name in ("batch_size", "shard_size")}
    given = {name: getattr(arguments, name) for name in COLUMNS if name in arguments}
    return options | {name: value for name, value in given.items() if value != arguments.parser.get_default(name)}


def open_for_change(arguments: argparse.Namespace, *, needs_model: bool = True):
    """The corpus of a command, with the model that compresses for it."""
    from .. import CompressedCorpus
    from .models import load_model_of, show_progress

    corpus = CompressedCorpus.open(arguments.corpus)
    if needs_model:
        model = load_model_of(corpus, arguments.model, arguments.backbone, dtype=arguments.dtype)
        corpus.attach(model)
        show_progress()
    return corpus


def print_changes(corpus, changes, as_json: bool) -> None:
    """What a call has changed, for a person or as one JSON object."""
    report = {"added": changes.n_documents, "deleted": changes.n_deleted, "unchanged": changes.n_unchanged}
    report |= {"left_out": dict(count_statuses(changes.rejected)), "documents": len(corpus)}
    if as_json:
        print(json.dumps(report, indent=2), flush=True)
        return
    done = [f"{changes.n_documents:,} documents compressed", f"{changes.n_deleted:,} deleted"]
    done += [f"{changes.n_unchanged:,} unchanged"] if changes.n_unchanged else []
    print(f"{', '.join(done)}; the corpus has {len(corpus):,}", flush=True)
    if changes.rejected:
        print(f"left out: {describe_rejected(changes.rejected)}; see {corpus.folder}/rejected.jsonl", flush=True)


def count_statuses(rejected: Sequence[dict]) -> Counter:
    """Rejected rows and files by status."""
    return Counter(row.get("status", "failed") for row in rejected)


def describe_rejected(rejected: Sequence[dict]) -> str:
    """Rejected rows and files by status, the unsupported ones with their endings."""
    endings: Counter[str] = Counter()
    for row in rejected:
        if row.get("status") == "unsupported":
            name = row["place"].rpartition("/")[2]
            endings["." + name.rpartition(".")[2] if "." in name else "no ending"] += 1
    parts = []
    for status, number in sorted(count_statuses(rejected).items()):
        of_kinds = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(5))
        parts.append(f"{number:,} {status}" + (f" ({of_kinds})" if status == "unsupported" else ""))
    return ", ".join(parts)


def strict_status(arguments: argparse.Namespace, rejected: Sequence[dict]) -> int:
    """The exit status: 1 with `--strict` if a file or row could not be read; what is hidden is meant to be skipped."""
    return int(arguments.strict and any(row.get("status") != "skipped" for row in rejected))
