"""Make a picture with SD3.5 in a real ComfyUI: python tools/demo.py

Gets what is missing, starts ComfyUI with this pack in it, runs the text-to-image workflow on the
small model that ships with the pack, saves the picture and says where.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
import webbrowser
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import host

WORKFLOW = host.PACK / "workflows" / "api" / "text_to_image.json"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", help="what the picture should show")
    parser.add_argument("--seed", type=int, help="the noise; random if not given")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW, help="an API-format JSON")
    parser.add_argument("--host", help="an own ComfyUI: its folder, or the URL of a running one")
    parser.add_argument("--out", type=Path, default=Path("sd35_demo.png"), help="where to save")
    parser.add_argument("--serve", action="store_true", help="leave the canvas open in a browser")
    return parser.parse_args()


def read_workflow(path: Path) -> dict[str, Any]:
    """An API-format workflow. Raises HostError for a canvas file or anything else."""
    try:
        prompt = json.loads(path.read_text(encoding="utf-8"))
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
    """Put `text` into the node that the sampler's `positive` input comes from."""
    for node in prompt.values():
        link = node["inputs"].get("positive")
        while isinstance(link, list):
            source = prompt[link[0]]
            if "text" in source["inputs"]:
                source["inputs"]["text"] = text
                return
            link = source["inputs"].get("positive", source["inputs"].get("conditioning"))
    raise host.HostError("This workflow has no prompt that leads to a sampler's positive input.")


def set_seed(prompt: dict[str, Any], seed: int) -> None:
    for node in prompt.values():
        for name in ("seed", "noise_seed"):
            if name in node["inputs"]:
                node["inputs"][name] = seed


def bar(node: str, done: int, total: int) -> None:
    """A progress bar on one line of the terminal."""
    filled = round(30 * done / max(1, total))
    end = "\n" if done >= total else ""
    text = f"\r  [{'#' * filled}{'.' * (30 - filled)}] step {done} of {total}"
    print(text, end=end, file=sys.stderr, flush=True)


def make_picture(url: str, options: argparse.Namespace, prompt: dict[str, Any]) -> None:
    try:
        info = host.call(url, "/object_info")
    except OSError as error:
        raise host.HostError(f"No ComfyUI answers at {url}: {error}. Is it running?") from error
    if "SD35Loader" not in info:
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
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_name(options.out.name + ".partial")
    try:
        partial.write_bytes(found[0])
        partial.replace(options.out)
    finally:
        partial.unlink(missing_ok=True)
    print(f"Saved {options.out.resolve()} ({time.monotonic() - started:.0f} s)")


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
        prompt = read_workflow(options.workflow)
        if options.host and options.host.startswith(("http://", "https://")):
            make_picture(options.host.rstrip("/"), options, prompt)
            return 0
        found = host.find(options.host)
        if not host.started_again():
            return host.start_again(found.python, __file__)
        host.say(f"Starting ComfyUI {found.version} ...")
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
