"""What training a LoRA will take of a device's memory, from shapes alone: nothing is loaded.

What the way back needs is counted, not guessed: the network runs once on tensors without values
(torch's FakeTensorMode), and what autograd keeps of them is added up.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..checkpoint.layouts import keys_under, model_prefix
from ..checkpoint.loading import QUANTIZATION_SUFFIXES, described_config
from ..checkpoint.tensor_file import TensorFile
from ..errors import CheckpointError, SettingError
from ..network.config import MMDiTXConfig
from ..network.layers import Attend, JointBlock, attention
from ..network.mmditx import MMDiTX, run_block
from ..packing.formats import packed_layers
from .config import TrainingConfig
from .dataset import Examples
from .lora import LoraPlan, attach
from .trained import TrainedOperations, halve, plain_attention

log = logging.getLogger("sd35")
GB = 1e9
ADAMW = 4 + 4 + 8 + 4
"""Bytes of a number that learns, in fp32: itself, its gradient, two moments, its average."""
WORK = 2
"""Of the largest tensor that the way back keeps, so many more exist while it is used."""


@dataclass
class Kept:
    """What autograd keeps of a forward pass, in bytes; tensors that share memory count once."""

    outside: set[int]
    """Storages that are counted elsewhere: the weights."""
    total: int = 0
    largest: int = 0
    seen: dict[int, Any] = field(default_factory=dict)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.outside and key not in self.seen:
            self.seen[key] = storage
            self.total += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
        return tensor


@dataclass(frozen=True)
class Need:
    """Bytes on the device, by what they are for, and those that loading alone takes."""

    base: int
    learned: int
    encoders: int
    activations: int
    loading: int

    @property
    def total(self) -> int:
        return max(self.loading, self.base + self.learned + self.encoders + self.activations)

    def words(self) -> str:
        parts = {"the model": self.base, "the LoRA": self.learned,
                 "the text encoders": self.encoders, "the way back": self.activations}  # fmt: skip
        said = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts.items() if size)
        return f"{self.total / GB:.1f} GB ({said})"


@dataclass(frozen=True)
class Scene:
    """What a step works on: rows, cells of the largest latent, tokens of the prompt."""

    batch: int
    height: int
    width: int
    tokens: int


def activations(
    shape: MMDiTXConfig, plan: LoraPlan, scene: Scene, bf16: bool, checkpoint: bool, fused: bool,
    packed: bool = False,
) -> int:  # fmt: skip
    """Bytes that the way back needs at most.

    fused: attention does not keep its weights, as on a card; packed: unpacked weights are kept.
    """
    attend: Attend = attention if fused else plain_attention
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        model = MMDiTX(shape, TrainedOperations)
        if bf16:
            halve(model)
        attach(model, plan)
        weights = {id(p): p for p in (*model.parameters(), *model.buffers())}.values()
        dense = {
            id(module.weight)
            for module in model.modules()
            if packed and isinstance(module, torch.nn.Linear)
        }
        kept = Kept({w.untyped_storage()._cdata for w in weights if id(w) not in dense})
        blocks: list[int] = []
        inputs: list[int] = []

        def counted(index: int, block: JointBlock, *given: Any) -> tuple[Tensor, Tensor]:
            before = kept.total
            found = run_block(index, block, *given)
            blocks.append(kept.total - before)
            inputs.append(sum(t.numel() * t.element_size() for t in given[:2]))
            return found

        x = torch.randn(scene.batch, shape.in_channels, scene.height, scene.width)
        context = torch.randn(scene.batch, scene.tokens, shape.context_dim)
        y, sigma = torch.randn(scene.batch, shape.pooled_dim), torch.rand(scene.batch)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor),
        ):
            model(x, 1000 * sigma, context, y, attend=attend, run_block=counted)
    whole = kept.total
    if checkpoint:
        whole += sum(inputs) - sum(blocks) + max(blocks)
    return whole + WORK * kept.largest


def parts_of(config: TrainingConfig, scene: Scene, fused: bool) -> Need:
    """What a run needs; only headers of files are read. Raises CheckpointError."""
    file = TensorFile(config.start)
    shape = described_config(file)
    if shape is None:
        raise CheckpointError(f"'{file.path.name}' has no diffusion model of SD3.5's in it.")
    stored, held, packed = _weights(file, config.bf16)
    with FakeTensorMode():
        layers = attach(MMDiTX(shape), config.lora)
        numbers = sum(layer.up.numel() + layer.down.numel() for layer in layers.values())
    encoders = 0
    if config.text_encoders:
        other = TensorFile(config.text_encoders)
        keys = [key for key in other if key.startswith("text_encoders.")]
        encoders = sum(4 * math.prod(other.shape(key)) for key in keys)
    kept = activations(shape, config.lora, scene, config.bf16, config.checkpoint, fused, packed)
    loading = stored if config.bf16 or stored == held else stored + held
    return Need(held, ADAMW * numbers, encoders, kept, loading)


def _weights(file: TensorFile, bf16: bool) -> tuple[int, int, bool]:
    """Bytes of the diffusion model in its file and while it is trained on; whether it is packed."""
    stored = held = 0
    packed = False
    prefix = model_prefix(file) or ""
    keys = keys_under(file, prefix)
    marked = packed_layers(keys)
    for key in keys:
        dtype, shape = file.entry(prefix + key)
        count, size = math.prod(shape), dtype.itemsize
        packed = packed or key.endswith(QUANTIZATION_SUFFIXES)
        plain = key.rpartition(".")[0] not in marked
        stored += count * size
        matrix = len(shape) in (2, 4) or key.endswith(".bias")
        held += count * ((2 if matrix else size) if bf16 else 4) if plain else count * size
    return stored, held, packed


def scene_of(config: TrainingConfig, groups: Sequence[Examples] | None) -> Scene:
    """The largest latent and the longest prompt; of files from their headers."""
    tokens = config.prompt_tokens + (config.t5_tokens if config.t5xxl else 0)
    if groups is None and config.images:
        width, height = max(config.sizes, key=lambda size: size[0] * size[1])
        return Scene(config.batch, height // config.cell, width // config.cell, tokens)
    shapes: list[dict[str, tuple[int, ...]]] = []
    for path in config.examples if groups is None else ():
        file = TensorFile(path)
        shapes.append({key: file.shape(key) for key in file})
    for group in groups or ():
        shapes.append({key: tuple(tensor.shape) for key, tensor in group.items()})
    sizes = [shape["latents"][2:] for shape in shapes if len(shape.get("latents", ())) == 4]
    if not sizes:
        return Scene(config.batch, 1, 1, tokens)  # which is said when they are read
    height, width = max(sizes, key=math.prod)
    longest = [shape["context"][1] for shape in shapes if len(shape.get("context", ())) == 3]
    return Scene(config.batch, height, width, max([tokens, *longest]))


def check_memory(
    config: TrainingConfig, groups: Sequence[Examples] | None, device: torch.device
) -> None:
    """Say what a run needs. Raises SettingError where the device has less, with what would do."""
    free = int(config.memory * GB) or free_memory(device)
    scene, fused = scene_of(config, groups), device.type != "cpu"
    need = parts_of(config, scene, fused)
    if free is None or need.total <= free:
        of = "" if free is None else f" of {free / GB:.1f}"
        log.info(f"training needs about {need.words()}{of} on {device}")
        return
    raise SettingError(
        f"Training needs about {need.words()}, and {device} has {free / GB:.1f} GB for it. "
        f"{_advice(config, scene, fused, need.total, free)}"
    )


def _advice(config: TrainingConfig, scene: Scene, fused: bool, needed: int, free: int) -> str:
    """Changes that help, with what is needed then."""
    lighter = replace(config, checkpoint=True)
    one = replace(scene, batch=1)
    small = replace(one, height=max(1, one.height // 2), width=max(1, one.width // 2))
    changes = {
        "checkpoint = true": (lighter, scene),
        f"that and batch = 1 (accumulate = {config.batch * config.accumulate})": (lighter, one),
        "these and half the width and height": (lighter, small),
    }
    said = []
    for words, (changed, smaller) in changes.items():
        need = parts_of(changed, smaller, fused).total
        if need < needed:
            said.append(f"{words}: {need / GB:.1f} GB")
        if need <= free:
            break
    else:
        said.append("a base of 8 or 2 bits, which SD3.5 Quantize writes")
    return f"What would do with less: {'; '.join(said)}."


def best_device() -> str:
    """cuda or mps where there is one, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def free_memory(device: torch.device) -> int | None:
    """Bytes; None where that can't be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    told = Path("/proc/meminfo")
    if device.type != "cpu" or not told.is_file():
        return None
    lines = told.read_text(encoding="utf-8").splitlines()
    words = next((line.split() for line in lines if line.startswith("MemAvailable:")), [])
    return 1024 * int(words[1]) if len(words) > 1 and words[1].isdigit() else None
