"""Reading API workflows and setting their widgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from automation.errors import WorkflowError
from automation.workflow import overridden, read

from ..conftest import PACK

CLIP = ["1", 1]
NODES: dict[str, dict[str, Any]] = {
    "1": {"class_type": "Loader", "inputs": {"model": "a.safetensors", "tiled": False}},
    "2": {
        "class_type": "Text",
        "inputs": {"text": "x", "clip": CLIP},
        "_meta": {"title": "Prompt"},
    },
    "3": {"class_type": "Text", "inputs": {"text": "", "clip": CLIP}, "_meta": {"title": "v1.5"}},
    "4": {"class_type": "Sampler", "inputs": {"seed": 1, "cfg": 4.5, "positive": ["2", 0]}},
}


def test_widgets_are_set_by_title_class_or_id() -> None:
    changes = {"Prompt.text": "1 owl", "Sampler.seed": "7", "4.cfg": "3", "v1.5.text": "blurry"}
    found = overridden(NODES, {**changes, "1.tiled": "true"})
    assert found["2"]["inputs"]["text"] == "1 owl" and found["3"]["inputs"]["text"] == "blurry"
    assert found["4"]["inputs"] == {"seed": 7, "cfg": 3.0, "positive": ["2", 0]}
    assert found["1"]["inputs"]["tiled"] is True
    assert NODES["2"]["inputs"]["text"] == "x", "the workflow itself stays as it is"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("Promt.text", "x", "no node is called 'Promt'. Did you mean Prompt?"),
        ("Prompt.txt", "x", "has no widget 'txt'. Did you mean text?"),
        ("Text.text", "x", "fits several nodes: 2 (Prompt), 3 (v1.5). Name one by its id."),
        ("Sampler.positive", "x", "is connected to another node"),
        ("Sampler.seed", "many", "takes a number (it held 1); got 'many'"),
        ("1.tiled", "maybe", "takes true or false"),
        ("seed", 5, "names no widget"),
        ("zzz.seed", 5, "There are 1, 2, 3, 4, Loader, Prompt, Sampler, Text, v1.5."),
    ],
)
def test_an_override_that_fits_nothing_says_what_there_is(name: str, value: Any, says: str) -> None:
    with pytest.raises(WorkflowError) as error:
        overridden(NODES, {name: value})
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "can't be read as JSON"),
        ("[]", "holds no workflow"),
        ("{}", "holds no workflow"),
        ('{"1": 5}', "node 1 has no inputs"),
        ('{"1": {"inputs": {}}}', "node 1 has no class_type"),
    ],
)
def test_a_file_that_is_no_api_workflow_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(WorkflowError, match=says):
        read(path)


def test_a_canvas_workflow_says_how_to_export_it() -> None:
    with pytest.raises(WorkflowError, match=r"Export \(API\)"):
        read(PACK / "workflows" / "text_to_image.json")
