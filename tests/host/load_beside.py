"""A program for test_neighbours: load the pack as the host does; print what changed elsewhere.

    python load_beside.py HOST BASE PACK

Prints JSON: {"changed": what differs in the host and in Python, "seconds": time of the import}.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import time
import warnings
from typing import Any

host, base, pack = sys.argv[1:]
sys.path.insert(0, host)
sys.argv = ["main.py", "--cpu", "--base-directory", base]

import comfy.options

comfy.options.enable_args_parsing()

import comfy.cli_args
import utils.extra_config  # noqa: F401 - as main.py does, before comfy/utils.py hides it

import comfy.controlnet
import comfy.quant_ops
import comfy.sd
import comfy_config.config_parser  # noqa: F401 - which the host imports with its first pack
import execution  # noqa: F401
import folder_paths
import latent_preview  # noqa: F401
import server
import torch

import nodes

OWN = {
    "nodes.NODE_CLASS_MAPPINGS",
    "nodes.NODE_DISPLAY_NAME_MAPPINGS",
    "nodes.EXTENSION_WEB_DIRS",
    "nodes.LOADED_MODULE_DIRS",
    "folder_paths.filename_list_cache",
}
"""Where a pack's nodes and its web folder belong, and the host's own cache of its file lists."""


def contents(value: Any) -> Any:
    """What a change would show in: the entries of containers, the identity of all else."""
    if isinstance(value, dict):
        return {str(key): contents(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [contents(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(entry) for entry in value)
    if isinstance(value, (int, float, str, bool, type(None))):
        return value
    return id(value)


def state(modules: set[str] | None = None) -> dict[str, Any]:
    """Every name in the host's modules and their classes, and the settings of Python and torch.

    With `modules` only of those.
    """
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if not file.startswith(host) or (modules is not None and name not in modules):
            continue
        for key, value in list(vars(module).items()):
            place = f"{name}.{key}"
            if key.startswith("__") or place in OWN:
                continue
            found[place] = id(value) if isinstance(value, type(sys)) else contents(value)
            if isinstance(value, type) and value.__module__ == name:
                for attribute, entry in list(vars(value).items()):
                    if not attribute.startswith(("__", "_abc")):
                        found[f"{place}.{attribute}"] = contents(entry)
    return found | {
        "sys.path": list(sys.path),
        "sys.meta_path": contents(sys.meta_path),
        "sys.hooks": [id(sys.excepthook), id(sys.displayhook), id(sys.stdout), id(sys.stderr)],
        "warnings": contents(warnings.filters),
        "logging": [logging.root.level, contents(logging.root.handlers), id(logging.getLogger)],
        "signals": {str(s): contents(signal.getsignal(s)) for s in signal.valid_signals()},
        "torch.dtype": str(torch.get_default_dtype()),
        "torch.threads": torch.get_num_threads(),
        "torch.grad": torch.is_grad_enabled(),
        "torch.deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch.cudnn": torch.backends.cudnn.benchmark,
        "torch.seed": torch.initial_seed(),
        "torch.functions": {k: id(v) for k, v in vars(torch).items() if callable(v)},
        "torch.nn.functional": {k: id(v) for k, v in vars(torch.nn.functional).items()},
        "torch.nn": {k: id(v) for k, v in vars(torch.nn).items()},
        "layouts": sorted(layouts()),
    }


def layouts() -> list[str]:
    """Names of the quantized layouts that are registered."""
    from comfy_kitchen.tensor import base as kitchen

    return [str(name) for name in getattr(kitchen, "_LAYOUT_REGISTRY", {})]


def differences(before: Any, after: Any, place: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [
            found
            for key in keys
            for found in differences(before.get(key, "-"), after.get(key, "-"), f"{place}/{key}")
        ]
    return [] if before == after else [f"{place}: {before!r:.80} -> {after!r:.80}"]


async def load() -> dict[str, Any]:
    instance = server.PromptServer(asyncio.get_running_loop())
    routes = len(instance.routes)
    before, modules = state(), set(sys.modules)
    start = time.perf_counter()
    loaded = await nodes.load_custom_node(pack)
    seconds = time.perf_counter() - start
    changed = differences(before, state(modules))
    return {
        "loaded": loaded,
        "changed": changed,
        "folders": sorted(folder_paths.folder_names_and_paths),
        "routes": [route.path for route in list(instance.routes)[routes:]],
        "seconds": round(seconds, 3),
    }


print(json.dumps(asyncio.run(load()), indent=1))
