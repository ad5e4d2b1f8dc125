"""An exit head: a small draft model beside an untouched base, which sees how deep the last verified token got.

An early exit of a model that was not trained for it predicts badly: in a deep, thin model the information comes late.
But after each verification the deep state of the last token is there for nothing, and it says most of what is to come.
The exit head joins both,

    u[t] = F [norm(h_E[t]); norm(g[t-1])]       h_E: the current token after E layers (E = 0: its embedding)
    s[t] = layer(u[t])                          one decoder layer, with a KV cache of its own
    logits[t] = head(norm(s[t]))                rows of the LM head for the most frequent tokens only

where g[t-1] is the base's last hidden state of the token before, or, while drafting, the head's own s[t-1] in its
place. Feeding back deep states is due to EAGLE (arXiv 2401.15077), training on one's own feedback to EAGLE-3 (arXiv
2503.01840), the cut head to FR-Spec (arXiv 2502.14856). Verification uses the whole vocabulary, so the
output stays exact.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.model.backbone import Backbone
from layerwise.tensor_files import read_tensors

FILE = "exit_head.safetensors"


class ExitHead(nn.Module):
    """A head for `base` at the exit after `exit` layers, starting as a copy of the base's last layer and norm.

    Args:
        base: the model that is drafted for; it is read, never changed.
        exit: E, how many layers the current token runs before the head sees it.
        vocabulary: ids of the tokens that can be drafted, (tokens,).

    Raises:
        ValueError: there is no such exit, no token, or one that the base does not have.
    """

    def __init__(self, base: Backbone, exit: int, vocabulary: Sequence[int]) -> None:
        super().__init__()
        if not 0 <= exit < base.depth:
            raise ValueError(f"an exit head sits after 0 to {base.depth - 1} layers, not {exit}")
        if not vocabulary:
            raise ValueError("an exit head needs at least one token to draft: give it a vocabulary")
        known = base.head.weight.shape[0]
        if not (min(vocabulary) >= 0 and max(vocabulary) < known):
            raise ValueError(f"an exit head drafts tokens 0 to {known - 1} of this model; its vocabulary has others")
        self.exit = exit
        hidden = base.shape.hidden
        like = {"dtype": base.dtype, "device": base.device}
        epsilon = getattr(base.config, "rms_norm_eps", 1e-6)
        self.early_norm = nn.RMSNorm(hidden, epsilon, **like)
        self.deep_norm = nn.RMSNorm(hidden, epsilon, **like)
        self.fuse = nn.Linear(2 * hidden, hidden, bias=False, **like)
        self.layer = _merged_copy(base.layers[-1]).requires_grad_(True)
        self.norm = _merged_copy(base.norm).requires_grad_(True)
        self.register_buffer("vocabulary", torch.tensor(sorted(vocabulary), device=base.device))
        self.head = nn.Linear(hidden, len(vocabulary), bias=base.head.bias is not None, **like).requires_grad_(False)
        self.cut(base)

    @torch.no_grad()
    def cut(self, base: Backbone) -> None:
        """Take the rows of the base's LM head that belong to the vocabulary."""
        self.head.weight.copy_(base.head.weight[self.vocabulary])
        if self.head.bias is not None:
            self.head.bias.copy_(base.head.bias[self.vocabulary])

    def join(self, early: Tensor, deep: Tensor) -> Tensor:
        """u from h_E and g, each (..., hidden size)."""
        return self.fuse(torch.cat([self.early_norm(early), self.deep_norm(deep)], -1))

    def backbone(self, base: Backbone) -> Backbone:
        """The head's layer, norm and cut head as a backbone of one layer, to be run as any other."""
        own = base.over(norm=self.norm, head=self.head)
        own.layers = [self.layer]
        own.kinds, own.attention, own.bridges = base.kinds[-1:], {}, {}
        return own

    # -- saving ------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the trained weights, in bfloat16; the head's rows are the base's and are left out."""
        from safetensors.torch import save_file

        tensors = {
            name: tensor.contiguous() if name == "vocabulary" else tensor.to(torch.bfloat16).contiguous()
            for name, tensor in self.state_dict().items()
            if not name.startswith("head.")
        }
        save_file(tensors, str(Path(folder) / FILE), metadata={"format": "pt", "exit": str(self.exit)})

    @classmethod
    def load(cls, folder: str | Path, base: Backbone) -> ExitHead:
        """Read what `save` wrote, for the same base.

        Raises:
            ValueError: the file is missing, damaged or made for a model of another shape.
        """

        def made(about: dict[str, str], tensors: dict[str, Tensor]) -> tuple[ExitHead, Any]:
            head = cls(base, int(about["exit"]), tensors["vocabulary"].tolist())
            return head, head.load_state_dict(tensors, strict=False)

        path = Path(folder) / FILE
        head, (missing, unexpected) = read_tensors(path, "the exit head", made)
        if unexpected or any(not name.startswith("head.") for name in missing):
            raise ValueError(f"the exit head '{path}' was made for a model of another shape: train it again")
        return head.eval().requires_grad_(False)


def _merged_copy(module: nn.Module) -> nn.Module:
    """A copy of `module` with what PEFT has added merged into it, so that its weights have the names of the model's."""
    held = nn.ModuleDict({"copy": copy.deepcopy(module)})
    for name, part in list(held.named_modules()):
        if hasattr(part, "unload_and_optionally_merge_module"):  # PEFT's wrapper of what is trained whole
            held.set_submodule(name, part.unload_and_optionally_merge_module(True, False, None))
        elif hasattr(part, "base_layer"):
            part.merge()
            held.set_submodule(name, part.get_base_layer())
    return held["copy"]
