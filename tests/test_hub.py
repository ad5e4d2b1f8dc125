"""Adapters: what is saved comes back, PEFT can read it, and what does not belong together is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny import one_line, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from layerwise import LayerwiseForCausalLM, Plan, attach, fingerprint, from_pretrained
from layerwise.hub import adapter_base, push_adapter, save_adapter
from layerwise.policies import FixedPolicy

NAMES = list(tiny.ARCHITECTURES)
PLAN = "0-1 2a 4*2 5m"
IDS = tokens(2, 9)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter that is a plan and nothing else."""
    folder = tmp_path_factory.mktemp("adapter")
    from_pretrained(base, plan=PLAN, engine="eager").save_pretrained(str(folder))
    return folder


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def with_lora(model: PreTrainedModel, seed: int = 0, **options: Any) -> PeftModel:
    """`model` with a LoRA that changes its answers."""
    torch.manual_seed(seed)
    options = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options}
    return get_peft_model(model, LoraConfig(**options, init_lora_weights=False)).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def copied(adapter: Path, folder: Path, **changes: Any) -> Path:
    """A copy of an adapter whose layerwise.json has `changes`."""
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    about = json.loads((folder / "layerwise.json").read_text(encoding="utf-8"))
    (folder / "layerwise.json").write_text(json.dumps({**about, **changes}), encoding="utf-8")
    return folder


# -- round trips ---------------------------------------------------------------------------------------------


def test_a_plan_comes_back(base: Path, adapter: Path) -> None:
    expected = logits(attach(load(base), PLAN))
    assert not torch.equal(expected, logits(load(base)))
    loads: list[Callable[[], LayerwiseForCausalLM]] = [
        lambda: from_pretrained(adapter, engine="eager"),
        lambda: from_pretrained(str(adapter), engine="eager"),
        lambda: from_pretrained(adapter=adapter, engine="eager"),
        lambda: from_pretrained(base, adapter=str(adapter), engine="eager"),
    ]
    for again in loads:
        model = again()
        assert model.plan == Plan.parse(PLAN) and not model.training
        assert torch.equal(logits(model), expected)
    assert adapter_base(adapter) == str(base)


def test_a_base_model_alone_gets_the_full_plan(base: Path) -> None:
    model = from_pretrained(base, engine="eager")
    assert model.plan == Plan.full(tiny.LAYERS)
    assert torch.equal(logits(model), logits(load(base)))
    assert from_pretrained(base, plan="0-2", engine="eager").plan == Plan.full(3)


def test_a_plan_given_by_hand_overrides_the_adapters(base: Path, adapter: Path) -> None:
    for plan in ("0-2", Plan.parse("0-2")):
        model = from_pretrained(adapter, plan=plan, engine="eager")
        assert model.plan == Plan.full(3)
        assert torch.equal(logits(model), logits(attach(load(base), "0-2")))
    one_line(lambda: from_pretrained(adapter, plan="0-6", engine="eager"), "layer 6")


def test_dtype_is_what_is_asked_for(adapter: Path) -> None:
    assert from_pretrained(adapter, engine="eager").dtype == torch.float32
    for dtype in ("bfloat16", torch.bfloat16):
        assert from_pretrained(adapter, dtype=dtype, engine="eager").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [{}, {"r": 1, "target_modules": "all-linear"}, {"layers_to_transform": [0]}, {"use_dora": True}],
    ids=["lora", "rank one", "one layer", "dora"],
)
def test_a_lora_comes_back(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = attach(with_lora(load(base), **options), PLAN)
    expected = logits(model)
    assert (expected - logits(attach(load(base), PLAN))).abs().max() > 1e-3
    model.save_pretrained(str(tmp_path))
    for again in (from_pretrained(tmp_path, engine="eager"), from_pretrained(base, adapter=tmp_path, engine="eager")):
        assert again.plan == Plan.parse(PLAN)
        assert any("lora_" in name for name, _ in again.named_parameters())  # eager leaves it unmerged
        torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)


