"""Corpora on the Hub: published in one commit without deleted text, opened by id, read by `datasets`.

It stands on the loopback Hub, where corpora are also built from a data set.
"""

import contextlib
import itertools
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pytest
from corpora import (
    CODECS,
    ERRORS,
    assert_holds,
    build,
    by_id,
    edit_json,
    make,
    make_many,
    named_files,
    read_json,
    rejected,
    texts,
    top,
)
from hub_server import Failure
from huggingface_hub import DatasetCard, HfApi, snapshot_download

from modeling_clara import CompressedCorpus
from modeling_clara.checksums import read_checksums, remove_checksums

MODEL = "hubcorpus/model"
SECRET = "zebra-quagga-secret"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content="),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:datasets", "ignore::FutureWarning:datasets"),
]


@pytest.fixture
def repo(request) -> str:
    """A repo of this test."""
    return f"hubcorpus/{re.sub(r'[^A-Za-z0-9]+', '-', request.node.name)[:80].strip('-')}"


def files(repo: str, revision: str | None = None) -> set[str]:
    return set(HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)) - {".gitattributes"}


def n_commits(repo: str) -> int:
    return len(HfApi().list_repo_commits(repo, repo_type="dataset"))


@pytest.mark.parametrize("codec", CODECS)
def test_a_pushed_corpus_is_opened_by_its_id(shared_model, tmp_path, repo, codec):
    corpus, documents = build(shared_model, tmp_path / "corpus", codec=codec), by_id(make_many(10))
    url = corpus.push_to_hub(repo, compressor=MODEL, compressor_revision="abc")
    assert repo in url and url.endswith(HfApi().dataset_info(repo).sha)
    assert n_commits(repo) == 2 and files(repo) == named_files(corpus)  # the first commit made the repo
    opened = CompressedCorpus.open(repo)
    assert_holds(opened, documents, ERRORS[codec])
    assert opened.repo_id == repo and opened.fingerprint == shared_model.fingerprint
    compressor = opened.manifest.compressor
    assert (compressor["name_or_path"], compressor["revision"]) == (MODEL, "abc")
    assert not (opened.folder / "index").exists()  # nothing is written beside the files of the Hub
    assert_holds(CompressedCorpus.open(repo, local_files_only=True), documents, ERRORS[codec])
    assert len(shared_model.load_corpus(repo)) == 10
    corpus.push_to_hub(repo, compressor=MODEL)
    assert read_json(corpus)["compressor"]["revision"] == "abc"  # kept
    corpus.push_to_hub(repo, compressor="hubcorpus/renamed")
    compressor = read_json(corpus)["compressor"]
    assert (compressor["name_or_path"], compressor["revision"]) == ("hubcorpus/renamed", None)


def test_datasets_reads_a_corpus(corpus, repo):
    corpus.add([make("umlaut", 40, title="Flüsse", text="Die Seine fließt. 🇫🇷")], shard_size=1)
    corpus.push_to_hub(repo, compressor=MODEL)
    whole = datasets.load_dataset(repo, split="train")
    assert whole["document_id"] == [*(f"d{index}" for index in range(10)), "umlaut"]
    assert whole["id"][3] == "d3#0" and whole["span"][3] == 0 and whole["year"][3] == 2003
    assert whole[10]["text"] == "Die Seine fließt. 🇫🇷" and whole[10]["title"] == "Flüsse"
    assert whole[3]["memory"] == make("d3", 3)["memory"].half().numpy().tobytes()
    streamed = datasets.load_dataset(repo, split="train", streaming=True)
    assert [row["text"] for row in streamed] == list(whole["text"])


@pytest.mark.parametrize("tags, expected", [("[medical]", ["medical"]), ("medical", ["medical"]), ("", [])])
def test_the_card_of_a_user_goes_along(corpus, repo, tags, expected):
    readme = corpus.folder / "README.md"
    readme.write_text(f"---\npretty_name: Mine\ntags: {tags}\n---\n\nMy own words.\n")
    corpus.add([make("new", 20)])
    corpus.push_to_hub(repo, compressor=MODEL)
    card = DatasetCard.load(repo)
    mine = readme.read_text().replace('"ORG/NAME", revision="COMMIT"', f'"{repo}"')
    assert (
        remove_checksums(str(card)) == mine
        and set(read_checksums(str(card))) == {"corpus.json"}
        and card.data.pretty_name == "Mine"
        and "My own words." in card.text
    )
    assert card.data.tags[: len(expected)] == expected and len(card.data.tags) == len(expected) + 4
    assert "11 documents in 11 spans" in card.text and f'from_pretrained("{MODEL}"' in card.text


