"""Figures for model cards: what a memory size costs and gives, and where memories lie beside their documents.

    python -m recipes.figures rate RUN_K4 RUN_K8 RUN_K16 --output rate.png
    python -m recipes.figures states MODEL --data DOCUMENTS --output states.png

`rate` reads results.json of runs of one model that differ in the memory size (nested memory makes this one
checkpoint); `states` runs the compressor. Neither knows how the results were made.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from modeling_clara import CLaRaForRAG
from modeling_clara.cli.console import allow_any_console
from modeling_clara.corpus.sources import DocumentSource
from recipes.evaluation.report import read_results

BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d1651a", "#3a7d44", "#666666"
PANELS = {"Answers": ("f1", "em", "containment"), "Retrieval": ("recall@1", "recall@5")}
STYLES = ((BLUE, "o-"), (ORANGE, "s--"), (GREEN, "^:"))
BATCH = 16
SEED = 0


# --- rate ------------------------------------------------------------------------------------------------------------


def select_runs(results: Sequence[Mapping]) -> list[dict]:
    """The runs that read memories, by memory size; a ValueError if they do not make one picture."""
    runs = [content for content in results if content["system"]["kind"] == "clara"]
    sizes = [run["system"]["memory_size"] for run in runs]
    if len(set(sizes)) < 2 or len(set(sizes)) < len(sizes):
        raise ValueError(
            f"the runs must be of at least two memory sizes, each once, got {sorted(sizes)}. Run recipes.evaluate "
            "with several --memory-size."
        )
    fixed = {
        "model": [run["model"]["fingerprint"] for run in runs],
        "data file": [run["data"]["sha256"] for run in runs],
        "half of the questions": [run["data"].get("half") for run in runs],
        "setting": [run["setting"] for run in runs],
        "codec": [run["system"]["codec"] for run in runs],
        "system": [run["system"]["name"] for run in runs],
        "number of questions": [run["data"]["questions"] for run in runs],
    }
    for name, values in fixed.items():
        if len(set(values)) > 1:
            raise ValueError(f"the runs must have one {name}, got {values[0]} and {values[-1]}. Leave some out.")
    return sorted(runs, key=lambda run: run["system"]["memory_size"])


def plot_rate(results: Sequence[Mapping]) -> Figure:
    """Answers and recall of results against the bytes of a chunk, one point a memory size, with 95 % intervals."""
    runs = select_runs(results)
    x = [run["efficiency"]["bytes_per_span"] for run in runs]
    labels = [f"k = {run['system']['memory_size']}\n{size:,.0f} B" for run, size in zip(runs, x, strict=True)]
    figure = Figure(figsize=(8, 3.4), dpi=150, layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        shown = [name for name in names if all(name in run["metrics"] for run in runs)]
        if not shown:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)
            continue
        for name, (color, style) in zip(shown, STYLES, strict=False):
            values = [run["metrics"][name] for run in runs]
            low, middle, high = np.array([[value[key] for value in values] for key in ("low", "value", "high")])
            errors = np.clip([middle - low, high - middle], 0, None)
            axes.errorbar(x, middle, yerr=errors, fmt=style, color=color, capsize=3, label=name)
        axes.set_xscale("log")
        axes.set_xticks(x, labels)
        axes.minorticks_off()
        axes.set_ylim(0, 1.02)
        axes.set_title(title, loc="left")
        axes.set_xlabel(f"memory vectors and bytes of a span ({runs[0]['system']['codec']})")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


# --- states ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def mean_states(model: CLaRaForRAG, documents: Sequence[Mapping], memory_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The two vectors whose distance is L_MSE (eq. 2.1), of documents of one chunk each.

    Mean final-layer state of the document's tokens and of its memory tokens, (documents, hidden) float32 each.
    """
    ids, device, means = model.processor.encode_documents(documents), model.memory_embeddings.device, []
    for start in range(0, len(ids), BATCH):
        batch = ids[start : start + BATCH]
        lengths = torch.tensor([len(row) for row in batch], device=device)
        padded = model.processor.pad(batch, model.processor.pad_token_id).to(device)
        memory, states = model.encode("compressor", padded, lengths, memory_size)
        is_text = torch.arange(states.shape[1], device=device) < lengths[:, None]
        text = (states.float() * is_text[..., None]).sum(1) / lengths[:, None]
        means.append((text.cpu().numpy(), memory.float().mean(1).cpu().numpy()))
    return tuple(np.concatenate(part) for part in zip(*means, strict=True))


