"""A batch on many workers that only wait: what the driver itself can carry.

    python tools/simulate_cluster.py MANIFEST.jsonl [--workers 1000] [--jobs 20000] [--scale 1]

The driver is the real one: table, grouping, manifest on the disk, pictures written where it would
write them. A worker stands for a ComfyUI on a Ray cluster: it starts in --start seconds, draws a
job in a time taken at random from those in the manifest of a real batch, times --scale, and ends
without notice once in --ends jobs, which starts it anew. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd35_core.whole_file import write_text
from tools import host as hosts

WORKFLOW = hosts.PACK / "workflows" / "api" / "text_to_image.json"


@dataclass
class Tally:
    """What happened, of all workers."""

    busy: float = 0.0
    ended: int = 0
    first: float | None = None
    times: list[float] = field(default_factory=list)


class Simulated:
    """What batch.Server asks for, by waiting. One prompt at a time is drawn, as ComfyUI does."""

    def __init__(self, number: int, options: argparse.Namespace, tally: Tally):
        self.url = self.host = f"simulated:{number}"
        self.kind = "simulated"
        self.options, self.tally = options, tally
        self.chance = random.Random(number)
        self.drawing = asyncio.Lock()

    async def __aenter__(self) -> Simulated:
        return self

    async def __aexit__(self, *error: Any) -> None:
        pass

    async def known(self) -> set[str]:
        return set()

    async def about(self) -> dict[str, Any]:
        await asyncio.sleep(self.options.start * self.chance.uniform(0.8, 1.2))
        return {"system": {"comfyui_version": "simulated", "pytorch_version": ""}}

    async def run(self, workflow: Any, *, prompt_id: str) -> Any:
        from automation.answers import File, Result

        async with self.drawing:
            self.tally.first = self.tally.first or time.monotonic()
            while True:
                seconds = self.chance.choice(self.tally.times)
                if self.chance.random() >= 1 / self.options.ends:
                    break
                self.tally.ended += 1
                await asyncio.sleep(seconds / 2 + self.options.start)
            await asyncio.sleep(seconds)
            self.tally.busy += seconds
        return Result(prompt_id, [File("1", "picture.png", "", "output")], {}, seconds)

    async def save(self, file: Any, place: Any, name: str) -> str:
        if self.options.pictures == "remote":
            return ""
        return await asyncio.to_thread(place.write, name, os.urandom(self.options.bytes))


def simulate(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import psutil

    from automation import batch
    from automation.jobs import Table

    lines = options.manifest.read_text(encoding="utf-8").splitlines()
    times = [float(json.loads(line)["drawing"]) for line in lines]
    times = [options.scale * seconds for seconds in times]
    tally = Tally(times=times)
    rows = (
        json.dumps({"set": {"Prompt.text": f"picture of {n // 4}"}, "seed": n})
        for n in range(options.jobs)
    )
    table = folder / "jobs.jsonl"
    write_text(table, "\n".join(rows), replace=True)
    process, held = psutil.Process(), []

    async def driver() -> None:
        workers = [Simulated(number, options, tally) for number in range(options.workers)]
        await batch.run(
            Table(table, WORKFLOW), workers, folder / "out",
            done=lambda status: held.append(process.memory_info().rss / 2**20),
        )  # fmt: skip

    start = time.monotonic()
    processor = time.process_time()
    asyncio.run(driver())
    wall = time.monotonic() - start
    return {
        "workers": options.workers,
        "jobs": options.jobs,
        "seconds a job": round(sum(times) / len(times), 3),
        "seconds in all": round(wall, 1),
        "jobs a second": round(options.jobs / wall, 1),
        "workers busy": round(tally.busy / (wall * options.workers), 3),
        "of that, had starts cost nothing": round(
            tally.busy / ((wall - options.start) * options.workers), 3
        ),
        "workers ended": tally.ended,
        "first job after": round((tally.first or start) - start, 2),
        "driver, share of a CPU": round((time.process_time() - processor) / wall, 2),
        "driver, MB": [round(held[int(i * (len(held) - 1) / 4)]) for i in range(5)],
        "manifest, MB": round((folder / "out" / "manifest.jsonl").stat().st_size / 1e6, 2),
    }


def main() -> int:
    found = hosts.find_comfyui()
    if not hosts.started_again():
        return hosts.start_again(found.python, __file__)
    parser = argparse.ArgumentParser(description="What the driver of a batch can carry.")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=20000)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--start", type=float, default=10.0)
    parser.add_argument("--ends", type=float, default=float("inf"))
    parser.add_argument("--pictures", choices=("remote", "driver"), default="remote")
    parser.add_argument("--bytes", type=int, default=1_500_000)
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(simulate(parser.parse_args(), Path(temporary)), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
