"""Wheels for another machine: exactly what it lacks, in the versions of this one, and for its Python.

Stands before `test_parcels.py`; pip runs on a folder of wheels made here. Knows nothing of what packages are for.
"""

import doctest
import io
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from importlib import invalidate_caches
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import wheels
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from wheels import download_wheels, missing_packages, project_requirements, read_freeze

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
THERE = "3.12" if HERE != "3.12" else "3.13"
TAG, TAG_HERE = (f"cp{python.replace('.', '')}" for python in (THERE, HERE))
TORCH = {"torch": None}


def freeze(folder: Path, text: str | bytes) -> Path:
    path = folder / "freeze.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_examples():
    assert doctest.testmod(wheels).failed == 0


# --- what is there ---------------------------------------------------------------------------------------------------


def test_read_freeze(tmp_path):
    text = """# made by pip freeze
torch==2.9.0+cu128

   numpy==1.26.4
Jinja2==3.1.6  # a comment
a__b-.c==1
# Editable install with no version control (mine==0.1)
-e /home/me/mine
-e git+https://example.org/other@abc#egg=other
local @ file:///home/me/local-1.0-py3-none-any.whl#sha256=00
from-git @ git+https://example.org/other@abc
pip
early==1.0rc1
normal==1.0.0-post1
"""
    expected = {
        "torch": "2.9.0+cu128", "numpy": "1.26.4", "jinja2": "3.1.6", "a-b-c": "1", "local": None, "from-git": None,
        "pip": None, "early": "1.0rc1", "normal": "1.0.0.post1",
    }  # fmt: skip
    assert read_freeze(freeze(tmp_path, text)) == expected
    assert read_freeze(freeze(tmp_path, text.replace("\n", "\r\n"))) == expected


def test_read_freeze_of_nothing(tmp_path):
    assert read_freeze(freeze(tmp_path, "")) == read_freeze(freeze(tmp_path, "\n# only this\n")) == {}
    with pytest.raises(FileNotFoundError):
        read_freeze(tmp_path / "missing.txt")


