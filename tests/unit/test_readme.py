"""The README: its links and pictures, and that each figure of its table is in the document it links to."""

from __future__ import annotations

import re
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\(([^()\s]+)\)")


def section(text: str, anchor: str) -> str:
    """The part of a Markdown text under the heading that GitHub gives this anchor; "" if there is none."""
    parts = re.split(
        r"^(#{1,6} .*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), flags=re.MULTILINE
    )
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        slug = re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()).replace(" ", "-")
        if slug == anchor:
            return heading + body
    return ""


def target(link: str) -> str:
    """The text that a link of the README leads to: of a file, or of a section of it."""
    name, _, anchor = link.partition("#")
    path = ROOT / name if name else ROOT / "README.md"
    assert path.exists(), f"README.md links to {link}, which does not exist"
    if path.suffix != ".md":
        assert not anchor
        return ""
    text = path.read_text(encoding="utf-8")
    found = section(text, anchor) if anchor else text
    assert found, f"README.md links to {link}, but {path.name} has no such heading"
    return found


def test_links_exist():
    links = [link for link in LINK.findall(README) if "://" not in link]
    assert len(links) > 50
    for link in links:
        target(link)


def test_short_and_every_claim_has_a_test():
    assert README.count("\n") < 180
    claims = re.findall(r"^- \*\*.*?(?=^- |^!|^$)", README.split("\n## ")[0], re.DOTALL | re.MULTILINE)
    assert len(claims) == 5 and all("](tests/" in claim for claim in claims)
    compared = re.search(r"^## Comparison\n.*?^\|---.*?\n(.*?)\n\n", README, re.DOTALL | re.MULTILINE)
    assert compared
    for row in compared[1].splitlines():
        assert "https://" in row and re.search(r"\(.*\d.*\)", row.split("|")[1]), (
            "a link, and the version read"
        )


def numbers(text: str) -> list[str]:
    return re.findall(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text.replace(", ", "; "))


def unsupported(rows: list[list[str]]) -> list[str]:
    """Figures that the document of their row does not have. A row: what, figure, link to its source."""
    return [
        f"{what}: {number}"
        for what, figure, source in rows
        for number in numbers(figure)
        if number not in numbers(target(LINK.findall(source)[0]))
    ]


def test_measured_figures_are_in_their_sources():
    table = re.search(r"^## Measured\n.*?^\|---.*?\n(.*?)\n\n", README, re.DOTALL | re.MULTILINE)
    assert table
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]
    assert len(rows) > 8 and not unsupported(rows)
    assert all(figure == "not measured yet" for what, figure, _ in rows if "GPU:" in what or "GPUs:" in what)
    assert unsupported([["made up", "1.234 times", "[x](docs/benchmarks.md)"]]) == ["made up: 1.234"]


def test_dependencies_are_explained():
    page = target("docs/dependencies.md")
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    required = re.search(r"install_requires=\[(.*?)\n    \]", setup, re.DOTALL)
    assert required
    packages = re.findall(r'^ +"([\w.-]+)', required[1], re.MULTILINE)
    assert len(packages) > 15 and not [name for name in packages if name not in page]


# ---- pictures ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def draw() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "images" / "draw.py"))


def test_blocks_of_the_ring(draw):
    """All causal blocks, each once, in hops of equal work for every rank."""
    blocks = draw["blocks_by_hop"]()
    assert set(blocks) == {(query, key) for query in range(8) for key in range(query + 1)}
    work: Counter[tuple[int, int]] = Counter()
    for (query, key), (hop, causal) in blocks.items():
        assert causal == (query == key)
        work[draw["owner"](query), hop] += 1 if causal else 2
    assert work == {(rank, hop): 4 for rank in range(4) for hop in range(4)}
    assert [draw["owner"](chunk) for chunk in range(8)] == [0, 1, 2, 3, 3, 2, 1, 0]


def test_bytes_of_a_layer(draw):
    """Of Llama-3.1-8B in bf16, by hand."""
    kept = {mode.name: (mode.layer_bytes, mode.attention_forwards) for mode in draw["modes"]()}
    assert kept == {
        "recompute: none": (8192 + 3 * 8192 + 3 * 8192 + 3 * 2048 + 128 + 3 * 28672, 1),
        "full": (8192, 2),
        "all_but_attention": (8192 + 8192 + 128, 1),
        "the same, offload: all": (8192 + 8192 + 128, 1),
    }
    tokens, gb = 1024 * 1024 / 32, 1e9  # of a GPU, with TP 8 x CP 4
    assert [(round(mode.gpu_gb, 2), round(mode.host_gb, 2)) for mode in draw["modes"]()] == [
        (round(31 * 149632 * tokens / gb, 2), 0.0),
        (round(32 * 8192 * tokens / gb, 2), 0.0),
        (round(32 * 16512 * tokens / gb, 2), 0.0),
        (round(2 * 16512 * tokens / gb, 2), round(32 * 16512 * tokens / gb, 2)),
    ]


@pytest.mark.parametrize("name", ["ring", "layer_memory"])
def test_pictures_are_current(draw, name, tmp_path):
    """If this fails after a change: python docs/images/draw.py."""
    from matplotlib.image import imread

    draw[name](tmp_path / "new.png")
    new, committed = imread(tmp_path / "new.png"), imread(ROOT / "docs" / "images" / f"{name}.png")
    assert new.shape == committed.shape and abs(new - committed).mean() < 0.01
