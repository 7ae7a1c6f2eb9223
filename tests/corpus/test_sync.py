"""`sync` and `upsert`: a corpus follows a folder that changes, whatever happens meanwhile."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from corpora import read_all, receive, rejected, stamps, start, texts

from modeling_clara import CLaRaForRAG, CompressedCorpus
from modeling_clara.corpus import files, pipeline
from modeling_clara.corpus.filelog import FILES_FILE, read_log
from modeling_clara.corpus.files import InputFile
from modeling_clara.corpus.sync import plan_sync

SMALL = {"shard_size": 4, "batch_size": 2}


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def jsonl(path: Path, rows: dict[str, str]) -> None:
    write(path, "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in rows.items()))


def expected(folder: Path) -> dict[str, str]:
    """Every document that the folder holds, by id."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".txt" and path.read_text(encoding="utf-8").strip():
            found[name] = path.read_text(encoding="utf-8").strip()
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found |= {row["id"]: row["text"] for row in rows if row["id"] not in found}
    return found


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "in"
    for number in range(9):
        write(root / f"sub{number % 3}" / f"{number}.txt", f"Text of file {number}.")
    jsonl(root / "rows.jsonl", {f"r{number}": f"Row {number}." for number in range(5)})
    write(root / "empty.txt", "")
    write(root / "tool.exe", "MZ")
    return root


@pytest.fixture
def corpus(shared_model, folder, tmp_path) -> CompressedCorpus:
    return CompressedCorpus.build(shared_model, folder, tmp_path / "corpus", codec="float16", shard_size=4)


def test_a_corpus_follows_its_folder(corpus, folder):
    assert texts(corpus) == expected(folder) and plan_sync(corpus.folder, folder).is_empty
    write(folder / "sub0" / "0.txt", "Another text.")
    write(folder / "new.txt", "A new file.")
    (folder / "sub1" / "1.txt").unlink()
    jsonl(folder / "rows.jsonl", {"r0": "Row 0.", "r1": "Changed.", "r3": "Row 3.", "r9": "New."})
    plan = plan_sync(corpus.folder, folder)
    assert [file.name for file in plan.new] == ["new.txt"] and plan.gone == ["sub1/1.txt"]
    assert [file.name for file in plan.changed] == ["rows.jsonl", "sub0/0.txt"] and len(plan.left_out) == 1
    changes = corpus.sync(folder, **SMALL)
    assert (changes.n_documents, changes.n_deleted, changes.n_unchanged) == (4, 3, 2)
    assert texts(corpus) == expected(folder) and corpus.verify() == []
    assert plan_sync(corpus.folder, folder).is_empty
    assert texts(CompressedCorpus.open(corpus.folder)) == expected(folder)


def test_nothing_is_written_if_nothing_has_changed(corpus, folder):
    before = stamps(corpus.folder)
    assert corpus.sync(folder).n_documents == 0
    os.utime(folder / "sub0" / "0.txt")
    corpus.sync(folder)  # its bytes are read, and with them all that was not known of the file
    assert corpus.sync(folder).n_unchanged == 0
    os.utime(folder / "sub0" / "0.txt")
    after = stamps(corpus.folder)
    assert plan_sync(corpus.folder, folder).is_empty and corpus.sync(folder).n_documents == 0
    assert stamps(corpus.folder) == after
    same = {name: stamp for name, stamp in before.items() if name.startswith("data/")}
    assert {name: after[name] for name in same} == same


def test_reasons_of_files_that_are_well_again_go(corpus, folder):
    assert {row["file"]: row["status"] for row in rejected(corpus.folder)} == {
        "empty.txt": "empty",
        "tool.exe": "unsupported",
    }
    write(folder / "empty.txt", "Not empty any more.")
    write(folder / "broken.json", "{")
    corpus.sync(folder)
    assert {row["file"] for row in rejected(corpus.folder)} == {"tool.exe", "broken.json"}
    assert corpus.manifest.n_rejected == 2 and texts(corpus) == expected(folder)


def test_an_id_has_one_file(corpus, folder):
    jsonl(folder / "other.jsonl", {"r1": "Taken.", "mine": "Mine."})
    (row,) = [row for row in corpus.sync(folder).rejected if row["status"] == "failed"]
    assert row["id"] == "r1" and "rows.jsonl has it too" in row["reason"]
    jsonl(folder / "rows.jsonl", {"r0": "Row 0."})  # gives the others up
    corpus.sync(folder)
    os.utime(folder / "other.jsonl", (1, 1))
    write(folder / "other.jsonl", (folder / "other.jsonl").read_text() + "\n")
    corpus.sync(folder)
    assert texts(corpus)["r1"] == "Taken." and "r2" not in corpus and corpus.verify() == []
    corpus.add([{"id": "h", "text": "h"}])
    corpus.sync(folder)
    assert "h" in corpus  # what was added without a file stays


