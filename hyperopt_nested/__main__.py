"""`python -m hyperopt_nested`, which is the command `hyperopt-nested`."""

import logging
import signal
import sys
from importlib.metadata import version


def main() -> None:
    """Run the command line; where an optional package is missing, exit with one line that says what to install."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process at once, whatever catches exceptions or waits for threads
    log = logging.getLogger("hyperopt_nested")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())  # progress, on stderr
    try:
        from hyperopt_nested.cli import app
    except ModuleNotFoundError as missing:
        if missing.__cause__ is None:
            raise
        if sys.argv[1:] != ["--version"]:
            sys.exit(str(missing))
        print(f"hyperopt-nested {version('hyperopt-nested')}")
    else:
        app(prog_name="hyperopt-nested")


if __name__ == "__main__":
    main()
