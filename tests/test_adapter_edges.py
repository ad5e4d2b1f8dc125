"""Edges of saving and loading adapters: each test is of something that once went wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_hub import copied, load, logits, with_lora
from tiny import one_line

from layerwise import LayerwiseForCausalLM, Plan, attach, fingerprint, from_pretrained
from layerwise.model.causal_lm import EngineName
from layerwise.model.compiled import compiler_available
from layerwise.model.fingerprint import digests, is_changed


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter that is a plan and nothing else."""
    folder = tmp_path_factory.mktemp("adapter")
    attach(load(base), "0-3").save_pretrained(str(folder))
    return folder


def assert_comes_back(model: LayerwiseForCausalLM, base: Path, folder: Path) -> None:
    """`model` answers unlike its base with the same plan, and so does what is loaded after saving it."""
    expected = logits(model)
    assert (expected - logits(attach(load(base), model.plan))).abs().max() > 1e-3
    model.save_pretrained(str(folder))
    again = from_pretrained(folder, engine="eager")
    assert again.plan == model.plan
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)


# -- what is saved comes back --------------------------------------------------------------------------------


def test_a_lora_of_rank_one_on_layer_0_is_not_taken_for_a_plan_alone(base: Path, tmp_path: Path) -> None:
    assert_comes_back(attach(with_lora(load(base), r=1, layers_to_transform=[0])), base, tmp_path)


def test_full_fine_tuning_comes_back(base: Path, tmp_path: Path) -> None:
    model = attach(load(base), "0-3")
    with torch.no_grad():
        model.base.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert_comes_back(model, base, tmp_path)


def test_a_few_trained_embeddings_come_back(base: Path, tmp_path: Path) -> None:
    """Too few for the fingerprint, which looks at samples; that a model moves or is saved is no training."""
    model = attach(load(base))
    unseen = attach(load(base)).attached_to
    model.to("cpu").save_pretrained(str(tmp_path / "untrained"))
    assert not (tmp_path / "untrained" / "base").exists()
    with torch.no_grad():
        model.base.model.embed_tokens.weight.data[11, 3:5] += 3
    assert fingerprint(model.base) == unseen
    model.save_pretrained(str(tmp_path / "trained"))
    again = from_pretrained(tmp_path / "trained", engine="eager")
    assert torch.equal(again.base.model.embed_tokens.weight, model.base.model.embed_tokens.weight)


@pytest.mark.parametrize("adapted", [False, True], ids=["plan", "lora"])
def test_a_trained_base_goes_with_its_adapter(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapted: bool
) -> None:
    """Through as many copies as there are, merged or not, wherever the first one went."""
    model = attach(load(base), "0-3")
    with torch.no_grad():
        model.base.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(str(tmp_path / "0"))
    monkeypatch.chdir(tmp_path)
    copied = from_pretrained("0", engine="eager")
    if adapted:
        with_lora(copied.base).eval()
    expected = logits(copied)
    copied.save_pretrained("1")
    for source, target, engine in (("1", "2", "auto"), ("2", "3", "eager"), ("3", "3", "eager"), ("3", "3", "auto")):
        from_pretrained(source, engine=engine).save_pretrained(target)
    for gone in ("0", "1", "2"):
        shutil.rmtree(gone)
    assert json.loads(Path("3/layerwise.json").read_text(encoding="utf-8"))["base_model"] == "base"
    assert torch.equal(logits(from_pretrained("3", engine="eager")), expected)