def test_documents_move_between_files(corpus, folder):
    jsonl(folder / "a.jsonl", {"r0": "Row 0.", "r1": "Row 1, changed."})  # before rows.jsonl in the order
    jsonl(folder / "rows.jsonl", {"r2": "Row 2."})
    corpus.sync(folder, **SMALL)
    assert texts(corpus) == expected(folder) and corpus.verify() == []
    assert set(read_log(corpus.folder)["a.jsonl"].ids) == {"r0", "r1"}


def test_another_folder_deletes_nothing_and_a_single_file_tells_of_itself(corpus, folder, tmp_path):
    (tmp_path / "nothing").mkdir()
    for number in range(3):
        write(tmp_path / "other" / f"other{number}.txt", "Of another folder.")
    for name in ("nothing", "other"):
        with pytest.raises(ValueError, match=rf"{name} must have files that .* was made of, found none of all 11"):
            corpus.sync(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="Check the path"):
        corpus.sync(tmp_path / "unmounted")
    assert texts(corpus) == expected(folder)
    write(folder / "rows.jsonl", json.dumps({"id": "r0", "text": "Row 0."}))
    write(folder / "sub0" / "0.txt", "Changed as well.")
    assert corpus.sync(folder / "rows.jsonl").n_deleted == 4
    assert corpus.sync(folder).n_documents == 1 and texts(corpus) == expected(folder)


def test_what_cannot_be_read_for_a_moment_stays(corpus, folder):
    """A file that is half copied, and one page of a file."""
    rows = (folder / "rows.jsonl").read_bytes()
    write(folder / "rows.csv", "id,text\nc1,First.\nc2,Second.\nc3,Third.\n")
    corpus.sync(folder)
    (folder / "rows.csv").write_bytes(b"id,text\nc1,Changed.\nc2," + bytes(range(128, 256)) * 20)
    (folder / "rows.jsonl").write_bytes(rows[:30])
    corpus.sync(folder)
    assert texts(corpus)["c3"] == "Third." and texts(corpus)["r0"] == "Row 0." and corpus.verify() == []
    write(folder / "rows.csv", "id,text\nc1,First.\n")
    (folder / "rows.jsonl").write_bytes(rows)
    corpus.sync(folder)
    assert texts(corpus) == {**expected(folder), "c1": "First."} and corpus.verify() == []


def test_a_writer_that_waited_sees_what_another_did(corpus, shared_model, folder):
    other = CompressedCorpus.open(corpus.folder, model=shared_model)
    write(folder / "new.txt", "New.")
    corpus.sync(folder)
    write(folder / "new.txt", "Newer.")
    assert other.sync(folder).rejected[1:] == [] and texts(other) == expected(folder)


def test_a_corpus_without_a_log_is_taken_over(corpus, folder):
    (corpus.folder / FILES_FILE).unlink()
    changes = corpus.sync(folder)
    assert changes.n_unchanged == len(expected(folder)) and changes.n_documents == changes.n_deleted == 0
    (folder / "sub1" / "1.txt").unlink()
    assert corpus.sync(folder).n_deleted == 1 and texts(corpus) == expected(folder)


def test_a_build_of_two_ranks_knows_its_files(shared_model, folder, tmp_path):
    for rank in (1, 0):
        CompressedCorpus.build(shared_model, folder, tmp_path / "c", rank=rank, world_size=2, shard_size=4)
    corpus = CompressedCorpus.open(tmp_path / "c", model=shared_model)
    assert plan_sync(corpus.folder, folder).is_empty and texts(corpus) == expected(folder)
    (folder / "rows.jsonl").unlink()
    assert corpus.sync(folder).n_deleted == 5 and texts(corpus) == expected(folder)


def test_upsert_adds_replaces_and_leaves_equal_documents(corpus):
    rows = [{"id": "r0", "text": "Row 0."}, {"id": "r1", "text": "Other."}, {"id": "x", "text": "New."}, "no id"]
    changes = corpus.upsert(rows)
    assert (changes.n_documents, changes.n_unchanged) == (3, 1) and corpus.verify() == []
    assert texts(corpus)["r1"] == "Other." and texts(corpus)["x"] == "New."


