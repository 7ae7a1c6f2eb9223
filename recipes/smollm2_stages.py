"""The legs of clara-smollm2-135m: what each one runs, in a folder with data/ and runs/, until its time is over.

Stands between `smollm2_legs.py`, the command, and the recipes that the legs call in processes of their own. It knows
nothing of models or of how files travel.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).resolve().parent
ROOT = RECIPES.parent
CONFIGS = RECIPES / "configs"
PAUSED = 3  # exit status: the same command goes on
MARGIN = 1.0  # minutes for the step, the evaluation and the checkpoint that a stopped leg is at
# Places below the home folder; the recipes name them in the same words, and run there.
DATA, RUNS, SITE = Path("data/smollm2"), Path("runs/smollm2"), Path("site")
SOURCE, BACKBONE, GGUF = DATA / "source", DATA / "backbone", DATA / "gguf"
PUBLISHED, CORPUS = RUNS / "clara-smollm2-135m", RUNS / "corpus_wikipedia_2wiki"
# What a CPU changes: float32, small steps, one epoch, no rounds of evaluation, and a checkpoint every few minutes.
ON_CPU = (
    "use_cpu=true", "bf16=false", "dtype=float32", "num_train_epochs=1", "per_device_train_batch_size=4",
    "gradient_accumulation_steps=2", "per_device_eval_batch_size=16", "dataloader_num_workers=0",
    "dataloader_prefetch_factor=null", "eval_strategy=no", "eval_on_start=false", "eval_datasets=[]",
    "logging_steps=5", "save_steps=20",
)  # fmt: skip


class Paused(Exception):
    """A leg's time is over; the same command goes on."""


@dataclass
class Call:
    """What one call of `run` was told.

    Attributes:
        home: folder with data/ and runs/; every command runs in it.
        deadline: `time.monotonic()` at which everything must be written.
        on_cpu: train in float32 on a CPU.
        scale: share of the training rows that `prepare` writes.
        limit: questions of every evaluation; None asks all.
        overrides: `key=value` of the training legs, which win over everything else.
        source: folder of the data; None where `receive` has brought it.
        variants: names of `configs/smollm2/variants.yaml` that a training leg tries in place of its own run.
        start: finished run that the leg starts from, or publishes, in place of the one before it.
    """

    home: Path
    deadline: float
    on_cpu: bool = False
    scale: float = 1.0
    limit: int | None = None
    overrides: Sequence[str] = ()
    source: Path | None = None
    variants: Sequence[str] = ()
    start: str | None = None

    def minutes_left(self) -> float:
        return (self.deadline - time.monotonic()) / 60

    def environment(self) -> dict[str, str]:
        """Of every command: what `receive` installed comes first, then this project."""
        paths = [str(self.home / SITE)] if (self.home / SITE).is_dir() else []
        given = os.environ.get("PYTHONPATH")
        offline = {"HF_HUB_OFFLINE": "1"} if (self.home / BACKBONE).is_dir() else {}
        return {
            **os.environ,
            **offline,
            "PYTHONPATH": os.pathsep.join([*paths, str(ROOT), *([given] if given else [])]),
            "PYTHONUNBUFFERED": "1",
        }

    def command(self, script: str, *arguments: str | Path) -> None:
        """Run a recipe, or a module after "-m", in the home folder, interrupted when the time is over.

        Raises:
            Paused: the time is over.
            RuntimeError: it failed and has printed why.
        """
        if self.minutes_left() <= 0:
            raise Paused
        line = [sys.executable, script if script == "-m" else str(RECIPES / script), *map(str, arguments)]
        process = subprocess.Popen(line, cwd=self.home, env=self.environment())
        try:
            status = process.wait(timeout=60 * self.minutes_left())
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # the recipes keep what they have
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
            raise Paused from None
        except BaseException:
            process.kill()
            process.wait()
            raise
        if status == PAUSED:
            raise Paused
        if status:
            raise RuntimeError(f"{' '.join(line[1:3])} ended with status {status}")

    def start_after(self, run: str) -> str:
        """The name of the finished run to start from: the one that was asked for, else this one.

        Raises:
            ValueError: it is not finished.
        """
        start = self.start or run
        self.needs(start, start)
        return start

    def needs(self, run: str, leg: str) -> None:
        """Raise a ValueError unless the run that a leg starts from is finished."""
        if not is_finished(self.home / RUNS / run):
            raise ValueError(
                f"this leg needs {self.home / RUNS / run}, which is not finished. Run the leg {leg}, or bring the "
                "run with `pack --runs`."
            )


