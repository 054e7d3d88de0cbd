"""What a command writes: its folder, and what is said where a disk is full or the run is cut short."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


def cannot_write(option: str, place: Path | str, error: OSError) -> UserError:
    """The error as a line that names the option, or the variable, that chose the place."""
    return UserError(f"{option}: cannot write to {place}: {error.strerror or error}")


@contextmanager
def writing(place: Path | str, option: str = "--out") -> Iterator[None]:
    """Writing to a place and nothing else: what fails there is explained in a line."""
    try:
        yield
    except OSError as error:
        raise cannot_write(option, place, error) from None
    except Exception as error:
        if not _cannot_write(error):
            raise
        # Its own cause, if any, says more.
        cause = error.__context__ if isinstance(error.__context__, OSError) else OSError(_first_line(error))
        raise cannot_write(option, place, cause) from None


def _cannot_write(error: Exception) -> bool:
    """Whether torch.save or safetensors could not write, which they say in ways of their own."""
    torch_save = any(word in str(error) for word in ("PytorchStreamWriter", "inline_container"))
    return torch_save or type(error).__name__ == "SafetensorError"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def written(folder: Path, names: Sequence[str]) -> str:
    """Those of the files and folders that are there."""
    return ", ".join(name for name in names if (folder / name).exists())


@contextmanager
def opened(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Makes the folder, and removes what an earlier run left there: no mix of two runs.

    An interruption carries on with a message of what was written by then.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).unlink(missing_ok=True)
    try:
        yield
    except KeyboardInterrupt as stop:
        found = written(folder, names)
        stop.args = (f"written to {folder} so far: {found or 'nothing'}", *stop.args)
        raise


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for what is handed to another process."""
    with writing("a temporary folder", "TMPDIR"):
        folder = tempfile.TemporaryDirectory()
    with folder as name:
        yield Path(name)