def test_peft_loads_a_lora_without_the_plan(base: Path, tmp_path: Path) -> None:
    lora = with_lora(load(base))
    expected = logits(lora)
    attach(lora, PLAN).save_pretrained(str(tmp_path))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(load(base), str(tmp_path))), expected)


@pytest.mark.parametrize("name", NAMES)
def test_peft_loads_a_plan_and_leaves_the_model_as_it_is(name: str, tmp_path: Path) -> None:
    tiny.model(name).save_pretrained(tmp_path / "base")
    save_adapter(attach(load(tmp_path / "base"), PLAN), tmp_path / "adapter")
    config = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert config.base_model_name_or_path == str(tmp_path / "base")
    plain = load(tmp_path / "base")
    expected = logits(plain)
    wrapped = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    assert torch.equal(logits(wrapped), expected)
    assert torch.equal(logits(wrapped.merge_and_unload()), expected)
    again = from_pretrained(tmp_path / "adapter", engine="eager")
    assert torch.equal(logits(again), logits(attach(load(tmp_path / "base"), PLAN)))
    assert not any("lora_" in parameter for parameter, _ in again.named_parameters())


def test_what_layerwise_json_says(base: Path, adapter: Path) -> None:
    about = json.loads((adapter / "layerwise.json").read_text(encoding="utf-8"))
    assert about["policy"] == {"kind": "fixed", "plan": PLAN}
    assert about["base_model"] == str(base) and about["layers"] == tiny.LAYERS and about["format"] == 1
    assert about["base_fingerprint"] == fingerprint(load(base))


