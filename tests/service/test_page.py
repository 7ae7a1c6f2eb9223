"""The page without a browser: what it shows is escaped, what it measures is right, own files are kept apart and go."""

import gzip
import json
import threading
import tomllib
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the page is made with gradio; pip install -e '.[ui]'")
pytest.importorskip("pyarrow", reason="corpora are kept in Parquet; pip install -e '.[corpus]'")

from huggingface_hub import EvalResult  # noqa: E402

from modeling_clara import Answer, CompressedCorpus, Source, cli  # noqa: E402
from modeling_clara.cli.ui import example_questions  # noqa: E402
from modeling_clara.quantization import quantize_model  # noqa: E402
from modeling_clara.service import page_html as show  # noqa: E402
from modeling_clara.service import page_session  # noqa: E402
from modeling_clara.service.page_rate import read_rates, select_rates  # noqa: E402
from modeling_clara.service.page_session import (  # noqa: E402
    Asked,
    Cost,
    Limits,
    Passage,
    Stopped,
    Visitors,
    ask,
    cache_bytes,
    paraphrase,
)

ATTACK = "<img src=x onerror=alert(1)><script>alert(2)</script>' \" {{value}} ${alert(3)} `x` @children **b** [a](b)"
COST = Cost(10, 4, 1000, 20_000, None, 5.0)


@pytest.fixture(scope="module")
def corpus(shared_model, tmp_path_factory):
    """Two documents, the first of three chunks or more."""
    text = "Paris is the capital of France. The Seine flows through Paris. " * 6
    documents = [
        {"id": "paris", "title": ATTACK, "text": text},
        {"id": "rome", "title": "Rome", "text": "Rome rests."},
    ]
    return CompressedCorpus.build(shared_model, documents, tmp_path_factory.mktemp("page") / "corpus")


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Of a model that knows no end."""
    monkeypatch.setattr(page_session, "ANSWER_TOKENS", 6)
    monkeypatch.setattr(page_session, "PARAPHRASE_TOKENS", 6)


@pytest.fixture
def visitors(shared_model, corpus):
    kept = Visitors(shared_model, corpus, Limits(files=3, chunks=30, file_bytes=20_000, unpacked_bytes=50_000))
    yield kept
    kept.close()
    assert not Path(kept.root.name).exists()


class _Reader(HTMLParser):
    """Elements and text of a piece of HTML."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts = [], []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def write(folder: Path, **files: str | bytes) -> list[str]:
    """Files of these contents; in a name two underscores are a dot."""
    paths = []
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        paths.append(str(path))
    return paths


def last(parts):
    """The last of several."""
    *_, part = parts
    return part


# --- what is shown ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda text: show.message_html(text, kind="problem"),
        lambda text: show.words_html([text]),
        lambda text: show.passage_html(1, Passage(Source(text, 0, 0.5, text, text), text, text, 3), 0.2),
        lambda text: show.passages_html(Asked(None, text, 1, Answer(text, []), [], COST), None, text),
        lambda text: show.costs_html(COST, COST, text),
    ],
    ids=["message", "words", "passage", "passages", "costs"],
)
def test_hostile_text_is_text(build):
    plain, hostile = _Reader(build("x")), _Reader(build(ATTACK))
    assert hostile.tags == plain.tags and not {"img", "script", "a"} & set(hostile.tags)
    assert {name for name, _ in hostile.attributes} == {name for name, _ in plain.attributes}
    assert not set("{}$`@") & set(build(ATTACK))
    if "x" in plain.texts:
        assert ATTACK in hostile.texts


def test_the_chunk_is_marked_between_its_neighbours():
    passage = Passage(Source("d", 1, 0.5, "Title", "two three four"), "one two", "four five", 3, 4, 8)
    shown = show.passage_html(2, passage, None)
    assert "<mark>two three four</mark>" in shown
    assert "one " in shown and "one two" not in shown and " five" in shown and "four five" not in shown
    assert "chunk 2 of 3" in shown and "read from 8 vectors" in shown and "aria-label='similarity 0.500" in shown


