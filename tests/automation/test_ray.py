"""Batches on a Ray cluster of this machine: the pictures of one server, whatever is killed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from automation.cluster import answers
from automation.manifest import opened
from automation.workflow import Workflow
from tools import host as hosts

from .batches import check_files, finished, lines, started

pytest.importorskip("ray", reason="Ray is not installed")
JOBS = 20
"""More than are done while hosts are killed."""


@pytest.fixture(scope="module")
def single(comfyui: hosts.Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Server]:
    """A server that computes with one thread, as each of Ray's workers does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with hosts.Server(comfyui, tmp_path_factory.mktemp("single"), ["--cpu"]) as server:
            yield server


@pytest.fixture
def table(tmp_path: Path, quick: Workflow) -> Path:
    """Jobs of two texts; every fourth has the inputs of the one before."""
    (tmp_path / "quick.json").write_text(json.dumps(quick), encoding="utf-8")
    rows = [
        {"seed": n - (n % 4 == 3), "set": {"Prompt.text": f"an owl {n // 2 % 2}"}}
        for n in range(JOBS)
    ]
    path = tmp_path / "jobs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def ray(comfyui: hosts.Host, table: Path, address: str = "local") -> list[str]:
    base = table.parent / "base"
    hosts.link_pack(base / "custom_nodes")
    return [
        *("--workflow", str(table.parent / "quick.json"), "--ray", address, "--workers", "2"),
        *("--comfyui", str(comfyui.folder), "--comfyui-args", f"--base-directory {base}"),
    ]


def wait(for_: Callable[[], bool], driver: subprocess.Popen[str] | None = None) -> None:
    end = time.monotonic() + 180
    while not for_():
        assert time.monotonic() < end
        assert driver is None or driver.poll() is None, driver.communicate()
        time.sleep(0.05)


def count(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (folder / "manifest.jsonl").read_bytes().count(b"\n")
    return 0


def comfyuis(base: Path) -> list[psutil.Process]:
    """Those that run with this base folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "main.py" in " ".join(command := process.cmdline()) and str(base) in command:
                found.append(process)
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
def test_each_job_is_done_once_whatever_is_killed(
    comfyui: hosts.Host, single: hosts.Server, table: Path
) -> None:
    base, folder = table.parent / "base", table.parent / "out"
    options = ray(comfyui, table)
    driver = started(table, *options)
    wait(lambda: count(folder) >= 2, driver)
    host, other = comfyuis(base)
    host.kill()
    seen = count(folder)
    wait(lambda: count(folder) >= seen + 2, driver)
    actor = psutil.Process(other.ppid())
    assert "Host" in actor.cmdline()[0]
    actor.kill()
    wait(lambda: not other.is_running())  # it ends by itself
    seen = count(folder)
    wait(lambda: count(folder) >= seen + 2, driver)
    assert driver.poll() is None and count(folder) < JOBS
    driver.kill()
    driver.communicate()
    wait(lambda: not comfyuis(base))
    done = count(folder)
    code, out, error = finished(started(table, *options))
    assert code == 0 and f"{JOBS - done} done, 0 set aside" in out, error
    assert Counter(entry["job"] for entry in lines(folder)) == Counter(
        f"{n:06d}" for n in range(1, JOBS + 1)
    )
    assert {entry["host"].split(" on ")[0] for entry in lines(folder)} == {"ray:1", "ray:2"}
    check_files(folder)
    wait(lambda: not comfyuis(base))

    alone = table.parent / "alone"
    code, _, error = finished(
        started(table, "--server", single.url, *options[:2], "--out", str(alone))
    )
    assert code == 0, error
    for path in sorted(alone.glob("*.png")):
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    assert len(list(alone.glob("*.png"))) == JOBS


@pytest.mark.skipif(sys.platform == "win32", reason="ray start --block is POSIX'")
def test_a_cluster_that_runs_is_joined_goes_on_running_and_writes_to_a_place_of_fsspecs(
    comfyui: hosts.Host, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One on 127.0.0.1 alone and with a token; Ray has to be told both on both sides."""
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)
    table.write_text("\n".join(table.read_text("utf-8").splitlines()[:2]), encoding="utf-8")
    address = f"127.0.0.1:{hosts.free_port()}"
    head = subprocess.Popen(
        [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
            *("--node-ip-address", "127.0.0.1", "--port", address.split(":")[1]),
            *("--include-dashboard", "false", "--disable-usage-stats"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait(lambda: answers(int(address.split(":")[1])))
        for name in (address, "auto"):
            own = name.replace(":", "-")
            out, place = tmp_path / f"out-{own}", tmp_path / f"place-{own}"
            command = [*ray(comfyui, table, name), "--out", str(out), "--pictures", place.as_uri()]
            code, said, error = finished(started(table, *command))
            assert code == 0 and "2 done, 0 set aside" in said, error
            assert len(list(place.glob("*.png"))) == 2 and not list(out.glob("*.png"))
        assert "0 done" in finished(started(table, *command))[1]
        assert head.poll() is None
        wait(lambda: not comfyuis(tmp_path / "base"))
    finally:
        head.terminate()
        head.wait(60)


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "nowhere.invalid:6379", "x", "auto"])
def test_a_wrong_address_is_said(comfyui: hosts.Host, table: Path, address: str) -> None:
    start = time.monotonic()
    wrong = address.format(hosts.free_port())
    code, _, error = finished(started(table, *ray(comfyui, table, wrong)))
    assert code == 1 and f"at {wrong}" in error and "Ray cluster" in error
    assert time.monotonic() - start < 60


def test_a_wrong_folder_of_comfyui_is_said(comfyui: hosts.Host, table: Path) -> None:
    options = ray(comfyui, table)
    options[options.index("--comfyui") + 1] = str(table.parent)
    code, _, error = finished(started(table, *options))
    assert code == 1 and "there is no ComfyUI at" in error and "--comfyui names" in error
    with opened(table.parent / "out") as manifest:
        assert not manifest.seen
    assert not os.path.exists(table.parent / "out" / "manifest.jsonl")  # noqa: PTH110
