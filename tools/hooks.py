"""Build hooks of the documentation: links of `pyproject.toml`, formulas as MathML, pages and examples of the repository, complete API."""

import ast
import html
import importlib
import inspect
import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from release import facts

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "hyperopt_nested", "hyperopt_nested.optim", "hyperopt_nested.rules", "hyperopt_nested.typing", "hyperopt_nested.testing",
    "hyperopt_nested.integrations", "hyperopt_nested.plot", "ftp", "ftp.finetuning",
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


def on_config(config: MkDocsConfig) -> None:
    """Take links and version from `pyproject.toml`; warn of problems of the API pages."""
    project = facts(ROOT)
    urls = project["urls"]
    config.site_url, config.repo_url, config.edit_uri = urls["Documentation"], urls["Repository"], "edit/main/docs/"
    config.repo_name, config.site_description = "/".join(urls["Repository"].split("/")[-2:]), project["description"]
    config.extra["version"] = project["version"]
    for problem in problems(Path(config.docs_dir)):
        log.warning(problem)


def notebook(program: str) -> str:
    """An example as a Jupyter notebook: its docstring as text, then its code, a cell a definition."""
    (docstring, *_) = ast.parse(program).body
    code = "".join(program.splitlines(keepends=True)[docstring.end_lineno :]).strip()
    no_arguments = "import sys\n\nsys.argv[1:] = []  # those of Jupyter"
    cells: list[dict[str, Any]] = [{"cell_type": "markdown", "metadata": {}, "source": ast.get_docstring(ast.parse(program))}]
    for source in (no_arguments, *code.split("\n\n\n")):
        cells.append({"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": [], "source": source})
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}, indent=1)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the repository, and its examples as notebooks, if they can be such: if they have no use for their file."""
    for path in sorted((ROOT / "examples").glob("*.py")):
        if "__file__" not in (program := path.read_text(encoding="utf-8")):
            files.append(File.generated(config, f"examples/{path.stem}.ipynb", content=notebook(program)))
    for name in OF_THE_REPOSITORY:
        text = (ROOT / name).read_text(encoding="utf-8")
        file = File.generated(config, name.lower(), content=text.replace("](docs/", "]("))
        file.edit_uri = f"../{name}"
        files.append(file)
    return files


def on_page_markdown(markdown: str, config: MkDocsConfig, **_: object) -> str:
    """Lead links such as `[program](repo:examples/maml.py)` to the repository."""
    return markdown.replace("](repo:", f"]({config.repo_url}/blob/main/")


def on_page_content(content: str, page: Page, **_: object) -> str:
    """Convert formulas; the first paragraph describes the page to search engines."""
    content = mathml(content)
    first = re.search(r"<p>(.*?)</p>", content, re.DOTALL)
    if first and not page.is_homepage:
        page.meta.setdefault("description", html.escape(" ".join(html.unescape(re.sub(r"<[^>]*>", "", first[1])).split())))
    return content
