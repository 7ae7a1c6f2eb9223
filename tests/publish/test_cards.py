"""Cards: rendered from templates and what a folder tells, published with real ids, commits and checksums.

The snippets of the published cards run against the loopback Hub, one of them in a process without this package.
"""

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import DatasetCard, HfApi, ModelCard
from results_factory import valid_results
from test_hub_loading import upload

from modeling_clara import CLaRaForRAG, CompressedCorpus
from modeling_clara.checksums import compare_checksums, read_checksums
from modeling_clara.corpus.card import render as render_corpus
from modeling_clara.files_clara import model_card as first_card
from modeling_clara.manifest_clara import Manifest
from recipes.evaluation.report import update_card
from recipes.models import pico, smollm2_135m
from recipes.publishing.cards import data_card, main, model_card, published_card, write_card
from recipes.spaces.publish import LEADERBOARD, METRICS, build_space

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"
SOURCES = {name: Path(package.__file__).with_name("card.yaml") for name, package in
           (("clara-pico", pico), ("clara-smollm2-135m", smollm2_135m))}  # fmt: skip
CARD = '---\nlicense: mit\n---\n\nload("ORG/NAME", revision="COMMIT") of https://huggingface.co/ORG/NAME, COMMITTED\n'
HIDDEN = 'import sys\nsys.modules["modeling_clara"] = None  # an import of the package fails\n'
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")


def snippets(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)


def execute(code: str) -> str:
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


# --- as it is published ----------------------------------------------------------------------------------------------


def test_a_published_card_has_ids_commit_and_checksums(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "code.py").write_text("x = 1\n")
    card = published_card(tmp_path, "me/model", "0" * 40)
    filled = CARD.replace("ORG/NAME", "me/model").replace('"COMMIT"', f'"{"0" * 40}"')
    assert card.startswith(filled) and read_checksums(card) and not compare_checksums(card, tmp_path)
    assert published_card(tmp_path, None, None).startswith(CARD)
    (tmp_path / "README.md").write_text(card)
    assert published_card(tmp_path, "other/model", None) == card  # no placeholder is left


def test_a_folder_without_a_card_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"README.md must be the card"):
        published_card(tmp_path, "me/model", None)


@pytest.mark.parametrize(
    "space", [*METRICS.glob("*/README.md"), LEADERBOARD / "README.md"], ids=lambda p: p.parent.name
)
def test_a_published_space_has_its_id_and_needs_no_clone(tmp_path, space):
    build_space(space.parent, tmp_path / "space")
    card = published_card(tmp_path / "space", "me/space", None)
    form = "ORG/NAME|OWNER|COMMIT|FOLDER_OR|<namespace>|<commit>|recipes/spaces"
    assert "me/space" in card and not re.search(form, card)
    blocks = "".join(re.findall(r"^```(?:bash|pycon)\n(.*?)^```$", card, re.M | re.S))
    assert "me/space" in blocks and "recipes" not in blocks


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[str, str, str]:
    """clara-pico on the Hub: repo, commit of its files, and its card."""
    folder = shutil.copytree(CARDS / "clara-pico", tmp_path_factory.mktemp("built") / "clara-pico")
    CLaRaForRAG.from_pretrained(folder).save_pretrained(folder)  # adds the code
    commit = upload(folder, "cards/clara-pico")
    return "cards/clara-pico", commit, published_card(folder, "cards/clara-pico", commit)


def test_the_snippets_of_a_published_model_run(published):
    repo, commit, card = published
    first, second = snippets(card)
    assert f'"{repo}", revision="{commit}"' in first and f'"{repo}", revision="{commit}"' in second
    assert execute(first) == "Lima | Otto Garner"
    _, _, rest = first.partition("\nmodel = ")  # the same questions to the model of the second
    again = HIDDEN + second + rest[rest.index("\n") :]
    assert execute(again) == "Lima | Otto Garner"


def test_the_snippet_of_a_published_corpus_runs(published, tmp_path):
    repo, commit, _ = published
    corpus = CompressedCorpus.open(shutil.copytree(CARDS / "clara-pico-corpus", tmp_path / "corpus"))
    corpus.push_to_hub("cards/pico-corpus", compressor=repo, compressor_revision=commit)
    folder = Path(HfApi().snapshot_download("cards/pico-corpus", repo_type="dataset"))
    card = (folder / "README.md").read_text()
    assert "ORG/NAME" not in card and "COMMIT" not in card and not compare_checksums(card, folder)
    assert set(read_checksums(card)) == {"corpus.json"}
    (code,) = snippets(card)
    assert f'from_pretrained("{repo}", revision="{commit}", trust' in code
    assert execute(HIDDEN + code + "print(len(corpus), len(model.answer(['Where?'], corpus=corpus)))") == "200 1"


