"""Two runs into one folder: the second is refused for as long as the first is alive."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from sd35_core import whole_file
from sd35_core.errors import SettingError
from sd35_core.training.__main__ import main
from sd35_core.training.alone import LOCK, run_alone
from sd35_core.training.config import TrainingConfig
from sd35_core.whole_file import WriteError, held_file

ROOT = Path(__file__).resolve().parents[2]
HOLDS = (
    "import sys\nfrom sd35_core.whole_file import held_file\n"
    "with held_file(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()\n"
)


@contextmanager
def another(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock, until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(lock)], cwd=ROOT, encoding="utf-8",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def program(lora_config: TrainingConfig, tmp_path: Path) -> Path:
    """A configuration of two steps."""
    path = tmp_path / "c.toml"
    base, examples = Path(lora_config.start).as_posix(), Path(lora_config.examples[0]).as_posix()
    path.write_text(
        f"output = 'out'\nexamples = '{examples}'\nstart = '{base}'\ntext_encoders = '{base}'\n"
        "steps = 2\nbatch = 2\nbf16 = false\ndevice = 'cpu'\n",
        encoding="utf-8",
    )
    return path


def test_a_second_process_is_refused_until_the_first_dies(
    program: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = program.parent / "out" / LOCK
    with another(lock) as first:
        assert main(["lora", str(program)]) == 1
        assert "Another run is training in" in caplog.text
        assert f"process {first.pid} on " in caplog.text and "Wait until it ends" in caplog.text
        assert [path.name for path in lock.parent.iterdir()] == [LOCK]
        first.kill()
        first.wait()
        assert lock.exists(), "a killed process takes nothing away"
        assert main(["lora", str(program)]) == 0
    assert (lock.parent / "model.safetensors").exists()
    assert sys.platform == "win32" or not lock.exists()


def test_a_second_run_of_the_same_process_is_refused_until_the_first_ends(
    lora_config: TrainingConfig,
) -> None:
    config = replace(lora_config, steps=1)
    with run_alone(config) as run:
        with (
            pytest.raises(SettingError, match="Another run is training in .* choose another"),
            run_alone(config),
        ):
            pass
        with run_alone(replace(config, output=f"{config.output}_2")) as beside:
            beside.advance()
        run.go_on()
    with pytest.raises(ZeroDivisionError), run_alone(config):
        raise ZeroDivisionError
    with run_alone(config) as again:
        assert again.step == 1


def test_where_there_are_no_locks_training_goes_on_and_the_log_says_so(
    lora_config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(whole_file, "_locked", lambda handle, path: False)
    with run_alone(lora_config), run_alone(lora_config):
        pass
    assert "has no locks: let one run at a time train there" in caplog.text


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"")
    with (
        pytest.raises(WriteError, match="its folder is a file"),
        held_file(tmp_path / "out" / LOCK),
    ):
        pass
