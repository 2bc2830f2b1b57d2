"""The jobs of a batch: a table of overrides, one row a job, read as they are needed."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import workflow
from .errors import AutomationError, WorkflowError
from .workflow import Workflow

SEEDS = ("seed", "noise_seed")
KEYS = {"id", "workflow", "set", "seed", "tags"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
FILE = re.compile(r"\.(safetensors|sft|gguf|ckpt|pt|pth|bin)$", re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    """One prompt of a batch; its id names its files."""

    id: str
    workflow: Workflow
    seed: int | None = None
    tags: dict[str, Any] = field(default_factory=dict)

    def inputs(self) -> str:
        """A sha256 of what decides the picture: every node's class and inputs."""
        nodes = {k: [v["class_type"], v["inputs"]] for k, v in self.workflow.items()}
        return hashlib.sha256(json.dumps(nodes, sort_keys=True).encode()).hexdigest()

    def group(self) -> tuple[str, str]:
        """The model files, and the other texts: jobs that share them run one after the other, so
        that the server loads and encodes once."""
        values = [v for node in self.workflow.values() for v in workflow.widgets_of(node).values()]
        texts = sorted({v for v in values if isinstance(v, str)})
        files = [text for text in texts if FILE.search(text)]
        return "\n".join(files), "\n".join(t for t in texts if t not in files)


@dataclass(frozen=True)
class Table:
    """A JSONL or CSV file of jobs; with a template, its rows are overrides of that.

    A row of JSONL: {"id", "workflow": path or workflow, "set": {NODE.WIDGET: value}, "seed",
    "tags"}, all optional where the template or the row number says it. Columns of a CSV: id,
    workflow, seed, NODE.WIDGET for overrides; all others are tags. With `seeds` every row is run
    with each of them.
    """

    path: Path
    template: Path | None = None
    seeds: tuple[int, ...] = ()

    def count(self) -> int:
        """How many jobs there are."""
        return sum(1 for _ in self._rows()) * max(len(self.seeds), 1)

    def jobs(self) -> Iterator[Job]:
        """One after the other. Raises AutomationError that names the row which can't be used."""
        read: dict[Path, Workflow] = {}
        names: set[str] = set()
        for number, row in self._rows():
            try:
                for seed in self.seeds or (row.get("seed"),):
                    job = self._job(number, row, seed, read)
                    if job.id in names:
                        raise WorkflowError(f"the id '{job.id}' is there twice; it names files.")
                    names.add(job.id)
                    yield job
            except WorkflowError as error:
                raise WorkflowError(f"{self.path}, row {number}: {error}") from error

    def _job(self, number: int, row: dict[str, Any], seed: Any, read: dict[Path, Workflow]) -> Job:
        if unknown := set(row) - KEYS:
            raise WorkflowError(f"{', '.join(sorted(unknown))} is unknown; known are {KEYS}.")
        base = row.get("workflow") or self.template
        if isinstance(base, dict):
            prompt = workflow.checked(base, "workflow")
        elif base:
            path = Path(base) if base is self.template else self.path.parent / base
            prompt = read[path] if path in read else read.setdefault(path, workflow.read(path))
        else:
            raise WorkflowError("no workflow: name one in the row, or a template with --workflow.")
        prompt = workflow.overridden(prompt, row.get("set") or {})
        name = str(row.get("id") or f"{number:06d}")
        if self.seeds:
            name += f"-{seed}"
        if not NAME.fullmatch(name):
            raise WorkflowError(f"the id {name!r} can't name files: letters, digits, . - _ can.")
        if seed is None or seed == "":
            return Job(name, prompt, seed_of(prompt), row.get("tags") or {})
        return Job(name, seeded(prompt, int(seed)), int(seed), row.get("tags") or {})

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                if self.path.suffix.lower() == ".csv":
                    for number, row in enumerate(csv.DictReader(file), 1):
                        yield number, from_csv(row)
                    return
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, self._parsed(number, line)
        except (OSError, UnicodeError, csv.Error) as error:
            raise AutomationError(f"{self.path} can't be read: {error}.") from error

    def _parsed(self, number: int, line: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise WorkflowError(f"{self.path}, row {number} is no JSON: {error}.") from error
        if not isinstance(row, dict):
            raise WorkflowError(f"{self.path}, row {number} is no object but {line.strip()[:40]}.")
        return row


def from_csv(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a CSV as one of JSONL; empty cells are left out."""
    filled = {key: value for key, value in row.items() if key and value not in (None, "")}
    found: dict[str, Any] = {k: v for k, v in filled.items() if k in ("id", "workflow", "seed")}
    found["set"] = {k: v for k, v in filled.items() if "." in k}
    found["tags"] = {k: v for k, v in filled.items() if k not in found and "." not in k}
    return found


def seeded(prompt: Workflow, seed: int) -> Workflow:
    """The workflow with every seed widget set. Raises WorkflowError when it has none."""
    found = False
    for node in prompt.values():
        for name in SEEDS:
            if isinstance(node["inputs"].get(name), int):
                node["inputs"][name] = seed
                found = True
    if not found:
        raise WorkflowError("a seed is given, and no node has a widget seed or noise_seed.")
    return prompt


def seed_of(prompt: Workflow) -> int | None:
    """The first seed in a workflow."""
    values = (node["inputs"].get(name) for node in prompt.values() for name in SEEDS)
    return next((value for value in values if isinstance(value, int)), None)
