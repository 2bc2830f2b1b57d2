"""What will go wrong, or do nothing: set-ups, or workflow files, in, sentences out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .finding import Finding, Rule
from .graph import Budget
from .holdings import FindFile
from .lora_files import lora_words
from .memory import memory_line, memory_table
from .reader import setups
from .rules.controls import about_controls
from .rules.inputs import about_encoders, about_latent, about_prompts
from .rules.memory import about_memory
from .rules.model import about_loras, about_model, about_other_nodes, about_vae
from .rules.sampling import about_denoise, about_sampling, about_skipped_layers
from .rules.upscaling import about_upscaling
from .setup import SD3, Card, Setup
from .workflow_file import api_graph

SECONDS, LARGEST_FILE = 60.0, 2**26
"""What the command line takes, and bytes that it reads."""


def files_under(folder: Path | None) -> FindFile:
    """Files by name in a `models` folder, and those that come with the pack."""
    own = Path(__file__).resolve().parents[2] / "models"

    def find_file(kind: str, name: str) -> Path | None:
        plain = name.replace("\\", "/").removeprefix(f"{kind}/")
        if folder is not None:
            with suppress(OSError, ValueError):  # a name that the system can't have
                root = (folder / kind).resolve()
                path = (root / plain).resolve()
                if path.is_relative_to(root) and path.is_file():
                    return path
        return next((path for path in own.rglob("*.safetensors") if path.name == plain), None)

    return find_file


def check(
    workflow: dict[str, Any], find_file: FindFile, seconds: float = math.inf
) -> dict[str, list[Finding]]:
    """Sampler's node id -> what there is to say; as `judged`."""
    return {key: found for key, (found, _) in judged(workflow, find_file, seconds).items()}


def judged(
    workflow: dict[str, Any],
    find_file: FindFile,
    seconds: float = math.inf,
    card: Card | None = None,
) -> dict[str, tuple[list[Finding], list[str]]]:
    """Sampler's node id -> what there is to say, what its LoRAs are and, of a card, what it takes
    there. Raises SettingError for no workflow, and for one that takes more than so many seconds.

    Where one sampler draws with SD3, those that draw with other models are left alone.
    """
    budget = Budget(seconds)
    graph = api_graph(workflow, budget)
    found = setups(graph, find_file, budget, card)
    ours = any(setup.model is not None and setup.model.kind == SD3 for setup in found.values())
    return {
        key: (
            _checked(setup, ours),
            [*map(lora_words, setup.loras), *(memory_table(setup) if setup.is_sd3 else ())],
        )
        for key, setup in found.items()
    }


def _checked(setup: Setup, ours: bool) -> list[Finding]:
    """What there is to say where no object can be looked at."""
    if setup.model is None:
        words = (
            "The model is not known: its file is not at hand, or a node gives it that is not known "
            "here. What depends on it was not checked."
        )
        return [*findings(setup), Finding("note", "model unknown", words)]
    if ours and setup.model.kind != SD3:
        words = f"This sampler draws with a {setup.model.kind}, which is not checked here."
        return [Finding("note", "model other", words)]
    return findings(setup)


def findings(setup: Setup) -> list[Finding]:
    """Everything there is to say about a set-up, errors first."""
    found = [finding for rule in _RULES for finding in rule(setup)]
    order = ("error", "warning", "note")
    return sorted(dict.fromkeys(found), key=lambda finding: order.index(finding.severity))


def about_files_and_memory(setup: Setup) -> list[str]:
    """What the LoRAs are, and in one line what it takes of the memory that there is."""
    return [*map(lora_words, setup.loras), *memory_line(setup)]


def report(found: list[Finding], beside: Sequence[str] = ()) -> str:
    """One line each, or that there is nothing to say; then what the LoRAs are, and the memory."""
    said = [str(finding) for finding in found] or ["Nothing to say: this set-up fits SD3.5."]
    return "\n".join([*said, *beside])


_RULES: tuple[Rule, ...] = (
    about_model,
    about_sampling,
    about_denoise,
    about_skipped_layers,
    about_controls,
    about_prompts,
    about_encoders,
    about_latent,
    about_upscaling,
    about_vae,
    about_loras,
    about_other_nodes,
    about_memory,
)
