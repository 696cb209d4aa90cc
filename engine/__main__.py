"""`python -m engine`: see `engine/cli/main.py`."""

from engine.cli.main import start

if __name__ == "__main__":
    start()
