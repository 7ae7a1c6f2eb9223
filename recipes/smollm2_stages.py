"""The legs of clara-smollm2-135m: what each one runs, in a folder with data/ and runs/, until its time is over.

Stands between `smollm2_legs.py`, the command, and the recipes that the legs call in processes of their own. It knows
nothing of models or of how files travel.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from smollm2_call import (
    BACKBONE,
    CONFIGS,
    CORPUS,
    DATA,
    FILES,
    GGUF,
    MARGIN,
    PUBLISHED,
    RUNS,
    SOURCE,
    STARTS,
    Call,
    is_finished,
    start_of_run,
)

MULTIHOP = ("multihop_hotpotqa_dev", "multihop_musique_dev", "multihop_2wiki_dev")  # development questions

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
    if not counts.exists() or not set(FILES) <= set(json.loads(counts.read_text(encoding="utf-8"))["rows"]):
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


def dtype_of(call: Call) -> str:
    """What a model computes in where nothing trains: as the training legs do."""
    return "bfloat16" if not call.on_cpu or "dtype=bfloat16" in call.overrides else "float32"


def train(call: Call, stage: str, name: str | None = None) -> None:
    """A training run, or short ones of its variants.

    Args:
        call: what is asked for.
        stage: of `train.py`.
        name: of the leg and its run, where that is not the stage's.
    """
    leg = name or stage
    files = [CONFIGS / f"{stage}.yaml", CONFIGS / "backbones" / "smollm2-135m.yaml"]
    if leg == "curriculum":
        files += [CONFIGS / "curriculum.yaml", CONFIGS / "smollm2" / "curriculum.yaml"]
    else:
        files.append(CONFIGS / "smollm2" / f"{leg}.yaml")
    section = files[-1].stem
    if call.on_cpu:
        files.append(CONFIGS / "smollm2" / "cpu.yaml")
        small = CONFIGS / "smollm2" / f"small-{leg}.yaml"
        small = small if small.exists() else CONFIGS / "smollm2" / "small.yaml"
        files += [small] if leg != "curriculum" else []  # its rows have an order
    start = call.start_of(leg) if leg in STARTS else None
    given = [f"checkpoint={RUNS / start}"] if start else []
    if leg == "joint-label-free":
        given += stored_memories(call, start)
    if (call.home / BACKBONE).is_dir():
        given.append(f"backbone={BACKBONE}")
    runs = [(leg, [])]
    if call.variants:
        runs = [(f"variants/{leg}/{variant}", read_variant(section, variant)) for variant in call.variants]
    for run, changes in runs:
        if is_finished(call.home / RUNS / run):
            check_finished(call, call.home / RUNS / run, start)
            print(f"{run} is finished", flush=True)
            continue
        minutes = f"max_minutes={max(0.1, call.minutes_left() - MARGIN):.2f}"
        output = f"output_dir={RUNS / run}"
        call.command("train.py", "--config", *files, *given, *changes, *call.overrides, output, minutes)


def check_finished(call: Call, run: Path, start: str | None) -> None:
    """Raise a ValueError unless a finished run is what is asked for now: of a GPU or a CPU, from this start."""
    if start_of_run(run) != start:
        raise ValueError(
            f"{run} started from {start_of_run(run)}, and is asked for from {start}. Delete it, or correct --from."
        )
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
    shared = known.pop("all", {})
    if name not in known:
        raise ValueError(f"--variants of {section} must be of {sorted(known)}, got {name!r}. Correct it.")
    changes = {**variants["all"], **shared, **known[name]}
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


def curriculum(call: Call) -> None:
    """The beginning of stage 1: pieces of passages that grow longer."""
    train(call, "pretrain", "curriculum")


def pretrain(call: Call) -> None:
    """Stage 1: compressor and generator on questions, paraphrases and cloze questions."""
    train(call, "pretrain")


def instruct(call: Call) -> None:
    """Stage 2: five documents, some questions without an answer."""
    train(call, "instruct")


def contrastive(call: Call) -> None:
    """Warm-up of the reasoner with known gold documents."""
    train(call, "contrastive")


def joint(call: Call) -> None:
    """All three roles with known gold documents, among hard negatives that the warmed-up reasoner chose."""
    hard, start = DATA / "retrieval_hard.jsonl", call.start_of("joint")
    mined, chooser = call.home / hard, call.home / RUNS / start / "config.json"
    if not mined.exists() or mined.stat().st_mtime < chooser.stat().st_mtime:
        rows = [DATA / f"{name}.jsonl" for name in ("retrieval_multihop", "retrieval")]
        places = ["--memories", RUNS / "mining", "--output", hard, *backbone_option(call)]
        options = ["--dtype", dtype_of(call), "--rows-of-step", 8 if call.on_cpu else 32]
        options += ["--single-share", 0.5] if call.on_cpu else []
        call.command("mine_negatives.py", *rows, "--model", RUNS / start, *places, *options)
    train(call, "joint")


def joint_search(call: Call) -> None:
    """Reasoner and generator go on among the hardest of all documents, whose memories stay as they are."""
    train(call, "joint", "joint-search")


def joint_label_free(call: Call) -> None:
    """Stage 3 as the paper has it: a frozen compressor, and no label says which document is right."""
    train(call, "joint", "joint-label-free")


def stored_memories(call: Call, start: str) -> list[str]:
    """The contrastive leg's memories, where they are and of this start's compressor, which that leg does not train."""
    run = RUNS / "contrastive"
    if not (call.home / run / "memories" / "corpus.json").exists():
        return []
    return [f"corpus={run / 'memories'}"] if start in ("contrastive", start_of_run(call.home / run)) else []


def text(call: Call) -> None:
    """The rival: the same rows and adapter, reading text."""
    train(call, "text")


def publish(call: Call) -> None:
    """The checkpoint as it is shipped: bfloat16 adapters and a card."""
    run = call.start_of("publish")
    published, trained = (call.home / folder / "config.json" for folder in (PUBLISHED, RUNS / run))
    if published.exists():
        log = json.loads((published.parent / "training_log.json").read_text(encoding="utf-8"))
        if list(log)[-1] != run or published.stat().st_mtime < trained.stat().st_mtime:
            raise ValueError(
                f"{published.parent} is of {list(log)[-1]}, or older than {trained.parent}. Delete it to publish "
                "again."
            )
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
    found = {name: ["--data", DATA / "dev" / f"{name}.jsonl"] for name in MULTIHOP}
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
    """A compressed corpus of real paragraphs, built, checked and searched; it stays where it is built."""
    call.needs(PUBLISHED.name, "publish")
    model = ["--model", PUBLISHED, *backbone_option(call)]
    if not (call.home / CORPUS / "corpus.json").exists():
        documents = DATA / "corpus.jsonl"
        options = ["-o", CORPUS, *model, "--codec", "int8", "--dtype", dtype_of(call)]
        call.command("-m", "modeling_clara.cli", "compress", documents, *options)
    call.command("-m", "modeling_clara.cli", "info", CORPUS, "--verify")
    for name in MULTIHOP:
        output = RUNS / "evaluation" / f"{name}-corpus"
        search = ["--data", DATA / "dev" / f"{name}.jsonl", "--setting", "corpus", "--corpus", CORPUS]
        systems = ["--systems", "clara", "bm25_memory"]
        if not is_evaluated(call, output, [*model, *systems]):
            call.command("evaluate.py", *model, *search, *systems, "--output", output, *limit_option(call))
        update_card(call)


LEGS: dict[str, Callable[[Call], None]] = {
    "prepare": prepare,
    "curriculum": curriculum,
    "pretrain": pretrain,
    "instruct": instruct,
    "contrastive": contrastive,
    "joint": joint,
    "joint-search": joint_search,
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
