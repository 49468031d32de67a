"""Build hooks of the documentation: links of `pyproject.toml`, formulas as MathML, pages of the repository, complete API pages."""

import html
import importlib
import inspect
import logging
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "hyperopt_nested", "hyperopt_nested.optim", "hyperopt_nested.rules", "hyperopt_nested.typing", "hyperopt_nested.testing",
    "ftp", "ftp.finetuning",
)  # fmt: skip
OF_THE_REPOSITORY = ("CHANGELOG.md", "CONTRIBUTING.md")  # pages of the site, too
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

log = logging.getLogger("mkdocs.hooks")


def problems(docs: Path) -> list[str]:
    """What is wrong with the API pages, in sentences; modules have pages of their own: those of `a.b` are `api/b.md` or `api/b/*.md`."""
    found = []
    for package in PACKAGES:
        above = importlib.import_module(package.partition(".")[0]).__all__ if "." in package else []  # which has entries of its own
        shown = Counter(path.split(".")[-1] for path in entries(docs, package))
        module = importlib.import_module(package)
        public = Counter(name for name in module.__all__ if name not in above and not inspect.ismodule(getattr(module, name)))
        found += [f"{package}.{name} is public but has no entry in the API pages" for name in sorted(public - shown)]
        found += [f"{package}.{name} is in the API pages more often than it is public" for name in sorted(shown - public)]
    return found


def entries(docs: Path, package: str) -> list[str]:
    """Paths of the objects that the API pages of a package show, without the package's name."""
    name = package.rpartition(".")[2]
    pages = [*(docs / "api").glob(f"{name}.md"), *(docs / "api" / name).glob("*.md")]
    return [path for page in pages for path in re.findall(rf"^::: {package}\.(\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)]


def mathml(page: str) -> str:
    """A page's HTML, its formulas converted from TeX to MathML, which browsers show without a script.

    Raises:
        ValueError: a formula has a command that is unknown.
    """

    def formula(match: re.Match[str]) -> str:
        math: str = convert(html.unescape(match[2]).strip(), display="block" if match[1] == "div" else "inline")
        if "\\" in math:
            raise ValueError(f"a command in the formula {match[2]!r} is unknown: {math}")
        return math

    return FORMULA.sub(formula, page)


def project() -> dict[str, Any]:
    """The table `project` of `pyproject.toml`."""
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"])


def on_config(config: MkDocsConfig) -> None:
    """Take links and version from `pyproject.toml`; warn of problems of the API pages."""
    facts = project()
    urls = facts["urls"]
    config.site_url, config.repo_url, config.edit_uri = urls["Documentation"], urls["Repository"], "edit/main/docs/"
    config.repo_name, config.site_description = "/".join(urls["Repository"].split("/")[-2:]), facts["description"]
    config.extra["version"] = facts["version"]
    for problem in problems(Path(config.docs_dir)):
        log.warning(problem)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the repository."""
    for name in OF_THE_REPOSITORY:
        text = (ROOT / name).read_text(encoding="utf-8")
        file = File.generated(config, name.lower(), content=text.replace("](docs/", "]("))
        file.edit_uri = f"../{name}"
        files.append(file)
    return files


def on_page_content(content: str, page: Page, **_: object) -> str:
    """Convert formulas; the first paragraph describes the page to search engines."""
    content = mathml(content)
    first = re.search(r"<p>(.*?)</p>", content, re.DOTALL)
    if first and not page.is_homepage:
        page.meta.setdefault("description", html.escape(" ".join(html.unescape(re.sub(r"<[^>]*>", "", first[1])).split())))
    return content
