"""Where a Chromium is, for the tests of the canvas."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")


def find_browser() -> str | None:
    """SD35_CHROMIUM, else one on PATH, else one where Windows or macOS installs it."""
    named = os.environ.get("SD35_CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None) or installed()


def installed() -> str | None:
    """Chrome or Edge in its usual place, which is not on PATH on these systems."""
    places: list[Path] = []
    if sys.platform == "win32":
        for variable in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA"):
            root = os.environ.get(variable)
            if root:
                places.append(Path(root, "Google", "Chrome", "Application", "chrome.exe"))
                places.append(Path(root, "Microsoft", "Edge", "Application", "msedge.exe"))
    elif sys.platform == "darwin":
        for name in ("Google Chrome", "Chromium", "Microsoft Edge"):
            places.append(Path("/Applications", f"{name}.app", "Contents", "MacOS", name))
    return next((str(place) for place in places if place.is_file()), None)
