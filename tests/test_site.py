"""The site in a browser, on a desktop and on a phone, without internet; a folder site-pictures/, if there is one, gets pictures of it."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import PROGRAM, Browser
from hooks import ROOT
from release import facts

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium")
SITE, PICTURES = ROOT / "site", ROOT / "site-pictures"
SOURCES = ("docs", "tools", "hyperopt_nested", "ftp", "mkdocs.yml", "pyproject.toml", "CHANGELOG.md", "CONTRIBUTING.md")
PREFIX = urlsplit(facts(ROOT)["urls"]["Documentation"]).path
WORDS = {
    "checkpoint": "how-to/fine-tune/", "FAQ": "how-to/troubleshooting/", "GradScaler": "how-to/training-loops/",
    "lightning": "how-to/integrations/", "tensorboard": "how-to/log-what-is-learned/",
}  # fmt: skip
"""Pages that the search finds by a word."""
LOOK = """(() => {
    const content = document.querySelector('.md-content');
    return {
        width: document.documentElement.scrollWidth,
        scrolls: [...content.querySelectorAll('pre, pre > code')].filter(each => each.scrollWidth > each.clientWidth)
            .map(each => each.textContent.split('\\n').reduce((a, b) => a.length < b.length ? b : a)),
        tex: [...content.querySelectorAll('.arithmatex')].map(each => each.textContent),
        formulas: [...content.querySelectorAll('math')].map(each => each.getBoundingClientRect().height),
    }
})()"""


class _Handler(SimpleHTTPRequestHandler):
    """Serves the site at the path that it has on its host: the page of errors has absolute links."""

    protocol_version = "HTTP/1.1"

    def translate_path(self, path: str) -> str:
        return super().translate_path("/" + path.removeprefix(PREFIX))

    def log_message(self, *_: object) -> None:
        pass


def _newest(path: Path) -> float:
    files = (each for each in path.rglob("*") if each.is_file() and "__pycache__" not in each.parts) if path.is_dir() else [path]
    return max(each.stat().st_mtime for each in files)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of `make docs`, or, if there is none or it is old, one that is built now."""
    built = SITE / "sitemap.xml"
    if built.exists() and built.stat().st_mtime > max(_newest(ROOT / name) for name in SOURCES):
        return SITE
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True)
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{PREFIX}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_pages_load_and_fit(site: Path, address: str, browser: Browser) -> None:
    """Without errors, and from one host; nothing scrolls sideways, nor does code on a desktop; formulas are shown."""
    errors, looks = dict[str, list[str]](), {width: dict[str, Any]() for width in (1400, 390)}
    for path in sorted(site.rglob("*.html")):
        page = path.relative_to(site).as_posix().removesuffix("index.html")
        browser.open(address + page, 1400)
        for width in looks:
            browser.resize(width)
            looks[width][page] = browser.run(LOOK)
            if PICTURES.exists():
                browser.picture(PICTURES / f"{page.strip('/').replace('/', '-') or 'home'}-{width}.png")
        errors[page], browser.errors = browser.errors, []
    assert len(errors) > 25
    assert {page: found for page, found in errors.items() if found} == {}
    for width, of_pages in looks.items():
        assert {page: look["width"] for page, look in of_pages.items() if look["width"] > width} == {}
    desktop = looks[1400]
    assert {page: look["scrolls"] for page, look in desktop.items() if look["scrolls"]} == {}
    assert {page: look["tex"] for page, look in desktop.items() if look["tex"]} == {}
    heights = [height for look in desktop.values() for height in look["formulas"]]
    assert len(heights) > 30
    assert min(heights) > 5


def test_pages_have_links_and_descriptions(site: Path) -> None:
    """Those of pyproject.toml: the canonical address, edit links; and the version, neighbors, an icon, what previews of links show."""
    project, pages = facts(ROOT), sorted(each for each in site.rglob("index.html") if each.parent != site)
    home, repository = project["urls"]["Documentation"], project["urls"]["Repository"]
    assert len(pages) > 25
    for page in pages:
        text, address = page.read_text(encoding="utf-8"), f"{home}{page.parent.relative_to(site).as_posix()}/"
        for part in (
            f'<link rel="canonical" href="{address}">', f'<meta property="og:url" content="{address}">', '<meta property="og:title"',
            '<meta property="og:description" content="', f'<meta property="og:image" content="{home}assets/demo.png">',
            '<link rel="icon" href="', 'class="md-header__button md-logo"', 'class="md-footer__link md-footer__link--prev"',
            project["version"], f'href="{repository}/edit/main/', 'rel="edit"',
        ):  # fmt: skip
            assert part in text, f"{address} has no {part}"


def test_search_finds_pages(address: str, browser: Browser) -> None:
    browser.open(address, 1400)
    for word, page in WORDS.items():
        browser.run(f"""(() => {{
            const query = document.querySelector('input[name=query]')
            query.focus()
            query.value = '{word}'
            query.dispatchEvent(new Event('input'))
            query.dispatchEvent(new Event('keyup'))
        }})()""")
        links = f"[...document.querySelectorAll('.md-search-result__link')].filter(each => each.href.includes('{page}')).length"
        assert browser.wait(links), f"{page} is not found by {word!r}"
    assert browser.errors == []


def test_a_missing_browser_is_named_in_the_last_lines(pytestconfig: pytest.Config) -> None:
    lines: list[str] = []
    reports = {"skipped": [SimpleNamespace(nodeid="tests/test_site.py::test_search_finds_pages")]}
    conftest: Any = pytestconfig.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    conftest.pytest_terminal_summary(SimpleNamespace(stats=reports, write_line=lambda line, **_: lines.append(line)))
    assert lines == ["tests/test_site.py did not run: no Chromium is installed. The site was not checked in a browser."]
