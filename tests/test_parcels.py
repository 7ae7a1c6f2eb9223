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
from pathlib import Path

import parcels
import pytest
from parcels import LIST_FILE, UNFINISHED, pack, part_name, unpack

SCRIPT = Path(parcels.__file__)


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that gzip does not make smaller."""
    return random.Random(seed).randbytes(size)


def state(folder: Path) -> dict[str, tuple]:
    """Path -> kind, content and executable bit of everything in a folder but the marks of `unpack`."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if not path.name.startswith(".unpacked-")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
        content = (path.read_bytes(), bool(path.stat().st_mode & stat.S_IXUSR)) if kind == "file" else ()
        found[path.relative_to(folder).as_posix()] = (kind, *content)
    return found


def marks(folder: Path) -> list[str]:
    """What `unpack` keeps for itself: "parts" that wait, and that it is "unpacked"."""
    return sorted(path.name[1:].partition("-")[0] for path in folder.glob(".*-*"))


@pytest.fixture
def tree(tmp_path) -> Path:
    """All kinds of files and folders, without links."""
    folder = tmp_path / "tree"
    files = {"plain.txt": b"text\n", "empty": b"", "a/b/c/deep.bin": noise(3000), "run.sh": b"#!/bin/sh\n"}
    files |= {"a/" + "long" * 40 + ".txt": b"long", "a/with space, ünï ☃ and\nline": b"name", "-dash": b"dash"}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "run.sh").chmod(0o755)
    (folder / "nothing" / "in here").mkdir(parents=True)
    return folder


@pytest.fixture
def three(tmp_path) -> list[Path]:
    """The folders of a parcel of one file `x` in three parts."""
    (tmp_path / "source").write_bytes(noise(2500))
    return [path.parent for path in pack({"x": tmp_path / "source"}, tmp_path / "three", limit=1000)]


def assert_is_x(output: Path) -> None:
    assert state(output) == {"x": ("file", noise(2500), False)} and marks(output) == ["unpacked"]


