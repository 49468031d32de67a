"""`python -m ftp`."""

import sys

_EXTRA = {"matplotlib", "numpy", "rich", "scipy", "sklearn", "typer"}
"""Modules of the extra `demo`."""


def main() -> None:
    """Run the command line; where an optional package is missing, exit with one line that says what to install."""
    try:
        from ftp.cli import app

        app()
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        sys.exit(f"{package} is not installed: pip install 'hyperopt-nested[demo]'")


if __name__ == "__main__":
    main()
