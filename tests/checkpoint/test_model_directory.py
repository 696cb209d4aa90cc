from engine.checkpoint.model_directory import differences


def test_differences_lists_missing_unexpected_and_mismatched() -> None:
    found = {"a": (1,), "c": (2,), "d": (4,)}
    assert differences(found, {"a": (1,), "b": (3,), "c": (3,)}) == [
        "b: missing, expected shape [3]",
        "d: unexpected, shape [4]",
        "c: shape [2], expected [3]",
    ]
