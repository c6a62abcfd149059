# SPDX-License-Identifier: Apache-2.0
"""
Experts go to a Hub and come back: the real huggingface_hub client against `fake_hub` on loopback.

The client reads its endpoint when it is imported and the other tests are offline, so the functions under "In the
client process" run in one process of their own. They do what a user does; the tests look at what is then on the Hub.
"""

import contextlib
import io
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from fake_hub import FakeHub, use
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model
from pico import build
from safetensors.torch import load, load_file, save_file
from tiny_experts import write
from tiny_model import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, pipeline

from peft_svf import Expert, Mixture, SVFConfig, Transformer2Model
from peft_svf.adaptation import FirstPass
from peft_svf.cli import main
from peft_svf.experts import RoutingKey
from peft_svf.experts.hub import expert_card, push_expert

THREE_FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
GSM8K = {"task": "gsm8k", "split": "test", "metric": "accuracy (generated)", "value": 0.25, "n": 1319}
GSM8K |= {"dataset": "openai/gsm8k", "benchmark": "gsm8k"}
TOKENS = torch.tensor([[3, 14, 15, 9, 2, 6, 5]])


def moved_expert(base, seed=1, **config) -> PeftModel:
    """An expert that differs from the base: z is drawn around 1."""
    torch.manual_seed(seed)
    return get_peft_model(base, SVFConfig(task_type="CAUSAL_LM", init_weights=False, **config)).eval()


# In the client process.


def push_base() -> None:
    build("llama").push_to_hub("me/base")


def base_from_hub():
    return AutoModelForCausalLM.from_pretrained("me/base").eval()


def push(repo, seed=1, **kwargs) -> tuple[list, str]:
    """Push an expert of me/base; return its logits and the id of the commit."""
    model = moved_expert(base_from_hub(), seed)
    logits = model(TOKENS).logits.tolist()
    return logits, model.push_to_hub(repo, **kwargs).oid


def logits_of_expert_from_hub(repo, **kwargs) -> list:
    return PeftModel.from_pretrained(base_from_hub(), repo, **kwargs).eval()(TOKENS).logits.tolist()


def logits_of_snippet(code) -> list:
    names = {}
    exec(code, names)
    return names["model"].eval()(TOKENS).logits.tolist()


def push_lora(repo) -> None:
    get_peft_model(base_from_hub(), LoraConfig(task_type="CAUSAL_LM")).push_to_hub(repo)


def push_expert_on_folder(folder, repo, **kwargs) -> str | None:
    """Push an expert whose base was loaded from a folder; return what the user's config says of the base then."""
    build("llama").save_pretrained(folder)
    model = moved_expert(AutoModelForCausalLM.from_pretrained(folder))
    model.push_to_hub(repo, **kwargs)
    return model.peft_config["default"].base_model_name_or_path


def push_second_of_two(repo, name) -> tuple[list, list]:
    """Add a second adapter and push it while the first is active; return its offsets and the active adapters."""
    model = moved_expert(base_from_hub())
    torch.manual_seed(2)
    model.add_adapter(name, SVFConfig(task_type="CAUSAL_LM", init_weights=False))
    push_expert(model, repo, adapter_name=name)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    return layer.svf_offset[name].weight.tolist(), model.active_adapters


def push_with_nan(repo) -> None:
    model = moved_expert(base_from_hub())
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.svf_offset["default"].weight.data[3] = float("nan")
    model.push_to_hub(repo)


def write_card(repo, text) -> None:
    from huggingface_hub import HfApi

    HfApi().upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repo)


def push_chat(experts) -> None:
    """Push a base with a tokenizer, and experts of it as values: by repository the seed."""
    tiny_model().push_to_hub("me/chat")
    tiny_tokenizer().push_to_hub("me/chat")
    base = AutoModelForCausalLM.from_pretrained("me/chat")
    with tempfile.TemporaryDirectory() as folder:
        for repo, seed in experts.items():
            expert = Expert.load(write(Path(folder), repo.split("/")[1], seed, base))
            torch.manual_seed(seed)
            key = RoutingKey(torch.randn(3, 24), torch.randn(24), 1)
            replace(expert, key=key).push_to_hub(repo, task=expert.description, results=[GSM8K])
            base = AutoModelForCausalLM.from_pretrained("me/chat")


