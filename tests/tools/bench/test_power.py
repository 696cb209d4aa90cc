"""Samples of clocks and power, from what nvidia-smi prints."""

from tools.bench import power


def test_samples_are_summarized_and_what_is_cut_is_left_out():
    text = "1980, 655.12, 60\n1755, 699.80, 64\n1740, 701.00, 65\n[N/A], 1, 2\n1740, 70"
    assert power.summarize(text) == {
        "sm_mhz": [1740, 1755, 1980],
        "watts": [655.12, 699.8, 701.0],
        "celsius": [60, 64, 65],
        "samples": 3,
    }


def test_no_samples_are_an_error_with_what_was_said():
    assert power.summarize("No devices were found\n") == {
        "error": "nvidia-smi printed no samples: No devices were found"
    }


def test_a_cpu_has_none():
    with power.sampled("cpu") as found:
        pass
    assert found == {}
