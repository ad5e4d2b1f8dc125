"""Routed attention: each position pays for attention only if it asks for it.

Most positions of a text can be mixed by a short convolution; a few must look far back. A router reads each position and
its recent past and chooses: a causal depthwise convolution, whose cost does not grow with the text, or attention to all
earlier positions (M. Bee, Zenodo 10.5281/zenodo.18518956: y = (1 - g) convolution + g attention, g in {0, 1}).

The published code computes both everywhere and blends, which saves nothing. Here the queries of the routed positions
are gathered, only they are scored against the keys, and the results are scattered back: O(kN) for k of N positions. All
positions can be looked at, so keys and values are projections of all of them (O(N)); they are made when a routed
position first needs them. So a text in which nobody attends makes none, and in decoding a token that is not routed
costs the router and the convolution, and nothing that grows with the text.

Training blends both everywhere, since the gradient of a choice is the difference between the two; at inference the
router's argmax is taken and the work really skipped. `reference` is the blend, which the fast path must equal.
"""

from __future__ import annotations

from collections.abc import Callable
from subprocess import CalledProcessError
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.model.few_tokens import load_operator
from layerwise.model.filters import causal_filter
from layerwise.model.position_router import Router, Routing, gumbel_sigmoid
from layerwise.model.scoring import rotate, score, score_sorted

if TYPE_CHECKING:
    from layerwise.model.recall_model import RoutedLayerCache

Mixing = Literal["routed", "attention", "convolution"]
Kernel = Literal["auto", "dense", "gathered", "chunked"]
CHUNK, _LEAST_CHUNK = 256, 16  # most and fewest routed queries scored at once: their keys end at the last of them
BLOCK = 1024  # positions that the convolution takes at once at inference
FEW = 32  # inputs up to which a map is done by the operator for few tokens