def test_a_revision_is_opened_and_a_private_corpus_needs_the_token(corpus, repo):
    corpus.push_to_hub(repo, compressor=MODEL, private=True)
    first = HfApi().dataset_info(repo)
    HfApi().create_tag(repo, tag="v1", repo_type="dataset")
    HfApi().create_branch(repo, branch="next", repo_type="dataset")
    corpus.delete(["d0"])
    corpus.push_to_hub(repo, revision="next")
    assert first.private and HfApi().dataset_info(repo).sha == first.sha
    for revision, count in ((None, 10), ("v1", 10), (first.sha, 10), ("next", 9), ("main", 10)):
        opened = CompressedCorpus.open(repo, revision=revision)
        assert len(opened) == count and ("d0" in opened) == (count == 10)
    with pytest.raises(FileNotFoundError, match=f"(?s)`{repo}` must be .*the revision"):
        CompressedCorpus.open(repo, revision="nowhere")
    with pytest.raises(FileNotFoundError, match="hubcorpus/nobody"):
        CompressedCorpus.open("hubcorpus/nobody")
    with pytest.raises(FileNotFoundError, match="token"):
        CompressedCorpus.open(repo, token=False, cache_dir=corpus.folder.parent / "cache")


def test_deleted_text_is_nowhere_in_the_uploaded_files(corpus, repo, hub):
    corpus.add([make("gone", 30, text=f"{SECRET} deleted"), make("old", 31, text=f"{SECRET} replaced")])
    corpus.delete(["gone", "d5"])
    corpus.update([make("old", 32)])
    corpus.push_to_hub(repo, compressor=MODEL)
    assert not read_json(corpus)["shards"][0]["tombstones"]
    published = Path(snapshot_download(repo, repo_type="dataset"))
    for path in published.rglob("*.parquet"):
        rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(corpus.folder.parent / "cache"))
        assert not {"gone", "d5"} & set(rows["document_id"])
    assert len(list(published.rglob("*.parquet"))) == 1
    for commit in hub.repos["dataset", repo].commits.values():
        for file in commit.values():
            content = hub.blobs[file.get("lfs", file)["oid"]]
            assert SECRET.encode() not in content and b"gone#0" not in content
            assert make("gone", 30)["memory"].half().numpy().tobytes() not in content
    opened = CompressedCorpus.open(repo)
    assert_holds(opened, by_id([d for d in make_many(10) if d["id"] != "d5"] + [make("old", 32)]))


def test_a_second_push_removes_stale_files_and_keeps_those_of_others_or_changes_nothing(corpus, repo, hub):
    corpus.add([make("d0", 1)])  # is rejected
    corpus.push_to_hub(repo, compressor=MODEL)
    assert files(repo) == named_files(corpus) | {"rejected.jsonl"}
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=repo, repo_type="dataset")
    first = files(repo)
    corpus.convert("int8", shard_size=3)
    hub.failures.append(Failure(f"/api/datasets/{repo}/commit", status=500, times=20))
    with pytest.raises(OSError):  # it breaks off
        corpus.push_to_hub(repo)
    hub.failures.clear()
    assert files(repo) == first
    assert_holds(CompressedCorpus.open(repo), by_id(make_many(10)))
    corpus.push_to_hub(repo)
    assert files(repo) == named_files(corpus) | {"rejected.jsonl", "notes.txt"}
    assert n_commits(repo) == 4 and not {name for name in first if name.startswith("data/")} & files(repo)
    assert_holds(CompressedCorpus.open(repo), by_id(make_many(10)), ERRORS["int8"])
    assert datasets.load_dataset(repo, split="train").num_rows == 10
    corpus.push_to_hub(repo)  # nothing has changed
    assert_holds(CompressedCorpus.open(repo), by_id(make_many(10)), ERRORS["int8"])


def test_a_push_publishes_one_state_while_another_object_writes(corpus, repo):
    other, pushed = CompressedCorpus.open(corpus.folder), []

    def push():
        while len(pushed) < 4:
            with contextlib.suppress(RuntimeError):  # the lock is taken
                pushed.append(corpus.push_to_hub(repo, compressor=MODEL))
                assert_holds(CompressedCorpus.open(repo), by_id(make_many(10)))

    with ThreadPoolExecutor(1) as pool:
        pushing, sizes = pool.submit(push), itertools.cycle(range(1, 6))
        while not pushing.done():
            time.sleep(0.01)
            with contextlib.suppress(RuntimeError):
                other.compact(shard_size=next(sizes))
        pushing.result()


