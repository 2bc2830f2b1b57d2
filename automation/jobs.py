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

from . import outside, workflow
from .errors import AutomationError, WorkflowError
from .workflow import Workflow

SEEDS = ("seed", "noise_seed")
ROW: dict[str, outside.Types] = {
    "id": (str, int),
    "workflow": (str, dict),
    "set": dict,
    "seed": (int, str),
    "tags": dict,
}
"""A row's fields; null, or an empty text, is as if it were not there."""
VALUE = (str, int, float, bool)
"""What a widget is set to."""
LARGEST_SEED = 2**64 - 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""An id; "@", which it has not, stands between it and a picture's number."""
TAKEN = {"manifest", "batch"}
"""Files of the batch itself."""
LONGEST = 2**20
"""Characters of a row."""
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
                row = checked(row)
                for seed in self.seeds or (seed_from(row.get("seed")),):
                    job = self._job(number, row, seed, read)
                    if job.id.casefold() in names:
                        raise WorkflowError(
                            f"the id '{job.id}' is there twice (capitals don't count); it names "
                            "files."
                        )
                    names.add(job.id.casefold())
                    yield job
            except WorkflowError as error:
                raise WorkflowError(f"{self.path}, row {number}: {error}") from error

    def _job(
        self, number: int, row: dict[str, Any], seed: int | None, read: dict[Path, Workflow]
    ) -> Job:
        base = row.get("workflow") or self.template
        if isinstance(base, dict):
            prompt = workflow.checked(base, "workflow")
        elif base:
            path = Path(base) if base is self.template else self.path.parent / base
            prompt = read[path] if path in read else read.setdefault(path, workflow.read(path))
        else:
            raise WorkflowError("no workflow: name one in the row, or a template with --workflow.")
        prompt = workflow.overridden(prompt, row.get("set", {}))
        name = str(row.get("id", f"{number:06d}"))
        if self.seeds:
            name += f"-{seed}"
        if not NAME.fullmatch(name):
            raise WorkflowError(f"the id {name!r} can't name files: letters, digits, . - _ can.")
        if name.casefold() in TAKEN or outside.is_reserved(name):
            raise WorkflowError(f"the id '{name}' can't name files: that name is taken.")
        tags = row.get("tags", {})
        if seed is None:
            return Job(name, prompt, seed_of(prompt), tags)
        return Job(name, seeded(prompt, seed), seed, tags)

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            if self.path.exists() and not self.path.is_file():
                raise ValueError("it is no file")
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                if self.path.suffix.lower() == ".csv":
                    for number, row in enumerate(csv.DictReader(file), 1):
                        yield number, from_csv(row)
                    return
                for number, line in enumerate(iter(lambda: file.readline(LONGEST), ""), 1):
                    if len(line) == LONGEST:
                        raise WorkflowError(
                            f"{self.path}, row {number} has more than {LONGEST:,} characters."
                        )
                    if line.strip():
                        yield number, self._parsed(number, line)
        except (OSError, ValueError, csv.Error) as error:
            raise AutomationError(f"{self.path} can't be read: {error}.") from error

    def _parsed(self, number: int, line: str) -> dict[str, Any]:
        try:
            return outside.fields(outside.parsed(line), {})
        except ValueError as error:
            what = "no object" if "expected an object" in str(error) else "no JSON"
            raise WorkflowError(f"{self.path}, row {number} is {what}: {error}.") from error


def checked(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what is null or empty, its fields of their types. Raises WorkflowError."""
    if unknown := row.keys() - ROW.keys():
        names = ", ".join(sorted(map(str, unknown)))
        raise WorkflowError(f"{names} is unknown; known are {', '.join(ROW)}.")
    row = {key: value for key, value in row.items() if value not in (None, "")}
    try:
        outside.fields(row, ROW, set())
        found = row.get("set", {})
        for value in outside.fields(found, dict.fromkeys(found, VALUE)).values():
            workflow.finite(value if isinstance(value, float) else 0.0)
    except ValueError as error:
        raise WorkflowError(f"{error}.") from error
    return row


def seed_from(value: int | str | None) -> int | None:
    """A seed as a row has it; a CSV has texts. Raises WorkflowError."""
    if value is None:
        return None
    text = str(value).strip()
    seed = int(text) if text.isdecimal() and len(text) <= len(str(LARGEST_SEED)) else -1
    if not 0 <= seed <= LARGEST_SEED:
        shown = outside.shown(value)
        raise WorkflowError(f"'seed' is {shown}, expected a whole number from 0 to 2^64 - 1.")
    return seed


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
