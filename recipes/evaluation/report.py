"""results.json -> tables in Markdown, the evaluation section of a model card, and evaluation metadata for the Hub.

Last in the way. It reads results files and nothing else.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, eval_result_entries_to_yaml

from recipes.evaluation.validation import check_results

SHOWN = ("f1", "em", "containment", "recall@1", "recall@5", "mrr", "abstention")
CARD_METRICS = ("f1", "em", "containment", "recall@1", "recall@5")
TABLE_COMPARISONS = ("f1", "containment", "recall@1")  # results.json has more
CALIBRATION_FILE = "calibration.json"  # of calibrate.py, in the folder of a model
BEGIN, END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
COMPRESSION = "<!-- compression: begin -->", "<!-- compression: end -->"


def read_results(paths: Iterable[Path], *, with_baselines: bool = True) -> list[dict]:
    """Read results files; a folder stands for its results.json and, unless left out, those of its baselines.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file is not valid, with its first problem.
    """
    found = []
    for path in map(Path, paths):
        files = [path]
        if path.is_dir():  # its own before those of its baselines
            files = sorted(path.rglob("results.json"), key=lambda file: (len(file.parts), file))
            files = [file for file in files if with_baselines or "baselines" not in file.relative_to(path).parts]
        if not files or not files[0].exists():
            raise FileNotFoundError(f"{path} must be a results.json or a folder with one. Run recipes.evaluate.")
        for file in files:
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{file} must be JSON: {error}. Run recipes.evaluate again.") from error
            problems = check_results(content)
            if problems:
                raise ValueError(f"{file} must be valid results: {problems[0]}. Run recipes.evaluate again.")
            found.append(content)
    return found


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def results_table(results: Sequence[Mapping]) -> str:
    """One row a system: answers and retrieval with their 95 % intervals, bytes, tokens, milliseconds, failures."""
    rows = []
    for content in results:
        system, efficiency, latency = content["system"], content["efficiency"], content["efficiency"]["latency_ms"]
        rows.append(
            {
                "data": data_name(content["data"]),
                "setting": content["setting"],
                "system": system["name"],
                "k": system["memory_size"],
                "codec": system["codec"],
                **{name: _interval(content["metrics"].get(name)) for name in SHOWN},
                "bytes/span": _number(efficiency["bytes_per_span"]),
                "tokens": _number(efficiency["tokens_read"]),
                "p50 ms": _number(latency["total"]["p50"]) if latency else None,
                "failed": content["counts"]["failed"],
            }
        )
    data = [content["data"] for content in results]
    left_out = {name for name in rows[0] if all(row[name] is None for row in rows)}
    if len({content["setting"] for content in results}) == 1:
        left_out.add("setting")
    if len({(d["name"], d["sha256"], d["questions"], d.get("half")) for d in data}) == 1 and not data[0].get("half"):
        left_out.add("data")  # a half is always named
    header = [name for name in rows[0] if name not in left_out]
    return table(header, [["" if row[name] is None else _escape(row[name]) for name in header] for row in rows])


def data_name(data: Mapping) -> str:
    """The name of the data, with the half of the questions if it was not all of them."""
    return f"{data['name']}, {data['half']} half" if data.get("half") else data["name"]


def comparison_table(content: Mapping) -> str:
    """F1, containment and recall@1 against every other system; empty if there is none."""
    rows = [
        [
            _escape(row["system"]),
            row["metric"],
            f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})",
            f"{row['p_value']:.4f}",
        ]
        for row in content["comparisons"]
        if row["metric"] in TABLE_COMPARISONS
    ]
    return table(["against", "metric", "difference", "p"], rows) if rows else ""


def _interval(metric: Mapping | None) -> str | None:
    return f"{metric['value']:.3f} ({metric['low']:.3f} to {metric['high']:.3f})" if metric else None


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _escape(value) -> str:
    return re.sub(r"([|\\`*_<>\[\]])", r"\\\1", " ".join(str(value).split()))


# --- cards -----------------------------------------------------------------------------------------------------------


def card_section(results: Sequence[Mapping], calibration: Mapping | None = None) -> str:
    """The evaluation section of a model card, between two marks so that it can be replaced.

    Args:
        results: contents of results.json.
        calibration: content of calibration.json; None if the model has no threshold.
    """
    hardware = [content["hardware"] for content in results]
    machines = dict.fromkeys(h["accelerator"] or f"{h['cores']} cores, {h['cpu']}" for h in hardware)
    commands = dict.fromkeys(content["command"] for content in results)
    data = {data_name(content["data"]): content["data"] for content in results}
    named = "; ".join(
        f"{_escape(name)}, {d['questions']:,} questions (SHA-256 {d['sha256'][:12]})" for name, d in data.items()
    )
    parts = [
        BEGIN,
        "## Evaluation",
        f"Means with 95 % bootstrap intervals over questions. Data: {named}. Times: one question at a time, "
        f"{'; '.join(map(_escape, machines))}.",
        results_table(results),
    ]
    for compared in (content for content in results if content["comparisons"]):
        setting = compared["setting"].replace("_", " ")
        parts += [
            f"{_escape(compared['system']['name'])} minus other systems on the same questions "
            f"({_escape(data_name(compared['data']))}, {setting}); paired bootstrap intervals, p by sign flips:",
            comparison_table(compared),
        ]
    if calibration is not None:
        parts.append(calibration_text(calibration))
    parts += ["\n".join("    " + " ".join(command.split()).replace("<!--", "<! --") for command in commands), END]
    return "\n\n".join(parts)


def calibration_text(calibration: Mapping) -> str:
    """What the model's threshold refuses and loses, in one paragraph."""
    questions, data = calibration["questions"], [*calibration["data"], *calibration["unanswerable"]]
    half = f", {calibration['half']} half" if calibration["half"] else ""
    refused = ", ".join(
        f"{share:.1%} of {questions[kind]:,} ({kind})" for kind, share in calibration["refused"].items()
    )
    weight = calibration.get("overlap_weight")
    words = f", less up to {weight} for the words of the question that it has (`overlap_weight`)" if weight else ""
    return (
        f"The model does not answer where no document has a cosine of {calibration['min_score']} (`min_score`; -1 "
        f"switches it off){words}. Of questions that their documents do not answer this refuses {refused}; of "
        f"{questions['answerable']:,} answerable ones it loses {calibration['lost']:.1%} "
        f"({', '.join(map(_escape, data))}{half}; {calibration['num_candidates']} candidates each)."
    )


