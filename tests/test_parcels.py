"""Folders in parts: whatever is packed comes out the same, in any order, after any damage that is mended or kill."""

import doctest
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import parcels
import pytest
from parcels import LIST_FILE, pack, part_name, unpack

SCRIPT = Path(parcels.__file__)
NOBODY = 65534
BIG = 1 << 30
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="signals and limits of Linux")


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that gzip does not make smaller."""
    return random.Random(seed).randbytes(size)


def state(folder: Path) -> dict[str, tuple]:
    """Path -> kind, content and executable bit of everything in a folder but the marks of `unpack`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_dir():
            found[name] = ("folder",)
        elif not name.startswith(".unpacked-"):
            found[name] = ("file", path.read_bytes(), bool(path.stat().st_mode & stat.S_IXUSR))
    return found


def marks(folder: Path, kind: str) -> list[str]:
    """Names of what `unpack` keeps for itself: `parts` or `unpacked`."""
    return [path.name for path in folder.glob(f".{kind}-*")]


def make_tree(folder: Path) -> Path:
    files = {
        "plain.txt": b"text\n",
        "empty": b"",
        "a/b/c/deep.bin": noise(3000),
        "a/" + "long" * 40 + ".txt": b"long",
        "a/with space, ünï ☃ and\nline": b"name",
        "-dash": b"dash",
        "run.sh": b"#!/bin/sh\n",
        "read-only": b"keep",
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "run.sh").chmod(0o755)
    (folder / "read-only").chmod(0o444)
    (folder / "nothing" / "in here").mkdir(parents=True)
    (folder / "to file").symlink_to("a/b/c/deep.bin")
    (folder / "a" / "to folder").symlink_to("../nothing")
    (folder / "a" / "to nowhere").symlink_to("missing")
    (folder / "hard").hardlink_to(folder / "plain.txt")
    return folder


@pytest.fixture
def tree(tmp_path) -> Path:
    return make_tree(tmp_path / "tree")


@pytest.fixture
def three(tmp_path) -> list[Path]:
    """The folders of a parcel of one file `x` in three parts."""
    source = tmp_path / "source.bin"
    source.write_bytes(noise(2500))
    return [path.parent for path in pack({"x": source}, tmp_path / "three", limit=1000)]


def assert_is_x(output: Path) -> None:
    assert state(output) == {"x": ("file", noise(2500), False)} and marks(output, "unpacked")


def forge(folder: Path, payload: bytes, **changes) -> Path:
    """A parcel of one part that holds `payload`, its hashes in order."""
    folder.mkdir(parents=True)
    (folder / part_name(1)).write_bytes(payload)
    digest = hashlib.sha256(payload).hexdigest()
    part = {"name": part_name(1), "size": len(payload), "sha256": digest}
    (folder / LIST_FILE).write_text(json.dumps({"sha256": digest, "parts": [part]} | changes))
    return folder


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def fails(capsys, *arguments) -> str:
    """The one line that a command line which ends with status 1 prints; an exception fails the test."""
    capsys.readouterr()
    assert parcels.main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert captured.err.strip() != "error:"
    return captured.err


def run(arguments, *, before: str = "", **kwargs) -> subprocess.CompletedProcess:
    """The command line in a Python that has nothing but its standard library, after the statements `before`."""
    code = f"""
import gzip, os, resource, signal, sys, zlib
sys.path.insert(0, {str(SCRIPT.parent)!r})
import parcels
{before}
sys.exit(parcels.main(sys.argv[1:]))
"""
    command = [sys.executable, "-I", "-S", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **kwargs)


def test_examples():
    assert doctest.testmod(parcels).failed == 0


# --- packing ---------------------------------------------------------------------------------------------------------


def test_round_trip(tree, tmp_path):
    single = tmp_path / "one file"
    single.write_bytes(noise(500, seed=1))
    parts = pack({"tree": tree, "deep/er/file.bin": single, "again": single}, tmp_path / "parcels", limit=1000)
    assert len(parts) > 3
    assert unpack([path.parent for path in parts], tmp_path / "new" / "output") == []
    found = state(tmp_path / "new" / "output")
    assert {name[5:]: value for name, value in found.items() if name.startswith("tree/")} == state(tree)
    assert found["deep/er/file.bin"][1] == found["again"][1] == single.read_bytes()
    assert {name.split("/")[0] for name in found} == {"tree", "deep", "again"}
    source, target = tree / "plain.txt", tmp_path / "new" / "output" / "tree" / "plain.txt"
    assert int(source.stat().st_mtime) == int(target.stat().st_mtime)