def test_a_compressor_that_others_cannot_load_and_wrong_counts_are_refused(corpus, repo, checkpoint):
    before = (corpus.folder / "corpus.json").read_bytes(), (corpus.folder / "README.md").read_bytes()
    for wrong in (None, str(checkpoint), "./model", "/models/clara", "~/model", "../clara", ""):
        with pytest.raises(ValueError, match="`compressor` must name the model on the Hub.*[Pp]ublish"):
            corpus.push_to_hub(repo, compressor=wrong)
    after = (corpus.folder / "corpus.json").read_bytes(), (corpus.folder / "README.md").read_bytes()
    assert after == before  # a path was not written down on the way
    edit_json(corpus, n_documents=9, compressor=read_json(corpus)["compressor"] | {"name_or_path": MODEL})
    with pytest.raises(ValueError, match="corpus.json"):
        CompressedCorpus.open(corpus.folder).push_to_hub(repo, compressor=MODEL)
    assert not HfApi().repo_exists(repo, repo_type="dataset")


def test_changing_a_corpus_of_the_hub_names_the_remedy_and_the_remedy_works(corpus, repo, tmp_path, shared_model):
    corpus.push_to_hub(repo, compressor=MODEL)
    opened = CompressedCorpus.open(repo, model=shared_model)
    changes = [(opened.add, ["A text."]), (opened.update, [make("d1", 1)]), (opened.delete, ["d1"])]
    for change, *arguments in [*changes, (opened.compact,), (opened.convert, "int8"), (opened.push_to_hub, repo)]:
        with pytest.raises(ValueError, match=f"copied to a folder.*{repo}.*--repo-type dataset --local-dir"):
            change(*arguments)
    copied = tmp_path / "copied"
    snapshot_download(repo, repo_type="dataset", local_dir=copied)
    mine = CompressedCorpus.open(copied, model=shared_model)
    mine.add([make("new", 20)])
    mine.delete(["d0"])
    mine.push_to_hub(repo)
    assert_holds(CompressedCorpus.open(repo), by_id([*make_many(10)[1:], make("new", 20)]))
    assert len(opened) == 10 and top(opened, make("d0", 0))["document_id"] == "d0"
    assert not [name for name in files(repo) if name.startswith((".cache", "index", ".lock"))]


def test_a_damaged_file_of_the_cache_is_named(corpus, repo, tmp_path):
    corpus.push_to_hub(repo, compressor=MODEL)
    opened = CompressedCorpus.open(repo, cache_dir=tmp_path / "cache")
    path = next((opened.folder / "data").iterdir())
    path.resolve().chmod(0o644)
    path.resolve().write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path}.*download it again"):
        CompressedCorpus.open(repo, cache_dir=tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert CompressedCorpus.open(repo, cache_dir=tmp_path / "cache").verify() == []


def test_a_corpus_is_built_from_a_data_set_of_the_hub(shared_model, tmp_path):
    rows = {"key": ["a", "b", "c", "d", "e"], "body": ["Rome.", "Paris.", "", "Die Seine fließt.", "Berlin. " * 40]}
    plain, columns = "hubcorpus/plain", {"text_column": "body", "id_column": "key", "split": "train"}
    datasets.Dataset.from_dict(rows | {"year": [1, 2, 3, None, 5]}).push_to_hub(plain, num_shards=2)
    for _ in range(2):
        corpus = CompressedCorpus.build(shared_model, plain, tmp_path / "corpus", codec="float16", **columns)
    assert [*texts(corpus)] == ["a", "b", "d", "e"] and corpus.metadata_columns == ["year"]
    assert texts(corpus)["d"] == "Die Seine fließt." and len(corpus.get(["e"])[0]["spans"]) > 1
    assert [found["metadata"]["year"] for found in corpus.get(["a", "d", "e"])] == [1, None, 5]
    (row,) = rejected(tmp_path / "corpus")
    assert row["row"] == 2 and corpus.manifest.n_rejected == 1
    changes = corpus.add(plain, **columns)
    assert changes.n_documents == 0 and len(changes.rejected) == 5
    for name, split, match in ((plain, "test", "'test'"), ("hubcorpus/nobody", "train", "hubcorpus/nobody")):
        with pytest.raises(FileNotFoundError, match=match):
            CompressedCorpus.build(shared_model, name, tmp_path / "other", **columns | {"split": split})
    assert not (tmp_path / "other").exists()