def compression_section(config: Mapping, entries: Iterable[EvalResult]) -> str:
    """What a memory of each size costs and keeps, between two marks of its own.

    Args:
        config: content of the model's config.json.
        entries: of the card's `model-index`; F1 with float16 memories is shown, a column for each data and setting.
    """
    from modeling_clara.codecs_clara import CODECS, Codec

    sizes, f1 = config["memory_sizes"], {}
    for entry in entries:
        found = re.fullmatch(r"(\w+), clara k=(\d+) float16", entry.dataset_config or "")
        if found and entry.metric_type == "f1":
            half = f", {entry.dataset_split}" if entry.dataset_split != "all" else ""
            column = f1.setdefault(_escape(f"F1, {entry.dataset_name}{half}, {found[1]}"), {})
            column[int(found[2])] = f"{entry.metric_value:.3f}"
    rows = []
    for size in sizes:
        codecs = [Codec(name, size, config["text_config"]["hidden_size"]).row_bytes for name in CODECS]
        cells = [size, _number(config["document_max_length"] / size), *(f"{n_bytes:,}" for n_bytes in codecs)]
        rows.append(cells + [column.get(size, "") for column in f1.values()])
    header = ["vectors", "tokens a vector", *(f"{name}, bytes" for name in CODECS), *f1]
    text = f"A document of {config['document_max_length']} tokens, the most that one memory holds; "
    text += "longer ones become several." + (" F1 is with float16 memories." if f1 else "")
    return "\n\n".join([COMPRESSION[0], text, table(header, rows), COMPRESSION[1]])


