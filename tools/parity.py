"""`python tools/parity.py`: see `engine/cli/parity.py`."""

from engine.cli.parity import main
from engine.errors import run_program

if __name__ == "__main__":
    run_program(main)
