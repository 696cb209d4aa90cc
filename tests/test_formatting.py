from engine.formatting import counted, duration, megabytes


def test_durations():
    assert [duration(s) for s in (0, 59.6, 3600, 93784)] == ["0:00", "1:00", "1:00:00", "1d 02:03:04"]


def test_counts_and_sizes():
    assert [counted(n, "file") for n in (0, 1, 2048)] == ["0 files", "1 file", "2,048 files"]
    assert counted(2, "microbatch", "es") == "2 microbatches"
    assert megabytes(1_234_560_000) == "1,234.6 MB"
