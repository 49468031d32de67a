"""Build hook: every public name must have an entry on its package's API page; what is missing fails a strict build."""

import importlib
import logging
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig

log = logging.getLogger("mkdocs.hooks.public_names")


def on_config(config: MkDocsConfig) -> None:
    """Warn of each name in a package's `__all__` that its API page does not show."""
    for package in ("hyperopt_nested", "ftp"):
        page = (Path(config.docs_dir) / "api" / f"{package}.md").read_text(encoding="utf-8")
        shown = {path.split(".")[-1] for path in re.findall(rf"^::: {package}\.(\S+)$", page, re.MULTILINE)}
        for name in sorted(set(importlib.import_module(package).__all__) - shown):
            log.warning("%s.%s is public but has no entry in docs/api/%s.md", package, name, package)