def forge(folder: Path, payload: bytes) -> Path:
    """A parcel of one part that holds `payload`, its hash in order."""
    folder.mkdir()
    (folder / part_name(1)).write_bytes(payload)
    part = {"name": part_name(1), "size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    (folder / LIST_FILE).write_text(json.dumps({"parts": [part]}))
    return folder


def tar_of(*members: dict) -> bytes:
    """A compressed tar file of members with `name`, maybe `data`, and other fields."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for fields in members:
            info, data = tarfile.TarInfo(), fields.get("data", b"")
            info.size = len(data)
            for field in fields.keys() - {"data"}:
                setattr(info, field, fields[field])
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def fails(capsys, *arguments) -> str:
    """The one line that a command line which ends with status 1 prints; an exception fails the test."""
    capsys.readouterr()
    assert parcels.main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def run(arguments, before: str = "") -> subprocess.CompletedProcess:
    """The command line in a Python that has nothing but its standard library, after the statements `before`."""
    code = f"import gzip, os, resource, signal, sys, zlib\nsys.path.insert(0, {str(SCRIPT.parent)!r})\nimport parcels"
    code += f"\n{before}\nsys.exit(parcels.main(sys.argv[1:]))"
    command = [sys.executable, "-I", "-S", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("own_folders", [True, False])
def test_round_trip(tree, tmp_path, own_folders, monkeypatch):
    """Parts of several blocks, and more parts than their names have digits."""
    monkeypatch.setattr(parcels, "BLOCK", 100)
    single, before = tree / "a" / "b" / "c" / "deep.bin", state(tree)
    content = {"tree": tree, "deep/er/file": single}
    (whole,) = pack(content, tmp_path / "parcels")
    total = whole.stat().st_size
    with tarfile.open(whole) as archive:
        assert {(info.uid, info.gid, info.uname, info.gname) for info in archive} == {(0, 0, "", "")}
    for limit in (1000 if own_folders else 3, total - 1, total, total + 1):
        folder, output = tmp_path / f"parcels {limit}", tmp_path / "new" / f"output {limit}"
        parts = pack(content, folder, limit=limit, own_folders=own_folders)
        assert [path.stat().st_size for path in parts[:-1]] == [limit] * (-(-total // limit) - 1)
        for number, path in enumerate(parts, 1):
            assert path == (folder / str(number) if own_folders else folder) / part_name(number)
        assert unpack(sorted({path.parent for path in parts}, reverse=True), output) == []
        found = state(output)
        assert {name[5:]: value for name, value in found.items() if name.startswith("tree/")} == before
        assert found["deep/er/file"][1] == single.read_bytes() and len(found) == len(before) + 4
    assert state(tree) == before


def test_links_travel_as_what_they_point_to(tmp_path):
    """As a model file in the cache of the Hub: what its name promises is the file."""
    folder = tmp_path / "folder"
    (folder / "blobs").mkdir(parents=True)
    (tmp_path / "outside").write_bytes(b"x")
    (folder / "blobs" / "file").write_bytes(b"x")
    links = {"relative": "blobs/file", "absolute": folder / "blobs" / "file", "up": "../outside", "inner": "blobs"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (folder / "hard").hardlink_to(folder / "blobs" / "file")
    (tmp_path / "link").symlink_to("folder")
    parts = pack({"it": tmp_path / "link", "model": folder / "relative"}, tmp_path / "parcels")
    assert unpack([parts[0].parent], tmp_path / "output") == []
    expected = dict.fromkeys(("it", "it/blobs", "it/inner"), ("folder",)) | {"model": ("file", b"x", False)}
    names = ("blobs/file", "relative", "absolute", "up", "inner/file", "hard")
    assert state(tmp_path / "output") == expected | {f"it/{name}": ("file", b"x", False) for name in names}


def test_pack_refuses(tree, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    before = state(tmp_path)
    good, new = f"x={tree / 'plain.txt'}", tmp_path / "new"
    assert str(tmp_path / "gone") in fails(capsys, "pack", new, good, f"y={tmp_path / 'gone'}")
    for folder in (tree, tree / "plain.txt"):
        assert "empty" in fails(capsys, "pack", folder, good)
    assert "Choose another folder" in fails(capsys, "pack", tree / "parcels", f"tree={tree}")
    for limit in ("0", "-1", "nan", "inf", "1e-9"):
        fails(capsys, "pack", tmp_path / "empty", good, f"--limit={limit}")
    for content in ("x", "=x", "x=", "="):
        assert "NAME=PATH" in fails(capsys, "pack", new, good, content)
    for name in ("../tree", "a/../../tree", "..", ".", "/tree"):
        assert repr(name) in fails(capsys, "pack", new, good, f"{name}={tree}")
    assert "once" in fails(capsys, "pack", new, good, f"x={tree / 'run.sh'}")
    for make in (os.mkfifo, lambda path: path.symlink_to("missing"), lambda path: path.symlink_to(".")):
        make(tree / "it")  # which would only be found when all parts are there, on the other machine
        assert "it" in fails(capsys, "pack", tmp_path / "empty", f"tree={tree}")
        (tree / "it").unlink()
    assert state(tmp_path) == before


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_one_by_one_and_together(three, tmp_path, order):
    output, missing = tmp_path / "output", {1, 2, 3}
    for index in order:
        missing.discard(index + 1)
        place = shutil.copytree(three[index], tmp_path / "taken in")  # it may go then
        for _ in range(2):  # repeating changes nothing
            assert unpack([place], output) == [part_name(number) for number in sorted(missing)]
        shutil.rmtree(place)
        assert (output / "x").exists() == (not missing)
    assert_is_x(output)
    for index in order:  # as some transfers do; the lists are the same
        shutil.copytree(three[index], tmp_path / "one folder", dirs_exist_ok=True)
    for name, places in (("together", [three[index] for index in order]), ("one", [tmp_path / "one folder"])):
        assert unpack(places, tmp_path / name) == []
        assert_is_x(tmp_path / name)
    (output / "x").write_text("changed")
    before = {path: path.stat().st_mtime_ns for path in [output, *output.rglob("*")]}
    assert unpack([three[index] for index in order], output) == unpack(three[:1], output) == []
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 3


def test_two_parcels(three, tmp_path, capsys):
    """One folder takes both, but no call does, and no part goes for another's."""
    (tmp_path / "y").write_bytes(noise(2500, seed=1))
    other, output = [path.parent for path in pack({"y": tmp_path / "y"}, tmp_path / "o", limit=1000)], tmp_path / "out"
    error = fails(capsys, "unpack", three[0], other[1], three[2], "--output", output)
    assert str(three[0]) in error and str(other[1]) in error and not output.exists()
    assert unpack(three[:2], output) == ["part-003"]
    assert unpack(other[:1], output) == ["part-002", "part-003"]
    assert unpack(three[2:], output) == [] and (output / "x").exists() and not (output / "y").exists()
    assert unpack(other[1:], output) == [] and set(state(output)) == {"x", "y"}


DAMAGES = {
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-300] + bytes(300)),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_refused_and_can_come_again(damage, three, tmp_path, capsys):
    output = tmp_path / "output"
    good = shutil.copytree(three[1], tmp_path / "good")
    DAMAGES[damage](three[1] / part_name(2))
    assert str(three[1] / part_name(2)) in fails(capsys, "unpack", *three, "--output", output)
    assert not output.exists() and unpack([three[0], good], output) == ["part-003"]  # nothing was taken in
    if damage != "folder":
        DAMAGES[damage](next(output.glob(".parts-*")) / part_name(2))  # a full disk, a crash, while it waits
        assert "is damaged" in fails(capsys, "unpack", three[2], "--output", output)
        assert marks(output) == ["parts"] and not (output / "x").exists()
    assert unpack([good, three[2]], output) == []
    assert_is_x(output)


