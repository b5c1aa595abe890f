"""`python -m qunlearn`, where the command is not on the PATH."""

from qunlearn.cli.app import main

if __name__ == "__main__":
    main()
