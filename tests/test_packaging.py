"""What an sdist and a wheel hold and say, and what installation says when something is missing: one plain
message with the remedy, and no traceback."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_TORCH = (
    "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', 'build_ext'];"
    "runpy.run_path('setup.py', run_name='__main__')"
)
# A step of pip or build, where torch is not installed.
HOOK_WITHOUT_TORCH = (
    "import sys; sys.modules['torch'] = None; from setuptools import build_meta;"
    "hook, folder = sys.argv[1:]; getattr(build_meta, 'get_requires_for_' + hook)();"
    "getattr(build_meta, hook)(folder)"
)
# What a machine may hold beside the files that belong in an sdist.
STRAY = (
    "build/lib/tightrope/__init__.py",
    "csrc/cpu/ext_base.o",
    "kernels/__pycache__/rows.cpython-311.pyc",
    "notes.txt",
    "python/tightrope/_C_base.so",
    "python/tightrope/_C_torch.txt",
    "runs/steps.csv",
    "tests/.hypothesis/examples",
)


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("command", "environment", "missing"),
    [
        (("setup.py", "build_ext"), {"CXX": "no-such-compiler"}, "no C++ compiler (`no-such-compiler`)"),
        (("-c", WITHOUT_TORCH), {}, "PyTorch is not installed"),
    ],
)
def test_a_missing_tool_is_named_with_its_remedy(command, environment, missing):
    done = run(*command, **environment)
    assert done.returncode != 0
    assert missing in done.stderr
    assert "TIGHTROPE_BUILD_EXT=0" in done.stderr
    assert "Traceback" not in done.stderr


def needs_cpu_torch():
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this torch is a CUDA build")


def test_the_cuda_extension_is_left_out_with_one_line():
    needs_cpu_torch()
    done = run("setup.py", "--name")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "tightrope: " in line]
    assert len(said) == 1
    assert "without the CUDA extension" in said[0] and "is not a CUDA build" in said[0]
    assert "tightrope: " not in run("setup.py", "--name", TIGHTROPE_CUDA="0").stdout


def test_the_cuda_extension_can_be_insisted_on():
    needs_cpu_torch()
    done = run("setup.py", "--name", TIGHTROPE_CUDA="1")
    assert done.returncode != 0
    assert "TIGHTROPE_CUDA=1" in done.stderr and "Install a CUDA build of torch" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_extension_can_be_left_out():
    done = run("setup.py", "--name", TIGHTROPE_BUILD_EXT="0", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The unpacked sdist, made without torch or compiler from a folder with stray files; and its name."""
    tree, out = tmp_path_factory.mktemp("tree") / "tightrope", tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info"))
    (tree / "tightrope.egg-info").mkdir()
    (tree / "tightrope.egg-info" / "SOURCES.txt").write_text("\n".join(STRAY))
    for name in STRAY:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("")
    done = run("-c", HOOK_WITHOUT_TORCH, "build_sdist", str(out), cwd=tree, CXX="no-such-compiler", PATH="")
    assert done.returncode == 0, done.stderr
    (archive,) = out.iterdir()
    with tarfile.open(archive) as file:
        file.extractall(out, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return out / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """The unpacked wheel without extensions, made from the sdist."""
    out = tmp_path_factory.mktemp("wheel")
    done = run(
        "-c", HOOK_WITHOUT_TORCH, "build_wheel", str(out), cwd=source, TIGHTROPE_BUILD_EXT="0", PATH=""
    )
    assert done.returncode == 0, done.stderr
    (archive,) = out.iterdir()
    assert archive.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(archive) as file:
        file.extractall(out / "site")
    return out / "site"


def run_in(site: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess:
    """With the package in ``site``. Without -S the finder of an editable install would fill its gaps."""
    import torch

    return run(
        "-S", *command, cwd=cwd, PYTHONPATH=os.pathsep.join([str(site), str(Path(torch.__file__).parents[1])])
    )


def metadata(folder: Path) -> Message:
    (file,) = folder.glob("*.dist-info/METADATA")
    return Parser().parsestr(file.read_text(encoding="utf-8"))


def torch_requirements(metadata: Message) -> list[str]:
    return [line for line in metadata.get_all("Requires-Dist") if re.match(r"torch\b", line)]


def test_an_sdist_holds_what_git_tracks_and_nothing_else(source):
    """A file of a new kind that MANIFEST.in does not name, or a build product that slips in."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")

    def listed(*kind: str) -> set[str]:
        done = subprocess.run(
            ["git", "ls-files", "-z", *kind], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return {name for name in done.stdout.split("\0") if name and (ROOT / name).exists()}

    found = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    found -= {"PKG-INFO", "setup.cfg", "tightrope.egg-info/SOURCES.txt"}
    tracked = listed("--cached")
    assert not tracked - found
    assert not found - tracked - listed("--others", "--exclude-standard")  # what is not committed yet


def test_a_wheel_from_the_sdist_runs(wheel, tmp_path):
    """A module left out of the sdist or of `packages`; a version that is not the one of the metadata."""
    program = (
        "import runpy, sys, tightrope; print(tightrope.__file__); sys.argv[1:] = ['--version'];"
        "runpy.run_module('tightrope', run_name='__main__', alter_sys=True)"
    )
    done = run_in(wheel, "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    place, version = done.stdout.splitlines()
    assert Path(place).is_relative_to(wheel)
    assert version == f"tightrope {metadata(wheel)['Version']}"
    modules = {str(path.relative_to(ROOT / "python")) for path in (ROOT / "python").rglob("*.py")}
    modules |= {f"tightrope/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    installed = {str(path.relative_to(wheel)) for path in (wheel / "tightrope").rglob("*") if path.is_file()}
    assert installed == modules | {"tightrope/py.typed"}


def test_a_wheel_without_extensions_takes_a_range_of_torch(wheel):
    """A pin that no extension asks for; metadata that leads a reader nowhere."""
    found = metadata(wheel)
    assert torch_requirements(found) == ["torch>=2.11"]
    assert found["Author"] == "The Tightrope authors" and found["License-Expression"] == "Apache-2.0"
    assert any(line.startswith("Homepage, https://") for line in found.get_all("Project-URL"))


def test_a_wheel_with_extensions_requires_the_torch_it_was_built_for(source, tmp_path):
    """An installer that pairs a compiled wheel with a torch whose ABI is another."""
    import torch

    done = run("setup.py", "dist_info", "--output-dir", str(tmp_path), cwd=source, TIGHTROPE_CUDA="0")
    assert done.returncode == 0, done.stderr
    major, minor = torch.__version__.split(".")[:2]
    assert torch_requirements(metadata(tmp_path)) == [f"torch=={major}.{minor}.*"]


@pytest.mark.parametrize(
    ("built", "words"),
    [("1.2.3", "_C_base was built for torch 1.2.3, this is"), (None, "_C_base does not load: ")],
    ids=["another torch", "broken"],
)
def test_info_says_why_an_extension_is_not_loaded(wheel, tmp_path, built, words):
    """An extension of another torch that is loaded all the same, and crashes later."""
    shutil.copytree(wheel / "tightrope", tmp_path / "tightrope")
    (tmp_path / "tightrope" / f"_C_base{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("")
    if built:
        (tmp_path / "tightrope" / "_C_torch.txt").write_text(built)
    done = run_in(tmp_path, "-m", "tightrope", "info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("cpu ")]
    assert words in line


def test_the_links_of_the_readme_work_elsewhere(wheel):
    """A relative link, which leads nowhere where the README is shown without the repository; a dead one."""
    found = metadata(wheel)
    (home,) = [line.split(", ")[1] for line in found.get_all("Project-URL") if line.startswith("Homepage")]
    links = re.findall(r"\]\(([^)\s]+)\)", found.get_payload())
    assert links
    for link in links:
        assert link.startswith(("https://", "#")), link
        if link.startswith(home):
            name = link.partition("#")[0].removeprefix(f"{home}/blob/main/")
            assert (ROOT / name).is_file(), link


def test_the_code_of_the_readme_is_found_at_its_lines():
    """A type check of no code, which passes; errors at lines that are not the README's."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from check_types import python_code
    finally:
        sys.path.pop(0)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = python_code(text)
    compile(code, "README.md", "exec")
    _, *lines = code.splitlines()
    assert all(line in ("", shown) for line, shown in zip(lines, text.splitlines()[1:], strict=True))
    assert sum(line != "" for line in lines) > 20
    assert "pip install" not in code and "tightrope.linear_vocab_loss(" in code