def insert_section(card: str, section: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """Put the section in the place of an earlier one, or at the end."""
    earlier = re.search(f"{marks[0]}(?:(?!{marks[0]}).)*?{marks[1]}", card, re.DOTALL)
    if earlier:
        return card[: earlier.start()] + section + card[earlier.end() :]
    return f"{card.rstrip()}\n\n{section}\n"


# --- metadata for the Hub --------------------------------------------------------------------------------------------


def _card_metrics(results: Sequence[Mapping]) -> Iterator[tuple[Mapping, str, Mapping]]:
    """(results, name, metric) of the CLaRa systems."""
    for content in results:
        if content["system"]["kind"] == "clara":
            for name in CARD_METRICS:
                if name in content["metrics"]:
                    yield content, name, content["metrics"][name]


def hub_results(results: Sequence[Mapping], dataset: str | None = None) -> list[EvalResult]:
    """Entries of a card's `model-index`: the metrics of the CLaRa systems, for each data file and setting."""
    return [
        EvalResult(
            task_type="question-answering",
            task_name="retrieval-augmented question answering",
            dataset_type=dataset or _dataset_id(content),
            dataset_name=content["data"]["name"],
            dataset_config=f"{content['setting']}, {describe(content)}",
            dataset_split=f"{content['data']['half']} half" if content["data"].get("half") else "all",
            metric_type=name,
            metric_name=f"{name} ({metric['low']:.3f} to {metric['high']:.3f})",
            metric_value=round(metric["value"], 4),
            metric_config=describe(content),
        )
        for content, name, metric in _card_metrics(results)
    ]


def describe(content: Mapping) -> str:
    """A system in few words, such as `clara k=16 int8`."""
    system = content["system"]
    size = f"k={system['memory_size']}" if system["memory_size"] else None
    return " ".join(word for word in (system["name"], size, system["codec"]) if word)


def _dataset_id(content: Mapping) -> str:
    """The data as an id: itself if it has the form `org/name`, else a name without dots and slashes."""
    name = content["data"]["name"]
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else re.sub(r"\.jsonl(\.gz)?$|\.parquet$", "", name)


def eval_result_files(results: Sequence[Mapping], dataset: str | None = None) -> dict[str, list[dict]]:
    """`.eval_results/*.yaml` of a model repo, the Hub's current form: path -> content.

    Args:
        results: of CLaRa systems; others are left out, and of several with one task the first stands.
        dataset: id of the benchmark on the Hub; default the data's own name if it is one.
    """
    files: dict[str, dict] = {}
    for content, metric, value in _card_metrics(results):
        benchmark, half = dataset or _dataset_id(content), content["data"].get("half")
        if "/" not in benchmark:
            continue
        entry = EvalResultEntry(
            dataset_id=benchmark,
            task_id="_".join([content["setting"], *([half, "half"] if half else []), metric]),
            value=round(value["value"], 4),
            date=content["created"],
            notes=f"{describe(content)}; 95 % interval {value['low']:.3f} to {value['high']:.3f}",
        )
        name = re.sub(r"[^\w-]+", "-", benchmark).strip("-")
        files.setdefault(f".eval_results/{name}.yaml", {}).setdefault(entry.task_id, entry)
    return {path: eval_result_entries_to_yaml(list(entries.values())) for path, entries in files.items()}


def update_card(folder: Path, results: Sequence[Mapping], dataset: str | None = None) -> list[Path]:
    """Write section, `model-index` and `.eval_results/` into the folder of a model; the files that were written.

    Raises:
        FileNotFoundError: the folder has no README.md.
    """
    folder, path = Path(folder), Path(folder) / "README.md"
    if not path.exists():
        raise FileNotFoundError(f"{path} must be a model card, found none. Save the model there first.")
    calibration, known = folder / CALIBRATION_FILE, None
    if calibration.exists():
        known = json.loads(calibration.read_text(encoding="utf-8"))
    try:
        card = ModelCard(insert_section(path.read_text(encoding="utf-8"), card_section(results, known)))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must begin with YAML between two lines of ---, but: {error}. Correct it.") from error
    entries = hub_results(results, dataset)
    if entries:
        new = {_identity(entry) for entry in entries}
        kept = [entry for entry in card.data.get("eval_results") or [] if _identity(entry) not in new]
        card.data.model_name = card.data.get("model_name") or folder.resolve().name
        card.data.eval_results = kept + entries
    if COMPRESSION[0] in card.text and (config := folder / "config.json").exists():
        found = json.loads(config.read_text(encoding="utf-8"))
        section = compression_section(found, card.data.get("eval_results") or [])
        card.text = insert_section(card.text, section, COMPRESSION)
    path.write_text(str(card), encoding="utf-8")
    written = [path]
    for name, content in eval_result_files(results, dataset).items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        tasks = {entry["dataset"]["task_id"] for entry in content}
        there = (yaml.safe_load(target.read_text(encoding="utf-8")) or []) if target.exists() else []
        kept = [entry for entry in there if entry["dataset"]["task_id"] not in tasks]
        target.write_text(yaml.safe_dump(kept + content, sort_keys=False, allow_unicode=True), encoding="utf-8")
        written.append(target)
    return written


def _identity(entry: EvalResult) -> tuple:
    return entry.dataset_type, entry.dataset_config, entry.dataset_split, entry.metric_type