class RoutedAttention(nn.Module):
    """The layer; see the module's text.

    Args:
        hidden_size, heads, kv_heads, head_dim: as in any attention; `kv_heads` defaults to `heads`, `head_dim` to
            hidden_size / heads.
        kernel_size: taps of the convolution; its weights are a softmax over the taps, one set a head.
        router_width: inner width of the router; the hidden size unless given, as published. A narrow one is cheaper.
        rope_theta: base of rotary positions (in the rotate-half form of Llama); None has no positions, as published.
        initial_usage: share of positions that attend before training.
        bias: whether the projections of attention have biases.

    Attributes:
        mixing: "routed", or "attention" or "convolution" everywhere, without asking the router.
        prepared: single tokens are decoded by operators of their own; see `prepare`.
        kernel: how routed queries are scored; all give the same result. "dense" scores every position; "gathered" the
            routed ones against all keys; "chunked" in chunks, each against the keys up to its last query. "auto" is
            dense if everybody attends and chunked otherwise.
        fused: of a prepared layer that attends everywhere, a single query is scored by torch's fused attention: what
            benchmarks compare with.
        blend: compute both paths everywhere while training, for an exact straight-through gradient. Without it the
            routed path is used, and only positions that attend teach the router.
        tau: temperature of the Gumbel softmax in training.

    Raises:
        ValueError: sizes do not divide.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        kernel_size: int = 64,
        router_width: int | None = None,
        rope_theta: float | None = None,
        initial_usage: float = 0.5,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        if hidden_size % heads or heads % self.kv_heads:
            raise ValueError("hidden-size must be a multiple of heads, and heads of kv-heads")
        if not 0 < initial_usage < 1 or kernel_size < 1:
            raise ValueError("initial-usage must be between 0 and 1, and kernel-size at least 1")
        self.head_dim = head_dim or hidden_size // heads
        if rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head size, not {self.head_dim}: leave rope-theta out")
        self.hidden_size, self.kernel_size, self.rope_theta = hidden_size, kernel_size, rope_theta
        self.q_proj = nn.Linear(hidden_size, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden_size, bias=False)
        self.conv_value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.conv_output = nn.Linear(hidden_size, hidden_size, bias=False)
        self.conv_taps = nn.Parameter(torch.empty(heads, kernel_size))
        self.router = Router(hidden_size, router_width or hidden_size, initial_usage=initial_usage)
        self.mixing: Mixing = "routed"
        self.kernel: Kernel = "auto"
        self.chunk, self.blend, self.tau = CHUNK, True, 1.0
        self.prepared = self.fused = False
        self.start_taps()

    def start_taps(self) -> None:
        """Heads of short and of long memory: weights that fall by e over 1 to `kernel_size` / 2 taps."""
        reach = torch.logspace(0, 1, self.heads, base=max(2.0, self.kernel_size / 2))
        with torch.no_grad():
            self.conv_taps.copy_(-torch.arange(self.kernel_size) / reach[:, None])

    def prepare(self, notify: Callable[[str], None] = lambda line: None) -> bool:
        """Decode single tokens by operators made for that; False, and all stays as it is, without a compiler.

        Of a small layer's token most of the time is the calls, not the work: some thirty become one.
        Weights may be written to, moved and cast afterwards; if they are replaced, prepare again.
        """
        self.prepared = False
        if all(one.bias is None for one in (self.q_proj, self.k_proj, self.v_proj)):
            try:
                load_operator("routed_token", notify)
                maps, last = self.router.inputs, self.router.out
                # Looking these up at each token takes a tenth of its time.
                router = [maps.weight, maps.bias, last.weight, last.bias]
                convolution = [self.conv_value.weight, self.conv_output.weight, self.conv_taps]
                self._attention_weights = [one.weight for one in (self.q_proj, self.k_proj, self.v_proj, self.o_proj)]
                self._token_weights = [*router, *convolution, *self._attention_weights]
                self._decay = self.router.decay
                self.prepared = True
            except (OSError, CalledProcessError) as error:
                notify(f"single tokens are decoded without operators of their own ({type(error).__name__})")
        return self.prepared

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        cache: RoutedLayerCache | None = None,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Mix `hidden` (rows, width, hidden size); returns the same shape, and what was routed.

        Args:
            mask: (rows, width) True at tokens, False at padding; None if there is none. Padding contributes nothing
                and its output means nothing. It stands at the start or the end of a row, and with a `cache` that
                is continued only at the start.
            cache: earlier positions of the same rows, continued in place.
            gate: (rows, width) who attends, instead of the router.
        """
        if self.prepared and cache is not None and mask is None and self._single(hidden, cache):
            return self._decode(hidden, cache, gate)
        routing = self._route(hidden, mask, cache, gate)
        if self.training and self.blend and cache is None and self.mixing == "routed":
            return self._blend(hidden, mask, routing), routing
        return self._mix(hidden, mask, cache, routing.gate), routing

    def reference(
        self, hidden: Tensor, mask: Tensor | None = None, gate: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """As `forward` without a cache, slowly: both paths at every position, blended by the gate."""
        routing = self._route(hidden, mask, None, gate)
        return self._blend(hidden, mask, routing), routing

    def _route(
        self, hidden: Tensor, mask: Tensor | None, cache: RoutedLayerCache | None, gate: Tensor | None
    ) -> Routing:
        if self.mixing != "routed":
            chosen = hidden.new_full(hidden.shape[:2], float(self.mixing == "attention"))
            logits = torch.zeros_like(chosen)
        else:
            # Asked even if `gate` decides: the moving average goes on, and a timing includes the router.
            logits, average = self.router(hidden, mask, None if cache is None else cache.average)
            if cache is not None:
                cache.average = average
            if gate is not None:
                chosen = gate.to(hidden.dtype)
            elif self.training:
                chosen = gumbel_sigmoid(logits, self.tau)
            else:
                chosen = (logits > 0).to(hidden.dtype)
        return Routing(chosen if mask is None else chosen * mask, logits)

    # -- one token by operators ----------------------------------------------------------------------------------

    def _single(self, hidden: Tensor, cache: RoutedLayerCache) -> bool:
        one = hidden.numel() == self.hidden_size and hidden.is_cpu and cache.starts is None
        return one and self.mixing != "convolution" and not torch.is_grad_enabled()

    def _decode(self, hidden: Tensor, cache: RoutedLayerCache, gate: Tensor | None) -> tuple[Tensor, Routing]:
        """`_route` and `_mix` of one token of one row."""
        if self.mixing == "attention":
            cache.advance(hidden, None, 0)
            return self._attend_one(hidden, cache), Routing(hidden.new_ones(1, 1), hidden.new_zeros(1, 1))
        waiting, inputs, window = cache.room(self.kernel_size - 1, hidden), cache.inputs, cache.window
        keys, values = (cache.keys, cache.values) if self.rope_theta is None else (None, None)
        logits, gate, cache.average, output, attends = torch.ops.layerwise.routed_token.default(
            hidden,
            self._token_weights,
            cache.average,
            self._decay,
            gate,
            inputs.buffer,
            inputs.end,
            waiting,
            window.buffer,
            window.end,
            keys,
            values,
            cache.length,
            cache.made,
        )
        cache.length += 1
        inputs.end += 1
        if not attends:
            cache.mixed = cache.length
            window.end += waiting + 1
        elif output.shape[1]:
            cache.made = cache.length
        else:
            output = self._attend_one(hidden, cache)
        return output, Routing(gate, logits)

    def _attend_one(self, hidden: Tensor, cache: RoutedLayerCache) -> Tensor:
        """Attention of the newest token, once it is in the cache."""
        if self.rope_theta is not None:
            return self._attend_everywhere(hidden, cache.positions(1, hidden.device), cache)
        keys, values = cache.key_room(cache.length, self.kv_heads, self.head_dim, hidden)
        inputs, count = cache.inputs, cache.length - cache.made
        output = torch.ops.layerwise.attend_token.default(
            inputs.buffer, inputs.end - count, count, self._attention_weights, keys, values, cache.made, self.fused
        )
        cache.made = cache.length
        return output

    def _map(self, hidden: Tensor, *maps: nn.Module) -> list[Tensor]:
        """What each of `maps` makes of `hidden`."""
        if self.prepared and hidden.shape[0] * hidden.shape[1] <= FEW and hidden.is_cpu and not torch.is_grad_enabled():
            return torch.ops.layerwise.few_token_linear(hidden, [one.weight for one in maps])
        return [one(hidden) for one in maps]

    # -- both paths everywhere: the reference, and training ------------------------------------------------

    def _blend(self, hidden: Tensor, mask: Tensor | None, routing: Routing) -> Tensor:
        convolved = self._convolve(hidden, mask, None)
        places = _positions(mask, hidden)
        keys, values = self.project(hidden, places)
        seen = None
        if mask is not None:
            # A query of padding sees itself, so that its softmax is defined.
            square = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool, device=hidden.device)
            seen = ((square.tril() & mask[:, None]) | (square.tril() & square.triu()))[:, None]
        attended = score(self._queries(hidden, places), keys, values, seen, causal=seen is None)
        gate = routing.gate[..., None]
        return (1 - gate) * convolved + gate * self.o_proj(attended)

    # -- the routed path -------------------------------------------------------------------------------------

    def _mix(self, hidden: Tensor, mask: Tensor | None, cache: RoutedLayerCache | None, gate: Tensor) -> Tensor:
        """Convolution where the gate is 0 and attention where it is 1, and neither where it is not asked for."""
        width, attends = hidden.shape[1], gate.detach() > 0
        if self.mixing == "attention" and mask is None:
            counts = [width] * len(hidden)
        else:  # of one token, as in decoding, without a sum
            counts = [int(attends)] if attends.numel() == 1 else attends.sum(1).tolist()
        everybody = min(counts) == width
        if cache is not None:
            reach = {"routed": self.kernel_size - 1, "attention": 0, "convolution": None}
            cache.advance(hidden, mask, reach[self.mixing])
        output = places = None
        if not everybody:
            few = sum(counts) * 2 > attends.numel() and not gate.requires_grad
            output = self._convolve(hidden, mask, cache, ~attends if few else None)
        if max(counts) == 0:
            return output
        if self.rope_theta is not None:
            places = _positions(mask, hidden) if cache is None else cache.positions(width, hidden.device)
        starts = _starts(mask) if cache is None else cache.starts
        if everybody and starts is None and self.kernel in ("auto", "dense"):
            attended = self._attend_everywhere(hidden, places, cache)
            return gate[..., None] * attended if gate.requires_grad else attended
        tokens = torch.ones_like(attends) if mask is None else mask
        scored = tokens if self.kernel == "dense" else attends
        attended = self._attend(hidden, scored, places, starts, cache)
        if output is None:
            return gate[..., None] * attended.view_as(hidden)
        if scored is attends and not torch.is_grad_enabled():
            output[scored] = attended  # in place: a text's output is large
            return output
        # The gate is 0 or 1: it is multiplied in for its gradient, and to drop what "dense" scored for nothing.
        chosen = gate[scored][:, None]
        return output.index_put((scored,), (1 - chosen) * output[scored] + chosen * attended)

    def _attend_everywhere(self, hidden: Tensor, places: Tensor | None, cache: RoutedLayerCache | None) -> Tensor:
        """Attention of all positions of rows without padding, in one fused call."""
        if cache is None:
            keys, values = self.project(hidden, places)
        else:
            keys, values = cache.keys_and_values(self._project_for(cache), cache.length)
        width, length = hidden.shape[1], keys.shape[2]
        seen = None
        if 1 < width < length:
            seen = torch.ones(width, length, dtype=torch.bool, device=hidden.device).tril(length - width)
        mixed = score(self._queries(hidden, places), keys, values, seen, causal=width == length)
        return self._map(mixed, self.o_proj)[0]

    def _attend(
        self,
        hidden: Tensor,
        scored: Tensor,
        places: Tensor | None,
        starts: list[int] | None,
        cache: RoutedLayerCache | None,
    ) -> Tensor:
        """Attention of the positions `scored` (rows, width), row after row: (number of them, hidden size)."""
        before = 0 if cache is None else cache.length - hidden.shape[1]
        lines, columns = scored.nonzero(as_tuple=True)
        needed = int(columns.max()) + before + 1
        if cache is None:
            keys, values = self.project(hidden[:, :needed], None if places is None else places[:, :needed])
        else:
            keys, values = cache.keys_and_values(self._project_for(cache), needed)
        if places is not None:
            places = places.expand(len(hidden), -1)[lines, columns][None]
        queries = self._queries(hidden[lines, columns][None], places)
        outputs, done = [], 0
        for row, count in enumerate(scored.sum(1).tolist()):
            start = 0 if starts is None else starts[row]
            size = min(self.chunk, max(_LEAST_CHUNK, count // 8)) if self.kernel in ("auto", "chunked") else count
            for first in range(done, done + count, size or 1):
                part = slice(first, min(first + size, done + count))
                at = columns[part] + before
                end = int(at[-1]) + 1  # nothing after the last of them is seen by any
                its_keys, its_values = keys[row, None, :, start:end], values[row, None, :, start:end]
                outputs.append(score_sorted(queries[:, :, part], its_keys, its_values, at - start))
            done += count
        return self.o_proj(torch.cat(outputs, dim=1)[0])

    def _queries(self, hidden: Tensor, places: Tensor | None) -> Tensor:
        """Queries (rows, heads, width, head size) of `hidden`, which stands at the positions `places`."""
        queries = self._map(hidden, self.q_proj)[0].unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return queries if self.rope_theta is None else rotate(queries, places, self.rope_theta)

    def project(self, hidden: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, kv heads, width, head size) of `hidden`, at positions `places` (rows, width)."""
        keys, values = (
            made.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
            for made in self._map(hidden, self.k_proj, self.v_proj)
        )
        return (keys if self.rope_theta is None else rotate(keys, places, self.rope_theta)), values

    def _project_for(self, cache: RoutedLayerCache) -> Callable[[Tensor, int, int], tuple[Tensor, Tensor]]:
        """`project` for the columns `first` to `end` of a cache."""

        def project(hidden: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
            return self.project(hidden, None if self.rope_theta is None else cache.places(first, end, hidden.device))

        return project

    def _convolve(
        self, hidden: Tensor, mask: Tensor | None, cache: RoutedLayerCache | None, wanted: Tensor | None = None
    ) -> Tensor:
        """Values filtered by each head's taps, and projected: (rows, width, hidden size).

        If only some positions are `wanted` (rows, width), the output of the others means nothing. A long text goes in
        blocks, so that what comes between is still in the processor's cache when it is needed.
        """
        width = hidden.shape[1]
        if mask is not None:
            hidden = hidden * mask[..., None]  # the map has no bias: the value of padding is zero
        window = waiting = None
        if cache is not None:
            window = cache.window.last(cache.window.end) if cache.window.end else None
            waiting = cache.waiting_before(width)
        outputs, size = [], width if torch.is_grad_enabled() else BLOCK
        for first in range(0, width, size):
            part = slice(first, first + size)
            block = hidden[:, part]
            values = self._conv_values(block, window, waiting)
            window, waiting = values[:, block.shape[1] :], None
            mixed = self._filter(values)
            if wanted is None:
                outputs.append(self.conv_output(mixed))
            else:
                outputs.append(torch.zeros_like(block))
                outputs[-1][wanted[:, part]] = self.conv_output(mixed[wanted[:, part]])
        if cache is not None:  # of a long text a copy, so that the text's values are not kept
            cache.window.replace(window.clone() if width > 1 else window)
            cache.mixed = cache.length
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _conv_values(self, hidden: Tensor, window: Tensor | None, waiting: Tensor | None) -> Tensor:
        """The convolution's values of `hidden`, behind those of the kernel size - 1 positions before it."""
        length = hidden.shape[1] + self.kernel_size - 1
        # Earlier tokens that all attended have waited for this.
        values = self.conv_value(hidden if waiting is None else torch.cat((waiting, hidden), dim=1))[:, -length:]
        if window is not None and values.shape[1] < length:
            values = torch.cat((window[:, max(0, window.shape[1] + values.shape[1] - length) :], values), dim=1)
        missing = length - values.shape[1]
        return F.pad(values, (0, 0, missing, 0)) if missing else values

    def _filter(self, values: Tensor) -> Tensor:
        """`values` filtered by each head's taps; those of the first kernel size - 1 positions are the past."""
        if values.shape[1] == self.kernel_size and not torch.is_grad_enabled():
            oldest_first = self.conv_taps.softmax(-1).flip(-1).T[..., None]
            return (values.unflatten(-1, (self.heads, -1)) * oldest_first).sum(1, keepdim=True).flatten(2)
        return causal_filter(values, self.conv_taps.softmax(-1))


# -- positions -----------------------------------------------------------------------------------------------------


def _positions(mask: Tensor | None, hidden: Tensor) -> Tensor:
    """The number of each token among its row's tokens (rows or 1, width)."""
    if mask is None:
        return torch.arange(hidden.shape[1], device=hidden.device)[None]
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def _starts(mask: Tensor | None) -> list[int] | None:
    """Where each row's tokens start; None if there is no padding."""
    return None if mask is None else (mask.long().cumsum(1) == 0).sum(1).tolist()
