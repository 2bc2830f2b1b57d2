"""SD3.5 files: find the diffusion model in a state dict, give its keys Stability's names, load it.

Three layouts are read: Stability's (with or without the prefix `model.diffusion_model.`),
ComfyUI's (a single file that also holds text encoders and VAE) and diffusers'.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import AXES, MMDiTXConfig, Shapes, config_from_shapes
from .errors import CheckpointError, is_out_of_memory
from .layers import Operations, joined_axes, split_axes
from .limits import BLOCKS, HEADER, PIECES, TENSORS, bounded, counted
from .mmditx import MMDiTX
from .packing import PackedOperations, is_packed, packed_layers
from .whole_file import WriteError, sweep, write_whole

StateDict = dict[str, Tensor]
Module = TypeVar("Module", bound=nn.Module)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the formats that occur in models."""

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
MARK = "joint_blocks.0.x_block.attn.qkv.weight"
DIFFUSERS_MARK = "transformer_blocks.0.attn.add_q_proj.weight"
CONTROLNET_MARKS = ("controlnet_blocks.0.weight", "pos_embed_input.proj.weight")
OTHER_MODELS = ("first_stage_model.", "text_encoders.", "cond_stage_model.")
VAE_MARKS = ("decoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight")
QUANTIZATION_SUFFIXES = (
    ".weight_scale", ".weight_codebook", ".input_scale", ".comfy_quant", ".scale_weight"
)  # fmt: skip

RENAMED = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
RENAMED_IN_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
JOINED_IN_BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


NUMBERED = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})(\.safetensors|\.sft)", re.IGNORECASE)
"""The names of a model's files where it has several, as diffusers and transformers save it."""


