"""Bridges: what does instead of a layer that a plan leaves out, as far as a map of low rank can.

A layer adds something to the residual stream, and much of what it adds can be foretold linearly from the state that
enters it. So a bridge is

    y[t] = h[t] + up(down(h[t] / rms(h[t]))) + bias          down: hidden size to rank, up: back

at the cost of 2 x rank x hidden size multiplications a token: of rank 64, with 576 hidden, a fiftieth of a layer. It
needs neither the cache nor other positions. That a linear map can take the place of layers is the idea of ReplaceMe
(arXiv 2505.02819), which merges one into the weights before it; here it stays apart, because the same weights also
serve the prompts that run the layer.

Bridges are named in plans (`4-6b`), and run only where a plan says so. A layer may have several, in numbered sets
(`4-6b2`), fitted to what enters it along different plans. They are fitted by least squares
(`training.bridge_fit`), and in LayerRoute trained on from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from layerwise.model.backbone import Backbone
from layerwise.plan import Part, Plan, Visit
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
    """Bridges of layers of `backbone`; `attach` lets its plans use them.

    Args:
        which: layers, for their bridges of set 0, or the visits that run the bridges.
        rank: of all, or by the number of their set.

    Raises:
        ValueError: there is no such layer, or no rank.
    """

    def __init__(self, backbone: Backbone, which: Iterable[int | Visit], rank: int | Mapping[int, int]) -> None:
        super().__init__()
        self.visits = tuple(sorted({_visit(one) for one in which}, key=lambda one: (one.set, one.layer)))
        if not self.visits or not all(0 <= one.layer < backbone.depth for one in self.visits):
            raise ValueError(f"layers to bridge must be among 0-{backbone.depth - 1}: name one at least")
        hidden = backbone.shape.hidden
        self.ranks = {one.set: rank if isinstance(rank, int) else rank[one.set] for one in self.visits}
        for one in self.ranks.values():
            if not 1 <= one <= hidden:
                raise ValueError(f"the rank of bridges must be 1 to {hidden}, the hidden size, not {one}")
        made = {_name(one): Bridge(hidden, self.ranks[one.set]) for one in self.visits}
        self.layers = nn.ModuleDict(made).to(backbone.device)

    def __getitem__(self, which: int | Visit) -> Bridge:
        return self.layers[_name(_visit(which))]

    @property
    def names(self) -> list[str]:
        """How they are named in files: `4` for the bridge of layer 4 in set 0, `4b2` for that in set 2."""
        return list(self.layers)

    def attach(self, backbone: Backbone) -> None:
        """Run these where a plan names them, in place of any that were there."""
        backbone.bridges = {visit: self[visit] for visit in self.visits}

    # -- saving ------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write them, in the numbers they are in."""
        from safetensors.torch import save_file

        ranks = " ".join(f"{number}:{rank}" for number, rank in self.ranks.items())
        about = {"format": "pt", "layers": " ".join(self.names), "ranks": ranks}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, str(Path(folder) / FILE), metadata=about)

    @classmethod
    def load(cls, folder: str | Path, backbone: Backbone) -> Bridges:
        """Read what `save` wrote, for the same base.

        Raises:
            ValueError: the file is missing, damaged or made for a model of another shape.
        """

        def made(about: dict[str, str], tensors: dict[str, Tensor]) -> Bridges:
            names = [name if "b" in name else f"{name}b" for name in about["layers"].split()]
            ranks = about.get("ranks") or f"0:{about['rank']}"  # of files before there were sets
            by_set = dict(tuple(map(int, one.split(":"))) for one in ranks.split())
            bridges = cls(backbone, Plan.parse(" ".join(names)), by_set)
            bridges.load_state_dict(tensors)
            return bridges

        return read_tensors(Path(folder) / FILE, "the bridges", made).eval().requires_grad_(False)


def _visit(which: int | Visit) -> Visit:
    return Visit(which, Part.BRIDGE) if isinstance(which, int) else which


def _name(visit: Visit) -> str:
    return str(visit) if visit.set else str(visit.layer)
