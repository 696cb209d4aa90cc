"""`python tools/prove.py`: see `engine/cli/prove.py`."""

from engine.cli.prove import main
from engine.errors import run_program

if __name__ == "__main__":
    run_program(main)
