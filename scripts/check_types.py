"""Type-checks the use of the library as users see it: the files of tests/typing, and the README's code."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = "from readme_names import *"


def python_code(markdown: str) -> str:
    """The code of the Python blocks, one program, each line at its place: errors are then of the README."""
    lines, inside = [NAMES], False
    for line in markdown.splitlines()[1:]:
        fence = re.match(r"```(\w*)", line)
        lines.append(line if inside and not fence else "")
        if fence:
            inside = fence[1] == "python" and not inside
    return "\n".join(lines) + "\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        readme = Path(folder, "readme.py")
        readme.write_text(python_code((ROOT / "README.md").read_text(encoding="utf-8")), encoding="utf-8")
        command = [sys.executable, "-m", "mypy", *sys.argv[1:], "--shadow-file", "README.md", str(readme)]
        return subprocess.run([*command, "tests/typing", "README.md"], cwd=ROOT).returncode


if __name__ == "__main__":
    raise SystemExit(main())
