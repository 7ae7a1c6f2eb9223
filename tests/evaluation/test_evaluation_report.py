"""`evaluation/report.py`: what results files become in tables, cards and metadata, read by the Hub's client."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from results_factory import valid_results

from recipes.evaluation import report
from recipes.evaluation.report import BEGIN, END, update_card

PICO = Path(__file__).parents[2] / "model_cards" / "clara-pico" / "README.md"
HOSTILE = "a|b*c_d_ [x](http://y) <b>`z`\\"


def rows(table: str) -> list[list[str]]:
    """Cells of a Markdown table, as a reader of GFM cuts them."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]] for line in table.splitlines()]


def entries_of(folder: Path) -> list:
    return ModelCard.load(folder / "README.md").data.eval_results


def text_results(**changes) -> dict:
    fields = {"system__name": "bm25-text", "system__kind": "text", "system__reader": "text", "comparisons": []}
    fields |= dict.fromkeys(("system__memory_size", "system__retrieval_memory_size", "system__codec"))
    return valid_results(**{**fields, **changes})


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


def test_read_results_of_files_and_folders(tmp_path):
    path, below = tmp_path / "results.json", tmp_path / "baselines" / "bm25-text" / "results.json"
    below.parent.mkdir(parents=True)
    first, second = valid_results(), text_results()
    path.write_text(json.dumps(first))
    below.write_text(json.dumps(second))
    assert report.read_results([path]) == report.read_results([tmp_path], with_baselines=False) == [first]
    assert report.read_results([tmp_path]) == [first, second]  # the system itself, then its baselines


def test_read_results_refuses(tmp_path):
    path = tmp_path / "results.json"
    for missing in (path, tmp_path):
        with pytest.raises(FileNotFoundError, match="must be a results.json or a folder"):
            report.read_results([missing])
    bad = {"{": "JSON: ", "[1]": "valid results: .*JSON object"}
    bad[json.dumps(valid_results(schema_version=2))] = "valid results: schema_version must be 1, got 2"
    bad[json.dumps(valid_results(setting="easy"))] = "valid results: setting"
    for text, message in bad.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path} must be {message}"):
            report.read_results([path])


def test_table_of_several_systems():
    cells = rows(report.results_table([valid_results(), text_results(counts__failed=0)]))
    header, line, first, second = cells
    assert {len(row) for row in cells} == {len(header)} and set(line) == {"---"}
    assert dict(zip(header, first, strict=True)) == {
        "system": "clara", "k": "16", "codec": "int8", "f1": "0.410 (0.390 to 0.430)", "em": "0.300 (0.280 to 0.320)",
        "containment": "0.450 (0.430 to 0.470)", "recall@5": "0.600 (0.580 to 0.620)",
        "mrr": "0.550 (0.530 to 0.570)", "bytes/span": "9,216", "tokens": "130", "p50 ms": "124", "failed": "7",
    }  # fmt: skip
    assert second[:3] == ["bm25-text", "", ""] and second[-1] == "0"
    two = rows(report.results_table([valid_results(), valid_results(setting="oracle", data__name="other")]))
    assert two[0][:3] == ["data", "setting", "system"] and two[3][:2] == ["other", "oracle"]


