"""layerwise: spend transformer layers where they matter."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerwise.cost import Cost
    from layerwise.hub import from_pretrained
    from layerwise.model.backbone import UnsupportedModelError
    from layerwise.model.cache import Cache
    from layerwise.model.causal_lm import LayerwiseForCausalLM, attach
    from layerwise.model.fingerprint import fingerprint
    from layerwise.plan import Part, Plan, Visit
    from layerwise.sources import load_tokenizer
    from layerwise.trace import Phase, Trace

__version__ = "0.1.0"

# Loaded when first used: importing torch and transformers takes seconds, `layerwise --help` should not.
_HOMES = {
    "Cache": "model.cache",
    "Cost": "cost",
    "LayerwiseForCausalLM": "model.causal_lm",
    "Part": "plan",
    "Phase": "trace",
    "Plan": "plan",
    "Trace": "trace",
    "UnsupportedModelError": "model.backbone",
    "Visit": "plan",
    "attach": "model.causal_lm",
    "fingerprint": "model.fingerprint",
    "from_pretrained": "hub",
    "load_tokenizer": "sources",
}
__all__ = [
    "Cache",
    "Cost",
    "LayerwiseForCausalLM",
    "Part",
    "Phase",
    "Plan",
    "Trace",
    "UnsupportedModelError",
    "Visit",
    "attach",
    "fingerprint",
    "from_pretrained",
    "load_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"layerwise.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'layerwise' has no attribute '{name}'")
