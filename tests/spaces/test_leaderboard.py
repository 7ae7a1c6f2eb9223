"""The leaderboard's reading, table and plots: what is wrong is listed, what is right is shown, by number.

It stands on results of results_factory.py in folders and on the loopback Hub; the page itself is tested in a browser.
"""

import json
import os
import runpy
import time
from pathlib import Path

import board
import pytest
from hub_server import Failure
from huggingface_hub import CommitOperationAdd, HfApi
from leaderboard_plots import MAX_ERROR_BARS, cost_figure
from leaderboard_revisions import EXISTS, MAX_FAILURES, MISSING, UNCHECKED, RevisionChecker
from leaderboard_rules import check_submission
from leaderboard_source import Source, identity
from leaderboard_table import columns_of, filtered, layout, make_frame, metric_names, ordered, ranked
from leaderboard_text import escaped, link
from results_factory import DATA_FILES, PLACES, PROBLEMS, limited, valid_results


def write(folder: Path, files: dict[str, object], data_files: object = DATA_FILES) -> Path:
    """A results repository in a folder; bytes are written as they are."""
    for name, content in {**{f"results/{k}": v for k, v in files.items()}, "data_files.json": data_files}.items():
        if content is not None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def load(folder: Path):
    return Source(folder, check_revisions=False).load()


# --- reading ---------------------------------------------------------------------------------------------------------


def test_invalid_files_are_listed_and_hide_nothing(tmp_path):
    bad = {f"bad/{i}.json": valid_results(**changes) for i, (changes, _) in enumerate(PROBLEMS + PLACES)}
    contents = {"a": b"{", "b": b"x" * 10_000_000, "c": b'{"a":1,"a":2}', "d": b"[]"}
    junk = {f"junk/{name}.json": content for name, content in contents.items()}
    good = {f"good/{i}.json": valid_results(system__name=f"s{i}") for i in range(3)}
    loaded = load(write(tmp_path, {**bad, **junk, **good, "notes.txt": b"no results"}))
    assert [entry.path for entry in loaded.entries] == [f"results/good/{i}.json" for i in range(3)]
    reasons = {refused.path: " ".join(refused.reasons) for refused in loaded.refused}
    assert sorted(reasons) == sorted(f"results/{name}" for name in (*bad, *junk)) and loaded.warnings == []
    for i, (_, reason) in enumerate(PROBLEMS + PLACES):
        assert reason in reasons[f"results/bad/{i}.json"]
    assert "10,000,000" in reasons["results/junk/b.json"] and "twice" in reasons["results/junk/c.json"]


def test_the_newer_of_two_wins(tmp_path):
    old = valid_results(created="2026-03-02T23:00:00-05:00")  # 4 o'clock of the third in UTC
    new = valid_results(created="2026-03-03T05:00:00+00:00", metrics={"f1": 0.1})
    other = valid_results(created="2026-01-01T00:00:00+00:00", system__codec="int4")
    loaded = load(write(tmp_path, {"b.json": old, "a.json": new, "c.json": other}))
    assert [entry.path for entry in loaded.entries] == ["results/a.json", "results/c.json"]
    (refused,) = loaded.refused
    assert refused.path == "results/b.json" and "are in results/a.json, which is newer" in refused.reasons[0]


def test_a_half_is_shown_as_data_of_its_own(tmp_path):
    half = {**limited(), "data": {**limited()["data"], "half": "second"}}
    files = {"whole.json": valid_results(), "half.json": half, "old.json": valid_results(data__half=None)}
    frame = make_frame(load(write(tmp_path, files)).entries)
    assert sorted(frame["data"]) == ["musique", "musique (second half)"]  # old and new files of all questions are one


def test_a_folder_without_data_files_is_shown_with_a_warning(tmp_path):
    loaded = load(write(tmp_path, {"a.json": valid_results(model__repo=None), "b.json": limited()}, None))
    assert len(loaded.entries) == 2 and "no data_files.json" in loaded.warnings[0]
    write(tmp_path, {}, {"musique": {"sha256": 1}})
    assert "'musique' must have sha256" in load(tmp_path).warnings[0]
    with pytest.raises(ValueError, match="`results` must be a folder that exists or a dataset repo.*nowhere"):
        Source(tmp_path / "nowhere")


def test_a_folder_of_runs_is_read_by_the_name_of_its_files(tmp_path):
    for place in ("", "baselines/text/"):
        (tmp_path / "run" / place).mkdir(parents=True)
        path = tmp_path / "run" / place / "results.json"
        path.write_text(json.dumps(valid_results(system__name=f"at {place}")))
        path.with_name("run.json").write_text("{}")  # not ours
    loaded = load(tmp_path)
    assert [entry.path for entry in loaded.entries] == ["run/baselines/text/results.json", "run/results.json"]
    assert not loaded.refused
    (tmp_path / "run").rename(tmp_path / "results")  # a run below results/ is still a run: its other files are its own
    (tmp_path / "results" / "memories").mkdir()
    (tmp_path / "results" / "memories" / "corpus.json").write_text("{}")
    loaded = load(tmp_path)
    assert len(loaded.entries) == 2 and not loaded.refused