def is_finished(run: Path) -> bool:
    """Whether a training run wrote its last checkpoint."""
    return (run / "config.json").exists()


# --- the legs --------------------------------------------------------------------------------------------------------


def prepare(call: Call) -> None:
    """Rows for all stages, the backbone's weights, and what this machine can do."""
    source = call.source.resolve() if call.source else call.home / SOURCE
    counts = call.home / DATA / "counts.json"
    if counts.exists() and json.loads(counts.read_text(encoding="utf-8"))["scale"] != call.scale:
        raise ValueError(
            f"{counts} is of another --scale than {call.scale}. Correct --scale, or delete that file "
            f"and the runs in {call.home / RUNS}, which have learned from it."
        )
    if not counts.exists():
        call.command("smollm2_data.py", source, "--output", DATA, "--scale", call.scale)
    if (call.home / GGUF).is_dir() and not (call.home / BACKBONE).is_dir():
        gguf = next((call.home / GGUF).glob("*.gguf"))
        call.command("-m", "modeling_clara.smollm2", gguf, BACKBONE)
    if not call.on_cpu:
        (call.home / RUNS).mkdir(parents=True, exist_ok=True)
        measured = ["--data", DATA / "pretrain_questions.jsonl", "--output", RUNS / "gpu.json", "--rounds", 3]
        try:
            if not (call.home / RUNS / "gpu.json").exists():
                call.command("benchmark_gpu.py", *measured, *backbone_option(call))
        except RuntimeError as error:  # training does not need it
            print(f"not measured: {error}", flush=True)


def backbone_option(call: Call) -> list:
    return ["--backbone", BACKBONE] if (call.home / BACKBONE).is_dir() else []


def train(call: Call, stage: str, name: str | None = None, *given: str) -> None:
    """A training run, or short ones of its variants."""
    files = [CONFIGS / f"{stage}.yaml", CONFIGS / "backbones" / "smollm2-135m.yaml"]
    if name == "curriculum":
        files += [CONFIGS / "curriculum.yaml", CONFIGS / "smollm2" / "curriculum.yaml"]
    else:
        files.append(CONFIGS / "smollm2" / f"{stage}.yaml")
    given = [*given]
    if stage in ("pretrain", "text") and (call.home / BACKBONE).is_dir():
        given.append(f"backbone={BACKBONE}")
    given += ON_CPU if call.on_cpu else ()
    runs = [(name or stage, [])]
    if call.variants:
        section = files[-1].stem
        runs = [(f"variants/{name or stage}/{variant}", read_variant(section, variant)) for variant in call.variants]
    for run, changes in runs:
        if is_finished(call.home / RUNS / run):
            check_finished(call, call.home / RUNS / run)
            print(f"{run} is finished", flush=True)
            continue
        minutes = f"max_minutes={max(0.1, call.minutes_left() - MARGIN):.2f}"
        output = f"output_dir={RUNS / run}"
        call.command("train.py", "--config", *files, *given, *changes, *call.overrides, output, minutes)


def check_finished(call: Call, run: Path) -> None:
    """Raise a ValueError unless a finished run is of a GPU, or of a CPU, as it is asked for now."""
    trained = json.loads((run / "run.json").read_text(encoding="utf-8"))["training"]
    if trained["use_cpu"] != call.on_cpu:
        made, asked = (("with" if flag else "without") for flag in (trained["use_cpu"], call.on_cpu))
        raise ValueError(f"{run} was trained {made} --cpu, and is asked for {asked} it. Delete it, or correct --cpu.")


