"""Build hook: an API page shows the public names of its package, each once; where it does not, a strict build fails."""

import importlib
import inspect
import logging
import re
from collections import Counter
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig

PACKAGES = (
    "hyperopt_nested", "hyperopt_nested.optim", "hyperopt_nested.rules", "hyperopt_nested.typing", "hyperopt_nested.testing",
    "hyperopt_nested.integrations", "hyperopt_nested.plot", "ftp", "ftp.finetuning",
)  # fmt: skip

log = logging.getLogger("mkdocs.hooks.public_names")


def problems(docs: Path) -> list[str]:
    """What is wrong with the API pages, in sentences; modules have pages of their own: the page of `a.b` is `api/b.md`."""
    found = []
    for package in PACKAGES:
        page = docs / "api" / f"{package.rpartition('.')[2]}.md"
        paths = re.findall(rf"^::: {package}\.(\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        above = importlib.import_module(package.partition(".")[0]).__all__ if "." in package else []  # which has entries of its own
        shown = Counter(path.split(".")[-1] for path in paths)
        module = importlib.import_module(package)
        public = Counter(name for name in module.__all__ if name not in above and not inspect.ismodule(getattr(module, name)))
        found += [f"{package}.{name} is public but has no entry in {page.name}" for name in sorted(public - shown)]
        found += [f"{package}.{name} is in {page.name} more often than it is public" for name in sorted(shown - public)]
    return found


def on_config(config: MkDocsConfig) -> None:
    """Warn of each of them."""
    for problem in problems(Path(config.docs_dir)):
        log.warning(problem)
