"""What strangers' workflows cost the canvas: an answer or a refusal, soon, whatever is in them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from sd35_core.errors import SettingError
from sd35_core.sampling.guidance import parse_layers
from sd35_core.sampling.schedules import MOST_STEPS, make_sigmas
from sd35_core.workflow.__main__ import main
from sd35_core.workflow.graph import LARGEST_NUMBER, LONGEST_TEXT, TooLargeError, bounded_value
from sd35_core.workflow.panels import LARGEST_ANSWER, answer, layers_within

from ..conftest import PACK
from .hostile_plans import HOSTILE, sampler

SECONDS = 0.5


def asked(workflow: Any) -> tuple[str, float]:
    """The answer or the refusal, and the seconds of this processor that it took."""
    body = json.dumps(workflow).encode()
    start = time.thread_time()
    try:
        found = answer(body, lambda folder, name: None, SECONDS)
    except SettingError as error:
        found = str(error)
        assert "\n" not in found and len(found) < 3_000
    return found, time.thread_time() - start


@pytest.mark.parametrize("name", HOSTILE)
def test_a_strangers_workflow_is_answered_within_its_budget(name: str) -> None:
    found, seconds = asked(HOSTILE[name])
    assert seconds < 4 * SECONDS, "a slow machine takes a while between two looks at the clock"
    assert len(found) <= 2 * LARGEST_ANSWER and "\x1b" not in found and "\u202e" not in found


@pytest.mark.parametrize("name", ["twenty thousand samplers", "skips in a row"])
def test_what_takes_longer_is_refused_in_words(name: str) -> None:
    assert "too large to check" in asked(HOSTILE[name])[0]


@pytest.mark.parametrize(
    "body",
    [b"[" * 2_000_000, b'{"a":' * 400_000, b"\xff\xfe", b"", b"[]", b"5", b'{"1": "\xff"}',
     b'{"nodes": 5, "links": []}', b'{"nodes": [], "links": [[]]}', b'{"nodes": [1], "links": []}',
     b'{"1": ' + b"9" * 5_000 + b"}"],
)  # fmt: skip
def test_what_is_no_workflow_is_refused_in_words(body: bytes) -> None:
    with pytest.raises(SettingError, match=r"[A-Z].*\."):
        answer(body, lambda folder, name: None, SECONDS)


def test_a_prompt_with_other_things_beside_it_is_read() -> None:
    found, _ = asked({"prompt": {"7": sampler()}, "nodes": 5})
    assert len(json.loads(found)["7"]["sigmas"]) == 21


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (float("nan"), None), (float("-inf"), None), (2**64 + 1, None), (-1e20, None), ({}, None),
        ([1, 2, 3], None), ([["x"], 0], None), (["1", "0"], None), (["1", 2**70], None),
        (LARGEST_NUMBER, LARGEST_NUMBER), (True, True), ("x", "x"), ([5, 0], ["5", 0]),
        ("x" * 20_000, "x" * LONGEST_TEXT), ("a\ud800b", "a?b"), ("狐", "狐"), (None, None),
    ],
)  # fmt: skip
def test_a_value_is_bounded_where_it_is_read(value: Any, seen: Any) -> None:
    assert bounded_value(value) == seen


@pytest.mark.parametrize("denoise", [1e-300, 5e-324, 19 / MOST_STEPS])
def test_a_schedule_has_an_end(denoise: float) -> None:
    with pytest.raises(SettingError, match="1,000,000 is the most. Raise denoise"):
        make_sigmas(20, 3.0, "normal", denoise)
    assert len(make_sigmas(20, 3.0, "simple", 20 / MOST_STEPS)) == 21


def test_the_command_line_ends_in_words_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hostile.json"
    for text in ("[" * 100_000, json.dumps(HOSTILE["skips in a row"]), "{}", "\ud800"):
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        assert main([str(file)]) in (0, 1, 2)
    with file.open("wb") as large:
        large.truncate(2**26 + 1)
    assert main([str(file)]) == 2 and "larger than 67 MB" in capsys.readouterr().err


def test_every_workflow_of_the_pack_is_answered_within_the_budget() -> None:
    for path in (PACK / "workflows").glob("*.json"):
        answer(path.read_bytes(), lambda folder, name: None, SECONDS)
    with pytest.raises(TooLargeError):
        answer(path.read_bytes(), lambda folder, name: None, 0.0)


@pytest.mark.parametrize(
    ("depth", "presets", "layers"),
    [(6, [], "1, 2"), (12, [], "3, 4"), (38, [], "11, 12, 14"), (4, [["x", "1"]], "1")],
)
def test_a_new_guidance_finds_layers_that_are_there(
    depth: int, presets: list[list[str]], layers: str
) -> None:
    assert layers_within(depth, presets) == layers
    assert parse_layers(layers, depth)
