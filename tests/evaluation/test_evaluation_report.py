"""`evaluation/report.py`: what results files become in tables, cards and metadata, read by the Hub's client."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from results_factory import valid_results

from recipes.evaluation.report import (
    BEGIN,
    END,
    card_section,
    comparison_table,
    describe,
    eval_result_files,
    hub_results,
    insert_section,
    read_results,
    results_table,
    update_card,
)

PICO = Path(__file__).parents[2] / "model_cards" / "clara-pico" / "README.md"
HOSTILE = "a|b*c_d_ [x](http://y) <b>`z`\\"


def rows(table: str) -> list[list[str]]:
    """Cells of a Markdown table, as a reader of GFM cuts them."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]] for line in table.splitlines()]


def index_of(folder: Path) -> dict:
    """(data, metric) -> value in the `model-index` of a card."""
    entries = ModelCard.load(folder / "README.md").data.eval_results
    return {(entry.dataset_name, entry.metric_type): entry.metric_value for entry in entries}


def text_results(**changes) -> dict:
    fields = {"system__name": "bm25-text", "system__kind": "text", "system__reader": "text", "comparisons": []}
    empty = {"system__memory_size": None, "system__retrieval_memory_size": None, "system__codec": None}
    return valid_results(**{**fields, **empty, **changes})


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model with a card that has no results yet."""
    card = ModelCard.load(PICO)
    card.text = card.text.partition(BEGIN)[0].rstrip() + "\n"
    card.data.eval_results = card.data.model_name = None
    card.save(tmp_path / "README.md")
    return tmp_path


def test_the_card_of_clara_pico_shows_what_its_metadata_says():
    card = ModelCard.load(PICO)
    assert card.text.count(BEGIN) == card.text.count(END) == 1
    for entry in card.data.eval_results:
        assert f"{entry.metric_value:.3f}" in card.text.partition(BEGIN)[2]


# --- reading ---------------------------------------------------------------------------------------------------------


def test_read_results_of_files_and_folders(tmp_path):
    first, second = valid_results(), text_results()
    (tmp_path / "baselines" / "bm25-text").mkdir(parents=True)
    (tmp_path / "results.json").write_text(json.dumps(first))
    (tmp_path / "baselines" / "bm25-text" / "results.json").write_text(json.dumps(second))
    assert read_results([tmp_path / "results.json"]) == [first]
    assert read_results([tmp_path]) == [first, second]  # the system itself, then its baselines


def test_read_results_refuses(tmp_path):
    path = tmp_path / "results.json"
    for missing in (path, tmp_path):
        with pytest.raises(FileNotFoundError, match="must be a results.json or a folder"):
            read_results([missing])
    bad = {
        "{": "must be JSON",
        "[1]": "JSON object",
        json.dumps(valid_results(schema_version=2)): "schema_version must be 1, got 2",
        json.dumps(valid_results(counts__failed=8)): "counts",
        json.dumps(valid_results(setting="easy")): "setting",
    }
    for text, message in bad.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            read_results([path])
        assert str(path) in str(error.value)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_table_of_several_systems():
    cells = rows(results_table([valid_results(), text_results(counts__failed=0)]))
    header, line, first, second = cells
    assert {len(row) for row in cells} == {len(header)} and set(line) == {"---"}
    assert header == ["system", "k", "codec", "f1", "em", "containment", "recall@5", "mrr", "bytes/span", "tokens",
                      "p50 ms", "failed"]  # fmt: skip
    assert first == ["clara", "16", "int8", "0.410 (0.390 to 0.430)", "0.300 (0.280 to 0.320)",
                     "0.450 (0.430 to 0.470)", "0.600 (0.580 to 0.620)", "0.550 (0.530 to 0.570)", "9,216", "130",
                     "124", "7"]  # fmt: skip
    assert second[:3] == ["bm25-text", "", ""] and second[-1] == "0"
    two = rows(results_table([valid_results(), valid_results(setting="oracle", data__name="other")]))
    assert two[0][:3] == ["data", "setting", "system"] and two[3][:2] == ["other", "oracle"]


def test_a_half_of_the_questions_is_named_wherever_results_are_shown(folder):
    """Also where all results are of one file; as data of its own beside the whole file and the other half."""
    half, other = valid_results(data__half="second"), valid_results(data__half="first")
    header, _, line = rows(results_table([half]))
    assert header[0] == "data" and line[0] == "musique, second half"
    assert rows(results_table([valid_results(), valid_results(data__half=None)]))[0][0] == "system"
    cells = rows(results_table([valid_results(), half, other]))
    assert [row[0] for row in cells[2:]] == ["musique", "musique, second half", "musique, first half"]
    assert "musique, second half, 2,417 questions" in card_section([half])
    update_card(folder, [valid_results(), half])
    splits = [entry.dataset_split for entry in ModelCard.load(folder / "README.md").data.eval_results]
    assert splits == ["all"] * (len(splits) // 2) + ["second half"] * (len(splits) // 2)
    update_card(folder, [half])
    assert len(ModelCard.load(folder / "README.md").data.eval_results) == len(splits)
    (content,) = eval_result_files([valid_results(data__half="first", data__name="org/bench")]).values()
    assert [entry["dataset"]["task_id"] for entry in content][0] == "normal_first_half_f1"


def test_tables_escape_names():
    """A name cannot add a cell, a line or markup; what is read back is the name."""
    hostile = valid_results(system__name=f"{HOSTILE}\nnext")
    hostile["comparisons"][0]["system"] = HOSTILE
    for table, column in ((results_table([hostile]), "system"), (comparison_table(hostile), "against")):
        cells = rows(table)
        assert {len(row) for row in cells} == {len(cells[0])} and len(cells) == 3
        cell = cells[2][cells[0].index(column)]
        assert not re.search(r"(?<!\\)(?:\\\\)*[|*_<>`\[\]]", cell)
        assert re.sub(r"\\(.)", r"\1", cell).startswith(HOSTILE)


def test_comparison_table():
    lines = rows(comparison_table(valid_results()))
    assert lines[0] == ["against", "metric", "difference", "p"]
    assert lines[2] == ["bm25-text", "f1", "+0.050 (+0.010 to +0.090)", "0.0100"]
    assert comparison_table(valid_results(comparisons=[])) == ""
    content = valid_results()
    content["comparisons"].append({**content["comparisons"][0], "metric": "containment", "difference": -0.125})
    assert rows(comparison_table(content))[3][1:3] == ["containment", "-0.125 (+0.010 to +0.090)"]


# --- sections --------------------------------------------------------------------------------------------------------


def test_section_is_put_in_once_and_replaced():
    card = "---\nlicense: mit\n---\n# Mine\n\nText.\n"
    first, second = card_section([valid_results()]), card_section([valid_results(metrics={"f1": 0.125})])
    once = insert_section(card, first)
    assert once == f"{card.rstrip()}\n\n{first}\n"
    assert insert_section(once, first) == once
    between = once + "\nWritten behind it.\n"
    replaced = insert_section(between, second)
    assert replaced == between.replace(first, second) and replaced.count(BEGIN) == replaced.count(END) == 1
    assert "0.125" in replaced and "0.410" not in replaced


def test_section_holds_what_a_reader_needs():
    content = valid_results()
    section = card_section([content, text_results(command="python -m recipes.evaluate --x")])
    assert section.startswith(BEGIN) and section.endswith(END)
    assert "2,417 questions" in section and content["data"]["sha256"][:12] in section and "NVIDIA H200" in section
    assert content["command"] in section and "python -m recipes.evaluate --x" in section
    assert "clara minus other systems" in section and "95 %" in section


@pytest.mark.parametrize("place", ["system__name", "data__name", "command", "hardware__accelerator"])
def test_marks_and_fences_inside_of_names_do_not_break_a_section(place):
    """Whatever a name holds, the section can be replaced as a whole, and no line of its own comes of it."""
    for evil in (f"a {END} b", f"a {BEGIN} b", "a ``` b\n```\n## Mine")[: 2 if place == "command" else 3]:
        card = insert_section("# Card\n", card_section([valid_results(**{place: evil})]))
        fresh = card_section([valid_results()])
        assert insert_section(card, fresh) == f"# Card\n\n{fresh}\n"
        assert "\n## Mine" not in card


def test_a_mark_without_its_end_costs_no_text():
    """A card whose end mark was lost keeps what its author wrote, however often it is updated."""
    card = f"# Card\n\n{BEGIN}\n\nMy own words.\n"
    for _ in range(2):
        card = insert_section(card, card_section([valid_results()]))
    assert "My own words." in card


# --- metadata --------------------------------------------------------------------------------------------------------


def test_update_card_keeps_the_card_and_its_metadata(folder):
    before = ModelCard.load(folder / "README.md")
    results = [valid_results(), text_results()]
    written = update_card(folder, results)
    assert written[0] == folder / "README.md" and all(path.exists() for path in written)
    after = ModelCard.load(folder / "README.md")
    for name, value in before.data.to_dict().items():
        assert after.data.to_dict()[name] == value, name
    assert after.text.startswith(before.text.rstrip()) and after.text.count(BEGIN) == 1
    text = (folder / "README.md").read_text()
    update_card(folder, results)
    assert (folder / "README.md").read_text() == text  # the same results change nothing


def test_model_index_round_trip(folder):
    """What the Hub's client reads back are the numbers of the CLaRa systems, none of the baselines'."""
    results = [valid_results(), text_results(), valid_results(setting="oracle", metrics={"f1": 0.5, "em": 0.25})]
    update_card(folder, results)
    found = ModelCard.load(folder / "README.md").data.eval_results
    expected = hub_results(results)
    assert [(e.dataset_config, e.metric_type, e.metric_value) for e in expected] == [
        ("normal, clara k=16 int8", "f1", 0.41), ("normal, clara k=16 int8", "em", 0.3),
        ("normal, clara k=16 int8", "containment", 0.45), ("normal, clara k=16 int8", "recall@5", 0.6),
        ("oracle, clara k=16 int8", "f1", 0.5), ("oracle, clara k=16 int8", "em", 0.25)
    ]  # fmt: skip
    key = ("task_type", "dataset_type", "dataset_name", "dataset_config", "metric_type", "metric_value", "metric_name")
    assert {tuple(getattr(e, k) for k in key) for e in found} == {tuple(getattr(e, k) for k in key) for e in expected}
    assert {e.dataset_type for e in found} == {"musique"}


def test_results_of_other_data_stay_in_the_model_index(folder):
    """An earlier evaluation, ours on another file or somebody else's benchmark, is not thrown away."""
    update_card(folder, [valid_results(data__name="hotpotqa", metrics={"f1": 0.75})])
    update_card(folder, [valid_results()])
    ours = {("musique", "f1"): 0.41, ("musique", "em"): 0.3, ("musique", "recall@5"): 0.6}
    ours |= {("musique", "containment"): 0.45}
    assert index_of(folder) == {("hotpotqa", "f1"): 0.75, **ours}
    update_card(folder, [valid_results(metrics={"f1": 0.5})])
    found = index_of(folder)
    assert found[("musique", "f1")] == 0.5 and found[("hotpotqa", "f1")] == 0.75


