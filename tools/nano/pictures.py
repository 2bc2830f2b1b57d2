"""The emoji pictures: fetched once, checked, unpacked into a cache outside the checkout."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tarfile
import urllib.request
from pathlib import Path

from PIL import Image

URL = "https://registry.npmjs.org/@lobehub/fluent-emoji-3d/-/fluent-emoji-3d-1.1.0.tgz"
SHA256 = "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
LICENCE = "MIT (Microsoft Fluent Emoji)"
SKIN_TONES = tuple(f"1f3f{tone}" for tone in "bcdef")


def cache_folder() -> Path:
    """$SD35_CACHE, else sd35-node-pack in this system's cache folder for users."""
    if chosen := os.environ.get("SD35_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        parent = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        parent = Path.home() / "Library" / "Caches"
    else:
        parent = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return parent / "sd35-node-pack"


def emoji_folder() -> Path:
    """The folder with one 256x256 RGBA WebP per emoji; downloads 30 MB the first time."""
    folder = cache_folder() / "fluent-emoji-3d-1.1.0"
    if folder.is_dir():
        return folder
    print(f"downloading {URL}")
    with urllib.request.urlopen(URL, timeout=60) as response:
        archive = response.read()
    found = hashlib.sha256(archive).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{URL}\n  has sha256 {found},\n  expected   {SHA256}. Nothing was kept.")
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.name.endswith(".webp") else None
            if content is not None:
                (partial / Path(member.name).name).write_bytes(content.read())
    partial.rename(folder)
    return folder


def code_points() -> list[str]:
    """Every emoji with a picture, skin tones left out, sorted."""
    names = (path.stem for path in emoji_folder().glob("*.webp"))
    return sorted(name for name in names if not any(tone in name for tone in SKIN_TONES))


def sprite(code_point: str) -> Image.Image:
    """One emoji as RGBA, cut to what is visible."""
    with Image.open(emoji_folder() / f"{code_point}.webp") as image:
        whole = image.convert("RGBA")
    return whole.crop(whole.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