def test_a_half_of_the_questions_is_named_wherever_results_are_shown(folder):
    """Also if all results are of one file; as data of its own beside the whole file and the other half."""
    half, other = valid_results(data__half="second"), valid_results(data__half="first", data__name="org/bench")
    header, _, line = rows(report.results_table([half]))
    assert header[0] == "data" and line[0] == "musique, second half"
    assert rows(report.results_table([valid_results(), valid_results(data__half=None)]))[0][0] == "system"
    cells = rows(report.results_table([valid_results(), half, other]))
    assert [row[0] for row in cells[2:]] == ["musique", "musique, second half", "org/bench, first half"]
    assert "musique, second half, 2,417 questions" in report.card_section([half])
    update_card(folder, [valid_results(), half])
    splits = [entry.dataset_split for entry in entries_of(folder)]
    assert splits == ["all"] * (len(splits) // 2) + ["second half"] * (len(splits) // 2)
    update_card(folder, [half])
    assert len(entries_of(folder)) == len(splits)
    (content,) = report.eval_result_files([other]).values()
    assert content[0]["dataset"]["task_id"] == "normal_first_half_f1"


def test_tables_escape_names():
    """A name cannot add a cell, a line or markup; what is read back is the name."""
    hostile = valid_results(system__name=f"{HOSTILE}\nnext")
    hostile["comparisons"][0]["system"] = HOSTILE
    for table, column in ((report.results_table([hostile]), "system"), (report.comparison_table(hostile), "against")):
        cells = rows(table)
        assert {len(row) for row in cells} == {len(cells[0])} and len(cells) == 3
        cell = cells[2][cells[0].index(column)]
        assert not re.search(r"(?<!\\)(?:\\\\)*[|*_<>`\[\]]", cell)
        assert re.sub(r"\\(.)", r"\1", cell).startswith(HOSTILE)


def test_comparison_table():
    content = valid_results()
    content["comparisons"].append({**content["comparisons"][0], "metric": "containment", "difference": -0.125})
    header, _, *lines = rows(report.comparison_table(content))
    assert header == ["against", "metric", "difference", "p"]
    assert lines == [
        ["bm25-text", "f1", "+0.050 (+0.010 to +0.090)", "0.0100"],
        ["bm25-text", "containment", "-0.125 (+0.010 to +0.090)", "0.0100"],
    ]
    assert report.comparison_table(valid_results(comparisons=[])) == ""


def test_section_is_put_in_once_and_replaced():
    card = "---\nlicense: mit\n---\n# Mine\n\nText.\n"
    first, second = report.card_section([valid_results()]), report.card_section([valid_results(metrics={"f1": 0.125})])
    once = report.insert_section(card, first)
    assert once == f"{card.rstrip()}\n\n{first}\n" and report.insert_section(once, first) == once
    between = once + "\nWritten after it.\n"
    assert report.insert_section(between, second) == between.replace(first, second)
    assert "0.125" in second and "0.410" not in second
    without_end = f"# Card\n\n{BEGIN}\n\nMy own words.\n"  # its author's words stay, however often it is updated
    assert "My own words." in report.insert_section(report.insert_section(without_end, first), second)


def test_section_holds_what_a_reader_needs():
    content = valid_results()
    section = report.card_section([content, text_results(command="python -m recipes.evaluate --x")])
    assert section.startswith(BEGIN) and section.endswith(END)
    words = ["2,417 questions", content["data"]["sha256"][:12], "NVIDIA H200", content["command"], "95 %"]
    for word in (*words, "python -m recipes.evaluate --x", "clara minus other systems"):
        assert word in section


@pytest.mark.parametrize("place", ["system__name", "data__name", "command", "hardware__accelerator"])
def test_marks_and_fences_inside_of_names_do_not_break_a_section(place):
    """Whatever a name holds, the section can be replaced as a whole, and no line of its own comes of it."""
    for evil in (f"a {END} b", f"a {BEGIN} b", "a ``` b\n```\n## Mine")[: 2 if place == "command" else 3]:
        card = report.insert_section("# Card\n", report.card_section([valid_results(**{place: evil})]))
        fresh = report.card_section([valid_results()])
        assert report.insert_section(card, fresh) == f"# Card\n\n{fresh}\n" and "\n## Mine" not in card


def test_update_card_keeps_the_card_and_its_metadata(folder):
    before = ModelCard.load(folder / "README.md")
    results = [valid_results(), text_results()]
    assert update_card(folder, [text_results()]) == [folder / "README.md"]  # baselines alone: no metadata
    assert ModelCard.load(folder / "README.md").data.to_dict() == before.data.to_dict()
    assert update_card(folder, results) == [folder / "README.md"] and not (folder / ".eval_results").exists()
    after = ModelCard.load(folder / "README.md")
    assert after.data.to_dict().items() >= before.data.to_dict().items()
    assert after.text.startswith(before.text.rstrip()) and after.text.count(BEGIN) == 1
    text = (folder / "README.md").read_text()
    update_card(folder, results)
    assert (folder / "README.md").read_text() == text  # the same results change nothing


def test_model_index_round_trip(folder):
    """What the Hub's client reads back are the numbers of the CLaRa systems, none of the baselines'."""
    results = [valid_results(), text_results(), valid_results(setting="oracle", metrics={"f1": 0.5, "em": 0.25})]
    update_card(folder, results)
    scores = {"normal": {"f1": 0.41, "em": 0.3, "containment": 0.45, "recall@5": 0.6}}
    scores["oracle"] = {"f1": 0.5, "em": 0.25}
    expected = [
        ("musique", f"{setting}, clara k=16 int8", name, value)
        for setting, metrics in scores.items()
        for name, value in metrics.items()
    ]
    for entries in (entries_of(folder), report.hub_results(results)):
        found = [(e.dataset_type, e.dataset_config, e.metric_type, e.metric_value) for e in entries]
        assert sorted(found) == sorted(expected)


def test_results_of_other_data_and_the_name_of_the_model_stay_in_the_model_index(folder):
    """An earlier evaluation, ours on another file or somebody else's benchmark, is not thrown away."""
    card = ModelCard.load(folder / "README.md")
    card.data.model_name = "CLaRa Pico"
    card.data.eval_results = report.hub_results([valid_results(data__name="hotpotqa", metrics={"f1": 0.75})])
    card.save(folder / "README.md")
    update_card(folder, [valid_results()])
    update_card(folder, [valid_results(metrics={"f1": 0.5})])
    found = {(entry.dataset_name, entry.metric_type): entry.metric_value for entry in entries_of(folder)}
    assert found == {("hotpotqa", "f1"): 0.75, ("musique", "f1"): 0.5, ("musique", "em"): 0.3} | {
        ("musique", "recall@5"): 0.6, ("musique", "containment"): 0.45
    }  # fmt: skip
    assert ModelCard.load(folder / "README.md").data.model_name == "CLaRa Pico"


def test_eval_results_files(folder):
    results = [valid_results(data__name="org/musique.v2"), text_results(), valid_results(data__name="my data.jsonl")]
    names = {None: "org-musique-v2", "clara/bench": "clara-bench"}  # a file of somebody's is no benchmark of the Hub
    for dataset, name in names.items():
        ((path, content),) = report.eval_result_files(results, dataset).items()
        assert path == f".eval_results/{name}.yaml"
        entries = parse_eval_result_entries(yaml.safe_load(yaml.safe_dump(content)))
        assert {entry.dataset_id for entry in entries} == {dataset or "org/musique.v2"}
        found = {entry.task_id: entry.value for entry in entries}
        assert found == {"normal_f1": 0.41, "normal_em": 0.3, "normal_containment": 0.45, "normal_recall@5": 0.6}
        assert {entry.date for entry in entries} == {"2026-03-01T12:00:00+00:00"}
        assert entries[0].notes == "clara k=16 int8; 95 % interval 0.390 to 0.430"
    _, path = update_card(folder, results)
    assert path.name == "org-musique-v2.yaml"
    update_card(folder, [valid_results(data__name="org/musique.v2", setting="oracle", metrics={"f1": 0.5, "em": 0.5})])
    tasks = {entry["dataset"]["task_id"] for entry in yaml.safe_load(path.read_text())}
    assert tasks >= {"normal_f1", "oracle_f1"}  # others stay


def test_two_systems_on_the_same_task_are_told_apart():
    """CLaRa at two memory sizes: two results of one task would be one result with two values."""
    results = [valid_results(), valid_results(system__memory_size=4, metrics={"f1": 0.2})]
    (content,) = report.eval_result_files(results, "org/bench").values()
    values = {entry.task_id: entry.value for entry in parse_eval_result_entries(content)}
    assert len(values) == len(content) == 4 and values["normal_f1"] == 0.41  # the first of them alone
    configs = [(entry.dataset_config, entry.metric_type) for entry in report.hub_results(results)]
    assert len(configs) == len(set(configs)) and report.describe(results[1]) == "clara k=4 int8"


def test_a_folder_without_a_card_or_with_one_that_is_no_yaml(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a model card"):
        update_card(tmp_path, [valid_results()])
    (tmp_path / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(ValueError, match="must begin with YAML between two lines of ---"):
        update_card(tmp_path, [valid_results()])


def test_the_card_says_what_the_threshold_of_a_model_refuses(folder):
    calibration = {"min_score": 0.4312, "max_loss": 0.05, "lost": 0.045, "refused": {"same subject": 0.31}}
    calibration |= {"questions": {"answerable": 1200, "same subject": 435}, "half": "first", "num_candidates": 20}
    calibration |= {"data": ["hotpotqa.jsonl"], "unanswerable": ["squad2.jsonl"]}
    text = report.calibration_text(calibration)
    assert "cosine of 0.4312" in text and "31.0% of 435 (same subject)" in text and "1,200 answerable" in text
    assert "`overlap_weight`" not in text  # measured without words, or before there were some
    calibration["overlap_weight"] = 0.25
    text = report.calibration_text(calibration)
    assert "less up to 0.25 for" in text
    assert "loses 4.5% (hotpotqa.jsonl, squad2.jsonl, first half; 20 candidates each)" in text
    update_card(folder, [valid_results()])
    assert "0.4312" not in (folder / "README.md").read_text()
    (folder / "calibration.json").write_text(json.dumps(calibration))
    update_card(folder, [valid_results()])
    assert text in (folder / "README.md").read_text()