# --- writers that are killed -----------------------------------------------------------------------------------------


def keep_syncing(connection, checkpoint, folder, path):
    torch.set_num_threads(1)
    corpus = CompressedCorpus.open(path, model=CLaRaForRAG.from_pretrained(checkpoint))
    connection.send("begun")
    while True:
        corpus.sync(folder, shard_size=2, batch_size=1)
        connection.send("done")
        if connection.recv() == "end":
            return


def change(folder: Path, seed: int) -> None:
    """Change, add and remove some files."""
    chance = random.Random(seed)
    for number in range(12):
        path = folder / f"sub{number % 3}" / f"{number}.txt"
        if chance.random() < 0.3:
            path.unlink(missing_ok=True)
        elif chance.random() < 0.5:
            write(path, f"Text {chance.random()} of file {number}. " * chance.randint(1, 40))
    names = chance.sample(range(20), 8)
    jsonl(folder / "rows.jsonl", {f"r{name}": f"Row {name} {chance.randint(0, 2)}." for name in names})


def kill_while_syncing(checkpoint, folder: Path, path: Path, seeds: range) -> int:
    """Kill a writer at a random moment for every seed; the number of those that were not done yet."""
    n_killed = 0
    for seed in seeds:
        change(folder, seed)
        process, connection = start(keep_syncing, checkpoint, folder, path)
        receive(connection)
        time.sleep(random.Random(seed).random() * 0.25)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        try:
            connection.recv()
        except EOFError:
            n_killed += 1
        reader = CompressedCorpus.open(path)
        assert reader.verify() == []
    return n_killed


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 23), marks=pytest.mark.slow)], ids=["3", "20"])
def test_kills_lose_and_double_nothing(seeds, corpus, checkpoint, shared_model, folder, tmp_path):
    assert kill_while_syncing(checkpoint, folder, corpus.folder, seeds) > len(seeds) // 3
    again = CompressedCorpus.open(corpus.folder, model=shared_model)
    again.sync(folder)
    fresh = CompressedCorpus.build(shared_model, folder, tmp_path / "fresh")
    spans, wanted = ({d["document_id"]: d["spans"] for d in read_all(made)} for made in (again, fresh))
    assert spans == wanted and set(spans) == set(expected(folder))
    assert again.verify() == [] and plan_sync(corpus.folder, folder).is_empty
    assert set(again.document_ids()) == {name for known in read_log(corpus.folder).values() for name in known.ids}


def test_an_interrupted_long_document_goes_on_inside(shared_model, tmp_path, monkeypatch):
    """Ctrl-C while one document of many chunks is compressed: what was compressed is not compressed again."""
    write(tmp_path / "in" / "long.txt", " ".join(f"Sentence {number} of a long document." for number in range(1500)))
    done, compress = [], type(shared_model).compress

    def interrupted(model, documents, **options):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(len(documents))
        return compress(model, documents, **options)

    monkeypatch.setattr(type(shared_model), "compress", interrupted)
    monkeypatch.setattr(pipeline, "PASS_SPANS", 64)
    with pytest.raises(KeyboardInterrupt):
        CompressedCorpus.build(shared_model, tmp_path / "in", tmp_path / "c")
    done.clear()

    def counting(model, documents, **options):
        done.append(len(documents))
        return compress(model, documents, **options)

    monkeypatch.setattr(type(shared_model), "compress", counting)
    corpus = CompressedCorpus.build(shared_model, tmp_path / "in", tmp_path / "c")
    monkeypatch.undo()
    n_spans = corpus.manifest.n_spans
    assert sum(done) == n_spans - 3 * 64 > 0 and corpus.verify() == []
    fresh = CompressedCorpus.build(shared_model, tmp_path / "in", tmp_path / "fresh")
    assert torch.allclose(fresh.get(["long.txt"])[0]["memory"], corpus.get(["long.txt"])[0]["memory"], atol=1e-4)
    assert {path.name for path in corpus.folder.rglob("*.npy")} == {"ids.npy"}


def test_a_corpus_remembers_its_model_from_anywhere(checkpoint, backbone_folder, folder, tmp_path, monkeypatch):
    moved = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    model = CLaRaForRAG.from_pretrained("model", backbone=backbone_folder)
    corpus = CompressedCorpus.build(model, folder, "c")
    assert corpus.manifest.compressor["name_or_path"] == str(moved)
    assert corpus.manifest.compressor["backbone"] == str(backbone_folder)