def test_name_of_a_model_in_the_card_stays(folder):
    card = ModelCard.load(folder / "README.md")
    card.data.model_name, card.data.eval_results = "CLaRa Pico", hub_results([valid_results()])
    card.save(folder / "README.md")
    update_card(folder, [valid_results()])
    assert ModelCard.load(folder / "README.md").data.model_name == "CLaRa Pico"


def test_eval_results_files(folder):
    results = [valid_results(data__name="org/musique.v2"), text_results(), valid_results(data__name="my data.jsonl")]
    for dataset in (None, "clara/bench"):
        files = eval_result_files(results, dataset)
        for path, content in files.items():
            assert re.fullmatch(r"\.eval_results/[\w-]+\.yaml", path)
            entries = parse_eval_result_entries(yaml.safe_load(yaml.safe_dump(content)))
            assert all(isinstance(entry, EvalResultEntry) for entry in entries)
            assert [entry.task_id for entry in entries] == [
                "normal_f1",
                "normal_em",
                "normal_containment",
                "normal_recall@5",
            ]
            assert [entry.value for entry in entries] == [0.41, 0.3, 0.45, 0.6]
            assert {entry.date for entry in entries} == {"2026-03-01T12:00:00+00:00"}
            assert entries[0].notes == "clara k=16 int8; 95 % interval 0.390 to 0.430"
        assert len(files) == 1
    ids = {content[0]["dataset"]["id"] for content in eval_result_files(results).values()}
    assert ids == {"org/musique.v2"}  # a file of somebody's is no benchmark of the Hub
    written = update_card(folder, results)
    assert [path.name for path in written[1:]] == ["org-musique-v2.yaml"]
    update_card(folder, [valid_results(data__name="org/musique.v2", setting="oracle", metrics={"f1": 0.5, "em": 0.5})])
    entries = yaml.safe_load(written[1].read_text())
    assert {entry["dataset"]["task_id"] for entry in entries} >= {"normal_f1", "oracle_f1"}  # others stay


def test_two_systems_on_the_same_task_are_told_apart():
    """CLaRa at two memory sizes: two results of one task would be one result with two values."""
    results = [valid_results(), valid_results(system__memory_size=4, metrics={"f1": 0.2})]
    (content,) = eval_result_files(results, "org/bench").values()
    tasks = [entry.task_id for entry in parse_eval_result_entries(content)]
    assert len(tasks) == len(set(tasks)) or len(tasks) == 4  # another id, or the first of them alone
    configs = [(e.dataset_config, e.metric_type) for e in hub_results(results)]
    assert len(configs) == len(set(configs))
    assert describe(results[1]) == "clara k=4 int8"


def test_baselines_alone_make_a_section_and_no_metadata(folder):
    before = ModelCard.load(folder / "README.md").data.to_dict()
    assert update_card(folder, [text_results()]) == [folder / "README.md"]
    assert ModelCard.load(folder / "README.md").data.to_dict() == before
    assert not (folder / ".eval_results").exists()


def test_a_folder_without_a_card(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a model card"):
        update_card(tmp_path, [valid_results()])
