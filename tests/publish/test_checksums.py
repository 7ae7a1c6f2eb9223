"""The SHA-256 list of a card: written, read again, and held against a folder in which something has changed."""

import hashlib

import pytest

from modeling_clara.checksums import compare_checksums, insert_checksums, read_checksums, remove_checksums

CARD = "---\nlicense: apache-2.0\n---\n\n# a model\n\nWritten by hand.\n"


@pytest.fixture
def folder(tmp_path):
    """Weights, settings, code, a prompt, and files that are none of these."""
    for name, content in {
        "README.md": CARD,
        "config.json": "{}",
        "picture.png": "",
        "modeling_clara.py": "x = 1\n",
        "compressor/adapter_model.safetensors": "weights",
        "chat_template.jinja": "{{ x }}",
        "a | b`.py": "y = 1\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def test_every_weight_settings_and_code_file_is_in_the_list_with_its_digest(folder):
    card = insert_checksums(CARD, folder)
    names = (
        "compressor/adapter_model.safetensors",
        "config.json",
        "modeling_clara.py",
        "chat_template.jinja",
        "a | b`.py",
    )
    assert read_checksums(card) == {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}
    assert compare_checksums(card, folder) == []
    assert insert_checksums(card, folder) == card and card.startswith(CARD) and remove_checksums(card) == CARD


def test_byte_code_that_python_left_is_not_listed_but_named(folder):
    (folder / "modeling_clara.pyc").write_text("")
    card = insert_checksums(CARD, folder)
    assert "modeling_clara.pyc" not in read_checksums(card)
    assert compare_checksums(card, folder)[0].startswith("`modeling_clara.pyc` must be in the card's list")


def test_text_after_the_list_stays_when_it_is_made_anew(folder):
    card = insert_checksums(CARD, folder) + "\nWritten later.\n"
    (folder / "modeling_clara.py").write_text("x = 2\n")
    assert compare_checksums(card, folder) and not compare_checksums(insert_checksums(card, folder), folder)
    assert insert_checksums(card, folder).endswith("-->\n\nWritten later.\n")
    assert insert_checksums(card, folder).count("modeling_clara.py") == 1


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (lambda f: (f / "modeling_clara.py").write_text("x = 2\n"), "modeling_clara.py", "must have the SHA-256"),
        (lambda f: (f / "config.json").write_text('{"min_score": 1}'), "config.json", "must have the SHA-256"),
        (lambda f: (f / "chat_template.jinja").unlink(), "chat_template.jinja", "found none"),
        (lambda f: (f / "reasoner.py").write_text(""), "reasoner.py", "must be in the card's list"),
        (lambda f: (f / "compressor/x.bin").write_text(""), "compressor/x.bin", "must be in the card's list"),
    ],
    ids=["differs", "settings", "missing", "extra code", "extra pickle"],
)
def test_what_differs_is_named(folder, change, name, words):
    card = insert_checksums(CARD, folder)
    change(folder)
    (problem,) = compare_checksums(card, folder)
    assert problem.startswith(f"`{name}`") and words in problem


@pytest.mark.parametrize(
    "suffix", [".pickle", ".joblib", ".npy", ".npz", ".h5", ".so", ".pyd", ".dll", ".dylib", ".pyc"]
)
@pytest.mark.parametrize("change", [str, str.upper], ids=["small", "capital"])
def test_what_can_run_must_be_in_the_list(folder, suffix, change):
    card = insert_checksums(CARD, folder)
    (folder / f"payload{change(suffix)}").write_text("")
    (problem,) = compare_checksums(card, folder)
    assert problem.startswith(f"`payload{change(suffix)}` must be in the card's list")


def test_a_cache_may_lack_files(folder):
    card = insert_checksums(CARD, folder)
    (folder / "compressor" / "adapter_model.safetensors").unlink()
    assert compare_checksums(card, folder, complete=False) == [] != compare_checksums(card, folder)


def test_a_list_cannot_lead_out_of_its_folder(folder):
    card = insert_checksums(CARD, folder).replace("`chat_template.jinja`", "`../secret.jinja`")
    assert any("must be inside the folder" in problem for problem in compare_checksums(card, folder))


def test_no_list_is_no_problem(folder, tmp_path_factory):
    assert read_checksums(CARD) == {} and compare_checksums(CARD, folder) == []
    assert insert_checksums(CARD, tmp_path_factory.mktemp("empty")) == CARD


def test_of_a_corpus_the_manifest_stands_for_its_shards(folder):
    (folder / "corpus.json").write_text("{}")
    (folder / "data.parquet").write_text("rows")
    (folder / "codec").mkdir()
    (folder / "codec" / "corpus.json").write_text("{}")
    (folder / "index").mkdir()
    (folder / "index" / "rows.bin").write_text("derived")
    names = set(read_checksums(insert_checksums(CARD, folder)))
    assert "corpus.json" in names and not names & {
        "config.json",
        "data.parquet",
        "codec/corpus.json",
        "index/rows.bin",
    }
