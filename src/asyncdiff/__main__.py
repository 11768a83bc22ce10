"""`python -m asyncdiff` is the command `asyncdiff`."""

from asyncdiff.cli import main

if __name__ == "__main__":
    main()
