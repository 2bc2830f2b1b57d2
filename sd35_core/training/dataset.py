"""A folder of pictures with captions -> what a training run reads: latents and token ids."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.tensor_file import read_file
from ..encoders.autoencoder import Autoencoder
from ..encoders.hints import made_hint, vae_input
from ..encoders.t5 import t5_rows
from ..encoders.text_encoder import KINDS, Tokenize, padded_tokens
from ..errors import SettingError
from ..network.latent import PIXELS

Examples = dict[str, Tensor]
"""latents (N, C, H, W) fp16 on the VAE's scale; tokens_l and tokens_g (N, 77) int32, and
tokens_l_empty and tokens_g_empty (77,), the caption without words; tokens_t5 (N, L) and
tokens_t5_empty (L,) where T5 reads too. Captions that a host encoded have in place of tokens
context (N, L, C) and pooled (N, P), those of the caption without words, context_empty (L, C) and
pooled_empty (P,), and clip (2,): the number of the CLIPs' rows, and of CLIP-L's columns. Where
captions are not equally long, rows (N, 2) int64 and rows_empty (2,) are how many of the CLIPs' rows
and of T5's count; those behind stand for words that are not there."""
PER_PICTURE = (
    "latents", "tokens_l", "tokens_g", "tokens_t5", "hints", "context", "pooled", "rows",
)  # fmt: skip
"""Tensors of examples whose rows are pictures; the others hold for all."""

Size = tuple[int, int]
DEPTH = ".depth.png"
LEAST_SIDE = PIXELS
"""Of a picture, which is a cell of a latent then; smaller ones hold nothing."""
TOKEN = 2 * PIXELS
"""Pixels of what becomes a token of published models, each way."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_folder(
    folder: Path,
    sizes: list[Size],
    autoencoder: Autoencoder,
    tokenize: Tokenize,
    controlnet: str = "",
    tokenize_t5: Tokenize | None = None,
) -> list[Examples]:
    """All pictures in a folder, each with the caption in the .txt file of the same name.

    A picture goes to the (width, height) of `sizes` whose shape is nearest to its own: it is scaled
    to fill it, and what juts out is cut off. One group per size that got pictures. With
    `controlnet` (blur, canny or depth) each example gets its hint too. Raises SettingError for a
    folder without pictures, a picture that can't be read, a missing caption or depth map.
    """
    paths = captioned_in(folder)
    latents: dict[Size, list[Tensor]] = defaultdict(list)
    hints: dict[Size, list[Tensor]] = defaultdict(list)
    captions: dict[Size, list[str]] = defaultdict(list)
    for path in paths:
        pixels, size = read_picture(path, sizes)
        latents[size].append(encoded_picture(autoencoder, pixels[None]))
        if controlnet:
            hints[size].append(encoded_hint(autoencoder, hint_of(path, pixels, size, controlnet)))
        captions[size].append(caption_of(path))
    return [
        {"latents": torch.cat(latents[size]), **tokens_of(captions[size], tokenize, tokenize_t5)}
        | ({"hints": torch.cat(hints[size])} if controlnet else {})
        for size in latents
    ]


def pictures_in(folder: Path) -> list[Path]:
    """In the order of their names, without depth maps. Raises SettingError where there are none."""
    if not folder.is_dir():
        raise SettingError(f"images: '{folder}' is not a folder.")
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in PICTURES and not path.name.endswith(DEPTH)
    )
    if not paths:
        kinds = ", ".join(PICTURES)
        raise SettingError(f"images: '{folder}' has no pictures; looked for {kinds} files.")
    return paths


def captioned_in(folder: Path) -> list[Path]:
    """The same. Raises SettingError where one has no caption too."""
    paths = pictures_in(folder)
    bare = [path for path in paths if not path.with_suffix(".txt").is_file()]
    if bare:
        raise SettingError(
            f"images: '{bare[0].name}' has no caption ({len(bare)} of {len(paths)} have none). "
            f"Write one into '{bare[0].with_suffix('.txt')}'; an empty file is allowed."
        )
    return paths


def captioned_pictures(folder: Path, sizes: list[Size]) -> list[tuple[Tensor, Size, str]]:
    """Pictures (3, H, W) uint8 as `read_picture` gives them, with their captions."""
    return [(*read_picture(path, sizes), caption_of(path)) for path in captioned_in(folder)]


def caption_of(picture: Path) -> str:
    """What the .txt file beside a picture says. Raises SettingError for one that is no UTF-8."""
    path = picture.with_suffix(".txt")
    try:
        return path.read_text(encoding="utf-8-sig").strip()  # Windows' editors put a mark before
    except UnicodeDecodeError as error:
        raise SettingError(f"images: '{path}' is not UTF-8 ({error}). Save it as that.") from error


def captions_in(folder: Path) -> list[str]:
    """Of the pictures in a folder that have one."""
    pictures = pictures_in(folder)
    return [caption_of(path) for path in pictures if path.with_suffix(".txt").is_file()]


def hint_of(path: Path, pixels: Tensor, size: Size, controlnet: str) -> Tensor:
    """What the VAE sees of a picture's hint, (1, H, W, 3); pixels: (3, H, W) uint8."""
    if controlnet == "depth":
        beside = path.with_name(path.stem + DEPTH)
        if not beside.is_file():
            raise SettingError(f"images: '{path.name}' has no depth map; expected '{beside}'.")
        pixels, _ = read_picture(beside, [size])
    picture = pixels.permute(1, 2, 0)[None].float() / 255
    return vae_input(made_hint(picture, controlnet), "2b", controlnet)


