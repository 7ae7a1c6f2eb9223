"""Errors of the command line name what was typed: `--memory-size`, not `memory_size`."""

import argparse
import json

import pytest

from modeling_clara import cli
from modeling_clara.cli.errors import describe_error, name_options

COMMANDS = {command.__name__.rpartition(".")[2]: command for command in cli.COMMANDS}
ROWS = [{"id": "rome", "text": "Rome is the capital of Italy."}, {"id": "paris", "text": "Paris is in France."}]


def parser_of(name: str) -> argparse.ArgumentParser:
    return COMMANDS[name].add_parser(argparse.ArgumentParser().add_subparsers())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_of_every_command_is_named_as_it_is_typed(name):
    for action in (parser := parser_of(name))._actions:
        option, python = max(action.option_strings, key=len, default=action.dest), action.dest
        value = "" if action.nargs == 0 else " VALUE"
        renamed = {
            f"`{python}` must be so, got 3.": f"`{option}` must be so, got 3.",
            f"`{python}[3]['a']` is wrong": f"`{option}[3]['a']` is wrong",
            f"Pass `{python}=VALUE` or more": f"Pass `{option}{value}` or more",
            f"Pass {python}=VALUE, then": f"Pass {option}{value}, then",
            f"({python}='VALUE')": f"({option}{value})",
            f"with `{python}`=VALUE. And": f"with `{option}`{value}. And",
        }
        for message, expected in renamed.items():
            assert name_options(message, parser) == expected
        for other in (f"`config.{python}`", f"`{python}_more`", f"the {python} of", f"a/{python}=3", f"`--{python}`"):
            assert name_options(other, parser) == other


def test_arguments_under_another_name_and_faults_of_ours():
    compress = parser_of("compress")
    assert name_options("`documents[2]` and `path` must", compress) == "`input[2]` and `--output` must"
    assert name_options("`documents[2]` must", parser_of("info")) == "`documents[2]` must"
    assert describe_error(KeyError("`model` must\n be"), compress) == "`--model` must be"
    with pytest.raises(IndexError):
        describe_error(IndexError("a fault"), compress)


@pytest.fixture(scope="module")
def places(checkpoint, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("errors")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    found = {"rows": folder / "rows.jsonl", "corpus": folder / "corpus", "model": checkpoint, "folder": folder}
    found = {name: str(path) for name, path in found.items()}
    assert cli.main(["compress", found["rows"], "-o", found["corpus"], "--model", found["model"]]) == 0
    return found


COMPRESS, ASK = "compress {rows} -o {folder}/new --model {model}", "ask {corpus} Why?"


@pytest.mark.parametrize(
    ("call", "option"),
    [
        (f"{COMPRESS} --memory-size 3", "--memory-size"),
        (f"{COMPRESS} --shard-size 0", "--shard-size"),
        (f"{COMPRESS} --batch-size 0", "--batch-size"),
        (f"{COMPRESS} --codec int2", "--codec"),
        (f"{COMPRESS} --metadata year=complex", "--metadata"),
        ("compress {folder}/none -o {folder}/new --model {model}", "input"),
        ("compress {rows} -o {corpus} --model {model} --codec int4", "--codec"),
        ("compress {rows} -o {corpus} --model {model} --memory-size 2", "--memory-size"),
        ("compress {rows} -o {folder} --model {model}", "--output"),
        (f"{ASK} --memory-size 3", "--memory-size"),
        (f"{ASK} --retrieval-memory-size 3", "--retrieval-memory-size"),
        (f"{ASK} --top-k 0", "--top-k"),
        (f"{ASK} --min-score nan", "--min-score"),
        (f"{ASK} --max-new-tokens 0", "--max-new-tokens"),
        (f"{ASK} --max-new-tokens 9999", "--max-new-tokens"),
        (f"{ASK} --expand -1", "--expand"),
        (f"{ASK} --expand 1 --expand-below 2", "--expand-below"),
        (f"{ASK} --expand 0 --expand-below 0.5", "--expand"),
        (f"{ASK} --expand-below 0", "--expand-below"),
        (f'{ASK} --where {{"year":1}}', "--where"),
        (f'{ASK} --where {{"title":{{}}}}', "--where"),
        ("ask {corpus} Why? \t", "question"),
        ("convert {corpus} --codec int2", "--codec"),
        ("demo {folder}/none --model {model}", "folder"),
        ("demo {folder} --all --model {model}", "--all"),
        ("demo --memory-size 3 --model {model}", "--memory-size"),
        ("demo --top-k 99 --model {model}", "--top-k"),
    ],
)
def test_errors_of_every_command_name_its_options(call, option, places, capsys):
    words = call.split(" ")
    for name, path in places.items():
        words = [word.replace(f"{{{name}}}", path) for word in words]
    arguments = cli.parse(words)
    assert cli.main(words) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clara ")]
    assert f"`{option}" in line
    for action in arguments.parser._actions:
        if action.option_strings and f"--{action.dest}" != option:
            assert f"`{action.dest}`" not in line and f"`{action.dest}[" not in line and f"{action.dest}=" not in line
