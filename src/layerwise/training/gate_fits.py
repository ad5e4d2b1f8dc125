"""What is measured on examples to set LayerRoute's gates (arXiv 2606.01838), without a gradient through the model.

- `layer_costs`: what answers lose without each layer. The gradient of a gate does not tell: layers that write the huge
  state of the first token have small ones, and nothing works without them.
- `lost`: what each answer loses by a plan.
- `parting`: how much is too much.
- `choose_basis`: the few directions in which prompts differ most at each layer, and routers fitted on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from layerwise.data.examples import IGNORED, Tokens, collate, length_sorted_batches
from layerwise.model.backbone import Backbone
from layerwise.model.modes import evaluating
from layerwise.model.runtime import Runtime
from layerwise.plan import Plan, Visit
from layerwise.policies.gates import Gates, summary
from layerwise.training.exit_loss import LOGITS_AT_ONCE, exit_losses, labelled

if TYPE_CHECKING:
    from layerwise.model.causal_lm import LayerwiseForCausalLM

DIRECTIONS = 16  # that a router which reads the last token sees
TOKENS_AT_ONCE = 2048
# Least deviation of a component of states whose root mean square is 1: the centre is rounded to bfloat16, which
# moves a component by .001. Those of SmolLM2 deviate by .04 and more from layer 1 on, and by 5e-6 at layer 0, where
# prompts end in the same token.
FLOOR = 1 / 64
RIDGE = 1e-2  # of the squared weights: as many examples as are measured would else be learnt by heart


def row_losses(
    backbone: Backbone, deep: Tensor, labels: Tensor, counts: Sequence[int], plans: Sequence[Plan] | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy (rows,) summed over the labelled positions of each row, and how many there are (rows,).

    Args:
        deep: (rows, width, hidden size) before the final norm, packed to the left.
        labels: (rows, width) packed likewise.
        plans: what each row ran by, if any has a thin head.
    """
    chunk = max(1, LOGITS_AT_ONCE // backbone.head.weight.shape[0])
    head = {id(p): p for part in (backbone.norm, backbone.head) for p in part.parameters() if p.requires_grad}
    sums, positions = [], []
    for row, count in enumerate(counts):
        at, targets = labelled(labels[row : row + 1], [count])
        picked = deep[row].index_select(0, at)[None]
        logits = partial(backbone.logits, thin=plans is not None and plans[row].thin_head)
        total, _ = exit_losses(logits, list(head.values()), picked, targets, [1.0], chunk)
        sums.append(total)
        positions.append(len(targets))
    return torch.stack(sums), torch.tensor(positions, device=deep.device)


@torch.no_grad()
def layer_costs(model: LayerwiseForCausalLM, examples: Sequence[Tokens]) -> Tensor:
    """The rise of the answers' cross entropy without each layer (layers,), summed over examples, nats a token each."""
    full, runtime, backbone = Plan.full(model.depth), Runtime(model.runtime.backbone), model.runtime.backbone
    rise = torch.zeros(model.depth)
    for one in examples:
        labels, counts = torch.tensor([one.labels], device=model.device), [len(one.input_ids)]
        hidden = model.embed(torch.tensor([one.input_ids], device=model.device))
        entering = []
        for layer in range(model.depth):
            entering.append(hidden)
            hidden = runtime.forward(hidden, [full[layer : layer + 1]])
        whole = row_losses(backbone, hidden, labels, counts)[0]
        for layer, state in enumerate(entering):
            last = layer == model.depth - 1
            deep = state if last else runtime.forward(state, [full[layer + 1 :]])
            without = row_losses(backbone, deep, labels, counts)[0]
            rise[layer] += ((without - whole) / labels.ne(IGNORED).sum()).item()
    return rise


@torch.no_grad()
def lost(model: LayerwiseForCausalLM, examples: Sequence[Tokens], plan: Plan) -> Tensor:
    """How much more cross entropy each answer has by this plan than by every layer, (examples,) nats a token."""
    backbone, found = model.runtime.backbone, torch.zeros(len(examples))
    with evaluating(model):
        for group in length_sorted_batches([len(one.input_ids) for one in examples], TOKENS_AT_ONCE):
            batch = collate([examples[at] for at in group], 0)
            hidden, labels = model.embed(batch["input_ids"].to(model.device)), batch["labels"].to(model.device)
            counts, means = [len(examples[at].input_ids) for at in group], []
            for one in (plan, Plan.full(model.depth)):
                deep = Runtime(backbone).forward(hidden, [one] * len(group), counts)
                sums, positions = row_losses(backbone, deep, labels, counts, [one] * len(group))
                means.append(sums / positions.clamp(min=1))
            found[group] = (means[0] - means[1]).float().cpu()
    return found


def parting(gaps: Tensor) -> float:
    """Between which gaps (examples,) lies the parting of those that bear it from those that do not: the cut that leaves
    least variance within the two groups (Otsu 1979, IEEE Trans. SMC 9). Gaps beyond the 95th percentile count as that.
    """
    ordered = gaps.double().clamp(max=gaps.double().quantile(0.95)).sort().values
    count = torch.arange(1, len(ordered), dtype=ordered.dtype)
    below = ordered.cumsum(0)[:-1] / count
    above = (ordered.sum() - ordered.cumsum(0)[:-1]) / (len(ordered) - count)
    at = int((count * (len(ordered) - count) * (above - below).square()).argmax())
    return ((ordered[at] + ordered[at + 1]) / 2).item()


@torch.no_grad()
def choose_basis(model: LayerwiseForCausalLM, examples: Sequence[Tokens], bears: Tensor | None = None) -> None:
    """Let each router see only the DIRECTIONS in which the prompts of these examples differ most at its layer.

    They are the first principal components of what it reads, each divided by its standard deviation. A router of 576
    weights would learn the rows of a batch by heart, and a step along what all prompts share would open or close its
    gate for every input at once; what tells kinds of inputs apart is in the first few components.

    Prompts take the path that gates now take, with the LoRA as it now is: at the end of the held steps, for both move
    the states by many of the deviations measured before.

    Args:
        bears: (examples,), above 0 for those that should skip and below for those that should not, the more the surer.
            If given, routers are fitted to it, layer after layer, as logistic regressions.
    """
    with evaluating(model):
        runtime, policy = Runtime(model.runtime.backbone), model.policy
        groups = length_sorted_batches([one.prompt_length for one in examples], TOKENS_AT_ONCE)
        walks = []
        for group in groups:
            prompts = [examples[at].input_ids[: examples[at].prompt_length] for at in group]
            ids = [torch.tensor(prompt, device=model.device) for prompt in prompts]
            hidden = model.embed(nn.utils.rnn.pad_sequence(ids, batch_first=True))
            walks.append((hidden, Gates(policy, [len(prompt) for prompt in prompts])))
        needs = None if bears is None else -bears[[at for group in groups for at in group]].to(model.device)
        for layer in range(len(policy.weight)):  # and the head, if it has a gate
            states = torch.cat([summary(hidden, gates.lengths, policy.reads) for hidden, gates in walks])
            policy.center[layer] = states.mean(0)
            policy.basis[layer] = _components(states - policy.center[layer])
            if needs is not None and layer not in policy.keep:
                seen = (states - policy.center[layer]) @ policy.basis[layer].T
                policy.weight[layer], policy.bias[layer] = _fitted(seen, needs)
            for hidden, gates in walks if layer < model.depth else ():
                run = gates.decide(layer, hidden)[1]
                for rows, visits in (
                    (run.nonzero()[:, 0], (Visit(layer),)),
                    ((~run).nonzero()[:, 0], policy.left(layer)),
                ):
                    if len(rows) and visits:
                        counts = [gates.lengths[row] for row in rows.tolist()]
                        hidden[rows] = runtime.forward(hidden[rows], [Plan(visits)] * len(rows), counts)


def _components(centred: Tensor) -> Tensor:
    """Principal components (DIRECTIONS, size) of (examples, size), over their deviations; 0 where there are fewer.

    Those that deviate by less than FLOOR are 0 too.
    """
    _, sizes, components = torch.linalg.svd(centred, full_matrices=False)
    deviations = sizes / len(centred) ** 0.5
    kept = min(DIRECTIONS, len(centred) - 1, int((deviations >= FLOOR).sum()))
    found = centred.new_zeros(DIRECTIONS, centred.shape[1])
    found[:kept] = components[:kept] / deviations[:kept, None]
    return found


@torch.enable_grad()
def _fitted(seen: Tensor, needs: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (directions,) and bias () of the logistic regression that tells `needs` > 0 from < 0 by `seen`.

    Args:
        seen: (examples, directions).
        needs: (examples,); its magnitude is the example's weight.
    """
    parameters = torch.zeros(seen.shape[1] + 1, device=seen.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = seen.float() @ parameters[:-1] + parameters[-1]
        wrong = binary_cross_entropy_with_logits(scores, (needs > 0).float(), needs.abs().float())
        total = wrong + RIDGE * parameters.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    fitted = parameters.detach()
    return fitted[:-1], fitted[-1]
