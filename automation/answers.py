"""What ComfyUI's routes answer, read as if a stranger had written it.

Everything here raises ValueError for an answer that is not as ComfyUI's: the client makes a
ServerError of it. Source of the shapes: docs.comfy.org, "Server routes" and "Messages".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import RunError
from .outside import fields, is_a, is_file_name, parsed, shown
from .workflow import Workflow, title

MOST_FILES, MOST_TEXTS = 10_000, 1_000
"""Of one prompt."""
MOST_ENDED = 10_000
"""What ComfyUI remembers."""
LONGEST_TEXT = 100_000
"""Characters of the texts of one prompt; what comes then is left out."""
LONGEST_PART = 1_000
"""Characters of a folder's name, of a node's id and of a reason."""
LARGEST_COUNT = 10**9
"""Steps."""
TYPES = ("output", "temp", "input")
"""ComfyUI's folders."""
PICTURES = {
    ".png": (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"),
    ".jpg": (b"\xff\xd8\xff", b"\xff\xd9"),
    ".jpeg": (b"\xff\xd8\xff", b"\xff\xd9"),
    ".webp": (b"RIFF", b""),
    ".gif": (b"GIF8", b""),
}
"""Suffix -> how such a file begins, and how it ends."""
SAVING = {"SaveImage", "PreviewImage"}
"""ComfyUI's nodes that give a picture whenever they run."""


@dataclass(frozen=True)
class File:
    """Something that a workflow saved, as the server names it. The name is one, and no path."""

    node: str
    filename: str
    subfolder: str
    type: str

    def __post_init__(self) -> None:
        if not is_file_name(self.filename):
            raise ValueError(f"it names a file {shown(self.filename)}, which is no name of one")
        if not is_a(self.subfolder, str) or len(self.subfolder) > LONGEST_PART:
            raise ValueError(f"it names a folder {shown(self.subfolder)}")
        if self.type not in TYPES:
            raise ValueError(f"it names a kind of folder {shown(self.type)}")


@dataclass(frozen=True)
class Step:
    """How far a node is."""

    node: str
    done: int
    total: int


@dataclass
class Result:
    """What a prompt made: files, and texts by the node that showed them.

    seconds: that the server took, without waiting. cached: nodes that did not run, because the
    server has what they gave for the same inputs.
    """

    prompt_id: str
    files: list[File]
    texts: dict[str, list[str]]
    seconds: float
    cached: frozenset[str] = frozenset()


def about(answer: Any) -> dict[str, Any]:
    """/system_stats: with `system`, an object that holds at least `comfyui_version`."""
    system = fields(fields(answer, {"system": dict})["system"], {"comfyui_version": str})
    texts = {key: text(value)[:LONGEST_PART] for key, value in system.items() if is_a(value, str)}
    return {**answer, "system": texts}


def queued(answer: Any) -> dict[str, str]:
    """/queue: prompt id -> "running" or "pending"."""
    found = {}
    for state in ("pending", "running"):
        key = f"queue_{state}"
        for entry in fields(answer, {key: list})[key]:
            if not is_a(entry, list) or len(entry) < 2 or not is_a(entry[1], str):
                raise ValueError(f"an entry of {key} is {shown(entry)}")
            found[entry[1]] = state
    return found


def ended(answer: Any) -> set[str]:
    """/history: the ids of prompts that have ended."""
    if len(fields(answer, {})) > MOST_ENDED:
        raise ValueError(f"its history has {len(answer):,} prompts")
    return set(answer)


def entry_of(answer: Any, prompt_id: str) -> dict[str, Any] | None:
    """/history/ID: what is known of a prompt; None when that is nothing, or it runs."""
    entry = fields(answer, {}).get(prompt_id)
    if entry is None:
        return None
    status = fields(entry, {"status": (dict, type(None))}, set()).get("status") or {}
    known = fields(status, {"status_str": (str, type(None))}, set()).get("status_str")
    return entry if known else None


def accepted(answer: Any, prompt_id: str) -> list[str]:
    """/prompt: nothing when a prompt was queued whole, else lines that say why a part was not."""
    types: dict[str, Any] = {"prompt_id": str, "node_errors": (dict, list, type(None))}
    found = fields(answer, types, {"prompt_id"})
    if found["prompt_id"] != prompt_id:
        raise ValueError(
            f"it calls the prompt {shown(found['prompt_id'])}, not {prompt_id} as asked; a newer "
            "ComfyUI does"
        )
    if not found.get("node_errors"):
        return []
    return ["A part of the workflow can't be run", *_node_errors(found["node_errors"])]


def refusal(data: bytes) -> list[str]:
    """/prompt with status 400: why a workflow was not queued, a line for each widget."""
    try:
        answer = fields(parsed(data), {"error": (dict, str)})
        error = answer["error"]
        first = error if isinstance(error, str) else fields(error, {"message": str})["message"]
        return [first, *_node_errors(answer.get("node_errors") or {})]
    except ValueError:
        return [data[:300].decode("utf-8", "replace") or "It gives no reason."]


def _node_errors(found: Any) -> list[str]:
    lines = []
    for key, node in fields(found, {}).items():
        fields(node, {"class_type": str, "errors": list})
        for error in node["errors"]:
            fields(error, {"message": str, "details": str})
            lines.append(f"{node['class_type']} ({key}): {error['message']}: {error['details']}")
    return lines[:MOST_TEXTS]


def result_of(prompt_id: str, history: dict[str, Any], workflow: Workflow | None = None) -> Result:
    """What an entry of /history holds. Raises RunError when the prompt failed."""
    messages = _messages(history)
    if history["status"]["status_str"] != "success":
        raise RunError(*failure(history, messages, workflow or {}))
    files, texts = [], {}
    for node, output in fields(history, {"outputs": dict})["outputs"].items():
        for kind, entries in fields(output, {}).items():
            entries = entries if isinstance(entries, list) else []
            if kind == "text":
                texts[node[:LONGEST_PART]] = list(map(text, entries[:MOST_TEXTS]))
            files += [file_of(node, entry) for entry in entries if is_file(entry)]
        if len(files) > MOST_FILES or len(texts) > MOST_TEXTS:
            raise ValueError(f"a prompt has more than {MOST_FILES:,} files")
    saving = [key for key, node in (workflow or {}).items() if node["class_type"] in SAVING]
    if saving and not files:
        raise RunError(f"The run has ended well, and node {saving[0]} has saved no picture.")
    cached = messages.get("execution_cached", {}).get("nodes")
    cached = cached if isinstance(cached, list) else []
    return Result(
        prompt_id, files, shortened(texts), _seconds(messages), frozenset(map(str, cached))
    )


def is_file(entry: Any) -> bool:
    return isinstance(entry, dict) and "filename" in entry


def file_of(node: str, entry: dict[str, Any]) -> File:
    return File(
        node[:LONGEST_PART],
        entry["filename"],
        entry.get("subfolder", ""),
        entry.get("type", "output"),
    )


def shortened(texts: dict[str, list[str]]) -> dict[str, list[str]]:
    """The first LONGEST_TEXT characters of them all."""
    left, found = LONGEST_TEXT, {}
    for node, lines in texts.items():
        found[node] = []
        for line in lines:
            found[node].append(line[:left])
            left -= len(found[node][-1])
    return found


def text(value: Any) -> str:
    """A text of a node as a file and a terminal can take it."""
    return str(value)[:LONGEST_TEXT].encode("utf-8", "replace").decode()


def _messages(history: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The last message of each kind."""
    found = fields(history["status"], {"messages": list}, set()).get("messages", [])
    pairs = [entry for entry in found if isinstance(entry, list) and len(entry) == 2]
    return {kind: data for kind, data in pairs if is_a(kind, str) and isinstance(data, dict)}


def _seconds(messages: dict[str, dict[str, Any]]) -> float:
    """Between start and end; 0 where the server does not say."""
    start = messages.get("execution_start", {}).get("timestamp")
    end = messages.get("execution_success", {}).get("timestamp")
    if not isinstance(start, (int, float)) or not isinstance(end, (int, float)):
        return 0.0
    return max(end - start, 0) / 1000 if abs(end - start) < LARGEST_COUNT else 0.0


def failure(
    history: dict[str, Any], messages: dict[str, dict[str, Any]], workflow: Workflow
) -> list[str]:
    """Lines that say why a prompt ended without its results."""
    if "execution_interrupted" in messages:
        return ["The run was cancelled."]
    error = messages.get("execution_error")
    if error is None:
        return [f"The run ended as '{history['status']['status_str']}'."]
    node = workflow.get(str(error.get("node_id")))
    name = title(node) if node else str(error.get("node_type"))[:LONGEST_PART]
    said = str(error.get("exception_message"))[:LONGEST_TEXT].strip()
    return f"{name} ({str(error.get('node_id'))[:LONGEST_PART]}): {said}".split("\n")


def progress(event: Any) -> tuple[str, str, Step | None]:
    """A message of the websocket: (its kind, the prompt's id, how far a node is)."""
    fields(event, {"type": str, "data": (dict, type(None))}, {"type"})
    data = event.get("data") or {}
    prompt_id = str(data.get("prompt_id"))[:LONGEST_PART]
    if event["type"] != "progress":
        return event["type"], prompt_id, None
    fields(data, {"value": float, "max": float})
    if not all(0 <= data[name] <= LARGEST_COUNT for name in ("value", "max")):
        raise ValueError(f"its progress is {shown(data)}")
    node = str(data.get("node"))[:LONGEST_PART]
    return "progress", prompt_id, Step(node, int(data["value"]), int(data["max"]))


def is_whole(name: str, data: bytes) -> bool:
    """Whether a picture begins and ends as its format does; other files are taken as they are."""
    suffix = name[name.rfind(".") :].lower()
    begins, ends = PICTURES.get(suffix, (b"", b""))
    return bool(data) and data.startswith(begins) and ends in data[-64:]
