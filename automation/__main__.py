"""python -m automation: run ComfyUI workflows from the command line."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from sd35_core.words import printable

from . import batch, cluster, files, workflow
from .client import Client, Step
from .errors import AutomationError, ServerError
from .jobs import Table
from .limits import LARGEST_FILE
from .manifest import ASIDE, DONE
from .outside import is_safe_name, shown

SERVER = "http://127.0.0.1:8188"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python -m automation", description=(__doc__ or "").strip())
    commands = made.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run one API workflow and save what it makes")
    run.add_argument("workflow", type=Path, help="a JSON file in API format")
    run.add_argument("--server", default=SERVER, help=f"a running ComfyUI (default: {SERVER})")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.WIDGET=VALUE",
        help='set a widget: of a node by its title, class or id, as in "Prompt.text=an owl"',
    )
    run.add_argument(
        "--out", type=Path, default=Path(), help="folder for the files (default: here)"
    )
    many = commands.add_parser("batch", help="run many jobs; again, it does what is missing")
    many.add_argument("jobs", type=Path, help="a JSONL or CSV file, a job each row")
    many.add_argument("--workflow", type=Path, help="the template of rows that name none")
    many.add_argument("--seeds", default="", help="run every row with each of these, as in 1,2,3")
    many.add_argument(
        "--server", action="append", help=f"a running ComfyUI; repeatable (default: {SERVER})"
    )
    many.add_argument("--out", type=Path, required=True, help="folder of pictures and manifest")
    many.add_argument("--pictures", default="", help="where they go instead, as s3://bucket/name")
    many.add_argument(
        "--ray", metavar="ADDRESS", help="start servers on a Ray cluster: HOST:PORT, auto or local"
    )
    many.add_argument(
        "--comfyui", default=os.environ.get("COMFYUI_PATH"), help="ComfyUI's folder on its nodes"
    )
    many.add_argument("--workers", type=int, default=0, help="how many (default: one a GPU or CPU)")
    many.add_argument("--cpus", type=int, default=1, help="CPUs, and threads, of each (default: 1)")
    many.add_argument(
        "--comfyui-args", default="", help='further arguments of ComfyUI, as in "--lowvram"'
    )
    many.add_argument(
        "--patience", type=float, default=120, help="seconds a server may be away (default: 120)"
    )
    many.add_argument("--again", action="store_true", help="also what was set aside before")
    for command in (run, many):
        command.add_argument(
            "--largest",
            type=int,
            default=LARGEST_FILE // 10**6,
            metavar="MB",
            help="of one file that is fetched (default: %(default)s)",
        )
    return made


def overrides(given: list[str]) -> dict[str, str]:
    """{"Prompt.text": "an owl"} from "Prompt.text=an owl". Raises WorkflowError."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise workflow.WorkflowError(f"'{text}' sets nothing: write NODE.WIDGET=VALUE.")
        found[name] = value
    return found


@contextlib.contextmanager
def progress(prompt: workflow.Workflow) -> Iterator[Callable[[Step], None]]:
    """A progress bar; where tqdm is not installed, none."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda step: None
        return
    with tqdm(file=sys.stderr, leave=False) as bar:

        def show(step: Step) -> None:
            bar.set_description(workflow.title(prompt[step.node]) if step.node in prompt else "")
            bar.total, bar.n = step.total, step.done
            bar.refresh()

        yield show


async def run(options: argparse.Namespace) -> None:
    prompt = workflow.overridden(workflow.read(options.workflow), overrides(options.set))
    async with Client(options.server, largest=options.largest * 10**6) as client:
        with progress(prompt) as show:
            result = await client.run(prompt, show)
        for file in result.files:
            if not is_safe_name(file.filename):
                raise ServerError(
                    f"{client.url} names a file {shown(file.filename)}, which not every system can "
                    "keep. Set another filename_prefix in the workflow."
                )
            data = await client.fetch(file)
            print(await asyncio.to_thread(files.write_new, options.out / file.filename, data))
        for node, texts in result.texts.items():
            name = printable(workflow.title(prompt[node]) if node in prompt else node)
            for text in texts:
                print(f"{name}: " + "\n".join(map(printable, text.splitlines())))


async def run_batch(options: argparse.Namespace) -> None:
    try:
        seeds = tuple(int(seed) for seed in options.seeds.split(",") if seed.strip())
    except ValueError as error:
        raise AutomationError(f"--seeds takes whole numbers, as in 1,2,3: {error}.") from error
    table = Table(options.jobs, options.workflow, seeds)
    urls = list(dict.fromkeys(options.server or ([] if options.ray else [SERVER])))
    with contextlib.ExitStack() as stack:
        servers: list[batch.Server] = [
            Client(url, options.patience, options.largest * 10**6) for url in urls
        ]
        total = table.count()
        if options.ray:
            servers += stack.enter_context(workers(options))
        count = stack.enter_context(counted(total))
        counts = await batch.run(
            table, servers, options.out, options.again, count, options.pictures
        )
    print(f"{counts[DONE]} done, {counts[ASIDE]} set aside; {options.out / 'manifest.jsonl'}")


def workers(options: argparse.Namespace) -> contextlib.AbstractContextManager[list[cluster.Worker]]:
    """ComfyUIs on a Ray cluster, as the options say."""
    if not options.comfyui:
        raise AutomationError("--ray needs --comfyui: ComfyUI's folder on the cluster's nodes.")
    if options.workers < 0 or options.cpus < 1:
        raise AutomationError(
            f"--workers has to be 0 or more and --cpus 1 or more; got {options.workers} and "
            f"{options.cpus}."
        )
    arguments = tuple(shlex.split(options.comfyui_args))
    slots = cluster.Slots(options.comfyui, arguments, options.workers, options.cpus)
    return cluster.joined(options.ray, slots, options.patience)


@contextlib.contextmanager
def counted(total: int) -> Iterator[Callable[[str], None]]:
    """A bar over jobs; where tqdm is not installed, none."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda status: None
        return
    with tqdm(total=total, file=sys.stderr, unit="job") as bar:

        def count(status: str) -> None:
            bar.update()

        yield count


def main() -> int:
    options = parser().parse_args()
    command = {"run": run, "batch": run_batch}[options.command]
    try:
        asyncio.run(command(options))
    except AutomationError as error:
        print(f"automation: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