def test_a_corpus_that_changes_loses_its_checksums(tmp_path):
    model = CLaRaForRAG.from_pretrained(CARDS / "clara-pico")
    folder = shutil.copytree(CARDS / "clara-pico-corpus", tmp_path / "corpus")
    (folder / "README.md").write_text(published_card(folder, "me/corpus", "0" * 40))
    corpus = CompressedCorpus.open(folder, model=model)
    assert read_checksums((folder / "README.md").read_text())
    corpus.delete([next(iter(corpus.document_ids()))])
    assert not read_checksums((folder / "README.md").read_text())


def test_a_corpus_that_changes_loses_what_was_measured(shared_model, tmp_path):
    folder = tmp_path / "corpus"
    corpus = CompressedCorpus.build(shared_model, ["one"], folder)
    text = (folder / "README.md").read_text()
    assert "\n1 document in 1 span, each" in text and "| 1 Parquet shard," in text
    corpus = CompressedCorpus.open(folder, model=shared_model)
    changes = [lambda: corpus.add([{"id": "x", "text": "two"}]), lambda: corpus.delete(["x"])]
    for change in changes:
        corpus.record_measurement({"data": "d", "questions": 1, "codecs": {"int8": {"bytes": 8, "f1": 1.0}}})
        assert "Measured with 1 question of d" in (folder / "README.md").read_text()
        corpus.compact()
        assert "Measured with 1 question of d" in (folder / "README.md").read_text()
        change()
        assert "was not measured" in (folder / "README.md").read_text() and not Manifest.read(folder).measured


# --- as it is rendered -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_shipped_cards_are_what_their_templates_give(name):
    assert model_card(CARDS / name, SOURCES[name]) == (CARDS / name / "README.md").read_text()


def test_the_shipped_corpus_card_is_what_its_template_gives():
    folder = CARDS / "clara-pico-corpus"
    card = DatasetCard.load(folder / "README.md")
    assert render_corpus(Manifest.read(folder)) in card.text
    assert card.data.task_categories == ["question-answering", "text-retrieval"] and card.data.license == "apache-2.0"


