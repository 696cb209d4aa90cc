"""`python tools/generate.py`: see `engine/cli/generate.py`."""

from engine.cli.generate import main
from engine.errors import run_program

if __name__ == "__main__":
    run_program(main)
