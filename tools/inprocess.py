"""ComfyUI imported into this process, and the pack as ComfyUI imports it."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tools import host

PACKAGE = "sd35_pack"


def import_pack(found: host.Host, base: Path, cpu: bool = True) -> ModuleType:
    """The pack as the package `sd35_pack`, its nodes loaded; `base` is ComfyUI's base directory.

    ComfyUI's own modules, `comfy` and the rest, can be imported afterwards. Once per process.
    """
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    host.link_pack(base / "custom_nodes")
    sys.path.insert(0, str(found.folder))
    options = importlib.import_module("comfy.options")
    options.enable_args_parsing()
    device = ["--cpu"] if cpu else []
    arguments, sys.argv = sys.argv, ["main.py", *device, "--base-directory", str(base)]
    try:
        importlib.import_module("comfy.cli_args")
    finally:
        sys.argv = arguments
    importlib.import_module("utils.extra_config")  # as main.py does, before comfy/utils.py hides it
    root = base / "custom_nodes" / host.PACK_NAME
    spec = importlib.util.spec_from_file_location(
        PACKAGE, root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)
    asyncio.run(package.comfy_entrypoint())
    return package
