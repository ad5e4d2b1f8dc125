"""LayerRoute training (arXiv 2606.01838): routers that learn which layers a prompt needs, and a LoRA that makes up for
the rest. The backbone is frozen.

In training every layer runs, and a gate g, hard in the forward pass and soft in the backward, mixes:

    h <- h + g (Layer_i(h) - h)        g = [soft > 1/2] + soft - stopgrad(soft)

so a skipped layer is an identity, as it will be (without bridges, see below), and yet its router learns what running it
would have changed. The gate reads the tokens before the first label, which is what generation shows it. In evaluation
mode layers are really skipped; in training too while routers do not learn: at first (`hold`), when rows leave out the
layers whose gates begin closed, but for a share of the rows drawn by chance (`hold_full`), and at last (`settle`), when
every row takes the path that its gates chose and the LoRA makes the best of it.

What keeps gates from all staying open is the objective, beside the cross entropy CE:

    paper     CE + penalty * mean soft. As published: the same price for every input, on a number that is not what runs.
    budget    CE + price * mean g. A dual variable moves the price until the mean of g is the target.
    quality   CE + price * mean(worth * g). An input's worth falls from 1 to -1 with its gap, the cross entropy that it
              loses against full depth: 0 at what is bearable, below which it is pushed to skip, above which to run.
              Bearable is 4/5 of the mean gap of the last steps, down to the tolerance: so inputs are first told apart
              and then, as the LoRA learns to do with less, all brought to the tolerance. The price rises while the
              mean gap is bearable and falls while it is not.
    none      CE, the same LoRA without routing: what the others are to be compared with.

With `fits` the objective quality needs no price, and no gradient reaches the routers: they are logistic regressions
fitted to gaps that are measured, of examples answered with all skips and with none (`gate_fits`): those below the gap
that parts them best in two (at most their mean, at least the tolerance) should skip, the others run; where the LoRA
learns no more, those below the tolerance, if a BORNE share of them is. This is done after
the held steps, `fits` times at even distances, and once more at the end. The LoRA learns by CE along the paths that
they choose. With `hold` and `hold_full` 1 the LoRA learns as without routing, and all that makes it skip is fitted at
the end: prompts that run every layer lose nothing then.

With `bridge_rank` a skipped layer is crossed by a bridge (`model.bridges`). Before the first step in which rows may
skip (that is after the held steps, if all rows run every layer in those) bridges are fitted by least squares to the
half of some examples that lose least without these layers; then they learn as the LoRA does. With `leave` attention a
closed gate leaves out the MLP of its layer alone, and the bridge stands in for that.

With `leave` neurons a closed gate leaves out a part of the MLP (`model.thin`): at the end of the held steps the neurons
are chosen that matter least to the half of some examples that bear it best (`neuron_fits`), over all layers alike; the
layers that lose some are those that have gates. Which examples bear it best is told by leaving out many, PROBE of all
at least: what costs nobody much cannot be ranked.

With `head_rank` the LM head has a gate, and closed it leaves a thin one (`model.thin_head`), fitted at the end to
examples of all kinds (`head_fits`): those that bear it best are the easy ones, and the others need it more.

What costs nobody much cannot tell inputs apart either: with few neurons left out, what an answer loses is chance, and
half of the inputs that cannot do without lose nothing. So with a `margin` the gaps that routers are fitted to are
those of leaving out so many times the neurons: an input skips what it would bear much more of.

Means of gates are over rows and all layers. No objective knows of what kind an input is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.data.examples import IGNORED, Tokens
from layerwise.hub import from_pretrained
from layerwise.model.backbone import Backbone
from layerwise.model.bridges import Bridges
from layerwise.model.causal_lm import LayerwiseForCausalLM, attach
from layerwise.model.frame import Frame
from layerwise.model.packing import Packing, lengths_of_prompts
from layerwise.model.runtime import EagerEngine, Runtime
from layerwise.model.thin import ThinMlps
from layerwise.plan import Plan, Route, Step, schedule
from layerwise.policies.gates import GatedPolicy, Gates
from layerwise.training.bridge_fit import fit_bridges
from layerwise.training.config import computed_in, layers_of
from layerwise.training.gate_fits import DIRECTIONS, choose_basis, layer_costs, lost, parting, row_losses
from layerwise.training.head_fits import fit_thin_head
from layerwise.training.layerroute_trainer import LayerRouteTrainer, drawn
from layerwise.training.neuron_fits import moments, thin_mlps
from layerwise.training.recipes import LayerRouteConfig, LayerRouteRecipe
from layerwise.training.runs import frozen_base, read_examples, run_fits, run_training

BRIDGED = 384  # examples, of which half fit the bridges
THINNED = 256  # examples, of which half choose and mend thin MLPs
PREVIEWED = 512  # examples that the thin head is fitted to
SCORED = 96  # of the examples for thin MLPs say which neurons all kinds can do without
PROBE = 0.3  # of the neurons that are left out to see which examples bear that best
CANDIDATES = 2048  # of a thin head: tokens whose logits are computed in full
LAST_FITTED = 384  # examples that routers are fitted to at last
BORNE = 0.1  # of the examples have to be within the tolerance, or it is too small to tell examples apart by
PRUDENCE = 3.0  # at last, when no training follows: an input that skips what it cannot bear loses most
MEASURED = 8  # examples that are answered without each layer in turn
SHRINK = 0.8  # of the mean gap is borne while that is above the tolerance
RECENT = 0.2  # weight of a step in the mean gap

__all__ = ["LayerRoute", "LayerRouteConfig", "LayerRouteRecipe", "LayerRouteTrainer", "train"]


class LayerRoute(nn.Module):
    """The loss of LayerRoute as a module around `model`, whose policy it sets.

    Args:
        model: what is trained is the PEFT adapter in it, and the bridges that the recipe asks for.
        recipe: objective and routers.
        steps: how many there will be.

    Raises:
        ValueError: a pass would run no layer at all, or there is no step in which routers learn.

    Attributes:
        strained: with a margin, thin MLPs that leave out so many times more, by which gaps are measured; else None.
        weight, bias: the routers (see `GatedPolicy`), the model's policy shares them; None without routing.
        price: of a layer run, in nats a token; a dual variable in the objectives budget and quality.
    """

    accepts_loss_kwargs = True

    def __init__(self, model: LayerwiseForCausalLM, recipe: LayerRouteRecipe, steps: int = 1) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.steps = steps
        self.gap = 0.0  # of the last steps, on average; objective quality
        self.price = 0.0 if recipe.objective == "budget" else recipe.penalty
        # Numbers and not buffers: data parallel wrappers would overwrite them with those of the first process.
        self.seen, self.rows_seen = 0.0, 0.0  # what the dual variable is moved by, summed since it was
        self.strained: ThinMlps | None = None
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if recipe.objective != "none":
            layers, hidden = model.depth, model.runtime.backbone.shape.hidden
            if recipe.head_rank >= hidden:
                raise ValueError(f"head-rank must be below the hidden size {hidden}, not {recipe.head_rank}")
            closed = layers_of(recipe.start_closed, layers) if recipe.start_closed is not None else None
            if closed is None:
                closed = tuple(range(layers // 3, 2 * layers // 3)) if recipe.objective == "paper" else ()
            gates = layers + (recipe.head_rank > 0)
            bias = [-recipe.start_bias if layer in closed else recipe.start_bias for layer in range(gates)]
            device = model.runtime.backbone.device
            self.bias = nn.Parameter(torch.tensor(bias, device=device))
            keep = layers_of(recipe.keep, layers)
            _check(recipe, layers, keep, closed, steps)
            reads = recipe.reads or ("mean" if recipe.objective == "paper" else "last")
            directions = hidden if reads == "mean" else DIRECTIONS
            self.weight = nn.Parameter(torch.zeros(gates, directions, device=device))
            # Until a basis is chosen a router sees nothing, and its bias decides.
            basis = None if reads == "mean" else torch.zeros(gates, directions, hidden, device=device)
            center = None if reads == "mean" else torch.zeros(gates, hidden, device=device)
            given = {"center": center, "basis": basis, "thin_head": recipe.head_rank > 0}
            model.policy = GatedPolicy(self.weight, self.bias, keep, reads, **given)
            if not recipe.candidates:
                self._leave()

    def choose_candidates(self, examples: Sequence[Tokens]) -> None:
        """Keep all layers but the recipe's `candidates`, those without which these answers lose least.

        Gates start the closer to closing the cheaper their layer, so that they close one after another.
        """
        cheapest = layer_costs(self.model, examples).argsort().tolist()
        free = [layer for layer in cheapest if layer not in self.model.policy.keep]
        self._may_skip(free[: self.recipe.candidates])

    def fit_gates(self, examples: Sequence[Tokens], prudence: float = 1.0) -> tuple[float, float]:
        """Fit the routers to what these examples lose without all the layers that may be skipped.

        Args:
            prudence: most weight of an example that does not bear it; of one that does it is 1.

        Returns:
            the mean gap, nats a token, and the share of examples whose gap is bearable.
        """
        own = self.model.thin
        if self.strained is not None:
            self.thin_by(self.strained)
        gaps = lost(self.model, examples, self._short())
        if self.strained is not None:
            self.thin_by(own)
        bearable = self.recipe.tolerance
        if self.recipe.hold < 1 or (gaps < bearable).float().mean() < BORNE:
            # A few inputs that lose very much draw the parting up, to where those that lose much seem to lose little.
            bearable = max(bearable, min(parting(gaps), gaps.mean().item()))
        choose_basis(self.model, examples, (1 - gaps / bearable).clamp(-prudence, 1))
        return gaps.mean().item(), (gaps < bearable).float().mean().item()

    def fit_bridges(self, examples: Sequence[Tokens]) -> None:
        """Fit the bridges to the half of these examples that lose least without the layers that may be skipped."""
        bearing, short = self._bearing(examples), Plan(self._short().visits)
        fit_bridges(self.model, [one.input_ids for one in bearing], short)

    def choose_neurons(self, examples: Sequence[Tokens]) -> None:
        """Choose thin MLPs, first by some of these examples, then anew by the half of all that lose least by those."""
        model, recipe = self.model, self.recipe
        keep, strained = layers_of(recipe.keep, model.depth), recipe.neurons * recipe.margin
        self.thin_by(thin_mlps(model, moments(model, examples[:SCORED]), max(PROBE, strained), keep=keep))
        found = moments(model, self._bearing(examples))
        if recipe.margin > 1:
            self.strained = thin_mlps(model, found, strained, recipe.mend_rank, keep)
        self.thin_by(thin_mlps(model, found, recipe.neurons, recipe.mend_rank, keep))

    def _bearing(self, examples: Sequence[Tokens]) -> list[Tokens]:
        """The half of these examples that lose least by all skips but that of the head."""
        gaps = lost(self.model, examples, Plan(self._short().visits))
        return [examples[at] for at in gaps.argsort()[: max(1, len(examples) // 2)].tolist()]

    def fit_crossings(
        self, examples: Sequence[Tokens], seed: int, notify: Callable[[str], None] = lambda line: None
    ) -> None:
        """Fit to some of these examples what closed gates leave: bridges, thin MLPs, a thin head."""
        if self.model.bridges is not None:
            self.fit_bridges(drawn(examples, seed, BRIDGED))
        if self.recipe.leave == "neurons":
            notify("choosing the neurons that closed gates leave out")
            self.choose_neurons(drawn(examples, seed, THINNED))
            kept = self.model.thin.kept.values()
            notify(f"{len(kept)} layers have thin MLPs, of {sum(map(len, kept)) / len(kept):.0f} neurons on average")
        if self.recipe.head_rank:
            notify("fitting the thin head")
            candidates = min(CANDIDATES, len(self.model.runtime.backbone.head.weight))
            some = drawn(examples, seed, PREVIEWED)
            fit_thin_head(self.model, some, self._short(), self.recipe.head_rank, candidates)

    @property
    def crossed_from(self) -> int:
        """The first step in which rows may cross bridges, or thin MLPs; those are fitted before it."""
        held_whole = self.recipe.hold_full == 1 or self.recipe.leave == "neurons"
        return ceil(self.recipe.hold * self.steps) if held_whole else 0

    def _short(self) -> Plan:
        """The plan of a prompt that skips all it may."""
        return self.model.policy.plan(self.model.policy.free)

    def thin_by(self, thin: ThinMlps) -> None:
        """Have gates leave these where they are, and close nowhere else."""
        self.model.thin_by(thin)
        kept = tuple(layer for layer in range(self.model.depth) if layer not in thin.numbers)
        self.model.policy = replace(self.model.policy, keep=kept, thin=thin.numbers)

    def _leave(self) -> None:
        """Leave of every layer that may be skipped what the recipe says; a new bridge adds nothing yet."""
        model, recipe = self.model, self.recipe
        free = tuple(layer for layer in range(model.depth) if layer not in model.policy.keep)
        if recipe.leave == "attention":
            model.policy = replace(model.policy, attending=free)
        if recipe.leave == "neurons":  # none are chosen yet
            model.policy = replace(model.policy, keep=tuple(range(model.depth)))
        if recipe.bridge_rank:
            model.cross_by(Bridges(model.runtime.backbone, free, recipe.bridge_rank))
            model.policy = replace(model.policy, bridged=free)

    def _may_skip(self, candidates: Sequence[int]) -> None:
        """Keep all layers but these, cheapest first; their gates start open, the cheapest next to closing."""
        kept = {layer for layer in range(self.model.depth) if layer not in candidates} | set(self.model.policy.keep)
        self.model.policy = replace(self.model.policy, keep=tuple(sorted(kept)))
        assert self.bias is not None
        for rank, layer in enumerate(candidates, 1):
            self.bias.data[layer] = 2 * self.recipe.start_bias * rank / len(candidates)
        self._leave()

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        places: Tensor | None = None,
        step: int = 0,
    ) -> dict[str, Tensor]:
        """The loss of a part of a batch; in evaluation mode the cross entropy alone, with layers really skipped.

        Args:
            input_ids, labels, attention_mask: (rows, width) as in `LayerwiseForCausalLM.forward`.
            places: not used; what every recipe is given.
            step: the number of optimizer steps done.

        Returns:
            `loss`, the objective times the labelled positions (with several processes, means over rows are those of
            each); and, each as (numerator, denominator), `routed_loss` (cross entropy a position), `layers_run` (of
            a row), and by objective `quality_gap` (nats a position) and `price`.
        """
        rows, width = input_ids.shape
        packing = Packing.of(rows, width, attention_mask)
        counts, packed = packing.counts, packing.pack(labels)
        lengths = lengths_of_prompts(packing, labels)
        real = (labels != IGNORED).any(1)  # not the row that only keeps a process company
        hidden = packing.pack(self.model.embed(input_ids))
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.float()  # the residual stream, which autocast would leave in the weights' dtype
        runtime = self.model.runtime
        everything = [Plan.full(self.model.depth)] * rows
        held = step < self.recipe.hold * self.steps
        settled = bool(self.recipe.fits) or step >= self.recipe.settle * self.steps
        if self.weight is None or not self.training or held or settled:
            walked: list[Plan] | Route = everything
            if self.weight is not None:
                walked = self._held_plans(rows) if held and self.training else self.model.policy.route(lengths)
            deep = Runtime(runtime.backbone).forward(hidden, walked, counts)
            plans = walked if isinstance(walked, Sequence) else walked.plans
            run = torch.tensor([plan.depth for plan in plans], device=hidden.device)
            losses, positions = row_losses(runtime.backbone, deep, packed, counts, plans)
            return self._report(losses.sum(), losses, positions, run, real)
        engine = _Mixed(runtime.backbone, Gates(self.model.policy, lengths))
        frame = Frame(runtime.backbone, counts, width, hidden.device, hidden.dtype)
        deep = Runtime(runtime.backbone, engine).run(hidden, schedule(tuple(everything)), frame)
        losses, positions = row_losses(runtime.backbone, deep, packed, counts)
        soft, hard = torch.stack(engine.soft, 1).mean(1), torch.stack(engine.hard, 1).mean(1)
        of_real = real / real.sum().clamp(min=1)
        extra: dict[str, Tensor] = {}
        if self.recipe.objective == "paper":
            penalty = (soft * of_real).sum()
        elif self.recipe.objective == "budget":
            penalty = (hard * of_real).sum()
            self._note(hard.detach(), real)
        else:
            # After the routed pass: autocast keeps the copies of weights it made, and these would have no gradient.
            gap = (losses.detach() - self._full_depth(hidden, packed, counts)) / positions.clamp(min=1)
            # A tolerance that no input can meet yet would open every gate of every input.
            bearable = max(self.recipe.tolerance, SHRINK * self.gap)
            worth = (1 - gap / bearable).clamp(-1, 1)
            penalty = (worth * hard * of_real).sum()
            self._note(gap, real)
            extra["quality_gap"] = torch.stack([(gap * real).sum(), real.sum()])
        loss = losses.sum() + self.price * penalty * positions.sum()
        extra["price"] = loss.detach().new_tensor([self.price, 1.0])
        return self._report(loss, losses, positions, hard.detach() * self.model.depth, real) | extra

    def adapt(self, mean: float) -> None:
        """One step of the dual variable, after an optimizer step in which its constraint stood at `mean` (over rows).

        budget: `mean` is the share of layers run; the price rises while it is above the target, falls while below.
        quality: `mean` is the gap; the price is multiplied, within a factor 100 of the penalty it began with, and the
        mean gap follows.
        """
        recipe = self.recipe
        if recipe.objective == "budget":
            self.price += recipe.dual_rate * (mean - recipe.target)
        elif recipe.objective == "quality":
            by = max(-1.0, min(1.0, 1 - mean / max(recipe.tolerance, SHRINK * self.gap)))
            price = self.price * (1 + recipe.dual_rate * by)
            self.gap = mean if self.gap == 0 else self.gap + RECENT * (mean - self.gap)
            self.price = max(recipe.penalty / 100, min(recipe.penalty * 100, price))

    @torch.no_grad()
    def _full_depth(self, hidden: Tensor, labels: Tensor, counts: Sequence[int]) -> Tensor:
        """Cross entropy of each row with every layer run, by the same LoRA."""
        backbone = self.model.runtime.backbone
        deep = Runtime(backbone).forward(hidden.detach(), [Plan.full(self.model.depth)] * len(counts), counts)
        return row_losses(backbone, deep, labels, counts)[0]

    def _held_plans(self, rows: int) -> list[Plan]:
        """For each row, by chance: every layer, or those whose gates are open by their bias."""
        full, policy = Plan.full(self.model.depth), self.model.policy
        closed = [layer for layer, bias in enumerate(self.bias.tolist()) if bias <= 0]  # type: ignore[union-attr]
        short = policy.plan([layer for layer in closed if layer not in policy.keep])
        return [full if whole else short for whole in (torch.rand(rows) < self.recipe.hold_full).tolist()]

    def _note(self, values: Tensor, real: Tensor) -> None:
        self.seen += (values * real).sum().item()
        self.rows_seen += real.sum().item()

    def _report(self, loss: Tensor, losses: Tensor, positions: Tensor, run: Tensor, real: Tensor) -> dict[str, Tensor]:
        return {
            "loss": loss,
            "routed_loss": torch.stack([losses.detach().sum(), positions.sum()]),
            "layers_run": torch.stack([(run * real).sum(), real.sum()]),
        }


class _Mixed(EagerEngine):
    """Runs every layer, and mixes what it gives by straight-through gates; keeps both kinds, (rows,) a layer."""

    def __init__(self, backbone: Backbone, gates: Gates) -> None:
        super().__init__(backbone)
        self.gates = gates
        self.soft: list[Tensor] = []
        self.hard: list[Tensor] = []

    def visit(self, step: Step, hidden: Tensor, frame: Frame) -> Tensor:
        soft, run = self.gates.decide(step.visit.layer, hidden)
        hard = run.float() + (soft - soft.detach())  # in this order the value is exactly 0 or 1
        self.soft.append(soft)
        self.hard.append(hard)
        return hidden + hard[:, None, None].to(hidden.dtype) * (super().visit(step, hidden, frame) - hidden)


def train(config: LayerRouteConfig, notify: Callable[[str], None] = lambda line: None, resume: bool = False) -> Path:
    """Train and save an adapter, routers included; `from_pretrained(adapter=...)` loads the folder it returns.

    Processes, `notify`, `resume` and what is raised are those of `layerskip.train`.
    """

    made: list[LayerRoute] = []

    def make(steps: int) -> LayerRoute:
        made.append(module := LayerRoute(_load(config), config, steps))
        if config.candidates:
            examples, _ = read_examples(config, lambda line: None)
            module.choose_candidates(drawn(examples, config.seed, MEASURED))
        return module

    def finish(model: LayerwiseForCausalLM, examples: Sequence[Tokens], pad: int) -> None:
        """The routers as they are shipped, so that what is saved decides as what is in memory."""
        if made[0].crossed_from >= made[0].steps:
            made[0].fit_crossings(examples, config.seed, notify)
        if config.precision != "float32":  # as the LoRA
            for fitted in (model.bridges, None if model.thin is None else model.thin.mends):
                if fitted is not None:
                    fitted.to(torch.bfloat16)
        if config.fits:  # once more to the finished LoRA
            notify("fitting routers to what examples lose")
            gap, bearing = made[0].fit_gates(drawn(examples, config.seed, LAST_FITTED), PRUDENCE)
            every = "every skip" + (f" of {config.margin:g} times the neurons" if config.margin > 1 else "")
            notify(f"routers fitted: {bearing:.0%} of the examples bear {every}, which costs {gap:.3f} on average")
        if isinstance(model.policy, GatedPolicy):
            model.policy = model.policy.rounded()

    if config.adapter is not None:
        if resume:
            raise ValueError("an adapter is routed without steps, there is nothing to resume: leave --resume out")
        return run_fits(config, make, finish, notify)
    return run_training(config, make, LayerRouteTrainer, notify, resume, finish=finish)


def _check(recipe: LayerRouteRecipe, layers: int, keep: Sequence[int], closed: Sequence[int], steps: int) -> None:
    if recipe.hold and not {*range(layers)} - {*closed} | {*keep}:
        raise ValueError(f"start-closed closes all {layers} layers while gates are held: close fewer, or give keep")
    if recipe.fits and not keep and recipe.candidates >= layers:
        raise ValueError(f"fits skip all of the candidates, and {recipe.candidates} are all layers: take fewer")
    if not recipe.fits and ceil(recipe.hold * steps) >= recipe.settle * steps:
        raise ValueError(f"gates are held in all of the {steps} steps, and learn in none: lower hold, or train longer")


def _load(config: LayerRouteConfig) -> LayerwiseForCausalLM:
    """The base model, attached, with a new LoRA on the projections of attention, or that of the adapter to route."""
    from peft import LoraConfig, get_peft_model

    if config.adapter is not None:
        dtype = computed_in(config.precision)
        return from_pretrained(config.model, adapter=config.adapter, dtype=dtype, engine="eager")
    base = frozen_base(config)
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank,
        lora_dropout=config.lora_dropout,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.config.name_or_path,
    )
    return attach(get_peft_model(base, lora))
