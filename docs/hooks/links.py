"""Check the external links of README.md, CONTRIBUTING.md, CHANGELOG.md and docs/ (`make docs-links`).

Internal links and anchors are checked where the site is built. Exit code: 1 if a link is broken, 2 if no
host answers.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime import cli

ROOT = Path(__file__).parents[2]
GONE = (404, 410)
"""Answers that mean a broken link. With others, like 403 or 429, a host refuses programs or is busy."""


def files(root: Path) -> list[Path]:
    return [*sorted(root.glob("*.md")), *sorted((root / "docs").glob("*.md"))]


def external_links(markdown: str) -> list[str]:
    """Return the http(s) targets of links and images, in order, without those in code and without anchors."""
    text = re.sub(r"^( *)(```|~~~).*?^\1\2", "", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "", text)
    found = re.findall(r"\]\(<?(https?://[^\s<>()]+(?:\([^\s()]*\)[^\s<>()]*)*)|<(https?://[^\s<>]+)>", text)
    found += re.findall(r"^\[[^]]+\]:()\s*(https?://\S+)", text, re.MULTILINE)
    found += re.findall(r"(?:href|src)=\"()(https?://[^\"]+)\"", text)
    return list(dict.fromkeys((first or second).partition("#")[0] for first, second in found))


def problem(url: str, timeout: float = 20.0) -> tuple[bool, str]:
    """Request a page. Return (whether its host answered, what is wrong with the link or "")."""
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (link check)"})
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return True, ""
    except urllib.error.HTTPError as error:
        return True, f"HTTP {error.code}" if error.code in GONE else ""
    except (OSError, ValueError) as error:
        return False, str(getattr(error, "reason", error))


def main(root: Path = ROOT) -> int:
    links: dict[str, list[str]] = {}
    for file in files(root):
        for url in external_links(file.read_text(encoding="utf-8")):
            links.setdefault(url, []).append(str(file.relative_to(root)))
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(links, pool.map(problem, links)))
    if links and not any(answered for answered, _ in answers.values()):
        raise UserError(
            f"none of the hosts of {len(links)} links can be reached; links are checked over the network"
        )
    broken = {url: what for url, (_, what) in answers.items() if what}
    for url, what in broken.items():
        print(f"{', '.join(links[url])}: {url}: {what}")
    print(f"{len(links)} external links, {len(broken)} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    cli.main(main)