def answer(pipe) -> tuple:
    greedy = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    text = pipe("3 + 4", mixture="both", **greedy)[0]["generated_text"]
    return text, pipe.model.library.descriptions, pipe.model.default_first_pass.threshold


def push_bundle(repo, experts) -> tuple:
    model = Transformer2Model.from_pretrained(None, experts, first_pass=FirstPass(threshold=0.5))
    model.library.add_mixture("both", Mixture(dict.fromkeys(model.library.names, 0.5)))
    model.push_to_hub(repo, license="mit")
    return answer(pipeline("transformer2", model=model))


def answer_of_bundle(repo) -> tuple:
    return answer(pipeline("transformer2", model=repo))


def offsets_of(source) -> dict:
    expert = Expert.load(source)
    return {name: offset.tolist() for name, offset in expert.offsets.items()} | {"key": expert.key.states.sum().item()}


def push_zoo(repo, source) -> str:
    """Put an expert into a subfolder, and twice of it in a second commit; return the id of the first."""
    from huggingface_hub import HfApi

    HfApi().create_repo(repo)
    expert, commits = Expert.load(source), []
    with tempfile.TemporaryDirectory() as folder:
        for version in (expert, replace(2 * expert, key=expert.key)):
            version.save(folder)
            commits.append(HfApi().upload_folder(repo_id=repo, folder_path=folder, path_in_repo="code").oid)
    return commits[0]


def tuned_expert(folder, name, rank=None) -> str:
    """Write an expert of me/chat as `peft-svf train` does."""
    path = write(Path(folder), name, 5, AutoModelForCausalLM.from_pretrained("me/chat"), rank=rank)
    row = {"task": "count", "metric": "accuracy (choice form)", "value": 0.75, "base": 0.5, "n": 40}
    (path / "result.json").write_text(json.dumps({"card": {"training": {"seed": 0}, "results": [row]}}))
    return str(path)


def chat_logits(repo, **kwargs) -> list:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/chat"), repo, **kwargs).eval()
    return model(TOKENS).logits.tolist()


def text_of(repo, chat, expert) -> str:
    """The greedy answer of a pipeline."""
    pipe = pipeline("transformer2", experts=[repo])
    return pipe(chat, expert=expert, max_new_tokens=5, do_sample=False)[0]["generated_text"][-1]["content"]


def command(*argv) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        return main([*argv]), out.getvalue()


# In the test process.


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with FakeHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """Run a function of this module in the client process: `client(push, "me/expert")`."""
    environment = hub.environment(tmp_path_factory.mktemp("home"))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=use, initargs=(environment,)) as pool:

        def run(function, *args, **kwargs):
            return pool.submit(function, *args, **kwargs).result(timeout=300)

        run(push_base)
        yield run


@pytest.fixture(scope="module")
def experts(client):
    """Experts of a base with a tokenizer that were pushed as values."""
    repos = ["me/sums", "me/programs"]
    client(push_chat, {repo: seed for seed, repo in enumerate(repos, 1)})
    return repos


def card_of(hub, repo, revision="main") -> ModelCard:
    return ModelCard(hub.read(repo, "README.md", revision).decode())


def test_push_is_one_commit_of_three_files_that_load_as_the_card_says(hub, client):
    facts = {"tags": ["mine"], "task": "counting", "results": [{"task": "count", "value": 0.5}], "license": "mit"}
    pushed, oid = client(push, "me/math", seed=3, **facts)
    assert hub.files("me/math") == THREE_FILES and hub.history("me/math") == ["Upload SVF expert"]
    assert hub.commit("me/math")[0] == oid
    assert all("svf_offset" in key for key in load(hub.read("me/math", "adapter_model.safetensors")))
    assert client(logits_of_expert_from_hub, "me/math") == pushed != client(push, "me/code", seed=4)[0]
    card = card_of(hub, "me/math")
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert code.startswith("import peft_svf") and client(logits_of_snippet, code) == pushed
    data = card.data.to_dict()
    assert data["base_model"] == "me/base" and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "text-generation" and data["license"] == "mit"
    assert {"svf", "transformer-squared", "z-vector", "base_model:adapter:me/base", "mine"} <= set(data["tags"])
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5
    assert "An expert for counting" in card.text and "2501.06252" in card.text
    assert hub.commit("me/base")[0] in card.text and "`float32`" in card.text and "sha256:" in card.text


