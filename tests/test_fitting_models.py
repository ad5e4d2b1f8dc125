"""Which models fit, and what is said of those that do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from tiny import one_line, tokens
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from layerwise import UnsupportedModelError, attach

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
SMALL = {**tiny.COMMON, "num_hidden_layers": 2}
LATENT = {  # values of another size than keys
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 12,
    "first_k_dense_replace": 2,
}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)), "lacks 'layers'"),
        (lambda: MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)), "norm"),
        (lambda: GraniteForCausalLM(GraniteConfig(**SMALL, embedding_multiplier=3.0)), "logits differ"),
        (lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)), "logits differ"),
        (lambda: CohereForCausalLM(CohereConfig(**SMALL)), "logits differ"),
        (lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**SMALL | LATENT)), "experts"),
        (
            lambda: DeepseekV3ForCausalLM._from_config(
                DeepseekV3Config(**SMALL | LATENT), experts_implementation="eager"
            ),
            "calling its layers failed",
        ),
    ],
    ids=["gpt2", "mamba", "granite-embedding", "granite-logits", "cohere", "experts", "latent-attention"],
)
def test_models_that_are_more_than_their_parts_are_refused_by_name(
    model: Callable[[], PreTrainedModel], reason: str
) -> None:
    base = model().eval()
    one_line(lambda: attach(base), type(base).__name__, "does not fit", reason, error=UnsupportedModelError)


@torch.no_grad()
def test_one_map_for_queries_keys_and_values_fits(tmp_path: Path) -> None:
    base = Phi3ForCausalLM(Phi3Config(**SMALL)).eval()
    model, prompt = attach(base), tokens(2, 5)
    expected = base.generate(prompt, max_new_tokens=8)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, draft="ngram"), expected)
    layer = model.runtime.backbone.shape.layers[0]
    assert (layer.query_width, layer.key_width) == (32, 16)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    assert torch.equal(loaded.generate(input_ids=prompt, max_new_tokens=8), expected)


@torch.no_grad()
def test_gemma_fits_since_its_embedding_scales_by_itself() -> None:
    base = GemmaForCausalLM(GemmaConfig(**SMALL, head_dim=8)).eval()
    torch.testing.assert_close(attach(base)(tokens(1, 9)).logits, base(tokens(1, 9)).logits, **CLOSE)


def test_other_attention_implementations_are_refused() -> None:
    base = tiny.model("llama", attention="flex_attention")
    with pytest.raises(ValueError, match="flex_attention"):
        attach(base)


@pytest.mark.parametrize(("spread", "fits"), [(1, True), (tiny.VOCABULARY, False)])
def test_one_logit_that_rounds_otherwise_is_no_misfit(spread: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 some logits of a trained adapter, of 8 tokens at once or of 7 and 1, are a few percent apart."""
    base = tiny.model("llama").to(torch.bfloat16)
    forward = base.forward

    def rounded(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits[:, -1, :spread] += 0.2 * output.logits.abs().max()
        return output

    monkeypatch.setattr(base, "forward", rounded)
    if fits:
        attach(base)
    else:
        with pytest.raises(UnsupportedModelError, match="does not fit"):
            attach(base)