@LINUX
def test_names_that_are_no_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / name).write_bytes(b"x")
    parts = pack({"tree": tmp_path / "tree"}, tmp_path / "parcels")
    assert unpack([parts[0].parent], tmp_path / "output") == []
    assert (tmp_path / "output" / "tree" / name).read_bytes() == b"x"


def test_nothing_changes_what_is_packed(tree, tmp_path):
    before = state(tree)
    pack({"tree": tree}, tmp_path / "parcels", limit=100)
    assert state(tree) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parcels", "tree"]  # no temporary folder


@pytest.mark.parametrize("own_folders", [True, False])
def test_sizes_of_parts(tree, tmp_path, own_folders):
    def sizes(name: str, limit: int) -> list[int]:
        parts = pack({"tree": tree}, tmp_path / name, limit=limit, own_folders=own_folders)
        assert [path.name for path in parts] == [part_name(number) for number in range(1, len(parts) + 1)]
        folders = [str(number) if own_folders else "" for number in range(1, len(parts) + 1)]
        assert [path.parent for path in parts] == [tmp_path / name / folder for folder in folders]
        whole = b"".join(path.read_bytes() for path in parts)
        for path in parts:
            listing = json.loads((path.parent / LIST_FILE).read_text())
            assert listing["sha256"] == hashlib.sha256(whole).hexdigest()
            assert [part["sha256"] for part in listing["parts"]] == [parcels.sha256_of(part) for part in parts]
            assert [part["size"] for part in listing["parts"]] == [part.stat().st_size for part in parts]
        assert unpack(sorted({path.parent for path in parts}), tmp_path / f"{name} out") == []
        assert state(tmp_path / f"{name} out" / "tree") == state(tree)
        return [path.stat().st_size for path in parts]

    (total,) = sizes("large", BIG)
    assert sizes("exact", total) == [total]
    assert sizes("more", total + 1) == [total]
    assert sizes("less", total - 1) == [total - 1, 1]
    assert sizes("half", total // 2) == [total // 2] * 2 + [1] * (total % 2)
    assert sizes("third", 1000) == [1000] * (total // 1000) + ([total % 1000] if total % 1000 else [])


def test_one_byte_a_part(tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    parts = pack({"x": tmp_path / "x"}, tmp_path / "parcels", limit=1)
    assert len(parts) > 50 and {path.stat().st_size for path in parts} == {1}
    assert unpack([path.parent for path in reversed(parts)], tmp_path / "output") == []
    assert (tmp_path / "output" / "x").read_bytes() == b"x"


def test_more_parts_than_the_names_have_digits(tmp_path):
    (tmp_path / "x").write_bytes(noise(1500))
    parts = pack({"x": tmp_path / "x"}, tmp_path / "parcels", limit=1, own_folders=False)
    assert parts[999].name == "part-1000" and len(parts) > 1500
    assert unpack([tmp_path / "parcels"], tmp_path / "output") == []
    assert (tmp_path / "output" / "x").read_bytes() == noise(1500)


def test_a_file_as_large_as_a_part(tmp_path):
    """And one of some blocks, so that no copy ends within one."""
    for size in (1000, 3 * parcels.BLOCK, 3 * parcels.BLOCK + 1):
        (tmp_path / "x").write_bytes(noise(size))
        parts = pack({"x": tmp_path / "x"}, tmp_path / f"parcels {size}", limit=size)
        assert unpack([path.parent for path in parts], tmp_path / f"output {size}") == []
        assert (tmp_path / f"output {size}" / "x").read_bytes() == noise(size)


def test_an_empty_file_and_an_empty_folder_and_nothing(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    content = {"file": tmp_path / "file", "folder": tmp_path / "folder"}
    for name, part in (("both", content), ("none", {})):
        (path,) = pack(part, tmp_path / f"{name} parcels")
        assert unpack([path.parent], tmp_path / name) == []
        assert list(state(tmp_path / name)) == list(part)


def test_parts_tell_nothing_of_who_packed(tree, tmp_path):
    (path,) = pack({"tree": tree}, tmp_path / "parcels")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        assert {(info.uid, info.gid, info.uname, info.gname) for info in members} == {(0, 0, "", "")}
        assert {info.name.split("/")[0] for info in members} == {"tree"}
    assert str(tmp_path).encode() not in gzip.decompress(path.read_bytes())


def test_one_folder_under_another_in_the_parcel(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    parts = pack({"a/b": tmp_path / "two", "a": tmp_path / "one"}, tmp_path / "parcels")
    assert unpack([parts[0].parent], tmp_path / "output") == []
    assert set(state(tmp_path / "output")) == {"a", "a/one", "a/b", "a/b/two"}


def test_a_link_that_is_named_is_followed(tmp_path):
    """As a model file in the cache of the Hub: what its name promises is the file."""
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "model.gguf").symlink_to("blob")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"file")
    (tmp_path / "to folder").symlink_to(tmp_path / "folder")
    content = {"model.gguf": tmp_path / "model.gguf", "folder": tmp_path / "to folder"}
    parts = pack(content, tmp_path / "parcels")
    assert unpack([parts[0].parent], tmp_path / "output") == []
    assert (tmp_path / "output" / "model.gguf").read_bytes() == b"weights"
    assert (tmp_path / "output" / "folder" / "file").read_bytes() == b"file"


@pytest.mark.parametrize("kind", ["name upwards", "name out of a folder", "absolute link", "link upwards", "pipe"])
def test_what_cannot_be_unpacked_is_not_packed(kind, tmp_path, capsys):
    """It would only be found when all parts are there, on the other machine."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("x")
    name = {"name upwards": "../tree", "name out of a folder": "a/../../tree"}.get(kind, "tree")
    if kind == "absolute link":
        (tmp_path / "tree" / "link").symlink_to(tmp_path / "tree" / "file")
    elif kind == "link upwards":
        (tmp_path / "file").write_text("y")
        (tmp_path / "tree" / "link").symlink_to("../../file")
    elif kind == "pipe":
        os.mkfifo(tmp_path / "tree" / "pipe")
    fails(capsys, "pack", tmp_path / "parcels", f"{name}={tmp_path / 'tree'}")


def test_parcels_within_what_is_packed(tmp_path, capsys):
    """They are refused, or no trace of their making is in them."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("x")
    if parcels.main(["pack", str(tmp_path / "tree" / "parcels"), f"tree={tmp_path / 'tree'}"]) == 1:
        return
    assert unpack([tmp_path / "tree" / "parcels" / "1"], tmp_path / "output") == []
    assert {name for name in state(tmp_path / "output") if ".parcel-" in name} == set()


def test_pack_refuses(tmp_path, capsys):
    (tmp_path / "x").write_text("x")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    before = state(tmp_path)
    good = f"x={tmp_path / 'x'}"
    assert str(tmp_path / "gone") in fails(capsys, "pack", tmp_path / "new", good, f"y={tmp_path / 'gone'}")
    assert "dangling" in fails(capsys, "pack", tmp_path / "new", f"y={tmp_path / 'dangling'}")
    assert "empty" in fails(capsys, "pack", tmp_path / "used", good)
    assert "empty" in fails(capsys, "pack", tmp_path / "x", good)
    fails(capsys, "pack", tmp_path / "x" / "below", good)
    fails(capsys, "pack", tmp_path / "dangling", good)
    for limit in ("0", "-1", "nan", "1e-9"):
        fails(capsys, "pack", tmp_path / "empty", good, f"--limit={limit}")
    for content in ("x", "=x", "x=", "="):
        assert "NAME=PATH" in fails(capsys, "pack", tmp_path / "new", good, content)
    assert state(tmp_path) == before
    assert parcels.main(["pack", str(tmp_path / "empty"), good]) == 0  # is not in use


@pytest.mark.parametrize("limit", ["inf", "1e400"])
def test_an_endless_limit_is_no_traceback(limit, tmp_path):
    (tmp_path / "x").write_text("x")
    assert parcels.main(["pack", str(tmp_path / "new"), f"x={tmp_path / 'x'}", f"--limit={limit}"]) in (0, 1)


def test_one_name_twice_is_refused(tmp_path, capsys):
    """Or one of the files would be left behind without a word."""
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    error = fails(capsys, "pack", tmp_path / "new", f"x={tmp_path / 'one'}", f"x={tmp_path / 'two'}")
    assert "x" in error and not (tmp_path / "new").exists()


def test_a_path_may_have_an_equals_sign(tmp_path):
    (tmp_path / "a=b").write_text("x")
    assert parcels.main(["pack", str(tmp_path / "new"), f"x={tmp_path / 'a=b'}"]) == 0
    assert unpack([tmp_path / "new" / "1"], tmp_path / "output") == []
    assert (tmp_path / "output" / "x").read_text() == "x"


# --- parts in any order ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_one_by_one(three, tmp_path, order):
    output, missing = tmp_path / "output", {1, 2, 3}
    for index in order:
        missing.discard(index + 1)
        assert unpack([three[index]], output) == [part_name(number) for number in sorted(missing)]
        if missing:
            assert not (output / "x").exists() and not marks(output, "unpacked") and len(marks(output, "parts")) == 1
            assert unpack([three[index]], output) == [part_name(number) for number in sorted(missing)]  # again
    assert_is_x(output)


def test_together_and_in_groups(three, tmp_path):
    for order in itertools.permutations(range(3)):
        output = tmp_path / f"together {order}"
        assert unpack([three[index] for index in order], output) == []
        assert_is_x(output)
        output = tmp_path / f"groups {order}"
        assert unpack([three[order[0]]], output) != []
        assert unpack([three[order[2]], three[order[1]], three[order[0]]], output) == []
        assert_is_x(output)
    assert unpack([three[0], three[0]], tmp_path / "twice") == ["part-002", "part-003"]


def test_parts_put_into_one_folder(three, tmp_path):
    """As some transfers do; the lists are the same."""
    together = tmp_path / "together"
    for place in three[:2]:
        shutil.copytree(place, together, dirs_exist_ok=True)
    assert unpack([together], tmp_path / "output") == ["part-003"]
    shutil.copytree(three[2], together, dirs_exist_ok=True)
    assert unpack([together], tmp_path / "output") == []
    assert_is_x(tmp_path / "output")


def test_parts_may_go_once_they_are_taken_in(three, tmp_path):
    for place in three:
        missing = unpack([place], tmp_path / "output")
        shutil.rmtree(place)
    assert missing == []
    assert_is_x(tmp_path / "output")


def test_again_does_nothing(three, tmp_path):
    output = tmp_path / "output"
    unpack(three, output)
    (output / "x").write_text("changed")
    (output / "own").write_text("kept")
    before = {path: path.stat().st_mtime_ns for path in [output, *output.rglob("*")]}
    for places in (three, three[:1], three[2:], three[::-1]):
        assert unpack(places, output) == []
    assert {path: path.stat().st_mtime_ns for path in [output, *output.rglob("*")]} == before
    assert (output / "x").read_text() == "changed" and not marks(output, "parts")


def test_parcels_do_not_know_of_each_other(three, tmp_path):
    (tmp_path / "y").write_bytes(noise(1500, seed=1))
    other = [path.parent for path in pack({"y": tmp_path / "y"}, tmp_path / "other", limit=1000)]
    output = tmp_path / "output"
    assert unpack(three[:2], output) == ["part-003"]
    assert unpack(other[:1], output) == ["part-002"]
    assert unpack(three[2:], output) == [] and (output / "x").exists() and not (output / "y").exists()
    assert unpack(other[1:], output) == []
    assert set(state(output)) == {"x", "y"} and len(marks(output, "unpacked")) == 2


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def become_another(path: Path) -> None:
    """Renamed: the first part under the name of the second."""
    shutil.copyfile(path.parent.parent / "1" / part_name(1), path)


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "flipped": flip,
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "renamed": become_another,
    "folder": become_a_folder,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_refused_and_can_come_again(damage, three, tmp_path, capsys):
    output = tmp_path / "output"
    good = shutil.copytree(three[1], tmp_path / "good")
    DAMAGES[damage](three[1] / part_name(2))
    assert str(three[1] / part_name(2)) in fails(capsys, "unpack", *three, "--output", output)
    assert not output.exists()  # nothing is taken in, of the good parts neither
    assert unpack([three[0]], output) == ["part-002", "part-003"]
    before = state(output)
    fails(capsys, "unpack", three[2], three[1], "--output", output)
    assert state(output) == before
    assert unpack([three[2]], output) == ["part-002"]
    assert unpack([good], output) == []
    assert_is_x(output)


def test_a_part_under_no_known_name_is_missing(three, tmp_path, capsys):
    (three[1] / part_name(2)).rename(three[1] / "part-002 (1)")
    assert parcels.main(["unpack", *map(str, three), "--output", str(tmp_path / "output")]) == 3
    assert capsys.readouterr().out == "still missing: part-002\n"
    (three[1] / "part-002 (1)").rename(three[1] / part_name(2))
    assert unpack([three[1]], tmp_path / "output") == []


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_part_damaged_while_it_waits_is_not_unpacked(damage, three, tmp_path, capsys):
    """A full disk, a crash of the machine: what is in the end unpacked is what was packed, or it is an error."""
    output = tmp_path / "output"
    unpack(three[:2], output)
    (waiting,) = output.glob(".parts-*")
    DAMAGES[damage](waiting / part_name(2))
    fails(capsys, "unpack", three[2], "--output", output)
    assert not marks(output, "unpacked")
    assert unpack(three, output) == []
    assert_is_x(output)


PART = {"name": "part-001", "size": 2500, "sha256": hashlib.sha256(noise(2500)).hexdigest()}
LISTS = {
    "empty": "",
    "cut": '{"sha256": "00',
    "no utf-8": b"\xff\xfe{}",
    "null": "null",
    "list": "[]",
    "number": "3",
    "no parts": json.dumps({"sha256": "0" * 64}),
    "parts null": json.dumps({"sha256": "0" * 64, "parts": None}),
    "parts of text": json.dumps({"sha256": "0" * 64, "parts": ["part-001"]}),
    "numbered from 0": json.dumps({"sha256": "0" * 64, "parts": [PART | {"name": "part-000"}]}),
    "a name that leads out": json.dumps({"sha256": "0" * 64, "parts": [PART | {"name": "../part-001"}]}),
    "a part twice": json.dumps({"sha256": "0" * 64, "parts": [PART, PART]}),
    "empty parts": json.dumps({"sha256": "0" * 64, "parts": []}),
    "no hash": json.dumps({"parts": [PART]}),
    "hash null": json.dumps({"sha256": None, "parts": [PART]}),
    "hash a number": json.dumps({"sha256": 5, "parts": [PART]}),
    "hash a list": json.dumps({"sha256": [0], "parts": [PART]}),
    "hash is no hash": json.dumps({"sha256": "what", "parts": [PART]}),
    "part without a size": json.dumps({"sha256": "0" * 64, "parts": [{"name": "part-001", "sha256": "0" * 64}]}),
    "part without a hash": json.dumps({"sha256": "0" * 64, "parts": [{"name": "part-001", "size": 2500}]}),
    "deeply nested": "[" * 100_000,
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_damaged_list_is_refused(kind, tmp_path, capsys):
    place = tmp_path / "place"
    place.mkdir()
    (place / part_name(1)).write_bytes(noise(2500))
    text = LISTS[kind]
    (place / LIST_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="damaged"):
        unpack([place], tmp_path / "output")
    assert LIST_FILE in fails(capsys, "unpack", place, "--output", tmp_path / "output")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("wrong", ["part", "whole"])
def test_a_wrong_hash_in_every_list(wrong, three, tmp_path, capsys):
    for place in three:
        listing = json.loads((place / LIST_FILE).read_text())
        entry = listing["parts"][1] if wrong == "part" else listing
        entry["sha256"] = entry["sha256"][::-1]
        (place / LIST_FILE).write_text(json.dumps(listing))
    fails(capsys, "unpack", *three, "--output", tmp_path / "output")
    assert not marks(tmp_path / "output", "unpacked")


def test_a_missing_list(three, tmp_path, capsys):
    (three[1] / LIST_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=LIST_FILE):
        unpack(three, tmp_path / "output")
    places = (three[1], three[1].parent, tmp_path / "nowhere", three[0] / part_name(1))  # the last one is a file
    for place in places:
        fails(capsys, "unpack", three[0], place, "--output", tmp_path / "output")
    (three[1] / LIST_FILE).mkdir()
    fails(capsys, "unpack", *three, "--output", tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_no_folder_at_all_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(ValueError):
        unpack([], tmp_path / "output")


def test_parts_of_two_parcels(three, tmp_path, capsys):
    (tmp_path / "y").write_bytes(noise(2500, seed=1))
    other = [path.parent for path in pack({"y": tmp_path / "y"}, tmp_path / "other", limit=1000)]
    error = fails(capsys, "unpack", three[0], other[1], three[2], "--output", tmp_path / "output")
    assert str(three[0]) in error and str(other[1]) in error and not (tmp_path / "output").exists()
    shutil.copyfile(other[1] / part_name(2), three[1] / part_name(2))  # the part of the other, with this list
    assert "damaged" in fails(capsys, "unpack", *three, "--output", tmp_path / "output")


# --- where it goes ---------------------------------------------------------------------------------------------------


def test_the_output_is_a_file(three, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        fails(capsys, "unpack", *three, "--output", output)
    assert (tmp_path / "file").read_text() == "kept"


def test_the_output_is_a_link_to_a_folder(three, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert unpack(three, tmp_path / "link") == []
    assert_is_x(tmp_path / "real")


@pytest.fixture
def open_folder():
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


AS_NOBODY = f"""
import contextlib, io, tempfile
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # imports all there is
    parcels.main(["pack", folder + "/parcels", "x=" + parcels.__file__])
    parcels.main(["unpack", folder + "/parcels/1", "--output", folder])
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
"""


@LINUX
def test_no_right_to_write(open_folder):
    (open_folder / "x").write_text("x")
    pack({"x": open_folder / "x"}, open_folder / "parcels")
    closed = open_folder / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    for output in (closed, closed / "below"):
        done = run(["unpack", open_folder / "parcels" / "1", "--output", output], before=AS_NOBODY)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    done = run(["pack", closed / "parcels", f"x={open_folder / 'x'}"], before=AS_NOBODY)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(closed.iterdir()) == []
    closed.chmod(0o777)
    done = run(["unpack", open_folder / "parcels" / "1", "--output", closed], before=AS_NOBODY)
    assert done.returncode == 0 and (closed / "x").read_text() == "x"


@LINUX
def test_no_right_to_read(open_folder):
    """Packing can be repeated once it is granted."""
    (open_folder / "tree").mkdir()
    (open_folder / "tree" / "secret").write_text("x")
    (open_folder / "tree" / "secret").chmod(0)
    arguments = ["pack", open_folder / "parcels", f"tree={open_folder / 'tree'}"]
    done = run(arguments, before=AS_NOBODY)
    assert done.returncode == 1 and "secret" in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in open_folder.glob(".parcel-*")] == []
    (open_folder / "tree" / "secret").chmod(0o644)
    assert run(arguments, before=AS_NOBODY).returncode == 0


def test_the_output_is_not_empty(tree, tmp_path):
    parts = pack({"tree": tree}, tmp_path / "parcels")
    output = tmp_path / "output"
    (output / "tree" / "a").mkdir(parents=True)
    (output / "own").write_text("kept")
    (output / "tree" / "own").write_text("kept")
    (output / "tree" / "plain.txt").write_text("another, and longer than what comes")
    (output / "tree" / "run.sh").write_text("not executable")
    (output / "tree" / "to file").symlink_to("own")
    assert unpack([parts[0].parent], output) == []
    found = state(output)
    assert found.pop("own")[1] == found.pop("tree/own")[1] == b"kept"
    found.pop("tree")
    assert {name[5:]: value for name, value in found.items()} == state(tree)


def test_a_folder_stands_where_a_file_must_go(three, tmp_path, capsys):
    output = tmp_path / "output"
    (output / "x" / "inside").mkdir(parents=True)
    fails(capsys, "unpack", *three, "--output", output)
    assert not marks(output, "unpacked")
    shutil.rmtree(output / "x")
    assert unpack(three[:1], output) == []  # all parts wait already
    assert_is_x(output)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_links_in_the_output_lead_nothing_outside(kind, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x").write_text("new")
    parts = pack({"a": tmp_path / "source"}, tmp_path / "parcels")
    outside, output = tmp_path / "outside", tmp_path / "output"
    outside.mkdir()
    (outside / "x").write_text("kept")
    (output / "a").mkdir(parents=True)
    if kind == "file":
        (output / "a" / "x").symlink_to(outside / "x")
    else:
        (output / "a").rmdir()
        (output / "a").symlink_to(outside)
    fails(capsys, "unpack", parts[0].parent, "--output", output)
    assert state(outside) == {"x": ("file", b"kept", False)} and not marks(output, "unpacked")


# --- parcels made to do harm -----------------------------------------------------------------------------------------


HARM = {
    "upwards": [member("../evil", b"evil")],
    "upwards from a folder": [member("a/../../evil", b"evil")],
    "a folder upwards": [member("../evil", type=tarfile.DIRTYPE)],
    "link upwards": [member("link", type=tarfile.SYMTYPE, linkname="../victim")],
    "absolute link": [member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
    "through a link": [member("up", type=tarfile.SYMTYPE, linkname=".."), member("up/evil", b"evil")],
    "hard link upwards": [member("hard", type=tarfile.LNKTYPE, linkname="../victim"), member("hard", b"evil")],
    "pipe": [member("pipe", type=tarfile.FIFOTYPE)],
    "device": [member("device", type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
}


@pytest.mark.parametrize("kind", HARM)
def test_nothing_leaves_the_output(kind, tmp_path, capsys):
    (tmp_path / "victim").write_text("kept")
    place = forge(tmp_path / "place", tar_of(member("good", b"good"), *HARM[kind]))
    for _ in range(2):  # repeating makes it no better
        fails(capsys, "unpack", place, "--output", tmp_path / "output")
        assert not marks(tmp_path / "output", "unpacked")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "place", "victim"]
    assert (tmp_path / "victim").read_text() == "kept"
    inside = {name for name in state(tmp_path / "output") if not name.startswith(".parts-")}
    assert inside <= {"good"} | ({"a"} if "from" in kind else set())


def test_absolute_names_stay_within(tmp_path):
    target = tmp_path / "outside" / "evil"
    place = forge(tmp_path / "place", tar_of(member(str(target), b"evil")))
    assert unpack([place], tmp_path / "output") == []
    assert not target.exists() and (tmp_path / "output" / str(target).lstrip("/")).read_bytes() == b"evil"


def test_no_special_rights_come_with_a_file(tmp_path):
    place = forge(tmp_path / "place", tar_of(member("x", b"x", mode=0o6777, uid=NOBODY, gid=NOBODY)))
    assert unpack([place], tmp_path / "output") == []
    found = (tmp_path / "output" / "x").stat()
    assert stat.S_IMODE(found.st_mode) == 0o755 and found.st_uid == os.getuid()


def test_a_hash_that_is_a_path(tmp_path, capsys):
    """The list names folders by it, and some are removed."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "x").write_text("kept")
    payload = tar_of(member(".unpacked-", type=tarfile.DIRTYPE, mode=0o755), member("good", b"good"))
    place = forge(tmp_path / "place", payload, sha256="/../../victim")
    fails(capsys, "unpack", place, "--output", tmp_path / "output")
    assert state(victim) == {"x": ("file", b"kept", False)}


GARBAGE = {
    "nothing": b"",
    "text": b"this is no archive",
    "begin of gzip": b"\x1f\x8b",
    "shorter head of gzip": b"\x1f\x8b\x08",
    "head of gzip with a field": b"\x1f\x8b\x08\x04" + b"\0" * 6,
    "zip": b"PK\x03\x04" + bytes(100),
    "cut": tar_of(member("x", noise(3000)))[:1500],
    "flipped": tar_of(member("x", b"a" * 3000))[:20] + noise(60),
    "gzip of text": gzip.compress(b"this is no archive" * 100),
    "hard link to nothing": tar_of(member("hard", type=tarfile.LNKTYPE, linkname="missing")),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_what_is_no_archive(kind, tmp_path, capsys):
    place = forge(tmp_path / "place", GARBAGE[kind])
    fails(capsys, "unpack", place, "--output", tmp_path / "output")
    assert not marks(tmp_path / "output", "unpacked")


# --- killed ----------------------------------------------------------------------------------------------------------


def kill_before(number: int, folder: Path) -> str:
    """Statements: SIGKILL before the given file operation (from 1) within `folder`."""
    return f"""
count = 0
def hook(event, arguments):
    global count
    names = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.utime")
    if event in names and any({str(folder)!r} in str(argument) for argument in arguments):
        count += 1
        if count == {number}:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


def kills(arguments, folder: Path, repeat) -> int:
    """Kill the command line before each operation within `folder`, `repeat` after each; how many there were."""
    for number in itertools.count(1):
        done = run(arguments, before=kill_before(number, folder))
        if done.returncode != -signal.SIGKILL:
            assert done.returncode in (0, 3)
            return number - 1
        repeat(number)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["files", "hard links"])
def small(request, tmp_path) -> tuple[list[Path], dict]:
    """The folders of a parcel in two parts, and what is in it."""
    tree = tmp_path / "tree"
    (tree / "folder").mkdir(parents=True)
    (tree / "file").write_bytes(noise(300))
    (tree / "folder" / "empty").touch()
    (tree / "link").symlink_to("file")
    if request.param == "hard links":
        (tree / "hard").hardlink_to(tree / "file")
    places = [path.parent for path in pack({"tree": tree}, tmp_path / "parcels", limit=500)]
    assert len(places) == 2
    return places, state(tree)


@LINUX
def test_unpack_killed_anywhere_and_repeated(small, tmp_path):
    places, expected = small
    output, failed = tmp_path / "output", {}

    def repeat(number: int) -> None:
        try:
            assert unpack(places, output) == []
            assert state(output / "tree") == expected and marks(output, "unpacked")
            assert marks(output, "parts") == []  # the space of the parts is free again
        except Exception as error:
            failed[number] = error

    try:
        assert kills(["unpack", *places, "--output", output], output, repeat) > 10
        assert failed == {}
    except AssertionError as error:
        raise AssertionError(f"after a kill before these operations: {failed}") from error


@LINUX
def test_a_part_killed_anywhere_leaves_nothing_half(small, tmp_path):
    places, expected = small
    output = tmp_path / "output"

    def repeat(number: int) -> None:
        missing = unpack(places[1:], output)
        assert missing in ([], [part_name(1)]), number
        if missing:
            assert unpack(places[:1], output) == [], number
        assert state(output / "tree") == expected, number

    assert kills(["unpack", places[0], "--output", output], output, repeat) >= 3


@LINUX
def test_pack_killed_anywhere_and_repeated(tmp_path, capsys):
    """What is there is refused, incomplete or whole, and never wrong; emptied, the folder can be used again."""
    (tmp_path / "x").write_bytes(noise(300))
    work = tmp_path / "work"
    arguments = ["pack", str(work / "parcels"), f"x={tmp_path / 'x'}", "--limit", str(250 / (1 << 20))]

    def repeat(number: int) -> None:
        shutil.rmtree(tmp_path / "output", ignore_errors=True)
        for place in sorted(work.glob("parcels/*")):
            unpacked = parcels.main(["unpack", str(place), "--output", str(tmp_path / "output")])
            assert unpacked in (0, 1, 3), number
            assert unpacked != 0 or (tmp_path / "output" / "x").read_bytes() == noise(300), number
        if parcels.main(arguments) != 0:
            assert "empty it" in capsys.readouterr().err
            shutil.rmtree(work / "parcels")
            assert parcels.main(arguments) == 0
        places = sorted(work.glob("parcels/*"))
        assert len(places) > 1 and unpack(places, tmp_path / f"output {number}") == []
        assert (tmp_path / f"output {number}" / "x").read_bytes() == noise(300)

    assert kills(arguments, work, repeat) > 5


def largest_file(size: int, action: str) -> str:
    """Statements: a file that grows over `size` bytes kills the process (SIG_DFL) or is an error (SIG_IGN)."""
    limits = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    return f"sys.dont_write_bytecode = True\nsignal.signal(signal.SIGXFSZ, signal.{action})\n{limits}"


@LINUX
@pytest.mark.parametrize("size", [500, 1500])  # while a part is copied, while the file is unpacked
def test_unpack_killed_within_a_file(size, three, tmp_path):
    output = tmp_path / "output"
    done = run(["unpack", *three, "--output", output], before=largest_file(size, "SIG_DFL"))
    assert done.returncode == -signal.SIGXFSZ and not marks(output, "unpacked")
    assert [path.stat().st_size for path in output.rglob("*") if path.stat().st_size == size]  # half a file is there
    assert unpack(three, output) == []
    assert_is_x(output)


@LINUX
@pytest.mark.parametrize("size", [500, 1500])
def test_a_full_disk_is_an_error_and_can_be_repeated(size, three, tmp_path):
    output = tmp_path / "output"
    done = run(["unpack", *three, "--output", output], before=largest_file(size, "SIG_IGN"))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not marks(output, "unpacked")
    assert unpack(three, output) == []
    assert_is_x(output)


@LINUX
def test_a_full_disk_while_packing(tmp_path):
    (tmp_path / "x").write_bytes(noise(2500))
    arguments = ["pack", tmp_path / "parcels", f"x={tmp_path / 'x'}"]
    done = run(arguments, before=largest_file(1000, "SIG_IGN"))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.glob(".parcel-*")) == []
    assert run(arguments).returncode == 0
    assert unpack([tmp_path / "parcels" / "1"], tmp_path / "output") == []
    assert_is_x(tmp_path / "output")


# --- the command line ------------------------------------------------------------------------------------------------


def test_command_line(tree, tmp_path):
    """As on a machine that has nothing but Python."""

    def command(*arguments) -> subprocess.CompletedProcess:
        line = [sys.executable, "-I", "-S", str(SCRIPT), *arguments]
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=60)

    packed = command("pack", "parcels", "tree=tree", "--limit", str(2000 / (1 << 20)))
    assert packed.returncode == 0 and packed.stderr == ""
    count = len(list((tmp_path / "parcels").iterdir()))
    assert count >= 2
    lines = packed.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"parcels/{n}/{part_name(n)}" for n in range(1, count + 1)]
    first = command("unpack", "parcels/2", "--output", "output")
    others = [part_name(number) for number in range(1, count + 1) if number != 2]
    assert (first.returncode, first.stdout, first.stderr) == (3, f"still missing: {', '.join(others)}\n", "")
    for _ in range(2):
        last = command("unpack", *(f"parcels/{number}" for number in range(count, 0, -1)), "--output", "output")
        assert (last.returncode, last.stdout, last.stderr) == (0, "unpacked into output\n", "")
    assert state(tmp_path / "output" / "tree") == state(tree)
    for arguments in (
        ("unpack", "nowhere", "--output", "new"),
        ("unpack", "parcels/1", "--output", "tree/plain.txt"),
        ("pack", "parcels", "tree=tree"),
        ("pack", "new", "tree=nowhere"),
    ):
        done = command(*arguments)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for arguments in ((), ("pack",), ("unpack", "parcels/1"), ("pack", "new", "a=b", "--limit", "much"), ("send",)):
        assert command(*arguments).returncode == 2  # and the usage
    assert not (tmp_path / "new").exists()
    assert command("--help").returncode == 0