def test_a_base_of_a_relative_name_is_found_from_everywhere(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    injected = load(Path(base.name))
    injected.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    models = from_pretrained(base.name, engine="eager"), attach(with_lora(load(Path(base.name)))), attach(injected)
    for number, model in enumerate(models):
        model.save_pretrained(str(tmp_path / str(number)))
    monkeypatch.chdir(tmp_path)
    for number, model in enumerate(models):
        assert torch.equal(logits(from_pretrained(str(number), engine="eager")), logits(model))
        assert PeftConfig.from_pretrained(str(number)).base_model_name_or_path == str(base)


def test_an_adapter_on_changed_weights_is_refused_before_anything_is_written(base: Path, tmp_path: Path) -> None:
    merged, trained, late = attach(with_lora(load(base))), attach(with_lora(load(base))), with_lora(load(base))
    merged.base.merge_adapter()
    trained.base.get_base_model().model.embed_tokens.weight.data[11, 3:5] += 3
    late.merge_adapter()
    folder = tmp_path / "lora"
    for model in (merged, trained, attach(late)):
        one_line(lambda model=model: model.save_pretrained(str(folder)), "unmerge_adapter", "merge_and_unload")
    assert not folder.exists()
    merged.base.merge_and_unload().save_pretrained(tmp_path / "whole")
    assert_comes_back(attach(load(tmp_path / "whole")), base, tmp_path / "adapter")


@torch.no_grad()
def test_every_kind_of_change_shows_and_merging_is_none() -> None:
    model = tiny.model("llama")
    before = digests(model)
    assert not is_changed(tiny.model("llama"), before)
    weight = model.model.layers[2].self_attn.q_proj.weight
    kept = weight.clone()
    for changed in (kept.flip(0), kept.flip(1), kept.neg(), kept * 2, kept.roll(1, 0), kept.bfloat16().float()):
        weight.copy_(changed)
        assert is_changed(model, before)
        weight.copy_(kept)
    assert not is_changed(model, before)
    assert is_changed(tiny.model("llama").double(), before)
    lora = with_lora(model)
    lora.merge_adapter()
    lora.unmerge_adapter()
    assert not torch.equal(model.model.layers[2].self_attn.q_proj.base_layer.weight, kept)  # rounding
    assert not is_changed(model, before) and not is_changed(model.to(torch.bfloat16), before)
    model = with_lora(tiny.model("llama")).get_base_model()
    assert not is_changed(model, before)
    model.model.norm.weight[0] += 1
    assert is_changed(model, before)


def test_modules_that_peft_trains_whole_come_back(base: Path, tmp_path: Path) -> None:
    lora = with_lora(load(base), modules_to_save=["lm_head"])
    model = attach(lora)
    untrained = logits(model)
    with torch.no_grad():
        lora.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    assert not torch.equal(logits(model), untrained)
    assert_comes_back(model, base, tmp_path)


def test_a_peft_adapter_with_a_name_comes_back(base: Path, tmp_path: Path) -> None:
    options = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    assert_comes_back(attach(get_peft_model(load(base), options, adapter_name="mine").eval()), base, tmp_path)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_an_adapter_put_in_by_transformers_comes_back(base: Path, tmp_path: Path, name: str) -> None:
    model = load(base)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), name)
    assert_comes_back(attach(model.eval()), base, tmp_path)


def test_an_adapter_put_in_after_attaching_comes_back(base: Path, tmp_path: Path) -> None:
    model = attach(load(base))
    with_lora(model.base).eval()
    assert_comes_back(model, base, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
        LoHaConfig(target_modules=["q_proj", "down_proj"], r=2, init_weights=False),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[0, 5], init_lora_weights=False),
    ],
    ids=["ia3", "loha", "lora and tokens"],
)
def test_adapters_of_other_kinds_come_back(base: Path, tmp_path: Path, options: PeftConfig) -> None:
    torch.manual_seed(0)
    model = attach(get_peft_model(load(base), options).eval())
    assert model.attached_to == fingerprint(load(base))
    assert_comes_back(model, base, tmp_path)
    torch.testing.assert_close(logits(from_pretrained(tmp_path)), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ["auto", "compiled"])
def test_a_merged_lora_is_not_saved_as_a_plan_alone(base: Path, tmp_path: Path, engine: EngineName) -> None:
    if engine == "compiled" and not compiler_available():
        pytest.skip("no C++ compiler")
    attach(with_lora(load(base))).save_pretrained(str(tmp_path / "lora"))
    merged = from_pretrained(tmp_path / "lora", engine=engine)
    merged.save_pretrained(str(tmp_path / "again"))  # what it was merged from is copied
    again = from_pretrained(tmp_path / "again", engine="eager")
    assert torch.equal(logits(again), logits(from_pretrained(tmp_path / "lora", engine="eager")))
    twice = from_pretrained(tmp_path / "lora", engine=engine)
    with_lora(twice.base, seed=1)
    one_line(lambda: twice.save_pretrained(str(tmp_path / "third")), "merged", "engine='eager'")
    with torch.no_grad():
        next(merged.runtime.backbone.layers[0].parameters()).mul_(1.5)  # trained since: no copy would be right
    one_line(lambda: merged.save_pretrained(str(tmp_path / "third")), "merged", "engine='eager'")
    assert not (tmp_path / "third").exists()


# -- damaged folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"policy": "x"}, ["layerwise.json", "damaged", "policy"]),
        ({"policy": {"kind": "fixed"}}, ["policy", "no plan"]),
        ({"policy": {"kind": "fixed", "plan": 3}}, ["policy", "no plan"]),
        ({"base_model": ""}, ["without a name", "which base model"]),
        ({"exits": ["a"]}, ["layerwise.json", "damaged", "exits"]),
        ({"exits": 5}, ["layerwise.json", "damaged", "exits"]),
        ({"format": 2}, ["layerwise.json", "format 2", "update layerwise"]),
        ({"format": None}, ["layerwise.json", "format None"]),
    ],
    ids=[
        "policy is text",
        "no plan",
        "plan is a number",
        "empty base model",
        "exits of text",
        "exits are a number",
        "newer format",
        "no format",
    ],
)
def test_what_layerwise_json_must_not_say(
    adapter: Path, tmp_path: Path, changes: dict[str, Any], mentions: list[str]
) -> None:
    folder = copied(adapter, tmp_path, **changes)
    one_line(lambda: from_pretrained(folder, engine="eager"), *mentions)


def test_a_layerwise_json_without_a_policy_is_refused(adapter: Path, tmp_path: Path) -> None:
    file = copied(adapter, tmp_path) / "layerwise.json"
    about = json.loads(file.read_text(encoding="utf-8"))
    del about["policy"]
    file.write_text(json.dumps(about), encoding="utf-8")
    one_line(lambda: from_pretrained(tmp_path, engine="eager"), str(file), "damaged", "policy")


