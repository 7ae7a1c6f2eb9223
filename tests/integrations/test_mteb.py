"""MTEB's own evaluation of the passages that come with the demo: it finds what the model finds, and scores as we do.

The task is one of MTEB's classes with real passages and questions in it.
"""

import json
from pathlib import Path

import mteb
import pytest
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import SearchProtocol

from modeling_clara.cli.demo import PASSAGES
from modeling_clara.integrations.mteb import CLaRaSearch
from recipes.evaluation.cli import main

ROWS = [json.loads(line) for line in PASSAGES.read_text(encoding="utf-8").splitlines()][:12]
QUERIES = {f"{row['id']}?{n}": q["question"] for row in ROWS for n, q in enumerate(row["questions"])}
RELEVANT = {name: {name.partition("?")[0]: 1} for name in QUERIES}


class DemoPassages(AbsTaskRetrieval):
    """12 passages, three questions each."""

    metadata = TaskMetadata(
        name="ClaraDemoPassages",
        dataset={"path": "local/clara-demo-passages", "revision": "1"},
        description="The passages of `clara demo` and their questions.",
        type="Retrieval",
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
    )
    k_values = (1, 3, 5, 10, 20)

    def load_data(self, *_, **__) -> None:
        self.corpus = {"test": {row["id"]: {"title": row["title"], "text": row["text"]} for row in ROWS}}
        self.queries, self.relevant_docs = {"test": QUERIES}, {"test": RELEVANT}
        self.convert_v1_dataset_format_to_v2(num_proc=None)
        self.data_loaded = True


class Reranked(DemoPassages):
    """Of each question three given passages, among them one that the corpus does not have."""

    metadata = DemoPassages.metadata.model_copy(update={"name": "ClaraDemoReranking", "type": "Reranking"})

    def load_data(self, *_, **__) -> None:
        names = [row["id"] for row in ROWS]
        self.top_ranked = {"test": {name: [*RELEVANT[name], names[7], "nowhere"] for name in QUERIES}}
        super().load_data()


def evaluate(search: CLaRaSearch, task: AbsTaskRetrieval, folder: Path) -> tuple[dict, dict]:
    """The scores, and {query: {document: score}}, both as MTEB writes them."""
    result = mteb.evaluate(search, [task], cache=None, prediction_folder=folder, show_progress_bar=False)
    (path,) = folder.rglob("*.json")
    predictions = json.loads(path.read_text())
    return result.task_results[0].scores["test"][0], predictions["default"]["test"]


def write_beir(folder: Path) -> Path:
    (folder / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": row["id"], "title": row["title"], "text": row["text"]}) for row in ROWS]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    (folder / "queries.jsonl").write_text(
        "\n".join(json.dumps({"_id": name, "text": text}) for name, text in QUERIES.items())
    )
    judged = "".join(f"{query}\t{document}\t1\n" for query, row in RELEVANT.items() for document in row)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return folder


def test_it_finds_what_the_model_finds_and_scores_as_our_own_evaluation(clara, tmp_path):
    search = CLaRaSearch(clara, tmp_path / "corpora")
    assert isinstance(search, SearchProtocol)
    scores, predictions = evaluate(search, DemoPassages(), tmp_path / "predictions")
    hits = clara.retrieve(list(QUERIES.values()), corpus=search.corpus, top_k=20)
    for name, sources in zip(QUERIES, hits, strict=True):
        assert predictions[name] == {source.document_id: source.score for source in sources}
        assert len(sources) == len(ROWS)
    options = "--setting corpus --max-new-tokens 1 --latency-questions 0 --resamples 100".split()
    data, output = str(write_beir(tmp_path / "beir")), str(tmp_path / "run")
    assert main(["--data", data, "--model", str(clara.name_or_path), "--output", output, *options]) == 0
    ours = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    for depth in (1, 3, 5, 10):
        for measure in ("recall", "ndcg"):
            assert scores[f"{measure}_at_{depth}"] == pytest.approx(ours[f"{measure}@{depth}"]["value"], abs=1e-5)
    assert 0 < scores["recall_at_10"] < 1


