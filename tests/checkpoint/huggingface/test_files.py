from engine.checkpoint.huggingface.files import plan_shards


def test_plan_shards() -> None:
    assert plan_shards({"a": 3, "b": 3}, 6) == {"model.safetensors": ["a", "b"]}
    assert plan_shards({"a": 3, "b": 4, "c": 9, "d": 1}, 6) == {
        "model-00001-of-00004.safetensors": ["a"],
        "model-00002-of-00004.safetensors": ["b"],
        "model-00003-of-00004.safetensors": ["c"],
        "model-00004-of-00004.safetensors": ["d"],
    }
