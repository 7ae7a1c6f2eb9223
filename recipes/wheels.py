"""Wheels for another machine: what it lacks of this project's packages, in the versions that are installed here.

Stands before `parcels.py`. What the other machine has comes as the output of `pip freeze` there; packages that it has
in a version that will do stay behind, with all that they need. It knows nothing of what the packages are for.
"""

import email
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

PROJECT_FILE = Path(__file__).resolve().parent.parent / "pyproject.toml"
EXTRAS = ("train", "eval", "demo")
LEFT_OUT = {"trackio"}  # no recipe needs it where nothing can be reached
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
ARCHITECTURE = "x86_64"


def read_freeze(path: Path) -> dict[str, str | None]:
    """Name -> version of the lines `name==version` of a `pip freeze`; a bare name has None and is taken as it is.

    Raises:
        ValueError: a line is neither, or the file is no text; it is named.
    """
    found = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}. Write it again.") from error
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line or line.startswith("-e "):
            continue
        name, is_exact, exact = line.partition(" @ ")[0].strip().partition("==")
        try:
            found[canonicalize_name(name, validate=True)] = str(Version(exact)) if is_exact else None
        except ValueError as error:
            raise ValueError(f"{path}:{number} must be name==version or a name, got {line!r}. Correct it.") from error
    return found


def missing_packages(
    there: Mapping[str, str | None], *, python: str, extras: Sequence[str] = EXTRAS
) -> dict[str, str]:
    """Name -> version here of every package that a machine lacks, sorted.

    Args:
        there: what it has, from `read_freeze`.
        python: its Python version, such as "3.12".
        extras: of this project.

    Raises:
        ValueError: torch is lacking, which is no matter of a few megabytes, or a package is not installed here.
    """
    environment = default_environment() | {"python_version": python, "python_full_version": f"{python}.0"}
    needed: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = [(requirement, "") for requirement in project_requirements(extras)]
    while queue:
        requirement, extra = queue.pop()
        name = canonicalize_name(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra})
        is_there = name in there and (there[name] is None or requirement.specifier.contains(there[name], True))
        if not applies or name in LEFT_OUT:
            continue
        if not is_there and name == "torch":
            raise ValueError(f"that machine must have {requirement}, got {there.get(name)}. Install it there.")
        if not is_there:
            needed[name] = _version(name)
        # what is there has what it needs, but perhaps not what its extras need
        for wanted in (*requirement.extras, *([] if is_there else [""])):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                queue += [(inner, wanted) for inner in _requirements(requires(name))]
    return dict(sorted(needed.items()))


def project_requirements(extras: Sequence[str]) -> list[Requirement]:
    """What this project requires with these extras, its references to its own extras followed."""
    project = tomllib.loads(PROJECT_FILE.read_text(encoding="utf-8"))["project"]
    lines, queue, seen = list(project["dependencies"]), list(extras), set()
    while queue:
        extra = queue.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in map(Requirement, project["optional-dependencies"][extra]):
            if canonicalize_name(requirement.name) == canonicalize_name(project["name"]):
                queue += requirement.extras
            else:
                lines.append(str(requirement))
    return _requirements(lines)


def _requirements(lines: Sequence[str] | None) -> list[Requirement]:
    found = []
    for line in lines or ():
        try:
            found.append(Requirement(line))
        except InvalidRequirement:  # a package's own metadata, which pip reads more kindly
            continue
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        raise ValueError(f"{name} must be installed here to be packed. Install it with `make install`.") from None


def download_wheels(packages: Mapping[str, str], folder: Path, *, python: str) -> list[Path]:
    """Wheels of exactly these packages for Linux on x86-64; one that is only published as source is built.

    Args:
        packages: name -> version.
        folder: to put them in.
        python: version that they must run on, such as "3.12".

    Returns:
        The wheels, in the order of `packages`.

    Raises:
        ValueError: a package has no wheel for that Python, and its source does not make one that runs everywhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    download = ["download", "--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for platform in PLATFORMS:
        download += ["--platform", f"{platform}_{ARCHITECTURE}"]
    wheels = []
    for name, exact in packages.items():
        wanted = f"{name}=={exact}"
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            command = [*pip, *download, "--dest", temporary, wanted]
            found = subprocess.run(command, capture_output=True, text=True)
            if found.returncode:
                subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", temporary, wanted], capture_output=True)
            made = [path for path in Path(temporary).glob("*.whl") if not found.returncode or _runs_on(path, python)]
            if not made:
                reason = (found.stderr.strip().splitlines() or ["pip said nothing"])[-1]
                raise ValueError(
                    f"{wanted} must have a wheel for Python {python}: {reason} Install it on that machine."
                )
            wheels.append(made[0].replace(folder / made[0].name))
    return wheels


def _runs_on(wheel: Path, python: str) -> bool:
    """Whether a wheel that was built here runs on every machine with that Python."""
    tags = parse_wheel_filename(wheel.name)[3]
    ours = {f"py{python.partition('.')[0]}", "py" + python.replace(".", ""), "cp" + python.replace(".", "")}
    if not any(tag.interpreter in ours and (tag.abi, tag.platform) == ("none", "any") for tag in tags):
        return False
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        required = email.message_from_bytes(archive.read(name)).get("Requires-Python", "")
    return SpecifierSet(required).contains(f"{python}.0")
