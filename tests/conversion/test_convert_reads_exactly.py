"""What recipes/convert_reference.py reads of prompts, templates and backbones: exactly, or not at all."""

import json
from pathlib import Path

import pytest
import torch
from reference import CODE, MISTRAL, NO_SYSTEM, PARAPHRASE, PROMPTS, N, Reference
from safetensors.torch import load_file, save_file
from tiny import save_backbone

from modeling_clara import CLaRaForRAG
from recipes.conversion.convert import convert
from recipes.conversion.prompts import parse_prompts

ANSWER = "prompt_system = 'Use the notes. Be short.'"
OTHER = """
    def _blend_prompt_and_selected_memory_tokens(self, query, answer=None):
        prompt_system = {system!r}
        prompt_user = f"Notes:\\n{{docs}}\\n\\nAsked:{{query}}"
"""


def test_prompts_are_what_the_code_would_make():
    assert parse_prompts(CODE, "x.py") == PROMPTS
    assert parse_prompts(CODE + OTHER.format(system=PROMPTS["system_prompt"]), "x.py") == PROMPTS
    braces = CODE.replace(repr(PARAPHRASE), repr(["Notes {{all}}: {docs}", "Again: {docs}"]))
    assert parse_prompts(braces, "x.py")["paraphrase_prompts"][0] == "Notes {all}: {documents}"
    split = CODE.replace(ANSWER, "prompt_system = ('Use the notes. '\n            'Be ' + 'short.')")
    assert parse_prompts(split.encode(), "x.py") == PROMPTS


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (ANSWER, ANSWER + "\n        prompt_system += ' Now.'"),
        (ANSWER, ANSWER + "\n        if query: prompt_system = 'Long.'"),
        (ANSWER, "prompt_system = 'Use %s.' % 'notes'"),
        (ANSWER, "prompt_system = SYSTEM"),
        ("Asked:{query}", "Asked:\\ {query}"),
        ("class Reference:", "class Reference:" + OTHER.format(system="Another instruction.")),
    ],
)
def test_prompts_that_only_running_the_code_would_tell_are_refused(old, new):
    assert old in CODE
    with pytest.raises(ValueError, match="--prompts FILE.json"):
        parse_prompts(CODE.replace(old, new), "x.py")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "must have one chat template, found none"),
        ({"default": MISTRAL, "rag": MISTRAL}, "found several"),
        (MISTRAL.replace("bos_token", "raise_exception('only user turns')"), "only user turns"),
        (NO_SYSTEM.replace("{{ raise_exception('System role not supported') }}", "{% continue %}"), "leaves out the"),
        (MISTRAL.replace("x['content'] }} [/INST]", "x['content'] }}{{ x['content'] }} [/INST]"), "exactly once"),
    ],
)
def test_a_template_that_shows_something_else_is_refused(template, words, tmp_path):
    reference = Reference(tmp_path, template=template)
    with pytest.raises(ValueError, match=words):
        convert(reference.source, tmp_path / "ours", str(reference.place))
    assert not (tmp_path / "ours").exists()


def without(place: Path, name: str) -> None:
    tensors = load_file(place / "model.safetensors")
    del tensors[name]
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_a_backbone_without_all_of_its_weights_is_refused(name, tmp_path):
    reference = Reference(tmp_path)
    without(reference.place, name)
    with pytest.raises(ValueError, match=f"must have {name} of shape"):
        convert(reference.source, tmp_path / "ours", str(reference.place))


def test_a_backbone_that_scales_its_embeddings_is_refused(tmp_path):
    reference = Reference(tmp_path)
    place = save_backbone(tmp_path / "gemma", "gemma2")
    with pytest.raises(ValueError, match="must not scale its embeddings"):
        convert(reference.source, tmp_path / "ours", str(place))


def test_a_table_without_the_head_is_refused_unless_it_is_tied(tmp_path):
    reference = Reference(tmp_path)
    del reference.tables["lm_head.weight"]
    reference.write()
    with pytest.raises(ValueError, match="must hold lm_head.weight"):
        convert(reference.source, tmp_path / "ours", str(reference.place))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"generation_top_k": "5"}, "generation_top_k"), ({"generation_top_k": 0}, "generation_top_k")],
)
def test_settings_of_a_wrong_type_are_one_sentence(settings, words, tmp_path):
    reference = Reference(tmp_path)
    reference.write(**settings)
    with pytest.raises(ValueError, match=words):
        convert(reference.source, tmp_path / "ours", str(reference.place))


@pytest.mark.parametrize(
    "auto_map", ["modeling_theirs.Reference", ["x"], {"AutoModel": "org/repo--modeling_theirs.R"}]
)
def test_any_auto_map_leads_to_the_code(auto_map, tmp_path):
    reference = Reference(tmp_path)
    reference.write(auto_map=auto_map)
    convert(reference.source, tmp_path / "ours", str(reference.place))


def test_what_is_left_out_is_said_and_a_relative_backbone_is_found_from_everywhere(tmp_path, monkeypatch):
    reference = Reference(tmp_path)
    reference.adapters["fourth_adapter"] = {7: torch.zeros(1)}
    reference.write()
    monkeypatch.chdir(tmp_path)
    conversion = convert(Path("src"), Path("ours"), "backbone")
    assert conversion.notes == ["left out: the adapter fourth_adapter, which no role has"]
    monkeypatch.chdir(tmp_path.parent)
    model = CLaRaForRAG.from_pretrained(tmp_path / "ours")
    assert model.config.backbone_name_or_path == str(reference.place)


@pytest.mark.parametrize(
    "template", [MISTRAL, NO_SYSTEM, MISTRAL.replace("{{ x['content'] }} [", "{{ x['content'] | trim }} [")]
)
@pytest.mark.parametrize(
    "prompts", [("\n Use it.\n", "{question} \n Notes: {documents}"), ("Use. ", " {documents}\n{question} ")]
)
def test_templates_strip_what_they_strip_of_the_reference(template, prompts, tmp_path):
    """Blanks around an instruction, and at the ends of a question that begins or ends the user's turn."""
    system, answer = prompts
    reference = Reference(tmp_path, template=template, kind="bytes")
    given = PROMPTS | {"system_prompt": system, "answer_prompt": answer}
    (tmp_path / "prompts.json").write_text(json.dumps(given), encoding="utf-8-sig")
    convert(reference.source, tmp_path / "ours", str(reference.place), tmp_path / "prompts.json")
    processor = CLaRaForRAG.from_pretrained(tmp_path / "ours").processor
    for question in ("Why?", "  Why? "):
        slots = "".join(f"<MEM{i}>" for i in range(N)) + "<SEP>"
        user = answer.replace("{documents}", slots).replace("{question}", question)
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        if template is NO_SYSTEM:
            messages = [{"role": "user", "content": f"{system}\n{user}"}]
        text = reference.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected = reference._ids(text)
        prompt = processor.build_prompt(question, 1, N)
        found = [-1 if is_slot else token for token, is_slot in zip(prompt.input_ids, prompt.memory_mask, strict=True)]
        assert found == [-1 if token >= reference.n_tokens else token for token in expected]


def test_an_answer_is_trained_as_the_template_writes_it(tmp_path):
    reference = Reference(tmp_path)
    convert(reference.source, tmp_path / "ours", str(reference.place))
    processor = CLaRaForRAG.from_pretrained(tmp_path / "ours").processor
    prompt = processor.build_prompt("Why?", 1, N, "Rome")
    target = [token for token in prompt.labels if token != -100]
    assert target == reference.tokenizer("<s> Rome</s>", add_special_tokens=False)["input_ids"][1:]
