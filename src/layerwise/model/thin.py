"""Thin MLPs: of a layer's MLP the neurons that matter to some inputs, in place of all.

The MLP of a decoder layer is a sum over its neurons (SwiGLU and its kin, arXiv 2002.05202),

    y = sum over j of  down_j * act(gate_j . x) * (up_j . x)

and which of them an input needs depends on what it is: to close a bracket in a tool call takes fewer than to work out
a sum. A thin MLP keeps some, whole, and leaves out the others; its weights are rows and columns of the layer's own, so
an adapter has to name the neurons and nothing more. They are chosen by what the answers of examples would lose
(`training.neuron_fits`).

Named in plans (`23t`), they run only where a plan says so: the attention of the layer as ever, then the thin MLP. They
are copies, because memory is read fastest in one piece; those of half the neurons take half of the MLP's memory again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from layerwise.model.backbone import Backbone, UnsupportedModelError
from layerwise.tensor_files import read_tensors

FILE = "thin.safetensors"
GATED = ("gate_proj", "up_proj", "down_proj")


class ThinMlps(nn.Module):
    """Thin MLPs of layers of `backbone`; `attach` lets its plans use them.

    Args:
        kept: by layer, the numbers of the neurons that its thin MLP keeps.

    Raises:
        ValueError: there is no such layer or neuron, or none is kept.
        UnsupportedModelError: the layers' MLPs are not gated ones as above, or have adapters of their own.
    """

    def __init__(self, backbone: Backbone, kept: Mapping[int, Tensor]) -> None:
        super().__init__()
        if not kept or not all(0 <= layer < backbone.depth for layer in kept):
            raise ValueError(f"layers with a thin MLP must be among 0-{backbone.depth - 1}: name one at least")
        self.kept = {layer: kept[layer].long().sort().values for layer in sorted(kept)}
        made = {str(layer): thinned(backbone.layers[layer].mlp, those) for layer, those in self.kept.items()}
        self.layers = nn.ModuleDict(made).requires_grad_(False)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The layers that have one."""
        return tuple(self.kept)

    def attach(self, backbone: Backbone) -> None:
        """Run these where a plan names them, in place of any that were there."""
        backbone.thin = {layer: self.layers[str(layer)] for layer in self.kept}

    # -- saving ------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write which neurons are kept; their weights are the base's."""
        from safetensors.torch import save_file

        tensors = {str(layer): those.to(torch.int32).cpu() for layer, those in self.kept.items()}
        save_file(tensors, str(Path(folder) / FILE), metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: str | Path, backbone: Backbone) -> ThinMlps:
        """Read what `save` wrote, for the same base.

        Raises:
            ValueError: the file is missing, damaged or made for a model of another shape.
        """

        def made(_: dict[str, str], tensors: dict[str, Tensor]) -> ThinMlps:
            return cls(backbone, {int(layer): those for layer, those in tensors.items()})

        return read_tensors(Path(folder) / FILE, "the thin MLPs", made).eval()


def gated(mlp: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """The three maps of a gated MLP.

    Raises:
        UnsupportedModelError: it is not one, or its maps have adapters.
    """
    maps = tuple(getattr(mlp, name, None) for name in GATED)
    if not all(type(one) is nn.Linear for one in maps):
        raise UnsupportedModelError(
            f"{type(mlp).__name__} does not fit: thin MLPs are made of {', '.join(GATED)} without adapters; "
            "train LoRA on attention, or merge it"
        )
    return maps


def thinned(mlp: nn.Module, kept: Tensor) -> nn.Module:
    """A copy of a gated MLP with only the neurons `kept`.

    Raises:
        ValueError: none is kept, one twice, or there is no such neuron.
    """
    maps = dict(zip(GATED, gated(mlp), strict=True))
    size = maps["down_proj"].in_features
    if not len(kept) or len(kept.unique()) != len(kept) or not 0 <= int(kept.min()) <= int(kept.max()) < size:
        raise ValueError(f"a thin MLP keeps some of the neurons 0-{size - 1}, each once")
    thin = copy.copy(mlp)
    thin._modules = dict(mlp._modules)
    for name, linear in maps.items():
        kept_here = kept.to(linear.weight.device)
        weight = linear.weight.detach()
        weight = weight[:, kept_here] if name == "down_proj" else weight[kept_here]
        bias = None if linear.bias is None else linear.bias.detach()
        bias = bias if bias is None or name == "down_proj" else bias[kept_here]
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        made.weight = nn.Parameter(weight.contiguous().clone(), requires_grad=False)
        if bias is not None:
            made.bias = nn.Parameter(bias.clone(), requires_grad=False)
        thin._modules[name] = made
    return thin