def test_runs_with_other_options_are_other_measurements_and_some_are_no_submissions():
    base = valid_results()
    for changes in ({"options__min_score": 0.5}, {"options__weights": "x"}, {"corpus__documents": 7}):
        assert identity(valid_results(**changes)) != identity(base)
    assert identity(valid_results(created="2026-03-02T12:00:00+00:00")) == identity(base)
    for name, value in (("num_candidates", 1), ("limit", 10)):
        (problem,) = check_submission(valid_results(**{f"options__{name}": value}), DATA_FILES)
        assert problem.startswith(f"options.{name} must be ")


def test_a_second_read_sees_changes(tmp_path):
    source = Source(write(tmp_path, {"a.json": valid_results()}), check_revisions=False)
    assert len(source.load().entries) == 1
    write(tmp_path, {"a.json": valid_results(schema_version=3), "b.json": valid_results(system__name="new")})
    loaded = source.load()
    assert [entry.path for entry in loaded.entries] == ["results/b.json"] and len(loaded.refused) == 1
    os.remove(tmp_path / "results" / "b.json")
    assert source.load().entries == []


def test_a_dataset_of_the_hub_is_read_at_its_commit(hub):
    api, repo, model = HfApi(), "loopback/board", "loopback/board-model"
    api.create_repo(repo, repo_type="dataset")
    api.create_repo(model)
    revision = api.model_info(model).sha
    files = {
        "data_files.json": DATA_FILES,
        "results/x/a.json": valid_results(model__repo=model, model__revision=revision),
        "results/x/b.json": valid_results(model__repo=model),
        "results/x/c.json": valid_results(model__repo="loopback/nobody"),
        "results/x/large.json": " " * 1_500_000,
    }
    operations = [CommitOperationAdd(path, json.dumps(content).encode()) for path, content in files.items()]
    commit = api.create_commit(repo, operations, commit_message="results", repo_type="dataset").oid
    source = Source(repo)
    loaded = source.load()
    assert loaded.place == f"dataset {repo} at commit {commit}"
    assert [(entry.path, entry.model_state) for entry in loaded.entries] == [("results/x/a.json", EXISTS)]
    assert [refused.path[-6:] for refused in loaded.refused] == ["b.json", "c.json", "e.json"]
    assert "has no commit aaaaaaaaaaaa" in loaded.refused[0].reasons[0]
    assert not [path for _, path in hub.requests if "/resolve/" in path and path.endswith("large.json")]
    hub.failures.append(Failure(f"/api/datasets/{repo}", status=500, times=50))
    try:
        again = source.load()
    finally:
        hub.failures.clear()
    assert again.entries == loaded.entries and "cannot be read now (500)" in again.warnings[0]
    assert "cannot be read now (404)" in Source("loopback/no-board").load().warnings[0]


def test_models_that_cannot_be_looked_up_are_unchecked(hub):
    HfApi().create_repo("loopback/there")
    HfApi().create_repo("loopback/hidden", private=True)
    there, hidden = ((name, HfApi().model_info(name).sha) for name in ("loopback/there", "loopback/hidden"))
    checker = RevisionChecker()
    asked = [there, hidden, ("loopback/there", "f" * 40), ("loopback/nobody", "f" * 40)]
    assert checker.check(asked) == {there: EXISTS} | dict.fromkeys(asked[1:], MISSING)
    hub.failures.append(Failure("/api/models/loopback/", status=500, times=500))
    try:
        many = [("loopback/there", f"{i:040x}") for i in range(100)]
        n_before = len(hub.requests)
        assert set(checker.check(many).values()) == {UNCHECKED}
        assert MAX_FAILURES <= len(hub.requests) - n_before < 50  # then it gives up
        assert checker.check([there]) == {there: EXISTS}  # known
    finally:
        hub.failures.clear()
    assert sorted(RevisionChecker(max_checks=1).check([there, ("x/y", "f" * 40)]).values()) == [EXISTS, UNCHECKED]


# --- table and plots -------------------------------------------------------------------------------------------------


def frame_of(tmp_path, *changes):
    files = {f"{i}.json": valid_results(**{"system__name": f"s{i}", **change}) for i, change in enumerate(changes)}
    return make_frame(load(write(tmp_path, files)).entries)


def test_rows_are_sorted_by_number(tmp_path):
    sizes = [900.0, 10_000.0, None, 1e15, 85.5]
    frame = frame_of(tmp_path, *({"efficiency__bytes_per_span": size} for size in sizes))
    column = next(column for column in columns_of([]) if column.key == "bytes_per_span")
    for is_rising, expected in ((True, ["s4", "s0", "s1", "s3", "s2"]), (False, ["s3", "s1", "s0", "s4", "s2"])):
        assert ordered(frame, column, is_rising)["system"].tolist() == expected
    shown = layout(frame, [column], (0, True))
    assert shown["headers"] == ["Bytes/span ▲"] and shown["data"][:3] == [[900.0], [10_000.0], [None]]
    assert [row[0] for row in shown["metadata"]["display_value"]] == ["900", "10,000", "–", "1e+15", "86"]