def test_a_second_push_replaces_its_own_card_and_keeps_one_that_a_person_wrote(hub, client):
    client(push, "me/again")
    client(push, "me/again", task="counting")
    assert "An expert for counting" in card_of(hub, "me/again").text
    assert len(hub.history("me/again")) == 2

    edited = "---\nlicense: mit\n---\n# Words of my own"
    client(write_card, "me/again", edited)
    pushed, _ = client(push, "me/again", seed=5, task="singing")
    client(push, "me/again", seed=5, revision="next")
    assert str(card_of(hub, "me/again")) == str(card_of(hub, "me/again", "next")) == edited
    assert client(logits_of_expert_from_hub, "me/again") == pushed

    client(push, "me/again", seed=6, card="---\nlicense: mit\n---\n# Another")
    assert card_of(hub, "me/again").text.strip() == "# Another"


def test_lora_push_goes_through_untouched_and_its_blank_card_is_no_persons(hub, client):
    client(push_lora, "me/lora")
    assert hub.files("me/lora") == THREE_FILES and hub.history("me/lora") == ["Upload model"]
    assert "peft_svf" not in card_of(hub, "me/lora").text
    assert json.loads(hub.read("me/lora", "adapter_config.json"))["peft_type"] == "LORA"
    client(push, "me/lora")
    assert "import peft_svf" in card_of(hub, "me/lora").text


