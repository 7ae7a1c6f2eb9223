"""What a system takes, milliseconds by part and bytes of a chunk, and what happens when a prompt is too long."""

import pytest
from evaluation_systems import N_TOKENS, predict

from modeling_clara.codecs_clara import Codec
from recipes.evaluation.formats import Question
from recipes.evaluation.systems import COMPARING, SYSTEMS, Bench, Clock, read, span_bytes, time_one
from recipes.evaluation.tasks import Task


@pytest.mark.parametrize("name", SYSTEMS)
def test_parts_of_the_time(bench, tasks, name):
    """Milliseconds of what a system does; what it does not do takes none; the parts sum to the total."""
    if name == "dense_text":
        pytest.skip("needs an encoder")
    times = time_one(bench, SYSTEMS[name], tasks[0])
    assert list(times) == ["query", "search", "read", "decode", "total"]
    assert times["total"] == pytest.approx(sum(times[part] for part in ("query", "search", "read", "decode")))
    assert times["read"] > 0 and times["decode"] > 0
    assert (times["query"] > 0) == (SYSTEMS[name].retriever in COMPARING)
    assert (times["search"] > 0) == (SYSTEMS[name].ranks)


def test_more_tokens_take_longer_to_decode_and_not_to_read(bench, tasks):
    """What comes after the first token falls into `decode`: `read` ends with it."""
    found = {}
    for n in (1, 60):
        bench.max_new_tokens = n
        times = [time_one(bench, SYSTEMS["clara"], tasks[1]) for _ in range(4)]
        found[n] = {part: min(time[part] for time in times) for part in ("read", "decode")}
    assert found[1]["decode"] < found[1]["read"]
    assert found[60]["decode"] > 5 * found[1]["decode"] and found[60]["read"] < found[60]["decode"]


@pytest.mark.parametrize("codec", ["float16", "int8", "int4"])
def test_bytes_of_a_span(shared_model, memories, codec):
    """k vectors as the codec stores them; of a text its title and text in UTF-8."""
    spans, hidden = memories[codec], shared_model.config.text_config.hidden_size
    for size in (2, 4):
        bench = Bench(shared_model, spans, 2, size, 2, N_TOKENS)
        expected = size * Codec(codec, 4, hidden, spans.corpus.snapshot.codec.state).vector_bytes
        assert span_bytes(bench, SYSTEMS["clara"], [0, 5]) == expected
    least = {"float16": 2 * hidden, "int8": hidden, "int4": hidden // 2}[codec]
    assert least <= spans.corpus.snapshot.codec.vector_bytes <= least + 16
    assert span_bytes(bench, SYSTEMS["text"], [0]) == len("France\nCity 0 is the capital of France.")
    assert span_bytes(bench, SYSTEMS["text"], []) is None


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_codecs_rank_nearly_as_float16(bench, memories, tasks, codec):
    scores = predict(bench, "clara", tasks)
    bench.spans = memories[codec]
    for row, exact in zip(predict(bench, "clara", tasks), scores, strict=True):
        ours, theirs = (dict(zip(r["retrieved"], r["scores"], strict=True)) for r in (row, exact))
        assert ours == pytest.approx(theirs, abs=0.02 if codec == "int8" else 0.2)
        assert row["span_bytes"] < exact["span_bytes"]


def test_a_prompt_beyond_the_window_is_named(bench, tasks):
    long = Question("q", "river " * 400, ("x",), tasks[0].question.candidates, (), "x.jsonl:1")
    for name in ("clara", "clara_expand", "text", "closed_book"):
        with pytest.raises(ValueError, match="window of 512 tokens"):
            read(bench, SYSTEMS[name], [Task(long, long.candidates, ())], [[0]], Clock())
