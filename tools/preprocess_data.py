"""`python tools/preprocess_data.py`: see `engine/cli/preprocess.py`."""

from engine.cli.preprocess import main
from engine.errors import run_program

if __name__ == "__main__":
    run_program(main)
