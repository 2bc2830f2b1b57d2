"""The check of workflows: what is wrong is said, what is right is not."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sd35_core.workflow.__main__ import main
from sd35_core.workflow.check import check, files_under, findings
from sd35_core.workflow.links import leading_to
from sd35_core.workflow.reader import about_tokens, setups
from sd35_core.workflow.setup import Latent, Model, Prompt, Setup
from sd35_core.workflow.workflow_file import api_graph

from ..conftest import PACK
from .set_ups import RIGHT, WRONG, Change, control, medium, node, set_to


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with files whose headers say what they are."""
    folder = tmp_path_factory.mktemp("models")

    def write(kind: str, name: str, **shapes: tuple[int, ...]) -> None:
        (folder / kind).mkdir(exist_ok=True)
        tensors = {k.replace("__", "."): torch.zeros(shape) for k, shape in shapes.items()}
        scale = json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})
        said = {"lora_adapter_metadata": scale} if name == "alpha.safetensors" else None
        save_file(tensors, folder / kind / name, said)

    def lora_of(width: int, **names: int) -> dict[str, tuple[int, int]]:
        return {
            f"{name}__{part}__weight": shape
            for name in names
            for part, shape in (("lora_up", (width, 4)), ("lora_down", (4, width)))
        }

    for kind in ("canny", "blur", "depth"):
        write(
            "controlnet", f"large_{kind}.safetensors", controlnet_blocks__0__weight=(8, 8),
            pos_embed_input__proj__weight=(2432, 16, 2, 2), pos_embed_input__proj__bias=(2432,),
        )  # fmt: skip
    write("controlnet", "sd15.safetensors", input_hint_block__0__weight=(8, 8))
    write("vae", "sd15_vae.safetensors", decoder__conv_in__weight=(512, 4, 3, 3))
    qkv = "lora_unet_joint_blocks_7_x_block_attn_qkv"
    write("loras", "medium_lora.safetensors", **lora_of(1536, **{qkv: 1}))
    write("loras", "large_lora.safetensors", **lora_of(2432, **{qkv: 1}))
    write("loras", "nano_lora.safetensors",
          **lora_of(256, lora_unet_joint_blocks_1_x_block_attn_qkv=1))  # fmt: skip
    write("loras", "diffusers_lora.safetensors",
          transformer__transformer_blocks__3__attn__to_q__lora_A__weight=(4, 1536),
          transformer__transformer_blocks__3__attn__to_q__lora_B__weight=(1536, 4),
          transformer__transformer_blocks__3__ff__net__0__proj__lora_A__weight=(4, 1536),
          text_encoder__text_model__encoder__layers__0__q_proj__lora_A__weight=(4, 8))  # fmt: skip
    write("loras", "unet_lora.safetensors",
          unet__transformer_blocks__3__attn__to_q__lora_A__weight=(4, 1536),
          unet__transformer_blocks__3__attn__to_q__lora_B__weight=(1536, 4))  # fmt: skip
    hada = {f"hada_w{i}_{side}": (2432, 4) if side == "a" else (4, 2432)
            for i in (1, 2) for side in "ab"}  # fmt: skip
    write("loras", "large_loha.safetensors", **{f"{qkv}__{n}": shape for n, shape in hada.items()})
    write("loras", "lokr.safetensors",
          **{f"lycoris_transformer_blocks_{i}_attn_to_q__{name}": (32, 48)
             for i in (3, 30) for name in ("lokr_w1", "lokr_w2")})  # fmt: skip
    to_q = "transformer__transformer_blocks__3__attn__to_q__lora"
    pair = {f"{to_q}_A__weight": (4, 1536), f"{to_q}_B__weight": (1536, 4)}
    write("loras", "dora.safetensors", **pair, **{f"{to_q}_magnitude_vector": (1536,)})
    write("loras", "alpha.safetensors", **pair)
    write("loras", "sdxl.safetensors",
          **lora_of(640, lora_unet_down_blocks_1_attentions_0_proj_in=1))  # fmt: skip
    write("loras", "flux.safetensors",
          **lora_of(3072, lora_unet_double_blocks_0_img_attn_qkv=1))  # fmt: skip
    write("loras", "attn2.safetensors", **lora_of(1536, **{
        f"lora_unet_joint_blocks_{i}_x_block_attn2_qkv": 1 for i in (3, 20)}))  # fmt: skip
    write("diffusion_models", "flux.safetensors", double_blocks__0__img_attn__qkv__weight=(8, 8))
    write("diffusion_models", "packed.safetensors", **packed_header())
    return folder


