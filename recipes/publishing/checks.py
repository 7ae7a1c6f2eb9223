"""What a built folder must not hold, and what it must: each problem is a sentence with its remedy.

Nothing is loaded or run here; a file is judged by its name and its bytes.
"""

import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote

import yaml
from huggingface_hub import ModelCard, RepoCard, get_token

from .files import find

Check = Callable[[Path, Path], list[str]]  # (the built folder, its source) -> problems

CARD_FILE = "README.md"
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5"}
ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "a zip archive",
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x28\xb5\x2f\xfd": "zstandard",
}
DATA_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")
SECRETS = {
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}\b",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "an API key": rb"\bsk-(?:[A-Za-z0-9]+-){0,3}(?:(?=[A-Za-z_]*\d)\w{20,}|\w{32,})",
    "an AWS key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
A_PATH = re.compile(r"(?:/[\w.~+-]+){2,}/?|[A-Za-z]:\\[\w.\\ ~+-]+")  # a whole text
SOMEBODYS_HOME = rb"(?<![\w.~])(?:/home/[\w.-]+/|/Users/[\w.-]+/|[A-Z]:\\+Users\\+[\w.-]+\\)"
LINKS = re.compile(
    r"""!?\[[^\]]*\]\(\s*<?([^)\s>]+)[^)]*\)|<(?:img|source|a)\b[^>]*?\b(?:src|href)=["']([^"']+)["']"""
)
CODE_BLOCK = re.compile(r"^(`{3,}|~{3,}).*?^\1", re.MULTILINE | re.DOTALL)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//|#", re.IGNORECASE)


def check_links(source: Path) -> list[str]:
    """Symbolic links of the source, whose targets would be copied, wherever they are."""
    root, problems = source.resolve(), []
    for path in find(source) if source.is_dir() else ():
        if path.is_symlink() and not path.exists():
            problems.append(f"{path} must lead to a file, but is a broken link. Remove it.")
        elif path.is_symlink() and path.is_dir():
            problems.append(f"{path} must be a folder, but is a link to one. Copy the folder there.")
        elif path.is_symlink() and not path.resolve().is_relative_to(root):
            problems.append(f"{path} must lie inside the folder, but links to {path.resolve()}. Copy the file there.")
    return problems


def check_names(folder: Path, source: Path) -> list[str]:
    """File names that the Hub, git or another system does not take."""
    problems, seen = [], {}
    for name in _names(folder):
        parts = name.split("/")
        strange = re.search(r'[\x00-\x1f\x7f\\:*?"<>|\ud800-\udfff]', name)
        if strange or len(name.encode("utf-8", "replace")) > 255 or any(part.endswith((" ", ".")) for part in parts):
            problems.append(f"{name!r} must be a name that every system takes. Rename it.")
        if (other := seen.setdefault(name.casefold(), name)) != name:
            problems.append(f"{name!r} and {other!r} must differ by more than case. Rename one.")
    return problems


def check_pickles(folder: Path, source: Path) -> list[str]:
    """Pickles, by name or by bytes: loading one can run anything."""
    problems = []
    for name in _names(folder):
        path, kind = folder / name, _kind_of(folder / name)
        if path.suffix.lower() in PICKLES or kind == "a pickle":
            what = kind or "what its name says"
            problems.append(
                f"{name} must be safetensors, but is {what}. Save its tensors as safetensors, or remove it."
            )
    return problems


def check_archives(folder: Path, source: Path) -> list[str]:
    """Archives, which hide what is in them and can unpack to any size; data may be gzip."""
    problems = []
    for name in _names(folder):
        kind = _kind_of(folder / name)
        if kind and kind != "a pickle" and not (kind == "gzip" and name.endswith(DATA_SUFFIXES)):
            problems.append(f"{name} must not be packed, but is {kind}. Unpack it, or remove it.")
    return problems


def check_safetensors(folder: Path, source: Path) -> list[str]:
    """Weights that are cut off, or are none."""
    from safetensors import SafetensorError, safe_open

    problems = []
    for name in _names(folder):
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, "numpy"):
                    pass
            except (SafetensorError, OSError) as error:
                problems.append(f"{name} must be a whole safetensors file: {error}. Save or copy it again.")
    return problems


def check_secrets(folder: Path, source: Path) -> list[str]:
    """Tokens and keys, in all that is text; the value itself is not repeated."""
    patterns = {what: re.compile(pattern) for what, pattern in SECRETS.items()}
    if token := get_token():
        patterns["your own token"] = re.compile(re.escape(token.encode()))
    return [
        f"{name} must not hold {what}. Remove it, and revoke it if it was ever public."
        for name, what in _search(folder, patterns, _names(folder))
    ]


