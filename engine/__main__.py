"""`python -m engine`: see `engine/cli/main.py`."""

from engine.cli.main import main
from engine.errors import run_program

if __name__ == "__main__":
    run_program(main)