def test_read_freeze_of_this_environment(tmp_path):
    """As pip writes it."""
    command = [sys.executable, "-m", "pip", "freeze", "--disable-pip-version-check"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = read_freeze(freeze(tmp_path, text))
    assert found["peft"] == version("peft") and found["torch"] == version("torch") and "clara-rag" not in found


BAD_LINES = [
    "two words", "==1.0", "name==", "name==one", "name==1.0==2.0", "name==1.*", "name===1.0", "name>=1.0", "name<2",
    "name[extra]==1.0", "name[extra]", "name; python_version < '3'", "name@file:///home/me/name", "name-",
    "name==1.0 --hash=sha256:00", "-r other.txt", "-e", "--index-url https://example.org", "/home/me/name",
    "@ file:///home/me/name", "name~=1.0",
]  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_lines_are_named(line, tmp_path):
    path = freeze(tmp_path, f"# a comment\ngood==1.0\n\n{line}\nlater==1\n")
    with pytest.raises(ValueError) as caught:
        read_freeze(path)
    assert str(caught.value).startswith(f"{path}:4 must be") and line in str(caught.value)


def test_a_freeze_of_another_encoding_is_named(tmp_path):
    """PowerShell's `>` writes UTF-16."""
    path = freeze(tmp_path, "torch==2.9\n".encode("utf-16"))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_freeze(path)


# --- what it lacks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A function that makes a project and installed packages: "name version" -> lines of requirements."""

    def make(dependencies: list[str], installed: dict[str, list[str]], **extras: list[str]) -> None:
        lines = ['[project]\nname = "Acme_Project"', f"dependencies = {dependencies!r}"]
        lines += ["[project.optional-dependencies]", *(f"{name} = {needed!r}" for name, needed in extras.items())]
        (tmp_path / "pyproject.toml").write_text("\n".join(lines))
        monkeypatch.setattr(wheels, "PROJECT_FILE", tmp_path / "pyproject.toml")
        for package, requirements in installed.items():
            name, exact = package.split()
            info = tmp_path / "site" / f"{name}-{exact}.dist-info"
            info.mkdir(parents=True)
            extra = {found for line in requirements for found in re.findall(r'extra == "([^"]+)"', line)}
            fields = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {exact}"]
            fields += [*(f"Provides-Extra: {x}" for x in extra), *(f"Requires-Dist: {x}" for x in requirements), ""]
            (info / "METADATA").write_text("\n".join(fields))
        monkeypatch.syspath_prepend(tmp_path / "site")
        invalidate_caches()

    return make


def lacks(there: dict | None = None, python: str = HERE, extras=()) -> dict[str, str]:
    return missing_packages(TORCH if there is None else there, python=python, extras=extras)


def test_the_real_project():
    """Everything that the dependencies need and nothing of torch; with it, nothing is missing any more."""
    found = lacks()
    assert {"transformers", "peft", "safetensors", "huggingface-hub", "accelerate", "jinja2", "numpy"} <= set(found)
    assert not {"torch", "sympy", "clara-rag", "pytest"} & set(found) and list(found) == sorted(found)
    assert all(exact == version(name) for name, exact in found.items())
    for name in found:  # closed
        for requirement in map(Requirement, requires(name) or ()):
            needed = canonicalize_name(requirement.name)
            if requirement.marker is None and needed != "torch":
                assert requirement.specifier.contains(found[needed], True)
    assert lacks(TORCH | found) == {} and lacks(TORCH | dict.fromkeys(found)) == {}
    for name in ("transformers", "markupsafe"):
        there = TORCH | {key: value for key, value in found.items() if key != name}
        # what only a package that is there needs is not looked for
        assert set(lacks(there)) == ({name} if name == "transformers" else set())


def test_all_that_it_needs_in_the_version_here_and_what_will_do_stays_behind(project):
    installed = {"acme.one 2.0": ["Acme-Two>=2"], "Acme_Two 2.1": ["acme_three"], "acme_three 3": ["acme-one"]}
    project(["ACME_one>=1.5,<3"], installed)  # which need each other
    everything = {"acme-one": "2.0", "acme-three": "3", "acme-two": "2.1"}
    assert lacks({}) == everything
    for exact in ("1.5", "2.9.9", "2.0+local", "2.1rc1", None):
        assert lacks({"acme-one": exact}) == {}
    for exact in ("1.4.9", "3.0", "0", "1.5rc1"):
        assert lacks({"acme-one": exact}) == everything
    assert lacks({"acme-two": "2.0"}) == {"acme-one": "2.0"}
    assert lacks({"acme-two": None}) == {"acme-one": "2.0"}
    assert lacks({"acme-two": "1.9"}) == everything
    assert lacks({"acme-two": "1.9", "acme-three": "1"}) == {"acme-one": "2.0", "acme-two": "2.1"}


@pytest.mark.parametrize("dependencies", [["acme-one", "acme-two>=1"], ["acme-two>=1", "acme-one"]])
def test_the_strictest_requirement_decides_in_any_order(project, dependencies):
    installed = {"acme_one 1": ["acme_two>=2"], "acme_two 2.5": ["acme_three"], "acme_three 3": []}
    project(dependencies, installed)
    assert lacks({"acme-two": "1.5"}) == {"acme-one": "1", "acme-three": "3", "acme-two": "2.5"}
    assert lacks({"acme-two": "2.0"}) == {"acme-one": "1"}
    assert lacks({"acme-one": None, "acme-two": "1.5"}) == {}


def test_torch_must_be_there(project):
    project(["torch>=2.7", "acme-one"], {"acme_one 1": ["torch>=2.8"]})
    for exact in ("2.9.0+cu128", "2.8", "2.10.0a0+git", None):
        assert lacks({"torch": exact}) == {"acme-one": "1"}
    for there in ({}, {"torch": "2.6"}, {"torch": "2.7.1"}, {"acme-one": "1"}):
        with pytest.raises(ValueError, match="torch.*Install it"):
            lacks(there)
    assert lacks({"torch": "2.7", "acme-one": "1"}) == {}


def test_own_extras_are_followed(project):
    packages = {f"acme_{name} 1": [] for name in ("base", "train", "corpus", "deep", "other")}
    circle = {"train": ["acme-train", "acme-project[corpus]"], "corpus": ["acme-corpus", "ACME.project[deep,train]"]}
    project(["acme-base"], packages, **circle, deep=["acme-deep"], other=["acme-other"])
    assert set(lacks()) == {"acme-base"}
    assert set(lacks(extras=["deep"])) == {"acme-base", "acme-deep"}
    assert set(lacks(extras=["train"])) == {"acme-base", "acme-train", "acme-corpus", "acme-deep"}
    assert set(lacks(extras=["other", "other"])) == {"acme-base", "acme-other"}
    names = sorted(requirement.name for requirement in project_requirements(["train", "corpus"]))
    assert names == ["acme-base", "acme-corpus", "acme-deep", "acme-train"]


def test_project_requirements_of_this_project():
    base = {requirement.name for requirement in project_requirements([])}
    assert {"torch", "transformers"} <= base and "matplotlib" not in base
    everything = project_requirements(wheels.EXTRAS)
    names = {requirement.name for requirement in everything}
    # bm25s by way of eval's clara-rag[corpus]
    assert base | {"trl", "matplotlib", "faiss-cpu", "bm25s", "gguf"} <= names
    assert "clara-rag" not in names and not {"pytest", "gradio"} & names
    (torch,) = (requirement for requirement in everything if requirement.name == "torch")
    assert not torch.specifier.contains("2.6")


def test_markers_are_those_of_the_other_machine(project):
    dependencies = [
        "acme-old; python_version < '3.12'", "acme-new; python_version >= '3.12'", "acme-inner",
        "acme-nine; python_version >= '3.9'", "acme-full; python_full_version >= '3.13.0'",
        "acme-windows; sys_platform == 'win32'",
    ]  # fmt: skip
    installed = {f"acme_{name} 1": [] for name in ("old", "new", "nine", "full", "deep")}
    project(dependencies, installed | {"acme_inner 1": ['acme-deep; python_version == "3.13"']})
    assert set(lacks(python="3.11")) == {"acme-old", "acme-nine", "acme-inner"}
    assert set(lacks(python="3.12")) == {"acme-new", "acme-nine", "acme-inner"}
    assert set(lacks(python="3.13")) == {"acme-new", "acme-nine", "acme-full", "acme-inner", "acme-deep"}


def test_extras_of_packages(project):
    optional = {"fast": "fast", "big": "Big_One", "no": "no"}
    requirements = ["acme-plain", *(f'acme-{name}; extra == "{extra}"' for name, extra in optional.items())]
    installed = {f"acme_{name} 1": [] for name in ("plain", "fast", "big", "no")}
    installed |= {"acme_one 1": requirements, "acme_two 1": ["acme-one[big-one]"]}
    project(["acme-one"], installed, fast=["acme-one[fast]"], two=["acme-two"])
    assert set(lacks()) == {"acme-one", "acme-plain"}
    assert set(lacks(extras=["fast"])) == {"acme-one", "acme-plain", "acme-fast"}
    both = {"acme-one", "acme-plain", "acme-fast", "acme-big", "acme-two"}
    assert set(lacks(extras=["fast", "two"])) == set(lacks(extras=["two", "fast"])) == both


def test_an_extra_of_a_package_that_is_there_without_it(project):
    """It stays; whether the extra was installed with it is not known, so what that needs is looked for."""
    requirements = ["acme-plain", 'acme-fast; extra == "fast"']
    project(["acme-one[fast]>=1"], {"acme_one 1": requirements, "acme_plain 1": [], "acme_fast 1": []})
    assert set(lacks({"acme-one": "1", "acme-plain": "1", "acme-fast": "1"})) == set()
    assert set(lacks({"acme-one": "1", "acme-plain": "1"})) == {"acme-fast"}


def test_what_no_recipe_needs_is_left_out(project, monkeypatch):
    project(["acme-one", "Acme_Left"], {"acme_one 1": ["acme-left"], "acme_left 1": ["acme-deep"], "acme_deep 1": []})
    monkeypatch.setattr(wheels, "LEFT_OUT", {"acme-left"})
    assert lacks({}) == {"acme-one": "1"}
    assert lacks({"acme-left": "0"}) == {"acme-one": "1"}


def test_left_out_of_the_real_project():
    pytest.importorskip("trl")
    assert "trackio" in {requirement.name for requirement in project_requirements(["train"])}
    found = lacks(extras=["train"])
    assert "trl" in found and "trackio" not in found


def test_what_is_not_installed_here_is_named(project):
    project(["acme-one"], {"acme_one 1": ["acme-nowhere"]})
    with pytest.raises(ValueError, match="acme-nowhere must be installed here"):
        lacks({})
    assert lacks({"acme-nowhere": "1"}) == {"acme-one": "1"}
    assert lacks({"acme-one": "1"}) == {}


def test_old_metadata_is_read_kindly(project):
    project(["acme-one"], {"acme_one 1": ["acme-bad (>=1.*.x)", "acme-two (>=1)"], "acme_two 1": []})
    assert lacks({}) == {"acme-one": "1", "acme-two": "1"}


# --- downloads -------------------------------------------------------------------------------------------------------


def wheel_bytes(name: str, exact: str, tag: str = "py3-none-any", python: str | None = None) -> bytes:
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{exact}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {exact}\n"
    files = {
        f"{module}.py": f"VERSION = {exact!r}\n",
        f"{info}/METADATA": metadata + (f"Requires-Python: {python}\n" if python else ""),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
        f"{info}/RECORD": "",  # it is never installed
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, text in files.items():
            archive.writestr(zipfile.ZipInfo(path), text)  # the same bytes at any time
    return buffer.getvalue()


def wheel(folder: Path, name: str, exact: str, tag: str = "py3-none-any", python: str | None = None) -> Path:
    path = folder / f"{name.replace('-', '_')}-{exact}-{tag}.whl"
    path.write_bytes(wheel_bytes(name, exact, tag, python))
    return path


def source_package(folder: Path, name: str, exact: str, tag: str = "py3-none-any", fails: bool = False) -> None:
    """With a build backend of its own, which puts a finished wheel down."""
    root = f"{name.replace('-', '_')}-{exact}"
    action = "raise SystemExit('no compiler')" if fails else "open(folder + '/' + FILE, 'wb').write(DATA)"
    backend = f"""
FILE, DATA = {f"{root}-{tag}.whl"!r}, {wheel_bytes(name, exact, tag)!r}
def build_wheel(folder, config_settings=None, metadata_directory=None):
    {action}
    return FILE
"""
    files = {
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {exact}\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": backend,
    }
    with tarfile.open(folder / f"{root}.tar.gz", "w:gz") as archive:
        for path, text in files.items():
            info = tarfile.TarInfo(f"{root}/{path}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that is all that pip can reach."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "index"
    folder.mkdir()
    settings = {"NO_INDEX": "1", "FIND_LINKS": f"{folder}", "CONFIG_FILE": os.devnull, "CACHE_DIR": f"{tmp_path}/c"}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def names(paths: Iterable[Path]) -> list[str]:
    return sorted(path.name for path in paths)


def test_wheels_that_are_found(index, tmp_path):
    """Those for its Python and machine, in exactly the version that is asked for, and without what they need."""
    tags = ["py3-none-any", f"{TAG}-{TAG}-manylinux_2_28_x86_64", "cp39-abi3-manylinux2014_x86_64"]
    made = [wheel(index, f"acme-{number}", "1.5", tag) for number, tag in enumerate(tags)]
    for exact in ("1.4", "1.5.1", "2.0"):
        wheel(index, "acme-0", exact)
    wheel(index, "acme-1", "1.5", f"{TAG_HERE}-{TAG_HERE}-manylinux_2_28_x86_64")
    wheel(index, "acme-1", "1.5", f"{TAG}-{TAG}-win_amd64")
    packages = {f"acme-{number}": "1.5" for number in range(len(tags))}
    target = tmp_path / "new" / "wheels"
    found = download_wheels(packages, target, python=THERE)
    assert found == sorted(target / path.name for path in made) and sorted(target.iterdir()) == found
    assert all((target / path.name).read_bytes() == path.read_bytes() for path in made)
    assert target / made[0].name in download_wheels({"acme-0": "1.5"}, target, python=THERE)  # again
    assert download_wheels({}, tmp_path / "nothing", python=THERE) == []


SYSTEMS = ("win_amd64", "manylinux_2_28_aarch64", "musllinux_1_2_x86_64", "manylinux_2_99_x86_64")
OTHERS = {
    "nothing": {},
    "of other machines": {f"{TAG}-{TAG}-{system}": None for system in SYSTEMS} | {"py2-none-any": None},
    "of this Python": {f"{TAG_HERE}-{TAG_HERE}-manylinux2014_x86_64": None},
    "pure, requires this Python": {"py3-none-any": f"=={HERE}.*"},  # these two pip takes here, and would refuse there
    "pure, made for this Python": {f"{TAG_HERE}-none-any": None},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_wheels_that_are_not_found(kind, index, tmp_path):
    for tag, python in OTHERS[kind].items():
        wheel(index, "acme-one", "1.5", tag, python)
    wheel(index, "acme-one", "1.6")
    good = [wheel(index, "acme-good", "1").name] if kind == "nothing" else []
    packages = {"acme-good": "1", "acme-one": "1.5"} if good else {"acme-one": "1.5"}
    with pytest.raises(ValueError, match=f"acme-one==1.5 must have a wheel for Python {THERE}: .*acme-one") as caught:
        download_wheels(packages, tmp_path / "wheels", python=THERE)
    assert "\n" not in str(caught.value)
    assert names((tmp_path / "wheels").iterdir()) == good  # none that does not serve there


def test_a_source_that_makes_a_pure_wheel(index, tmp_path):
    source_package(index, "acme-source", "1.5")
    for _ in range(2):
        (path,) = download_wheels({"acme-source": "1.5"}, tmp_path / "wheels", python=THERE)
        assert path.name == "acme_source-1.5-py3-none-any.whl"
        assert path.read_bytes() == wheel_bytes("acme-source", "1.5")


@pytest.mark.parametrize("fails", [False, True])
def test_a_source_that_makes_a_wheel_for_this_machine_or_none(fails, index, tmp_path):
    """Not the second time either, when the folder is there, and none of it stays."""
    source_package(index, "acme-source", "1.5", f"{TAG_HERE}-{TAG_HERE}-linux_x86_64", fails)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"acme-source==1.5 must have a wheel for Python {THERE}"):
            download_wheels({"acme-source": "1.5"}, tmp_path / "wheels", python=THERE)
    assert names((tmp_path / "wheels").iterdir()) == []


def test_wheels_of_exactly_these_packages(index, tmp_path):
    """What an earlier call left in the folder, in another version or for another machine, is not handed on."""
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels", "acme-one", "1.5")
    wheel(tmp_path / "wheels", "acme-two", "1")
    wheel(tmp_path / "wheels", "acme-one", "2.0", f"{TAG_HERE}-{TAG_HERE}-linux_x86_64")
    wheel(index, "acme-one", "2.0")
    found = download_wheels({"acme-one": "2.0"}, tmp_path / "wheels", python=THERE)
    assert names(found) == ["acme_one-2.0-py3-none-any.whl"]


def test_the_folder_is_a_file(index, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError):
        download_wheels({}, tmp_path / "file", python=THERE)
    assert (tmp_path / "file").read_text() == "kept"
