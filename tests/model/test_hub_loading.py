"""Checkpoints on the loopback Hub: its users' keywords, pinned revisions, private repos, the cache, cut downloads.

What a checkpoint holds and refuses is in test_checkpoint.py, which shares the helpers.
"""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Failure
from huggingface_hub import HfApi
from tiny import DOCUMENTS, QUESTIONS, randomize_adapters, save_backbone
from transformers import AutoModel

from modeling_clara import CLaRaForRAG

# huggingface_hub 2.4 uploads in a way that its own HTTP client calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")

BACKBONE, CHECKPOINT, VERSIONS = "loading/backbone", "loading/clara", "loading/versions"
TEXTS = {"documents": DOCUMENTS, "questions": QUESTIONS}


def observe(model=TEXTS) -> dict:
    """Everything of a model that a checkpoint must keep, as JSON values: floats come back exactly."""
    return {
        "answers": [answer.text for answer in model.answer(**TEXTS, max_new_tokens=8)],
        "memory": model.compress(TEXTS["documents"]).tolist(),
        "queries": model.encode_queries(TEXTS["questions"]).tolist(),
        "prompt": list(model.processor.build_prompt("Why?", 2, 4)),
        "fingerprint": model.fingerprint,
    }


CLEAN_PROCESS = f"""
import json, sys
sys.modules["modeling_clara"] = None  # an import of the package fails
import peft, torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, GenerationConfig
optional = {{"bm25s", "datasets", "faiss", "pyarrow", "pymilvus"}}
before = optional & set(sys.modules)  # what transformers and peft take
TEXTS, keywords = {TEXTS!r}, {{"trust_remote_code": True, "revision": "v1"}}
{inspect.getsource(observe)}
config, processor, model = parts = [
    auto.from_pretrained("{VERSIONS}", **keywords) for auto in (AutoConfig, AutoProcessor, AutoModel)
]
seen = observe(model)
model.processor = processor
assert observe(model) == seen and config.to_dict() == model.config.to_dict()
assert all(type(part).__module__.startswith("transformers_modules.") for part in parts), parts
assert optional & set(sys.modules) == before, optional & set(sys.modules)
model.save_pretrained("again")
print(json.dumps(seen))
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def upload(folder: Path, repo: str, **keywords) -> str:
    """Commit a folder to a repo, which is made where needed; returns the commit."""
    api = HfApi()
    api.create_repo(repo, exist_ok=True, private=keywords.pop("private", None))
    return api.upload_folder(repo_id=repo, folder_path=folder, **keywords).oid


def new_model(backbone: str, seed: int = 1, **fields) -> CLaRaForRAG:
    fields = {"document_max_length": 64, "retrieval_top_k": 2, **fields}
    model = CLaRaForRAG.from_backbone(backbone, memory_sizes=(2, 4), lora_rank=4, config_kwargs=fields)
    randomize_adapters(model, seed)
    return model


@pytest.fixture(scope="module")
def backbone_commit(backbone_folder) -> str:
    return upload(backbone_folder, BACKBONE)


@pytest.fixture(scope="module")
def hub_model(backbone_commit) -> CLaRaForRAG:
    """A model on the backbone in the Hub, for tests that only read it."""
    return new_model(BACKBONE)


@pytest.fixture(scope="module")
def seen(hub_model) -> dict:
    return observe(hub_model)


@pytest.fixture(scope="module")
def saved(hub_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    hub_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def commit(saved) -> str:
    """The commit of `hub_model` in `CHECKPOINT`."""
    return upload(saved, CHECKPOINT)


@pytest.fixture
def requests(hub):
    """A function that returns the requests to the Hub since the start of the test, as (method, path)."""
    start = len(hub.requests)
    return lambda: hub.requests[start:]


@pytest.mark.parametrize("revision", [None, "main", "whole commit"])
def test_from_backbone_pins_the_commit(backbone_commit, revision, tmp_path):
    revision = backbone_commit if revision == "whole commit" else revision
    CLaRaForRAG.from_backbone(BACKBONE, memory_sizes=(2, 4), revision=revision).save_pretrained(tmp_path)
    for name, field in (("config.json", "backbone_revision"), ("reasoner/adapter_config.json", "revision")):
        assert json.loads((tmp_path / name).read_text())[field] == backbone_commit
    assert f"base_model: {BACKBONE}" in (tmp_path / "README.md").read_text()


@pytest.fixture(scope="module")
def versions(backbone_commit, tmp_path_factory) -> list[tuple[CLaRaForRAG, Path, str]]:
    """Models, folders and commits of a repo: on main tagged v1, on the branch next, on main; each with own code."""
    made = []
    for number, (branch, layout) in enumerate((("main", "windows"), ("next", "tokens"), ("main", "tokens"))):
        folder = tmp_path_factory.mktemp("version")
        model = new_model(BACKBONE, seed=10 + number, memory_layout=layout)
        model.save_pretrained(folder)
        with open(folder / "memory_clara.py", "a") as code:
            code.write(f"\nVERSION = {number}\n")
        if branch == "next":
            HfApi().create_branch(VERSIONS, branch=branch)
        made.append((model, folder, upload(folder, VERSIONS, revision=branch)))
        if number == 0:
            HfApi().create_tag(VERSIONS, tag="v1")
    return made


def test_a_revision_picks_the_weights_of_that_commit(versions):
    wanted = {None: 2, "v1": 0, "next": 1} | {sha: number for number, (_, _, sha) in enumerate(versions)}
    for revision, number in wanted.items():
        model = CLaRaForRAG.from_pretrained(VERSIONS, revision=revision)
        assert model.fingerprint == versions[number][0].fingerprint
    assert AutoModel.from_pretrained(VERSIONS, revision="v1").fingerprint == versions[0][0].fingerprint


def test_a_clean_process_loads_weights_and_code_of_a_revision_by_id(versions, hub, tmp_path):
    """Without our package and optional ones, silently, and without the question whether to run remote code."""
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    run = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN_PROCESS],
        env={**environment, **hub.environment(tmp_path / "home")},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0 and not run.stderr, run.stderr
    model, folder, _ = versions[0]
    assert json.loads(run.stdout) == observe(model)
    assert b"VERSION = 0" in (tmp_path / "again/memory_clara.py").read_bytes()
    assert contents(tmp_path / "again") == contents(folder)


@pytest.mark.parametrize("source, revision", [(CHECKPOINT, "v9"), ("loading/nothing", "main"), ("no/such/id", "main")])
def test_an_unknown_id_or_revision_is_named(commit, source, revision):
    match = rf"(?s)`config.json` must be in {source} \(revision {revision}\).*check id, revision and token"
    with pytest.raises(FileNotFoundError, match=match):
        CLaRaForRAG.from_pretrained(source, revision=revision)
    source = BACKBONE if source == CHECKPOINT else source
    with pytest.raises(OSError, match=rf"(?s)the backbone `{source}`.*could not be loaded"):
        CLaRaForRAG.from_backbone(source, revision=revision)


def test_a_pinned_backbone_is_loaded_although_its_repo_moved_on(backbone_folder, tmp_path):
    """Without the pin the other weights are an error, and a pin that is gone is named."""
    repo = "loading/moving"
    upload(backbone_folder, repo)
    model, saved = new_model(repo), tmp_path / "saved"
    model.save_pretrained(saved)
    upload(save_backbone(tmp_path / "second", seed=1), repo)
    seen = observe(model)
    assert observe(CLaRaForRAG.from_pretrained(saved)) == seen
    for revision, error, match in (
        (None, ValueError, rf"the weights of the backbone `{repo}` must be those.*Pass `backbone=PATH`"),
        ("0" * 40, OSError, rf"(?s)`{repo}` \(revision 0{{40}}\) could not be found.*`backbone=PATH`"),
    ):
        edit_json(saved / "config.json", backbone_revision=revision)
        with pytest.raises(error, match=match):
            CLaRaForRAG.from_pretrained(saved)
    assert observe(CLaRaForRAG.from_pretrained(saved, backbone=backbone_folder)) == seen


def test_private_repos_need_a_token_which_is_saved_nowhere(backbone_folder, hub, tmp_path):
    upload(backbone_folder, "loading/private-backbone", private=True)
    model = CLaRaForRAG.from_backbone("loading/private-backbone", memory_sizes=(2, 4), token=hub.token)
    model.save_pretrained(tmp_path / "saved")
    upload(tmp_path / "saved", "loading/private", private=True)
    loaded = CLaRaForRAG.from_pretrained("loading/private", token=hub.token)
    assert observe(loaded) == observe(model)
    loaded.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "saved")
    assert not any(hub.token.encode() in content for content in contents(tmp_path).values())
    told = {False: "private repository.*token", hub.add_token("stranger"): "token", "hf_wrong": "Invalid credentials"}
    for token, reason in told.items():
        with pytest.raises(OSError, match=rf"(?s)`loading/private-backbone` could not be loaded.*{reason}"):
            CLaRaForRAG.from_backbone("loading/private-backbone", token=token, cache_dir=tmp_path / "cache")
        with pytest.raises(FileNotFoundError, match=r"(?s)`config.json` must be in loading/private .*and token"):
            CLaRaForRAG.from_pretrained("loading/private", token=token, cache_dir=tmp_path / "cache")


def test_a_cache_serves_without_the_hub(commit, backbone_folder, seen, requests, tmp_path):
    offline = {"cache_dir": tmp_path, "local_files_only": True}
    with pytest.raises(FileNotFoundError, match=r"(?s)`config.json` must be in loading/clara.*out of reach"):
        CLaRaForRAG.from_pretrained(CHECKPOINT, **offline)
    assert requests() == []
    CLaRaForRAG.from_pretrained(CHECKPOINT, cache_dir=tmp_path, backbone=backbone_folder)
    with pytest.raises(OSError, match=r"(?s)the backbone `loading/backbone` .* could not be found.*`backbone=PATH`"):
        CLaRaForRAG.from_pretrained(CHECKPOINT, **offline)
    CLaRaForRAG.from_pretrained(CHECKPOINT, cache_dir=tmp_path)
    assert {path.name for path in tmp_path.glob("m*")} == {"models--loading--backbone", "models--loading--clara"}
    online = len(requests())
    assert observe(CLaRaForRAG.from_pretrained(CHECKPOINT, **offline)) == seen
    assert len(requests()) == online > 0


def test_files_are_downloaded_once_unless_forced(commit, backbone_commit, requests, tmp_path):
    weights = {
        ("GET", f"/{CHECKPOINT}/resolve/{commit}/clara.safetensors"),
        ("GET", f"/{CHECKPOINT}/resolve/{commit}/generator/adapter_model.safetensors"),
        ("GET", f"/{BACKBONE}/resolve/{backbone_commit}/model.safetensors"),
    }
    for force, total in ((False, 1), (False, 1), (True, 2)):
        CLaRaForRAG.from_pretrained(CHECKPOINT, cache_dir=tmp_path, force_download=force)
        assert {request: requests().count(request) for request in weights} == dict.fromkeys(weights, total)


@pytest.mark.parametrize(("include_backbone", "subfolder"), [(False, "runs/best"), (True, "runs/best"), (True, "")])
def test_subfolder_and_included_backbone(hub_model, seen, tmp_path, requests, include_backbone, subfolder):
    repo = f"loading/layout-{include_backbone}-{len(subfolder)}"
    hub_model.save_pretrained(tmp_path / "saved", include_backbone=include_backbone)
    upload(tmp_path / "saved", repo, path_in_repo=subfolder)
    model = CLaRaForRAG.from_pretrained(repo, subfolder=subfolder, cache_dir=tmp_path / "cache")
    assert observe(model) == seen and model.config.backbone_included is include_backbone
    assert any(BACKBONE in path for _, path in requests()) is not include_backbone


def test_push_to_hub_publishes_what_loads_equal_and_keeps_a_card_that_is_there(hub_model, seen, saved):
    def pushed(repo: str, **options) -> str:
        hub_model.push_to_hub(repo, **options)
        return Path(HfApi().hf_hub_download(repo, "README.md", revision=options.get("revision"))).read_text()

    assert pushed("loading/pushed") == (saved / "README.md").read_text()
    assert set(HfApi().list_repo_files("loading/pushed")) - {".gitattributes"} == set(contents(saved))
    assert observe(CLaRaForRAG.from_pretrained("loading/pushed")) == seen
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="README.md", repo_id="loading/pushed")
    assert pushed("loading/pushed") == pushed("loading/pushed", revision="next") == "mine"
    assert "- clara\n- soft-compression\n" in (saved / "README.md").read_text()
    assert "- new\n" in pushed("loading/tagged", tags=["new"])


@pytest.mark.parametrize(
    "repo, name, status, times, match",
    [
        (CHECKPOINT, "clara.safetensors", None, 1, None),
        (CHECKPOINT, "clara.safetensors", None, 99, "`clara.safetensors` must be in loading/clara"),
        (CHECKPOINT, "config.json", 500, 1, None),
        (CHECKPOINT, "reasoner/adapter_model.safetensors", 404, 99, "`reasoner/adapter_model.safetensors` must be in"),
        (CHECKPOINT, "tokenizer.json", 403, 99, "`tokenizer.json` must be in loading/clara"),
        (CHECKPOINT, "chat_template.jinja", 404, 99, None),
        (BACKBONE, "model.safetensors", None, 1, None),
        (BACKBONE, "model.safetensors", 404, 99, "the backbone `loading/backbone` .* could not be loaded"),
        (BACKBONE, "config.json", 403, 99, "the backbone `loading/backbone` .* could not be found"),
    ],
)
def test_a_broken_download_is_repeated_or_an_error_but_never_a_wrong_model(
    commit, backbone_commit, seen, hub, tmp_path, repo, name, status, times, match
):
    sha = commit if repo == CHECKPOINT else backbone_commit
    failure = Failure(f"/{repo}/resolve/{sha}/{name}", status=status, times=times)
    hub.failures.append(failure)
    try:
        if match is not None:
            with pytest.raises(OSError, match=f"(?s){match}"):
                CLaRaForRAG.from_pretrained(CHECKPOINT, cache_dir=tmp_path)
            assert failure.times < times
            hub.failures.clear()
        assert observe(CLaRaForRAG.from_pretrained(CHECKPOINT, cache_dir=tmp_path)) == seen
        assert failure.times < times
    finally:
        hub.failures.clear()