def test_metrics_have_intervals_and_an_order(tmp_path):
    metrics = [{"f1": 0.2, "p50": 0.9, "system": 0.1}, {"f1": 0.41234}, {"fluency": 0.5}]
    frame = frame_of(tmp_path, *({"metrics": scores} for scores in metrics))
    assert metric_names(frame) == ["f1"]  # no other name takes the place of a column
    assert ranked(frame, "f1")["system"].tolist() == ["s1", "s0", "s2"] and len(ranked(frame, None)) == 3
    shown = layout(ranked(frame, "f1"), columns_of(["f1"])[3:4])
    assert shown["metadata"]["display_value"] == [["0.412 [0.392, 0.432]"], ["0.200 [0.180, 0.220]"], ["–"]]


def test_filters(tmp_path):
    text = {"system__kind": "text", "system__memory_size": None, "system__codec": None}
    named, qwen = {"system__name": "Alpha"}, {"model__backbone": "Qwen3"}
    frame = frame_of(tmp_path, named, {"system__memory_size": 4}, text, qwen)
    assert filtered(frame, "ALPHA musique")["system"].tolist() == ["Alpha"]
    assert filtered(frame, "qwen3")["system"].tolist() == ["s3"] and filtered(frame, "(")["system"].tolist() == []
    assert filtered(frame, None, memory_size="4", kind="all")["system"].tolist() == ["s1"]
    assert filtered(frame, "", kind="text", data="musique")["system"].tolist() == ["s2"]
    assert len(filtered(frame, "", codec="int8")) == 3 and len(filtered(frame, "", memory_size="nonsense")) == 0
    empty = make_frame([])
    assert len(filtered(empty, "x", kind="text")) == 0 and layout(empty, columns_of([]))["data"] == []


@pytest.mark.parametrize(
    "text", ["<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "${1}{{2}}`", "a\u202eb\n"]
)
def test_text_of_strangers_stays_text(tmp_path, text):
    frame = frame_of(tmp_path, {"system__name": text, "model__backbone": text, "system__codec": text})
    shown = layout(frame, columns_of([])[:2])
    cells = json.dumps([shown["data"], shown["metadata"]])
    assert not any(part in cells for part in ("<img", "${", "{{", "`", "\\u202e"))
    figure = cost_figure(frame, "f1", "p50").to_json()
    assert "<img" not in figure and "${" not in figure
    for url in ("javascript:alert(1)", "data:text/html,x", "https://a.org/\"onclick='x'", "//a.org", ""):
        assert "<a" not in link(text, url)
    address = 'href="https://a.org/?a=1&amp;b" target="_blank" rel="noopener'
    assert link("x", "https://a.org/?a=1&b").startswith(f"<a {address}")
    assert escaped("a" * 500) == "a" * 79 + "…"


def test_plots_draw_what_is_known(tmp_path):
    closed = {"system__kind": "closed_book", "efficiency__bytes_per_span": None, "efficiency__latency_ms": None}
    frame = frame_of(tmp_path, {"metrics": {"f1": 0.3}}, {"metrics": {"em": 0.3}}, closed)
    figure = cost_figure(frame, "f1", "bytes_per_span")
    (points,) = figure.data
    assert (list(points.x), list(points.y), points.name) == ([9216.0], [0.3], "clara")
    assert points.error_y.array[0] == pytest.approx(0.02) and "2 without bytes" in figure.layout.xaxis.title.text
    for rows, name in ((frame[:0], "f1"), (frame, None), (frame, "nonsense"), (frame[2:], "f1")):
        assert "No result" in cost_figure(rows, name, "p50").layout.annotations[0].text


def test_a_thousand_results(tmp_path):
    files = {f"{i}.json": valid_results(system__name=f"clara {i}") for i in range(1000)}
    source = Source(write(tmp_path, files), check_revisions=False)
    start = time.perf_counter()
    loaded = source.load()
    seconds = time.perf_counter() - start
    assert len(loaded.entries) == 1000 and seconds < 12, seconds  # about 1 second alone on two cores
    frame = make_frame(loaded.entries)
    assert len(filtered(frame, "clara 999")) == 1
    (points,) = cost_figure(frame, "f1", "p50").data
    assert len(points.x) == 1000 > MAX_ERROR_BARS and points.error_y.array is None
    assert source.load().entries == loaded.entries


def test_the_page_is_built_without_a_browser(tmp_path, monkeypatch):
    """Every tab is there with its number; test_leaderboard_browser.py opens and clicks them."""
    gradio = pytest.importorskip("gradio", reason="the page is made with gradio")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    app = runpy.run_path(str(board.FOLDER / "app.py"))
    files = {"a.json": valid_results(), "b.json": valid_results(setting="oracle"), "c.json": {}}
    page = app["build_app"](Source(write(tmp_path, files), check_revisions=False))
    labels = [block.label for block in page.blocks.values() if isinstance(block, gradio.Tab)]
    assert {"normal (1)", "oracle (1)", "Invalid (1)", "Submit"} <= set(labels)
    assert app["LAUNCH"]["run_history"] is False
