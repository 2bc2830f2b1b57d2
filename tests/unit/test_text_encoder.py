"""The CLIP encoders against torch's own transformer layers, and their padding and pooling."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd35_core.encoders.text_encoder import (
    END,
    LENGTH,
    START,
    ClipConfig,
    ClipTextModel,
    clip_g,
    clip_l,
    joined_encodings,
    padded_tokens,
)

CAT, DOG = 2368, 1929
CONFIGS = [clip_l(24, 3, 3), clip_g(32, 2, 2)]


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def random_encoder(config: ClipConfig) -> ClipTextModel:
    torch.manual_seed(3)
    encoder = ClipTextModel(config)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder.requires_grad_(False).eval()


def token_rows(config: ClipConfig) -> Tensor:
    return torch.tensor(
        [padded_tokens([], config), padded_tokens([CAT], config), padded_tokens([DOG] * 90, config)]
    )


def torch_layer(layer: nn.Module, config: ClipConfig) -> nn.TransformerEncoderLayer:
    """torch's pre-norm layer with the weights of one of ours."""
    activation: Callable[[Tensor], Tensor] = (
        quick_gelu if config.hidden_act == "quick_gelu" else F.gelu
    )
    own = layer.state_dict()
    made = nn.TransformerEncoderLayer(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        dropout=0.0,
        activation=activation,
        batch_first=True,
        norm_first=True,
    )
    state = {}
    for kind in ("weight", "bias"):
        projections = [own[f"self_attn.{name}_proj.{kind}"] for name in "qkv"]
        state[f"self_attn.in_proj_{kind}"] = torch.cat(projections)
        state[f"self_attn.out_proj.{kind}"] = own[f"self_attn.out_proj.{kind}"]
        for theirs, ours in (("linear1", "mlp.fc1"), ("linear2", "mlp.fc2")):
            state[f"{theirs}.{kind}"] = own[f"{ours}.{kind}"]
        for i in "12":
            state[f"norm{i}.{kind}"] = own[f"layer_norm{i}.{kind}"]
    made.load_state_dict(state)
    return made.requires_grad_(False).train()


@pytest.mark.parametrize("config", CONFIGS, ids=["clip_l", "clip_g"])
def test_an_encoder_computes_what_torch_transformer_layers_do(config: ClipConfig) -> None:
    encoder = random_encoder(config)
    tokens = token_rows(config)
    embeddings = encoder.text_model.embeddings
    x = embeddings.token_embedding.weight[tokens] + embeddings.position_embedding.weight
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    states = [x]
    for layer in encoder.text_model.encoder.layers:
        states.append(torch_layer(layer, config)(states[-1], src_mask=mask))
    ends = torch.tensor([1, 2, LENGTH - 1])
    pooled = encoder.text_model.final_layer_norm(states[-1])[torch.arange(3), ends]
    if config.projected:
        pooled = pooled @ encoder.text_projection.weight.T
    found_hidden, found_pooled = encoder(tokens)
    assert torch.allclose(found_hidden, states[-2], atol=1e-4)
    assert torch.allclose(found_pooled, pooled, atol=1e-4)


def test_padding_fills_up_to_77_after_the_end() -> None:
    for config, pad in zip(CONFIGS, (END, 0)):
        ids = padded_tokens([CAT, DOG], config)
        assert ids == [START, CAT, DOG, END] + [pad] * (LENGTH - 4)


def test_a_long_prompt_is_cut_and_still_ends() -> None:
    for config in CONFIGS:
        ids = padded_tokens([CAT] * 200, config)
        assert len(ids) == LENGTH
        assert ids[-1] == END and ids[-2] == CAT


def test_what_follows_the_end_changes_neither_the_prompt_nor_the_summary() -> None:
    for config in CONFIGS:
        encoder = random_encoder(config)
        tokens = torch.tensor([padded_tokens([CAT], config)])
        other = tokens.clone()
        other[0, 3:] = DOG
        hidden, pooled = encoder(tokens)
        other_hidden, other_pooled = encoder(other)
        assert torch.allclose(hidden[:, :3], other_hidden[:, :3], atol=1e-6)
        assert torch.allclose(pooled, other_pooled, atol=1e-6)


def test_both_encoders_stand_side_by_side_with_zeros_after_them() -> None:
    encoded = [random_encoder(config)(token_rows(config)) for config in CONFIGS]
    context, pooled = joined_encodings(encoded, 96)
    assert context.shape == (3, LENGTH, 96) and pooled.shape == (3, 56)
    assert torch.equal(context[..., :24], encoded[0][0])
    assert torch.equal(context[..., 24:56], encoded[1][0])
    assert not context[..., 56:].any()
    assert torch.equal(pooled[:, :24], encoded[0][1])


def test_keys_are_those_of_hugging_face() -> None:
    keys = ClipTextModel(clip_l(12, 1, 2)).state_dict().keys()
    layer = "text_model.encoder.layers.1."
    assert {
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        layer + "self_attn.q_proj.bias",
        layer + "self_attn.out_proj.weight",
        layer + "layer_norm2.bias",
        layer + "mlp.fc2.weight",
        "text_model.final_layer_norm.weight",
        "text_projection.weight",
    } <= keys
    assert len(keys) == 2 + 2 * 16 + 2 + 1


def test_a_description_says_what_a_host_needs_to_build_the_encoder() -> None:
    assert clip_g(64, 4, 3).described() == {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "intermediate_size": 256,
        "hidden_act": "gelu",
    }
