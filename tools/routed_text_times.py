"""Time `generate` of adapters/routed-text as it is loaded, beside the model without it; into results/routed_text.json.

Three ways take turns: routed, attention everywhere by the same modules, and the base as it was. The base's layers run
as compiled kernels; of a converted layer the MLP does, and its attention half is an operator of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from layerwise import from_pretrained
from layerwise.benchmarks.environment import environment
from layerwise.data import text
from layerwise.evaluation.routed_text import generate_times
from layerwise.sources import load_tokenizer
from layerwise.training.routed_text import cut

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 6144], help="tokens before the answer")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    model = from_pretrained(adapter=ROOT / "adapters" / "routed-text")
    model.prepare()
    tokenizer = load_tokenizer()
    texts = cut([tokenizer(piece)["input_ids"] for piece in text("wikipedia", "test")], 512).flatten()[None]
    kept = ROOT / "results" / "routed_text.json"
    result = json.loads(kept.read_text(encoding="utf-8"))
    result["generate"] = []
    for context in chosen.contexts:
        one = generate_times(model, model.routed_layers, texts[:, :context], chosen.new_tokens, chosen.rounds)
        print(json.dumps(one), flush=True)
        result["generate"].append({**one, "environment": environment()})
    kept.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
