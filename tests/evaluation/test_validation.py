"""The checks of results.json: what is wrong is named, whatever stands in a file; what is right passes.

The same file travels with the leaderboard, whose own rules are tested here too; its reading is in tests/spaces/.
"""

import copy
import functools
import itertools
import operator

import board  # noqa: F401
import leaderboard_rules as rules
import pytest
from jsonschema import Draft202012Validator
from results_factory import DATA_FILES, PLACES, PROBLEMS, limited, valid_results

from recipes.evaluation import validation

WITHOUT_LIMIT = "Evaluate without --limit."


def test_valid_results_have_no_problem():
    external = {"system__kind": "external", "system__url": "https://a.org/x", "model__repo": None}
    external["model__revision"] = None
    for changes in ({}, {"efficiency__latency_ms": None, "corpus": None}, {"metrics": {"f1": 0.2}}, external):
        assert rules.check_submission(valid_results(**changes), DATA_FILES) == []
    assert validation.check_results(limited()) == [] and rules.check_place(limited(), DATA_FILES)
    Draft202012Validator.check_schema(validation.load_schema())


@pytest.mark.parametrize("changes, reason", PROBLEMS, ids=[reason[:40] for _, reason in PROBLEMS])
def test_every_problem_is_named(changes, reason):
    problems = validation.check_results(valid_results(**changes))
    assert any(reason in problem for problem in problems) and len(problems) <= 3
    assert all(problem.isprintable() and len(problem) <= 300 for problem in problems)


@pytest.mark.parametrize("changes, reason", PLACES, ids=[reason[:40] for _, reason in PLACES])
def test_what_only_the_leaderboard_asks_for(changes, reason):
    results = valid_results(**changes)
    assert validation.check_results(results) == []
    assert any(reason in problem for problem in rules.check_submission(results, DATA_FILES))


def half_results(n: int = 10, **changes) -> dict:
    """Valid results of the second half of the data."""
    results = limited(n)
    results["data"] |= {"half": "second", **changes}
    return results


def test_a_half_is_accepted_as_data_of_its_own_and_a_limited_run_is_not():
    (problem,) = rules.check_submission(limited(), DATA_FILES)
    assert problem == "data.questions must be all of musique (2417), got 10. " + WITHOUT_LIMIT
    assert rules.check_submission(half_results(), DATA_FILES) == []
    (problem,) = rules.check_submission(valid_results(data__half="second"), DATA_FILES)
    assert problem.startswith("data.questions must be less than all of musique (2417) where data.half is 'second'")
    assert any("third" in problem for problem in validation.check_results(valid_results(data__half="third")))


def test_a_half_must_be_whole_where_its_size_is_known():
    musique = {**DATA_FILES["musique"], "halves": {"first": 2407, "second": 10}}
    known = {**DATA_FILES, "musique": musique}
    assert rules.check_data_files(known) == []
    for whole in ({}, {"file_questions": 2417}):  # older results do not say it
        assert rules.check_submission(half_results(**whole), known) == []
        assert rules.check_submission(valid_results(**{f"data__{k}": v for k, v in whole.items()}), known) == []
        (problem,) = rules.check_submission(half_results(9, **whole), known)
        assert problem == "data.questions must be all of the second half of musique (10), got 9. " + WITHOUT_LIMIT
    for halves in ({"first": 1, "second": 10}, {"first": 2417}, [1], {"first": 2418, "second": -1}):
        (problem,) = rules.check_data_files({"musique": {**musique, "halves": halves}})
        assert "'musique' must have halves" in problem and "2417" in problem


def test_the_questions_of_the_whole_file_are_held_against_those_that_were_asked():
    part = {**limited(), "options": {"limit": 10}}
    part["data"]["file_questions"] = 2417
    for results in (valid_results(data__file_questions=2417), half_results(file_questions=2417), part):
        assert validation.check_results(results) == []
    rule = "data.file_questions must be "
    (problem,) = validation.check_results(valid_results(data__file_questions=2418))
    assert problem.startswith(f"{rule}exactly data.questions (2417), got 2418")
    (problem,) = validation.check_results(half_results(file_questions=9))
    assert problem.startswith(f"{rule}at least data.questions (10), got 9")
    (problem,) = rules.check_submission(half_results(file_questions=20), DATA_FILES)
    assert problem.startswith(f"{rule}all of musique (2417), got 20")


@pytest.mark.parametrize("content", [None, [], "x", 3, {}, {"schema_version": 1}, {"schema_version": [1]}])
def test_anything_may_be_checked(content):
    assert rules.check_submission(content, DATA_FILES)
    assert rules.check_submission(content, None)


def places(node: object, keys: tuple = ()) -> list[tuple]:
    """The keys that lead to each value of a JSON value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [(*keys, key) for key, _ in items] + [path for key, item in items for path in places(item, (*keys, key))]


def test_whatever_stands_in_a_file_is_told_and_breaks_nothing():
    """Every value of a valid file is replaced by every kind of value, and every key removed."""
    strange = [None, True, -1, 0, 0.5, "", "a" * 200, [], [1], {}, {"x": 1}, float("nan"), "remove"]
    base = valid_results(metrics={"f1": 0.5, "recall@5": 0.5})
    paths, n_refused = places(base), 0
    for (*above, last), value in itertools.product(paths, strange):
        results = copy.deepcopy(base)
        place = functools.reduce(operator.getitem, above, results)
        place[last] = value
        if value == "remove":
            del place[last]
        problems = validation.check_results(results)
        assert problems or validation.VALIDATOR.is_valid(results), (*above, last, value)
        n_refused += bool(problems)
    assert len(paths) > 80 and n_refused > 7 * len(paths) and not validation.check_results(base)


@pytest.mark.parametrize(
    "text, reason",
    [
        (b"{", "must be JSON: .* at line 1, column 2"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "got 'c' twice"),
        (b"\xff\xfe", "must be UTF-8"),
        (b"[" * 200_000, "nested too deeply|must be JSON"),
        (b" " * 2_000_000, "at most 1,000,000 bytes, got 2,000,000"),
        (b"1" * 6000, "must be JSON"),
        (b"", "must be JSON"),
    ],
)
def test_bytes_that_are_no_json(text, reason):
    with pytest.raises(ValueError, match=reason):
        validation.parse_results(text)
