"""Model files: the host's folders and the pack's own, by the names that a workflow holds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import folder_paths

from ...sd35_core.checkpoint.gguf_file import EXTENSION
from ...sd35_core.checkpoint.tensor_file import SAFETENSORS, is_later_piece, pieces_of
from ...sd35_core.errors import CheckpointError

PACK_MODELS = Path(__file__).resolve().parents[2] / "models"
PACK_CONTROLNETS = "controlnet"
"""The folder beside a model of the pack that holds its ControlNets."""
MODEL_FOLDERS = ("diffusion_models", "checkpoints")


def model_files() -> list[str]:
    """Names of diffusion models and checkpoints, those of the pack first.

    A name that an earlier folder has too is listed as "folder/name".
    """
    return list(_models())


def _models() -> dict[str, Path | None]:
    """Name -> the file, or None where the host knows the way."""
    files: dict[str, Path | None] = {path.name: path for path in _of_the_pack(controlnets=False)}
    for folder in MODEL_FOLDERS:
        for name in listed(folder) + listed_gguf(folder):
            files.setdefault(f"{folder}/{name}" if name in files else name, None)
    return files


def _of_the_pack(controlnets: bool) -> list[Path]:
    paths = sorted(PACK_MODELS.rglob("*.safetensors"))
    return [path for path in paths if (path.parent.name == PACK_CONTROLNETS) == controlnets]


def controlnet_files() -> list[str]:
    """Names of ControlNets, those of the pack first."""
    own = [path.name for path in _of_the_pack(controlnets=True)]
    return own + [name for name in listed("controlnet") if name not in own]


def controlnet_path(name: str) -> Path:
    """The file behind a name of `controlnet_files`. Raises CheckpointError when it is gone."""
    for path in _of_the_pack(controlnets=True):
        if path.name == name:
            return path
    return path_in("controlnet", name)


def first_folder(folder: str) -> Path:
    """Where the host keeps files of a kind; made if it isn't there."""
    paths = [Path(path) for path in folder_paths.get_folder_paths(folder)]
    path = next((path for path in paths if path.name == folder), paths[0])  # "unet" is older
    path.mkdir(parents=True, exist_ok=True)
    return path


def listed(folder: str) -> list[str]:
    """The safetensors files of one of the host's model folders; of a model in several files the
    first, which stands for all."""
    names = [n for n in folder_paths.get_filename_list(folder) if n.lower().endswith(SAFETENSORS)]
    return [name for name in names if not is_later_piece(Path(name).name)]


def listed_gguf(folder: str) -> list[str]:
    """The GGUF files there, which the host does not list itself."""
    return sorted(
        str(path.relative_to(root))
        for root in map(Path, folder_paths.get_folder_paths(folder))
        for path in root.rglob(f"*{EXTENSION}")
    )


def model_path(name: str) -> Path:
    """The file behind a name of `model_files`. Raises CheckpointError when it is gone."""
    own = _models().get(name)
    if own is not None:
        return own
    for folder in MODEL_FOLDERS:
        path = folder_paths.get_full_path(folder, name.removeprefix(f"{folder}/"))
        if path is not None and (name.startswith(f"{folder}/") or _is_in(folder, name)):
            return Path(path)
    raise missing(name, " or ".join(MODEL_FOLDERS))


def _is_in(folder: str, name: str) -> bool:
    return name in folder_paths.get_filename_list(folder) + listed_gguf(folder)


def path_in(folder: str, name: str) -> Path:
    """The file `name` of one of the host's folders. Raises CheckpointError when it is gone."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise missing(name, folder)
    return Path(path)


def fingerprint(path: str | Path) -> str:
    """Something else when the file, or one of a model's, is replaced. A hash of path, size and
    time: the host writes it into every picture, where a path has no place."""
    stats = [(piece, piece.stat()) for piece in pieces_of(Path(path))]
    return hashed(" ".join(f"{p} {stat.st_size} {stat.st_mtime_ns}" for p, stat in stats))


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def missing(name: str, folder: str) -> CheckpointError:
    return CheckpointError(
        f"'{name}' is not in ComfyUI's {folder} folder any more. Put it back, or choose another "
        "file (press R on the canvas to read the folders again)."
    )
