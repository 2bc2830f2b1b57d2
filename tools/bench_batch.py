"""Batches against each other, with the model that ships with the pack.

    python tools/bench_batch.py [--jobs 300] [--steps 8] [--keep FOLDER]
    python tools/bench_batch.py --planned 20000

In one run: the same jobs on one server, on one Ray worker and on two, each with one thread; whether
the pictures are the same bytes; and jobs of two models and some texts in random order, one after
the other as they come and grouped by what they load. With --planned: how soon a batch of so many
jobs queues its first one on a server, and the driver's memory in the 90 s after that.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd35_core.whole_file import write_text
from tools import host as hosts

WORKFLOW = hosts.PACK / "workflows" / "api" / "text_to_image.json"
TEXTS = ["a big owl", "two foxes", "three lemons on a blue background", "a small red car"]
MODEL = hosts.PACK / "models" / "nano" / "sd35_nano.safetensors"


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "jobs.jsonl"
    write_text(path, "\n".join(json.dumps(row) for row in rows), replace=True)
    return path


def entries(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "manifest.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def drawing_seconds(folder: Path) -> float:
    """From the first job's start to the last one's end; servers are up before."""
    found = entries(folder)
    return max(e["started"] + e["seconds"] for e in found) - min(e["started"] for e in found)


def pictures(folder: Path) -> dict[str, str]:
    return {e["job"]: e["files"][0]["sha256"] for e in entries(folder)}


def measure(options: argparse.Namespace, found: hosts.Host, folder: Path) -> None:
    from automation import batch, cluster, waiting
    from automation.client import Client
    from automation.jobs import Table

    base = folder / "base"
    hosts.link_pack(base / "custom_nodes")
    rows = [
        {"set": {"Prompt.text": TEXTS[n % len(TEXTS)], "SD35Sampler.steps": options.steps},
         "seed": n}
        for n in range(options.jobs)
    ]  # fmt: skip
    table = Table(written(folder, rows), WORKFLOW)

    def report(name: str, out: Path, start: float) -> float:
        drawing, whole = drawing_seconds(out), time.monotonic() - start
        print(f"{name}: {drawing:.1f} s drawing, {whole:.1f} s in all")
        return drawing

    def by_ray(workers: int) -> float:
        start, out = time.monotonic(), folder / f"ray{workers}"
        slots = cluster.Slots(str(found.folder), ("--base-directory", str(base)), workers)
        with cluster.joined("local", slots, patience=300) as joined:
            asyncio.run(batch.run(table, joined, out))
        return report(f"{options.jobs} jobs, Ray, {workers} worker(s)", out, start)

    def by_server(name: str, jobs: Table, url: str) -> float:
        start = time.monotonic()
        asyncio.run(batch.run(jobs, [Client(url)], folder / name))
        return report(f"{name}", folder / name, start)

    two, one = by_ray(2), by_ray(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with hosts.Server(found, folder / "server", ["--cpu"]) as server:
        by_server("one server", table, server.url)
    same = pictures(folder / "ray2") == pictures(folder / "ray1") == pictures(folder / "one server")
    print(f"two workers are {one / two:.2f} times as fast as one; same bytes: {same}")

    models = folder / "grouping" / "models" / "checkpoints"
    models.mkdir(parents=True)
    for name in ("one.safetensors", "two.safetensors"):
        shutil.copy(MODEL, models / name)
    chosen = itertools.product(["one", "two"], TEXTS, range(options.jobs // 8))
    rows = [
        {"set": {"SD35Loader.model": f"{model}.safetensors", "Prompt.text": text,
                 "SD35Sampler.steps": options.steps}, "seed": seed}
        for model, text, seed in chosen
    ]  # fmt: skip
    random.Random(0).shuffle(rows)
    table = Table(written(folder / "grouping", rows), WORKFLOW)
    with hosts.Server(found, folder / "grouping", ["--cpu"]) as server:
        grouped = by_server("grouped", table, server.url)
    waiting.WINDOW = 1
    with hosts.Server(found, folder / "grouping", ["--cpu"]) as server:
        as_they_come = by_server("as they come", table, server.url)
    print(f"grouped takes {grouped / as_they_come:.2f} of the time of jobs as they come")


def plan(found: hosts.Host, jobs: int, folder: Path) -> None:
    import psutil

    rows = [{"set": {"Prompt.text": f"{TEXTS[n % 4]} {n // 4}"}, "seed": n} for n in range(jobs)]
    table, out = written(folder, rows), folder / "out"
    with hosts.Server(found, folder / "server", ["--cpu"]) as server:
        command = [sys.executable, "-m", "automation", "batch", table, "--workflow", WORKFLOW]
        command += ["--server", server.url, "--out", out]
        start = time.monotonic()
        driver = subprocess.Popen([str(part) for part in command], cwd=hosts.PACK)
        queue = hosts.call(server.url, "/queue")
        while not queue["queue_running"] and not queue["queue_pending"]:
            time.sleep(0.02)
            queue = hosts.call(server.url, "/queue")
        print(f"{jobs} jobs: the first was queued after {time.monotonic() - start:.2f} s")
        held = []
        for _ in range(10):
            held.append(round(psutil.Process(driver.pid).memory_info().rss / 2**20))
            time.sleep(9)
        driver.kill()
        driver.wait()
    print(f"the driver held {held} MB; {len(entries(out))} were done")


def main() -> int:
    found = hosts.find_comfyui()
    if not hosts.started_again():
        return hosts.start_again(found.python, __file__)
    parser = argparse.ArgumentParser(description="Time batches.")
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--planned", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for pictures and manifests")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        if options.planned:
            plan(found, options.planned, folder)
        else:
            measure(options, found, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
