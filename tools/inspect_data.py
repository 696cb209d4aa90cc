"""`python tools/inspect_data.py`: see `engine/cli/inspect.py`."""

from engine.cli.inspect import main
from engine.errors import run_program

if __name__ == "__main__":
    run_program(main)
