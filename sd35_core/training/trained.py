"""The network as it is trained, with layers and attention that have gradients everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.loading import fill, load
from ..checkpoint.tensor_file import TensorFile
from ..encoders.described import T5, Encoder
from ..encoders.t5 import T5Config, T5Encoder, with_t5
from ..encoders.text_encoder import ClipTextModel, clip_g, clip_l, joined_encodings
from ..network.controlnet import ControlNetConfig, ControlNetEmbedder
from ..network.layers import JointBlock, grid_positions
from ..network.mmditx import MMDiTX
from ..packing.formats import is_packed
from ..packing.layers import PackedLinear
from .config import TO_BE_TRAINED, TrainingConfig
from .lora import LoraLinear, LoraPlan, attach


class _RMSNorm(nn.RMSNorm):
    """In the dtype of its input, as autocast leaves it out."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class TrainedOperations:
    Linear, Conv2d, LayerNorm, RMSNorm = nn.Linear, nn.Conv2d, nn.LayerNorm, _RMSNorm


class PackedTrainedOperations(TrainedOperations):
    """For a base whose layers may be packed."""

    Linear = PackedLinear


def plain_attention(q: Tensor, k: Tensor, v: Tensor, context_tokens: int) -> Tensor:
    """Softmax attention without a fused kernel: on a CPU its backward pass is the faster one."""
    weights = torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2), dim=-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


class Trained(nn.Module):
    """All that learns: the network and its text encoders."""

    def __init__(self, config: TrainingConfig, network: MMDiTX | None = None):
        """`network` is one that is there already, to be changed by a LoRA."""
        super().__init__()
        self.diffusion_model = network or MMDiTX(config.network, TrainedOperations)
        self.lora: dict[str, LoraLinear] = {}
        self.clip_l = ClipTextModel(clip_l(*config.clip_l))
        self.clip_g = ClipTextModel(clip_g(*config.clip_g))
        self.t5xxl: T5Encoder | None = None
        if config.t5xxl:
            self.t5xxl = T5Encoder(T5Config(*config.t5xxl))
        self.controlnet: ControlNetEmbedder | None = None
        if config.controlnet:
            hidden = config.network.hidden
            described = ControlNetConfig(
                "2b", config.controlnet_layers, hidden, hidden, config.controlnet
            )
            self.controlnet = ControlNetEmbedder(described, TrainedOperations)

    @property
    def encoders(self) -> dict[str, Encoder]:
        """By their names in SD3.5's files, in their order."""
        found: dict[str, Encoder] = {"clip_l": self.clip_l, "clip_g": self.clip_g}
        return found if self.t5xxl is None else {**found, T5: self.t5xxl}

    def initialise(self) -> None:
        """As in the paper: every adaLN and the final layer start at zero, so blocks are idle."""
        network = self.diffusion_model
        for module in network.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        places = torch.arange(network.config.pos_embed_max_size)
        network.pos_embed.copy_(grid_positions(places, places, network.config.hidden))
        for name, parameter in network.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)
        used = self.clip_l.config.hidden_size + self.clip_g.config.hidden_size
        nn.init.normal_(network.context_embedder.weight, std=used**-0.5)
        for encoder in (self.clip_l, self.clip_g, self.t5xxl):
            if encoder is not None:
                encoder.initialise()

    def adapt(self, plan: LoraPlan) -> None:
        """Let a LoRA alone learn; at first it changes nothing."""
        self.requires_grad_(False)
        self.lora = attach(self.diffusion_model, plan)

    def steer(self) -> None:
        """Let the ControlNet alone learn: it begins as a copy of the base that changes nothing."""
        base, control = self.diffusion_model.requires_grad_(False), self.controlnet
        assert control is not None
        control.x_embedder.load_state_dict(base.x_embedder.state_dict())
        control.t_embedder.load_state_dict(base.t_embedder.state_dict())
        for linear in control.y_embedder.mlp:
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
        for block, joint in zip(control.transformer_blocks, base.joint_blocks):
            source = joint.get_submodule("x_block").state_dict()
            wanted = block.state_dict()
            block.load_state_dict({key: source[key][: len(t)] for key, t in wanted.items()})
        for silent in (*control.controlnet_blocks, control.pos_embed_input):
            for parameter in silent.parameters():
                nn.init.zeros_(parameter)

    def encode(
        self,
        tokens_l: Tensor,
        tokens_g: Tensor,
        kept: Tensor | None = None,
        tokens_t5: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Context and pooled; kept: (2, B), 0 where a CLIP's output is dropped."""
        encoded = [self.clip_l(tokens_l), self.clip_g(tokens_g)]
        if kept is not None:
            encoded = [
                (hidden * keep[:, None, None], pooled * keep[:, None])
                for (hidden, pooled), keep in zip(encoded, kept)
            ]
        width = self.diffusion_model.config.context_dim
        context, pooled = joined_encodings(encoded, width)
        if self.t5xxl is None or tokens_t5 is None:
            return context, pooled
        return with_t5(context, self.t5xxl(tokens_t5)), pooled


def to_be_trained(
    config: TrainingConfig, network: MMDiTX | None, encoders: Mapping[str, Encoder]
) -> Trained:
    """A new model, one that goes on from a file, or a given one with a LoRA; with text encoders
    that are there already."""
    model = Trained(config, network)
    if network is not None:
        model.adapt(config.lora)
    else:
        model.initialise()
    for name, encoder in encoders.items():
        setattr(model, name, encoder)
    if network is None and config.start:
        start = load(config.start, dtype=torch.float32).state_dict()
        fill(model.diffusion_model, start, config.start, TO_BE_TRAINED)
    if config.controlnet:
        model.steer()
    return model


def trainable_base(path: str, bf16: bool) -> MMDiTX:
    """The network that a LoRA is trained on, its weights as they are used: in bf16 those that
    autocast rounds so at every use, else in fp32. Packed ones stay packed. Raises
    CheckpointError."""
    operations = PackedTrainedOperations if is_packed(TensorFile(path)) else TrainedOperations
    network = load(path, operations, None if bf16 else torch.float32)
    if bf16:
        halve(network)
    return network


@contextmanager
def without_lora(model: Trained) -> Iterator[None]:
    """The base alone, for as long as it is needed."""
    scales = [layer.scale for layer in model.lora.values()]
    try:
        for layer in model.lora.values():
            layer.scale = 0.0
        yield
    finally:
        for layer, scale in zip(model.lora.values(), scales):
            layer.scale = scale


def halve(network: MMDiTX) -> None:
    """Keep the weights of plain layers in bf16, to which autocast rounds them at every use: the
    same bits, and no rounded copy is kept for the way back."""
    for module in network.modules():
        if type(module) in (nn.Linear, nn.Conv2d):
            for parameter in module.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)


def compile_blocks(model: nn.Module) -> None:
    """Let torch compile a model's blocks.

    To a block a picture of another size is another number of rows, and one graph serves all; of the
    whole network torch 2.11 takes two sizes for one.
    """
    for module in model.modules():
        if isinstance(module, JointBlock):
            module.compile()
