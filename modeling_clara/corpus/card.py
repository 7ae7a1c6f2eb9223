"""Renders the card of a corpus from corpus.json: README.md with the metadata of a Hub dataset.

What lies between the two marks is rendered anew after every change. What a user writes outside of them stays, and so
does metadata that is not ours.
"""

import json
from pathlib import Path

import yaml

from ..checksums import insert_checksums, remove_checksums
from ..manifest_clara import Manifest
from ..storage_clara import replacing

CARD_FILE = "README.md"
BEGIN, END = "<!-- clara: begin -->", "<!-- clara: end -->"
TAGS = ["clara", "compressed-corpus", "soft-compression", "retrieval-augmented-generation"]
TASKS = ["question-answering", "text-retrieval"]
SIZES = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B"]

BODY = """{begin}

# {name}

{n_documents} in {n_spans}, each compressed into {m.memory_size} memory tokens of \
{m.hidden_size}
values by the compressor of a CLaRa model ([arXiv 2511.18659](https://arxiv.org/abs/2511.18659)). A question is
compared with the memories and answered from them; the text is for people.

```python
{load}
corpus = model.load_corpus("ORG/NAME", revision="COMMIT")
model.answer(["..."], corpus=corpus)
```

| | |
| --- | --- |
| compressor | {compressor} |
| fingerprint | `{m.fingerprint:.16}` |
| spans | at most {m.document_max_length} tokens with the title, overlap {m.document_overlap} |
| memory | {m.memory_size} x {m.hidden_size}; also usable as {memory_sizes} |
| codec | {m.codec}, {bytes_per_span:,.0f} bytes a span |
| files | {n_shards}, {megabytes:,.1f} MB |
| text | {text} |
| metadata columns | {metadata} |
| rows left out | {rejected} |

The column `memory` holds the memory of a span, encoded with {m.codec}; `corpus.json` names every shard with its
checksum.
{loss}
{end}
"""

FROM_HUB = """from transformers import AutoModel

model = AutoModel.from_pretrained({name}, revision="{revision}", trust_remote_code=True)"""
FROM_FOLDER = """from modeling_clara import CLaRaForRAG

model = CLaRaForRAG.from_pretrained({name})"""


def write_card(folder: Path, manifest: Manifest) -> None:
    """Write README.md anew."""
    path = Path(folder) / CARD_FILE
    data, before, after = {}, "", ""
    if path.exists():
        data, body = _split(remove_checksums(path.read_text(encoding="utf-8", errors="replace")))
        before, after = _own_text(body)
    data = {"task_categories": TASKS} | data | _ours(manifest)
    tags = data.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    data["tags"] = [*tags, *(tag for tag in TAGS if tag not in tags)]
    head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    with replacing(path) as partial:
        partial.write_text(f"---\n{head}---\n\n{before}{render(manifest)}{after}", encoding="utf-8")


def filled_card(folder: Path, repo_id: str) -> str:
    """The card for a push in one commit, which its own snippet cannot name."""
    card = (Path(folder) / CARD_FILE).read_text(encoding="utf-8").replace(', revision="COMMIT"', "")
    return insert_checksums(card.replace("ORG/NAME", repo_id), Path(folder))


def _split(text: str) -> tuple[dict, str]:
    """The metadata and the text of a card; what cannot be read as metadata is text."""
    if text.startswith("---\n") and "\n---\n" in text[3:]:
        head, _, body = text[4:].partition("\n---\n")
        try:
            data = yaml.safe_load(head)
        except yaml.YAMLError:
            return {}, text
        if isinstance(data, dict):
            return data, body.lstrip("\n")
    return {}, text


def _own_text(text: str) -> tuple[str, str]:
    """What a user wrote before and after the marks."""
    before, mark, rest = text.partition(BEGIN)
    if mark:
        return before, rest.partition(END)[2].removeprefix("\n")
    return (text.rstrip() + "\n\n" if text.strip() else ""), ""


def _ours(manifest: Manifest) -> dict:
    """The metadata that follows from the manifest."""
    metadata = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
        "size_categories": [size_category(manifest.n_spans)],
        "clara": {
            "format_version": manifest.format_version,
            "compressor": manifest.compressor,
            "memory_shape": [manifest.memory_size, manifest.hidden_size],
            "codec": manifest.codec,
        },
    }
    return metadata | {name: manifest.source[name] for name in ("license", "language") if manifest.source.get(name)}


def size_category(n_rows: int) -> str:
    """The Hub's category of a data set's size."""
    return SIZES[min(max(len(str(n_rows)) - 3, 0), len(SIZES) - 1)]


def render(manifest: Manifest) -> str:
    """The text between the marks."""
    name = manifest.compressor.get("name_or_path") or ""
    revision = manifest.compressor.get("revision")
    compressor = f"`{name}`" + (f" at `{revision}`" if revision else "") if name else "not named"
    spans = sum(shard.n_spans for shard in manifest.shards)
    n_bytes = sum(shard.n_bytes for shard in manifest.shards)
    source = manifest.source
    text = ", ".join(filter(None, [source.get("name"), source.get("license"), source.get("language")]))
    return BODY.format(
        m=manifest,
        begin=BEGIN,
        end=END,
        name=source.get("name") or "A compressed corpus",
        load=(FROM_HUB if revision else FROM_FOLDER).format(
            name=json.dumps(name or "the model that made it", ensure_ascii=False), revision=revision
        ),
        compressor=compressor,
        memory_sizes=" or ".join(map(str, manifest.memory_sizes)),
        bytes_per_span=n_bytes / spans if spans else 0,
        n_documents=_count(manifest.n_documents, "document"),
        n_spans=_count(manifest.n_spans, "span"),
        n_shards=_count(len(manifest.shards), "Parquet shard"),
        megabytes=n_bytes / 1e6,
        text=text or "source and license not stated",
        metadata=", ".join(f"`{column}` {kind}" for column, kind in manifest.metadata.items()) or "none",
        rejected=f"{manifest.n_rejected}, see `rejected.jsonl`" if manifest.n_rejected else "none",
        loss=_loss(manifest),
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _loss(manifest: Manifest) -> str:
    """What the codec costs, as far as it was measured."""
    if not manifest.measured:
        return "\nWhat the codec loses was not measured on this corpus.\n"
    measured, rows = manifest.measured, manifest.measured["codecs"].values()
    names = ("recall@5", "f1", "em", "containment")
    columns = [name for name in names if any(name in row for row in rows)]
    questions = _count(measured["questions"], "question")
    lines = [
        f"\nMeasured with {questions} of {measured['data']}; recall@5 is the share of the five "
        "best documents of float16 memories that are found, answers are compared with the gold ones:\n",
        "| codec | bytes a memory | " + " | ".join(columns) + " |",
        "| --- |" + " --- |" * (len(columns) + 1),
    ]
    for codec, row in measured["codecs"].items():
        cells = [f"{row[name]:.3f}" if name in row else "" for name in columns]
        lines.append(f"| {codec} | {row['bytes']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
