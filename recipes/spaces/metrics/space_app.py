"""The page of a metric's Space: predictions and references as JSON in, scores out.

One file for all metrics: `recipes.spaces.publish` copies it as app.py beside the module that it loads. It replaces
`evaluate.utils.launch_gradio_widget`, which Gradio 6 breaks.
"""

import json
from collections.abc import Callable
from pathlib import Path

import evaluate
import gradio as gr

FOLDER = Path(__file__).resolve().parent


def find_module(folder: Path) -> Path:
    """The Python file in a folder that is neither the page itself nor the checks of rows."""
    modules = sorted(path for path in folder.glob("*.py") if path.name not in ("app.py", "checked_rows.py"))
    if len(modules) != 1:
        raise FileNotFoundError(f"{folder} must have one metric beside app.py, got {modules}. Run a metric's app.py.")
    return modules[0]


def read_json(name: str, text: str, kind: type) -> list | dict:
    """The value of a text box, or an error on the page."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise gr.Error(f"`{name}` must be JSON: {error}. Put texts in double quotes.") from error
    if not isinstance(value, kind):
        example = "[...]" if kind is list else '{"per_question": true}'
        raise gr.Error(f"`{name}` must be a JSON {kind.__name__}, got {type(value).__name__}. Write {example}.")
    return value


def make_compute(metric: evaluate.Metric) -> Callable[[str, str, str], dict]:
    """The function behind the button: JSON texts in, scores out; what the metric refuses becomes an error there."""

    def compute(predictions: str, references: str, options: str) -> dict:
        rows = {"predictions": read_json("predictions", predictions, list)}
        rows["references"] = read_json("references", references, list)
        try:
            return metric.compute(**rows, **read_json("options", options or "{}", dict))
        except (ImportError, TypeError, ValueError) as error:
            raise gr.Error(str(error)) from error

    return compute


def read_examples(folder: Path) -> list[list[str]]:
    """Rows for the page out of cases.json, whose inputs are predictions, references and options."""
    examples = []
    for case in json.loads((folder / "cases.json").read_text(encoding="utf-8")):
        inputs = case["inputs"]
        parts = [inputs.pop("predictions"), inputs.pop("references"), inputs]
        examples.append([json.dumps(part, ensure_ascii=False) for part in parts])
    return examples


def build(folder: Path) -> gr.Interface:
    """The page of the metric in a folder; nothing is served yet."""
    module = find_module(folder)
    metric = evaluate.load(str(module))
    labels = {"predictions (JSON list)": 4, "references (JSON list)": 4, "options (JSON object, may be empty)": 1}
    return gr.Interface(
        make_compute(metric),
        inputs=[gr.Textbox(label=label, lines=lines) for label, lines in labels.items()],
        outputs=gr.JSON(label="scores"),
        title=module.stem,
        description=metric.description,
        article=(folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)[-1],
        examples=read_examples(folder),
        cache_examples=False,
        flagging_mode="never",
    )


if __name__ == "__main__":
    build(FOLDER).launch()