@pytest.mark.parametrize(
    ("before", "text", "left"),
    [("a b", "b c", "a "), ("a", "b", "a"), ("", "b", ""), ("ab", "ab", ""), ("ba", "", "ba")],
)
def test_words_that_chunks_share_stand_once(before, text, left):
    assert show.without_overlap(before, text) == left


@pytest.mark.parametrize(("score", "width"), [(0.5, "50.0%"), (-0.1, "0.0%"), (1.2, "100.0%")])
def test_bars_stay_inside(score, width):
    shown = show.bar_html(Source("d", 0, score, "", ""), 0.25)
    assert f"width: {width}" in shown and "left: 25.0%" in shown
    assert "<i" not in show.bar_html(Source("d", 0, score, "", ""), None)


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (999, "B", "999 B"),
        (1500, "B", "1.5 kB"),
        (2.5e6, "B", "2.5 MB"),
        (None, "ms", "&ndash;"),
        (12.4, "ms", "12 ms"),
    ],
)
def test_numbers_with_units(number, unit, text):
    assert show.readable(number, unit) == text


def test_an_abstained_answer_says_why():
    passage = Passage(Source("d", 0, 0.125, "", "x"))
    asked = Asked(None, "q", 1, Answer("", [], abstained=True), [passage], COST)
    assert "0.125" in show.abstained_lines(asked, 0.25)[0] and "below 0.250" in show.abstained_lines(asked, 0.25)[0]
    assert "no passage" in show.abstained_lines(Asked(None, "q", 1, Answer("", []), [], COST), 0.25)[0]


# --- asking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "expand"), [(2, 0), (4, 0), (4, 1), (4, 2)])
def test_what_is_asked_and_counted(shared_model, corpus, size, expand):
    question, options = "What is the capital?", {"top_k": 2, "expand": expand}
    *pieces, asked = ask(shared_model, corpus, question, memory_size=size, **options)
    (answer,) = shared_model.answer([question], corpus=corpus, memory_size=size, max_new_tokens=6, **options)
    assert asked.answer == answer and (not pieces or pieces[-1] == answer.text)
    n_memory, encode = size * (2 - expand), shared_model.processor.encode_text
    read = [source for source in answer.sources if source.read_as == "text"]
    texts = [f"{source.title}\n{source.text}".strip() for source in read]
    text_bytes = sum(len(source.title.encode()) + len(source.text.encode()) for source in read)
    assert asked.cost.passage_tokens == n_memory + sum(len(encode(text)) for text in texts)
    assert asked.cost.stored_bytes == n_memory * corpus.vector_bytes + text_bytes
    assert asked.cost.cache_bytes == answer.prompt_tokens * cache_bytes(shared_model)
    assert 0 < asked.cost.first_ms <= asked.cost.total_ms
    assert [passage.source for passage in asked.passages] == answer.sources


def test_the_cache_is_what_the_backbone_keeps(shared_model):
    import torch

    with torch.no_grad():
        kept = shared_model.backbone(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=True).past_key_values
    n_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
    assert n_bytes == 3 * cache_bytes(shared_model)
    rounded = quantize_model(deepcopy(shared_model))  # weights are bytes then, states are not
    assert cache_bytes(rounded) == cache_bytes(shared_model)


def test_neighbours_and_the_memory_of_a_passage(shared_model, corpus):
    asked = last(ask(shared_model, corpus, "What is the capital of France?", memory_size=4, top_k=2, expand=0))
    (passage,) = [passage for passage in asked.passages if passage.source.document_id == "paris"]
    (document,) = corpus.get(["paris"])
    spans, at = document["spans"], passage.source.span
    assert passage.n_chunks == len(spans) > 2 and passage.source.text == spans[at]["text"]
    assert passage.before == (spans[at - 1]["text"] if at else "")
    assert passage.after == (spans[at + 1]["text"] if at + 1 < len(spans) else "")
    texts = list(paraphrase(shared_model, corpus, passage.source, 4))
    assert texts == sorted(texts, key=len)
    with pytest.raises(ValueError, match="no longer in the corpus"):
        list(paraphrase(shared_model, corpus, Source("gone", 0, 1.0, "", "x"), 4))


