"""A folder of pictures with captions, and the whole training program run on one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sd35_core.checkpoint.loading import load
from sd35_core.checkpoint.tensor_file import read_file
from sd35_core.encoders.autoencoder import TinyAutoencoder
from sd35_core.encoders.t5 import t5_tokenizer
from sd35_core.encoders.text_encoder import END, START, tokenizer
from sd35_core.errors import SD35Error, SettingError
from sd35_core.pipeline import Pipeline
from sd35_core.pipeline import main as draw
from sd35_core.training import watching
from sd35_core.training.__main__ import main
from sd35_core.training.config import read_config
from sd35_core.training.dataset import captions_in, read_folder, read_picture
from sd35_core.training.drawing import BAND, SIDE, strip_of
from sd35_core.training.run import Run
from sd35_core.training.trained import Trained
from tools import host as hosts

from .models import words_as_tokens

ROOT = Path(__file__).resolve().parents[2]


def test_every_picture_goes_to_the_nearest_shape(folder: Path) -> None:
    groups = read_folder(folder, [(32, 32), (64, 32)], TinyAutoencoder(), words_as_tokens)
    shapes = sorted(tuple(group["latents"].shape) for group in groups)
    assert shapes == [(4, 16, 4, 4), (4, 16, 4, 8)]
    for group in groups:
        assert group["tokens_l"].shape == (4, 77) and group["tokens_l"][0, 0] == START
        assert group["tokens_l_empty"][:2].tolist() == [START, END]
        assert group["tokens_g"][0, 4:6].tolist() == [END, 0]


def test_a_picture_is_filled_and_cut_at_the_centre(tmp_path: Path) -> None:
    wide = Image.new("RGBA", (60, 20), "red")
    wide.paste((0, 0, 255, 255), (20, 0, 40, 20))
    wide.save(tmp_path / "wide.png")
    pixels, size = read_picture(tmp_path / "wide.png", [(16, 16)])
    assert size == (16, 16) and pixels.shape == (3, 16, 16)
    assert pixels[:, 8, 8].tolist() == [0, 0, 255] and pixels[0, :, 2:14].max() == 0
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png", [(8, 8)])[0].min() == 255


def without_pictures(folder: Path) -> None:
    for path in folder.glob("*.png"):
        path.unlink()


def with_a_broken_picture(folder: Path) -> None:
    content = (folder / "blue.png").read_bytes()
    (folder / "blue.png").write_bytes(content[:60])


def with_a_text_as_picture(folder: Path) -> None:
    (folder / "blue.png").write_text("no picture", "utf-8")


def without_a_caption(folder: Path) -> None:
    (folder / "green.txt").unlink()


def with_a_caption_in_another_coding(folder: Path) -> None:
    (folder / "green.txt").write_bytes("a café".encode("cp1252"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (with_a_caption_in_another_coding, r"green\.txt' is not UTF-8"),
        (without_pictures, r"has no pictures; looked for \.png"),
        (with_a_broken_picture, r"blue\.png' can't be read as a picture"),
        (with_a_text_as_picture, r"blue\.png' can't be read as a picture"),
        (without_a_caption, r"'green\.png' has no caption \(1 of 8 have none\)"),
    ],
)
def test_a_bad_folder_is_refused(spoil: Callable[[Path], None], said: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(SettingError, match=said):
        read_folder(folder, [(32, 32)], TinyAutoencoder(), words_as_tokens)


def test_a_mark_that_editors_put_before_a_caption_is_none_of_it(folder: Path) -> None:
    (folder / "green.txt").write_text("a green square", encoding="utf-8-sig")
    assert "a green square" in captions_in(folder)


def test_16_bits_of_grey_are_read_whole(tmp_path: Path) -> None:
    values = np.full((16, 16), 20000, np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    pixels, _ = read_picture(tmp_path / "grey.png", [(16, 16)])
    assert pixels.unique().tolist() == [77]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="is not a folder"):
        read_folder(tmp_path / "nowhere", [(32, 32)], TinyAutoencoder(), words_as_tokens)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"lacks vocab\.json and merges\.txt"):
        tokenizer(tmp_path)


@pytest.fixture
def program(folder: Path, clip_files: Path) -> Path:
    """A configuration for a real run on the folder, with samples."""
    torch.manual_seed(0)
    save_file(TinyAutoencoder().state_dict(), folder.parent / "vae.safetensors")
    file = folder.parent / "run.toml"
    file.write_text(
        "images = 'pictures'\noutput = 'run'\nvae = 'vae.safetensors'\n"
        f"tokenizer = {str(clip_files)!r}\nsizes = [[32, 32], [64, 32]]\n"
        "samples = ['a red square', 'a blue square']\nrandom_crops = 0.3\n"
        "depth = 2\ndual_blocks = 1\npos_embed_max_size = 8\ncontext_dim = 64\n"
        "clip_l = [16, 2, 2]\nclip_g = [16, 2, 2]\nbatch = 4\nsteps = 6\nsave_every = 3\n"
        "bf16 = false\n[metadata]\nlicence = 'MIT'\n",
        encoding="utf-8",
    )
    return file


def test_the_program_trains_on_a_folder_and_writes_a_checkpoint(program: Path) -> None:
    assert main([str(program)]) == 0
    out = program.parent / "run"
    drawn = [Image.open(path).size for path in sorted((out / "samples").glob("*.png"))]
    assert drawn in ([(64, 32)] * 2, [(128, 32)] * 2), "two captions at steps 3 and 6"
    strip = Image.open(out / "samples.png")
    assert strip.size == (drawn[0][0], 2 * (BAND + 32))
    last = Image.open(out / "samples" / "000006.png").convert("RGB")
    assert strip.crop((0, 2 * BAND + 32, *strip.size)).tobytes() == last.tobytes()
    tensors, metadata = read_file(out / "model.safetensors")
    assert '"steps_trained": 6' in metadata["sd35_config"] and "MIT" in metadata["sd35_config"]
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    assert "first_stage_model.taesd_decoder.1.weight" in tensors
    assert "text_encoders.clip_g.transformer.text_projection.weight" in tensors
    network = load(out / "model.safetensors").config
    assert network == read_config(program).network


def test_the_strip_has_the_newest_rows_and_few_of_the_older(tmp_path: Path) -> None:
    for step in range(1, 41):
        Image.new("RGB", (64, 32), (step, 0, 0)).save(tmp_path / f"{step:06}.png")
    (tmp_path / "000041.png").write_bytes(b"damaged")
    Image.new("RGB", (64, 32), "white").save(tmp_path / "000099.png")

    def rows(step: int) -> list[int]:
        strip = strip_of(tmp_path, step)
        return [strip.getpixel((9, top + BAND))[0] for top in range(0, strip.height, BAND + 32)]

    assert rows(1) == [1] and rows(16) == list(range(1, 17))
    assert rows(40) == [1, 5, 9, 14, 18, 23, 27, 32, *range(33, 41)]
    assert rows(41)[-7:] == list(range(34, 41)) and len(rows(41)) == 15, "without the damaged one"
    for step in range(1, 17):
        Image.new("RGB", (1024, 512), "red").save(tmp_path / f"{step:06}.png")
    large = strip_of(tmp_path, 16)
    assert max(large.size) <= SIDE and large.height > SIDE - 32
    Image.new("RGB", (2 * SIDE, 64), "red").save(tmp_path / "000001.png")
    assert strip_of(tmp_path, 1).size == (SIDE, BAND + 32)


def test_where_nobody_watches_a_line_tells_how_far_it_is(
    program: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watching, "MINUTE", -1.0)
    with caplog.at_level("INFO", logger="sd35"):
        assert main([str(program)]) == 0
    said = [line for line in caplog.messages if re.fullmatch(r"step \d of 6, loss \d\.\d{4}", line)]
    assert len(said) == 6


def test_prompts_are_padded_as_asked_and_never_cut(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (program.parent / "pictures" / "red.txt").write_text("a red square " * 6, encoding="utf-8")
    seen: set[int] = set()
    encode = Trained.encode

    def watched(self: Trained, tokens_l: torch.Tensor, *rest: Any, **more: Any) -> Any:
        seen.add(tokens_l.shape[1])
        return encode(self, tokens_l, *rest, **more)

    monkeypatch.setattr(Trained, "encode", watched)
    text = program.read_text(encoding="utf-8")
    text = text.replace("depth = 2", "prompt_tokens = 8\ncaption_dropout = 0.0\ndepth = 2")
    program.write_text(text, encoding="utf-8")
    run = Run(read_config(program))
    for _ in range(12):
        run.advance()
    assert seen == {8, 20}, "start, eighteen words, end"
    for prompt, columns in (("a red square", 8), ("a red square " * 6, 20), ("red " * 99, 77)):
        pipeline = Pipeline(
            run.model.diffusion_model, run.model.encoders, TinyAutoencoder(), words_as_tokens,
            tokens=8,
        )  # fmt: skip
        assert pipeline.encode([prompt])[0].shape[1] == columns


@pytest.mark.parametrize("channels", [1, 3])
def test_it_learns_pixels_without_a_vae_and_draws_them(program: Path, channels: int) -> None:
    text = program.read_text(encoding="utf-8")
    text = text.replace("vae = 'vae.safetensors'", f"pixels = {channels}\npatch = 8")
    program.write_text(text, encoding="utf-8")
    assert main([str(program)]) == 0
    out = program.parent / "run"
    config = load(out / "model.safetensors").config
    assert (config.in_channels, config.patch_size) == (channels, 8)
    assert not any("first_stage" in key for key in read_file(out / "model.safetensors")[0])
    command = ["sample", str(out), "--steps", "2"]
    command += ["--prompt", "a red square", "--prompt", "a blue square"]
    assert draw(command) == 0 and draw([*command, "--seed", "1"]) == 0
    first, second = (Image.open(out / name) for name in ("sample.png", "sample_2.png"))
    assert first.size in ((32, 64), (64, 64)) and first.tobytes() != second.tobytes()
    assert draw([*command, "--size", "0x32"]) == 1
    red, green, blue = first.split()
    assert (red.tobytes() == green.tobytes() == blue.tobytes()) == (channels == 1)


def test_t5_reads_on_where_clip_ends(program: Path, comfyui: hosts.Host) -> None:
    words = comfyui.folder / "comfy" / "text_encoders" / "t5_tokenizer"
    text = program.read_text(encoding="utf-8").replace(
        "[metadata]", "t5xxl = [24, 2, 2]\n[metadata]"
    )
    program.write_text(f"tokenizer_t5 = {str(words)!r}\n{text}", encoding="utf-8")
    assert main([str(program)]) == 0
    path, clip = program.parent / "run" / "model.safetensors", read_config(program).tokenizer
    pipeline = Pipeline.load(path, tokenizer(Path(clip)), t5_tokenizer(words))
    long = "a red square " * 30
    short, whole = (pipeline.encode([caption])[0] for caption in ("a red square", long))
    assert short.shape[1] == 77 + 77 and 77 + 90 < whole.shape[1] < 77 + 200
    assert torch.equal(pipeline.encode([long], without="t5xxl")[0], whole[:, :77])
    ends = (pipeline.encode([f"{long} {word}"])[0] for word in ("left", "right"))
    first, second = ends
    assert torch.equal(first[:, :77], second[:, :77]) and not torch.equal(first, second)
    deaf = Pipeline.load(path, tokenizer(Path(clip)))
    assert torch.equal(deaf.encode([long])[0], whole[:, :77]), "without T5's tokenizer"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("pixels = 2", "pixels is 2; it can be 1"),
        ("pixels = 1\nvae = 'vae.safetensors'", "without a VAE"),
        ("pixels = 3\npatch = 5", r"multiples of 5, such as \[40, 30\]"),
        ("patch = 1000", "the side of a patch"),
        ("patch = 0", "the side of a patch can be 1 to 16"),
        ("t5xxl = [24, 2]", r"t5xxl is \[24, 2\]; it should be a width, heads"),
        ("t5xxl = [24, 5, 2]", "heads that share it evenly"),
        ("t5xxl = ['a', 2, 2]", "t5xxl is"),
        ("", "needs the key 'vae' too"),
    ],
)
def test_pixels_that_can_not_be_are_refused(program: Path, change: str, said: str) -> None:
    text = program.read_text(encoding="utf-8").replace("vae = 'vae.safetensors'", change)
    program.write_text(text, encoding="utf-8")
    with pytest.raises(SD35Error, match=said):
        read_config(program)


def test_drawing_says_what_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert draw(["sample", str(tmp_path), "--prompt", "a dog"]) == 1
    assert "Name a folder with CLIP's tokenizer" in caplog.text
    for config in ("[", "[1]", '{"tokenizer": 5}', "[" * 90_000):
        save_file({"a": torch.zeros(1)}, tmp_path / "state.safetensors", {"config": config})
        assert draw(["sample", str(tmp_path), "--prompt", "a dog"]) == 1
    assert caplog.text.count("Name a folder with CLIP's tokenizer") == 5
    assert draw(["sample", str(tmp_path), "--prompt", "a", "--tokenizer", str(tmp_path)]) == 1
    assert "lacks vocab.json" in caplog.text


def started(program: Path, before: str = "") -> subprocess.Popen[str]:
    run = "import sys\nfrom sd35_core.training.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", f"{before}\n{run}", str(program)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_finishes_the_step_and_saves(program: Path) -> None:
    text = program.read_text(encoding="utf-8").replace("steps = 6\n", "steps = 100000\n")
    program.write_text(text.replace("save_every = 3\n", "save_every = 20\n"), encoding="utf-8")
    run = started(program)
    state = program.parent / "run" / "state.safetensors"
    deadline = time.monotonic() + 120
    while not state.exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(run.pid, signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and "stopped at step" in output, output
    resumed = Run(read_config(program))
    resumed.resume()
    assert f"stopped at step {resumed.step} of 100000" in output
    assert (program.parent / "run" / "model.safetensors").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(program: Path) -> None:
    """The system refuses to write more than 100 kB into one file, as a full disk would."""
    assert main([str(program)]) == 0
    state = program.parent / "run" / "state.safetensors"
    before = state.read_bytes()
    text = program.read_text(encoding="utf-8").replace("steps = 6\n", "steps = 9\n")
    program.write_text(text, encoding="utf-8")
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    run = started(program, limit)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 1, output
    assert "state.safetensors' could not be written" in output and "Traceback" not in output
    assert state.read_bytes() == before
    assert not list(state.parent.glob("*.partial"))
