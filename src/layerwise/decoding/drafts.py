"""Drafts: who proposes the next few tokens, written as text.

    off           nobody: plain decoding
    ngram         copy what followed the last words where they occurred before (prompt lookup)
    corpus        the n-grams of the model's other answers that an adapter brings
    tree          several continuations at once, the likeliest of both
    head          the exit head that an adapter brings
    exit:8        the first 8 layers, the final norm and the head
    plan:0-5 20-29   any plan
    policy           the plans that the model's policy decides; what is drafted for is then the whole model
    auto          whichever of these is fastest here, chosen while running

Behind a comma stands the most tokens to draft at once: `exit:8,6`. Without it, the length follows from the measured
acceptance and times. `ngram+exit:8` copies where it can and uses the other draft where it cannot.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from layerwise.plan import Plan

MOST = 15  # drafted tokens of a pass; the verification of more costs more than it can give
_FORMS = 'write auto, off, ngram, corpus, tree, head, policy, "exit:8", "exit:8,6" or "plan:0-5 20-29"'
_BESIDE_NGRAMS = ("corpus", "head", "exit", "plan", "policy")
_KINDS = ("auto", "off", "ngram", "tree", *_BESIDE_NGRAMS)


@dataclass(frozen=True, slots=True)
class Draft:
    """What drafts: `kind` is one of auto, off, ngram, corpus, tree, head, exit, plan, policy; `length` None: it adapts.

    An early exit after E layers is the plan of the first E visits, `exit` says how many; `lookup` puts n-grams first.
    With `trust`, drafted tokens of at least that probability are taken without verification: no draft any more, but
    early exit by confidence, whose output is not the model's own.
    """

    kind: str
    exit: int | None = None
    plan: Plan | None = None
    length: int | None = None
    lookup: bool = False
    trust: float | None = None

    @classmethod
    def early_exit(cls, text: str, layers: int | None = None) -> Draft:
        """Read "8@0.9": leave after 8 layers wherever their prediction has a probability of 0.9 or more.

        Raises:
            ValueError: it is not of that form, or the model of `layers` layers has no such exit.
        """
        exit, _, trust = text.strip().partition("@")
        if not re.fullmatch(r"\d{1,4}", exit) or not re.fullmatch(r"0?\.\d+|1(\.0*)?", trust):
            raise ValueError(f"'{text}' is no early exit: write layers@probability, such as 8@0.9")
        made = cls.parse(f"exit:{exit},{MOST}", layers)
        return cls("exit", exit=made.exit, length=MOST, trust=float(trust))

    @classmethod
    def parse(cls, text: str, layers: int | None = None) -> Draft:
        """Read the text form.

        Raises:
            ValueError: it is no draft, or one that a model of `layers` layers cannot run.
        """
        body, lookup = text.strip(), False
        if body.startswith("ngram+"):
            body, lookup = body.removeprefix("ngram+"), True
        named, comma, length = body.rpartition(",") if "," in body else (body, "", "")
        kind, colon, layers_named = (part.strip() for part in named.partition(":"))
        if kind not in _KINDS or bool(colon) != (kind in ("exit", "plan")) or (lookup and kind not in _BESIDE_NGRAMS):
            raise ValueError(f"'{text}' is no draft: {_FORMS}")
        by_spaces = "; the layers of its plan are separated by spaces" if kind == "plan" else ""
        if comma and not re.fullmatch(r"\s*\d{1,3}\s*", length):
            raise ValueError(f"'{text}': the length after the comma must be a number from 1 to {MOST}{by_spaces}")
        if "," in layers_named:
            raise ValueError(f"'{text}': only a draft's length stands behind a comma{by_spaces}")
        tokens = int(length) if comma else None
        if tokens is not None and (kind in ("auto", "off") or not 1 <= tokens <= MOST):
            drafts = "policy, ngram, corpus, tree, head, exit and plan"
            raise ValueError(f"'{text}' is no draft: a length, from 1 to {MOST}, goes with {drafts}{by_spaces}")
        if kind == "plan":
            return cls("plan", plan=Plan.parse(layers_named, layers), length=tokens, lookup=lookup)
        if kind == "exit":
            if not re.fullmatch(r"\d{1,4}", layers_named):
                raise ValueError(f"'{text}' is no draft: say after how many layers to exit, such as exit:8")
            exit = int(layers_named)
            if exit < 1 or (layers is not None and exit >= layers):
                until = f"{layers - 1}, for the model has {layers} layers" if layers else "one less than the model has"
                raise ValueError(f"'{text}': an exit is after 1 to {until}")
            return cls("exit", exit=exit, length=tokens, lookup=lookup)
        return cls(kind, length=tokens, lookup=lookup)

    def __str__(self) -> str:
        if self.trust is not None:
            return f"early exit {self.exit}@{self.trust:g}"
        body = {"exit": f"exit:{self.exit}", "plan": f"plan:{self.plan}"}.get(self.kind, self.kind)
        return ("ngram+" if self.lookup else "") + body + (f",{self.length}" if self.length else "")