def test_an_abstained_question_has_its_nearest_passages(model, corpus):
    model.config.min_score = 0.9999
    asked = last(ask(model, corpus, "Who?", memory_size=4, top_k=2, expand=0))
    assert asked.answer.abstained and len(asked.passages) == 2 and not any(p.is_read for p in asked.passages)
    assert (asked.cost.prompt_tokens, asked.cost.stored_bytes, asked.cost.first_ms) == (0, 0, None)


# --- own files -------------------------------------------------------------------------------------------------------


def test_own_files_become_a_corpus_of_one_session(visitors, tmp_path):
    paths = write(
        tmp_path, a__md="Lyon lies on the Rhone. " * 40, rows__csv="id,text\n1,Nice is nice.\n", b__pdf=b"%PDF"
    )
    one, other, reports = visitors.get("one"), visitors.get("other"), []
    problems = visitors.compress(one, paths, lambda *counts: reports.append(counts))
    assert (
        len(problems) == 1
        and problems[0].startswith("b.pdf cannot be read")
        and str(visitors.root.name) not in problems[0]
    )
    n_chunks = one.corpus.manifest.n_spans
    assert sorted(one.corpus.document_ids()) == ["1", "a.md"] and n_chunks > 2
    assert reports[0] == (0, n_chunks) and reports[-1] == (n_chunks, n_chunks) and reports == sorted(reports)
    assert other.corpus is None and visitors.get("one") is one
    folder = one.folder
    visitors.compress(one, paths[:1], lambda *counts: None)  # takes the place of the one before
    assert list(one.corpus.document_ids()) == ["a.md"] and not folder.exists()
    folder = one.folder
    visitors.remove_files(one)
    assert not folder.exists() and one.corpus is None


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "Choose at least one file"),
        ({f"{n}__txt": "x" for n in "abcd"}, "At most 3 files"),
        ({"a__png": "x"}, "a.png has the ending"),
        ({"a__txt": " "}, "a.txt is empty"),
        ({"a__txt": "x " * 15_000}, "a.txt has more than 0 MB"),
        ({"a__txt__gz": gzip.compress(b"x " * 50_000)}, "all files may have 0 MB when unpacked"),
        ({"a__txt": "word " * 3000}, "more than 30 pieces"),
    ],
    ids=["none", "many", "unknown", "empty", "large", "bomb", "long"],
)
def test_what_is_refused_leaves_the_corpus_before(visitors, tmp_path, files, told):
    visitor = visitors.get("one")
    visitors.compress(visitor, write(tmp_path, good__txt="Lyon is a city."), lambda *counts: None)
    before, left = visitor.corpus, sorted(Path(visitors.root.name).iterdir())
    with pytest.raises(ValueError, match=told):
        visitors.compress(visitor, write(tmp_path, **files), lambda *counts: None)
    assert visitor.corpus is before and sorted(Path(visitors.root.name).iterdir()) == left


def test_a_thousand_bad_rows_are_counted(visitors, tmp_path):
    paths = write(tmp_path, rows__jsonl='{"text": ""}\n' * 1000 + '{"text": "Lyon is a city."}\n')
    problems = visitors.compress(visitors.get("one"), paths, lambda *counts: None)
    assert len(problems) == 11 and problems[-1] == "... and 990 more." and len(visitors.get("one").corpus) == 1


