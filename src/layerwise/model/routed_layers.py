"""Routed attention in a pretrained model: its own attention where a router asks for it, a short convolution elsewhere.

Of a converted layer everything stays as it was pretrained: projections, rotary positions, cache. What is added is a
router and, for each head, the weights of a causal convolution over the last few *values*: attention whose scores are
known before the text is, since distance alone decides. Both use the value and output projections that are there:

    conv[t]     = sum_j taps[head, j] value[t - j] + sink[head] value[0]        j = 0 .. taps - 1
    attend[t]   = router([x[t] ; conv[t]]) > 0
    local[t]    = conv[t] + correction([x[t] ; conv[t]])                        of low rank, if there is one
    y[t]        = output(attention[t] if attend[t] else local[t])

The first position has only itself to look at, so its attention is its value: it needs neither score nor correction.

Keys and values are made and cached for every position, so whoever attends later sees all of them; positions that do not
attend make no query and no score. All that a router and a convolution need of the past stands in the cache of values,
so rollback, batches and slots work as for any layer. A single token of one row goes through one operator
(`RoutedSelfAttention.token`), if the engine asks for it; everything else runs as written here.

The sink is there because heads that find nothing look at the first token (arXiv 2309.17453). The correction says what a
head's attention tends to bring to a position like this one. Taps and sink begin as the mean of what each head's
attention gives to each distance and to the first token (`measure`), or everything is fitted (`training.routed_fit`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.model.backbone import Backbone
from layerwise.model.few_tokens import load_operator
from layerwise.model.filters import causal_filter
from layerwise.model.position_router import Routing, gumbel_sigmoid
from layerwise.model.routed_attention import CHUNK, Mixing
from layerwise.model.scoring import rotated, score
from layerwise.tensor_files import read_tensors

FILE = "routed_layers.safetensors"
_MIXINGS = ("convolution", "attention", "routed")  # as routed_layer.cpp numbers them
_FITTING = ("LlamaAttention", "Qwen2Attention", "MistralAttention")


class RoutedSelfAttention(nn.Module):
    """Stands in for `attention` (of a Llama, Qwen2 or Mistral layer), which it reads and does not own.

    Attributes:
        mixing: "routed", or "attention" or "convolution" everywhere.
        routing: what the router said in the last call; see `Routing`.
        measuring: add up what attention gives to each distance, for `start`.
        decide: who attends, given logits (rows, width): True or False for each.
        sampled: in training, decide by chance with the router's probability; otherwise as in inference.
        prepared: single tokens may go through an operator of their own; see `token`.

    Raises:
        ValueError: attention of another kind.
    """

    def __init__(self, attention: nn.Module, taps: int = 16, router_width: int = 64, rank: int = 0) -> None:
        super().__init__()
        kind = type(attention).__name__
        if kind not in _FITTING or getattr(attention, "sliding_window", None):
            raise ValueError(f"{kind} cannot be routed: {', '.join(_FITTING)} without a sliding window can")
        self._attention = (attention,)  # in a tuple: its weights are the base's, neither trained nor saved with these
        self.head_dim = attention.head_dim
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        hidden, inner = attention.q_proj.in_features, attention.q_proj.out_features
        self.taps = nn.Parameter(torch.zeros(self.heads, taps))
        self.sink = nn.Parameter(torch.zeros(self.heads))
        self.router = nn.Sequential(
            nn.Linear(hidden + inner, router_width), nn.GELU("tanh"), nn.Linear(router_width, 1)
        )
        self.correction: nn.Sequential | None = None
        if rank:
            self.correction = nn.Sequential(nn.Linear(hidden + inner, rank, bias=False), nn.Linear(rank, inner))
            nn.init.zeros_(self.correction[-1].weight)
            nn.init.zeros_(self.correction[-1].bias)
        nn.init.zeros_(self.router[-1].weight)
        nn.init.constant_(self.router[-1].bias, 1.0)  # three of four attend before training
        self.mixing: Mixing = "routed"
        self.decide: Callable[[Tensor], Tensor] = _positive
        self.sampled = True
        self.routing: Routing | None = None
        self.measuring: list[Tensor] | None = None
        self.prepared = False

    @property
    def attention(self) -> nn.Module:
        return self._attention[0]

    def prepare(self, norm: nn.Module, notify: Callable[[str], None]) -> None:
        """Get ready for `token`, in a layer with this `norm` in front. Without a compiler, or if something stands where
        the pretrained projections were, `token` will decline. If weights are replaced, prepare again."""
        self.prepared = False
        layer = self.attention
        maps = [layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj]
        if not all(type(one) is nn.Linear for one in maps) or not type(norm).__name__.endswith("RMSNorm"):
            return
        none = norm.weight.new_empty(0)
        self._maps = [one.weight for one in maps] + [none if one.bias is None else one.bias for one in maps]
        self._norm = (norm.weight, norm.variance_epsilon)  # in a tuple, as the attention
        self._local = [self.taps, self.sink, *self.router.parameters()]
        self._local += [] if self.correction is None else self.correction.parameters()
        if all(one.dtype == norm.weight.dtype and one.is_contiguous() and one.is_cpu for one in self._maps):
            try:
                load_operator("routed_layer", notify)
                self.prepared = True
            except (OSError, CalledProcessError) as error:
                notify(f"routed layers run without an operator of their own ({type(error).__name__})")

    def token(
        self, hidden: Tensor, keys: Tensor, values: Tensor, place: int, rotary: tuple[Tensor, Tensor]
    ) -> Tensor | None:
        """The attention half of a layer, norm and residual included, for one token of one row: (1, 1, hidden size) to
        the same. Its key and value go to `place` in buffers (1, kv heads, capacity, head size). None, and nothing is
        done, if it is not prepared or this is no plain inference."""
        usual = self.measuring is not None or self.decide is not _positive or torch.is_grad_enabled()
        if not self.prepared or usual or (self.training and self.sampled):
            return None
        if hidden.dtype != self._norm[0].dtype or self._local[0].dtype != torch.float32:
            return None  # cast since
        output, gate, logits = torch.ops.layerwise.routed_layer.default(
            hidden,
            *self._norm,
            self._maps,
            keys,
            values,
            place,
            *rotary,
            self._local,
            self.attention.scaling,
            _MIXINGS.index(self.mixing),
        )
        if self.mixing == "routed":
            self.routing = Routing(gate, logits)
        return output

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """As the attention it stands for: (rows, width, hidden size) to the same shape.

        `position_ids` (1 or rows, width) are also each column's index among the keys: rows are packed to the left.
        """
        assert position_ids is not None, "the runtime tells positions"
        layer = self.attention
        keys, values = (_heads(project(hidden_states), self.head_dim) for project in (layer.k_proj, layer.v_proj))
        keys = rotated(keys, *position_embeddings)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, layer.layer_idx)
            held = past_key_values.held()
            if held is not None:  # a mask keeps attention from holes; the convolution reads all values
                values = values.masked_fill(~held[:, None, :, None], 0.0)
        seen = _Seen(hidden_states, position_embeddings, position_ids, attention_mask, keys, values)
        if self.measuring is not None:
            self.measuring.append(self._given_to_distances(seen))
        if self.mixing == "attention":
            return layer.o_proj(self._everywhere(seen)), None
        mixed = self._convolved(seen)
        features = torch.cat((hidden_states, mixed), -1).to(self.taps.dtype)
        mixed = self._completed(seen, mixed, features)
        if self.mixing == "routed":
            self.routing = routing = self._route(features, mixed.dtype)
            if torch.is_grad_enabled():
                gate = routing.gate[..., None]
                mixed = (1 - gate) * mixed + gate * self._everywhere(seen)
            else:
                mixed = self._attend(seen, mixed, routing.gate > 0)
        return layer.o_proj(mixed), None

    def _route(self, features: Tensor, dtype: torch.dtype) -> Routing:
        logits = self.router(features)[..., 0]
        gate = self.decide(logits).to(logits.dtype)
        if self.training and self.sampled:
            gate = gumbel_sigmoid(logits)
        return Routing(gate.to(dtype), logits)

    # -- convolution -----------------------------------------------------------------------------------------

    def _completed(self, seen: _Seen, mixed: Tensor, features: Tensor) -> Tensor:
        """The convolution's output with its correction, and exact at the first position of a text."""
        if self.correction is not None:
            mixed = mixed + self.correction(features).to(mixed.dtype)
        if seen.begins:
            first = seen.values[:, :, :1].repeat_interleave(self.heads // self.kv_heads, dim=1)
            mixed = torch.where(seen.places[..., None] == 0, first.transpose(1, 2).flatten(2), mixed)
        return mixed

    def _convolved(self, seen: _Seen) -> Tensor:
        """Values filtered by each head's taps, (rows, width, heads times head size)."""
        if len(set(seen.starts)) == 1:
            return self._filtered(seen.values, seen.starts[0], seen.width)
        rows = (self._filtered(seen.values[row : row + 1], start, seen.width) for row, start in enumerate(seen.starts))
        return torch.cat(list(rows))

    def _filtered(self, values: Tensor, start: int, width: int) -> Tensor:
        reach = self.taps.shape[1] - 1
        if width == 1 and not torch.is_grad_enabled():
            return self._newest(values[:, :, : start + 1])
        window = values[:, :, max(0, start - reach) : start + width]
        window = F.pad(window, (0, 0, reach + width - window.shape[2], 0))  # nothing stands before the text
        groups = self.heads // self.kv_heads
        window = window.repeat_interleave(groups, dim=1)
        first = values[:, :, :1].repeat_interleave(groups, dim=1) * self.sink.to(values.dtype)[:, None, None]
        return causal_filter(window.transpose(1, 2).flatten(2), self.taps) + first.transpose(1, 2).flatten(2)

    def _newest(self, values: Tensor) -> Tensor:
        """The last position's output (rows, 1, heads times head size): one product, since calls are what it costs."""
        count = min(self.taps.shape[1], values.shape[2])
        window = torch.cat((values[:, :, :1], values[:, :, -count:]), dim=2)
        weights = torch.cat((self.sink[:, None], self.taps[:, :count].flip(-1)), dim=1).to(values.dtype)
        return (weights.unflatten(0, (self.kv_heads, -1)) @ window).flatten(1)[:, None]

    def _given_to_distances(self, seen: _Seen) -> Tensor:
        """Mean attention (heads, taps + 1) that a head gives to the position j before, over positions that have one;
        last, what it gives to the first of all, over positions whose taps do not reach it."""
        queries = rotated(_heads(self.attention.q_proj(seen.hidden), self.head_dim), *seen.rotary)
        keys = seen.keys.repeat_interleave(self.heads // self.kv_heads, dim=1)
        scores = (queries @ keys.transpose(2, 3)).float() * self.attention.scaling
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        given = scores.masked_fill(ahead, float("-inf")).softmax(-1)
        taps = self.taps.shape[1]
        means = [given.diagonal(-j, 2, 3).mean((0, 2)) for j in range(taps)]
        means.append(given[:, :, taps:, 0].mean((0, 2)))
        return torch.stack(means, dim=1)

    # -- attention -------------------------------------------------------------------------------------------

    def _everywhere(self, seen: _Seen) -> Tensor:
        """Attention of all positions (rows, width, heads times head size)."""
        queries = rotated(_heads(self.attention.q_proj(seen.hidden), self.head_dim), *seen.rotary)
        causal = seen.mask is None and seen.width > 1
        return score(queries, seen.keys, seen.values, seen.mask, causal, self.attention.scaling)

    def _attend(self, seen: _Seen, mixed: Tensor, attends: Tensor) -> Tensor:
        """`mixed` with the positions that attend (rows, width) replaced by attention; the others cost nothing."""
        counts = attends.sum(1)
        most = int(counts.max())
        if most == 0:
            return mixed
        if most == seen.width and bool((counts == most).all()):
            return self._everywhere(seen)
        # Each row's routed columns, in order; rows that have fewer are filled up and these dropped again below.
        columns = attends.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        spread = columns[..., None].expand(-1, -1, mixed.shape[-1])
        asked = seen.hidden.gather(1, columns[..., None].expand(-1, -1, seen.hidden.shape[-1]))
        rotary = tuple(_picked(one, columns) for one in seen.rotary)
        queries = rotated(_heads(self.attention.q_proj(asked), self.head_dim), *rotary)
        places = _picked(seen.places, columns)
        chosen = attends.gather(1, columns)
        outputs = []
        for first in range(0, most, CHUNK):
            part = slice(first, first + CHUNK)
            end = int(places[:, part].max()) + 1  # nothing later is seen by any of these
            allowed = self._allowed(seen, columns[:, part], places[:, part], end)
            keys, values = seen.keys[:, :, :end], seen.values[:, :, :end]
            outputs.append(score(queries[:, :, part], keys, values, allowed, scale=self.attention.scaling))
        attended = torch.where(chosen[..., None], torch.cat(outputs, dim=1), mixed.gather(1, spread))
        return mixed.scatter(1, spread, attended)

    def _allowed(self, seen: _Seen, columns: Tensor, places: Tensor, end: int) -> Tensor | None:
        """The mask (rows, 1, queries, end) of the queries in `columns`, which stand at `places`."""
        if seen.mask is not None:
            rows = torch.arange(len(columns), device=columns.device)[:, None]
            return seen.mask.expand(len(columns), -1, -1, -1)[rows, 0, columns, :end][:, None]
        if places.numel() == 1:
            return None
        return (torch.arange(end, device=places.device) <= places[..., None])[:, None]


class _Seen:
    """What one call was given: hidden states, rotary embedding, places, mask, and all keys and values."""

    def __init__(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        places: Tensor,
        mask: Tensor | None,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        self.hidden, self.rotary, self.places, self.mask = hidden, rotary, places, mask
        self.keys, self.values, self.width = keys, values, hidden.shape[1]
        self.starts = places[:, 0].tolist()
        self.begins = 0 in self.starts


def _heads(states: Tensor, size: int) -> Tensor:
    """(rows, width, heads times size) to (rows, heads, width, size)."""
    return states.unflatten(-1, (-1, size)).transpose(1, 2)


def _positive(logits: Tensor) -> Tensor:
    return logits > 0


def _picked(values: Tensor, columns: Tensor) -> Tensor:
    """`values` (1 or rows, width, ...) at `columns` (rows, count)."""
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    return values.expand(len(columns), *values.shape[1:])[rows, columns]


# -- all converted layers ----------------------------------------------------------------------------------------------


class RoutedLayers(nn.Module):
    """The converted layers of `backbone`; `attach` makes the backbone use them. See the module's text.

    Raises:
        ValueError: there is no such layer, or its attention is of a kind that does not fit.
    """

    def __init__(
        self, backbone: Backbone, layers: Iterable[int], taps: int = 16, router_width: int = 64, rank: int = 0
    ) -> None:
        super().__init__()
        self.numbers = tuple(sorted(set(layers)))
        if not self.numbers or not 0 <= self.numbers[0] <= self.numbers[-1] < backbone.depth:
            raise ValueError(f"layers to convert must be among 0-{backbone.depth - 1}: name one at least")
        self.sizes = {"taps": taps, "router_width": router_width, "rank": rank}
        self.layers = nn.ModuleDict(
            {str(n): RoutedSelfAttention(backbone.layers[n].self_attn, **self.sizes) for n in self.numbers}
        ).to(backbone.device)

    def __iter__(self) -> Iterator[RoutedSelfAttention]:
        return iter(self.layers.values())

    def attach(self, backbone: Backbone) -> None:
        """Run these instead of the backbone's own attention."""
        backbone.attention = {number: self.layers[str(number)] for number in self.numbers}

    @contextmanager
    def mixing(self, mixing: Mixing) -> Iterator[None]:
        """ "attention" is the pretrained model."""
        before = [layer.mixing for layer in self]
        for layer in self:
            layer.mixing = mixing
        try:
            yield
        finally:
            for layer, kind in zip(self, before, strict=True):
                layer.mixing = kind

    def routing(self) -> Routing:
        """What the routers said in the last pass: gates and logits (layers, rows, width)."""
        said = [layer.routing for layer in self]
        assert all(one is not None for one in said), "no pass was routed yet"
        return Routing(torch.stack([one.gate for one in said]), torch.stack([one.logits for one in said]))

    @torch.no_grad()
    def level(self, logits: Tensor, usage: float, share: float = 1.0) -> None:
        """Move all routers' biases alike, `share` of the way to where `usage` of these `logits` would be positive."""
        flat = logits.detach().float().flatten()
        most = flat.kthvalue(max(1, round((1 - usage) * flat.numel()))).values
        for layer in self:
            layer.router[-1].bias -= share * most

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Set taps and sink to what attention gives in the passes made inside; rows longer than the taps, unpadded."""
        for layer in self:
            layer.measuring = []
        try:
            with self.mixing("attention"):
                yield
            with torch.no_grad():
                for layer in self:
                    means = torch.stack(layer.measuring).mean(0)
                    layer.taps.copy_(means[:, :-1])
                    layer.sink.copy_(means[:, -1])
        finally:
            for layer in self:
                layer.measuring = None

    # -- saving ------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write taps and routers; the rest is the base's."""
        from safetensors.torch import save_file

        about = {"layers": " ".join(map(str, self.numbers)), **{name: str(size) for name, size in self.sizes.items()}}
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, str(Path(folder) / FILE), metadata={"format": "pt", **about})

    @classmethod
    def load(cls, folder: str | Path, backbone: Backbone) -> RoutedLayers:
        """Read what `save` wrote, for the same base.

        Raises:
            ValueError: the file is missing, damaged or made for a model of another shape.
        """

        def made(about: dict[str, str], tensors: dict[str, Tensor]) -> RoutedLayers:
            numbers = [int(number) for number in about["layers"].split()]
            layers = cls(backbone, numbers, int(about["taps"]), int(about["router_width"]), int(about.get("rank", 0)))
            layers.load_state_dict(tensors)
            return layers

        return read_tensors(Path(folder) / FILE, "the routed layers", made).eval().requires_grad_(False)
