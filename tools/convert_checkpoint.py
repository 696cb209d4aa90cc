"""`python tools/convert_checkpoint.py`: see `engine/cli/convert.py`."""

from engine.cli.convert import main
from engine.errors import run_program

if __name__ == "__main__":
    run_program(main)