def test_reranking_scores_what_is_given(clara, tmp_path):
    search = CLaRaSearch(clara)
    _, predictions = evaluate(search, Reranked(), tmp_path)
    hits = clara.retrieve(list(QUERIES.values()), corpus=search.corpus, top_k=20)
    for name, sources in zip(QUERIES, hits, strict=True):
        given = {*RELEVANT[name], ROWS[7]["id"]}
        expected = {source.document_id: source.score for source in sources if source.document_id in given}
        assert predictions[name] == pytest.approx(expected, abs=1e-6)


def test_corpora_are_kept_and_other_vectors_compared(clara, tmp_path):
    """A second evaluation compresses nothing; another memory size is another model to MTEB, and another corpus."""
    search = CLaRaSearch(clara, tmp_path / "corpora")
    scores, predictions = evaluate(search, DemoPassages(), tmp_path / "first")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpora").rglob("*.parquet")}
    again = CLaRaSearch(str(clara.name_or_path), tmp_path / "corpora")
    assert evaluate(again, DemoPassages(), tmp_path / "second") == (scores, predictions)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "corpora").rglob("*.parquet")} == written
    small = CLaRaSearch(clara, memory_size=2, codec="int8")
    _, predictions = evaluate(small, DemoPassages(), tmp_path / "third")
    hits = clara.retrieve(list(QUERIES.values()), corpus=small.corpus, top_k=20, retrieval_memory_size=2)
    assert list(predictions.values()) == [{s.document_id: s.score for s in sources} for sources in hits]
    assert small.mteb_model_meta != search.mteb_model_meta and small.mteb_model_meta.embed_dim == 2 * 32
    with pytest.raises(ValueError, match="memory_size"):
        evaluate(CLaRaSearch(clara, tmp_path / "corpora", memory_size=2), DemoPassages(), tmp_path / "fourth")


def test_what_mteb_writes_of_the_model(clara):
    meta = CLaRaSearch(clara, meta={"languages": ["eng-Latn"], "training_datasets": set()}).mteb_model_meta
    assert meta.name == f"local/{Path(clara.name_or_path).name}" and clara.fingerprint.startswith(meta.revision)
    assert (meta.languages, meta.training_datasets, meta.embed_dim) == (["eng-Latn"], set(), 4 * 32)
    clara_of_hub = CLaRaSearch(clara, meta={"name": "org/name"})
    assert clara_of_hub.mteb_model_meta.name == "org/name"


def test_texts_that_tasks_have(clara):
    """Empty documents are left out, titles alone are text; queries with instructions, and conversations."""

    class Named:
        name = "texts"

    names = {"task_metadata": Named, "hf_split": "test", "hf_subset": "default", "encode_kwargs": {}}
    search = CLaRaSearch(clara)
    with pytest.raises(RuntimeError, match="`index` must be called before"):
        search.search([], top_k=1)
    rows = [{"id": "empty", "text": " "}, {"id": "title", "title": "Oslo", "text": ""}, {"id": "body", "text": "Lima"}]
    search.index(rows, num_proc=None, **names)
    assert list(search.corpus.document_ids()) == ["title", "body"]
    turns = [{"role": "user", "content": "Who"}, {"role": "assistant", "content": "Otto"}]
    asked = ["Who", "Who lives there?", "Who; Otto", "user: Who; assistant: Otto"]
    given = [{"text": "Who"}, {"text": "Who", "instruction": "lives there?"}, {"text": ["Who", "Otto"]}]
    for text, row in zip(asked, [*given, {"text": turns}], strict=True):
        queries = Rows([{"id": "q", **row}])
        (sources,) = clara.retrieve([text], corpus=search.corpus, top_k=2)
        assert search.search(queries, top_k=9, num_proc=None, **names) == {
            "q": {source.document_id: source.score for source in sources}
        }


class Rows(list):
    """Rows with columns, as a dataset has them."""

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)
