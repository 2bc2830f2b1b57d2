"""Make a picture with SD3.5 in a real ComfyUI: python tools/demo.py

Gets what is missing, starts ComfyUI with this pack in it, runs the text-to-image workflow on the
small model that ships with the pack, saves the picture and says where.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import time
import webbrowser
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from automation import outside
from sd35_core.whole_file import write_new, write_whole
from sd35_core.words import printable
from tools import host, install

OUT = Path("sd35_demo.png")
ROOM = 16_000_000
"""Bytes of the disk that have to be free."""
WORKFLOW = host.PACK / "workflows" / "api" / "text_to_image.json"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", help="what the picture should show")
    parser.add_argument("--seed", type=int, help="the noise; random if not given")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="an API-format JSON")
    parser.add_argument("--host", help="an own ComfyUI: its folder, or the URL of a running one")
    parser.add_argument(
        "--out", type=Path, help=f"where to save (default: {OUT}, with a number if it is there)"
    )
    parser.add_argument("--replace", action="store_true", help="the file that --out names")
    parser.add_argument("--serve", action="store_true", help="leave the canvas open in a browser")
    options = parser.parse_args()
    if options.replace and options.out is None:
        parser.error("--replace needs --out, the file to replace")
    return options


def check_out(options: argparse.Namespace) -> None:
    """Say before anything is fetched or drawn why a picture couldn't be saved. Raises HostError."""
    out = options.out or OUT
    if options.out is not None and out.is_dir():
        raise host.HostError(f"{out} is a folder. --out takes the name of a picture's file.")
    if options.out is not None and os.path.lexists(out) and not options.replace:
        raise host.HostError(f"{out} is there already. Choose another --out, or add --replace.")
    folder = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise host.HostError(f"Nothing can be written into {folder}. Choose another --out.")
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        raise host.HostError(
            f"The disk of {folder} has {free / 1e6:.1f} MB free; {ROOM / 1e6:.0f} MB are needed. "
            "Make room, or choose another --out."
        )


def read_workflow(path: Path) -> dict[str, Any]:
    """An API-format workflow. Raises HostError for a canvas file or anything else."""
    try:
        prompt = outside.read(path)
    except (OSError, ValueError) as error:
        raise host.HostError(f"{path} can't be read as JSON: {error}") from error
    if isinstance(prompt, dict) and "nodes" in prompt:
        raise host.HostError(
            f"{path} is a canvas workflow. Export it for the API (menu File, Export (API)), or "
            "open it on the canvas itself."
        )
    nodes = list(prompt.values()) if isinstance(prompt, dict) else []
    if not nodes or not all(
        isinstance(n, dict) and "class_type" in n and isinstance(n.get("inputs"), dict)
        for n in nodes
    ):
        raise host.HostError(f"{path} is no API workflow: not all it holds is a node with inputs.")
    return prompt


def set_prompt(prompt: dict[str, Any], text: str) -> None:
    """Put `text` into the node that the sampler's `positive` input comes from. Raises HostError."""
    for name, node in prompt.items():
        link, seen = node["inputs"].get("positive"), {name}
        while isinstance(link, list):
            source = link[0] if link and isinstance(link[0], str) else None
            if source not in prompt:
                raise host.HostError(
                    f"In this workflow the prompt of node {printable(name, 60)} comes from "
                    f"{printable(link, 60)}, which is no node of it. Export it again."
                )
            if source in seen:
                raise host.HostError(
                    f"In this workflow the prompt of node {printable(name, 60)} goes in a circle "
                    f"at node {printable(source, 60)}. Connect a text to it and export it again."
                )
            seen.add(source)
            inputs = prompt[source]["inputs"]
            if "text" in inputs:
                inputs["text"] = text
                return
            link = inputs.get("positive", inputs.get("conditioning"))
    raise host.HostError("This workflow has no prompt that leads to a sampler's positive input.")


def set_seed(prompt: dict[str, Any], seed: int) -> None:
    for node in prompt.values():
        for name in ("seed", "noise_seed"):
            if name in node["inputs"]:
                node["inputs"][name] = seed


def bar(node: str, done: int, total: int) -> None:
    """A progress bar on one line of the terminal."""
    filled = min(30, max(0, 30 * done // max(1, total)))
    end = "\n" if done >= total else ""
    text = f"\r  [{'#' * filled}{'.' * (30 - filled)}] step {done} of {total}"
    print(text, end=end, file=sys.stderr, flush=True)


def make_picture(url: str, options: argparse.Namespace, prompt: dict[str, Any]) -> None:
    try:
        info = host.call(url, "/object_info")
    except OSError as error:
        raise host.HostError(f"No ComfyUI answers at {url}: {error}. Is it running?") from error
    if not isinstance(info, dict) or "SD35Loader" not in info:
        raise host.HostError(
            f"The ComfyUI at {url} does not have this pack. Install it there (README, Install) "
            "and start it again."
        )
    if options.prompt is not None:
        set_prompt(prompt, options.prompt)
    set_seed(prompt, random.getrandbits(48) if options.seed is None else options.seed)
    started = time.monotonic()
    history = host.run_prompt(url, prompt, bar)
    found = host.pictures(url, history)
    if not found:
        raise host.HostError(f"{options.workflow} ran but saved no picture; add a Save Image node.")
    seconds = time.monotonic() - started
    out = options.out
    if out is None:
        out = write_new(OUT, found[0])
    else:
        write_whole(out, found[0], replace=options.replace)
    print(f"Saved {out.absolute()} ({seconds:.0f} s)")


def serve(url: str) -> None:
    print(f"The canvas is at {url} (templates: {host.PACK_NAME}). Ctrl-C ends it.")
    webbrowser.open(url)
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        pass


def main() -> int:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        check_out(options)
        prompt = read_workflow(options.workflow)
        if options.host and options.host.startswith(("http://", "https://")):
            make_picture(options.host.rstrip("/"), options, prompt)
            return 0
        found = host.find_comfyui(options.host)
        if not host.started_again():
            return host.start_again(found.python, __file__)
        install.say(f"Starting ComfyUI {found.version} ...")
        with host.Server(found) as server:
            make_picture(server.url, options, prompt)
            if options.serve:
                serve(server.url)
    except (host.HostError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
