"""layerwise models: what can be run without a download."""

from __future__ import annotations

from layerwise.cli import options


def run(json: options.Json = False) -> None:
    """List the models at hand: the embedded one, and those in the local Hugging Face cache."""
    from rich.console import Console
    from rich.table import Table

    from layerwise.sources import EMBEDDED, hub_models

    rows = [
        {
            "name": model.name,
            "source": f"package {model.package} {model.version}",
            "license": model.license,
            "state": "ready" if model.converted else "converted on first use" if model.installed else "not installed",
            "note": model.note,
        }
        for model in EMBEDDED.values()
    ]
    rows += [
        {"name": name, "source": "Hugging Face cache", "license": "", "state": "ready", "note": ""}
        for name in hub_models()
    ]
    table = Table(box=None, header_style="bold")
    for title in ("name", "source", "license", "state", "note"):
        table.add_column(title)
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
    print("\nAny folder or Hugging Face id of a Llama, Qwen2, Qwen3, Mistral or Gemma3 text model works too.")
    if json:
        options.print_json({"models": rows})
