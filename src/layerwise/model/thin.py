"""Thin MLPs: of a layer's MLP the neurons that matter to some inputs, in place of all.

The MLP of a decoder layer is a sum over its neurons (SwiGLU and its kin, arXiv 2002.05202),

    y = sum over j of  down_j * act(gate_j . x) * (up_j . x)

and which of them an input needs depends on what it is: to close a bracket in a tool call takes fewer than to work out
a sum. A thin MLP keeps some and leaves out the others; its weights are rows and columns of the layer's own, so an
adapter has to name the neurons. They are chosen by what the answers of examples would lose (`training.neuron_fits`).

Much of what the others would have added can be foretold from those that are kept. So a thin MLP may be *mended*: a
change of low rank, and a bias, are added to the map down, which costs nothing when it runs:

    y = (down_kept + out @ into) @ a + bias         into: kept neurons to rank, out: rank to the hidden size

That is how pruned models are mended without training (arXiv 2204.09656 by least squares, 2312.11983 by biases); here
the whole MLP stays beside the thin one, for the inputs that need it.

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
KEPT = ".kept"
GATED = ("gate_proj", "up_proj", "down_proj")


class Mend(nn.Module):
    """What is added to the map down of a thin MLP: a product of low rank, and a bias."""

    def __init__(self, neurons: int, rank: int, hidden: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.into = nn.Linear(neurons, rank, bias=False, device=device)
        self.out = nn.Linear(rank, hidden, device=device)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, activations: Tensor) -> Tensor:
        # In the dtype of its weights, which in training differs from that of the states.
        return self.out(self.into(activations.to(self.into.weight.dtype))).to(activations.dtype)


class _Mended(nn.Module):
    """A map and its mend, as long as that learns; see `ThinMlps.fold`."""

    def __init__(self, linear: nn.Linear, mend: Mend) -> None:
        super().__init__()
        self.linear, self.mend = linear, mend

    def forward(self, activations: Tensor) -> Tensor:
        return self.linear(activations) + self.mend(activations)

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        weight, into, out = self.linear.weight, self.mend.into.weight.float(), self.mend.out
        bias = out.bias.float() if self.linear.bias is None else out.bias.float() + self.linear.bias.float()
        return _linear((weight.float() + out.weight.float() @ into).to(weight.dtype), bias.to(weight.dtype))


class ThinMlps(nn.Module):
    """Thin MLPs of layers of `backbone`; `LayerwiseForCausalLM.thin_by` lets its plans use them.

    Args:
        kept: by layer, the numbers of the neurons that its thin MLP keeps.
        rank: of what mends them; 0 for nothing. A new mend adds nothing.

    Raises:
        ValueError: there is no such layer or neuron, or none is kept.
        UnsupportedModelError: the layers' MLPs are not gated ones as above, or have adapters of their own.
    """

    def __init__(self, backbone: Backbone, kept: Mapping[int, Tensor], rank: int = 0) -> None:
        super().__init__()
        if not kept or not all(0 <= layer < backbone.depth for layer in kept):
            raise ValueError(f"layers with a thin MLP must be among 0-{backbone.depth - 1}: name one at least")
        self.kept = {layer: kept[layer].long().sort().values for layer in sorted(kept)}
        made = {str(layer): thinned(backbone.layers[layer].mlp, those) for layer, those in self.kept.items()}
        self.layers = nn.ModuleDict(made).requires_grad_(False)
        self.mends = nn.ModuleDict()
        if rank:
            hidden = backbone.shape.hidden
            for layer, those in self.kept.items():
                mend = Mend(len(those), rank, hidden, backbone.device)
                self.mends[str(layer)] = mend
                self[layer].down_proj = _Mended(self[layer].down_proj, mend)

    def __getitem__(self, layer: int) -> nn.Module:
        return self.layers[str(layer)]

    @property
    def numbers(self) -> tuple[int, ...]:
        """The layers that have one."""
        return tuple(self.kept)

    def fold(self) -> ThinMlps:
        """Add the mends into the maps they mend, so that they cost nothing any more, and learn no more."""
        for layer in self.kept:
            if isinstance(self[layer].down_proj, _Mended):
                self[layer].down_proj = self[layer].down_proj.folded()
        return self

    # -- saving ------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write which neurons are kept and what mends them; the weights of neurons are the base's."""
        from safetensors.torch import save_file

        tensors = {f"{layer}.kept": those.to(torch.int32).cpu() for layer, those in self.kept.items()}
        tensors |= {name: tensor.detach().cpu().contiguous() for name, tensor in self.mends.state_dict().items()}
        save_file(tensors, str(Path(folder) / FILE), metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: str | Path, backbone: Backbone) -> ThinMlps:
        """Read what `save` wrote, for the same base. What mends them is not folded in yet.

        Raises:
            ValueError: the file is missing, damaged or made for a model of another shape.
        """

        def made(_: dict[str, str], tensors: dict[str, Tensor]) -> ThinMlps:
            kept = {int(name.removesuffix(KEPT)): those for name, those in tensors.items() if name.endswith(KEPT)}
            mends = {name: tensor for name, tensor in tensors.items() if not name.endswith(KEPT)}
            rank = next((len(one) for name, one in mends.items() if name.endswith("into.weight")), 0)
            thin = cls(backbone, kept, rank)
            thin.mends.load_state_dict(mends)
            return thin

        return read_tensors(Path(folder) / FILE, "the thin MLPs", made).eval().requires_grad_(False)


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
        those = kept.to(linear.weight.device)
        weight, bias = linear.weight.detach(), linear.bias
        if name == "down_proj":
            weight = weight[:, those]
        else:
            weight, bias = weight[those], None if bias is None else bias[those]
        thin._modules[name] = _linear(weight, bias)
    return thin


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen map with copies of these."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made
