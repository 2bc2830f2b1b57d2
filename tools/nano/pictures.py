"""Pictures to learn from: npm packages, fetched once, checked, unpacked into the cache outside the
checkout."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
import urllib.request
from pathlib import Path

from tools.install import HostError, cache_root, locked, say

LARGEST = 2**26
"""Bytes that are read of a package."""


def package(url: str, sha256: str, suffix: str) -> Path:
    """The folder with a package's files that end so; downloads it the first time.

    Raises HostError when it can't be had or is not what it was.
    """
    folder = cache_root() / url.rpartition("/")[2].removesuffix(".tgz")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            _fetch(url, sha256, suffix, folder)
    return folder


def emoji_folder() -> Path:
    """Fluent Emoji 3D: one 256x256 RGBA WebP per emoji; 16 MB."""
    return package(
        "https://registry.npmjs.org/@lobehub/fluent-emoji-3d/-/fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        ".webp",
    )


def _fetch(url: str, sha256: str, suffix: str, folder: Path) -> None:
    say(f"Downloading {url}")
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            archive = response.read(LARGEST)
    except OSError as error:
        raise HostError(f"{url} could not be downloaded: {error}") from error
    found = hashlib.sha256(archive).hexdigest()
    if found != sha256:
        raise HostError(f"{url}\n  has sha256 {found},\n  expected   {sha256}. Nothing was kept.")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a fetch that was killed: the name is locked
    partial.mkdir()
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.name.endswith(suffix) else None
            if content is not None:
                (partial / Path(member.name).name).write_bytes(content.read())
    partial.rename(folder)


def nano_folder() -> Path:
    """Where the examples, the autoencoder and the run are kept."""
    folder = cache_root() / "nano"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
