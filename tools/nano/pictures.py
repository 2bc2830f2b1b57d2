"""The emoji pictures: fetched once, checked, unpacked into the cache outside the checkout."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
import urllib.request
from pathlib import Path

from tools.install import HostError, cache_root, locked, say

URL = "https://registry.npmjs.org/@lobehub/fluent-emoji-3d/-/fluent-emoji-3d-1.1.0.tgz"
LARGEST = 2**26
"""Bytes that are read of it."""
SHA256 = "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"


def emoji_folder() -> Path:
    """The folder with one 256x256 RGBA WebP per emoji; downloads 16 MB the first time.

    Raises HostError when they can't be had or are not what they were.
    """
    folder = cache_root() / "fluent-emoji-3d-1.1.0"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            _fetch(folder)
    return folder


def _fetch(folder: Path) -> None:
    say(f"Downloading {URL} (16 MB)")
    try:
        with urllib.request.urlopen(URL, timeout=60) as response:
            archive = response.read(LARGEST)
    except OSError as error:
        raise HostError(f"{URL} could not be downloaded: {error}") from error
    found = hashlib.sha256(archive).hexdigest()
    if found != SHA256:
        raise HostError(f"{URL}\n  has sha256 {found},\n  expected   {SHA256}. Nothing was kept.")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a fetch that was killed: the name is locked
    partial.mkdir()
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.name.endswith(".webp") else None
            if content is not None:
                (partial / Path(member.name).name).write_bytes(content.read())
    partial.rename(folder)


def nano_folder() -> Path:
    """Where the examples, the autoencoder and the run are kept."""
    folder = cache_root() / "nano"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
