"""What the checks of a built folder find, each with its name and remedy, and what they let pass."""

import gzip
import io
import pickle
import shutil
import tarfile
import zipfile

import pytest
import torch
from published import CARDS, write_model

from recipes.publishing.checks import EVERYWHERE, OF_MODELS, check_links, check_pickles
from recipes.publishing.kinds import KINDS

HF, GITHUB = "hf_" + "aB3" * 12, "ghp_" + "aB3" * 12


def problems(folder, source=None, checks=OF_MODELS) -> list[str]:
    return [problem for check in checks for problem in check(folder, source or folder)]


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "built")


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10_000_000))
    return buffer.getvalue()


def torch_file(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(3)}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    return buffer.getvalue()


def test_a_whole_folder_and_the_published_models_pass(folder):
    assert problems(folder) == []
    assert problems(CARDS / "clara-pico") == problems(CARDS / "clara-smollm2-135m") == []
    corpus = folder.parent / "corpus"
    shutil.copytree(CARDS / "clara-pico-corpus", corpus, ignore=shutil.ignore_patterns("index"))
    assert problems(corpus, checks=EVERYWHERE) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("weights.bin", b"", "weights.bin must be safetensors, but is what its name says"),
        ("data.txt", torch_file(legacy=False), "data.txt must be safetensors, but is a pickle"),
        ("data.json", torch_file(legacy=True), "data.json must be safetensors, but is a pickle"),
        ("old", pickle.dumps({"f": print}, protocol=0), "old must be safetensors, but is a pickle"),
        ("new.dat", pickle.dumps([1, 2, 3], protocol=5), "new.dat must be safetensors, but is a pickle"),
        ("two.dat", pickle.dumps({"a": 1}, protocol=2), "two.dat must be safetensors, but is a pickle"),
        ("bomb.json", zip_bomb(), "bomb.json must not be packed, but is a zip archive"),
        ("x.gz", gzip.compress(b"x"), "x.gz must not be packed, but is gzip"),
        ("x.dat", tar(), "x.dat must not be packed, but is a tar archive"),
        ("cut.safetensors", b"\x10\0\0\0\0\0\0\0{}", "cut.safetensors must be a whole safetensors file"),
        ("notes.md", f"my {HF}".encode(), "notes.md must not hold a Hugging Face token. Remove it, and revoke it"),
        ("a.yaml", f"key: {GITHUB}".encode(), "a.yaml must not hold a GitHub token"),
        ("b.json", b'{"k": "sk-proj-' + b"a1B2" * 10 + b'"}', "b.json must not hold an API key"),
        ("c.txt", b"AKIA" + b"ABCD" * 4, "c.txt must not hold an AWS key"),
        ("key.txt", b"-----BEGIN RSA PRIVATE KEY-----\n", "key.txt must not hold a private key"),
        ("run.json", b'{"data": "/home/anna/passages.jsonl"}', "run.json must not hold an absolute path of somebody"),
        ("win.json", rb'{"data": "C:\\Users\\anna\\x"}', "win.json must not hold an absolute path of somebody"),
        ("a:b.json", b"{}", "'a:b.json' must be a name that every system takes"),
        ("CONFIG.json", b"{}", "must differ by more than case"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_must_not_be_there_is_named(folder, name, content, words):
    (folder / name).write_bytes(content)
    (problem,) = problems(folder)
    assert words in problem and problem.rstrip(".").count(". ") >= 1  # a remedy
    assert HF not in problem and GITHUB not in problem


NO_PATHS = ("/a/b c", "/resolve", "a/b/c")


@pytest.mark.parametrize("value", ["/one/two/x.pt", "/one/two", "D:\\\\one\\\\two", *NO_PATHS])
def test_a_setting_that_is_a_path_is_named_by_its_key(value, folder):
    (folder / "more.json").write_text('{"settings": [{"from": "' + value + '"}]}')
    found = problems(folder)
    assert len(found) == (value not in NO_PATHS) and all(
        "'from' is" in problem and "more.json" in problem for problem in found
    )


def test_own_paths_and_the_own_token_are_found(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "unusual-token")
    (tmp_path / "run").mkdir()
    (folder / "log.json").write_text(f'["{tmp_path / "run"}", "unusual-token"]')
    (folder / "other.md").write_text(f"In {tmp_path / 'runs'}.")  # another place
    found = problems(folder, source=tmp_path / "run")
    assert len(found) == 2 and "your own token" in found[0] and "log.json must not hold an absolute path" in found[1]


def test_a_secret_is_found_anywhere_in_a_large_file(folder):
    (folder / "large.jsonl").write_bytes(b"x " * (2**21 - 10) + HF.encode() + b" x" * 1000)
    assert "large.jsonl must not hold" in problems(folder)[0]


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (None, "README.md must be there"),
        ("---\nlicense: [\n---\n# x\n", "README.md must be UTF-8 and begin with metadata"),
        ("# no metadata\n", "README.md must name the licence. Add the line `license: ...`"),
        ("---\nlicense: mit\n---\n![x](missing.png)\n", "README.md names missing.png"),
        ('---\nlicense: mit\n---\n<img width="3" src="missing.png">\n', "README.md names missing.png"),
        ("---\nlicense: mit\n---\n[x](../outside.md)\n", "README.md names ../outside.md"),
        ("---\nlicense: mit\n---\n[x](/etc/hosts)\n", "README.md names /etc/hosts"),
    ],
)
def test_what_a_card_lacks_is_named(folder, card, words):
    (folder.parent / "outside.md").write_text("")
    (folder / "README.md").unlink()
    if card is not None:
        (folder / "README.md").write_text(card)
    (problem,) = problems(folder)
    assert words in problem


