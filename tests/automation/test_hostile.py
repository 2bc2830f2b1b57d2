"""Servers that answer wrongly, without end or not at all: they cost themselves, not the batch."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from automation import batch, limits, waiting
from automation.client import Client
from automation.errors import AutomationError, RunError, ServerError, WorkflowError
from automation.jobs import Table
from automation.manifest import opened
from tools import host as hosts

from ..conftest import PACK
from .hostile import (
    FakeComfyUI,
    babbling,
    broken_off,
    endless,
    failing_first,
    no_http,
    picture,
    says,
    served,
    trickling,
)

GRAPH: dict[str, Any] = {
    "1": {"class_type": "Noise", "inputs": {"seed": 0}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
}
JOBS = 12
DEEP = b"[" * 5_000 + b"]" * 5_000
ENTRY = {"status": {"status_str": "success", "messages": []}}


def liar(**changed: Any) -> FakeComfyUI:
    fake = FakeComfyUI()
    for name, value in changed.items():
        setattr(fake, name, value)
    return fake


def history(entry: Any) -> Any:
    """/history/ID with `entry` for whichever prompt."""

    async def answer(request: Any) -> Any:
        return await says({request.match_info["id"]: entry})(request)

    return answer


def named(filename: Any, **more: Any) -> dict[str, Any]:
    return {**ENTRY, "outputs": {"2": {"images": [{"filename": filename, **more}]}}}


FAULTS: dict[str, FakeComfyUI] = {
    "HTML": FakeComfyUI({"/queue": says(b"<html>hello</html>")}),
    "a list": FakeComfyUI({"/queue": says([])}),
    "a queue of numbers": FakeComfyUI({"/queue": says({"queue_running": [5], "queue_pending": 1})}),
    "a history of lists": FakeComfyUI({"/history": says([1])}),
    "JSON too deep": FakeComfyUI({"/queue": says(DEEP)}),
    "no version": FakeComfyUI({"/system_stats": says({"system": [1]})}),
    "a version that is a list": FakeComfyUI(
        {"/system_stats": says({"system": {"comfyui_version": [5]}})}
    ),
    "an entry that is a text": FakeComfyUI({"/history/{id}": history("x")}),
    "a status that is a number": FakeComfyUI({"/history/{id}": history({"status": 5})}),
    "outputs that are a list": FakeComfyUI({"/history/{id}": history({**ENTRY, "outputs": [1]})}),
    "a file that is a number": FakeComfyUI({"/history/{id}": history(named(5))}),
    "a file that is a path": FakeComfyUI({"/history/{id}": history(named("../../x.png"))}),
    "an absolute file": FakeComfyUI({"/history/{id}": history(named("/etc/x.png"))}),
    "a file of Windows": FakeComfyUI({"/history/{id}": history(named("..\\x.png"))}),
    "a file with a null byte": FakeComfyUI({"/history/{id}": history(named("x\0.png"))}),
    "a file of another folder": FakeComfyUI({"/history/{id}": history(named("x.png", type="..")) }),
    "a hundred thousand files": FakeComfyUI({"/history/{id}": history(
        {**ENTRY, "outputs": {"2": {"images": [{"filename": "x.png"}] * 100_000}}})}),
    "another prompt": FakeComfyUI({"/prompt": says({"prompt_id": "x", "node_errors": {}})}),
    "a prompt without an id": FakeComfyUI({"/prompt": says({})}),
    "a refusal of everything": FakeComfyUI({"/prompt": says(b"no", 400)}),
    "a refusal that is a list": FakeComfyUI({"/prompt": says([1, {}], 400)}),
    "an error of its own": FakeComfyUI({"/prompt": says(b"oops", 500)}),
    "a way to a file": FakeComfyUI({"/queue": says(b"", 302, Location="file:///etc/passwd")}),
    "a way elsewhere": FakeComfyUI({"/view": says(b"", 307, Location="http://127.0.0.1:9/")}),
    "a packed bomb": FakeComfyUI({"/queue": says(b"\x1f\x8b", Content_Encoding="gzip")}),
    "no end of JSON": FakeComfyUI({"/queue": endless}),
    "no end of a picture": FakeComfyUI({"/view": endless}),
    "a byte at a time": FakeComfyUI({"/queue": trickling}),
    "a picture a byte at a time": FakeComfyUI({"/view": trickling}),
    "broken off for ever": FakeComfyUI({"/view": broken_off}),
    "no HTTP": FakeComfyUI({"/queue": no_http}),
    "away behind its proxy": FakeComfyUI({"/queue": says(b"bad gateway", 502)}),
    "no picture": FakeComfyUI({"/view": says(b"<html>")}),
    "half a picture": FakeComfyUI({"/view": says(picture(1)[:-9])}),
    "nothing as a picture": FakeComfyUI({"/view": says(b"")}),
    "done without a picture": liar(says_nothing=True),
    "forgets": liar(forgets=True),
    "never ends": liar(never_ends=True),
}  # fmt: skip
HARMLESS: dict[str, FakeComfyUI] = {
    "nothing": FakeComfyUI(),
    "babbles": FakeComfyUI({"/ws": babbling}),
    "no websocket": FakeComfyUI({"/ws": says(b"no", 404)}),
    "a suffix too long": liar(filename=f"x.{'y' * 200}"),
    "a suffix of odd letters": liar(filename="x.p:n*g"),
    "no suffix": liar(filename="x"),
    "hidden": liar(filename=".x.png"),
    "texts of everything": FakeComfyUI({"/history/{id}": history(
        {**named("x.png", subfolder="7"), "outputs": {"1": {"text": ["\ud800\x1b[2J", 5, None, {}]},
         "2": {"images": [{"filename": "x.png", "subfolder": "7"}], "animated": [False]}}})}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test can wait for."""
    monkeypatch.setattr(limits, "ANSWER_SECONDS", 1)
    monkeypatch.setattr(limits, "FILE_SECONDS", 1)
    monkeypatch.setattr(limits, "LARGEST_ANSWER", 2**22)
    monkeypatch.setattr(limits, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(waiting, "LATE_SECONDS", 2.0)
    monkeypatch.setattr(batch, "ENTER_SECONDS", 1.0)


def table(folder: Path, count: int = JOBS) -> Table:
    (folder / "graph.json").write_text(json.dumps(GRAPH), encoding="utf-8")
    rows = [{"id": f"job{n}", "seed": n} for n in range(count)]
    path = folder / "jobs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return Table(path, folder / "graph.json")


def drawn(jobs: Table, urls: list[str], out: Path) -> dict[str, int]:
    servers = [Client(url, patience=1, largest=2**20) for url in urls]
    return asyncio.run(batch.run(jobs, servers, out))


def entries(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text("utf-8").splitlines()]


def check_whole(folder: Path, count: int = JOBS) -> None:
    """Each job once, with its own picture, and nothing outside of its folder."""
    out = folder / "out"
    seen = entries(out)
    assert Counter(entry["job"] for entry in seen) == Counter(f"job{n}" for n in range(count))
    assert {entry["status"] for entry in seen} == {"done"}
    pictures = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert pictures == {f"job{n}.png": picture(n) for n in range(count)}
    own = {"out", "graph.json", "jobs.jsonl"}
    assert {path.name for path in folder.iterdir()} == own


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_server_costs_itself_and_a_good_one_does_the_batch(name: str, tmp_path: Path) -> None:
    with served(FAULTS[name]) as bad, served(FakeComfyUI()) as good:
        counts = drawn(table(tmp_path), [bad, good], tmp_path / "out")
    assert counts == {"done": JOBS, "set aside": 0}
    check_whole(tmp_path)


@pytest.mark.parametrize("name", sorted(FAULTS.keys() - {"never ends"}))
def test_alone_it_ends_in_words(name: str, tmp_path: Path) -> None:
    """But for one that never ends: a run takes as long as it likes while no server is idle."""
    with served(FAULTS[name]) as bad:
        try:
            counts = drawn(table(tmp_path, 2), [bad], tmp_path / "out")
        except AutomationError as error:
            assert bad in str(error) and len(str(error)) > 40
        else:
            assert counts == {"done": 0, "set aside": 2}
            assert all(entry["error"] for entry in entries(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.png")) and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("name", HARMLESS)
def test_what_harms_nothing_is_no_fault(name: str, tmp_path: Path) -> None:
    with served(HARMLESS[name]) as url:
        assert drawn(table(tmp_path), [url], tmp_path / "out")["done"] == JOBS
    assert len(entries(tmp_path / "out")) == JOBS


def lying() -> FakeComfyUI:
    """No picture, another prompt's file, nothing at all, a refusal: in turn, for ever."""
    fake = FakeComfyUI()
    lies = itertools.cycle([
        says(b"<html>"), says(picture(5)[:-3]), says(b"gone", 404), says(b"", 410),
    ])  # fmt: skip

    async def view(request: Any) -> Any:
        return await next(lies)(request)

    refusals = itertools.cycle([fake.prompt, says(b"no", 400), fake.prompt, fake.prompt])

    async def prompt(request: Any) -> Any:
        return await next(refusals)(request)

    fake.faults.update({"/view": view, "/prompt": prompt})
    return fake


def test_two_hundred_jobs_on_a_liar_one_that_dies_and_a_good_one(
    comfyui: hosts.Host, server: hosts.Server, tmp_path: Path
) -> None:
    """The good one and the one that is killed, twice, and comes back are real ComfyUIs."""
    count = 200
    image = {"width": 8, "height": 8, "batch_size": 1, "color": 0}
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": image},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    folder = tmp_path / "batch"
    folder.mkdir()
    (folder / "graph.json").write_text(json.dumps(graph), encoding="utf-8")
    rows = [{"id": f"job{n}", "set": {"EmptyImage.color": n * 1000}} for n in range(count)]
    (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = folder / "out"

    async def run(urls: list[str], dying: hosts.Server) -> dict[str, int]:
        servers = [Client(url, patience=60) for url in urls]
        done: list[str] = []
        jobs = Table(folder / "jobs.jsonl", folder / "graph.json")
        drawing = asyncio.create_task(batch.run(jobs, servers, out, done=done.append))
        for share in (0.2, 0.6):
            while len(done) < share * count:
                assert not drawing.done()
                await asyncio.sleep(0.02)
            assert dying.process is not None
            dying.process.kill()
            dying.process.wait()
            await asyncio.to_thread(dying.__enter__)
        return await drawing

    with hosts.Server(comfyui, tmp_path / "dying", ["--cpu"]) as dying, served(lying()) as liar:
        counts = asyncio.run(run([liar, dying.url, server.url], dying))
    assert counts == {"done": count, "set aside": 0}
    seen = entries(out)
    assert Counter(entry["job"] for entry in seen) == Counter(f"job{n}" for n in range(count))
    assert {entry["host"] for entry in seen} == {dying.url, server.url}
    for n in range(count):
        (colour,) = set(Image.open(out / f"job{n}.png").convert("RGB").get_flattened_data())
        assert colour == ((n * 1000 >> 16) & 255, (n * 1000 >> 8) & 255, n * 1000 & 255)
    assert {path.name for path in folder.iterdir()} == {"out", "graph.json", "jobs.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == {"batch", "dying"}


@pytest.mark.parametrize("path", ["/view", "/queue", "/prompt", "/history/{id}", "/system_stats"])
@pytest.mark.parametrize("fault", [broken_off, says(b"bad gateway", 502), says(b"wait", 503)])
def test_what_breaks_off_or_is_away_is_asked_again(path: str, fault: Any, tmp_path: Path) -> None:
    fake = FakeComfyUI()
    right = {"/view": fake.view, "/queue": fake.queued, "/prompt": fake.prompt,
             "/history/{id}": fake.one, "/system_stats": fake.about}  # fmt: skip
    fake.faults[path] = failing_first(2, fault, right[path])
    with served(fake) as url:
        assert drawn(table(tmp_path), [url], tmp_path / "out") == {"done": JOBS, "set aside": 0}
    check_whole(tmp_path)
    assert Counter(fake.drawn) == Counter(range(JOBS)), "each was queued once"


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PACK), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-m", "automation", *arguments], cwd=folder, env=environment,
        capture_output=True, encoding="utf-8", timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["../../x.png", "/tmp/x.png", "..", "a/b.png", "a\\b.png", "x\0.png", "x\n.png", "CON.png",
     "nul", ".bashrc", "x.png:stream", "x.png.", "y" * 300, "", "\u202egnp.x"],
)  # fmt: skip
def test_a_name_from_a_server_is_never_a_path(name: str, tmp_path: Path) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    (inside / "graph.json").write_text(json.dumps(GRAPH), encoding="utf-8")
    with served(FakeComfyUI({"/history/{id}": history(named(name, subfolder="7"))})) as url:
        done = command("run", "graph.json", "--server", url, "--out", "out", folder=inside)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("automation: ")]
    assert said.startswith(f"automation: {url} ") and done.stderr.endswith(f"{said}\n")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [inside / "graph.json"]


def test_what_a_server_says_can_neither_colour_nor_forge_a_line(tmp_path: Path) -> None:
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH), encoding="utf-8")
    output = {"1": {"text": ["good\x1b[2J\nEND"]}, "2": {"images": [{"filename": "x.png",
              "subfolder": "7"}]}}  # fmt: skip
    fake = FakeComfyUI({"/history/{id}": history({**ENTRY, "outputs": output})})
    with served(fake) as url:
        done = command("run", "graph.json", "--server", url, folder=tmp_path)
    assert done.returncode == 0 and "\x1b" not in done.stdout and "END" in done.stdout


