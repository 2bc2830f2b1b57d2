"""Files are whole or not there, whoever else writes, links, kills or fills the disk."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from PIL import Image

from sd35_core import whole_file
from sd35_core.checkpoint.tensor_file import read_file, write_file
from sd35_core.errors import CheckpointError
from sd35_core.whole_file import (
    WriteError,
    free_name,
    sweep,
    write_new,
    write_picture,
    write_text,
    write_whole,
)

ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(sys.platform == "win32", reason="as POSIX does")


def started(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A program that writes, in a process of its own."""
    first = "import os, sys, time\nfrom sd35_core.whole_file import write_whole\n"
    return subprocess.Popen(
        [sys.executable, "-c", first + code, *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
    )  # fmt: skip


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".partial")]


@pytest.fixture(params=["hard links", "no hard links", "Windows"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way in which a file gets a name that is free."""
    if request.param == "no hard links":

        def refused(*_: Any) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refused)
    if request.param == "Windows":
        monkeypatch.setattr(whole_file, "os", Windows())


class Windows:
    """The module os as Windows has it: without links, renaming refuses to replace."""

    name = "nt"

    def __getattr__(self, name: str) -> Any:
        if name == "link":
            raise AttributeError(name)
        return getattr(os, name)

    def rename(self, a: Path, b: Path) -> None:
        os.link(a, b)
        a.unlink()


def test_a_file_is_as_it_was_given(tmp_path: Path, system: None) -> None:
    path = tmp_path / "neue Ordner" / "猫" / "file.bin"
    write_whole(path, b"first", replace=False)
    assert path.read_bytes() == b"first"
    write_whole(path, (part for part in (b"sec", b"", memoryview(b"ond"))), replace=True)
    assert path.read_bytes() == b"second"
    assert write_new(path, b"third") == path.with_name("file_2.bin")
    assert write_new(path, b"fourth").read_bytes() == b"fourth"
    write_text(path, "ä\n", replace=True)
    assert path.read_bytes() == "ä\n".encode()
    names = {"file.bin", "file_2.bin", "file_3.bin"}
    assert {each.name for each in path.parent.iterdir()} == names


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.jpeg", "a.webp"])
def test_a_picture_has_the_format_of_its_name(tmp_path: Path, name: str) -> None:
    write_picture(tmp_path / name, Image.new("RGB", (8, 4), "red"), replace=False, quality=90)
    with Image.open(tmp_path / name) as image:
        assert image.size == (8, 4)
        assert image.format == {"png": "PNG", "webp": "WEBP"}.get(name[2:], "JPEG")


def test_two_processes_never_mix_in_one_file(tmp_path: Path) -> None:
    path, size = tmp_path / "model.safetensors", 2_000_000
    code = (
        "for _ in range(40):\n"
        "    pieces = (sys.argv[2].encode() * 50_000 for _ in range(40))\n"
        "    write_whole(sys.argv[1], pieces, replace=True)"
    )
    writers = [started(code, path, letter) for letter in "AB"]
    seen: set[bytes] = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            data = path.read_bytes()
            assert len(data) == size and data in (b"A" * size, b"B" * size)
            seen.add(data[:1])
    assert [writer.communicate()[0] for writer in writers] == ["", ""]
    assert seen == {b"A", b"B"} and not left(tmp_path)


def test_two_threads_never_mix_in_one_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            tensors = ({str(i): torch.full((50_000,), float(n)) for i in range(20)} for n in (1, 2))
            for done in [pool.submit(write_file, path, each, {}) for each in tensors]:
                done.result()
            values = {float(v) for t in read_file(path)[0].values() for v in t.unique()}
            assert values in ({1.0}, {2.0})
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_of_many_writers_of_a_new_file_one_wins(tmp_path: Path, system: None) -> None:
    count = 12
    for number in range(10):
        path, start = tmp_path / str(number), Barrier(count)

        def write(who: int, path: Path = path, start: Barrier = start) -> str:
            start.wait()
            try:
                write_whole(path, str(who).encode(), replace=False)
            except WriteError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(count) as pool:
            said = list(pool.map(write, range(count)))
        assert path.read_bytes() == str(said.index("")).encode()
        assert sorted(said)[1:] == [sorted(said)[-1]] * (count - 1)
        assert "is there already and was not replaced. Choose another name" in sorted(said)[-1]
    assert not left(tmp_path)


def test_of_many_writers_of_numbered_files_each_has_its_own(tmp_path: Path, system: None) -> None:
    start = Barrier(12)

    def write(who: int) -> Path:
        start.wait()
        return write_new(tmp_path / "demo.png", str(who).encode())

    with ThreadPoolExecutor(12) as pool:
        names = list(pool.map(write, range(12)))
    assert [path.read_bytes() for path in names] == [str(who).encode() for who in range(12)]
    numbers = ["demo.png", *(f"demo_{n}.png" for n in range(2, 13))]
    assert {path.name for path in tmp_path.iterdir()} == set(numbers)


@posix
@pytest.mark.parametrize("replace", [True, False])
def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path: Path, replace: bool) -> None:
    source, path, dangling = (tmp_path / name for name in ("source", "link", "dangling"))
    source.write_bytes(b"precious")
    path.symlink_to(source)
    dangling.symlink_to(tmp_path / "elsewhere")
    for link in (path, dangling):
        if replace:
            write_whole(link, b"new", replace=True)
            assert not link.is_symlink() and link.read_bytes() == b"new"
        else:
            with pytest.raises(WriteError, match="is there already"):
                write_whole(link, b"new", replace=False)
            assert link.is_symlink()
    assert source.read_bytes() == b"precious" and not (tmp_path / "elsewhere").exists()


@posix
def test_a_link_where_the_unfinished_file_was_is_not_followed(tmp_path: Path) -> None:
    """Its name was the file's and .partial: a link there made quantizing overwrite the source."""
    source, path = tmp_path / "source", tmp_path / "out.safetensors"
    source.write_bytes(b"precious")
    path.with_name(path.name + ".partial").symlink_to(source)
    write_file(path, {"a": torch.ones(3)}, {})
    assert source.read_bytes() == b"precious" and len(read_file(path)[0]) == 1


@posix
def test_a_pipe_neither_holds_a_writer_up_nor_swallows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    for pipe in (path, path.with_name(path.name + ".partial")):
        os.mkfifo(pipe)
    with pytest.raises(WriteError, match="is there already"):
        write_whole(path, b"new", replace=False)
    writer = Thread(target=write_file, args=(path, {"a": torch.ones(3)}, {}), daemon=True)
    writer.start()
    writer.join(20)
    assert not writer.is_alive() and path.is_file() and len(read_file(path)[0]) == 1


@pytest.mark.parametrize("replace", [True, False])
def test_a_folder_of_that_name_is_said_before_the_work(tmp_path: Path, replace: bool) -> None:
    def pieces() -> Iterator[bytes]:
        raise AssertionError("nothing is made for a name that can't be had")
        yield b""

    (tmp_path / "x.png").mkdir()
    with pytest.raises(WriteError, match="x.png' is a folder. Choose a name for the file"):
        write_whole(tmp_path / "x.png", pieces(), replace=replace)
    assert (tmp_path / "x.png").is_dir()
    assert write_new(tmp_path / "x.png", b"x").name == "x_2.png"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("file/x.png", r"x.png' could not be written \(0.0 MB\): its folder is a file. Choose"),
        ("file/in/x.png", "could not be written.* Choose another folder"),
        ("x" * 300, "could not be written.* Choose a shorter name."),
        ("a\0b", "could not be written.*null"),
        ("", "is a folder"),
        ("..", "is a folder"),
    ],
)
def test_a_name_that_no_file_can_have_is_said(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(WriteError, match=says) as error:
        write_whole(tmp_path / name, b"x", replace=True)
    assert isinstance(error.value, OSError) and len(str(error.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@posix
def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"earlier")
    code = (
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try:\n    write_whole(sys.argv[1], bytes(12_000_000), replace=True)\n"
        "except OSError as error:\n    print(error)"
    )
    said = started(code, path).communicate(timeout=60)[0]
    assert said == (
        f"'{path}' could not be written (12 MB): File too large. Make room on the disk or choose "
        "another folder; the earlier file of that name is unharmed.\n"
    )
    assert path.read_bytes() == b"earlier" and not left(tmp_path)


@posix
def test_a_writer_that_is_killed_leaves_what_can_be_swept(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    code = (
        "def pieces():\n    yield b'half'\n    print('go', flush=True)\n    time.sleep(60)\n"
        "write_whole(sys.argv[1], pieces(), replace=True)"
    )
    writer = started(code, path)
    assert writer.stdout is not None and writer.stdout.readline() == "go\n"
    writer.kill()
    writer.wait()
    assert not path.exists()
    (name,) = left(tmp_path)
    partial, target, link = (
        tmp_path / name,
        tmp_path / "target",
        tmp_path / f".sd35-{'0' * 16}.partial",
    )
    others = [tmp_path / n for n in ("model.partial", ".sd35-x.partial", target.name)]
    for other in others:
        other.write_bytes(b"another's")
    link.symlink_to(target)
    folder = tmp_path / f".sd35-{'1' * 16}.partial"
    folder.mkdir()
    sweep(tmp_path)
    assert partial.exists(), "another may still write it"
    old = time.time() - 2 * whole_file.OLD_SECONDS
    for each in (partial, *others, folder):
        os.utime(each, (old, old))
    os.utime(link, (old, old), follow_symlinks=False)
    write_file(path, {"a": torch.ones(3)}, {})
    assert not partial.exists() and link.is_symlink() and folder.is_dir()
    assert all(other.read_bytes() == b"another's" for other in others)
    sweep(tmp_path / "nowhere")


@posix
def test_others_may_read_a_file_as_the_umask_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.delattr(os, "umask")  # it is the whole process's: nobody may change it meanwhile
            write_whole(tmp_path / "x", b"x", replace=False)
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("of the source"), ValueError("x")])
def test_what_ends_the_pieces_comes_through_as_it_is(tmp_path: Path, error: BaseException) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise error

    path = tmp_path / "x"
    path.write_bytes(b"earlier")
    with pytest.raises(type(error)) as raised:
        write_whole(path, pieces(), replace=True)
    assert raised.value is error
    assert path.read_bytes() == b"earlier" and not left(tmp_path)


def test_it_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (done.append(n), r(*a))[1])
    write_file(tmp_path / "x", {"a": torch.ones(3)}, {})
    assert done[:2] == ["fsync", "replace"]


@pytest.mark.parametrize("number", [5, 32, 33])
def test_a_file_that_another_program_has_open_on_windows_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*_: Any) -> None:
        error = PermissionError(errno.EACCES, "The process cannot access the file")
        error.winerror = number  # pyright: ignore[reportAttributeAccessIssue]
        raise error

    path = tmp_path / "x.safetensors"
    path.write_bytes(b"earlier")
    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(CheckpointError, match="another program has.* open.*Close that program"):
        write_file(path, {"a": torch.ones(3)}, {})
    assert path.read_bytes() == b"earlier" and not left(tmp_path)


def test_a_free_name_counts_what_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.b.png"
    assert free_name(path) == path
    path.mkdir()
    (tmp_path / "a.b_2.png").write_bytes(b"")
    assert free_name(path).name == "a.b_3.png"
    assert free_name(path, lambda p: "_4" not in p.name).name == "a.b_4.png"
