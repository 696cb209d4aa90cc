"""`python tools/train_tokenizer.py`: see `engine/cli/tokenizer.py`."""

from engine.cli.tokenizer import main
from engine.errors import run_program

if __name__ == "__main__":
    run_program(main)
