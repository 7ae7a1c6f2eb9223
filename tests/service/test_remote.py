"""RemoteGenerator against a server that runs the merged generator: equal answers, and every way it can fail."""

import asyncio

import pytest
import torch
from completions_server import CompletionsServer
from service_readings import embed_prompts
from tiny import DOCUMENTS, QUESTIONS, randomize_adapters, save_backbone
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_clara import CLaRaForRAG, CompressedCorpus, cli
from modeling_clara.generator import generator_fingerprint, merge_generator, read_marker, served_name
from modeling_clara.service import remote
from modeling_clara.service.remote import GeneratorError, RemoteGenerator

TOKENS = 12


@pytest.fixture(scope="module")
def merged(shared_model, tmp_path_factory):
    return merge_generator(shared_model, tmp_path_factory.mktemp("merged") / "generator")


@pytest.fixture
def server(merged):
    with CompletionsServer(merged) as server:
        yield server


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    openai = pytest.importorskip("openai")
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)


def readings(model) -> list[torch.Tensor]:
    """Embeddings of prompts of different length, with memories and, the last, with text."""
    prompts = embed_prompts(model, QUESTIONS, DOCUMENTS, TOKENS)
    return [*prompts, *embed_prompts(model, QUESTIONS[:1], DOCUMENTS, TOKENS, expand=1)]


def expected(model) -> list[str]:
    """The answers in process to what `readings` asks."""
    texts = [model.answer([question], documents=DOCUMENTS, max_new_tokens=TOKENS)[0].text for question in QUESTIONS]
    return [*texts, model.answer(QUESTIONS[:1], documents=DOCUMENTS, max_new_tokens=TOKENS, expand=1)[0].text]


def use(server, clara, work, **options):
    """The result of `work(generator)` with a generator that is connected to the server."""

    async def run():
        generator = RemoteGenerator(server.base_url, **options)
        try:
            await generator.connect(clara)
            return await work(generator)
        finally:
            await generator.close()

    return asyncio.run(run())


async def pieces(generator, prompt, **options) -> list[str]:
    return [piece async for piece in generator.stream(prompt, TOKENS, **options)]


def test_what_is_merged_is_a_plain_model(shared_model, merged, tmp_path):
    before = {name: tensor.clone() for name, tensor in shared_model.state_dict().items()}
    assert merge_generator(shared_model, merged) == merged  # over an earlier one
    assert all(torch.equal(tensor, before[name]) for name, tensor in shared_model.state_dict().items())
    assert sorted(path.name for path in merged.parent.iterdir()) == ["generator"]  # nothing is left beside it
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    assert type(plain) is type(shared_model.backbone) and not list(merged.glob("*.py"))
    assert tokenizer.chat_template == shared_model.processor.tokenizer.chat_template
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(), shared_model.roles.use("generator"):
        wanted = shared_model.backbone(input_ids=ids).logits
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=ids).logits, wanted, atol=1e-4)
    assert read_marker(merged)["compressor"] == shared_model.fingerprint
    assert read_marker(merged)["generator"] == generator_fingerprint(shared_model)
    half = shared_model.merge_generator(tmp_path / "half", dtype=torch.bfloat16)
    rounded = AutoModelForCausalLM.from_pretrained(half, dtype="auto").state_dict()
    assert all(torch.equal(t.to(torch.bfloat16), rounded[name]) for name, t in plain.state_dict().items())


def test_a_link_stays_one_and_a_volume_is_refused(shared_model, tmp_path, monkeypatch):
    link, folder = tmp_path / "link", tmp_path / "disk" / "generator"
    link.symlink_to(folder)
    for _ in range(2):  # over an earlier one too
        assert merge_generator(shared_model, link) == link
        assert link.is_symlink() and read_marker(folder) == read_marker(link)
    monkeypatch.setattr("os.path.ismount", lambda path: path == folder)
    with pytest.raises(ValueError, match="a folder in it"):
        merge_generator(shared_model, link)


@pytest.mark.parametrize(
    "architecture, tied", [("qwen2", True), ("phi3", False), ("gemma2", True), ("gpt_neox", False)]
)
def test_other_architectures(architecture, tied, tmp_path):
    backbone = save_backbone(tmp_path / "backbone", architecture, tied=tied)
    model = CLaRaForRAG.from_backbone(backbone, memory_sizes=(2,), lora_rank=4)
    randomize_adapters(model)
    plain = AutoModelForCausalLM.from_pretrained(model.merge_generator(tmp_path / "merged"))
    states = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), model.roles.use("generator"):
        wanted = model.backbone(inputs_embeds=states).logits
    with torch.no_grad():
        assert torch.allclose(plain(inputs_embeds=states).logits, wanted, atol=1e-4)


