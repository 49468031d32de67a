"""`python -m ftp`."""

import sys

_OPTIONAL = {"matplotlib", "numpy", "rich", "scipy", "sklearn", "typer"}
"""Modules of the extras `demo` and `finetune`."""


def main() -> None:
    """Run the command line; where an optional package is missing, exit with one line that says what to install."""
    try:
        from ftp.cli import app

        app()
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in _OPTIONAL:
            raise
        extra = "demo" if "demo" in sys.argv[1:2] else "finetune"
        sys.exit(f'{package} is not installed: pip install "hyperopt-nested[{extra}]"')


if __name__ == "__main__":
    main()
