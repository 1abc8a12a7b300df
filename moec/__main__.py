"""`python -m moec`: the same command line as `moec`."""

from moec.cli import main

if __name__ == "__main__":
    main()