def test_a_half_loaded_model_merges_its_exact_adapters(shared_model, merged, tmp_path):
    shared_model.save_pretrained(tmp_path / "model", include_backbone=True)
    half = CLaRaForRAG.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert generator_fingerprint(half) == generator_fingerprint(shared_model)
    whole = AutoModelForCausalLM.from_pretrained(half.merge_generator(tmp_path / "merged", dtype=torch.float32))
    for name, tensor in AutoModelForCausalLM.from_pretrained(merged).state_dict().items():
        assert torch.allclose(whole.state_dict()[name], tensor, atol=0.01), name


def test_a_folder_with_something_else_is_kept(shared_model, backbone_folder, tmp_path):
    before = {path.name: path.read_bytes() for path in backbone_folder.iterdir()}
    with pytest.raises(ValueError, match="`path` must be a new folder or that of a merged generator"):
        shared_model.merge_generator(backbone_folder)  # a language model, but not ours
    assert {path.name: path.read_bytes() for path in backbone_folder.iterdir()} == before
    merged = shared_model.merge_generator(tmp_path / "merged")
    (merged / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes.txt"):
        shared_model.merge_generator(merged)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="must be a folder"):
        shared_model.merge_generator(tmp_path / "file")
    with pytest.raises(ValueError, match="`dtype` must be one of"):
        shared_model.merge_generator(tmp_path / "new", dtype=torch.int8)
    assert not (tmp_path / "new").exists()


def test_answers_equal_those_in_process(server, shared_model):
    prompts, wanted = readings(shared_model), expected(shared_model)
    server.pause = 0.001

    async def work(generator):
        texts = await generator.generate(prompts, TOKENS)
        return texts, [await pieces(generator, prompt) for prompt in prompts]

    texts, streams = use(server, shared_model, work)
    assert texts == wanted and ["".join(stream) for stream in streams] == wanted
    assert any(len(stream) > 2 for stream in streams)
    assert server.peak == len(prompts)  # they were sent at the same time
    stops = shared_model.build_generation_config(None, TOKENS).eos_token_id
    assert all(request["stop_token_ids"] == stops and request["prompt"] is None for request in server.requests)


def test_a_seed_samples_the_same_text(server, shared_model):
    prompt = readings(shared_model)[0]

    async def work(generator):
        options = {"temperature": 1.5, "top_p": 0.9}
        texts = [(await generator.generate([prompt], TOKENS, seed=seed, **options))[0] for seed in (1, 1, 2)]
        return texts, "".join(await pieces(generator, prompt, seed=1, **options))

    texts, stream = use(server, shared_model, work)
    assert texts[0] == texts[1] == stream != texts[2]


def test_busy_and_lost_connections_are_tried_again(server, shared_model):
    prompt, wanted = readings(shared_model)[0], expected(shared_model)[0]
    faults = ["429", "503", "cut"]

    async def work(generator):
        server.faults = [*faults]
        texts = await generator.generate([prompt], TOKENS)
        server.faults = ["429 after 0.1", "500"]
        return [*texts, "".join(await pieces(generator, prompt))]

    assert use(server, shared_model, work) == [wanted, wanted]


@pytest.mark.parametrize("fault, status", [("429", 503), ("503", 503), ("500", 502)])
def test_tries_are_bounded(server, shared_model, fault, status):
    prompt = readings(shared_model)[0]

    async def work(generator):
        server.requests.clear()
        server.faults = [fault] * 20
        with pytest.raises(GeneratorError, match=f"answered {fault}") as error:
            await generator.generate([prompt], TOKENS)
        return error.value.status

    assert use(server, shared_model, work) == status
    assert len(server.requests) == 1 + remote.RETRIES


def test_a_stream_that_is_cut_is_an_error(server, shared_model):
    prompt = readings(shared_model)[0]

    async def work(generator):
        server.faults = ["cut"]
        stream, seen = generator.stream(prompt, TOKENS), []
        with pytest.raises(GeneratorError) as error:
            async for piece in stream:
                seen.append(piece)
        return error.value.status, "".join(seen), await generator.generate([prompt], TOKENS)

    status, seen, (text,) = use(server, shared_model, work)
    assert status == 503 and text.startswith(seen) and seen != text and text == expected(shared_model)[0]


def test_a_server_that_hangs_is_given_up(server, shared_model):
    prompt = readings(shared_model)[0]

    async def work(generator):
        generator.timeout = 0.3
        server.faults = ["hang", "hang"]
        with pytest.raises(GeneratorError, match="must answer within 0.3 s") as error:
            await generator.generate([prompt], TOKENS)
        with pytest.raises(GeneratorError, match="must answer within 0.3 s"):
            await pieces(generator, prompt)
        return error.value.status

    assert use(server, shared_model, work) == 504


