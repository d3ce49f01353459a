"""`python -m nano_batch` is the command `nano-batch`."""

from nano_batch.cli import main

if __name__ == "__main__":
    main()
