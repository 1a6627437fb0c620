"""The source distribution and the wheel contain what users need."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
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


@pytest.fixture(scope="module")
def installed(tree: Path) -> Path:
    """The programs of a new environment with the wheel in it. It has the dependencies of this one, and not
    its copy of this package."""
    environment = tree.parent / "environment"
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # Folders named by a .pth file are not searched for others, like that of an editable installation.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "-q"]
    command = [
        *pip,
        "--ignore-installed",
        "--no-index",
        "--no-deps",
        "--no-compile",
        str(build(tree, "bdist_wheel")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return environment / "bin"


TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_ultralong"
SETTINGS = "train.seq_length=1K rope.factor=2 train.iterations=2 train.warmup=1 train.global_batch=1 runtime.device=cpu"
STAGES = (  # program, arguments, and what it prints
    ("python", "-c import\tmegatron_ultralong;print(megatron_ultralong.__file__)", "/environment/lib/"),
    ("ultralong", "--help", "check-context-parallel"),
    (
        "python",
        "corpus.py documents --tokenizer base --length 1K --rows 4 --output text.jsonl",
        "",
    ),
    (
        "ultralong",
        "prepare pretrain --input text.jsonl --tokenizer base --seq-length 1K --separator-token eos --output rows/text",
        "rows/text: 4 rows of 1024 + 1 tokens",
    ),
    (
        "ultralong",
        f"plan --recipe tiny_extend --model base --gpus 2 --set {SETTINGS}",
        "combinations of layout and memory mode fit",
    ),
    (
        "python",
        f"{TORCHRUN} train --recipe tiny_extend --set {SETTINGS} --load-hf base --data rows/text --save run",
        "iteration 2/2",
    ),
    ("ultralong", "convert export --load run --output exported", "wrote exported"),
    ("ultralong", "inspect-rope exported run", "agree bit for bit: [1], [2]"),
    (
        "ultralong",
        "evaluate niah --model exported --lengths 512 --depths 50 --samples 1 --output found",
        "512",
    ),
)


@pytest.mark.slow
def test_the_wheel_in_another_folder(installed: Path, tmp_path: Path) -> None:
    """The demo's stages in small, with data and a model that are copied there."""
    shutil.copytree(ROOT / "examples" / "demo" / "base", tmp_path / "base")
    shutil.copy(ROOT / "examples" / "demo" / "corpus.py", tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for program, arguments, printed in STAGES:
        done = subprocess.run(
            [str(installed / program), *(word.replace("\t", " ") for word in arguments.split(" "))],
            cwd=tmp_path,
            env={**environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 and printed in done.stdout, (arguments, done.stdout, done.stderr)
    assert (tmp_path / "found" / "niah.json").is_file()
