"""The source distribution and the wheel contain what users need."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files under version control: builds write next to setup.py."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(git, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout")
    copy = tmp_path_factory.mktemp("package") / "tree"
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def build(tree: Path, *command: str) -> Path:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *command], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tree / "dist").iterdir()
    return path.rename(tree.parent / path.name)


def test_the_source_distribution_is_complete(tree: Path) -> None:
    files = {str(file.relative_to(tree)) for file in tree.rglob("*") if file.is_file()}
    with tarfile.open(build(tree, "sdist")) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in files - packed if not name.startswith(".")} == set()
    assert "tests/tools/test_package.py" in packed and not any("__pycache__" in name for name in packed)


def test_the_wheel_is_typed(tree: Path) -> None:
    with zipfile.ZipFile(build(tree, "bdist_wheel")) as archive:
        packed = set(archive.namelist())
        (entry_points,) = (name for name in packed if name.endswith("/entry_points.txt"))
        assert "ultralong = megatron_ultralong.commands.main:main" in archive.read(entry_points).decode()
    assert "megatron_ultralong/py.typed" in packed
    modules = {str(file.relative_to(tree)) for file in (tree / "megatron_ultralong").rglob("*.py")}
    assert modules <= packed and not any(name.startswith(("tests/", "tools/")) for name in packed)


def test_models_and_data_stay_out_of_commits_and_images(tree: Path) -> None:
    folders = ("models", "data", "megatron", "runs")
    docker = (ROOT / ".dockerignore").read_text().splitlines()
    git = (ROOT / ".gitignore").read_text().splitlines()
    assert [name for name in folders if name not in docker or f"/{name}/" not in git] == []
    # A pattern without its first slash would also match this package.
    assert (tree / "megatron_ultralong" / "data" / "loader.py").is_file()