@pytest.mark.parametrize("name", SOURCES)
def test_metadata_and_files_of_shipped_cards_are_true(name):
    card, config = ModelCard.load(CARDS / name / "README.md"), json.loads((CARDS / name / "config.json").read_text())
    data = card.data.to_dict()
    assert (data["library_name"], data["license"]) == ("transformers", "apache-2.0") and data["model-index"]
    assert {"clara", "soft-compression"} <= set(data["tags"])
    assert data.get("base_model") == (None if config["backbone_included"] else config["backbone_name_or_path"])
    assert all((CARDS / name / image).is_file() for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", card.text))
    paths = re.findall(r"`(recipes/[\w./]+)`", card.text)
    assert paths and all((ROOT / path).exists() for path in paths)


def test_the_card_of_a_new_checkpoint_reads_like_no_form(shared_model):
    config = shared_model.config
    card = first_card(config, include_backbone=True)
    assert f"into {' or '.join(map(str, config.memory_sizes))} memory tokens" in card
    assert "are plain PEFT adapters of its backbone." in card


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of clara-pico to change."""
    return shutil.copytree(CARDS / "clara-pico", tmp_path / "clara-pico")


def fields(tmp_path: Path, **changes) -> Path:
    content = yaml.safe_load(SOURCES["clara-pico"].read_text()) | changes
    content = {name: value for name, value in content.items() if value != "left out"}
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"limits": "left out"}, "`limits` must be in"),
        ({"limits": None}, "`limits` must be in"),
        ({"limits": " "}, "`limits` of"),
        ({"limits": {"a": 1}}, "`limits` of"),
        ({"name": ["a"]}, "`name` of"),
        ({"example": {"documents": ["a"]}}, "`example.question` must be in"),
        ({"example": {"documents": ["a"], "question": 7}}, "`example.question` of"),
        ({"example": {"documents": "a", "question": "b"}}, "`example.documents` of"),
        ({"example": {"documents": [{"title": "a"}], "question": "b"}}, "`example.documents` of"),
        ({"data": ["joint"]}, "`data` of"),
        ({"limit": "Many."}, "`limit` of"),
        ({"metadata": {"language": "en"}}, "`metadata.license` must be in"),
        ({"metadata": {"license": "mit", "tags": "clara"}}, "`metadata.tags` of"),
        ({"metadata": {"license": "mit", "language": False}}, "`metadata.language` of"),
        ({"metadata": {"license": "mit", "model_name": "a"}}, "`metadata.model_name` of"),
        ({"metadata": "left out"}, "`metadata` must be in"),
        ({"metadata": "mit"}, "`metadata` of"),
        ({"licences": "{{ config.nothing }}"}, "has no attribute 'nothing'"),
        ({"licences": "{{ nothing }}"}, "'nothing' is undefined"),
        ({"licences": "{{ 1/0 }}"}, "`licences` of"),
        ({"example": {"documents": ["{{ [].pop() }}"], "question": "b"}}, "`example.documents` of"),
        ({"use": "{% if %}"}, "`use` of"),
    ],
)
def test_a_missing_or_wrong_field_is_named_and_nothing_is_written(folder, tmp_path, capsys, changes, name):
    before = (folder / "README.md").read_bytes()
    assert main([str(folder), str(fields(tmp_path, **changes))]) == 1
    error = capsys.readouterr().err
    assert name in error and str(tmp_path / "card.yaml") in error and error.startswith("error: ")
    assert error.count("\n") == 1 and ("Add the field." in error) == ("must be in" in error)
    assert (folder / "README.md").read_bytes() == before and not list(folder.glob(".README*"))


def test_a_new_evaluation_moves_the_compression_table_and_stays_when_rendered_again(folder, tmp_path):
    content = valid_results(system__memory_size=4, system__codec="float16", metrics={"f1": 0.125})
    update_card(folder, [content])
    card = (folder / "README.md").read_text()
    assert re.search(r"^\| 4 \| 24.0 \| 1,024 \| 520 \| 288 \| 0.918 \| 0.125 \|$", card, re.M)
    (folder / "README.md").write_text(card + "\n## Mine\n\nWords.\n")
    assert write_card(folder, fields(tmp_path)) == folder / "README.md"
    assert (folder / "README.md").read_text() == card + "\n## Mine\n\nWords.\n"


def test_a_checkpoint_without_log_and_card_can_have_one(folder, tmp_path):
    for name in ("training_log.json", "results.json", "README.md"):
        (folder / name).unlink()
    card = ModelCard(model_card(folder, fields(tmp_path, results="left out", limits="Many: {{ parameters }}.")))
    assert "The runs were not recorded." in card.text and "Many: 1476096." in card.text and "F1" not in card.text
    assert card.data.eval_results is None and card.data.model_name is None


# --- data ------------------------------------------------------------------------------------------------------------


DATA = {"name": "Rows", "metadata": {"license": "cc0-1.0", "tags": ["clara"]}, "description": "Questions.",
        "source": "Made up.", "licences": "CC0.", "columns": {"question": "what is asked"}}  # fmt: skip


@pytest.fixture
def rows(tmp_path) -> Path:
    folder = tmp_path / "rows"
    (folder / "data").mkdir(parents=True)
    table = pa.table({"question": ["a", "b"], "pos_index": [[0], [1]]})
    for number in range(2):
        pq.write_table(table, folder / "data" / f"train-0000{number}-of-00002.parquet")
    pq.write_table(pa.table({"question": ["c", "d"], "pos_index": pa.nulls(2)}), folder / "dev.set.parquet")
    return folder


def test_a_data_card_has_rows_columns_and_splits(rows, tmp_path):
    source = tmp_path / "card.yaml"
    source.write_text(yaml.safe_dump(DATA))
    card = DatasetCard(data_card(rows, source))
    assert "| train | 4 | 0.0 | 2 |" in card.text and "| dev_set | 2 | 0.0 | 1 |" in card.text
    assert re.search(r"^\| `question` \| string \| what is asked \|$", card.text, re.M)
    assert re.search(r"^\| `pos_index` \| list<element: int64> or null \|  \|$", card.text, re.M)
    assert card.data.license == "cc0-1.0" and card.data.size_categories == ["n<1K"]
    (config,) = card.data.to_dict()["configs"]
    paths = [f"data/train-0000{number}-of-00002.parquet" for number in range(2)]
    splits = [{"split": "train", "path": paths}, {"split": "dev_set", "path": ["dev.set.parquet"]}]
    assert config == {"config_name": "default", "data_files": splits}
    assert main([str(rows), str(source)]) == 0 and (rows / "README.md").read_text() == data_card(rows, source)
    (code,) = snippets(card.text.replace("ORG/NAME", str(rows)))
    assert execute(code + "print(len(rows['train']))") == "4"


def test_splits_with_the_same_columns_are_one_configuration(tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    for name, column in (("train", "text"), ("test", "text"), ("questions", "question")):
        (rows / f"{name}.jsonl").write_text(json.dumps({column: "a"}) + "\n")
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(DATA))
    for configs in (["test", "questions"], ["default"]):  # the second time without the questions
        write_card(rows, tmp_path / "card.yaml")
        card = DatasetCard.load(rows / "README.md")
        assert {config["config_name"] for config in card.data.configs} == set(configs)
        (code,) = snippets(card.text.replace("ORG/NAME", str(rows)).replace('"questions"', '"test"'))
        assert execute(code + "print({name: len(split) for name, split in rows.items()})") == "{'test': 1, 'train': 1}"
        (rows / "questions.jsonl").unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["description", "source", "licences", "metadata", "name"])
def test_a_data_card_needs_its_fields(rows, tmp_path, capsys, name):
    (tmp_path / "card.yaml").write_text(yaml.safe_dump({key: value for key, value in DATA.items() if key != name}))
    assert main([str(rows), str(tmp_path / "card.yaml")]) == 1
    assert name in (error := capsys.readouterr().err) and "data.md" in error
    assert not (rows / "README.md").exists()


def test_cells_of_a_data_card_stay_cells(tmp_path):
    rows, source = tmp_path / "rows", tmp_path / "card.yaml"
    rows.mkdir()
    (rows / "train.jsonl").write_text('{"a|b\\nc": 1}\n')
    source.write_text(yaml.safe_dump(DATA | {"columns": {"a|b\nc": "one|other\nline"}}))
    assert r"| `a\|b c` | int | one\|other line |" in data_card(rows, source)


LINE = b'{"a": 1}\n'
UNREADABLE = {  # file -> (content, what is said)
    "train.jsonl": (b"", "train.jsonl must have rows"),
    "blank.jsonl": (b" \n\n", "blank.jsonl must have rows"),
    "nan.jsonl": (LINE + b'\n{"a": NaN}\n', "line 3 of nan.jsonl must be JSON in UTF-8: NaN"),
    "huge.jsonl": (LINE + b'{"a": 1e400}\n', "line 2 of huge.jsonl must be JSON in UTF-8: 1e400"),
    "latin.jsonl": ('{"a": "caf\xe9"}\n'.encode("latin-1"), "line 1 of latin.jsonl must be JSON in UTF-8"),
    "bom.jsonl": (b"\xef\xbb\xbf" + LINE, "line 1 of bom.jsonl must be JSON in UTF-8: Unexpected UTF-8 BOM"),
    "broken.jsonl": (LINE + b"\n" + b'{"a": \n', "line 3 of broken.jsonl must be JSON in UTF-8"),
    "list.jsonl": (LINE + b"[1]\n", "line 2 of list.jsonl must be an object"),
    "deep.jsonl": (b"[" * 100_000, "line 1 of deep.jsonl must be JSON"),
    "cut.jsonl.gz": (gzip.compress(LINE * 1000)[:-20], "cut.jsonl.gz must be a whole gzip file"),
    "plain.jsonl.gz": (LINE, "plain.jsonl.gz must be a whole gzip file"),
    "footer.parquet": (b"PAR1 and no footer", "footer.parquet must be a whole Parquet file"),
    "empty.parquet": (None, "empty.parquet must have rows"),
}


def write_rows(path: Path, content: bytes | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        pq.write_table(pa.table({"a": pa.array([], pa.int64())}), path)
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path, name):
    content, words = UNREADABLE[name]
    write_rows(tmp_path / name, content)
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        data_card(tmp_path, None)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("train.parquet", "test.jsonl"), "must be of one format, got train.parquet and test.jsonl"),
        (("train.jsonl", "more.csv"), "got more.csv"),
        (("train.jsonl", "more.TSV.gz"), "got more.TSV.gz"),
        (("train.jsonl", "test.JSONL"), "got test.JSONL"),
        (("de/train.jsonl", "en/train.jsonl"), "de/train.jsonl and en/train.jsonl must be of different splits"),
        (("a/train-00000-of-00002.jsonl", "b/train-00001-of-00002.jsonl"), "must be of different splits"),
        (("train.jsonl", "train.jsonl.gz"), "must be of different splits"),
        (("a.b.jsonl", "a_b.jsonl"), "must be of different splits"),
    ],
)
def test_files_that_cannot_be_published_together_are_named(tmp_path, names, words):
    for name in names:
        is_parquet, is_packed = name.endswith(".parquet"), name.endswith(".gz")
        write_rows(tmp_path / name, None if is_parquet else gzip.compress(LINE) if is_packed else LINE)
    with pytest.raises(ValueError, match=re.escape(words)):
        data_card(tmp_path, None)


def test_a_folder_without_data_and_rows_that_are_none(rows, tmp_path, capsys):
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(DATA))
    shutil.rmtree(rows)
    write_rows(rows / "bad.jsonl", b"{}\n[1]\n")
    assert main([str(rows), str(tmp_path / "card.yaml")]) == 1
    assert "line 2 of bad.jsonl" in capsys.readouterr().err
    shutil.rmtree(rows)
    rows.mkdir()
    assert main([str(rows), str(tmp_path / "card.yaml")]) == 1
    assert "must have files of" in capsys.readouterr().err