def packed_header() -> dict[str, tuple[int, ...]]:
    from .models import TINY, random_weights

    shapes = {key: tuple(t.shape) for key, t in random_weights(TINY).items()}
    shapes["joint_blocks.0.x_block.attn.qkv.weight_scale"] = (1,)
    return {key.replace(".", "__"): shape for key, shape in shapes.items()}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str, models: Path) -> None:
    change, rule, words = WRONG[name]
    graph = medium()
    change(graph)
    (found,) = check(graph, files_under(models)).values()
    said = [finding for finding in found if finding.rule == rule]
    assert len(said) == 1, found
    assert re.search(words, said[0].text)
    assert said[0].text.rstrip().endswith(".")


def test_a_lora_of_large_on_medium_is_an_error(models: Path) -> None:
    graph = medium()
    WRONG["a LoRA of Large on Medium"][0](graph)
    (found,) = check(graph, files_under(models)).values()
    assert [finding.severity for finding in found] == ["error"]


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_said_of_what_is_right(name: str, models: Path) -> None:
    graph = medium()
    RIGHT[name](graph)
    (found,) = check(graph, files_under(models)).values()
    assert found == []


def test_the_tables_are_long_enough() -> None:
    assert len(WRONG) >= 25 and len(RIGHT) >= 25


@pytest.mark.parametrize("path", sorted((PACK / "workflows").glob("*.json")), ids=lambda p: p.stem)
def test_a_canvas_file_and_its_twin_say_the_same(path: Path) -> None:
    read = files_under(None)
    graphs = [
        api_graph(json.loads(twin.read_text(encoding="utf-8")))
        for twin in (path, path.parent / "api" / path.name)
    ]
    found = [setups(graph, read) for graph in graphs]
    assert found[0] == found[1] and found[0]


def test_what_objects_show_is_judged_too() -> None:
    model = Model(context_dim=4096, pooled_dim=2048)
    wrong = Setup(
        model=model,
        positive=Prompt(width=2048, pooled=1280),
        negative=Prompt(pooled=0, finite=False),
        latent=Latent(channels=4, empty=False, finite=False),
    )
    assert {f.rule for f in findings(wrong)} == {
        "prompt width", "pooled width", "pooled missing", "prompt numbers", "latent numbers",
        "latent channels",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("", 1), ("a red bicycle", 5), ("an isometric drawing of a tiny kitchen, extraordinary", 14)],
)
def test_tokens_are_counted_about_right(text: str, tokens: int) -> None:
    assert abs(about_tokens(text) - tokens) <= 2


def test_a_check_belongs_to_the_samplers_after_it() -> None:
    graph = medium()
    graph["40"] = node("SD35Check", model=["1", 0], positive=["2", 0])
    graph["50"] = copy.deepcopy(graph["5"])
    graph["50"]["inputs"]["latent"] = ["5", 0]
    graph["50"]["inputs"]["model"] = ["60", 0]
    assert leading_to(graph, "40") == {"5"}
    graph["5"]["inputs"]["model"] = ["40", 0]
    assert leading_to(graph, "40") == {"5"}
    graph["50"]["inputs"]["positive"] = ["40", 1]
    assert leading_to(graph, "40") == {"5", "50"}


def test_links_in_a_circle_end() -> None:
    graph = medium()
    graph["41"] = node("Reroute", **{"": ["42", 0]})
    graph["42"] = node("Reroute", **{"": ["41", 0]})
    graph["5"]["inputs"].update(model=["41", 0], positive=["5", 0], latent=["5", 0])
    assert set(check(graph, files_under(None))) == {"5"}


@pytest.mark.parametrize("content", ["{}", "[1]", "nothing", '{"nodes": [1], "links": []}',
                                     '{"1": {"class_type": "KSampler"}}'])  # fmt: skip
def test_the_command_refuses_what_is_no_workflow(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "workflow.json"
    path.write_text(content, encoding="utf-8")
    assert main([str(path)]) == 2
    assert "workflow.json" in capsys.readouterr().err


def test_the_command_says_what_it_sees_and_ends_by_its_severity(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "workflow.json"

    def run(change: Change, *arguments: str) -> int:
        graph = medium()
        change(graph)
        path.write_text(json.dumps(graph), encoding="utf-8")
        return main([str(path), "--models", str(models), *arguments])

    assert run(lambda g: None) == 0 and "Nothing to say" in capsys.readouterr().out
    assert run(set_to("5", cfg=15.0)) == 0 and "warning: cfg is 15" in capsys.readouterr().out
    assert run(set_to("5", cfg=15.0), "--strict") == 1
    assert run(control("large_canny.safetensors")) == 1
    assert "error: The canny ControlNet was made for" in capsys.readouterr().out


def test_files_outside_the_models_folder_are_never_looked_at(tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"")
    (tmp_path / "models" / "loras").mkdir(parents=True)
    find = files_under(tmp_path / "models")
    assert find("loras", "../../secret.safetensors") is None
    assert find("loras", str(tmp_path / "secret.safetensors")) is None
