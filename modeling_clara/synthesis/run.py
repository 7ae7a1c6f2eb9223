"""Documents -> chunks -> a task's questions and answers -> files; killed at any moment, the same call goes on.

All that enters the result is the run's fingerprint. A later call with another one is refused and told what differs.
"""

import contextlib
import dataclasses
import importlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from transformers.utils.logging import tqdm

from ..corpus.sources import DocumentSource
from ..corpus.storage import foreign_files, writer_lock
from ..storage_clara import file_sha256, read_json, write_json
from .ask import Asker, Prompts
from .client import Completion, Teacher
from .distractors import Bm25Search, Search
from .documents import Lines, iter_chunks, load_splitter, prepare
from .leakage import LeakageGuard
from .output import Places, Tally, cost_of, finish, iter_done, used_tokens

TASKS = ("scp", "instruct", "retrieval")  # each a module beside this one
OPTIONS_FILE = "options.json"
EXPECTED = ("work", "README.md", ".git", ".gitattributes", ".*.partial")  # in a folder that is not finished
FINISHING_SECONDS = 3600.0  # that a rank waits while another one writes the files


@dataclasses.dataclass
class Run:
    """What a run is made of, see `synthesize`; `options` is its fingerprint."""

    places: Places
    source: DocumentSource
    splitter: object
    task: object  # the module
    settings: object
    prompts: Prompts
    guard: LeakageGuard | None
    search: Search | None
    options: dict
    rank: int
    world_size: int


def synthesize(
    documents,
    output,
    teacher: Callable[[], Teacher],
    *,
    concurrency: int = 8,
    prices: Mapping[str, float] | None = None,
    card: Mapping[str, str] | None = None,
    **options,
) -> dict | None:
    """Make training data of documents. Killed at any moment, the same call goes on.

    Args:
        documents: whatever `DocumentSource` reads.
        output: a folder, which `load_dataset` then reads, or a file that ends in .jsonl.
        teacher: makes the teacher, once it is needed; its budget counts what earlier calls have used.
        concurrency: calls at a time at most.
        prices: of a million tokens, `prompt` and `completion`, for the report.
        card: `name`, `license` and `language` of the documents, for the card.
        options: see `open_run`.

    Returns:
        The report; None if other ranks are not finished.

    Raises:
        ValueError: an argument is wrong, or `output` holds something else or a run that began otherwise.
        OutOfBudget, TeacherDown, OSError: what is done is kept; the same call goes on.
        RuntimeError: another process has this rank.
    """
    from . import engine  # noqa: F401 - before anything is written, if its extra is missing

    run = open_run(documents, output, **options)
    places, rank, world_size = run.places, run.rank, run.world_size
    if places.report.exists():
        return _finished(run)
    _check_output(places)
    with writer_lock(places.work / f"rank-{rank:05d}.lock", f"rank {rank} of {world_size} of {output}"):
        _begin(places.work, run.options)
        counts = prepare(places.work, run.source, run.splitter)
        done = [places.work / f"done-{number:05d}" for number in range(world_size)]
        if not done[rank].exists():
            run_rank(run, teacher, counts["chunks"], concurrency, prices)
            done[rank].touch()
        with writer_lock(places.work / "finish.lock", f"the files of {output}", timeout=FINISHING_SECONDS):
            if places.report.exists():  # another rank was quicker
                return _finished(run)
            if not all(path.exists() for path in done):
                return None
            report = finish(places, run.options, counts, prices or {}, card or {})
    shutil.rmtree(places.work, ignore_errors=True)
    return report


def open_run(
    documents,
    output,
    *,
    model: str,
    task: str = "scp",
    settings: Mapping | None = None,
    tokenizer: str | None = None,
    max_document_tokens: int | None = None,
    leakage: Sequence[str] = (),
    search: Search | None = None,
    rank: int = 0,
    world_size: int = 1,
    **columns,
) -> Run:
    """A run of which nothing is read or written yet.

    Args:
        documents: whatever `DocumentSource` reads.
        output: where it will write.
        model: name of the teacher's model, for fingerprint and card.
        task: "scp" (stage 1), "instruct" (stage 2) or "retrieval" (stage 3).
        settings: fields of the `Settings` of its module.
        tokenizer: what counts a chunk's tokens, see `documents.load_splitter`; default words.
        max_document_tokens: of a chunk.
        leakage: evaluation files whose questions and texts the data must not have.
        search: finds other documents of a row; default BM25 over all chunks.
        rank: of this process, from 0; it has every `world_size`-th chunk.
        world_size: processes that share the documents. The last to finish writes the files.
        columns: `text_column`, `title_column`, `id_column`, `split` and `config_name` of `DocumentSource`.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}. Correct it.")
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` must be from 0 to `world_size` - 1 ({world_size - 1}), got {rank}. Correct one.")
    module, prompts, places = importlib.import_module(f".{task}", __package__), Prompts(), Places(Path(output))
    settings = read_settings(module.Settings, settings or {})
    guard = LeakageGuard(leakage) if leakage else None
    source = DocumentSource(documents, exclude=None if places.is_file else places.output, **columns)
    options = {
        "task": task,
        "model": name_of(model),
        "prompts": prompts.digest(),
        "input": source.description,
        "columns": {name: value for name, value in columns.items() if value is not None},
        "tokenizer": tokenizer and name_of(tokenizer),
        "max_document_tokens": max_document_tokens,
        "settings": dataclasses.asdict(settings),
        "leakage": {Path(path).name: file_sha256(Path(path)) for path in leakage},
        "world_size": world_size,
    }
    options = json.loads(json.dumps(options, default=str))  # as they are read again
    splitter = load_splitter(tokenizer, max_document_tokens)
    return Run(places, source, splitter, module, settings, prompts, guard, search, options, rank, world_size)


def read_settings(kind: type, given: Mapping):
    """The settings of a task; a ValueError names what there is if one is unknown or of another type."""
    known = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"`settings` must be some of {', '.join(known)}, got {name!r}. Correct it.")
        if type(value) is not type(known[name]) and not (type(known[name]) is float and type(value) is int):
            raise ValueError(f"{name!r} of `settings` must be like {known[name]!r}, got {value!r}. Correct it.")
    return kind(**given)


def name_of(model: str) -> str:
    """A model's name, without the folders of this machine."""
    return Path(model).resolve().name if Path(model).exists() else model


