"""`python tools/plan.py`: see `engine/cli/plan.py`."""

from engine.cli.plan import main
from engine.errors import run_program

if __name__ == "__main__":
    run_program(main)
