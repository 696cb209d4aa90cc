import pytest

from engine.checkpoint import manifest as fmt
from engine.checkpoint.manifest import Manifest, State
from engine.errors import CheckpointError


def manifest() -> Manifest:
    stored = fmt.StoredRectangle(
        file="state-00000-of-00001.safetensors", key="param/a/0,0", start=(0, 0), extent=(2, 3), xxh3_64="0" * 16
    )
    return Manifest(
        save_number=1,
        state=State(5, 10, 100, "data", {"dp": 1}),
        files={
            "state-00000-of-00001.safetensors": fmt.StoredFile(size=100, xxh3_64="0" * 16),
            "config.yaml": fmt.StoredFile(size=3, xxh3_64="0" * 16),
            "tokenizer/my tok.model": fmt.StoredFile(size=3, xxh3_64="0" * 16),
        },
        tensors={"param": {"a": fmt.StoredTensor(shape=(2, 3), dtype="F32", rectangles=(stored,))}},
    )


def test_manifest_round_trip() -> None:
    assert fmt.decode_manifest(fmt.encode_manifest(manifest()), "m") == manifest()


def test_a_manifest_of_an_older_version_with_a_loss_scale_is_read() -> None:
    body = manifest().model_dump_json().replace('"data_fingerprint"', '"loss_scale":null,"data_fingerprint"').encode()
    checksum = fmt.xxhash.xxh3_64_hexdigest(body).encode()
    assert fmt.decode_manifest(b'{"xxh3_64":"' + checksum + b'","manifest":' + body + b"}\n", "m") == manifest()


def test_every_flipped_bit_and_every_truncation_of_a_manifest_is_found() -> None:
    content = fmt.encode_manifest(manifest())
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        for damaged in (bytes(flipped), content[:position]):
            with pytest.raises(CheckpointError, match=r"^m is damaged"):
                fmt.decode_manifest(damaged, "m")


def edited(**changes: object) -> bytes:
    """A manifest with other content and a matching checksum."""
    return fmt.encode_manifest(manifest().model_copy(update=changes))


def with_rectangle(**changes: object) -> dict[str, dict[str, fmt.StoredTensor]]:
    tensor = manifest().tensors["param"]["a"]
    stored = tensor.rectangles[0].model_copy(update=changes)
    return {"param": {"a": tensor.model_copy(update={"rectangles": (stored,)})}}


HUGE = fmt.StoredTensor(
    shape=(1 << 40,),
    dtype="F32",
    rectangles=(
        fmt.StoredRectangle(
            file="state-00000-of-00001.safetensors", key="param/a/0", start=(0,), extent=(1 << 40,), xxh3_64="0" * 16
        ),
    ),
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format_version": 2}, "format_version"),
        ({"save_number": 0}, "save_number"),
        ({"tensors": with_rectangle(file="../outside.safetensors")}, "not a listed shard"),
        ({"tensors": with_rectangle(file="config.yaml")}, "not a listed shard"),
        ({"tensors": with_rectangle(key="param/b/0,0")}, "does not match its place"),
        ({"tensors": with_rectangle(extent=(2, 2), key="param/a/0,0")}, "2 of 6 elements are missing"),
        ({"tensors": with_rectangle(start=(1, 0), key="param/a/1,0")}, "is not inside"),
        ({"tensors": {"param": {"a": HUGE}}}, "bytes of rectangles"),
        ({"files": manifest().files | {"../x": fmt.StoredFile(size=1, xxh3_64="0" * 16)}}, "not a file of a"),
        ({"files": manifest().files | {"tokenizer/..": fmt.StoredFile(size=1, xxh3_64="0" * 16)}}, "not a file of a"),
        ({"files": manifest().files | {"tokenizer/a/b": fmt.StoredFile(size=1, xxh3_64="0" * 16)}}, "not a file"),
        ({"files": {}}, "config.yaml is not listed"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        fmt.decode_manifest(edited(**changes), "m")


def test_a_json_depth_bomb_is_an_error() -> None:
    body = b"[" * 200_000
    content = b'{"xxh3_64":"' + fmt.xxhash.xxh3_64_hexdigest(body).encode() + b'","manifest":' + body + b"}\n"
    with pytest.raises(CheckpointError):
        fmt.decode_manifest(content, "m")
