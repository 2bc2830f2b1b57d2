"""tools/demo.py before it starts anything, and what tools/host.py makes of odd answers."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import shutil
import sys
import tarfile
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from automation import outside
from tools import demo, host, install
from tools.nano import pictures

web = pytest.importorskip("aiohttp.web")

Prompt = dict[str, Any]


def node(**inputs: Any) -> Prompt:
    return {"class_type": "X", "inputs": inputs}


def test_a_prompt_is_set_through_the_nodes_on_its_way() -> None:
    prompt = {
        "1": node(positive=["2", 0]),
        "2": node(positive=["3", 0]),
        "3": node(conditioning=["4", 0]),
        "4": node(text="old"),
    }
    demo.set_prompt(prompt, "new")
    assert prompt["4"]["inputs"]["text"] == "new"


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ({"1": node(positive=["1", 0])}, "node 1 goes in a circle at node 1"),
        (
            {"1": node(positive=["2", 0]), "2": node(conditioning=["3", 0]),
             "3": node(positive=["2", 0])},
            "node 1 goes in a circle at node 2",
        ),
        ({"1": node(positive=["9", 0])}, "comes from ..9., 0., which is no node of it. Export"),
        ({"1": node(positive=[])}, "no node of it"),
        ({"1": node(positive=[["1"], 0])}, "no node of it"),
        ({"1": node(positive=[{}])}, "no node of it"),
        ({"1": node(positive="text")}, "no prompt that leads to a sampler's positive"),
    ],
)  # fmt: skip
def test_a_prompt_that_leads_nowhere_is_explained(prompt: Prompt, says: str) -> None:
    with pytest.raises(host.HostError, match=says):
        demo.set_prompt(prompt, "new")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[" * 100_000, "can't be read as JSON"),
        (b" " * (outside.LARGEST + 1), "more than 16 MB"),
        (b"\xff\xff", "can't be read as JSON"),
        (b'{"1": 5}', "is no API workflow"),
        (b"5", "is no API workflow"),
    ],
)
def test_a_file_that_is_no_workflow_is_explained(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(host.HostError, match=says):
        demo.read_workflow(tmp_path / "x.json")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes")
def test_a_pipe_is_no_workflow(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(host.HostError, match="it is no file"):
        demo.read_workflow(tmp_path / "x.json")


def out(path: Path | None, replace: bool = False) -> argparse.Namespace:
    return argparse.Namespace(out=path, replace=replace)


def test_a_place_where_nothing_can_be_saved_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.png"
    file.write_bytes(b"mine")
    demo.check_out(out(tmp_path / "neu" / "x.png"))
    demo.check_out(out(file, replace=True))
    for options, says in (
        (out(tmp_path), "is a folder. --out takes the name"),
        (out(tmp_path, replace=True), "is a folder"),
        (out(file), "mine.png is there already. Choose another --out, or add --replace"),
        (out(file / "x.png"), "Nothing can be written into .*mine.png"),
    ):
        with pytest.raises(host.HostError, match=says):
            demo.check_out(options)
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 15_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(host.HostError, match="has 15.0 MB free; 16 MB are needed. Make room"):
        demo.check_out(out(None))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(host.HostError, match="Nothing can be written into"):
        demo.check_out(out(None))


def test_nothing_is_fetched_for_a_picture_that_can_not_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetched(*_: Any) -> None:
        raise AssertionError("fetched")

    (tmp_path / "mine.png").write_bytes(b"mine")
    monkeypatch.setattr(host, "find_comfyui", fetched)
    monkeypatch.setattr(demo.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path / "mine.png")])
    assert demo.main() == 1 and "is there already" in capsys.readouterr().err


Answer = Callable[[Any], Any]


def given(data: Any) -> Answer:
    async def answer(request: Any) -> Any:
        return web.Response(body=data if isinstance(data, bytes) else json.dumps(data).encode())

    return answer


HISTORY = {"status": {"status_str": "success"}, "outputs": {"1": {"images": [{"filename": "x"}]}}}


@contextmanager
def serving(routes: dict[str, Answer], messages: tuple[str, ...] = ()) -> Iterator[str]:
    """A server that answers almost as ComfyUI: its URL. `messages` follow a prompt."""
    ready, ended, asked = threading.Event(), asyncio.Event(), asyncio.Event()
    found: dict[str, Any] = {}

    async def prompt(request: Any) -> Any:
        found["id"] = (await request.json())["prompt_id"]
        asked.set()
        return web.json_response({})

    async def socket(request: Any) -> Any:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        await asked.wait()
        for message in messages:
            await ws.send_str(message.replace("ID", found["id"]))
        end = {"type": "execution_success", "data": {"prompt_id": found["id"]}}
        await ws.send_str(json.dumps(end))
        await ws.close()
        return ws

    async def history(request: Any) -> Any:
        return web.json_response({request.match_info["id"]: HISTORY})

    async def serve() -> None:
        found["loop"] = asyncio.get_running_loop()
        app = web.Application()
        usual: dict[str, Answer] = {"/history/{id}": history, "/ws": socket}
        usual |= {"/view": given(b"picture"), "/object_info": given({"SD35Loader": {}})}
        for path, answer in {**usual, **routes}.items():
            app.router.add_get(path, answer)
        app.router.add_post("/prompt", prompt)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        ready.set()
        await ended.wait()
        await runner.cleanup()

    port = host.free_port()
    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        found["loop"].call_soon_threadsafe(ended.set)
        thread.join()


def picture(url: str, place: Path | None, replace: bool = False) -> None:
    options = argparse.Namespace(
        prompt="an owl", seed=1, workflow=place, out=place, replace=replace, host=url
    )
    demo.make_picture(url, options, {"1": node(positive=["2", 0]), "2": node(text="")})


def test_a_picture_is_saved_where_nothing_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.png"
    mine.write_bytes(b"mine")
    with serving({}) as url:
        picture(url, None)
        picture(url, None)
        with pytest.raises(OSError, match="is there already and was not replaced"):
            picture(url, mine)
        assert mine.read_bytes() == b"mine"
        picture(url, mine, replace=True)
    assert f"Saved {tmp_path / 'sd35_demo_2.png'}" in capsys.readouterr().out
    names = ["mine.png", "sd35_demo.png", "sd35_demo_2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all(path.read_bytes() == b"picture" for path in tmp_path.iterdir())


FAILED = {"status_str": "error", "messages": [["execution_error", {}]]}


@pytest.mark.parametrize(
    ("routes", "messages", "says"),
    [
        ({"/object_info": given(5)}, (), "does not have this pack"),
        ({"/object_info": given(b"[" * 50_000)}, (), "not as ComfyUI does"),
        ({"/object_info": given(b" " * 2_000_001)}, (), "answers with more than 2 MB"),
        ({"/ws": given({})}, (), "can't be followed"),
        ({}, ("{",), "gives no answer that ComfyUI would"),
        ({}, ("5",), "gives no answer that ComfyUI would"),
        ({}, ('{"data": {}}',), "gives no answer that ComfyUI would"),
        (
            {},
            ('{"type": "progress", "data": {"prompt_id": "ID", "node": 1, "value": "x"}}',),
            "gives no answer that ComfyUI would",
        ),
        (
            {},
            ('{"type":"progress","data":{"prompt_id":"ID","node":1,"value":1e999,"max":1}}',),
            "gives no answer that ComfyUI would",
        ),
        ({"/history/{id}": given([])}, (), "gives no answer that ComfyUI would"),
        ({"/view": given(b" " * 3_000_001)}, (), "answers with more than 3 MB"),
    ],
)
def test_what_no_comfyui_answers_is_a_sentence(
    routes: dict[str, Answer],
    messages: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "MOST_JSON", 2_000_000)
    monkeypatch.setattr(host, "MOST_PICTURES", 3_000_000)
    with serving(routes, messages) as url, pytest.raises(host.HostError, match=says):
        picture(url, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_odd_events_of_others_are_passed_over(tmp_path: Path) -> None:
    odd = ('{"type": "x", "data": null}', '{"type": "x"}', '{"type": [], "data": {}}')
    with serving({}, odd) as url:
        picture(url, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == b"picture"


@pytest.mark.parametrize(
    "history",
    [
        5,
        {"status": 5},
        {"status": {"status_str": "error", "messages": 5}},
        {"status": FAILED},
        {"status": {"status_str": "success"}, "outputs": []},
        {"status": {"status_str": "success"}, "outputs": {"1": {"images": [5]}}},
        {"status": {"status_str": "success"}, "outputs": {"1": {"images": 5}}},
    ],
)
def test_an_odd_history_is_a_sentence(history: Any, tmp_path: Path) -> None:
    async def answer(request: Any) -> Any:
        return web.json_response({request.match_info["id"]: history})

    said = "gives no answer that ComfyUI would"
    with serving({"/history/{id}": answer}) as url, pytest.raises(host.HostError, match=said):
        picture(url, tmp_path / "x.png")


@pytest.mark.parametrize("url", ["http://[", "http://127.0.0.1:x", "http://a b"])
def test_an_address_that_is_none_is_a_sentence(url: str) -> None:
    with pytest.raises((host.HostError, OSError), match="address right|No ComfyUI"):
        picture(url, None)


def test_what_killed_fetches_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, kept = tmp_path / "tmpabc123" / "unpacked", tmp_path / "venv"
    left.mkdir(parents=True)
    kept.mkdir()

    def refused(*_: Any) -> None:
        raise host.HostError("no network")

    monkeypatch.setattr(install, "run", refused)
    with pytest.raises(host.HostError, match="no network"):
        install._fetch_source(tmp_path, Path(sys.executable), "0", "")
    assert list(tmp_path.iterdir()) == [kept]


def test_what_a_killed_fetch_of_pictures_left_is_not_taken_for_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("package/owl.webp")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"owl"))
    monkeypatch.setattr(
        pictures.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(packed.getvalue())
    )
    monkeypatch.setenv("SD35_CACHE", str(tmp_path))
    left = tmp_path / "birds-1.1.0.partial"
    left.mkdir()
    (left / "half.webp").write_bytes(b"ha")
    known = sha256(packed.getvalue()).hexdigest()
    folder = pictures.package("https://nowhere.invalid/-/birds-1.1.0.tgz", known, ".webp")
    assert [path.name for path in folder.iterdir()] == ["owl.webp"]
    assert not left.exists()
