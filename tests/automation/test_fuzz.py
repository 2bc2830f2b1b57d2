"""Made-up answers of servers, rows and manifests: a result or an error in words, nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="hypothesis comes with python tools/test.py")

from hypothesis import given
from hypothesis import strategies as st

from automation import answers, outside
from automation.errors import AutomationError
from automation.jobs import Table
from automation.manifest import opened
from automation.workflow import checked

from ..fuzzing import JUNK, TRICKS, WRITTEN

ID = "11111111-2222-3333-4444-555555555555"
ODD = st.sampled_from([*TRICKS, "x.png", "x", ".x", "\ud800", "x\n\x1b[1m", ID, "1", "2"])
ANY = JUNK | ODD


def some(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """An object with some of these fields, each as it should be or not, or no object."""
    return st.fixed_dictionaries({}, optional={k: v | ANY for k, v in values.items()}) | ANY


def keyed(value: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.dictionaries(ODD | st.text(max_size=4), value | ANY, max_size=3) | ANY


NODES = st.sampled_from(["1", "2"])
NUMBERS = st.integers(0, 2000) | st.floats()
FILE = some(filename=ODD, subfolder=ODD, type=st.sampled_from(["output", "temp", "x"]))
OUTPUT = some(images=st.lists(FILE, max_size=3), text=st.lists(ANY, max_size=3), gifs=FILE)
MESSAGE = st.tuples(
    st.sampled_from(["execution_start", "execution_success", "execution_error",
                     "execution_interrupted", "execution_cached"]) | ANY,
    some(timestamp=NUMBERS, nodes=st.lists(ANY, max_size=2), node_id=NODES, node_type=ODD,
         exception_message=ODD),
).map(list)  # fmt: skip
STATUS = some(
    status_str=st.sampled_from(["success", "error"]), messages=st.lists(MESSAGE, max_size=4)
)
HISTORY = st.dictionaries(
    st.just(ID) | ODD,
    some(status=STATUS, outputs=st.dictionaries(NODES, OUTPUT, max_size=2)),
    max_size=2,
) | ANY  # fmt: skip
QUEUED = st.lists(st.tuples(NUMBERS, st.just(ID) | ANY, ANY).map(list) | ANY, max_size=3)
REASON = some(message=ODD, details=ODD, type=ODD)
REFUSED = some(
    error=REASON, node_errors=keyed(some(class_type=ODD, errors=st.lists(REASON, max_size=2))),
    prompt_id=st.just(ID), number=NUMBERS,
)  # fmt: skip
EVENT = some(
    type=st.sampled_from(["progress", "execution_success", "status"]),
    data=some(prompt_id=st.just(ID), node=NODES, value=NUMBERS, max=NUMBERS),
)
GRAPH: dict[str, Any] = {
    "1": {"class_type": "A", "inputs": {"seed": 1, "text": "x"}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}},
}


def survives(read: Callable[..., Any], *values: Any) -> Any:
    """What `read` gives; None after one of our errors. Anything else it raises is a finding."""
    try:
        return read(*values)
    except AutomationError as error:
        assert str(error).strip()
        assert not set(str(error)) & {"\x1b", "\0", "\ud800"}
    except ValueError as error:
        assert len(str(error)) < 400
    return None


@WRITTEN
@given(HISTORY)
def test_history(answer: Any) -> None:
    survives(answers.ended, answer)
    entry = survives(answers.entry_of, answer, ID)
    result = entry and survives(answers.result_of, ID, entry, GRAPH)
    if result:
        assert all(outside.is_file_name(file.filename) for file in result.files)
        assert all(outside.suffix_of(f.filename).isascii() for f in result.files)
        json.dumps([result.texts, result.seconds], ensure_ascii=False, allow_nan=False).encode()


@WRITTEN
@given(some(queue_running=QUEUED, queue_pending=QUEUED), some(system=some(comfyui_version=ODD)))
def test_queue_and_stats(queue: Any, stats: Any) -> None:
    assert set((survives(answers.queued, queue) or {}).values()) <= {"running", "pending"}
    about = survives(answers.about, stats)
    assert about is None or isinstance(about["system"]["comfyui_version"], str)


@WRITTEN
@given(REFUSED, EVENT, st.binary(max_size=20))
def test_refusals_and_events(refused: Any, event: Any, data: bytes) -> None:
    survives(answers.accepted, refused, ID)
    for body in (json.dumps(refused).encode(), data):
        assert all(isinstance(line, str) for line in answers.refusal(body))
    survives(answers.progress, event)
    survives(lambda: answers.progress(outside.parsed(data)))


@WRITTEN
@given(keyed(some(class_type=ODD, inputs=keyed(ANY), _meta=some(title=ODD))))
def test_workflows(found: Any) -> None:
    survives(checked, found, "a file")


WIDGETS = st.sampled_from(["1.seed", "1.text", "A.text", "x.y"])
ROW = some(
    id=ODD | st.text(max_size=5),
    workflow=st.just(GRAPH) | ODD,
    set=st.dictionaries(WIDGETS | ODD, ANY, max_size=2),
    seed=st.integers(-2, 2**65) | st.sampled_from(["5", " 7 ", "٣", "1e3", "0x1"]),
    tags=keyed(ANY),
)  # fmt: skip


@WRITTEN
@given(st.lists(ROW.map(json.dumps) | st.text(max_size=20), max_size=3).map("\n".join))
def test_rows(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "rows"
    folder.mkdir(exist_ok=True)
    (folder / "graph.json").write_text(json.dumps(GRAPH), encoding="utf-8")
    for name in ("rows.jsonl", "rows.csv"):
        (folder / name).write_text(text, encoding="utf-8", errors="replace")
        jobs = survives(lambda name=name: list(Table(folder / name, folder / "graph.json").jobs()))
        for job in jobs or ():
            assert outside.is_safe_name(f"{job.id}@1.png") and len(job.inputs()) == 64
            json.dumps(job.tags)


LINE = some(
    job=ODD, status=st.sampled_from(["done", "set aside"]), inputs=ODD, attempts=st.integers(),
    files=st.lists(some(name=ODD, sha256=ODD), max_size=2),
)  # fmt: skip


@WRITTEN
@given(
    st.lists(LINE.map(lambda line: json.dumps(line).encode()) | st.binary(max_size=9), max_size=3)
)
def test_manifests(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    folder = tmp_path_factory.getbasetemp() / "manifest"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.jsonl").write_bytes(b"\n".join(lines))

    def read() -> None:
        with opened(folder) as manifest:
            for _, _, names, attempts in manifest.seen.values():
                assert all(map(outside.is_file_name, names)) and attempts > 0

    survives(read)
