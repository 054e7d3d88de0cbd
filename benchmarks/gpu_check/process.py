"""Commands under a time limit, each in a process group of its own, so that what they started ends with them.

Output goes to a file as it comes: of a command that is ended for its time, what it said before counts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Command:
    """name: of its log file. environment: beside that of this process."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ran:
    """What a command did. code: its exit code, negative for a signal; None where its time was over."""

    name: str
    code: int | None
    seconds: float
    output: str

    @property
    def timed_out(self) -> bool:
        return self.code is None


def run(commands: Sequence[Command], seconds: float, folder: Path, logs: Path) -> list[Ran]:
    """Run commands at the same time, in a folder; standard output and error go to logs together.

    What still runs after so many seconds is killed. A command that cannot be started has code 127.
    """
    begin, running, done = time.monotonic(), {}, {}
    try:
        for command in commands:
            log = logs / f"{command.name}.log"
            try:
                running[command.name] = _start(command, folder, log), log
            except OSError as error:
                log.write_text(f"{command.argv[0]}: {error.strerror}\n")
                done[command.name] = Ran(command.name, 127, 0.0, log.read_text())
        while running and time.monotonic() - begin < seconds:
            for name, (process, log) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    _kill(process)  # what it may have left behind
                    done[name] = Ran(name, process.returncode, time.monotonic() - begin, _text(log))
            time.sleep(POLL_SECONDS)
    finally:
        for name, (process, log) in running.items():
            _kill(process)
            done[name] = Ran(name, None, time.monotonic() - begin, _text(log))
    return [done[command.name] for command in commands]


def _start(command: Command, folder: Path, log: Path) -> subprocess.Popen:
    with log.open("wb") as out:
        return subprocess.Popen(
            command.argv,
            cwd=folder,
            env={**os.environ, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")