def read_variant(section: str, name: str) -> list[str]:
    """`key=value` of a variant, by `configs/smollm2/variants.yaml`.

    Raises:
        ValueError: the section has no such variant.
    """
    import yaml  # only where training is installed

    variants = yaml.safe_load((CONFIGS / "smollm2" / "variants.yaml").read_text(encoding="utf-8"))
    known = variants.get(section, {})
    if name not in known:
        raise ValueError(f"--variants of {section} must be of {sorted(known)}, got {name!r}. Correct it.")
    changes = {**variants["all"], **known[name]}
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def curriculum(call: Call) -> None:
    """The beginning of stage 1: pieces of passages that grow longer."""
    train(call, "pretrain", "curriculum")


def pretrain(call: Call) -> None:
    """Stage 1: compressor and generator on questions, paraphrases and cloze questions."""
    train(call, "pretrain", None, checkpoint(call.start_after("curriculum")))


def instruct(call: Call) -> None:
    """Stage 2: five documents, some questions without an answer."""
    train(call, "instruct", None, checkpoint(call.start_after("pretrain")))


def contrastive(call: Call) -> None:
    """Warm-up of the reasoner with known gold documents."""
    train(call, "contrastive", None, checkpoint(call.start_after("instruct")))


def joint(call: Call) -> None:
    """Stage 3 behind the warm-up, on the memories that it stored."""
    train(call, "joint", None, checkpoint(call.start_after("contrastive")), *stored_memories(call))


def joint_label_free(call: Call) -> None:
    """Stage 3 straight from stage 2: no label says which document is right."""
    train(call, "joint", "joint-label-free", checkpoint(call.start_after("instruct")), *stored_memories(call))


def checkpoint(run: str) -> str:
    return f"checkpoint={RUNS / run}"


def stored_memories(call: Call) -> list[str]:
    """The contrastive leg's memories, where they are and of the same compressor."""
    memories = RUNS / "contrastive" / "memories"
    is_same = call.start in (None, "contrastive")
    return [f"corpus={memories}"] if is_same and (call.home / memories / "corpus.json").exists() else []


def text(call: Call) -> None:
    """The rival: the same rows and adapter, reading text."""
    train(call, "text")


def publish(call: Call) -> None:
    """The checkpoint as it is shipped: bfloat16 adapters and a card."""
    run = call.start_after("joint")
    published, trained = (call.home / folder / "config.json" for folder in (PUBLISHED, RUNS / run))
    if published.exists() and published.stat().st_mtime < trained.stat().st_mtime:
        raise ValueError(f"{published.parent} is older than {trained.parent}. Delete it to publish again.")
    if not published.exists():
        call.command("smollm2_publish.py", RUNS, PUBLISHED, "--run", run, *backbone_option(call))


def evaluate(call: Call) -> None:
    """Every figure of the card, on the development files."""
    call.needs(PUBLISHED.name, "publish")
    has_text, has_label_free = (is_finished(call.home / RUNS / name) for name in ("text", "joint-label-free"))
    for name, is_there in (("text", has_text), ("joint-label-free", has_label_free)):
        if not is_there:
            print(f"left out: everything with {name}, which is not trained", flush=True)
    for name, arguments in evaluations(has_text, has_label_free):
        output = RUNS / "evaluation" / name
        if not is_evaluated(call, output, arguments):
            places = ["--memories", RUNS / "evaluation" / "memories", *backbone_option(call)]
            call.command("evaluate.py", *arguments, "--output", output, *places, *limit_option(call))
            update_card(call)  # each time, for what is there when the time is over
    update_card(call)


def is_evaluated(call: Call, output: Path, arguments: list) -> bool:
    """Whether all systems have results of these checkpoints and questions; evaluate.py refuses what is of others."""
    words = list(map(str, arguments))
    systems = words[words.index("--systems") + 1 :] if "--systems" in words else ["clara"]
    systems = systems[: next((n for n, word in enumerate(systems) if word.startswith("--")), len(systems))]
    folders = [output, *(output / "baselines" / name.replace("_", "-") for name in systems[1:])]
    results = [call.home / folder / "results.json" for folder in folders]
    used = [call.home / word / "config.json" for word in words if word.startswith(str(RUNS))]
    newest = max(path.stat().st_mtime for path in used if path.exists())
    if not all(path.exists() and path.stat().st_mtime >= newest for path in results):
        return False
    return json.loads((call.home / output / "run.json").read_text(encoding="utf-8")).get("limit") == call.limit