def read_picture(path: Path, sizes: list[Size]) -> tuple[Tensor, Size]:
    """(3, H, W) uint8, scaled and cut to the nearest of `sizes`; transparency becomes white."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            turned = ImageOps.exif_transpose(opened)
            if turned.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
                turned = turned.point(lambda value: value * (1 / 257)).convert("L")
            image = turned.convert("RGBA")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        raise SettingError(f"images: '{path}' can't be read as a picture: {error}") from error
    ground = Image.new("RGBA", image.size, "white")
    return fitted(Image.alpha_composite(ground, image).convert("RGB"), sizes, f"'{path}'")


def fitted(picture: Any, sizes: list[Size], name: str = "a picture") -> tuple[Tensor, Size]:
    """A picture of Pillow's in RGB as (3, H, W) uint8, as `read_picture` gives it.

    Raises SettingError for one that is smaller than a token.
    """
    from PIL import Image, ImageOps

    if min(picture.size) < LEAST_SIDE:
        raise SettingError(
            f"images: {name} has {picture.width}x{picture.height} pixels, too few to learn from; "
            f"{LEAST_SIDE}x{LEAST_SIDE} are the least. Take it away, or use a larger one."
        )
    shape = picture.width / picture.height
    size = min(sizes, key=lambda s: max(shape * s[1] / s[0], s[0] / s[1] / shape))
    fit = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    values = torch.frombuffer(bytearray(fit.tobytes()), dtype=torch.uint8)
    return values.view(size[1], size[0], 3).permute(2, 0, 1), size


def picture_of(pixels: bytes, size: Size) -> Any:
    """Rows of red, green and blue bytes as a picture of Pillow's."""
    from PIL import Image

    return Image.frombytes("RGB", size, pixels)


def shapes_near(side: int) -> list[Size]:
    """Sizes of about side x side pixels, from 2:1 to 1:2, whose sides are multiples of a token's
    16 pixels."""
    found = []
    for wide, high in ((1, 1), (4, 3), (3, 2), (16, 9), (2, 1)):
        width, height = (
            max(TOKEN, TOKEN * round(side * part / TOKEN))
            for part in ((wide / high) ** 0.5, (high / wide) ** 0.5)
        )
        found += [(width, height), (height, width)]
    return list(dict.fromkeys(found))


def encoded_picture(autoencoder: Autoencoder, pictures: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> latents, (B, 16, H / 8, W / 8) of a VAE, fp16, on its scale."""
    return _latents(autoencoder, pictures.float() / 255)


def encoded_hint(autoencoder: Autoencoder, seen: Tensor) -> Tensor:
    """The same of what the VAE sees of hints, (B, H, W, 3), -1 being black and 1 white."""
    return _latents(autoencoder, (seen.movedim(-1, 1) + 1) / 2)


@torch.no_grad()
def _latents(autoencoder: Autoencoder, image: Tensor) -> Tensor:
    image = image.contiguous(memory_format=torch.channels_last)
    with torch.autocast(image.device.type, torch.bfloat16):
        return autoencoder.encode(image).contiguous().half()


def tokens_of(
    captions: list[str], tokenize: Tokenize, tokenize_t5: Tokenize | None = None
) -> Examples:
    """Padded ids of both CLIPs, and of T5 where its tokenizer is given, and those of the caption
    without words."""
    ids = [tokenize(caption) for caption in ["", *captions]]
    tensors = {}
    for name, kind in KINDS.items():
        rows = torch.tensor([padded_tokens(row, kind(1, 1, 1)) for row in ids], dtype=torch.int32)
        key = name.replace("clip", "tokens")
        tensors |= {key: rows[1:].clone(), f"{key}_empty": rows[0].clone()}
    if tokenize_t5 is not None:
        rows = t5_rows(["", *captions], tokenize_t5).int()
        tensors |= {"tokens_t5": rows[1:].clone(), "tokens_t5_empty": rows[0].clone()}
    return tensors


def parted(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Those to learn from and a share to judge by, one at least of each.

    Raises SettingError for a share or a group that allows no such parting.
    """
    count = len(examples["latents"])
    held = max(1, round(share * count))
    if not 0 < share < 1 or held >= count:
        raise SettingError(
            f"held_out is {share:g} of a group of {count} pictures; it is a share between 0 and 1 "
            "that leaves pictures to learn from in every size. Lower it, or add pictures."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    kept, judged = (
        {key: t[rows] if key in PER_PICTURE else t for key, t in examples.items()}
        for rows in (order[held:].sort().values, order[:held].sort().values)
    )
    return kept, judged


def read_examples_file(path: str) -> Examples:
    """A group of examples. Raises CheckpointError or SettingError for a file without them."""
    tensors, _ = read_file(path)
    wanted = ("latents", "tokens_l", "tokens_g", "tokens_l_empty", "tokens_g_empty")
    if "context" in tensors:
        wanted = ("latents", "pooled", "context_empty", "pooled_empty", "clip")
        wanted += ("rows_empty",) if "rows" in tensors else ()
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise SettingError(f"'{path}' has no examples to train on: it lacks {missing[0]}.")
    return tensors
