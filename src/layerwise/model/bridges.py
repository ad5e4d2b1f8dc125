"""Bridges: what does instead of a layer that a plan leaves out, as far as a map of low rank can.

A layer adds something to the residual stream, and much of what it adds can be foretold linearly from the state that
enters it. So a bridge is

    y[t] = h[t] + up(down(h[t] / rms(h[t]))) + bias          down: hidden size to rank, up: back

at the cost of 2 x rank x hidden size multiplications a token: of rank 64, with 576 hidden, a fiftieth of a layer. It
needs neither the cache nor other positions. That a linear map can take the place of layers is the idea of ReplaceMe
(arXiv 2505.02819), which merges one into the weights before it; here it stays apart, because the same weights also
serve the prompts that run the layer.

Bridges are named in plans (`4-6b`), and run only where a plan says so. They are fitted by least squares
(`training.bridge_fit`), and in LayerRoute trained on from there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from layerwise.model.backbone import Backbone
from layerwise.policies.prompts import normalised
from layerwise.tensor_files import read_tensors

FILE = "bridges.safetensors"


class Bridge(nn.Module):
    """The bridge of one layer; called as the layer is, it looks at nothing but the hidden states.

    A new one adds nothing.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, hidden_size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        # In the dtype of its weights, which in training differs from that of the states.
        seen = normalised(hidden_states).to(self.down.weight.dtype)
        return hidden_states + self.up(self.down(seen)).to(hidden_states.dtype)


class Bridges(nn.Module):
    """The bridges of some layers of `backbone`; `attach` lets its plans use them.

    Raises:
        ValueError: there is no such layer, or no rank.
    """

    def __init__(self, backbone: Backbone, layers: Iterable[int], rank: int) -> None:
        super().__init__()
        self.numbers = tuple(sorted(set(layers)))
        if not self.numbers or not 0 <= self.numbers[0] <= self.numbers[-1] < backbone.depth:
            raise ValueError(f"layers to bridge must be among 0-{backbone.depth - 1}: name one at least")
        hidden = backbone.shape.hidden
        if not 1 <= rank <= hidden:
            raise ValueError(f"the rank of bridges must be 1 to {hidden}, the hidden size, not {rank}")
        self.layers = nn.ModuleDict({str(n): Bridge(hidden, rank) for n in self.numbers}).to(backbone.device)

    def __getitem__(self, layer: int) -> Bridge:
        return self.layers[str(layer)]

    def attach(self, backbone: Backbone) -> None:
        """Run these where a plan names them, in place of any that were there."""
        backbone.bridges = {number: self[number] for number in self.numbers}

    # -- saving ------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write them, in the numbers they are in."""
        from safetensors.torch import save_file

        rank = self[self.numbers[0]].down.out_features
        about = {"format": "pt", "layers": " ".join(map(str, self.numbers)), "rank": str(rank)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, str(Path(folder) / FILE), metadata=about)

    @classmethod
    def load(cls, folder: str | Path, backbone: Backbone) -> Bridges:
        """Read what `save` wrote, for the same base.

        Raises:
            ValueError: the file is missing, damaged or made for a model of another shape.
        """

        def made(about: dict[str, str], tensors: dict[str, Tensor]) -> Bridges:
            bridges = cls(backbone, [int(number) for number in about["layers"].split()], int(about["rank"]))
            bridges.load_state_dict(tensors)
            return bridges

        return read_tensors(Path(folder) / FILE, "the bridges", made).eval().requires_grad_(False)
