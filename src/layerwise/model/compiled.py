"""The compiled engine: one fused kernel per layer call for decoding and verifying.

A decoding step of one token reads every weight once and does almost nothing with it, so it should take as long as
reading the weights. Eager PyTorch misses that twice: each layer is some forty operations of which most time is
call overhead, and a matrix-vector product done by a matrix-matrix routine streams memory at a third of the speed.
So a layer is compiled, by torch.export and Inductor, into a single kernel (`tracing.py`), in two forms: for one token
of one row, and for a few tokens, where a draft is verified or a batch decoded. For one token of a row, or up to eight,
the commonest kind of layer has an operator instead (`token_layers.py`), which takes all layers of a pass in one call.

Every other call (prefill, a cache with holes, training) runs on the eager engine, which the kernel of each layer is
compared with before it is used; those of the head, a norm and one product, are not if they are compiled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.model.backbone import Backbone
from layerwise.model.cache import Cache, SlotStore
from layerwise.model.few_tokens import compiler, load_operator, load_operators
from layerwise.model.frame import Frame
from layerwise.model.kernels import Kernel, TokenHeadKernel, TokenKernel, Walk, contents, holds, identity, note_ends
from layerwise.model.runtime import EagerEngine
from layerwise.model.token_layers import MOST, STREAMS, TokenHead, TokenLayer, faster_streams
from layerwise.model.token_layers import greedy as greedy_token
from layerwise.model.token_layers import run as run_token_layers
from layerwise.model.tracing import FEW, ONE, HeadSource, LayerSource, package
from layerwise.paths import kernel_dir
from layerwise.plan import Part, Plan, Step, Visit, schedule

log = logging.getLogger("layerwise")
_UNKNOWN: Any = object()  # None is a layer that cannot be compiled
WALKS = 64  # that are kept
FEW_TOKENS = 64  # so many tokens of a pass, over all rows, count as few; beyond, matrix products are better


def compiler_available() -> bool:
    """Whether there is a C++ compiler on this machine."""
    return compiler() is not None


class CompiledEngine:
    """Kernels for one token and for a few, eager for the rest. `notify` gets a line when one has to be compiled."""

    name = "compiled"
    idle_tokens = FEW_TOKENS  # a kernel takes all rows; leaving one out would send the others to eager

    def __init__(self, backbone: Backbone, notify: Callable[[str], None] = log.info) -> None:
        self.backbone = backbone
        self.eager = EagerEngine(backbone)
        self.notify = notify
        self.compile_seconds = 0.0
        self._layers: dict[tuple[Visit, str], Kernel | TokenKernel | None] = {}
        # Those of parameters that the layers still have.
        self._checked: dict[tuple[Visit, str], Kernel | TokenKernel | None] = {}
        self._walks: dict[tuple[int, int], Walk] = {}  # of these, by the identity of the steps and the first one
        self._heads: dict[str, Kernel | TokenHeadKernel | None] = {}
        self._index = torch.arange(0)
        self._streams = STREAMS[0]

    @torch.no_grad()
    def prepare(self, plans: Iterable[Plan], few: bool = False) -> None:
        """Find or compile the head and every kind of visit in `plans`, for one token or for a `few` too.

        Kernels hold on to the parameters they were made for. Values may change under them; kernels whose parameters
        were replaced since are made anew. They are for the CPU: a model that is moved elsewhere runs eagerly.
        """
        if self.backbone.device.type != "cpu":
            return
        self.refresh()
        asked = dict.fromkeys(visit for plan in plans for visit in plan)
        visits = dict.fromkeys(replace(one, part=Part.MLP) if self._is_replaced(one) else one for one in asked)
        for form in (ONE, FEW) if few else (ONE,):
            if form not in self._heads:
                self._heads[form] = self._head(form)
            for visit in visits:
                self._layer(visit, form)
        self._choose_streams()
        for number, attention in self.backbone.attention.items():
            prepare = getattr(attention, "prepare", None)
            if prepare is not None:
                prepare(self.backbone.layers[number].input_layernorm, self.notify)

    def _choose_streams(self) -> None:
        """Have operators for single tokens read memory as this machine does it faster; tried out once."""
        known = [kernel for (_, form), kernel in self._layers.items() if form == ONE]
        layers = [kernel.layer for kernel in known if isinstance(kernel, TokenKernel)]
        alike = [layer for layer in layers if layer.alike == layers[0].alike and layer.weights[9].numel()]
        if not alike:
            return
        use = (torch.get_num_threads(), *alike[0].alike)
        if use not in _streams and (found := faster_streams(alike)) is not None:
            _streams[use] = found
        self._streams = _streams.get(use, STREAMS[0])

    def refresh(self) -> None:
        """Compare each kernel with its layer before it is used again, and the head's now: parameters may be others by
        then (another dtype, an adapter attached), adapters switched or merged."""
        self._checked.clear()
        self._walks.clear()
        head = identity(self.backbone.norm, self.backbone.head)
        for form, kernel in list(self._heads.items()):
            if kernel is not None and kernel.made_for != head:
                del self._heads[form]

    def _layer(self, visit: Visit, form: str) -> Kernel | TokenKernel | None:
        """The kernel of `visit`, made if there is none for its parameters; None if it cannot be compiled."""
        kernel = self._checked.get((visit, form), _UNKNOWN)
        if kernel is _UNKNOWN:
            kernel = self._layers.get((visit, form), _UNKNOWN)
            if kernel is _UNKNOWN or (kernel and kernel.made_for != identity(self.backbone.module(visit))):
                return self._build(visit, form)
            self._checked[visit, form] = kernel
        return kernel

    def visit(self, step: Step, hidden: Tensor, frame: Frame) -> Tensor:
        kernel = self._kernel(step, hidden, frame)
        in_parts = self._is_replaced(step.visit) and step.visit.part is not Part.THIN
        if kernel is None and in_parts and hidden.shape[:2].numel() <= FEW_TOKENS:
            return self._in_parts(step, hidden, frame)
        if kernel is None:
            return self.eager.visit(step, hidden, frame)
        if isinstance(kernel, TokenKernel):
            store = None if step.slot is None else frame.cache.slots[step.slot]
            return self._walked([kernel.layer], step.visit.layer, [store], hidden, frame)
        if step.slot is None:
            return kernel.run([hidden.contiguous(), *kernel.weights])[0]
        store, layer = frame.cache.slots[step.slot], step.visit.layer
        if kernel.form == ONE:
            state = [hidden, store.keys, store.values, self._upto(frame.stop), *frame.rotary(layer, None)]
        else:
            # Columns of padding are written too: beyond the row's end, where nothing is attended to.
            state = [hidden.contiguous(), store.keys, store.values, *frame.few(layer)]
        (hidden,) = kernel.run(state + kernel.weights)
        store.ends = [start + count for start, count in zip(frame.starts, frame.counts, strict=True)]
        return hidden

    def walk(self, steps: Sequence[Step], first: int, hidden: Tensor, frame: Frame) -> tuple[Tensor, int]:
        rows, width = hidden.shape[:2]
        if rows > 1 or width > MOST or frame.counts[0] != width or not self._infers(frame):
            return hidden, 0
        if not holds(steps[first].slot, frame.cache, frame.starts, hidden.dtype):
            return hidden, 0  # before a walk is made that could not begin
        walk = self._walk_from(steps, first, width)
        if walk.dtype != hidden.dtype:
            return hidden, 0
        stores = walk.stores(frame.cache, frame.starts)
        layers = walk.layers[: len(stores)]
        return self._walked(layers, steps[first].visit.layer, stores, hidden, frame), len(stores)

    def greedy(self, token: int, plan: Plan, cache: Cache) -> int | None:
        backbone, head, steps = self.backbone, self._heads.get(ONE), schedule((plan,))
        if torch.is_grad_enabled() or backbone.device.type != "cpu" or not isinstance(head, TokenHeadKernel):
            return None
        walk, embedding = self._walk_from(steps, 0, 1), backbone.embedding
        if len(walk.layers) < len(steps) or type(embedding) is not nn.Embedding:
            return None
        thin = backbone.known_thin_head() if plan.thin_head else None
        used = [embedding.weight.dtype, head.dtype, *([] if thin is None else [thin.center.dtype])]
        (place,) = cache.lengths
        tables = backbone.rotary_tables(walk.rotary, place + 1, head.dtype, backbone.device)
        if tables is None or any(dtype != walk.dtype for dtype in used):
            return None
        cache.reserve(place + 1)
        stores = walk.stores(cache, cache.lengths)
        if len(stores) < len(steps):
            return None
        keys, values = contents(stores, tables[0][:0])
        weight, streams = embedding.weight, self._streams
        found = greedy_token(token, weight, walk.layers, keys, values, place, tables, head.head, thin, streams)
        note_ends(stores, place + 1)
        return found

    def _walk_from(self, steps: Sequence[Step], first: int, width: int) -> Walk:
        """What one call can take from the first of these steps on; a plan is walked for many tokens, so it is kept."""
        known = self._walks.get((id(steps), first))
        if known is not None and known.steps is steps and not self.backbone.attention:
            return known
        taken: list[TokenKernel] = []
        for step in steps[first:]:
            if step.rows is not None or self._is_replaced(step.visit):
                break
            kernel = self._layer(step.visit, ONE) if width == 1 else self._of_tokens(step.visit)
            if not isinstance(kernel, TokenKernel) or (taken and kernel.with_others != taken[0].with_others):
                break
            taken.append(kernel)
        slots = [step.slot for step in steps[first : first + len(taken)]]
        dtype, rotary = (taken[0].dtype, taken[0].rotary) if taken else (None, None)
        walk = Walk(steps, slots, [kernel.layer for kernel in taken], dtype, rotary)
        if width == 1:  # else kernels may come into use that are not yet
            if len(self._walks) >= WALKS:
                self._walks.clear()
            self._walks[id(steps), first] = walk
        return walk

    def _walked(
        self, layers: Sequence[TokenLayer], layer: int, stores: Sequence[SlotStore | None], hidden: Tensor, frame: Frame
    ) -> Tensor:
        """The tokens of one row after these layers, the first of which is number `layer`, and their stores."""
        keys, values = contents(stores, hidden[..., :0])
        mask, rotary = None, frame.rotary(layer, None)
        if hidden.shape[1] > 1:
            _, mask, *rotary = frame.few(layer)
        hidden = run_token_layers(layers, hidden, keys, values, frame.starts[0], rotary, mask, self._streams)
        note_ends(stores, frame.stop)
        return hidden

    def _kernel(self, step: Step, hidden: Tensor, frame: Frame) -> Kernel | TokenKernel | None:
        """The kernel that can do this call, if there is one."""
        rows, width = hidden.shape[:2]
        if self._is_replaced(step.visit) or rows * width > FEW_TOKENS or not self._goes_on(step, frame):
            return None
        few = rows == 1 < width <= MOST and frame.counts[0] == width  # without padding
        known = self._of_tokens(step.visit) if few else None
        if known is None:
            known = self._layer(step.visit, ONE if rows == width == 1 else FEW)
        # Kernels do not look at what they are given: of another dtype they would read beyond its end.
        return known if known is not None and known.dtype == hidden.dtype else None

    def _of_tokens(self, visit: Visit) -> TokenKernel | None:
        """The operator for single tokens, which takes a few of one row too, if it is in use for this visit."""
        used = (visit, ONE) in self._checked or (visit, ONE) in self._layers
        known = self._layer(visit, ONE) if used else None
        return known if isinstance(known, TokenKernel) else None

    def _goes_on(self, step: Step, frame: Frame) -> bool:
        """Whether this is inference on all rows, on the CPU, and the cache holds every token before these."""
        if step.rows is not None or not self._infers(frame):
            return False
        return holds(step.slot, frame.cache, frame.starts, frame.dtype)

    def _infers(self, frame: Frame) -> bool:
        return frame.cache is not None and not torch.is_grad_enabled() and frame.device.type == "cpu"

    def _is_replaced(self, visit: Visit) -> bool:
        """Whether something else than the layer's attention runs, which kernels do not know of."""
        return visit.attends and visit.layer in self.backbone.attention

    def _in_parts(self, step: Step, hidden: Tensor, frame: Frame) -> Tensor:
        """A visit whose attention is replaced: that by its operator or eagerly; then the MLP, most of the weights, as
        any other."""
        mixed = self._token(step, hidden, frame)
        if mixed is None:
            attention = replace(step.visit, part=Part.ATTENTION)
            mixed = self.eager.visit(Step(attention, step.slot, step.rows), hidden, frame)
        hidden = mixed
        if step.visit.part is Part.ATTENTION:
            return hidden
        return self.visit(Step(replace(step.visit, part=Part.MLP), None, step.rows), hidden, frame)

    def _token(self, step: Step, hidden: Tensor, frame: Frame) -> Tensor | None:
        """One token through the attention half of a visit, if what replaces its attention has a way of its own."""
        layer = step.visit.layer
        token = getattr(self.backbone.attention[layer], "token", None)
        if token is None or step.slot is None or hidden.shape[:2].numel() != 1 or not self._goes_on(step, frame):
            return None
        store = frame.cache.slots[step.slot]
        mixed = token(hidden, store.keys, store.values, frame.starts[0], frame.rotary(layer, None))
        if mixed is not None:
            store.ends = [frame.stop]
        return mixed

    def logits(self, hidden: Tensor, thin: bool = False) -> Tensor:
        """As `Engine.logits`; of a few tokens of one row in float32, which is what their sums are made in."""
        tokens = hidden.shape[:-1].numel()
        kernel = self._heads.get(ONE)
        if thin:
            return self._thin_logits(hidden, kernel)
        if tokens > (MOST if len(hidden) == 1 and isinstance(kernel, TokenHeadKernel) else 1):
            kernel = self._heads.get(FEW)
        if kernel is None or tokens > FEW_TOKENS or hidden.ndim != 3 or torch.is_grad_enabled():
            return self.eager.logits(hidden)
        if hidden.device.type != "cpu" or kernel.dtype != hidden.dtype:
            return self.eager.logits(hidden)
        if isinstance(kernel, TokenHeadKernel):
            return kernel.head.run(hidden.contiguous(), self._streams)
        return kernel.run([hidden.contiguous(), *kernel.weights])[0]

    def _thin_logits(self, hidden: Tensor, kernel: Kernel | TokenHeadKernel | None) -> Tensor:
        """Those of the thin head, one state after another: each has candidates of its own."""
        tokens, thin = hidden.shape[:-1].numel(), self.backbone.known_thin_head()
        fits = isinstance(kernel, TokenHeadKernel) and thin.center.dtype == kernel.dtype == hidden.dtype
        if not fits or tokens > FEW_TOKENS or torch.is_grad_enabled() or hidden.device.type != "cpu":
            return self.eager.logits(hidden, thin=True)
        if tokens == 1:
            return kernel.head.run_thin(hidden.contiguous(), thin, self._streams).reshape(*hidden.shape[:-1], -1)
        states = hidden.reshape(-1, 1, 1, hidden.shape[-1]).contiguous()
        found = torch.cat([kernel.head.run_thin(state, thin, self._streams) for state in states])
        return found.reshape(*hidden.shape[:-1], -1)

    def _upto(self, stop: int) -> Tensor:
        """0 .. stop-1: its length tells the kernel how many keys there are."""
        index = self._index  # kept in a local: another thread may put a shorter one there
        if len(index) < stop:
            self._index = index = torch.arange(2 * stop)
        return index[:stop]

    # -- building ----------------------------------------------------------------------------------------

    def _build(self, visit: Visit, form: str) -> Kernel | TokenKernel | None:
        """Make, or find, the kernel of `visit`; None (with a warning) if the layer cannot be compiled."""
        kernel = self._tried(self._token_kernel(visit), visit, form) if form == ONE else None
        if kernel is None:
            compiled = self._load(LayerSource(self.backbone, visit, form))
            kernel = self._tried(compiled, visit, form)
            if kernel is not compiled:
                log.warning("layerwise: the kernel for layer %s differs from eager and is not used", visit)
        self._layers[visit, form] = self._checked[visit, form] = kernel
        return kernel

    def _tried(self, kernel: Any, visit: Visit, form: str) -> Any:
        """The kernel, if what it gives is what the layer gives; else None."""
        self._checked[visit, form] = kernel  # in use from here on, for the trial
        try:
            sizes = [(1, 1), (1, 3)] if isinstance(kernel, TokenKernel) else [(1, 1) if form == ONE else (2, 3)]
            fits = kernel is not None and all(self._agrees(visit, *size) for size in sizes)
            return kernel if fits else None
        except BaseException as error:  # Ctrl-C too: it was not tried out
            del self._checked[visit, form]
            if isinstance(error, RuntimeError) and isinstance(kernel, TokenKernel):
                return None  # the operator was shown sizes that it does not know
            raise

    def _token_kernel(self, visit: Visit) -> TokenKernel | None:
        """The operator for one token, if the layer is of the kind that it does."""
        layer = TokenLayer.of(self.backbone, visit)
        return None if layer is None or not self._has_operator() else TokenKernel(self.backbone, visit, layer)

    def _head(self, form: str) -> Kernel | TokenHeadKernel | None:
        """The head for one token or a few; None if it cannot be compiled."""
        head = TokenHead.of(self.backbone) if form == ONE else None
        if head is not None and head.weight.dtype == self.backbone.dtype and self._has_operator():
            state = torch.randn(1, 1, self.backbone.shape.hidden, generator=torch.Generator().manual_seed(0))
            found, expected = (one(state.to(self.backbone.dtype)) for one in (head.run, self.backbone.logits))
            if _close(found, expected, expected):
                return TokenHeadKernel(self.backbone, head)
        return self._load(HeadSource(self.backbone, form))

    def _has_operator(self) -> bool:
        """Whether there is the operator for single tokens; compiled if need be."""
        if _TOKEN_LAYERS not in _failed:
            try:
                load_operator(_TOKEN_LAYERS, self.notify)
            except Exception as error:  # as in `_load`
                _failed.add(_TOKEN_LAYERS)
                reason = str(error).strip().splitlines()[:1]
                log.warning("layerwise: no operator for single tokens (%s)", *reason or ["no reason"])
        return _TOKEN_LAYERS not in _failed

    def _load(self, source: LayerSource | HeadSource) -> Kernel | None:
        key = source.key
        if key in _failed:
            return None
        try:
            if source.form == FEW:
                load_operators(self.notify)
            path = kernel_dir() / f"{key}.pt2"
            if not path.exists():
                began = time.perf_counter()
                self.notify(f"compiling a kernel for {source.title} (once; kept for later runs)")
                package(source, path)
                seconds = time.perf_counter() - began
                self.notify(f"compiled in {seconds:.1f} s")
                self.compile_seconds += seconds
            return Kernel(path, source)
        except Exception as error:  # whatever the compiler stack raises, eager still gives the right answer
            _failed.add(key)  # of thirty layers alike none is tried again
            reason = str(error).strip().splitlines()[:1]
            log.warning("layerwise: no kernel for %s, running it eagerly (%s)", source.title, *reason or ["no reason"])
            return None

    @torch.no_grad()
    def _agrees(self, visit: Visit, rows: int, width: int) -> bool:
        """Compare the kernel with the eager layer on a few tokens after a few others."""
        generator = torch.Generator().manual_seed(0)
        size = (rows, 3 + width, self.backbone.shape.hidden)
        states = torch.randn(size, generator=generator).to(self.backbone.device, self.backbone.dtype)
        (slot,) = Plan((visit,)).slots
        step = Step(visit, slot)
        results = []
        for engine in (self.eager, self):
            cache = Cache(rows, 8)
            frame = Frame(self.backbone, [3] * rows, 3, states.device, states.dtype, cache)
            self.eager.visit(step, states[:, :3], frame)
            cache.advance([3] * rows)
            frame = Frame(self.backbone, [width] * rows, width, states.device, states.dtype, cache)
            results.append(engine.visit(step, states[:, 3:], frame).float())
        return _close(results[1].to(states.dtype), results[0].to(states.dtype), results[0] - states[:, 3:].float())


def _close(found: Tensor, expected: Tensor, change: Tensor) -> bool:
    """Whether two ways differ by rounding alone; `change` is what they add."""
    tolerance = 1e-3 if expected.dtype == torch.float32 else 5e-2
    gap = (found.float() - expected.float()).abs().max()
    return bool(gap <= tolerance * change.float().abs().max().clamp(min=1.0))


_TOKEN_LAYERS = "token_layers"
_streams: dict[tuple[Any, ...], int] = {}  # by threads and kind of layer, see `_choose_streams`
_failed: set[str] = set()  # keys of what could not be compiled or loaded in this process