def test_closing_a_stream_stops_the_server(server, shared_model):
    prompt = readings(shared_model)[0]

    async def work(generator):
        server.pause = 0.05
        stream = generator.stream(prompt, TOKENS)
        await anext(stream)
        await stream.aclose()
        for _ in range(100):
            if server.left:
                return True
            await asyncio.sleep(0.05)

    assert use(server, shared_model, work)


def test_what_does_not_fit_the_window_or_is_not_finite(server, shared_model):
    prompt = readings(shared_model)[0]

    async def work(generator):
        with pytest.raises(ValueError, match=f"must have <= 512 positions.*got {len(prompt)} \\+ 600"):
            await generator.generate([prompt], 600)
        with pytest.raises(ValueError, match="finite"):
            await generator.generate([prompt * float("nan")], TOKENS)
        generator.max_length = None  # as if the server had not told
        with pytest.raises(ValueError, match="too long.*maximum context length is 512"):
            await generator.generate([prompt.repeat(20, 1)], TOKENS)

    use(server, shared_model, work)


async def nothing(_):
    return None


def test_another_models_generator_is_refused(merged, shared_model, backbone_folder, tmp_path):
    """By its name, or by what it says of a memory whatever its name is."""
    with CompletionsServer(merged, served_name(generator_fingerprint(shared_model))) as server:
        use(server, shared_model, nothing)
        server.name = served_name("0" * 64)
        with pytest.raises(ValueError, match="but `clara-generator-0000000000000000` is another one"):
            use(server, shared_model, nothing)
    other = CLaRaForRAG.from_backbone(backbone_folder, memory_sizes=(2, 4), lora_rank=4)
    randomize_adapters(other, seed=7)
    wide = save_backbone(tmp_path / "wide", hidden_size=64)
    for folder in (other.merge_generator(tmp_path / "other"), backbone_folder, wide):
        with CompletionsServer(folder) as server, pytest.raises(ValueError, match="`generator` is another one"):
            use(server, shared_model, nothing)
    half = shared_model.merge_generator(tmp_path / "half", dtype=torch.bfloat16)
    with CompletionsServer(half) as server:  # rounding is no other model
        use(server, shared_model, nothing)


def test_servers_that_cannot_serve(merged, shared_model):
    with CompletionsServer(merged, prompt_embeds=False) as server:
        with pytest.raises(GeneratorError, match="Start vLLM with --enable-prompt-embeds"):
            use(server, shared_model, nothing)
    with CompletionsServer(merged, api_key="secret") as server:
        with pytest.raises(GeneratorError, match="answered 401"):
            use(server, shared_model, nothing)
        use(server, shared_model, nothing, api_key="secret")
        with pytest.raises(ValueError, match="`model` of the generator must be one that .* serves, got 'mine'"):
            use(server, shared_model, nothing, model="mine", api_key="secret")
    with pytest.raises(GeneratorError, match="cannot be reached") as error:  # it is closed now
        use(server, shared_model, nothing)
    assert error.value.status == 503
    with pytest.raises(ValueError, match="must be an address"):
        RemoteGenerator("localhost:8000")
    with pytest.raises(RuntimeError, match="not connected"):
        asyncio.run(RemoteGenerator("http://localhost/v1").generate([], 1))


def test_the_command_prints_how_to_serve(shared_model, merged, tmp_path, capsys):
    shared_model.save_pretrained(tmp_path / "model", include_backbone=True)
    command = ["merge", str(tmp_path / "model"), "-o", str(tmp_path / "a generator"), "--dtype", "float32"]
    assert cli.main(command) == 0
    name = served_name(generator_fingerprint(shared_model))
    line = f"vllm serve '{tmp_path / 'a generator'}' --served-model-name {name} --enable-prompt-embeds"
    assert line in capsys.readouterr().out and name in (tmp_path / "a generator" / "README.md").read_text()
    weights = (tmp_path / "a generator" / "model.safetensors").read_bytes()
    assert weights == (merged / "model.safetensors").read_bytes()
    assert cli.main([*command, "--json"]) == 0 and name in capsys.readouterr().out
    assert cli.main([*command[:3], str(tmp_path / "model")]) == 1
    assert "`--output` must be a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--collection", "c"], "`--collection` must go with `--milvus`"),
        (["--generator-model", "m"], "`--generator-model` must go with `--generator`"),
        (["--generator", "localhost:8000"], "must be an address such as http://HOST:8000/v1"),
    ],
)
def test_wrong_options_of_serve(options, message, shared_model, tmp_path, capsys):
    pytest.importorskip("fastapi")
    shared_model.save_pretrained(tmp_path / "model", include_backbone=True)
    CompressedCorpus.build(shared_model, DOCUMENTS, tmp_path / "corpus")
    command = ["serve", str(tmp_path / "corpus"), "--model", str(tmp_path / "model"), "--port", "0", *options]
    assert cli.main(command) == 1 and message in capsys.readouterr().err