PART = {"name": "part-001", "size": 2500, "sha256": hashlib.sha256(noise(2500)).hexdigest()}
LISTS = [b"", b'{"parts": [', b"\xff\xfe{}", b"null", b"[]", b"{}", b"[" * 100_000]  # files, then lists of parts
LISTS += [None, [], ["part-001"], [PART, PART], [{"name": "part-001", "size": 2500}]]
LISTS += [[PART | change] for change in ({"name": "part-000"}, {"name": "../part-001"})]
LISTS += [[PART | change] for change in ({"sha256": "0" * 64}, {"sha256": None}, {"size": 2499}, {"size": "2500"})]


@pytest.mark.parametrize("number", range(len(LISTS)))
def test_a_damaged_list_is_refused(number, tmp_path, capsys):
    place, content = forge(tmp_path / "place", noise(2500)), LISTS[number]
    is_file = isinstance(content, bytes)
    (place / LIST_FILE).write_bytes(content if is_file else json.dumps({"parts": content}).encode())
    error = fails(capsys, "unpack", place, "--output", tmp_path / "output")
    assert str(place) in error and "is damaged" in error
    (place / LIST_FILE).unlink()
    for wrong in (place, tmp_path / "nowhere", place / part_name(1)):  # the last one is a file
        assert str(wrong) in fails(capsys, "unpack", wrong, "--output", tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_the_output_is_not_empty(tree, three, tmp_path, capsys):
    parts, output = pack({"tree": tree}, tmp_path / "parcels"), tmp_path / "output"
    (output / "tree").mkdir(parents=True)
    (output / "tree" / "own").write_text("kept")
    (output / "tree" / "plain.txt").write_text("another, and longer than what comes")
    (output / "x" / "inside").mkdir(parents=True)
    assert unpack([parts[0].parent], output) == []
    found = {name[5:]: value for name, value in state(output).items() if name.startswith("tree/")}
    assert found.pop("own")[1] == b"kept" and found == state(tree)
    fails(capsys, "unpack", *three, "--output", output)  # a folder stands where a file must go
    shutil.rmtree(output / "x")
    assert unpack(three[:1], output) == [] and (output / "x").read_bytes() == noise(2500)  # all parts wait already
    fails(capsys, "unpack", *three, "--output", tree / "plain.txt")


def test_links_in_the_output_lead_nothing_outside(tmp_path, capsys):
    place, outside = forge(tmp_path / "place", tar_of({"name": "a/x", "data": b"new"})), tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_text("kept")
    for link, target in {"a": outside, "a/x": outside / "x"}.items():
        output = tmp_path / "output" / link.replace("/", " ")
        (output / link).parent.mkdir(parents=True)
        (output / link).symlink_to(target)
        fails(capsys, "unpack", place, "--output", output)
        assert state(outside) == {"x": ("file", b"kept", False)} and marks(output) == ["parts"]


LINK, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
GARBAGE = {
    "upwards": [{"name": "../evil", "data": b"evil"}],
    "upwards from a folder": [{"name": "a/../../evil", "data": b"evil"}],
    "link upwards": [{"name": "link", "type": LINK, "linkname": "../victim"}],
    "absolute link": [{"name": "link", "type": LINK, "linkname": "/etc/passwd"}],
    "through a link": [{"name": "up", "type": LINK, "linkname": ".."}, {"name": "up/evil", "data": b"evil"}],
    "hard link upwards": [{"name": "hard", "type": HARD, "linkname": "../victim"}, {"name": "hard", "data": b"evil"}],
    "hard link to nothing": [{"name": "hard", "type": HARD, "linkname": "missing"}],
    "device": [{"name": "device", "type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}],
    "nothing": b"",
    "text": b"this is no archive",
    "begin of gzip": b"\x1f\x8b",
    "head of gzip with a field": b"\x1f\x8b\x08\x04" + b"\0" * 6,
    "cut": tar_of({"name": "good", "data": noise(3000)})[:1500],
    "flipped": tar_of({"name": "good", "data": b"a" * 3000})[:20] + noise(60),
    "gzip of text": gzip.compress(b"this is no archive" * 100),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_bad_archives_are_refused_and_nothing_leaves_the_output(kind, tmp_path, capsys):
    (tmp_path / "victim").write_text("kept")
    payload, output = GARBAGE[kind], tmp_path / "output"
    payload = payload if isinstance(payload, bytes) else tar_of({"name": "good", "data": b"good"}, *payload)
    place = forge(tmp_path / "place", payload)
    fails(capsys, "unpack", place, "--output", output)
    assert marks(output) == ["parts"] and (tmp_path / "victim").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "place", "victim"]
    assert {name for name in state(output) if not name.startswith(".parts-")} <= {"good", "a"}


KILL = """
count = 0
def hook(event, arguments):
    global count
    names = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.utime")
    if event in names and any({folder!r} in str(argument) for argument in arguments):
        count += 1
        if count == {number}:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""


def kills(arguments, folder: Path, repeat) -> int:
    """Kill the command line before each operation within `folder`, `repeat` after each; how many there were."""
    for number in itertools.count(1):
        done = run(arguments, KILL.format(folder=str(folder), number=number))
        if done.returncode != -signal.SIGKILL:
            assert done.returncode in (0, 3)
            return number - 1
        repeat(number)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("n_places, n_kills", [(1, 3), (3, 10)])
def test_unpack_killed_anywhere_and_repeated(n_places, n_kills, three, tmp_path):
    """While it takes in the first part, or all of them."""
    output = tmp_path / "output"

    def repeat(number: int) -> None:
        assert unpack(three[1:], output) in ([], [part_name(1)]) and unpack(three[:1], output) == [], number
        assert_is_x(output)

    assert kills(["unpack", *three[:n_places], "--output", output], output, repeat) >= n_kills


def test_pack_killed_anywhere_and_repeated(tmp_path, capsys):
    """What is there is refused, incomplete or whole, and never wrong; emptied, the folder can be used again."""
    (tmp_path / "x").write_bytes(noise(2500))
    work, before = tmp_path / "work", set()
    arguments = ["pack", str(work / "parcels"), f"x={tmp_path / 'x'}", "--limit", str(1500 / (1 << 20))]

    def repeat(number: int) -> None:
        again, names = tmp_path / f"again {number}", [path.name for path in sorted(work.glob("parcels/*"))]
        for name in names:
            if parcels.main(["unpack", str(work / "parcels" / name), "--output", f"{again} then"]) == 0:
                assert_is_x(Path(f"{again} then"))
        before.add(tuple(names))
        if parcels.main(arguments) != 0:
            assert "empty it" in capsys.readouterr().err and names not in ([], [UNFINISHED])
            shutil.rmtree(work / "parcels")
            assert parcels.main(arguments) == 0
        assert unpack(sorted(work.glob("parcels/*")), again) == []
        assert_is_x(again)

    assert kills(arguments, work, repeat) > 5 and (UNFINISHED,) in before


@pytest.mark.parametrize("action, status", [("SIG_DFL", -signal.SIGXFSZ), ("SIG_IGN", 1)])
@pytest.mark.parametrize("size", [500, 1500])  # while a part is copied, while the file is unpacked
def test_a_full_disk_can_be_repeated(size, action, status, three, tmp_path):
    """Killed within a file, or an error there."""
    limit = f"signal.signal(signal.SIGXFSZ, signal.{action})\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size},) * 2)"
    packing = ["pack", tmp_path / "parcels", f"x={tmp_path / 'source'}"]
    for arguments in (["unpack", *three, "--output", tmp_path / "output"], packing):
        done = run(arguments, f"sys.dont_write_bytecode = True\n{limit}")
        assert done.returncode == status and done.stderr.startswith("error: ") == (status == 1)
        assert run(arguments).returncode == 0
        assert_is_x(tmp_path / "output")


def test_command_line(tree, tmp_path):
    """As on a machine that has nothing but Python."""

    def command(*arguments) -> tuple[int, str, str]:
        line = [sys.executable, "-I", "-S", str(SCRIPT), *arguments]
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        return done.returncode, done.stdout, done.stderr

    status, printed, error = command("pack", "parcels", "tree=tree", "--limit", str(2000 / (1 << 20)))
    names = [f"parcels/{number}/{part_name(number)}" for number in range(1, len(printed.splitlines()) + 1)]
    assert (status, error) == (0, "") and [line.split(":")[0] for line in printed.splitlines()] == names
    others = ", ".join(Path(name).name for name in names if name != "parcels/2/part-002")
    assert others and command("unpack", "parcels/2", "--output", "output") == (3, f"still missing: {others}\n", "")
    places = [str(Path(name).parent) for name in reversed(names)]
    for _ in range(2):
        assert command("unpack", *places, "--output", "output") == (0, "unpacked into output\n", "")
    assert state(tmp_path / "output" / "tree") == state(tree)
    assert command("pack", "parcels", "tree=tree")[0] == 1
    for arguments in ((), ("unpack", "parcels/1"), ("pack", "new", "a=b", "--limit", "much")):
        assert command(*arguments)[0] == 2  # and the usage
    assert doctest.testmod(parcels).failed == 0
