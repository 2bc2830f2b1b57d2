"""Low-rank changes of a network that is otherwise left as it is (LoRA, Hu et al. 2021,
arXiv:2106.09685), in the spellings of the programs that read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.layouts import JOINED_IN_BLOCK, RENAMED_IN_BLOCK
from ..checkpoint.tensor_file import StateDict
from ..errors import SettingError
from ..network.config import VARIANTS
from ..network.mmditx import MMDiTX
from ..sampling.guidance import parse_layers

TARGETS = {
    "attention": r"attn2?\.(qkv|proj)",
    "mlp": r"mlp\.fc[12]",
    "modulation": r"adaLN_modulation\.1",
}
"""What can be changed -> the layers of a stream of a block. Norms never are."""
SPELLINGS = ("diffusers", "kohya", "comfyui")
"""Whose names a file has. ComfyUI's LoraLoader reads all three."""
NAMED_BLOCKS = {"composition": "12-24", "detail": "30-37"}
"""Of Large: what Stability AI's guide to training LoRAs, as diffusers' README_sd3.md quotes it,
takes these blocks to be for; it calls that speculative."""
_GUIDED = VARIANTS["sd3.5_large"].depth

_SWAPPED_IN_LAST = "context_block.adaLN_modulation.1"
_THEIRS = {ours: (theirs,) for theirs, ours in RENAMED_IN_BLOCK.items()} | JOINED_IN_BLOCK


@dataclass(frozen=True)
class LoraPlan:
    """Which layers a LoRA changes, and how.

    blocks: as Skip Layer Guidance has them ("12-23"), or one of NAMED_BLOCKS, all if empty. The
    change is up down x times
    alpha / rank; with `rank_stabilised` times alpha / sqrt(rank) (Kalajdzievski 2023,
    arXiv:2312.03732).
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attention",)
    blocks: str = ""
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            raise SettingError(
                f"lora_targets is {list(self.targets)}; known are {', '.join(TARGETS)}."
            )
        if self.rank < 1:
            raise SettingError(f"lora_rank is {self.rank}; it is 1 or more, mostly 4 to 64.")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def layers(self, network: MMDiTX) -> Iterator[str]:
        """The names of the layers that change."""
        depth, text = network.config.depth, self.blocks
        if text in NAMED_BLOCKS:
            if depth != _GUIDED:
                raise SettingError(
                    f"lora_blocks is '{text}', which is {NAMED_BLOCKS[text]} in Stability AI's "
                    f"guide for SD3.5 Large ({_GUIDED} blocks); this model has {depth}. Name its "
                    f"blocks by number, such as '0-{depth - 1}', or leave them out for all."
                )
            text = NAMED_BLOCKS[text]
        blocks = parse_layers(text, depth) if text else frozenset(range(depth))
        kinds = "|".join(TARGETS[target] for target in self.targets)
        wanted = re.compile(rf"joint_blocks\.([0-9]+)\.(?:x|context)_block\.(?:{kinds})")
        for name, _ in network.named_modules():
            found = wanted.fullmatch(name)
            if found and int(found[1]) in blocks:
                yield name


class LoraLinear(nn.Module):
    """A layer beside which a low-rank change learns; at first it changes nothing."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int, rank: int, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(F.linear(x, self.down), self.up)
        return self.base(x) + (self.scale * change).to(x.dtype)


def attach(network: MMDiTX, plan: LoraPlan) -> dict[str, LoraLinear]:
    """Put a change beside every layer of the plan; the network itself learns no more.

    Raises SettingError for a plan that changes nothing.
    """
    network.requires_grad_(False)
    found: dict[str, LoraLinear] = {}
    for name in list(plan.layers(network)):
        parent, _, last = name.rpartition(".")
        layer = network.get_submodule(name)
        outputs, inputs = _shape(layer)
        found[name] = LoraLinear(layer, inputs, outputs, plan.rank, plan.scale)
        setattr(network.get_submodule(parent), last, found[name])
    if not found:
        raise SettingError(
            f"lora_blocks is '{plan.blocks}' and lora_targets {list(plan.targets)}: no layer of "
            "the model is among them."
        )
    return found


def _shape(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a Linear, packed or not."""
    assert isinstance(layer.out_features, int) and isinstance(layer.in_features, int)
    return layer.out_features, layer.in_features


def checked_spelling(spelling: str, key: str) -> str:
    """The same, once it is known. Raises SettingError."""
    if spelling not in SPELLINGS:
        raise SettingError(f"{key} is '{spelling}'; known are {', '.join(SPELLINGS)}.")
    return spelling


def spelled(layers: dict[str, LoraLinear], depth: int, spelling: str = SPELLINGS[0]) -> StateDict:
    """The changes of a network of so many blocks under a program's names, with the scale multiplied
    in: a strength of 1 is what was trained.

    diffusers has (scale, shift) in the last block's text, where Stability has (shift, scale).
    """
    checked_spelling(spelling, "The spelling")
    found: StateDict = {}
    last = depth - 1
    for name, layer in layers.items():
        down, up = layer.down.detach(), layer.scale * layer.up.detach()
        if spelling == "kohya":
            key = f"lora_unet_{name.replace('.', '_')}"
            found |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            found[f"{key}.alpha"] = torch.tensor(float(len(down)))
        elif spelling == "comfyui":
            key = f"diffusion_model.{name}"
            found |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
        else:
            _, block, inner = name.split(".", 2)
            theirs = _THEIRS[inner]
            if int(block) == last and inner == _SWAPPED_IN_LAST:
                shift, factor = up.chunk(2)
                up = torch.cat([factor, shift])
            for part, rows in zip(theirs, up.chunk(len(theirs))):
                key = f"transformer.transformer_blocks.{block}.{part}"
                found |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": rows}
    return {key: tensor.contiguous().clone() for key, tensor in found.items()}
