"""A thin LM head: a cheap preview tells which tokens may come next, and only their logits are computed.

In a small model with a large vocabulary the head is a fifth of what a decoded token costs, and nearly all of it goes to
tokens that never had a chance. As in SVD-softmax (Shim et al., NIPS 2017), with h the state after the final norm and W
the head (vocabulary, hidden size):

    z       = down (h - center)                         down: hidden size to rank
    preview = (W up) z + W center                       up: rank to hidden size
    logits  = W h for the `candidates` tokens with the largest preview, the preview itself for all others

so the most likely tokens have the logits they always had, and the others still have a probability. `center`, `down` and
`up` are of the states that answers end in (`training.head_fits`); an adapter brings these. W up, the sketch, is made at
load and kept in 8 bits a number, with a scale for each token: it is most of what a thin head reads, and only likens.

Named at the end of plans (`0-29 ht`). It costs (rank + candidates) / hidden size and / vocabulary of the head's matrix,
where a few tokens are decoded; of many at once, all logits are computed and the candidates' taken, which is faster.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from layerwise.model.backbone import Backbone
from layerwise.tensor_files import read_tensors

FILE = "thin_head.safetensors"
MOST = 127  # of a sketch's numbers
AT_ONCE = 64  # positions whose logits are made at once
FEW = 4  # positions for which rows of the head are gathered; for more, all of it is read faster than a part for each


class ThinHead(nn.Module):
    """The thin head of `backbone`; `LayerwiseForCausalLM.thin_head_by` lets its plans use it.

    Args:
        center: (hidden size,).
        down: (rank, hidden size).
        up: (hidden size, rank).
        candidates: tokens of which a position's logits are computed in full.

    Raises:
        ValueError: the sizes do not fit the model, or its head is no plain map.
    """

    def __init__(self, backbone: Backbone, center: Tensor, down: Tensor, up: Tensor, candidates: int) -> None:
        super().__init__()
        head = backbone.head
        if type(head) is not nn.Linear:
            raise ValueError(f"a thin head is made of a plain LM head, not of {type(head).__name__}: merge its adapter")
        vocabulary, hidden = head.weight.shape
        if center.shape != (hidden,) or down.shape != (len(down), hidden) or up.shape != (hidden, len(down)):
            raise ValueError(f"a thin head of a model of hidden size {hidden} has other sizes than {tuple(down.shape)}")
        if not 0 < candidates <= vocabulary:
            raise ValueError(f"a thin head has 1 to {vocabulary} candidates, not {candidates}")
        self.candidates = candidates
        for name, tensor in (("center", center), ("down", down), ("up", up)):
            self.register_buffer(name, tensor.detach().to(head.weight.device, head.weight.dtype))
        weight = head.weight.detach().float()
        offset, sketch = weight @ self.center.float(), weight @ self.up.float()
        offset = offset if head.bias is None else offset + head.bias.detach().float()
        scale = sketch.abs().amax(1).clamp(min=1e-12) / MOST
        self.register_buffer("sketch", (sketch / scale[:, None]).round().to(torch.int8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def weights(self) -> int:
        """Entries of matrices that a position is multiplied by."""
        hidden = len(self.center)
        return self.down.numel() + self.sketch.numel() + self.candidates * hidden

    @property
    def parts(self) -> list[Tensor]:
        """What an operator is given of it; scale and offset in float32."""
        return [self.center, self.down, self.sketch, self.scale.float(), self.offset.float()]

    def preview(self, normed: Tensor, sketch: Tensor | None = None) -> Tensor:
        """(..., hidden size) after the final norm, to float32 (..., vocabulary); `sketch`: in float32, if at hand."""
        z = linear(normed - self.center, self.down)
        return linear(z.float(), self.sketch.float() if sketch is None else sketch) * self.scale + self.offset

    def forward(self, normed: Tensor, head: nn.Linear) -> Tensor:
        """Logits (..., vocabulary) of states (..., hidden size) after the final norm, in their dtype."""
        found, sketch = [], self.sketch.float()
        for states in normed.reshape(-1, normed.shape[-1]).split(AT_ONCE):
            preview = self.preview(states, sketch)
            best = preview.topk(self.candidates, -1).indices
            found.append(preview.scatter(-1, best, self._exact(states, best, head).float()).to(normed.dtype))
        return torch.cat(found).reshape(*normed.shape[:-1], -1)

    def _exact(self, states: Tensor, best: Tensor, head: nn.Linear) -> Tensor:
        """The head's logits (positions, candidates) of these tokens."""
        if len(states) > FEW:
            return head(states).gather(-1, best)
        exact = (head.weight[best] @ states[..., None])[..., 0]
        return exact if head.bias is None else exact + head.bias[best]

    # -- saving ------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write what is not the model's own."""
        from safetensors.torch import save_file

        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, str(Path(folder) / FILE), metadata={"format": "pt", "candidates": str(self.candidates)})

    @classmethod
    def load(cls, folder: str | Path, backbone: Backbone) -> ThinHead:
        """Read what `save` wrote, for the same base.

        Raises:
            ValueError: the file is missing, damaged or made for a model of another shape.
        """

        def made(about: dict[str, str], tensors: dict[str, Tensor]) -> ThinHead:
            return cls(backbone, tensors["center"], tensors["down"], tensors["up"], int(about["candidates"]))

        return read_tensors(Path(folder) / FILE, "the thin head", made).eval()
