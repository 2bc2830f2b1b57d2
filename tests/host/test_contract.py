"""Saved workflows keep working: ids, inputs and outputs stay as they landed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from sd35_core.workflow.own_nodes import NAMES
from tools import contract
from tools import host as hosts

LOADER, SAMPLER, HINT = "SD35Loader", "SD35Sampler", "SD35ControlHint"
NEW = {"id": "new", "type": "FLOAT", "required": False, "default": 1.0}
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def served(server: hosts.Server) -> dict[str, Any]:
    return contract.contract(hosts.call(server.url, "/object_info"))


def changed(change: Change) -> tuple[dict[str, Any], dict[str, Any]]:
    """What landed, and a copy that was changed."""
    old = contract.landed()
    new = copy.deepcopy(old)
    change(new)
    return old, new


def given(nodes: dict[str, Any], node: str, key: str) -> dict[str, Any]:
    return next(each for each in nodes[node]["inputs"] if each["id"] == key)


def test_the_nodes_that_are_served_are_those_of_the_table(server: hosts.Server) -> None:
    info = hosts.call(server.url, "/object_info")
    ours = {key: node for key, node in info.items() if node["category"].startswith("SD3.5")}
    assert {key: node["display_name"] for key, node in ours.items()} == NAMES


def test_nothing_that_landed_has_changed(served: dict[str, Any]) -> None:
    assert contract.broken(contract.landed(), served) == []


def test_everything_that_is_served_has_landed(served: dict[str, Any]) -> None:
    new = contract.absent(contract.landed(), served)
    assert not new, f"Not in tests/data/nodes.json: {new}. Run {contract.COMMAND} and commit it."


def test_lists_of_files_are_no_part_of_the_contract() -> None:
    text = contract.LANDED.read_text(encoding="utf-8")
    assert ".safetensors" not in text and "from model file" not in text
    assert "options" in given(contract.landed(), LOADER, "weight_dtype")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n: n.pop(LOADER), "SD35Loader is gone"),
        (lambda n: n[LOADER]["inputs"].pop(), "input 6 was modulation_cache and is gone"),
        (lambda n: n[LOADER]["inputs"].reverse(), "input 0 was model and is modulation_cache"),
        (lambda n: n[LOADER]["inputs"].insert(1, NEW), "input 1 was clip_l and is new"),
        (lambda n: n[LOADER]["inputs"].append({**NEW, "required": True}), "new is required"),
        (lambda n: given(n, LOADER, "model").update(required=False), "required of input model"),
        (lambda n: given(n, SAMPLER, "steps").update(type="FLOAT"), "was 'INT' and is 'FLOAT'"),
        (lambda n: given(n, SAMPLER, "steps").update(default=28), "default .* 40 and is 28"),
        (lambda n: given(n, SAMPLER, "schedule")["options"].pop(), "options of input schedule"),
        (lambda n: given(n, SAMPLER, "schedule")["options"].reverse(), "options of input schedule"),
        (lambda n: n[HINT]["outputs"].reverse(), "output 0 was .*hint.* and is .*seen"),
        (lambda n: n[HINT]["outputs"].pop(), "output 1 was .*seen.* and is gone"),
    ],
)
def test_a_change_that_breaks_workflows_is_refused_in_words(change: Change, words: str) -> None:
    with pytest.raises(contract.ContractError, match=words):
        contract.extended(*changed(change))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda n: n.update(SD35New={"inputs": [], "outputs": []}), "SD35New"),
        (lambda n: n[LOADER]["inputs"].append(NEW), "SD35Loader.new"),
        (lambda n: given(n, SAMPLER, "schedule")["options"].insert(1, "x"), "schedule: x"),
        (lambda n: n[HINT]["outputs"].append({"name": "x", "type": "MASK"}), "output x"),
    ],
)
def test_what_is_new_is_named_until_it_is_added(change: Change, named: str) -> None:
    old, new = changed(change)
    assert named in " ".join(contract.absent(old, new))
    assert contract.absent(contract.extended(old, new), new) == []
