"""Monte Carlo tree search over plans.

    select    from the root, while a node is as wide as it may be: the child with the highest upper confidence bound
    expand    try the node's next edits: a few children at once, evaluated as one batch
    back up   count them in every node above, and keep the best value found below it

The bound is b + c sqrt(ln V / v), that of UCB1 (Auer et al., 2002) with V the *parent's* visits, but b is the best
value below the child where a game takes the mean: nobody plays against us, and one good plan among bad ones is what is
looked for. The length of a path is in the value (see `objective`), where Dr.LLM subtracts it from the bound. There are
no roll-outs: every plan in the tree is complete, and is evaluated itself.

A node is expanded as far as its visits allow (see `tree`) before the search descends below it. (Dr.LLM's released code
descends as soon as a node has one child, which makes the tree a chain and the search a random walk.) Siblings are
expanded a batch at a time, which seldom changes anything: the node would have been selected again.
"""

from __future__ import annotations

import math
import random

from layerwise.search.objective import Book
from layerwise.search.tree import Node, Prior, Tree, uniform


def mcts(
    book: Book,
    chance: random.Random,
    *,
    width: float = 1.0,
    batch: int = 4,
    exploration: float = 0.2,
    prior: Prior = uniform,
) -> Tree:
    """Evaluate plans until the book's budget is used up, or nothing is left to try.

    Args:
        width: a node with V visits has up to `width` sqrt(V) children, `batch` of which are tried at once.
        exploration: c of the bound; values lie within an interval of length 1.
    """
    (first,) = book.values([book.full])
    tree = Tree(book.layers, first, chance, prior)
    while book.left and not tree.root.exhausted:
        node = select(tree.root, width, exploration)
        plans = tree.next_plans(node, min(batch, book.left))
        tree.expand(node, plans, book.values(list(plans)))
    return tree


def select(root: Node, width: float, exploration: float) -> Node:
    """The node to expand next: the first on the way down that is to be widened."""
    node = root
    while not node.widens(width):
        open_children = [child for child in node.children if not child.exhausted]
        node = max(open_children, key=lambda child: bound(child, node.visits, exploration))
    return node


def bound(child: Node, visits: int, exploration: float) -> float:
    """The upper confidence bound of a child whose parent has `visits` visits."""
    return child.best + exploration * math.sqrt(math.log(visits) / child.visits)
