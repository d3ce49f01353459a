"""The command `nano-batch`, and `python -m nano_batch`."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command; Ctrl-C, also while modules are imported, exits with 130."""
    try:
        from nano_batch import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
