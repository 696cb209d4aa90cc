import pytest

from engine.cli.arguments import program_parser, require_at_least
from engine.errors import ConfigError


def test_the_help_keeps_its_line_breaks():
    shown = program_parser("plan", "First.\n\nSecond.", "examples:\n  one\n  two").format_help()
    assert "First.\n\nSecond.\n" in shown and shown.endswith("examples:\n  one\n  two\n")


def test_an_option_that_is_spelled_alike_is_suggested():
    parser = program_parser("generate", "")
    parser.add_argument("--max-new-tokens", type=int)
    with pytest.raises(
        ConfigError, match=r"^unrecognized arguments: --max_new_tokens=5 \(did you mean '--max-new-tokens'\?\); see "
    ):
        parser.parse_args(["--max_new_tokens=5"])


def test_options_below_their_lowest_value_are_named():
    require_at_least(1, workers=1, log_interval=None)
    with pytest.raises(ConfigError, match=r"^--log-interval 0: expected at least 1$"):
        require_at_least(1, workers=1, log_interval=0)