def test_stopping_and_leaving(visitors, tmp_path):
    visitor, paths = visitors.get("one"), write(tmp_path, a__txt="Lyon lies on the Rhone. " * 60)
    with pytest.raises(Stopped):
        visitors.compress(visitor, paths, lambda done, total: visitor.stop.set() if done else None)
    assert visitor.corpus is None and not list(Path(visitors.root.name).iterdir())
    visitor.stop.clear()
    visitors.compress(visitor, paths, lambda *counts: None)
    visitors.leave("one")
    assert visitors.get("one").corpus is not None  # came back in time
    object.__setattr__(visitors.limits, "keep_seconds", 0.0)
    visitors.leave("one")
    visitor.leaving.join(10)
    assert visitor.corpus is None and not list(Path(visitors.root.name).iterdir())
    assert visitors.get("one") is not visitor


def test_two_sessions_compress_at_once(visitors, tmp_path):
    paths = [write(tmp_path, **{f"{name}__txt": f"{name} lies on the Rhone. " * 20}) for name in "ab"]
    found = [visitors.get(name) for name in "ab"]
    threads = [
        threading.Thread(target=visitors.compress, args=(visitor, path, lambda *counts: None))
        for visitor, path in zip(found, paths, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [list(visitor.corpus.document_ids()) for visitor in found] == [["a.txt"], ["b.txt"]]


def test_files_of_one_name_are_both_read(visitors, tmp_path):
    (tmp_path / "x").mkdir()
    paths = write(tmp_path, a__txt="Lyon is a city.") + write(tmp_path / "x", a__txt="Nice is a city.")
    visitors.compress(visitors.get("one"), paths, lambda *counts: None)
    assert sorted(visitors.get("one").corpus.document_ids()) == ["2 a.txt", "a.txt"]


# --- rates and the command -------------------------------------------------------------------------------------------


def result(config: str, value: float, name: str = "f1 (0.1 to 0.5)", **changes) -> EvalResult:
    fields = {"task_type": "question-answering", "dataset_type": "d", "dataset_name": "d.jsonl", "metric_type": "f1"}
    return EvalResult(**fields | changes, dataset_config=config, metric_value=value, metric_name=name)


def test_rates_of_a_card(shared_model):
    card = [
        result("gold_only, clara k=16 float16", 0.3),
        result("gold_only, clara k=4 float16", 0.2, "f1"),
        result("gold_only, clara k=16 int8", 0.9),
        result("gold_only, clara k=16 float16", 0.9, metric_type="em"),
        result("gold_only, clara-expand k=16 float16", 0.6),
        result("normal, clara k=16 float16", 0.9),  # of one size
        result("<script>", 0.9),
    ]
    rates = select_rates(card)
    assert [(rate.memory_size, rate.value, rate.is_text) for rate in rates] == [
        (4, 0.2, False), (16, 0.3, False), (16, 0.6, True)
    ]  # fmt: skip
    assert {rate.data for rate in rates} == {"d"} and (rates[0].low, rates[1].low) == (None, 0.1)
    assert "0.100 to 0.500" in show.rates_html(rates) and "no measurements" in show.rates_html([])
    assert read_rates(shared_model) == []


def test_examples_are_questions_of_the_documents(corpus):
    assert example_questions(corpus) == ["What is said about Rome?"]


def test_the_command_needs_a_corpus(tmp_path, capsys):
    assert cli.main(["ui", str(tmp_path), "--json"]) == 1
    assert "corpus.json" in json.loads(capsys.readouterr().out)["problem"]


def test_the_space_needs_what_the_package_needs():
    """Its requirements are those of the package and of the extras that the page uses."""
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][name] for name in ("corpus", "documents", "demo", "ui")]
    needed = {
        line for lines in (project["dependencies"], *extras) for line in lines if not line.startswith("clara-rag")
    }
    lines = (root / "recipes" / "spaces" / "ask" / "requirements.txt").read_text().splitlines()
    pinned = {line for line in lines if line.startswith("gradio==")}
    assert len(pinned) == 1 and set(lines) - pinned == needed - {"gradio>=6,<7"}
    assert pinned <= set((root / "constraints.txt").read_text().splitlines())