def describe_states(documents: np.ndarray, memories: np.ndarray) -> dict[str, float]:
    """Numbers beside the picture, over (documents, hidden) each.

    `mse`: mean squared difference a dimension; `cosine`: of each memory and its document; `nearest`: share of
    memories whose own document is the nearest of all.
    """
    distances = ((memories[:, None] - documents[None]) ** 2).mean(-1)
    norms = np.linalg.norm(documents, axis=1) * np.linalg.norm(memories, axis=1)
    return {
        "mse": float(np.diag(distances).mean()),
        "cosine": float(((documents * memories).sum(1) / np.maximum(norms, 1e-12)).mean()),
        "nearest": float((distances.argmin(1) == np.arange(len(distances))).mean()),
    }


def plot_states(documents: np.ndarray, memories: np.ndarray, method: str = "pca") -> Figure:
    """Mean states of documents and their memories, (documents, hidden) each, on one plane ("pca" or "tsne")."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(documents) < 4:
        raise ValueError(f"at least 4 documents must be there to draw, got {len(documents)}. Pass more.")
    both = np.concatenate([documents, memories])
    name, projection = "PCA", PCA(2, random_state=SEED)
    if method == "tsne":
        perplexity = min(30, (len(both) - 1) / 3)
        name, projection = "t-SNE", TSNE(2, perplexity=perplexity, init="pca", random_state=SEED)
    texts, points = np.split(projection.fit_transform(both), 2)
    numbers = describe_states(documents, memories)
    figure = Figure(figsize=(5.4, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(*np.stack([texts, points], axis=1).transpose(2, 1, 0), color=GREY, alpha=0.25, linewidth=0.6, zorder=1)
    axes.scatter(*texts.T, s=12, color=BLUE, label="documents", zorder=2)
    axes.scatter(*points.T, s=12, color=ORANGE, label="memories", zorder=3)
    axes.set_title(
        f"{name} of mean final-layer states, {len(documents)} documents\n"
        f"MSE {numbers['mse']:.3f}, cosine {numbers['cosine']:.3f}, own document nearest {numbers['nearest']:.1%}",
        loc="left",
        fontsize=9,
    )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(frameon=False)
    return figure


def read_chunks(model: CLaRaForRAG, path: str, limit: int) -> list[dict]:
    """First chunks of the first documents of a file or folder, as `clara compress` reads it."""
    rows = (row.document for row in DocumentSource(path) if row.document is not None)
    chunks = [model.processor.split_document(document)[0] for document in itertools.islice(rows, limit)]
    if not chunks:
        raise ValueError(f"--data must have documents with text, found none in {path}. Correct it.")
    return chunks


def main(argv: Sequence[str] | None = None) -> int:
    """Draw; the exit status."""
    allow_any_console()
    parser = argparse.ArgumentParser(
        "python -m recipes.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    rate = commands.add_parser("rate", help="answers and recall against bytes")
    rate.add_argument("results", nargs="+", type=Path, help="results.json files, or folders of runs")
    states = commands.add_parser("states", help="memories beside their documents")
    states.add_argument("model", help="checkpoint folder or Hub id")
    states.add_argument("--data", required=True, help="documents, as `clara compress` takes them")
    states.add_argument("--limit", type=int, default=200, help="documents (default: 200)")
    states.add_argument("--method", choices=("pca", "tsne"), default="pca")
    states.add_argument("--memory-size", type=int, help="k (default: the largest)")
    for command in (rate, states):
        command.add_argument("--output", required=True, type=Path, help="PNG file")
    arguments = parser.parse_args(argv)
    try:
        if arguments.output.suffix != ".png":
            raise ValueError(f"--output must end in .png, got {arguments.output}. Correct it.")
        if arguments.command == "rate":
            figure = plot_rate(read_results(arguments.results, with_baselines=False))
        else:
            model = CLaRaForRAG.from_pretrained(arguments.model)
            size = model.config.check_memory_size(arguments.memory_size)
            means = mean_states(model, read_chunks(model, arguments.data, arguments.limit), size)
            print(json.dumps(describe_states(*means)))
            figure = plot_states(*means, arguments.method)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(arguments.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Written: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