def test_a_large_answer_takes_little_memory(tmp_path: Path) -> None:
    before = psutil.Process().memory_info().rss
    too_much = pytest.raises(ServerError, match="more than 1 MB, the most that is taken")
    with served(FakeComfyUI({"/view": endless})) as bad, too_much:
        drawn(table(tmp_path, 2), [bad], tmp_path / "out")
    assert psutil.Process().memory_info().rss - before < 30e6


def test_a_wrong_address_among_good_ones_does_not_hold_up_the_batch(tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{hosts.free_port()}"
    with served(FakeComfyUI()) as good:
        start = time.monotonic()
        servers = [Client(nowhere, patience=60), Client("http://[", 1), Client(good, patience=1)]
        counts = asyncio.run(batch.run(table(tmp_path), servers, tmp_path / "out"))
        assert time.monotonic() - start < 10
    assert counts["done"] == JOBS


def test_names_of_jobs_and_numbers_never_meet(tmp_path: Path) -> None:
    """An id that looks like another one's second picture; two that differ by capitals."""
    two = {**ENTRY, "outputs": {"2": {"images": [{"filename": "a.png", "subfolder": "1"},
           {"filename": "b.png", "subfolder": "2"}]}}}  # fmt: skip
    jobs = table(tmp_path, 0)
    rows = [{"id": name} for name in ("owl", "owl_1", "owl.png", "owl-1")]
    jobs.path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with served(FakeComfyUI({"/history/{id}": history(two)})) as url:
        assert drawn(jobs, [url], tmp_path / "out")["done"] == 4
    names = [file["name"] for entry in entries(tmp_path / "out") for file in entry["files"]]
    assert len({name.casefold() for name in names}) == 8
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == set(names)


ROWS = [
    ('{"seed": "abc"}', "'seed' is \"abc\", expected a whole number"),
    ('{"seed": -1}', "'seed' is -1, expected a whole number from 0"),
    ('{"seed": 18446744073709551616}', "from 0 to 2\\^64 - 1"),
    ('{"seed": 1.5}', "'seed' is 1.5, expected a whole number or a text"),
    ('{"seed": true}', "'seed' is true"),
    ('{"set": ["x"]}', "'set' is \\[\"x\"\\], expected an object"),
    ('{"set": {"Noise.seed": ["2", 0]}}', "'Noise.seed' is .*, expected a text or a whole"),
    ('{"set": {"Noise.seed": NaN}}', "no number that a widget can hold"),
    ('{"workflow": 5}', "'workflow' is 5, expected a text or an object"),
    ('{"workflow": "\\u0000"}', "can't be read as JSON"),
    ('{"workflow": "."}', "can't be read as JSON: it is no file"),
    ('{"workflow": {"1": {"class_type": "A", "inputs": {}, "_meta": 5}}}', "_meta that is no"),
    ('{"tags": []}', "'tags' is \\[\\], expected an object"),
    ('{"id": ["x"]}', "'id' is .*expected a text or a whole number"),
    ('{"id": "manifest"}', "that name is taken"),
    ('{"id": "Batch"}', "that name is taken"),
    ('{"id": "nul.x"}', "that name is taken"),
    ('{"id": "a@1"}', "can't name files"),
    ('{"id": "A"}\n{"id": "a"}', "row 2: the id 'a' is there twice"),
    ("[" * 100_000, "no JSON: it is nested too deep"),
    ('{"tags": ' + '{"a":' * 70 + "1" + "}" * 71, "nested more than 64 deep"),
    ("5", "no object: expected an object, got 5"),
    ('{"seeds": 1, "x\\u001b": 2}', "seeds, x.* is unknown; known are id, workflow, set, seed"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "says"), ROWS)
def test_a_row_that_cannot_be_used_is_named(row: str, says: str, tmp_path: Path) -> None:
    jobs = table(tmp_path, 0)
    jobs.path.write_text(row, encoding="utf-8")
    with pytest.raises(WorkflowError, match=says) as caught:
        list(jobs.jobs())
    assert "row" in str(caught.value) and "\x1b" not in str(caught.value)


LINES = [
    (b"{", "line 2: Expecting"),
    (b"5", "line 2: expected an object, got 5"),
    (b'{"job": 5, "status": "done", "inputs": "x", "attempts": 1}', "'job' is 5"),
    (b'{"job": "a", "status": "?", "inputs": "x", "attempts": 1}', "'status' is \"\\?\""),
    (b'{"job": "a", "status": "done", "inputs": [], "attempts": 1}', "'inputs' is \\[\\]"),
    (b'{"job": "a", "status": "done", "inputs": "x"}', "'attempts' is missing"),
    (b'{"job": "a", "status": "done", "inputs": "x", "attempts": "1"}', "'attempts' is \"1\""),
    (b'{"job": "a", "status": "done", "inputs": "x", "attempts": -1}', "'attempts' is -1"),
    (b'{"job": "a", "status": "done", "inputs": "x", "attempts": 1, "files": [5]}', "got 5"),
    (b'{"job": "a", "status": "done", "inputs": "x", "attempts": 1, "files": [{"name": "../x", '
     b'"sha256": ""}]}', "which is no name of one"),
    (b"[" * 100_000, "line 2: it is nested too deep"),
    (b"\xff\xfe", "line 2:"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "says"), LINES)
def test_a_wrong_line_of_a_manifest_is_named(line: bytes, says: str, tmp_path: Path) -> None:
    good = b'{"job": "a", "status": "done", "inputs": "x", "attempts": 1, "files": []}\n'
    (tmp_path / "manifest.jsonl").write_bytes(good + line + b"\n")
    with pytest.raises(AutomationError, match=says), opened(tmp_path):
        pass
    assert (tmp_path / "manifest.jsonl").read_bytes() == good + line + b"\n", "nothing is lost"


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes are POSIX'")
def test_a_manifest_that_is_a_link_or_a_pipe_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_bytes(b"mine")
    for name, make in (("link", lambda p: p.symlink_to(other)), ("pipe", os.mkfifo)):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "manifest.jsonl")
        with pytest.raises(AutomationError, match="no file of a batch"), opened(tmp_path / name):
            pass
    assert other.read_bytes() == b"mine"


