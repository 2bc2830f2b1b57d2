"""Packs what tools/card.py needs for a machine with torch and no network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sd35_core.whole_file import write_text
from tools import host, install

NANO = "models/nano/sd35_nano.safetensors"


MOST = 60 << 20
"""Bytes of what `--pack` writes."""


OF_TORCH = {
    "torch", "torchvision", "torchaudio", "triton", "numpy", "sympy", "mpmath", "networkx",
    "setuptools", "filelock", "fsspec", "jinja2", "markupsafe", "typing-extensions",
}  # fmt: skip
"""Packages that come with torch."""


ALSO = ("pytest", "pluggy", "iniconfig", "pygments")
"""For the tests."""


LEFT_OUT = (".git", "tests/browser", "web/docs", "workflows", "input", "output", "models",
            "comfy_api_nodes", "blueprints", *(f"comfy/text_encoders/{name}_tokenizer"
            for name in ("qwen25", "qwen35", "llama")))  # fmt: skip
"""What a card has no use for, of the pack and of ComfyUI."""


@contextmanager
def in_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="sd35-card-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def needed() -> dict[str, str]:
    """Packages, with versions, that importing ComfyUI and the pack brings in, and pytest's."""
    script = (
        "import sys, json, tempfile; from pathlib import Path; from tools import host;"
        "from tools.inprocess import import_pack;"
        "import_pack(host.find_comfyui(), Path(tempfile.mkdtemp()));"
        "import comfy.sd, comfy.samplers, nodes;"
        "print(json.dumps([n.split('.')[0] for n, m in sys.modules.items()"
        " if 'site-packages' in (getattr(m, '__file__', None) or '')]))"
    )
    from importlib import metadata

    done = subprocess.run([sys.executable, "-c", script], cwd=host.PACK, capture_output=True,
                          text=True, check=True)  # fmt: skip
    tops = set(json.loads(done.stdout.splitlines()[-1]))
    known = metadata.packages_distributions()
    names = {name.lower() for top in tops for name in known.get(top, ())} | set(ALSO)
    return {name: metadata.version(name) for name in sorted(names - OF_TORCH)}


def pack(folder: Path, python: str, has: set[str]) -> int:
    """Write what a machine without a network needs, but for packages that it has. The wheels are
    for Linux on x86-64; of the small model only the VAE goes along."""
    from sd35_core.checkpoint.layouts import keys_under
    from sd35_core.checkpoint.tensor_file import TensorFile, write_file

    folder.mkdir(parents=True, exist_ok=True)
    with in_folder() as temporary:
        site, wheels = temporary / "site", temporary / "wheels"
        for name, version in needed().items():
            if name not in has:
                download(name, version, python, wheels)
        small, prefix = TensorFile(host.PACK / NANO), "first_stage_model."
        vae = temporary / "vae.safetensors"
        write_file(vae, {prefix + k: small[prefix + k] for k in keys_under(small, prefix)}, {})
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        with tarfile.open(folder / "card.tar.xz", "w:xz", preset=6) as archive:
            comfyui = host.find_comfyui().folder
            for source, name in (
                (host.PACK, host.PACK_NAME), (comfyui, "ComfyUI"), (site, "site")
            ):  # fmt: skip
                archive.add(source, name, filter=lambda entry, root=name: wanted(entry, root))
            archive.add(vae, f"{host.PACK_NAME}/{NANO}")
    launcher = Path(__file__).with_name("card_packed.py").read_text("utf-8")
    write_text(folder / "card.py", launcher, replace=True)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 2**20:.1f} MiB. There: python {folder.name}/card.py")
    if size > MOST:
        install.say(
            f"card: that is more than {MOST / 2**20:.0f} MiB. Name the packages that the machine "
            "has (python -m pip list, there) with --has; the largest are av, scipy, transformers."
        )
    return int(size > MOST)


def download(name: str, version: str, python: str, wheels: Path) -> None:
    """A wheel; one for any machine where there is none for that one, as of comfy-kitchen's."""
    base = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
            "--python-version", python, "-d", str(wheels)]  # fmt: skip
    linux = [f"manylinux_2_{n}_x86_64" for n in (17, 28, 27, 26, 24, 34)] + ["manylinux2014_x86_64"]
    kinds = ["any"] if name == "comfy-kitchen" else linux
    for pinned in (f"{name}=={version}", name):
        platforms = [part for kind in kinds for part in ("--platform", kind)]
        if not subprocess.run([*base, *platforms, pinned], capture_output=True).returncode:
            return
    raise host.HostError(f"There is no wheel of {name} {version} for Python {python} on Linux.")


def wanted(entry: tarfile.TarInfo, root: str) -> tarfile.TarInfo | None:
    """An entry of the archive, or None for what a card has no use for."""
    inside = entry.name.removeprefix(root).strip("/")
    parts = inside.split("/")
    unused = root != "site" and any(
        inside == left or inside.startswith(left + "/") for left in LEFT_OUT
    )
    tested = root == "site" and ("tests" in parts or "test" in parts)
    return None if unused or tested or "__pycache__" in parts else entry
