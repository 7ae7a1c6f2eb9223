"""Documents, questions and direct calls for tests of the evaluation's systems on a tiny model.

Documents are short and one is long, so that it has several chunks; tests/evaluation/conftest.py compresses them.
"""

import torch

from modeling_clara.generation_clara import eval_mode
from recipes.evaluation.formats import Question
from recipes.evaluation.questions import EvaluationData
from recipes.evaluation.run import _predict
from recipes.evaluation.spans import Spans
from recipes.evaluation.systems import SYSTEMS, Bench

N_TOKENS = 8
PLACES = "France Germany Italy Spain Norway Egypt Peru Japan India Kenya Chile Cuba".split()
LONG = " ".join(f"The river number {number} of Austria flows through the city {number}." for number in range(9))


def documents() -> dict[str, dict]:
    found = {}
    for n, place in enumerate(PLACES):
        if n == 5:
            found["long"] = {"title": "Austria", "text": LONG}
        found[f"d{n}"] = {"title": "" if n % 3 else place, "text": f"City {n} is the capital of {place}."}
    return found


def make_data() -> EvaluationData:
    names, questions = list(documents()), []
    for n, place in enumerate(PLACES[:6]):
        others = [names[(3 * n + step) % len(names)] for step in range(4)]
        candidates = tuple(dict.fromkeys(("long", f"d{n}", *others)))
        text = f"What is the capital of {place}?" if n else "Which river flows through Austria, and where?"
        questions.append(Question(f"q{n}", text, ("Rome",), candidates[::-1], (f"d{n}",), f"x.jsonl:{n + 1}"))
    return EvaluationData("x.jsonl", "0" * 64, "multihop", questions, documents())


def nothing(texts, n):
    raise AssertionError("no candidates need to be chosen")


def predict(bench: Bench, name: str, tasks) -> list[dict]:
    return _predict(bench, SYSTEMS[name], tasks)


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in rows]


def stored(spans: Spans, names) -> list[dict]:
    """Documents for the public calls, each span one with the memory that the corpus gives back."""
    return [
        {"id": f"{name}/{row}", **spans.document(row), "memory": spans.memories([row], 4)[0]}
        for name in names
        for row in spans.rows[name]
    ]


def generate(model, question: str, texts: list[dict], role: str | None) -> str:
    """The answer of one question to texts in the prompt, without any of the evaluation's code."""
    prompt = model.processor.build_prompt(question, 0, 4, text_documents=texts)
    ids = torch.tensor([prompt.input_ids])
    config = model.build_generation_config(None, N_TOKENS)
    with torch.no_grad(), eval_mode(model), model.roles.use(role):
        embeddings = model.backbone.get_input_embeddings()(ids)
        found = model.backbone.generate(
            inputs_embeds=embeddings, attention_mask=torch.ones_like(ids), generation_config=config
        )
    return model.decode_answer(found[0].tolist(), config.eos_token_id)