def test_saving_into_a_deep_new_folder_and_over_an_old_adapter(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    attach(with_lora(load(base)), PLAN).save_pretrained(str(folder))
    attach(load(base), "0-2").save_pretrained(str(folder))
    again = from_pretrained(folder, engine="eager")
    assert torch.equal(logits(again), logits(attach(load(base), "0-2")))  # the LoRA is gone


# -- fingerprints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_fingerprints_ignore_precision_and_adapters(name: str, tmp_path: Path) -> None:
    model = tiny.model(name)
    expected = fingerprint(model)
    assert len(expected) == 16 and expected == fingerprint(tiny.model(name))
    assert fingerprint(tiny.model(name).to(torch.bfloat16)) == expected
    model.save_pretrained(tmp_path)
    assert fingerprint(load(tmp_path)) == expected
    for options in ({}, {"target_modules": "all-linear"}, {"use_dora": True}):
        assert fingerprint(with_lora(tiny.model(name), **options).get_base_model()) == expected


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_fingerprints_tell_weights_apart(name: str) -> None:
    model, other = tiny.model(name), tiny.model(name, seed=1)
    expected = fingerprint(model)
    assert fingerprint(other) != expected
    for part, parameter in other.named_parameters():
        twin = tiny.model(name)
        twin.get_parameter(part).data.copy_(parameter)
        assert fingerprint(twin) != expected, part
    swapped = tiny.model(name)
    swapped.model.layers[1], swapped.model.layers[2] = swapped.model.layers[2], swapped.model.layers[1]
    assert fingerprint(swapped) != expected


def test_fingerprints_tell_shapes_apart() -> None:
    found = set()
    for size in (48, 64):
        config = tiny.config("llama")
        config.intermediate_size = size
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        found.add(fingerprint(model))
    assert len(found) == 2


def test_adapted_fingerprints_tell_adapters_apart() -> None:
    """What is kept of a model's answers is named after them; without an adapter nothing changes."""
    plain = tiny.model("llama")
    assert fingerprint(plain, adapted=True) == fingerprint(plain)
    loras = [with_lora(tiny.model("llama"), seed).get_base_model() for seed in (0, 0, 1)]
    first, same, other = (fingerprint(lora, adapted=True) for lora in loras)
    assert first == same and len({first, other, fingerprint(plain)}) == 3


def test_fingerprinting_changes_nothing() -> None:
    model = tiny.model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fingerprint(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# -- what does not belong together ---------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    other = tiny.model("llama", seed=1)
    twin = tiny.model("llama")
    twin.model.layers[3].mlp.up_proj.load_state_dict(other.model.layers[3].mlp.up_proj.state_dict())
    for number, model in enumerate((other, twin, tiny.model("qwen2"))):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        one_line(
            lambda folder=folder: from_pretrained(folder, adapter=adapter, engine="eager"),
            str(adapter),
            str(folder),
            str(base),
        )


def test_folders_that_are_no_adapter_are_refused(base: Path, tmp_path: Path) -> None:
    one_line(lambda: from_pretrained(base, adapter=base, engine="eager"), str(base), "layerwise.json")
    one_line(lambda: from_pretrained(adapter=tmp_path, engine="eager"), str(tmp_path), "layerwise.json")
    one_line(lambda: from_pretrained(adapter=tmp_path / "nowhere", engine="eager"), "nowhere")
    one_line(lambda: adapter_base(tmp_path), "layerwise.json")
    one_line(lambda: from_pretrained(tmp_path, engine="eager"), str(tmp_path), "config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"base_model": "x"}', '{"base_fingerprint": "x"}'])
def test_a_damaged_layerwise_json_is_refused(adapter: Path, tmp_path: Path, text: str) -> None:
    folder = copied(adapter, tmp_path)
    (folder / "layerwise.json").write_text(text, encoding="utf-8")
    one_line(lambda: from_pretrained(folder, engine="eager"), str(folder), "layerwise.json", "damaged")


@pytest.mark.parametrize(
    ("policy", "mention"),
    [
        ({"kind": "oracle", "weights": "x"}, "unknown policy 'oracle'"),
        ({}, "unknown policy"),
        ({"kind": "fixed", "plan": "0-6"}, "layer 6"),
        ({"kind": "fixed", "plan": "all"}, "all"),
        ({"kind": "fixed", "plan": ""}, "at least one layer"),
    ],
)
def test_policies_that_cannot_be_read_are_refused(
    adapter: Path, tmp_path: Path, policy: dict[str, Any], mention: str
) -> None:
    folder = copied(adapter, tmp_path, policy=policy)
    one_line(lambda: from_pretrained(folder, engine="eager"), mention)


def test_a_base_that_is_gone_is_named(adapter: Path, tmp_path: Path) -> None:
    folder = copied(adapter, tmp_path, base_model=str(tmp_path / "gone"))
    one_line(lambda: from_pretrained(folder, engine="eager"), "gone")


# -- cards and uploads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda model: model, with_lora], ids=["plan", "lora"])
def test_the_model_card_names_library_base_and_plan(
    base: Path, tmp_path: Path, wrap: Callable[[PreTrainedModel], Any]
) -> None:
    attach(wrap(load(base)), PLAN).save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    front = card.split("---")[1]
    assert card.startswith("---\n") and f"base_model: {base}\n" in front and "library_name: layerwise\n" in front
    assert PLAN in card and fingerprint(load(base)) in card and "from_pretrained" in card


def test_a_card_that_the_user_wrote_or_edited_stays_and_ours_is_renewed(base: Path, tmp_path: Path) -> None:
    model, card = attach(load(base), PLAN), tmp_path / "README.md"
    model.save_pretrained(str(tmp_path))
    edited = card.read_text(encoding="utf-8") + "\nTrained by hand: 30 \N{EURO SIGN}.\n"
    card.write_text(edited, encoding="utf-8")
    model.save_pretrained(str(tmp_path))
    assert card.read_text(encoding="utf-8") == edited
    card.unlink()
    model.save_pretrained(str(tmp_path))
    model.plan = "0-2"
    model.save_pretrained(str(tmp_path))
    assert '"plan": "0-2"' in card.read_text(encoding="utf-8")
    card.write_text("# My own card\n", encoding="utf-8")
    model.save_pretrained(str(tmp_path))
    assert card.read_text(encoding="utf-8") == "# My own card\n"


class FakeHub:
    """Stands in for huggingface_hub.HfApi; looks into the folder while it exists."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, **options: Any) -> None:
        type(self).calls = [("HfApi", options)]

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))

    def upload_folder(self, folder_path: str, **options: Any) -> SimpleNamespace:
        policy = json.loads((Path(folder_path) / "layerwise.json").read_text(encoding="utf-8"))["policy"]
        files = sorted(file.name for file in Path(folder_path).iterdir())
        self.calls.append(("upload_folder", {"files": files, "policy": policy, "folder": folder_path, **options}))
        return SimpleNamespace(commit_url="https://hub/commit/1")


def test_pushing_uploads_the_folder(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    model = attach(load(base), PLAN)
    for push in (
        lambda: push_adapter(model, "me/mine", private=True, token="secret"),
        lambda: model.push_to_hub("me/mine", private=True, token="secret"),
    ):
        assert push() == "https://hub/commit/1"
        (api, create, upload) = FakeHub.calls
        assert api == ("HfApi", {"token": "secret"})
        assert create == ("create_repo", {"repo_id": "me/mine", "private": True, "exist_ok": True})
        assert upload[1]["repo_id"] == "me/mine" and upload[1]["policy"]["plan"] == PLAN
        assert upload[1]["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors", "layerwise.json"]
        assert not Path(upload[1]["folder"]).exists()


def test_what_else_transformers_lets_save_and_push_be_told(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    model = attach(load(base), PLAN)
    model.push_to_hub("me/mine", commit_message="better")
    assert FakeHub.calls[2][1]["commit_message"] == "better"
    one_line(lambda: model.save_pretrained(str(tmp_path), push_to_hub=True), "push_to_hub")
    model.save_pretrained(str(tmp_path), is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_the_hub_is_loaded_from_its_cache_without_network(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody answers there, at once
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    one_line(lambda: from_pretrained(adapter="me/mine", engine="eager"), "no adapter 'me/mine'")
    kept = tmp_path / "models--me--mine"
    for folder in (snapshot := kept / "snapshots" / ("1" * 40), kept / "refs"):
        folder.mkdir(parents=True)
    copied(adapter, snapshot)
    (kept / "refs" / "main").write_text(snapshot.name, encoding="utf-8")
    assert from_pretrained(adapter="me/mine", engine="eager").plan == Plan.parse(PLAN)


def test_fixed_policies_survive_text() -> None:
    policy = FixedPolicy(Plan.parse(PLAN))
    assert policy.to_dict() == {"kind": "fixed", "plan": PLAN}
    assert policy.plans(3) == (Plan.parse(PLAN),) * 3


def test_the_tokenizer_of_an_adapter_is_its_bases(base: Path, tmp_path: Path) -> None:
    from test_data_examples import CHATML, tokenizer

    from layerwise import load_tokenizer
    from layerwise.hub import base_name

    whole = tmp_path / "base"
    load(base).save_pretrained(whole)
    tokenizer(CHATML).save_pretrained(whole)
    folder = tmp_path / "adapter"
    from_pretrained(whole, plan=PLAN, engine="eager").save_pretrained(str(folder))
    assert base_name(folder, None) == base_name(None, folder) == base_name(whole, folder) == str(whole)
    assert load_tokenizer(str(folder)).chat_template == CHATML
    assert base_name(None, None) is None


def test_a_missing_package_of_a_quantized_model_is_one_line(base: Path, tmp_path: Path) -> None:
    load(base).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    file.write_text(json.dumps(config))
    one_line(lambda: from_pretrained(tmp_path), "cannot load a causal language model", "optimum")


def test_weights_cut_short_are_refused_in_one_line(base: Path, tmp_path: Path) -> None:
    load(base).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"^cannot load a causal language model from .*"):
        from_pretrained(tmp_path)