# --- one rank --------------------------------------------------------------------------------------------------------


def run_rank(run: Run, teacher: Callable[[], Teacher], n_chunks: int, concurrency: int, prices) -> None:
    """Do what is left of a rank."""
    from .engine import Document, SynthesisRunner

    work, tally = run.places.work, Tally()
    for outcome in iter_done(work, run.rank):
        tally.add(outcome)
    search = Bm25Search(Lines(work), work / "bm25") if needs_search(run) else run.search
    ask_task = task_call(run, search)
    mine = iter_chunks(work, run.rank, run.world_size)
    rows = (Document(text=chunk["id"], id=str(number), metadata={"chunk": chunk}) for number, chunk in mine)
    with _bar(-(-(n_chunks - run.rank) // run.world_size), tally) as show:

        async def roll(document, generate) -> dict:
            outcome = await outcome_of(ask_task, run.prompts, document.metadata.pop("chunk"), generate)
            tally.add(outcome)
            show()
            return outcome

        opened = teacher()
        used = used_tokens(work, run.rank)
        opened.usage.prompt_tokens, opened.usage.completion_tokens = used
        opened.usage.cost = cost_of(*used, prices)
        SynthesisRunner(roll, work, opened, concurrency).run(rows, run.rank, run.world_size)


def needs_search(run: Run) -> bool:
    """Whether the task looks for other documents, and the run does not say how."""
    return run.search is None and "search" in inspect.signature(run.task.synthesize).parameters


def task_call(run: Run, search: Search | None) -> Callable:
    """From a chunk and an `Asker` to the task's outcome; `search` finds other documents if the task looks for some."""
    keywords = {"guard": run.guard}
    if "search" in inspect.signature(run.task.synthesize).parameters:
        keywords["search"] = search
    return lambda chunk, asker: run.task.synthesize(chunk, asker, run.settings, **keywords)


async def outcome_of(ask_task: Callable, prompts: Prompts, chunk: dict, generate: Callable) -> dict:
    """What a task makes of a chunk, as JSON; `generate` takes a request and gives datatrove's result."""
    from .engine import read_result

    usage = {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0}

    async def complete(messages: list[dict], **options) -> Completion:
        completion = await read_result(generate({"messages": messages, **options}))
        usage["calls"] += 1
        usage["prompt_tokens"] += completion.prompt_tokens
        usage["completion_tokens"] += completion.completion_tokens
        return completion

    outcome = await ask_task(chunk, Asker(complete, prompts))
    return {**dataclasses.asdict(outcome), "usage": usage}


@contextlib.contextmanager
def _bar(total: int, tally: Tally) -> Iterator[Callable[[], None]]:
    """A bar of chunks with what was accepted and how many tokens it took."""
    with tqdm(total=total, initial=tally.chunks, desc="synthesizing", unit=" chunks") as bar:

        def show() -> None:
            share = tally.accepted / tally.chunks if tally.chunks else 0
            bar.set_postfix_str(f"{share:.0%} accepted, {tally.tokens:,} tokens", refresh=False)
            bar.update(1)

        yield show


# --- the fingerprint -------------------------------------------------------------------------------------------------


def check_options(begun: Mapping, given: Mapping) -> None:
    """Raise a ValueError that says what differs, if anything does."""
    begun, given = ({**options, **options["settings"], "settings": None} for options in (begun, given))
    for name, value in given.items():
        if begun.get(name) != value:
            raise ValueError(
                f"a run must go on as it began; `{name}` was {_short(begun.get(name))}, got {_short(value)}. Give the "
                "same, or another `output` to begin anew."
            )


def _finished(run: Run) -> dict:
    """The report of a run that is done, if it is this one."""
    report = read_json(run.places.report)
    check_options(report["options"], run.options)
    return report


def _short(value) -> str:
    text = f"{value}"
    return text if len(text) <= 120 else f"{text[:117]}..."


def _begin(work: Path, options: Mapping) -> None:
    """Note the options of a new run, or hold them against those it began with."""
    with writer_lock(work / "options.lock", f"the options of {work}", timeout=60):
        path = work / OPTIONS_FILE
        if path.exists():
            check_options(read_json(path), options)
        else:
            write_json(path, dict(options))


def _check_output(places: Places) -> None:
    """Raise a ValueError unless the output is new or a run's that is not finished."""
    is_begun = (places.work / OPTIONS_FILE).exists()
    if places.is_file:
        if places.output.exists() and not is_begun:
            raise ValueError(f"`output` must be a new file, got {places.output}, which exists. Choose another one.")
        return
    if places.output.is_file():
        raise ValueError(f"`output` must be a folder or end in .jsonl, got the file {places.output}. Rename it.")
    foreign = foreign_files(places.output, [*EXPECTED, *(("data", "rejects.jsonl") if is_begun else ())])
    if foreign:
        raise ValueError(
            f"`output` must be a new folder or one of an unfinished run, got {places.output}, which holds "
            f"{foreign[0]}. Choose another one."
        )