def test_base_in_a_folder_is_refused_and_its_hub_id_goes_into_the_uploaded_config_only(hub, client, tmp_path):
    with pytest.raises(ValueError, match=f'{re.escape(repr(str(tmp_path)))}.*\n?.*base_model="org/name"'):
        client(push_expert_on_folder, str(tmp_path), "me/local")
    assert hub.refs("me/local") is None
    live = client(push_expert_on_folder, str(tmp_path), "me/named", base_model="me/base", base_revision="main")
    assert live == str(tmp_path) and str(tmp_path) not in str(card_of(hub, "me/named"))
    config = json.loads(hub.read("me/named", "adapter_config.json"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", "main")


def test_named_adapter_lands_at_the_top(hub, client):
    offsets, active = client(push_second_of_two, "me/second", "second")
    assert active == ["default"]
    assert hub.files("me/second") == THREE_FILES
    stored = load(hub.read("me/second", "adapter_model.safetensors"))
    assert stored["base_model.model.model.layers.1.mlp.down_proj.svf_offset.weight"].tolist() == offsets


def test_push_to_a_branch_and_a_pull_request_leave_main_alone(hub, client):
    client(push, "me/branched")
    before = hub.commit("me/branched")
    pushed, _ = client(push, "me/branched", seed=7, revision="next")
    client(push, "me/branched", seed=8, create_pr=True, commit_message="A better z")
    assert hub.commit("me/branched") == before
    assert client(logits_of_expert_from_hub, "me/branched", revision="next") == pushed
    assert hub.history("me/branched", "refs/pr/1") == ["A better z", "Upload SVF expert"]


def test_z_that_is_not_finite_is_refused_before_anything_is_written(hub, client):
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj.*isn't a vector of finite"):
        client(push_with_nan, "me/broken")
    assert hub.refs("me/broken") is None


def test_arguments_of_transformers_push_are_taken_and_others_refused(hub, client):
    described = {"commit_description": "Why.", "private": True, "token": "hf_loopback", "max_shard_size": "1GB"}
    client(push, "me/private", **described, tags=None)
    assert hub.commit("me/private")[1]["description"] == "Why."
    with pytest.raises(TypeError, match="use_temp_dir"):
        client(push, "me/private", use_temp_dir=True)


def test_subfolder_and_revision_in_one_name_give_the_files_of_one_commit(hub, client, experts):
    first = client(push_zoo, "me/zoo", experts[0])
    once = client(offsets_of, experts[0])
    assert client(offsets_of, f"me/zoo::code@{first}") == once
    twice = client(offsets_of, "me/zoo::code@main")
    assert all(twice[name] == [2 * x for x in offset] for name, offset in once.items() if name != "key")
    code, shown = client(
        command, "dispatch", "3 + 4", "--experts", f"sums=me/zoo::code@{first}", "--experts", "me/zoo::code"
    )
    assert code == 0, shown
    code, shown = client(command, "dispatch", "3 + 4", "--experts", "me/zoo::code@v9")
    assert code == 1 and "me/zoo on the Hub has no revision 'v9'" in shown


def test_bundle_is_one_commit_and_the_pipeline_loads_it_by_its_name(hub, client, experts):
    pushed = client(push_bundle, "me/bundle", experts)
    assert client(answer_of_bundle, "me/bundle") == pushed
    assert pushed[1] == {"programs": "about programs", "sums": "about sums"} and pushed[2] == 0.5
    assert hub.history("me/bundle") == ["Upload SVF experts"]
    listed = json.loads(hub.read("me/bundle", "transformer2_config.json"))
    assert listed["base_model_name_or_path"] == "me/chat" and listed["mixtures"]["both"]["alpha"]["sums"] == 0.5
    card = card_of(hub, "me/bundle")
    assert card.data.base_model == "me/chat" and card.data.license == "mit"
    assert "import peft_svf" in card.text and "| sums | about sums |" in card.text


def test_expert_is_pushed_with_its_routing_key_and_its_place_on_a_board(hub, client, experts):
    assert hub.files(experts[0]) == [".eval_results/gsm8k.yaml", *THREE_FILES, "routing.safetensors"]
    (entry,) = yaml.safe_load(hub.read(experts[0], ".eval_results/gsm8k.yaml"))
    assert entry["dataset"] == {"id": "openai/gsm8k", "task_id": "gsm8k"} and entry["value"] == 0.25
    card = card_of(hub, experts[0])
    measured = card.data.to_dict()["model-index"][0]["results"][0]
    assert measured["dataset"]["type"] == "openai/gsm8k"
    assert {"type": "accuracy", "name": "accuracy (generated)", "value": 0.25} in measured["metrics"]
    assert "benchmark" not in card.text
    code, shown = client(command, "inspect", experts[0])
    assert code == 0, shown


def test_search_lists_the_experts_of_a_base(hub, client, experts):
    code, shown = client(command, "search", "me/chat")
    assert code == 0 and "me/sums" in shown and "me/programs" in shown and "me/expert " not in shown
    code, shown = client(command, "search", "me/nothing")
    assert code == 1 and "no experts of 'me/nothing'" in shown


@pytest.mark.parametrize("rank", [None, 5])
def test_the_verb_uploads_what_training_wrote_with_a_picture_and_a_lora(hub, client, experts, tmp_path, rank):
    repo = f"me/rank-{rank}"
    folder = client(tuned_expert, str(tmp_path), f"rank-{rank}", rank=rank)
    Path(folder, "blocks.png").write_bytes(b"\x89PNG")
    for _ in range(2):
        code, shown = client(command, "push", folder, repo, "--license", "mit", "--lora", "--collection", "Counting")
        assert code == 0 and f"Uploaded {repo}" in shown, shown
    assert {"type": "model", "id": repo} in hub.collections["me/counting"]
    lora = ["lora/adapter_config.json", "lora/adapter_model.safetensors"]
    assert hub.files(repo) == sorted([*THREE_FILES, *lora, "blocks.png"])
    assert hub.read(repo, "blocks.png")[1:4] == b"PNG"
    card = card_of(hub, repo)
    assert "(blocks.png)" in card.text and "| count |" in card.text and "- seed: 0" in card.text
    assert f'"{repo}", subfolder="lora")' in card.text and card.data.license == "mit"
    mine, others = (torch.tensor(client(chat_logits, repo, **way)) for way in ({}, {"subfolder": "lora"}))
    exact = rank is not None
    assert ("leaves out nothing" in card.text) == exact
    near = {"atol": 1e-4, "rtol": 1e-4} if exact else {"atol": 0.5, "rtol": 0.1}
    torch.testing.assert_close(mine, others, **near)
    code, shown = client(command, "push", folder, repo)
    assert code == 0 and hub.files(repo) == sorted([*THREE_FILES, "blocks.png"]), (
        shown
    )  # that LoRA may be another expert's


def test_the_verb_needs_an_owner_and_a_base_that_the_hub_has(hub, client, experts, tmp_path):
    folder = client(tuned_expert, str(tmp_path), "mine")
    code, shown = client(command, "push", folder, "mine")
    assert code == 2 and "write ORG/NAME" in shown
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    Path(folder, "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./base"}))
    code, shown = client(command, "push", folder, "me/mine")
    assert code == 1 and "'./base', means nothing on the Hub" in shown and hub.refs("me/mine") is None