def changed_config(base: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a model whose config.json has `changes`."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return folder


def test_a_checkpoint_that_lacks_weights_is_refused(base: Path, tmp_path: Path) -> None:
    deeper = changed_config(base, tmp_path / "deeper", num_hidden_layers=tiny.LAYERS + 2)
    one_line(lambda: from_pretrained(deeper), str(deeper), "lacks", "model.layers.6.", "and 15 more", "config.json")
    tied = changed_config(base, tmp_path / "tied", tie_word_embeddings=True)
    weights = load_file(tied / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tied / "model.safetensors", metadata={"format": "pt"})
    assert from_pretrained(tied).base.lm_head.weight is not None
    one_line(
        lambda: from_pretrained(changed_config(tied, tmp_path / "headless", tie_word_embeddings=False)),
        "(lm_head.weight)",
    )


def test_a_layerwise_json_that_is_not_utf_8_is_refused(adapter: Path, tmp_path: Path) -> None:
    file = copied(adapter, tmp_path) / "layerwise.json"
    file.write_bytes(json.dumps({**json.loads(file.read_bytes()), "note": "é"}, ensure_ascii=False).encode("latin-1"))
    one_line(lambda: from_pretrained(tmp_path, engine="eager"), str(file), "damaged", "UnicodeDecodeError")


def test_only_weights_need_the_configuration_of_peft(base: Path, adapter: Path, tmp_path: Path) -> None:
    plan = copied(adapter, tmp_path)
    (plan / "adapter_config.json").unlink()
    assert from_pretrained(plan, engine="eager").plan == Plan.parse("0-3")
    lora = tmp_path / "lora"
    attach(with_lora(load(base))).save_pretrained(str(lora))
    (lora / "adapter_config.json").unlink()
    one_line(lambda: from_pretrained(lora, engine="eager"), str(lora), "cannot be loaded", "adapter_config.json")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:11\nsize 5\n"


@pytest.mark.parametrize("text", ["", POINTER, "cut short"])
def test_damaged_weights_of_an_adapter_are_refused(base: Path, tmp_path: Path, text: str) -> None:
    attach(with_lora(load(base))).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000] if text == "cut short" else text.encode())
    one_line(lambda: from_pretrained(tmp_path, engine="eager"), str(tmp_path), file.name, "damaged", "again")


@pytest.mark.parametrize("text", ["", "[]", "5", "{}", '{"r": "two"}', '{"target_modules": 5}', '{"peft_type": "no"}'])
def test_a_damaged_configuration_of_peft_is_refused(base: Path, tmp_path: Path, text: str) -> None:
    attach(with_lora(load(base))).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    if ":" in text:
        text = json.dumps({**json.loads(file.read_text(encoding="utf-8")), **json.loads(text)})
    file.write_text(text, encoding="utf-8")
    one_line(lambda: from_pretrained(tmp_path, engine="eager"), str(tmp_path), file.name, "damaged", "again")


@pytest.mark.parametrize(
    ("changes", "mention"),
    [
        ({"hidden_size": "x"}, "'hidden_size' expected int"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"dtype": "float99"}, "float99"),
        ({"pad_token_id": 1000}, "Padding_idx"),
    ],
)
def test_wrong_values_in_a_config_are_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], mention: str
) -> None:
    one_line(lambda: from_pretrained(base, dtype="float99"), "no dtype 'float99'")
    folder = changed_config(base, tmp_path / "model", **changes)
    one_line(lambda: from_pretrained(folder), str(folder), "config.json", mention)


def test_damaged_files_of_a_model_are_refused(base: Path, tmp_path: Path) -> None:
    folder = changed_config(base, tmp_path / "model")
    (folder / "generation_config.json").write_text("[]", encoding="utf-8")
    one_line(lambda: from_pretrained(folder), str(folder), "JSON files")
    (folder / "model.safetensors").write_text(POINTER, encoding="utf-8")
    one_line(lambda: from_pretrained(folder), str(folder), "weights", "damaged", "again")
    (folder / "config.json").write_text("5", encoding="utf-8")
    one_line(lambda: from_pretrained(folder), str(folder), "config.json")


# -- cards ---------------------------------------------------------------------------------------------------


def test_the_card_is_renewed_with_the_plan(base: Path, tmp_path: Path) -> None:
    for plan in ("0-3", "0-2"):
        attach(load(base), plan).save_pretrained(str(tmp_path))
        assert f'"plan": "{plan}"' in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_an_edited_card_of_a_lora_stays(base: Path, tmp_path: Path) -> None:
    model, card = attach(with_lora(load(base))), tmp_path / "README.md"
    model.save_pretrained(str(tmp_path))
    edited = card.read_text(encoding="utf-8") + "\nmy notes\n"
    card.write_text(edited, encoding="utf-8")
    model.save_pretrained(str(tmp_path))
    assert card.read_text(encoding="utf-8") == edited