def test_a_job_that_fails_everywhere_is_set_aside_after_all_servers_tried(tmp_path: Path) -> None:
    fakes = [FakeComfyUI({"/prompt": says({"error": {"message": f"no {n}"}}, 400)})
             for n in range(4)]  # fmt: skip
    with served(fakes[0]) as a, served(fakes[1]) as b, served(fakes[2]) as c, served(fakes[3]) as d:
        counts = drawn(table(tmp_path, 3), [a, b, c, d], tmp_path / "out")
    assert counts == {"done": 0, "set aside": 3}
    assert {entry["attempts"] for entry in entries(tmp_path / "out")} == {4}


def test_a_cancelled_or_failed_run_is_said_by_what_the_server_gives(tmp_path: Path) -> None:
    said = {"exception_message": "a\x1b[1mb\nc", "node_id": 1, "node_type": "Noise"}
    entry = {"status": {"status_str": "error", "messages": [["execution_error", said]]}}

    async def run(url: str) -> None:
        async with Client(url, patience=1) as server:
            await server.run(GRAPH)

    fake = FakeComfyUI({"/history/{id}": history(entry)})
    with served(fake) as url, pytest.raises(RunError) as caught:
        asyncio.run(run(url))
    assert str(caught.value).splitlines() == ["Noise (1): a\ufffd[1mb", "c"]
