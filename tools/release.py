"""Check the tag of a release, and print its release notes: `python tools/release.py v0.1.0`."""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any


def facts(project: Path) -> dict[str, Any]:
    """The table `project` of the `pyproject.toml` in a folder."""
    return dict(tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"])


def notes(tag: str, project: Path) -> str:
    """Return the changelog's section of a version.

    Args:
        tag: of the release, such as `v0.1.0`.
        project: folder of `pyproject.toml` and `CHANGELOG.md`.

    Raises:
        ValueError: the tag is not `v` and the version in `pyproject.toml`, its urls are not set, or the changelog has no section of that
            version.
    """
    version = facts(project)["version"]
    if tag != f"v{version}":
        raise ValueError(f"the tag is {tag!r}, but the version in pyproject.toml is {version}: the tag must be 'v{version}'")
    changelog = (project / "CHANGELOG.md").read_text(encoding="utf-8")
    if unset := [url for url in facts(project).get("urls", {}).values() if ".example/" in url]:
        raise ValueError(f"pyproject.toml has {unset[0]}, which is no address: make urls REPOSITORY=https://... DOCUMENTATION=https://.../")
    section = re.search(rf"^## \[{re.escape(version)}\][^\n]*\n(.*?)(?=^## |^\[|\Z)", changelog, re.MULTILINE | re.DOTALL)
    if section is None or not section[1].strip():
        raise ValueError(f"CHANGELOG.md has no section '## [{version}]': rename 'Unreleased', and add the date")
    return section[1].strip()


if __name__ == "__main__":
    try:
        print(notes(sys.argv[1], Path(__file__).parent.parent))
    except ValueError as error:
        sys.exit(str(error))
