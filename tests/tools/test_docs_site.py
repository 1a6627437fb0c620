"""The documentation as a site: it builds without a warning, its pages load nothing from other hosts, and its
reference has every setting, command and recipe. External links are collected, and checked on request."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from megatron_ultralong import recipes
from megatron_ultralong.command_settings import type_hints
from megatron_ultralong.commands.main import COMMANDS
from megatron_ultralong.errors import UserError

mkdocs_build = pytest.importorskip("mkdocs.commands.build", reason="needs the extra docs")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "hooks"))
import links  # noqa: E402
import reference  # noqa: E402
import site_pages  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Any warning, such as a broken internal link or anchor, fails."""
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("mkdocs").addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
        config.plugins.on_startup(command="build", dirty=False)
        try:
            with contextlib.suppress(SystemExit):  # of a strict build with warnings
                mkdocs_build.build(config)
        finally:
            config.plugins.on_shutdown()
            logging.getLogger("mkdocs").removeHandler(handler)
    assert not [record.getMessage() for record in records]
    return folder


class Loads(HTMLParser):
    """What a browser loads for a page, and the text it shows."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.text = ""
        self.classes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.classes |= set((values.get("class") or "").split())
        loading = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
        url = values.get(loading.get(tag, ""))
        if url and values.get("rel") not in ("prev", "next", "canonical"):
            self.urls.append(url)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for path in pages:
        page = Loads(path.read_text(encoding="utf-8"))
        assert page.urls, path
        for url in page.urls:
            assert not re.match(r"(\w+:)?//", url), (path, url)
            assert (path.parent / url.partition("?")[0]).is_file() or path.name == "404.html", (path, url)
        assert "mermaid" not in page.classes, "the theme loads Mermaid from another host"
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), (
            path
        )


def test_the_reference_is_complete(site: Path) -> None:
    def text(name: str) -> str:
        return Loads((site / "reference" / f"{name}.html").read_text(encoding="utf-8")).text

    settings, commands, listed = text("settings"), text("commands"), text("recipes")
    assert [name for name in type_hints() if name not in settings] == []
    assert "Tokens per sequence, S." in settings and "true | false" in settings
    tools = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tools").glob("*.py"))]
    assert [
        name for name in [*tools, *(f"ultralong {name}" for name in COMMANDS)] if name not in commands
    ] == []
    for option in ("--base-url URL", "--recipe RECIPE", "--depths P,P", "--target-tp N"):
        assert option in commands, option
    assert "(default: %(default)s)" not in commands and "%%" not in commands
    assert [name for name in [*recipes.names(), *recipes.STAGES] if name not in listed] == []
    assert "rope.factor=128.0" in listed and "parallel.pp=1\n" not in listed
    api = text("api")
    assert [
        name for names in reference.documented_names().values() for name in names if name not in api
    ] == []
    assert "micro_batches(dp: int) -> int" in api and "The ranks that share a sequence with this one" in api


def test_pages_read_alike_on_github_and_on_the_site() -> None:
    """Python-Markdown needs what GitHub does not: a blank line before a list or table, and nested text
    indented by four."""
    wrong = []
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        code, before = False, ""
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            fence = re.match(r"( *)```", line)
            code = code != bool(fence)
            item = re.match(r"( *)(?:[-*+]|\d+\.) ", line)
            indent = fence or (None if code else item)
            if indent and len(indent[1]) % 4:
                wrong.append(f"{path.name}:{number}: indent by four: {line}")
            after_text = before.strip() and not re.match(r" *(?:[-*+]|\d+\.) |#| ", before)
            if not code and after_text and (item or (line.startswith("|") and not before.startswith("|"))):
                wrong.append(f"{path.name}:{number}: blank line before: {line}")
            before = line
    assert not wrong


def test_links_between_files_of_the_repository() -> None:
    assert site_pages.moved("[a](docs/plan.md#x), ![b](docs/images/c.png), [d](https://docs/e)") == (
        "[a](plan.md#x), ![b](images/c.png), [d](https://docs/e)"
    )
    assert site_pages.moved("[a](CONTRIBUTING.md#tests) and [`b`](examples/laptop.sh)") == (
        "[a](contributing.md#tests) and `b`"
    )
    assert site_pages.linked("[a](../README.md#x), [b](plan.md), [c](../nothing.md)", "../") == (
        "[a](index.md#x), [b](plan.md), [c](../nothing.md)"
    )


# ---- external links ----------------------------------------------------------------------------

PAGE = """
[a](https://one.example/page#part), ![b](https://one.example/picture(1).png "title"), <https://two.example>
`[c](https://in.code/)` [d](docs/plan.md) [e](https://one.example/page) <img src="https://three.example/x.svg">

```bash
curl https://in.a.block/
```

[f]: https://four.example/f
"""


def test_external_links_are_collected() -> None:
    assert links.external_links(PAGE) == [
        "https://one.example/page",
        "https://one.example/picture(1).png",
        "https://two.example",
        "https://four.example/f",
        "https://three.example/x.svg",
    ]
    ours = {
        url for file in links.files(ROOT) for url in links.external_links(file.read_text(encoding="utf-8"))
    }
    assert "https://arxiv.org/abs/2504.06214" in ours and not any("localhost" in url for url in ours)


class Pages(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response({"/good": 200, "/busy": 429}.get(self.path, 404))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_broken_links_are_named(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text(f"[a]({server}/good), [b]({server}/busy), [c]({server}/gone)")
    assert links.main(tmp_path) == 1
    out = capsys.readouterr().out
    assert out == f"README.md: {server}/gone: HTTP 404\n3 external links, 1 broken\n"
    (tmp_path / "README.md").write_text(f"[a]({server}/good)")
    assert links.main(tmp_path) == 0


def test_without_a_network_one_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("[a](http://127.0.0.1:9/a)")
    with pytest.raises(UserError, match="none of the hosts of 1 links can be reached"):
        links.main(tmp_path)