def check_paths(folder: Path, source: Path) -> list[str]:
    """Absolute paths of this machine, or of somebody's home; data are not searched, they are texts of others."""
    home, root = str(Path.home()), str(source.resolve() if source.is_dir() else source.resolve().parent)
    here = re.escape(home.encode()) + rb"[/\\]|" + re.escape(root.encode()) + rb"(?![\w-])"
    patterns = {"of this machine": re.compile(rb"(?<![\w.~])(?:" + here + rb")")}
    patterns["of somebody's home"] = re.compile(SOMEBODYS_HOME)
    names = [name for name in _names(folder) if not name.endswith((*DATA_SUFFIXES, "tokenizer.json"))]
    found = [
        f"{name} must not hold an absolute path {what}. Take it out, or write it relative to the folder."
        for name, what in _search(folder, patterns, names)
    ]
    flagged = {problem.partition(" ")[0] for problem in found}
    for name in [name for name in names if name.endswith(".json") and name not in flagged]:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except ValueError:
            continue  # not what its name says: no setting can be in it
        found += [
            f"{name} must not hold an absolute path, but {key!r} is {value}. Take it out."
            for key, value in _texts(content)
            if A_PATH.fullmatch(value)
        ]
    return found


def _texts(content, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, value) of all texts in a JSON value."""
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, dict):
        for name, value in content.items():
            yield from _texts(value, name)
    elif isinstance(content, list):
        for value in content:
            yield from _texts(value, key)


def check_card(folder: Path, source: Path) -> list[str]:
    """The card: that it is there, its metadata, and the files that it names."""
    path = folder / CARD_FILE
    if not path.is_file():
        return [f"{CARD_FILE} must be there, found none. Write the card."]
    try:
        text = path.read_text(encoding="utf-8")
        RepoCard(text, ignore_metadata_errors=False)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        return [f"{CARD_FILE} must be UTF-8 and begin with metadata in YAML: {error}. Correct it."]
    root, problems = folder.resolve(), []
    for target in dict.fromkeys(one or other for one, other in LINKS.findall(CODE_BLOCK.sub("", text))):
        if name := "" if ELSEWHERE.match(target) else unquote(re.split("[?#]", target)[0]):
            place = (root / name).resolve()
            if not place.exists() or not place.is_relative_to(root):
                problems.append(f"{CARD_FILE} names {target}, which must be in the folder, but is not. Add it there.")
    return problems


def check_model_card(folder: Path, source: Path) -> list[str]:
    """Licence and base model in the metadata of a model's card."""
    try:
        data = ModelCard.load(folder / CARD_FILE).data
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return []  # `check_card` says so
    problems, name = [], config.get("backbone_name_or_path") or ""
    if not data.get("license"):
        problems.append(
            f"{CARD_FILE} must name the licence. Add the line `license: ...`, such as `license: apache-2.0`."
        )
    named = data.get("base_model") or []
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    if is_hub_id and name not in ([named] if isinstance(named, str) else named):
        problems.append(f"{CARD_FILE} must name the base model. Add the line `base_model: {name}`.")
    return problems


def _names(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def _kind_of(path: Path) -> str | None:
    """What a file is by its bytes, if it is a pickle or packed; None for anything else."""
    with open(path, "rb") as file:
        head = file.read(2**16)
    kind = next((kind for magic, kind in ARCHIVES.items() if head.startswith(magic)), None)
    if kind == "a zip archive" and _is_torch(path):
        return "a pickle"
    if kind is None and head[257:262] == b"ustar":
        return "a tar archive"
    return "a pickle" if kind is None and _is_pickle(head) else kind


def _is_pickle(head: bytes) -> bool:
    """Whether bytes are a program of pickle: its mark and three steps of it, or all of one that names a function."""
    steps = []
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in what is text
            for step, _, _ in pickletools.genops(head):
                steps.append(step.name)
                if steps[0] == "PROTO" and len(steps) > 3:
                    return True
    except (ValueError, UnicodeDecodeError, IndexError, OverflowError):
        return False
    return steps[0] == "PROTO" or bool({"GLOBAL", "INST"} & set(steps))


def _is_torch(path: Path) -> bool:
    """Whether a zip archive is what `torch.save` writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _search(folder: Path, patterns: dict[str, re.Pattern], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(file, what was found there), by blocks that overlap; of binary files the first block is searched."""
    block, overlap = 2**22, 2**12
    for name in names:
        left, rest = dict(patterns), b""
        with open(folder / name, "rb") as file:
            while left and (read := file.read(block)):
                text = rest + read
                for what in [what for what, pattern in left.items() if pattern.search(text)]:
                    del left[what]
                    yield name, what
                if b"\0" in read:
                    break
                rest = text[-overlap:]


EVERYWHERE: tuple[Check, ...] = (
    check_names,
    check_pickles,
    check_archives,
    check_secrets,
    check_paths,
    check_card,
)
OF_MODELS: tuple[Check, ...] = (*EVERYWHERE, check_safetensors, check_model_card)
