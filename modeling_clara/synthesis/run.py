"""Documents -> chunks -> a task's questions and answers -> files; killed at any moment, the same call goes on.

All that enters the result is the run's fingerprint. A later call with another one is refused and told what differs.
"""

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from transformers.utils.logging import tqdm


from ..corpus.sources import DocumentSource
from ..corpus.storage import foreign_files, writer_lock
from ..storage_clara import file_sha256, read_json, write_json
from .ask import Asker, Prompts
from .client import Completion
from .documents import iter_chunks, load_splitter, prepare
from .output import DOCUMENT, Places, Tally, finish, iter_outcomes

TASKS = ("scp", "instruct", "retrieval")  # each a module beside this one
OPTIONS_FILE = "options.json"
EXPECTED = ("work", "README.md", ".git", ".gitattributes", ".*.partial")  # in a folder that is not finished
FINISHING_SECONDS = 3600.0  # that a rank waits while another one writes the files


@dataclasses.dataclass
class Synthesis:
    """What a run is made of; see `synthesize`."""

    places: Places
    source: DocumentSource
    splitter: object
    task: object
    settings: object
    prompts: Prompts
    options: dict
    rank: int = 0
    world_size: int = 1


def synthesize(
    documents,
    output,
    teacher,
    *,
    model: str,
    task: str = "scp",
    settings: Mapping | None = None,
    tokenizer: str | None = None,
    max_document_tokens: int | None = None,
    leakage: Sequence[str] = (),
    concurrency: int = 8,
    prices: Mapping[str, float] | None = None,
    card: Mapping[str, str] | None = None,
    rank: int = 0,
    world_size: int = 1,
    **columns,
) -> dict | None:
    """Make training data of documents.

    Args:
        documents: whatever `DocumentSource` reads.
        output: a folder, which `load_dataset` then reads, or a file that ends in .jsonl.
        teacher: `client.Teacher`.
        model: its name, for fingerprint and card.
        task: "scp" (stage 1), "instruct" (stage 2) or "retrieval" (stage 3).
        settings: of the task, see the `Settings` of its module.
        tokenizer, max_document_tokens: see `documents.load_splitter`.
        leakage: files of questions that the data must not have.
        concurrency: calls at a time at most.
        prices: of a token, `prompt` and `completion`.
        card: `name`, `license` and `language` of the documents.
        rank, world_size: of this process among those that share the documents. The last to finish writes the files.
        columns: `text_column`, `title_column`, `id_column`, `split` and `config_name` of `DocumentSource`.

    Returns:
        The report; None if other ranks are not finished.

    Raises:
        ValueError: an argument is wrong, or `output` holds something else or a run that began otherwise.
        OutOfBudget, TeacherDown, OSError: what is done is kept; the same call goes on.
        RuntimeError: another process has this rank.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` must be from 0 to `world_size` - 1 ({world_size - 1}), got {rank}. Correct one.")
    run = open_run(documents, output, model, task, settings, tokenizer, max_document_tokens, leakage, **columns)
    run.rank, run.world_size = rank, world_size
    run.options["world_size"] = world_size
    places = run.places
    if places.report.exists():
        report = read_json(places.report)
        check_options(report["options"], run.options)
        return report
    _check_output(places)
    with writer_lock(places.work / f"rank-{rank:05d}.lock", f"rank {rank} of {world_size} of {output}"):
        _begin(places.work, run.options)
        counts = prepare(places.work, run.source, run.splitter)
        done = [places.work / f"done-{number:05d}" for number in range(world_size)]
        if not done[rank].exists():
            run_rank(run, teacher, counts["chunks"], concurrency)
            done[rank].touch()
    with writer_lock(places.work / "finish.lock", f"the files of {output}", timeout=FINISHING_SECONDS):
        if places.report.exists():  # another rank was quicker
            return read_json(places.report)
        if not all(path.exists() for path in done):
            return None
        return finish(places, run.options, counts, prices or {}, card or {})


def open_run(
    documents, output, model, task, settings, tokenizer, max_document_tokens, leakage, **columns
) -> Synthesis:
    """A run with its options, nothing of it read or written yet."""
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}. Correct it.")
    places = Places(Path(output))
    source = DocumentSource(documents, exclude=None if places.is_file else places.output, **columns)
    module, prompts = importlib.import_module(f".{task}", __package__), Prompts()
    settings = module.Settings(**(settings or {}))
    options = {
        "task": task,
        "model": model,
        "prompts": prompts.digest(),
        "input": source.description,
        "columns": {name: value for name, value in columns.items() if value is not None},
        "tokenizer": tokenizer,
        "max_document_tokens": max_document_tokens,
        **dataclasses.asdict(settings),
        "leakage": {Path(path).name: file_sha256(Path(path)) for path in leakage},
    }
    options = json.loads(json.dumps(options, default=str))  # as they are read again
    splitter = load_splitter(tokenizer, max_document_tokens)
    return Synthesis(places, source, splitter, module, settings, prompts, options)


# --- one rank --------------------------------------------------------------------------------------------------------


def run_rank(run: Synthesis, teacher, n_chunks: int, concurrency: int) -> None:
    """Do what is left of a rank."""
    from .engine import Document, SynthesisRunner

    work, tally = run.places.work, Tally()
    for outcome in iter_outcomes(work, run.rank, is_final=True):
        tally.add(outcome)
    mine = iter_chunks(work, run.rank, run.world_size)
    rows = (Document(text=chunk["id"], id=str(number), metadata={"chunk": chunk}) for number, chunk in mine)
    with _bar(-(-(n_chunks - run.rank) // run.world_size), tally) as show:

        def count(outcome: dict) -> None:
            tally.add(outcome)
            show()

        async def roll(document, generate) -> dict:
            return await outcome_of(run, document.metadata.pop("chunk"), generate)

        SynthesisRunner(roll, work, teacher, concurrency, count).run(rows, run.rank, run.world_size)


async def outcome_of(run: Synthesis, chunk: dict, generate: Callable) -> dict:
    """What a task makes of a chunk, as JSON; `generate` takes a request and gives datatrove's result."""
    from .engine import read_result

    usage = {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0}

    async def complete(messages: list[dict], **options) -> Completion:
        result = await generate({"messages": messages, **options})
        usage["calls"] += 1
        for name in ("prompt_tokens", "completion_tokens"):
            usage[name] += result.usage[name]
        return read_result(result)

    outcome = await run.task.synthesize(chunk, Asker(complete, run.prompts), run.settings)
    rejects = list(outcome.rejects)
    if outcome.record is None and not any(reject["kind"] == DOCUMENT for reject in rejects):
        rejects.append({"kind": DOCUMENT, "reason": "nothing passed", "value": None, "document_id": chunk["id"]})
    return {"record": outcome.record, "rejects": rejects, "counts": dict(outcome.counts), "usage": usage}


@contextlib.contextmanager
def _bar(total: int, tally: Tally) -> Iterator[Callable[[], None]]:
    """A bar of chunks with what was accepted and how many tokens it took."""
    with tqdm(total=total, initial=tally.chunks, desc="synthesizing", unit=" chunks") as bar:

        def show() -> None:
            share = tally.accepted / tally.chunks if tally.chunks else 0
            bar.set_postfix_str(f"{share:.0%} accepted, {tally.tokens:,} tokens", refresh=False)
            bar.update(tally.chunks - bar.n)

        yield show


# --- the fingerprint -------------------------------------------------------------------------------------------------


def check_options(begun: Mapping, given: Mapping) -> None:
    """Raise a ValueError that says what differs, if anything does."""
    begun = {name: value for name, value in begun.items() if name in given}
    for name, value in given.items():
        if name not in begun or begun[name] != value:
            was = begun.get(name)
            raise ValueError(
                f"a run must go on as it began; `{name}` was {_short(was)}, got {_short(value)}. Give the same, or "
                "another `output` to begin anew."
            )


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
