"""Figures: which runs make one picture, the numbers beside memories and documents, PNG files that are drawn."""

import numpy as np
import pytest
import torch
from evaluation_runs import write_rows
from matplotlib.image import imread
from results_factory import metric, valid_results

from recipes import figures


def run(k: int, **changes) -> dict:
    sizes = {"system__memory_size": k, "efficiency__bytes_per_span": 256.0 * k, "metrics__f1": metric(0.1 * k)}
    return valid_results(**{**sizes, **changes})


def labels(texts) -> list[str]:
    return [text.get_text().split("\n")[0] for text in texts]


def test_runs_are_sorted_and_baselines_left_out():
    runs = figures.select_runs([run(8), run(4), run(4, system__kind="text", system__memory_size=None)])
    assert [content["system"]["memory_size"] for content in runs] == [4, 8]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model__fingerprint": "f" * 64}, "one model"),
        ({"data__sha256": "0" * 64}, "one data file"),
        ({"setting": "oracle"}, "one setting"),
        ({"data__half": "first"}, "one half of the questions"),
        ({"system__codec": "int4"}, "one codec"),
        ({"system__name": "other"}, "one system"),
        ({"system__memory_size": 4}, "at least two memory sizes"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        figures.plot_rate([run(4), run(8, **changes)])


def test_rate_draws_every_point_with_its_interval():
    answers, retrieval = figures.plot_rate([run(4), run(8)]).axes
    line = next(line for line in answers.lines if len(line.get_xdata()) == 2)
    assert list(line.get_xdata()) == [1024.0, 2048.0]
    np.testing.assert_allclose(line.get_ydata(), [0.4, 0.8])
    assert labels(answers.get_xticklabels()) == ["k = 4", "k = 8"]
    assert labels(answers.get_legend().get_texts()) == ["f1", "em", "containment"]
    assert "recall@5" in labels(retrieval.get_legend().get_texts())


def test_states_are_the_means_that_the_loss_compares(shared_model, documents):
    documents = [documents[1], documents[3], {"title": "", "text": "short"}]
    texts, memories = figures.mean_states(shared_model, documents, 4)
    for index, ids in enumerate(shared_model.processor.encode_documents(documents)):
        with torch.no_grad():
            memory, states = shared_model.encode("compressor", torch.tensor([ids]), torch.tensor([len(ids)]), 4)
        np.testing.assert_allclose(texts[index], states[0, : len(ids)].mean(0).numpy(), atol=1e-5)
        np.testing.assert_allclose(memories[index], memory[0].mean(0).numpy(), atol=1e-5)


def test_numbers_beside_the_states():
    documents = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert figures.describe_states(documents, documents) == {"mse": 0.0, "cosine": 1.0, "nearest": 1.0}
    assert figures.describe_states(documents, documents[::-1]) == {"mse": 1.0, "cosine": 0.0, "nearest": 0.0}


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_the_command_draws_states(checkpoint, tmp_path, capsys, method):
    rows = [{"title": f"T{n}", "text": f"The {n} rivers of Rome."} for n in range(6)]
    data, output = write_rows(tmp_path / "texts.jsonl", rows), tmp_path / "new" / f"{method}.png"
    command = ["states", str(checkpoint), "--data", str(data), "--output", str(output), "--method", method]
    assert figures.main(command) == 0 and "nearest" in capsys.readouterr().out
    assert imread(output).std() > 0.05  # something is drawn


def test_bad_input_is_an_error_and_draws_nothing(checkpoint, tmp_path, capsys):
    data, output = write_rows(tmp_path / "texts.jsonl", [{"text": "one"}]), str(tmp_path / "x.png")
    for command, message in (
        (["states", str(checkpoint), "--data", str(data), "--output", output], "at least 4 documents"),
        (["rate", str(tmp_path), "--output", output], "results.json"),
        (["rate", str(tmp_path), "--output", str(tmp_path / "x.pdf")], ".png"),
    ):
        assert figures.main(command) == 1 and message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]
