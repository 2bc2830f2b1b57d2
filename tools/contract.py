"""What saved workflows rely on: tests/data/nodes.json, the ids, inputs and outputs of all nodes.

    python tools/contract.py

adds what is new. It refuses to write when something that is there would change or vanish.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd35_core.whole_file import write_text
from tools import host

LANDED = host.PACK / "tests" / "data" / "nodes.json"
COMMAND = "python tools/contract.py"
CATEGORY = "SD3.5"
FOLDERS = ("checkpoints", "controlnet", "diffusion_models", "loras", "text_encoders", "vae")
A_FILE = "a_model.safetensors"
"""Stands in each folder of the host asked, so that lists of files are told from fixed options."""


class ContractError(Exception):
    """Something that landed would change."""


def landed() -> dict[str, Any]:
    return json.loads(LANDED.read_text(encoding="utf-8")) if LANDED.is_file() else {}


def contract(info: dict[str, Any]) -> dict[str, Any]:
    """Node id -> its inputs and outputs in order, from the answer of /object_info."""
    return {
        node_id: {
            "inputs": [
                described(key, node["input"][kind][key], kind == "required")
                for kind in ("required", "optional")
                for key in node["input_order"].get(kind, [])
            ],
            "outputs": [
                {"name": name, "type": kind}
                for name, kind in zip(node["output_name"], node["output"])
            ],
        }
        for node_id, node in info.items()
        if node["category"] == CATEGORY
    }


def described(key: str, spec: list[Any], required: bool) -> dict[str, Any]:
    """One input. A combo of files has no options here; a fixed one's default may be its first."""
    found = {"id": key, "type": spec[0], "required": required}
    settings = spec[1] if len(spec) > 1 else {}
    options = settings.get("options", [])
    if options and A_FILE not in options:
        found.update(options=options, default=options[0])
    if "default" in settings:
        found["default"] = settings["default"]
    return found


def broken(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What of `old` would change in `new`, a sentence each."""
    found = []
    for name, node in old.items():
        found += changes(name, node, new[name]) if name in new else [f"{name} is gone."]
    return found


def changes(name: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The same of one node."""
    found = []
    for index, (was, put) in enumerate(pairs(old["outputs"], new["outputs"])):
        if was is not None and was != put:
            found.append(f"{name}: output {index} was {was} and is {put or 'gone'}.")
    for index, (was, put) in enumerate(pairs(old["inputs"], new["inputs"])):
        if was is None:
            if put["required"]:
                found.append(f"{name}: the new input {put['id']} is required.")
        elif put is None or was["id"] != put["id"]:
            now = put["id"] if put else "gone"
            found.append(f"{name}: input {index} was {was['id']} and is {now}.")
        else:
            found += [
                f"{name}: {key} of input {was['id']} was {value!r} and is {put.get(key)!r}."
                for key, value in was.items()
                if not kept(key, value, put.get(key))
            ]
    return found


def pairs(old: list[Any], new: list[Any]) -> list[tuple[Any, Any]]:
    """Both lists side by side, None where one is shorter."""
    length = max(len(old), len(new))
    return list(zip(old + [None] * (length - len(old)), new + [None] * (length - len(new))))


def kept(key: str, was: Any, put: Any) -> bool:
    """New options may come anywhere; everything else stays as it was."""
    if key == "options":
        return [option for option in put or [] if option in was] == was
    return was == put


def absent(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What `new` has and `old` has not, by name."""
    found = []
    for name, node in new.items():
        if name not in old:
            found.append(name)
            continue
        before = {each["id"]: each for each in old[name]["inputs"]}
        for each in node["inputs"]:
            known = before.get(each["id"])
            if known is None:
                found.append(f"{name}.{each['id']}")
            elif "options" in known:
                added = [o for o in each.get("options", []) if o not in known["options"]]
                found += [f"{name}.{each['id']}: {option}" for option in added]
        outputs = node["outputs"][len(old[name]["outputs"]) :]
        found += [f"{name}, output {each['name']}" for each in outputs]
    return found


def extended(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with what is new. Raises ContractError when something of `old` would change."""
    problems = broken(old, new)
    if problems:
        raise ContractError(
            "Saved workflows would break, so nothing was written. Put back what landed; what is "
            "new comes after it and is optional.\n" + "\n".join(problems)
        )
    return {**old, **new}


def asked() -> dict[str, Any]:
    """The nodes as a host gives them that has a file in every folder of models."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name in FOLDERS:
            path = Path(folder) / "models" / name / A_FILE
            path.parent.mkdir(parents=True)
            path.touch()
        with host.Server(host.find_comfyui(), base=Path(folder)) as server:
            return contract(host.call(server.url, "/object_info"))


def main() -> int:
    try:
        before, now = landed(), asked()
        text = json.dumps(extended(before, now), indent=1, ensure_ascii=False)
    except (ContractError, host.HostError) as error:
        print(f"contract: {error}", file=sys.stderr)
        return 1
    write_text(LANDED, text + "\n", replace=True)
    print(f"Added to {LANDED.name}: {', '.join(absent(before, now)) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