def test_links_of_a_card_that_lead_somewhere_pass(folder):
    links = "[a](https://x.org/y) [b](#part) ![c](rate%20one.png) [d](mailto:x@y.z) [e](config.json?raw=true#L1) "
    (folder / "rate one.png").write_bytes(b"")
    code = "```md\n![x](missing.png)\n```\n"
    (folder / "README.md").write_text("---\nlicense: mit\n---\n" + links + "\n" + code)
    assert problems(folder) == []


@pytest.mark.parametrize(("name", "is_needed"), [("org/base", True), ("clara-pico", False), ("", False)])
def test_the_base_model_is_named_if_the_hub_has_it(folder, name, is_needed):
    (folder / "config.json").write_text(f'{{"backbone_name_or_path": "{name}"}}')
    assert [problem for problem in problems(folder) if f"`base_model: {name}`" in problem] == problems(folder)
    assert bool(problems(folder)) == is_needed
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("license: mit", f"license: mit\nbase_model: [{name or 'x'}]"))
    assert problems(folder) == []


def test_links_out_of_the_source_are_refused(folder, tmp_path):
    (tmp_path / "secret").write_text("x")
    (folder / "inside.json").symlink_to(folder / "config.json")
    assert check_links(folder) == []
    (folder / "outside").symlink_to(tmp_path / "secret")
    (folder / "broken").symlink_to(tmp_path / "nothing")
    (folder / "place").symlink_to(folder / "compressor")
    found = check_links(folder)
    assert [word for word in ("links to", "broken link", "a link to one") if any(word in p for p in found)] == [
        "links to",
        "broken link",
        "a link to one",
    ]


def test_text_that_begins_like_a_pickle_is_text(folder):
    for number, text in enumerate(["cats\nand dogs\n.", "(I am.", "N.", "]", "}", "\n", "", "I1\n."]):
        (folder / f"{number}.txt").write_text(text)
    assert [p for p in check_pickles(folder, folder) if not p.startswith("0.txt")] == []


def test_every_kind_is_checked():
    assert all(set(EVERYWHERE) <= set(kind.checks) for kind in KINDS.values()) and KINDS["model"].checks == OF_MODELS
