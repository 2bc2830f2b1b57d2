"""The Chinese words of the nodes, as a running server gives them to its front end."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tools import host as hosts

from ..conftest import PACK

CHINESE = re.compile("[\u4e00-\u9fff]")
SYNTAX = re.compile(r"[{}@$|]")
"""What vue-i18n, which the front end uses, reads as more than text."""
Words = dict[tuple[str, ...], str]


@pytest.fixture(scope="module")
def nodes(server: hosts.Server) -> dict[str, Any]:
    info = hosts.call(server.url, "/object_info")
    return {name: node for name, node in info.items() if node["category"] == "SD3.5"}


@pytest.fixture(scope="module")
def words(server: hosts.Server) -> Words:
    return flat(hosts.call(server.url, "/i18n")["zh"]["nodeDefs"])


def flat(tree: dict[str, Any]) -> Words:
    """{"a": {"b": "c"}} -> {("a", "b"): "c"}."""
    found: Words = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found.update({(key, *rest): text for rest, text in flat(value).items()})
        else:
            found[(key,)] = value
    return found


def expected(nodes: dict[str, Any]) -> set[tuple[str, ...]]:
    """Where a text belongs: the node's own two, and two for every input and output."""
    places = set()
    for name, node in nodes.items():
        kinds = [node["input"].get(kind, {}) for kind in ("required", "optional")]
        keys = [("inputs", key) for kind in kinds for key in kind]
        keys += [("outputs", str(index)) for index in range(len(node["output"]))]
        places |= {(name, "display_name"), (name, "description")}
        places |= {(name, *key, part) for key in keys for part in ("name", "tooltip")}
    return places


def test_every_node_input_and_output_has_chinese_words(nodes: dict[str, Any], words: Words) -> None:
    assert sorted(expected(nodes) - set(words)) == []


def test_no_words_are_there_for_something_that_is_not(nodes: dict[str, Any], words: Words) -> None:
    assert sorted(set(words) - expected(nodes)) == []


def test_all_words_are_chinese_but_the_names_of_inputs_and_outputs(words: Words) -> None:
    latin = [key for key, text in words.items() if not CHINESE.search(text)]
    assert [key for key in latin if key[-1] != "name"] == []
    assert all(words[key] for key in latin)


def test_the_canvas_commands_have_chinese_words(server: hosts.Server) -> None:
    script = (PACK / "web" / "sd35.js").read_text(encoding="utf-8")
    commands = {name.replace(".", "_") for name in re.findall(r'id: "(SD35\.\w+)"', script)}
    found = hosts.call(server.url, "/i18n")["zh"]["commands"]
    assert commands and {name for name in found if name.startswith("SD35")} == commands
    assert all(CHINESE.search(found[name]["label"]) for name in commands)


def test_no_text_holds_a_sign_that_the_front_end_takes_for_code(words: Words) -> None:
    assert [key for key, text in words.items() if SYNTAX.search(text)] == []