def test_many_shards_and_a_last_file_of_several(corpus, folder):
    """The last file lies in several shards; nothing of it is lost, also not for the log."""
    jsonl(folder / "z.jsonl", {f"z{number}": f"Row {number}." for number in range(23)})
    for number in range(30):
        write(folder / f"n{number}.txt", f"New {number}.")
    corpus.sync(folder, **SMALL)
    assert texts(corpus) == expected(folder) and plan_sync(corpus.folder, folder).is_empty
    assert len(read_log(corpus.folder)["z.jsonl"].ids) == 23
    jsonl(folder / "z.jsonl", {"z3": "Row 3."})
    assert corpus.sync(folder, **SMALL).n_deleted == 22


def test_what_was_refused_is_read_again_after_the_next_change(corpus, folder):
    jsonl(folder / "z.jsonl", {"r1": "Of z.", "z": "Own."})
    corpus.add([{"id": "hand.txt", "text": "By hand."}])
    write(folder / "hand.txt", "By file.")
    assert {row["id"] for row in corpus.sync(folder).rejected if row["id"]} == {"r1", "hand.txt"}
    assert plan_sync(corpus.folder, folder).is_empty  # until something changes
    corpus.delete(["hand.txt"])
    (folder / "rows.jsonl").unlink()
    corpus.sync(folder)
    corpus.sync(folder)
    assert texts(corpus) == expected(folder) and texts(corpus)["r1"] == "Of z."
    assert plan_sync(corpus.folder, folder).is_empty and corpus.verify() == []


def test_a_file_and_a_folder_that_cannot_be_opened_keep_their_documents(corpus, folder, monkeypatch):
    """As for a user without the rights, which the tests may have."""
    scandir, opened = os.scandir, InputFile.open_raw

    def closed(path):
        if str(path).endswith("sub0"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    def locked(file):
        if file.name == "rows.jsonl":
            raise PermissionError(13, "Permission denied")
        return opened(file)

    before = expected(folder)
    write(folder / "rows.jsonl", (folder / "rows.jsonl").read_text() + "\n")
    with monkeypatch.context() as without:
        without.setattr(files.os, "scandir", closed)
        without.setattr(InputFile, "open_raw", locked)
        changes = corpus.sync(folder)
        assert {row["status"] for row in changes.rejected if row["place"] in ("sub0/", "rows.jsonl")} == {"failed"}
        assert changes.n_deleted == 0 and texts(corpus) == before
    jsonl(folder / "rows.jsonl", {"r0": "Row 0."})
    corpus.sync(folder)
    assert texts(corpus) == expected(folder)


def test_equal_documents_of_every_type_are_not_compressed_again(shared_model, tmp_path):
    rows = [{"text": "a", "m": {"a": 1}, "x": 0.1, "tags": ["t"]}, {"text": "b", "m": {"b": 2}, "x": float("nan")}]
    write(tmp_path / "in" / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    corpus = CompressedCorpus.build(shared_model, tmp_path / "in", tmp_path / "c")
    write(tmp_path / "in" / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in [*rows, {"text": "c"}]))
    changes = corpus.sync(tmp_path / "in")
    assert (changes.n_documents, changes.n_unchanged) == (1, 2)


def test_columns_of_the_build_are_remembered_and_later_ones_are_dropped(shared_model, tmp_path, caplog):
    write(tmp_path / "in" / "rows.jsonl", json.dumps({"body": "First."}) + "\n")
    corpus = CompressedCorpus.build(shared_model, tmp_path / "in", tmp_path / "c", text_column="body")
    write(tmp_path / "in" / "more.csv", "body,author\nSecond.,me\n")
    assert corpus.sync(tmp_path / "in").n_documents == 1
    assert texts(corpus) == {"rows.jsonl:1": "First.", "more.csv:2": "Second."}
    assert "no column `author`; more.csv" in caplog.text


def test_compacting_leaves_no_deleted_text(corpus, folder, shared_model):
    write(folder / "secret.txt", "zebrasecret stands here")
    corpus.sync(folder)
    shared_model.retrieve(["zebrasecret"], corpus=corpus.with_options(hybrid=True))
    (folder / "secret.txt").unlink()
    corpus.sync(folder)
    corpus.compact()
    found = [path for path in corpus.folder.rglob("*") if path.is_file() and b"zebrasecret" in path.read_bytes()]
    assert found == []
