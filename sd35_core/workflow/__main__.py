"""What a ComfyUI workflow sets up, read from its JSON and the headers of its files.

    python -m sd35_core.workflow FILE.json [--models COMFYUI/models] [--card 8] [--strict]
                                 [--migrate OUT.json]

prints what SD35Check would say, without running anything. Both formats are read: what the canvas
saves and what it exports for the API. With --card it says what each phase takes of a card of so
many GB. Of a LoRA's file (.safetensors) it says for which model it is, whose names it has, its
rank, and what of it ComfyUI leaves out. With --migrate it writes the workflow with this pack's
nodes in the places of ComfyUI's own where they draw the same picture, and says which it replaced
and which stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..checkpoint.tensor_file import SAFETENSORS, TensorFile
from ..errors import CheckpointError, SettingError
from ..whole_file import write_text
from ..words import printable
from .check import LARGEST_FILE, SECONDS, files_under, judged, report
from .graph import Budget, TooLargeError
from .lora_files import lora_in, lora_words
from .memory import GB
from .migration import migrated
from .reader import MOST
from .setup import Card, Lora
from .workflow_file import is_node, read_workflow

LEAST_CARD, MOST_CARD = 0.1, 10_000
"""GB."""


def about_lora(path: Path) -> int:
    """Say what a LoRA is; 1 where layers of it match no model, 2 where it is none."""
    try:
        TensorFile(path)
    except CheckpointError as error:
        sys.stderr.write(f"{printable(error)}\n")
        return 2
    file = lora_in(path)
    sys.stdout.write(f"{lora_words(Lora(path.name, file=file))}\n")
    return 2 if not (file.layers or file.text) else int(file.matched != file.layers)


def card_asked_for(size: float | None) -> Card | None:
    """A card of so many GB. Raises SettingError for none that there is."""
    if size is None:
        return None
    if not LEAST_CARD <= size <= MOST_CARD:
        raise SettingError(
            f"--card is {size:g}; it is the card's memory in GB, {LEAST_CARD:g} to {MOST_CARD:g}."
        )
    return Card(int(size * GB))


def migrate(workflow: dict[str, Any], models: Path | None, out: Path) -> int:
    """Write a workflow with this pack's nodes; 1 where there was nothing to replace. Raises
    SettingError, OSError."""
    found = migrated(workflow, files_under(models), Budget(SECONDS))
    sys.stdout.write(f"{found.report()}\n")
    if not found.replaced:
        return 1
    write_text(out, json.dumps(found.workflow, indent=1, ensure_ascii=False) + "\n", replace=False)
    return 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sd35_core.workflow",
        description="Check a workflow, or a LoRA's file, without running it.",
    )
    parser.add_argument("file", type=Path, help="as the canvas saves it, or exported for the API")
    parser.add_argument("--models", type=Path, help="ComfyUI's models folder")
    parser.add_argument("--card", type=float, help="say what it takes of a card of so many GB")
    parser.add_argument("--strict", action="store_true", help="warnings fail too")
    parser.add_argument("--migrate", type=Path, metavar="OUT", help="write it with our nodes")
    options = parser.parse_args(arguments)
    if options.file.suffix.lower() in SAFETENSORS:
        return about_lora(options.file)
    try:
        with options.file.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise TooLargeError(f"It is larger than {LARGEST_FILE / 1e6:.0f} MB: no workflow is.")
        if options.models is not None and not options.models.is_dir():
            raise SettingError(f"'{options.models}' is no folder: --models names ComfyUI's models.")
        workflow = read_workflow(data)
        if options.migrate is not None:
            return migrate(workflow, options.models, options.migrate)
        found = judged(workflow, files_under(options.models), SECONDS, card_asked_for(options.card))
    except (OSError, SettingError) as error:
        sys.stderr.write(f"{options.file}: {error}\n")
        return 2
    if not found:
        sys.stdout.write("There is no sampler in this workflow that is known here.\n")
    prompt = {} if "nodes" in workflow else workflow.get("prompt", workflow)
    gaps = [printable(key, 40) for key, node in prompt.items() if not is_node(node)]
    if gaps:
        names = ", ".join(gaps[:MOST])
        sys.stdout.write(
            f"Not read: {names}, without a class. A node pack was missing when this was exported.\n"
        )
    for key, (said, loras) in found.items():
        sys.stdout.write(f"Sampler {key}:\n{report(said, loras)}\n")
    worst = {finding.severity for said, _ in found.values() for finding in said}
    return int("error" in worst or (options.strict and "warning" in worst))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