class Piece(NamedTuple):
    """One file of a model: its version, and where its tensors' bytes begin."""

    path: Path
    version: tuple[int, int]
    start: int


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for.

    Of a model that was saved in several files, `name-00001-of-00003.safetensors`, any one stands
    for all. A tensor gets memory of its own, so the file can be replaced or deleted afterwards.
    Raises CheckpointError, here or on reading, when a file is missing, damaged or became another,
    and for a header beyond `limits`, before anything parses it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self.entries: dict[str, tuple[Piece, dict[str, Any]]] = {}
        for path in pieces_of(self.path):
            self._add(path)

    def _add(self, path: Path) -> None:
        source = f"'{path.name}'"
        try:
            with path.open("rb") as file:
                version = version_of(file)
                length = int.from_bytes(file.read(8), "little")
                if length <= version[0]:  # of a longer one safe_open says what it is
                    bounded(HEADER, length, source)
                with safe_open(path, framework="pt") as checked:
                    self.metadata |= checked.metadata() or {}
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise unreadable(path, error) from error
        header.pop("__metadata__", None)
        piece = Piece(path, version, 8 + length)
        self.entries |= {key: (piece, entry) for key, entry in header.items()}
        bounded(TENSORS, len(self.entries), source)

    def __getitem__(self, key: str) -> Tensor:
        piece, entry = self.entries[key]
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            known = f"known are {', '.join(DTYPES)}"
            raise unreadable(piece.path, ValueError(f"dtype {entry['dtype']} of '{key}'; {known}"))
        data = bytearray(end - begin)
        rest = memoryview(data)
        try:
            with piece.path.open("rb", buffering=0) as file:
                if version_of(file) != piece.version:
                    raise CheckpointError(
                        f"'{piece.path.name}' was replaced by another file while it was read. "
                        "Wait until that one is whole, then queue again."
                    )
                file.seek(piece.start + begin)
                while rest:
                    count = file.readinto(rest)
                    if not count:
                        raise OSError(f"it ended in the middle of '{key}'")
                    rest = rest[count:]
        except OSError as error:
            raise unreadable(piece.path, error) from error
        dtype = DTYPES[entry["dtype"]]
        values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return values.view(entry["shape"])

    def shape(self, key: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return tuple(self.entries[key][1]["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def pieces_of(path: Path) -> list[Path]:
    """The files of a model, by the name of any of them: one, or all that lie beside it under
    numbered names. Raises CheckpointError when some of those are missing."""
    match = NUMBERED.fullmatch(path.name)
    if match is None:
        return [path]
    count = bounded(PIECES, int(match[3]), f"'{path.name}'")
    names = [f"{match[1]}-{i:05}-of-{match[3]}{match[4]}" for i in range(1, count + 1)]
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing:
        raise CheckpointError(
            f"'{path.name}' is one of {count} files of a model, and {len(missing)} of them are not "
            f"beside it, '{missing[0]}' among them. Put all {count} into one folder."
        )
    return [path.with_name(name) for name in names]


def is_later_piece(name: str) -> bool:
    """Whether a file's name is that of a model's second file or a later one."""
    match = NUMBERED.fullmatch(name)
    return match is not None and int(match[2]) > 1


class Part(Mapping[str, Tensor]):
    """The tensors of a file whose keys begin with a prefix, without it, still unread."""

    def __init__(self, file: TensorFile, prefix: str):
        self.file, self.prefix = file, prefix
        self.keys_within = keys_under(file, prefix)

    def __getitem__(self, key: str) -> Tensor:
        return self.file[self.prefix + key]

    def shape(self, key: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return self.file.shape(self.prefix + key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_within)

    def __len__(self) -> int:
        return len(self.keys_within)


def read_file(path: str | Path) -> tuple[StateDict, dict[str, str]]:
    """All tensors and the metadata of a safetensors file. Raises CheckpointError."""
    file = TensorFile(path)
    return dict(file), file.metadata


def version_of(file: IO[bytes]) -> tuple[int, int]:
    """What tells an open file from one that took its place: size and time."""
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns


def unreadable(path: str | Path, error: Exception, kind: str = "safetensors") -> Exception:
    """The error for a file that is no whole file of its kind, or is gone; lack of memory stays
    what it is."""
    path = Path(path)
    if is_out_of_memory(error):
        return MemoryError(str(error))
    if path.is_dir():
        inside = sorted(str(p.relative_to(path)) for p in path.glob("**/*.safetensors"))[:3]
        return CheckpointError(
            f"'{path.name}' is a folder, expected a file"
            + (f". Choose one in it: {', '.join(inside)}." if inside else " with a model.")
        )
    if not path.is_file():
        return CheckpointError(
            f"'{path.name}' is not there: it was moved or deleted. Put it back, or choose another "
            "file."
        )
    return CheckpointError(
        f"'{path.name}' can't be read as a {kind} file ({path.stat().st_size:,} bytes): {error}. "
        "It was probably not downloaded to its end; download it again."
    )


def write_file(
    path: str | Path, tensors: StateDict, metadata: dict[str, Any], replace: bool = True
) -> None:
    """Write a safetensors file, whole or not at all; `replace`: where one of that name is.

    Raises CheckpointError when the system refuses; what was there before is then still there.
    """
    text = {key: v if isinstance(v, str) else json.dumps(v) for key, v in metadata.items()}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    sweep(Path(path).parent)
    try:
        write_whole(path, _pieces(tensors, text), replace=replace, size=size)
    except WriteError as error:
        raise CheckpointError(str(error)) from error


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; none where no such file is."""
    if not path.is_file():
        return {}
    try:
        return TensorFile(path).metadata
    except CheckpointError:
        return {}


def _pieces(tensors: StateDict, metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file: the length of its header, the header, the tensors."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    aligned = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    end = 0
    for key in aligned:
        tensor = tensors[key]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entry = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        header[key] = {**entry, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for key in aligned:
        flat = tensors[key].detach().cpu().contiguous().flatten()
        yield flat.view(torch.uint8).numpy().data


def diffusion_model(state_dict: Mapping[str, Tensor], source: str = "this file") -> StateDict:
    """The diffusion model's tensors alone, under Stability's keys without prefix.

    Raises CheckpointError, saying what the file seems to be, when there is none.
    """
    for prefix in PREFIXES:
        if prefix + MARK in state_dict:
            return under(state_dict, prefix)
        if prefix + DIFFUSERS_MARK in state_dict and not is_controlnet(state_dict, prefix):
            return from_diffusers(under(state_dict, prefix), source)
    raise CheckpointError(f"{source} is not an SD3.5 diffusion model: {_looks_like(state_dict)}")


def is_controlnet(state_dict: Mapping[str, Tensor], prefix: str = "") -> bool:
    """Whether a file is a ControlNet of some kind, by its keys."""
    return any(prefix + mark in state_dict for mark in CONTROLNET_MARKS)


def under(state_dict: Mapping[str, Tensor], prefix: str) -> StateDict:
    """The tensors whose keys begin with `prefix`, without it; without the other models' if empty.

    Of a TensorFile only these are read.
    """
    return {key: state_dict[prefix + key] for key in keys_under(state_dict, prefix)}


def keys_under(state_dict: Mapping[str, Tensor], prefix: str) -> list[str]:
    """The keys of `under`."""
    keys = [k for k in state_dict if k.startswith(prefix)]
    if not prefix:
        keys = [k for k in keys if not k.startswith(OTHER_MODELS)]
    return [key[len(prefix) :] for key in keys]


def _looks_like(state_dict: Mapping[str, Tensor]) -> str:
    if is_controlnet(state_dict):
        return "it is a ControlNet. Load it with a ControlNet loader and choose a model here."
    if any(mark in state_dict for mark in VAE_MARKS) or any("taesd_" in k for k in state_dict):
        return "it is a VAE. Choose it in the vae widget and a diffusion model here."
    if any(".lora_" in key or key.startswith("lora_") for key in state_dict):
        return "it is a LoRA. Choose the model here and add a LoRA loader after this node."
    if any("text_model.encoder" in k or "SelfAttention.q" in k for k in state_dict):
        return "it is a text encoder. Choose it in a text encoder widget and a model here."
    first = next(iter(state_dict), "none at all")
    return (
        f"it has {len(state_dict)} tensors and no '{MARK}' among them (the first is '{first}'). "
        "Choose a Stable Diffusion 3 or 3.5 model."
    )


def from_diffusers(state_dict: Mapping[str, Tensor], source: str = "this file") -> StateDict:
    """diffusers' SD3Transformer2DModel keys -> Stability's. q, k, v are joined.

    diffusers keeps (scale, shift) where Stability has (shift, scale) in the final layer and in
    the last text block; they change places. Raises CheckpointError for keys it does not know.
    """
    found: StateDict = {}
    blocks: dict[int, dict[str, Tensor]] = {}
    last = counted(state_dict, "transformer_blocks", BLOCKS, source) - 1
    for key, tensor in state_dict.items():
        if key.startswith("transformer_blocks."):
            block = re.fullmatch(r"transformer_blocks\.([0-9]+)\.(.+\..+)", key)
            if block is None:
                raise _unknown_key(source, key)
            blocks.setdefault(int(block[1]), {})[block[2]] = tensor
            continue
        name, suffix = (key, "") if key in RENAMED else key.rpartition(".")[::2]
        if name not in RENAMED:
            raise _unknown_key(source, key)
        found[RENAMED[name] + (f".{suffix}" if suffix else "")] = tensor
    for index, tensors in blocks.items():
        found |= _block_from_diffusers(tensors, f"joint_blocks.{index}", source)
    swapped = f"joint_blocks.{last}.context_block.adaLN_modulation.1"
    for name in ("final_layer.adaLN_modulation.1", swapped):
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in found:
                halves = found[key].chunk(2) if found[key].ndim else [found[key]]
                found[key] = joined(halves[::-1], key, source)
    return found


def _block_from_diffusers(tensors: dict[str, Tensor], block: str, source: str) -> StateDict:
    found: StateDict = {}
    for name, parts in JOINED_IN_BLOCK.items():
        for suffix in ("weight", "bias"):
            keys, key = [f"{part}.{suffix}" for part in parts], f"{block}.{name}.{suffix}"
            if all(key in tensors for key in keys):
                found[key] = joined([tensors.pop(part) for part in keys], key, source)
    for key, tensor in tensors.items():
        name, suffix = key.rsplit(".", 1)
        if name not in RENAMED_IN_BLOCK:
            raise _unknown_key(source, f"transformer_blocks.*.{key}")
        found[f"{block}.{RENAMED_IN_BLOCK[name]}.{suffix}"] = tensor
    return found


def joined(parts: Sequence[Tensor], key: str, source: str) -> Tensor:
    """The parts of the tensor `key`, (n, ...) each, one after another. Raises CheckpointError when
    they don't fit together."""
    try:
        return torch.cat(list(parts))
    except (RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        seen = " and ".join(f"{list(part.shape)} ({_named(part.dtype)})" for part in parts)
        raise CheckpointError(
            f"{source}: '{key}' can't be put together from parts of shape {seen}. The file is "
            "damaged or mixes two models; download the original."
        ) from error


def _unknown_key(source: str, key: str) -> CheckpointError:
    return CheckpointError(
        f"{source} has a tensor '{key}', which diffusers' SD3 transformer does not have. "
        "The file is damaged or of another model; download the original."
    )


def shapes_of(state_dict: Mapping[str, Tensor]) -> Shapes:
    """Of a file without reading its tensors."""
    if isinstance(state_dict, (TensorFile, Part)):
        return {key: state_dict.shape(key) for key in state_dict}
    return {key: tuple(tensor.shape) for key, tensor in state_dict.items()}


def checked_config(
    state_dict: Mapping[str, Tensor], source: str = "this file", largest: int | None = None
) -> MMDiTXConfig:
    """The configuration, once every tensor is there, of the right shape and finite.

    Raises CheckpointError. largest: as in `check_tensors`.
    """
    config = config_from_shapes(shapes_of(state_dict), source)
    expected = shapes_of(MMDiTX(config, device="meta").state_dict())
    check_tensors(state_dict, expected, config.variant, source, largest)
    return config


def check_tensors(
    state_dict: Mapping[str, Tensor],
    expected: Shapes,
    what: str,
    source: str,
    largest: int | None = None,
) -> None:
    """Raise CheckpointError unless every expected tensor is there, of its shape, and of finite
    numbers.

    Of a packed layer's entries it is only checked that the layer is one whose weight is a matrix:
    the rest is left to the layer that loads them. Each tensor is read once; with `largest`, of
    those with more values none: a host that reads weights as it needs them would read them twice.
    """
    shapes = shapes_of(state_dict)
    missing = sorted(expected.keys() - shapes.keys())
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} of {len(expected)} tensors, '{missing[0]}' among "
            "them. The file is incomplete; download it again."
        )
    packed = {f"{layer}.weight" for layer in packed_layers(shapes)}
    for key in sorted(packed):
        if len(expected.get(key, ())) != 2:
            raise CheckpointError(
                f"{source} says that '{key}' is packed, which a {what} "
                f"{'can not have packed' if key in expected else 'does not have'}. The file is "
                "damaged or of another model; quantize the original again."
            )
    for key, shape in expected.items():
        if shapes[key] != shape and key not in packed:
            raise CheckpointError(
                f"{source}: '{key}' has shape {list(shapes[key])}, expected {list(shape)} in a "
                f"{what}. The file mixes two models or is damaged; use the original."
            )
    for key in expected:
        if key in packed:
            continue
        tensor = state_dict[key]
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(
                f"{source}: '{key}' holds {_named(tensor.dtype)} numbers, expected floating-point "
                "ones. The file was converted wrongly; download the original."
            )
        if (largest is None or tensor.numel() <= largest) and not _finite(tensor):
            raise CheckpointError(
                f"{source}: '{key}' holds NaN or infinite values, so every picture would be "
                "black. The file is damaged or was converted wrongly; download the original."
            )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite, in one pass without a copy; 8-bit formats pass."""
    if tensor.dtype.itemsize == 1 or tensor.numel() == 0:
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def with_axes(tensors: StateDict) -> StateDict:
    """With the position table as its columns and rows, where that is the same: Medium's whole one
    takes 0.45 GB at 16 bits. Files for other programs keep the table."""
    axes = split_axes(tensors["pos_embed"]) if "pos_embed" in tensors else None
    if axes is None:
        return tensors
    return {**{key: t for key, t in tensors.items() if key != "pos_embed"}, AXES: axes}


def with_table(tensors: StateDict) -> StateDict:
    """`with_axes` undone, for saving."""
    if AXES not in tensors:
        return tensors
    table = joined_axes(*tensors[AXES])
    return {**{key: t for key, t in tensors.items() if key != AXES}, "pos_embed": table}


def load(path: str | Path, operations: Operations | None = None, dtype: Any = None) -> MMDiTX:
    """An MMDiTX with the weights of a file, on the CPU, in the file's own dtype or `dtype`.

    Packed layers stay packed, in layers of PackedOperations unless others are given.
    """
    tensors = diffusion_model(TensorFile(path), f"'{Path(path).name}'")
    config = checked_config(tensors, f"'{Path(path).name}'")
    operations = operations or operations_for(tensors)
    return with_weights(MMDiTX(config, operations, device="meta"), tensors, dtype)


def operations_for(tensors: Mapping[str, Tensor]) -> Operations:
    """torch's own layers, or those for packed weights where some are."""
    return PackedOperations if is_packed(tensors) else nn


def with_weights(model: Module, tensors: StateDict, dtype: Any) -> Module:
    """A model made on "meta", with its checked tensors, not for training.

    What else lies beside a packed weight, as the scales of its inputs, is not used here.
    """
    wanted = weights_for(model.state_dict(), tensors, dtype)
    model.load_state_dict(wanted, strict=False, assign=True)
    return model.requires_grad_(False).eval()


def weights_for(known: Iterable[str], tensors: StateDict, dtype: Any) -> StateDict:
    """The tensors whose keys a model knows, in `dtype`, and packed layers as they are."""
    known, wanted = set(known), {}
    for key, tensor in tensors.items():
        layer, _, name = key.rpartition(".")
        if f"{layer}.comfy_quant" in tensors and name != "bias":
            wanted[key] = tensor
        elif key in known:
            wanted[key] = tensor.to(dtype) if dtype else tensor
    return wanted


def fill(model: nn.Module, tensors: StateDict, source: str, what: str) -> None:
    """Copy weights into a model. Raises CheckpointError, with the first difference."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        difference = str(error).splitlines()[1:2] or [str(error)]
        raise CheckpointError(f"'{source}' does not fit {what}: {difference[0].strip()}") from error
