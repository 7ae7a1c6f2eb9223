"""The options of `python -m recipes.evaluate`, their checks, and the table that it prints.

Stands on top; `evaluation.py` does the work.
"""

import argparse
import contextlib
import datetime
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from transformers.utils import logging as transformers_logging

from modeling_clara.cli.console import allow_any_console
from modeling_clara.codecs_clara import CODECS
from modeling_clara.corpus.storage import writer_lock
from modeling_clara.reading_clara import check_expand_below
from recipes.evaluation.evaluation import Evaluation
from recipes.evaluation.questions import HALVES
from recipes.evaluation.report import comparison_table, results_table
from recipes.evaluation.run import is_foreign
from recipes.evaluation.scores import RESAMPLES
from recipes.evaluation.systems import SYSTEMS
from recipes.evaluation.tasks import SETTINGS, check_setting
from recipes.evaluation.validation import URL

TUNED = {name for name, system in SYSTEMS.items() if system.reader == "tuned_text"}
EXPAND = 1  # default of --expand
OWN = ("predictions", "name", "url")  # options of another system's predictions alone, and those that they share
SHARED = ("data", "output", "setting", "split", "data_config", "half", "limit", "skip_bad_rows", "resamples", "seed")
LEAST = {"top_k": 1, "num_candidates": 1, "max_new_tokens": 1, "batch_size": 1, "resamples": 100, "limit": 1}
LEAST |= {"expand": 1, "latency_questions": 0, "seed": 0}
EXIT_CODES = "Exit status: 0 done, 1 an error that is printed, 130 interrupted; the same command goes on."


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evaluate", description=__doc__.splitlines()[0], epilog=EXIT_CODES, allow_abbrev=False
    )
    settings = "; ".join(f"{name}: {text}" for name, text in SETTINGS.items())
    halves = "ask one of two fixed halves of the questions, by a hash of their words: choose on one, report the other"
    systems = f"the first is compared with the others: {', '.join(SYSTEMS)}, or all (default: clara)"
    add = parser.add_argument
    add("--data", required=True, help="file, BEIR folder or Hub data set with questions")
    add("--output", required=True, type=Path, help="folder of the run; the same command goes on there")
    add("--model", help="checkpoint folder or Hub id")
    add("--revision", help="branch, tag or commit of a model on the Hub")
    add("--backbone", help="where the model's backbone is")
    add("--predictions", type=Path, help="score this JSONL file of another system instead of a model")
    add("--name", help="of the system of --predictions")
    add("--url", help="https address that describes the system of --predictions")
    add("--setting", default="normal", help=f"{settings} (default: normal)")
    add("--systems", nargs="+", default=["clara"], metavar="SYSTEM", help=systems)
    add("--memory-size", type=int, help="vectors of a memory that are read (default: the largest)")
    add("--retrieval-memory-size", type=int, help="vectors that are compared (default: the model's)")
    add("--codec", help=f"of the memories: {', '.join(CODECS)} (default: float16, or the corpus's)")
    add("--top-k", type=int, help="documents that are read (default: the model's)")
    add("--expand", type=int, default=EXPAND, help="best documents that clara_expand reads as text (default: 1)")
    add("--expand-below", type=float, help="that only where its answer from memory has a lower confidence")
    add("--num-candidates", type=int, default=20, help="that BM25 chooses (default: 20)")
    add("--min-score", type=float, help="cosine of the best document below which the model abstains")
    add("--corpus", help="compressed corpus to search in the setting corpus (default: the data's own)")
    add("--dense", help="sentence-transformers model of dense_text, such as all-MiniLM-L6-v2")
    add("--text-reader", help="checkpoint of the stage text, the reader of tuned_text")
    add("--memories", type=Path, help="folder of compressed documents (default: OUTPUT/memories)")
    add("--max-new-tokens", type=int, default=32, help="of an answer (default: 32)")
    add("--batch-size", type=int, default=32, help="questions at a time (default: 32)")
    add("--half", choices=HALVES, help=halves)
    add("--limit", type=int, help="first questions of the file, or of its half, only")
    add("--split", help="of a Hub data set or BEIR folder (default: test)")
    add("--data-config", help="name of a configuration of a Hub data set")
    add("--skip-bad-rows", action="store_true", help="list them in rejected.jsonl and go on")
    add("--latency-questions", type=int, default=20, help="timed one at a time (default: 20; 0: none)")
    add("--resamples", type=int, default=RESAMPLES, help=f"of the bootstrap (default: {RESAMPLES})")
    add("--seed", type=int, default=0, help="of bootstrap and control (default: 0)")
    add("--dtype", help="of the model (default: float32 on CPU)")
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise a ValueError for whatever is wrong and can be told before a model is loaded; write out `--systems all`."""
    check_setting(arguments.setting)
    if (arguments.model is None) == (arguments.predictions is None):
        raise ValueError("--model or --predictions must be given, not both and not neither. Pass one of them.")
    if arguments.predictions is not None and not 0 < len((arguments.name or "").strip()) <= 100:
        raise ValueError("--name must say in 100 letters what the system of --predictions is called. Pass it.")
    if arguments.url is not None and URL.fullmatch(arguments.url) is None:
        raise ValueError(f"--url must be an http(s) address, got {arguments.url!r}. Correct it.")
    if arguments.min_score is not None and not math.isfinite(arguments.min_score):
        raise ValueError(f"--min-score must be a finite number, got {arguments.min_score}. Correct it.")
    _check_unused(arguments)
    if arguments.codec is not None and arguments.codec not in CODECS:
        raise ValueError(f"--codec must be one of {', '.join(CODECS)}, got {arguments.codec!r}. Correct it.")
    if arguments.codec is not None and arguments.corpus is not None:
        raise ValueError(f"--codec must be left out with --corpus, which has one, got {arguments.codec!r}.")
    if arguments.dtype is not None and not isinstance(getattr(torch, arguments.dtype, None), torch.dtype):
        raise ValueError(f"--dtype must be a torch dtype such as bfloat16, got {arguments.dtype!r}. Correct it.")
    if arguments.corpus is not None and arguments.setting != "corpus":
        raise ValueError(f"--corpus needs --setting corpus, got {arguments.setting!r}. Add it, or leave out --corpus.")
    for name, least in LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be >= {least}, got {value}. Correct it.")
    _check_systems(arguments)


def _check_systems(arguments: argparse.Namespace) -> None:
    setting, dense, text_reader = arguments.setting, arguments.dense, arguments.text_reader
    unfit = set()  # systems that have nothing to retrieve, or to choose among
    if setting == "closed_book":
        unfit = {name for name, system in SYSTEMS.items() if system.retriever is not None}
    elif setting == "gold_only":
        unfit = {name for name, system in SYSTEMS.items() if system.ranks and system.retriever != "clara"}
    if arguments.systems == ["all"]:
        left_out = unfit | (set() if dense else {"dense_text"}) | (set() if text_reader else TUNED)
        arguments.systems = [name for name in SYSTEMS if name not in left_out]
    elif arguments.systems == ["clara"] and setting == "closed_book":
        arguments.systems = ["closed_book"]
    systems = arguments.systems
    unknown = [name for name in systems if name not in SYSTEMS]
    if unknown or len(set(systems)) < len(systems):
        wrong = unknown[0] if unknown else "one twice"
        raise ValueError(f"--systems must be of {', '.join(SYSTEMS)}, or all, got {wrong}. Correct it.")
    wrong = next((name for name in systems if name in unfit), None)
    if wrong is not None:
        rule, remedy = {
            "closed_book": ("has no documents", "Leave it out."),
            "gold_only": ("leaves nothing to rank", "Take 'clara' or 'text'."),
        }[setting]
        raise ValueError(f"the setting {setting!r} {rule}, but --systems has {wrong!r}. {remedy}")
    if "dense_text" in systems and dense is None:
        raise ValueError("the system 'dense_text' needs --dense MODEL. Pass it, or leave out 'dense_text'.")
    tuned = sorted(TUNED.intersection(systems))
    if tuned and text_reader is None:
        name = repr(tuned[0])
        raise ValueError(f"the system {name} needs --text-reader CHECKPOINT. Pass it, or leave out {name}.")
    if arguments.expand != EXPAND and "clara_expand" not in systems:
        raise ValueError(
            f"--expand has no effect without the system clara_expand, got {arguments.expand}. Add it to --systems, or "
            "leave out --expand."
        )
    if arguments.expand_below is not None:
        if "clara_expand" not in systems:
            raise ValueError("--expand-below has no effect without the system clara_expand. Add it to --systems.")
        check_expand_below(arguments.expand_below, arguments.expand)
    if text_reader is not None and not tuned:
        raise ValueError("--text-reader has no effect without the systems tuned_text or bm25_tuned_text. Add one.")


def _check_unused(arguments: argparse.Namespace) -> None:
    """Raise a ValueError for an option that would have no effect."""
    is_ours, parser = arguments.predictions is None, build_parser()
    for name, value in vars(arguments).items():
        is_used = name not in OWN if is_ours else name in (*OWN, *SHARED, "command")
        if not is_used and value != parser.get_default(name):
            other = "--model" if is_ours else "--predictions"
            raise ValueError(f"--{name.replace('_', '-')} has no effect with {other}, got {value!r}. Leave it out.")


def shown_command(argv: Sequence[str]) -> str:
    """The command for others to read: of absolute paths the last part, because the rest tells them nothing."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in argv]
    return shlex.join(["python", "-m", "recipes.evaluate", *words])


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit status."""
    allow_any_console()
    argv = sys.argv[1:] if argv is None else argv
    arguments = build_parser().parse_args(argv)
    arguments.command = shown_command(argv)
    bars = transformers_logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():  # lines of `progress.py` stand there instead
        transformers_logging.disable_progress_bar()
    try:
        check_arguments(arguments)
        # waiting for the process that compresses may take hours
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(days=7))
        with contextlib.ExitStack() as stack:
            if state.is_main_process and not is_foreign(arguments.output):
                stack.enter_context(writer_lock(arguments.output / ".lock", f"the run {arguments.output}"))
            evaluation = Evaluation(arguments, state)
            results = evaluation.run() if arguments.predictions is None else evaluation.score_predictions()
        if state.is_main_process:
            parts = [results_table(results), comparison_table(results[0])]
            parts.append(f"Written: {arguments.output / 'results.json'}")
            print("\n\n".join(part for part in parts if part))
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    return 0
