"""Batches: every job once, whatever is killed; what is missing and nothing else is done again."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from automation.client import Client
from automation.errors import AutomationError, WorkflowError
from automation.jobs import Job, Table
from automation.manifest import opened
from automation.waiting import Waiting
from automation.workflow import Workflow, overridden
from tools import host as hosts

from .batches import JOBS, check_files, finished, lines, started


def test_a_driver_killed_in_mid_batch_goes_on_and_draws_nothing_twice(
    server: hosts.Server, table: Path, quick: Workflow
) -> None:
    folder = table.parent / "out"
    before = len(hosts.call(server.url, "/history"))
    driver = started(table, "--server", server.url)
    while not (folder / "manifest.jsonl").exists() or len(lines(folder)) < 2:
        assert driver.poll() is None
        time.sleep(0.02)
    driver.kill()
    driver.communicate()
    with (folder / "manifest.jsonl").open("ab") as file:
        file.write(b'{"job": "0000')  # as if it had been killed while it wrote
    done = len(lines_whole(folder))
    assert done < JOBS
    code, out, _ = finished(started(table, "--server", server.url))
    assert code == 0 and f"{JOBS - done} done, 0 set aside" in out
    assert Counter(entry["job"] for entry in lines(folder)) == Counter(
        f"{n:06d}" for n in range(1, JOBS + 1)
    )
    check_files(folder)
    assert len(hosts.call(server.url, "/history")) - before == JOBS, "each was queued once"
    assert finished(started(table, "--server", server.url))[1].startswith("0 done")

    async def alone() -> bytes:
        async with Client(server.url) as client:
            prompt = overridden(quick, {"Prompt.text": "a big owl 1", "SD35Sampler.seed": 3})
            return await client.fetch((await client.run(prompt)).files[0])

    assert asyncio.run(alone()) == (folder / "000004.png").read_bytes()


def lines_whole(folder: Path) -> list[bytes]:
    return (folder / "manifest.jsonl").read_bytes().split(b"\n")[:-1]


def test_a_job_that_fails_is_set_aside_and_the_rest_goes_on(
    server: hosts.Server, table: Path
) -> None:
    rows = [json.loads(line) for line in table.read_text("utf-8").splitlines()][:3]
    rows[1]["set"]["EmptySD3LatentImage.width"] = 8192
    table.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    code, out, _ = finished(started(table, "--server", server.url))
    assert code == 0 and "2 done, 1 set aside" in out
    aside = next(entry for entry in lines(table.parent / "out") if entry["status"] == "set aside")
    assert (
        aside["job"] == "000002" and aside["attempts"] == 3 and "position table" in aside["error"]
    )
    assert "0 done, 0 set aside" in finished(started(table, "--server", server.url))[1]
    (table.parent / "out" / "000001.png").unlink()
    assert "1 done, 0 set aside" in finished(started(table, "--server", server.url))[1]
    check_files(table.parent / "out")


def test_what_cannot_go_on_says_why_and_keeps_what_is_done(
    server: hosts.Server, table: Path
) -> None:
    folder = table.parent / "out"
    nowhere = f"http://127.0.0.1:{hosts.free_port()}"
    with opened(folder):
        code, _, error = finished(started(table, "--server", server.url))
        assert code == 1 and "Another batch is writing" in error
    rows = [json.loads(line) for line in table.read_text("utf-8").splitlines()]
    rows[5]["set"] = {"Promt.text": "x"}
    table.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    code, _, error = finished(started(table, "--server", server.url))
    assert code == 1 and "row 6: 'Promt.text': no node is called 'Promt'" in error
    code, _, error = finished(started(table, "--server", nowhere, "--patience", "1"))
    assert code == 1 and "No ComfyUI answers" in error


def test_a_server_without_the_pack_is_named_and_the_others_do_the_jobs(
    comfyui: hosts.Host, server: hosts.Server, table: Path
) -> None:
    with hosts.Server(comfyui, table.parent, ["--cpu", "--disable-all-custom-nodes"]) as bare:
        code, _, error = finished(started(table, "--server", bare.url))
        assert code == 1 and f"{bare.url} has no node SD35Loader" in error
        assert not (table.parent / "out" / "manifest.jsonl").exists()
        both = "--server", bare.url, "--server", server.url
        code, out, error = finished(started(table, *both))
        assert code == 0 and f"{JOBS} done, 0 set aside" in out and "has no node" in error
    check_files(table.parent / "out")


@pytest.mark.skipif(sys.platform == "win32", reason="limits are POSIX'")
def test_a_full_disk_says_so_and_the_next_run_does_the_rest(
    server: hosts.Server, table: Path
) -> None:
    import resource

    folder = table.parent / "out"
    small = 10_000  # bytes; a picture has 20,000

    def shrink() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (small, resource.RLIM_INFINITY))

    code, _, error = finished(started(table, "--server", server.url, before=shrink))
    assert code == 1 and "could not be written" in error and "Make room on the disk" in error
    assert not [path for path in folder.glob("*") if path.suffix in (".png", ".partial")]
    code, out, _ = finished(started(table, "--server", server.url))
    assert code == 0 and f"{JOBS} done, 0 set aside" in out
    check_files(folder)


def test_what_was_set_aside_is_tried_again_when_asked(
    server: hosts.Server, table: Path, quick: Workflow
) -> None:
    """The server still has the failed prompts; they are not taken for the new ones."""
    quick["8"] = {"class_type": "LoadImage", "inputs": {"image": "late.png"}, "_meta": {}}
    quick["9"] = {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}, "_meta": {}}
    table.write_text(json.dumps({"workflow": quick, "id": "late"}), encoding="utf-8")
    picture = server.base / "input" / "late.png"
    picture.unlink(missing_ok=True)
    assert "0 done, 1 set aside" in finished(started(table, "--server", server.url))[1]
    shutil.copy(server.base / "input" / "example.png", picture)
    assert "0 done, 0 set aside" in finished(started(table, "--server", server.url))[1]
    assert "1 done, 0 set aside" in finished(started(table, "--server", server.url, "--again"))[1]
    entry = lines(table.parent / "out")[-1]
    assert entry["attempts"] == 4 and len(entry["files"]) == 2


def test_jobs_are_sorted_by_what_they_load_and_nobody_idles(
    tmp_path: Path, quick: Workflow
) -> None:
    (tmp_path / "quick.json").write_text(json.dumps(quick), encoding="utf-8")
    rows = [
        {"set": {"SD35Loader.model": f"{n % 2}.safetensors", "Prompt.text": f"text {n // 2 % 3}"},
         "seed": n}
        for n in range(60)
    ]  # fmt: skip
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with opened(tmp_path / "out") as manifest:
        jobs = Table(tmp_path / "jobs.jsonl", tmp_path / "quick.json").jobs()
        waiting = Waiting(jobs, manifest, again=False)
        drawn: dict[str, list[Job]] = {"a": [], "b": []}
        for server, queue in list(drawn.items()) * 20:
            job = waiting.next(server)
            assert job is not None
            queue.append(job)
        for queue in drawn.values():
            assert len({job.group()[0] for job in queue}) == 1, "one model each"
            texts = [job.group()[1] for job in queue]
            assert sum(a != b for a, b in zip(texts, texts[1:])) == 1, "10 of each text"
        while (job := waiting.next("b")) is not None:
            drawn["b"].append(job)
        assert len({job.id for queue in drawn.values() for job in queue}) == 60, "a's rest as well"
        assert not waiting.left()


def test_rows_of_a_csv_and_seeds_multiply(tmp_path: Path, quick: Workflow) -> None:
    template = tmp_path / "quick.json"
    template.write_text(json.dumps(quick), encoding="utf-8")
    rows = "id,Prompt.text,SD35Sampler.cfg,mood\nowl,a big owl,3.5,calm\nfox,Füchse 狐,,\n"
    (tmp_path / "rows.csv").write_text(rows, encoding="utf-8")
    jobs = list(Table(tmp_path / "rows.csv", template, (1, 2)).jobs())
    assert [job.id for job in jobs] == ["owl-1", "owl-2", "fox-1", "fox-2"]
    assert jobs[0].tags == {"mood": "calm"} and jobs[1].seed == 2
    texts = [job.workflow["2"]["inputs"]["text"] for job in jobs]
    assert texts == ["a big owl"] * 2 + ["Füchse 狐"] * 2
    assert len({job.inputs() for job in jobs}) == 4


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "row 1 is no JSON"),
        ("[]", "row 1 is no object"),
        ('{"set": {}}', "row 1: no workflow"),
        ('{"workflow": "gone.json"}', "row 1: .*gone.json can't be read"),
        ('{"prompt": 5}', "row 1: prompt is unknown"),
        ('{"workflow": "quick.json", "id": "../x"}', "can't name files"),
        ('{"workflow": "quick.json", "id": "x"}\n{"workflow": "quick.json", "id": "x"}', "twice"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    tmp_path: Path, quick: Workflow, row: str, says: str
) -> None:
    (tmp_path / "quick.json").write_text(json.dumps(quick), encoding="utf-8")
    (tmp_path / "jobs.jsonl").write_text(row, encoding="utf-8")
    with pytest.raises((AutomationError, WorkflowError), match=says):
        list(Table(tmp_path / "jobs.jsonl").jobs())