@pytest.mark.slow
def test_a_newcomer_publishes_an_expert_loads_it_serves_it_and_asks_it(hub, client, experts, tmp_path):
    openai = pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    folder = client(tuned_expert, str(tmp_path), "walk")
    code, shown = client(command, "push", folder, "me/walk")
    assert code == 0, shown
    assert client(chat_logits, "me/walk") == client(chat_logits, folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    verb = [sys.executable, "-m", "peft_svf.cli", "serve", "--experts", "me/walk", "--port", str(port)]
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    with subprocess.Popen(
        verb, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            for line in server.stdout:
                if "at http://" in line:
                    break
            ask = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=8)
            chat = [{"role": "user", "content": "3 + 4"}]
            for model, choice in (("walk", "walk"), ("base", "other")):
                asked = {"model": model, "messages": chat, "max_tokens": 5, "temperature": 0}
                answer = ask.chat.completions.create(**asked)
                assert answer.dispatch["choice"] == choice
                assert answer.choices[0].message.content == client(text_of, "me/walk", chat, choice)
        finally:
            server.terminate()


# The card alone, without a Hub.


@pytest.fixture
def saved_expert(tmp_path):
    moved_expert(build("llama"), rank=5, description="counting").save_pretrained(tmp_path / "counter")
    return tmp_path / "counter"


def test_card_of_a_folder_shows_the_results_beside_the_base(saved_expert):
    row = {"task": "count", "split": "test", "value": 0.66, "base": 0.52, "interval": (0.61, 0.71), "n": 400}
    training = {"data": "count, train", "seed": 3, "command": f"train {Path.home()}/run --token hf_secretsecret"}
    card = expert_card(saved_expert, base_model="me/base", results=[{**row, "form": "choice"}], training=training)
    assert "| count | test | accuracy | 0.520 | 0.660 | 0.610 to 0.710 | 400 | choice |" in card.text
    assert "- data: count, train\n- seed: 3\n- command: train ~/run --token ...\n" in card.text
    assert "An expert for counting" in card.text and "# counter" in card.text
    ModelCardData(**card.data.to_dict())  # the metadata can be read back


def test_z_statistics_are_those_of_the_stored_offsets(saved_expert):
    file = saved_expert / "adapter_model.safetensors"
    tensors = {key: torch.full_like(d, 0.25 if "up_proj" in key else -0.5) for key, d in load_file(file).items()}
    save_file(tensors, file)
    text = expert_card(saved_expert, base_model="me/base").text
    assert "| `up_proj` | 2 | 10 | 0.2500 | 0.2500 | 1.2500 to 1.2500 |" in text
    assert "| all | 6 | 30 | 0.4167 | 0.5000 | 0.5000 to 1.2500 |" in text


def test_a_card_of_another_adapter_or_of_a_base_without_a_hub_id_is_refused(saved_expert, tmp_path):
    get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no SVF expert"):
        expert_card(tmp_path, base_model="me/base")
    for base_model in (None, "./weights", "a/b/c"):
        with pytest.raises(ValueError, match=re.escape(repr(base_model))):
            expert_card(saved_expert, base_model=base_model)


def test_unknown_adapter_and_several_active_ones_are_refused_by_name():
    model = moved_expert(build("llama"))
    with pytest.raises(ValueError, match=r"\['code'\] isn't one SVF adapter.*\['default'\]"):
        push_expert(model, "me/code", adapter_name="code")
    model.add_adapter("math", SVFConfig(task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "math"])
    with pytest.raises(ValueError, match=r"\['default', 'math'\] isn't one SVF adapter"):
        push_expert(model, "me/both")