def update_card(call: Call) -> None:
    """Put the results of the published checkpoint into its card; those of joint-label-free are another model's."""
    runs = sorted(path.parent for path in (call.home / RUNS / "evaluation").glob("*/results.json"))
    call.command("update_card.py", PUBLISHED, *(run for run in runs if not run.name.endswith("-label-free")))


def limit_option(call: Call) -> list:
    return [] if call.limit is None else ["--limit", call.limit]


def evaluations(has_text: bool, has_label_free: bool) -> Iterator[tuple[str, list]]:
    """(name, arguments of evaluate.py) of every run, the ones that matter most first."""
    model, untimed = ["--model", PUBLISHED], ["--latency-questions", 0]
    tuned = ["--text-reader", RUNS / "text"] if has_text else []
    read = {
        name: ["--data", DATA / "dev" / f"{name}.jsonl", "--setting", "gold_only"]
        for name in ("passages_squad", "passages_nq")
    }
    found = {
        name: ["--data", DATA / "dev" / f"{name}.jsonl"]
        for name in ("multihop_hotpotqa_dev", "multihop_musique_dev", "multihop_2wiki_dev")
    }
    for name, data in read.items():
        systems = ["clara", "text", "closed_book", "wrong_memory", *(["tuned_text"] if has_text else [])]
        yield f"{name}-k16", [*model, *data, "--systems", *systems, *tuned]
    for name, data in found.items():
        systems = ["clara", "bm25_memory", "text", *(["tuned_text", "bm25_tuned_text"] if has_text else [])]
        yield f"{name}-k16", [*model, *data, "--systems", *systems, *tuned]
    for name, data in found.items():
        if has_label_free:
            yield f"{name}-label-free", ["--model", RUNS / "joint-label-free", *data, *untimed]
    for name, data in read.items():
        for codec in ("int8", "int4"):
            yield f"{name}-k16-{codec}", [*model, *data, "--codec", codec, *untimed]
    for size in (8, 4):
        for name, data in read.items():
            yield f"{name}-k{size}", [*model, *data, "--memory-size", size, *untimed]
        for name, data in found.items():
            sizes = ["--memory-size", size, "--retrieval-memory-size", size]
            yield f"{name}-k{size}", [*model, *data, *sizes, *untimed]


def corpus(call: Call) -> None:
    """A compressed corpus of 6,119 real paragraphs, built, checked and searched; it stays where it is built."""
    call.needs(PUBLISHED.name, "publish")
    source = call.source.resolve() if call.source else call.home / SOURCE
    model = ["--model", PUBLISHED, *backbone_option(call)]
    documents = source / "corpus_wikipedia_2wiki.jsonl.gz"
    if not (call.home / CORPUS / "corpus.json").exists():
        call.command("-m", "modeling_clara.cli", "compress", documents, "-o", CORPUS, *model, "--codec", "int8")
    call.command("-m", "modeling_clara.cli", "info", CORPUS, "--verify")
    questions = DATA / "dev" / "multihop_2wiki_dev.jsonl"
    output = RUNS / "evaluation" / "corpus_wikipedia_2wiki"
    search = ["--data", questions, "--setting", "corpus", "--corpus", CORPUS, "--output", output]
    if not is_evaluated(call, output, model):
        call.command("evaluate.py", *model, *search, *limit_option(call))
    update_card(call)


LEGS: dict[str, Callable[[Call], None]] = {
    "prepare": prepare,
    "curriculum": curriculum,
    "pretrain": pretrain,
    "instruct": instruct,
    "contrastive": contrastive,
    "joint": joint,
    "joint-label-free": joint_label_free,
    "text": text,
    "publish": publish,
    "evaluate": evaluate,
    "corpus": corpus,
}


def leg_name(word: str) -> str:
    """The leg of a number, from 1, or of a name.

    >>> leg_name("2")
    'curriculum'
    """
    names = list(LEGS)
    if word.isdecimal() and 1 <= int(word) <= len(names):
        return names[int(word) - 1]
    if word in LEGS:
        return word
    raise ValueError(f"a leg must be one of {', '.join(names)}, or its number from 1 to {len(names)}, got {word!r}.")
