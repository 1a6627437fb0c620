"""MkDocs calls these functions while it builds the site (mkdocs.yml): they add pages that are not in docs/.

Home, changelog and contributing are the files of the repository's root; the reference pages are generated.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import reference
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ROOT_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the repository's root, and the page that each is."""


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    pages = {page: moved((ROOT / name).read_text(encoding="utf-8")) for name, page in ROOT_PAGES.items()}
    for path, text in {**pages, **reference.pages()}.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links of the pages in docs/ to files of the root lead to their pages, and hide the navigation of a
    page that has no neighbours."""
    if page.parent is None:
        page.meta["hide"] = ["navigation"]
    return linked(markdown, "../")


def moved(markdown: str) -> str:
    """Return a page of the root as one of docs/: links and images without their folder docs/."""
    return linked(re.sub(r"(\]\(|src=\")docs/", r"\1", markdown), "")


def linked(markdown: str, prefix: str) -> str:
    """Replace links to other files of the repository: those of the root by links to their pages, source
    files, which the site does not have, by their text. Other links stay, for MkDocs to check."""

    def replace(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        name = target.removeprefix(prefix)
        if not target.startswith(prefix) or "://" in target:
            return link[0]
        if name in ROOT_PAGES:
            return f"[{text}]({ROOT_PAGES[name]}{anchor or ''})"
        source = (ROOT / name).exists() and not (ROOT / "docs" / name).exists()
        return text if source else link[0]

    return re.sub(r"(?<!!)\[((?:[^][]|\[[^]]*\])+)\]\(([^()#\s]+)(#[^()\s]*)?\)", replace, markdown)
