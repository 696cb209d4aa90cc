import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.checkpoint import reader
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.run_directory import candidates, find, open_checkpoint
from engine.checkpoint.save import save
from engine.checkpoint.shares import StateSlice
from engine.checkpoint.storage import Storage
from engine.errors import CheckpointError, StorageError
from engine.model.families import PRESETS
from engine.parallel.table import Rectangle
from tests.checkpoint.checkpoint_cases import CONFIG, KINDS, SHAPES, pieces, save_step, state, tensors


def holds(checkpoint: Checkpoint | None, seed: int) -> bool:
    """Whether every tensor is, bitwise, the one of `seed`."""
    assert checkpoint is not None
    checkpoint.verify()
    return all(torch.equal(checkpoint.read(key[1], kind=key[0]), tensor) for key, tensor in tensors(seed).items())


def is_valid(path: Path) -> bool:
    try:
        Checkpoint(path)
    except CheckpointError:
        return False
    return True


def steps(run_dir: Path) -> list[str]:
    return sorted(name for name in os.listdir(run_dir / "checkpoints") if name != "latest")


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_what_any_number_of_ranks_saved_reads_back_bitwise(tmp_path: Path, world_size: int) -> None:
    results = save_step(tmp_path, 7, world_size=world_size)
    assert results == [tmp_path / "checkpoints" / "step_00000007"] * world_size
    checkpoint = find(tmp_path)
    assert holds(checkpoint, 7)
    assert checkpoint is not None
    assert checkpoint.state == state(7)
    assert checkpoint.tensors("param") == SHAPES
    assert checkpoint.config_yaml_path.read_text() == CONFIG
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000007"
    assert sorted(os.listdir(checkpoint.path)) == sorted(
        ["manifest.json", "config.yaml", *(f"state-{r:05d}-of-{world_size:05d}.safetensors" for r in range(world_size))]
    )


def test_any_rectangle_can_be_read_from_any_cut(tmp_path: Path) -> None:
    save_step(tmp_path, 1, world_size=3)
    checkpoint = open_checkpoint(tmp_path)
    whole = tensors(1)["param", "embed.weight"]
    for first in range(0, 33, 4):
        for count in (1, 33 - first):
            wanted = Rectangle((first, 2), (count, 5))
            assert torch.equal(checkpoint.read("embed.weight", wanted), whole[first : first + count, 2:7])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("block_bytes", [1, 40, 100, 1 << 20])
def test_blocks_of_rows_from_any_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, block_bytes: int
) -> None:
    monkeypatch.setattr(reader, "ROW_BLOCK_BYTES", block_bytes)
    save_step(tmp_path, 1, world_size=world_size)
    checkpoint = open_checkpoint(tmp_path)
    for (kind, name), whole in tensors(1).items():
        blocks = list(checkpoint.blocks(name, kind=kind))
        assert torch.equal(torch.cat(blocks) if whole.dim() else blocks[0], whole)
        row = whole[0].numel() if whole.dim() else 1
        assert all(block.numel() * whole.itemsize <= max(block_bytes, row * whole.itemsize) for block in blocks)


def test_a_changed_bit_is_found_after_the_last_block(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    checkpoint = open_checkpoint(tmp_path)
    shard = checkpoint.path / "state-00000-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    problems = []
    for kind, name in tensors(1):
        try:
            list(checkpoint.blocks(name, kind=kind))
        except CheckpointError as error:
            problems.append(str(error))
    assert len(problems) == 1 and "does not match its checksum" in problems[0]


def test_neighbors_in_a_stored_rectangle_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 1)
    hashed: list[int] = []
    real = reader.tensor_hash
    monkeypatch.setattr(reader, "tensor_hash", lambda tensor: hashed.append(tensor.numel()) or real(tensor))
    checkpoint = open_checkpoint(tmp_path)
    for row in range(33):
        checkpoint.read("embed.weight", Rectangle((row, 0), (1, 8))).zero_()
    assert hashed == [33 * 8]
    assert holds(checkpoint, 1)


def test_a_rank_that_owns_nothing_takes_part(tmp_path: Path) -> None:
    def owned(seed: int, rank: int, world_size: int) -> list[StateSlice]:
        return pieces(seed, 0, 1) if rank == 1 else []

    save_step(tmp_path, 3, world_size=3, owned=owned)
    checkpoint = find(tmp_path)
    assert holds(checkpoint, 3)
    assert checkpoint and [name for name in os.listdir(checkpoint.path) if "state" in name] == [
        "state-00001-of-00003.safetensors"
    ]


def test_the_dtype_of_a_piece_is_the_stored_one(tmp_path: Path) -> None:
    half = torch.randn(4).bfloat16()
    piece = StateSlice("param", "a", (4,), Rectangle((0,), (4,)), half, dtype=torch.float32)
    save_step(tmp_path, 1, owned=lambda *_: [piece])
    read = open_checkpoint(tmp_path).read("a")
    assert read.dtype == torch.float32
    assert torch.equal(read, half.float())


def test_every_file_and_every_changed_directory_is_synced(tmp_path: Path, synced: list[int]) -> None:
    created: list[str] = []
    counting = Storage(lambda number, name, path: created.append(path.name) if name == "create" else None)
    save_step(tmp_path, 1, storages=[counting])
    assert created == [
        "state-00000-of-00001.safetensors", "share-00000.json", "config.yaml", "manifest.json", "latest.partial",
    ]  # fmt: skip
    directories = 5  # the new directory's name, the share, the manifest, the rename, the replaced `latest`
    assert len(synced) == len(created) + directories


def test_tokenizer_files_are_kept(saved: Path) -> None:
    checkpoint = open_checkpoint(saved)
    assert checkpoint.tokenizer_dir is not None
    assert (checkpoint.tokenizer_dir / "tok.model").read_bytes() == b"pieces"
    assert checkpoint.tokenizer_spec == str(checkpoint.tokenizer_dir)


def incomplete(seed: int, rank: int, world_size: int) -> list[StateSlice]:
    owned = pieces(seed, rank, world_size)
    return owned[1:] if rank == 1 else owned


def doubled(seed: int, rank: int, world_size: int) -> list[StateSlice]:
    return pieces(seed, 0, 2) if rank == 1 else pieces(seed, rank, world_size)


@pytest.mark.parametrize(("owned", "expected"), [(incomplete, "missing"), (doubled, "overlap")])
def test_an_inexact_cover_is_never_committed(
    tmp_path: Path, owned: Callable[[int, int, int], list[StateSlice]], expected: str
) -> None:
    save_step(tmp_path, 1, world_size=2)
    for result in save_step(tmp_path, 2, world_size=2, owned=owned):
        assert isinstance(result, StorageError)
        assert expected in str(result)
    assert steps(tmp_path) == ["step_00000001"]


def test_a_rank_that_wrote_nothing_blocks_the_commit_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="rank 1 wrote nothing"):
        save(
            tmp_path, pieces(1, 0, 2), state(1), config_yaml=CONFIG, tokenizer_files=[], keep_last=1,
            rank=0, world_size=2, first_problem=lambda problem: problem,
        )  # fmt: skip
    assert steps(tmp_path) == []


def test_a_fault_of_the_program_keeps_its_exception_on_its_rank(tmp_path: Path) -> None:
    def owned(seed: int, rank: int, world_size: int) -> list[StateSlice]:
        good = pieces(seed, rank, world_size)
        return [dataclasses.replace(good[0], tensor=torch.zeros(3)), *good[1:]] if rank == 1 else good

    first, second = save_step(tmp_path, 1, world_size=2, owned=owned)
    assert isinstance(first, StorageError)
    assert isinstance(second, ValueError)
    assert "shape [3], expected [1, 4]" in str(first)
    assert steps(tmp_path) == []


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_step(tmp_path, step, keep_last=2)
    assert steps(tmp_path) == ["step_00000004", "step_00000005"]


def test_damaged_checkpoints_do_not_count_as_kept_and_are_left_for_a_person(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path, step, keep_last=2)
    os.truncate(tmp_path / "checkpoints" / "step_00000003" / "manifest.json", 5)
    save_step(tmp_path, 4, keep_last=2)
    assert steps(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]


def test_going_back_to_an_earlier_step_makes_that_line_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    save_step(tmp_path, 2, seed=99)  # resumed from 1 by hand, came to 2 again
    found = find(tmp_path)
    assert found and found.path.name == "step_00000002"
    assert holds(found, 99)
    assert steps(tmp_path) == ["step_00000001", "step_00000002", "step_00000003"]
    save_step(tmp_path, 2, seed=98, keep_last=2)
    assert holds(find(tmp_path), 98)
    assert steps(tmp_path) == ["step_00000002", "step_00000003"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    os.truncate(tmp_path / "checkpoints" / "step_00000001" / "config.yaml", 0)
    save_step(tmp_path, 1, seed=5)
    assert holds(find(tmp_path), 5)
    assert steps(tmp_path) == ["step_00000001"]


class Died(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


def at_operation(number: int, error: BaseException) -> Storage:
    def hook(seen: int, name: str, path: Path) -> None:
        if seen == number:
            raise error

    return Storage(hook)


def count_operations(run_dir: Path, prepare: Callable[[Path], None], world_size: int = 1) -> list[int]:
    """Storage operations of each rank in a save that works."""
    prepare(run_dir)
    counting = [Storage() for _ in range(world_size)]
    save_step(run_dir, 2, keep_last=1, world_size=world_size, storages=counting)
    return [storage.operations for storage in counting]


def one_older(run_dir: Path) -> None:
    save_step(run_dir, 1)


def the_same_step(run_dir: Path) -> None:
    save_step(run_dir, 1)
    save_step(run_dir, 2, seed=1)  # other content, so that the two can be told apart


def the_same_step_set_aside(run_dir: Path) -> None:
    """A save of step 2 over a valid one died between its two renames, and then the disk lost what it had written."""
    save_step(run_dir, 2, seed=1)
    shutil.copytree(
        run_dir / "checkpoints" / "step_00000002", run_dir / "checkpoints" / "step_00000002.previous"
    )  # fmt: skip
    os.truncate(run_dir / "checkpoints" / "step_00000002" / "manifest.json", 9)


@pytest.mark.parametrize(
    ("prepare", "world_size", "dying"),
    [(one_older, 1, 0), (the_same_step, 1, 0), (the_same_step_set_aside, 1, 0), (one_older, 2, 0), (one_older, 2, 1)],
)
def test_dying_at_any_operation_leaves_a_committed_checkpoint(
    tmp_path: Path, prepare: Callable[[Path], None], world_size: int, dying: int
) -> None:
    """What was newest before or what was being saved; and the next save works and cleans up."""
    total = count_operations(tmp_path / "count", prepare, world_size)[dying]
    outcomes = set()
    for number in range(1, total + 1):
        run_dir = tmp_path / str(number)
        prepare(run_dir)
        damaged = {name for name in steps(run_dir) if not is_valid(run_dir / "checkpoints" / name)}
        storages = [at_operation(number, Died()) if rank == dying else None for rank in range(world_size)]
        results = save_step(run_dir, 2, keep_last=1, world_size=world_size, storages=storages)
        assert isinstance(results[dying], Died)
        assert not any(isinstance(result, Path) for result in results)
        found = find(run_dir, report=lambda _: None)
        new = holds(found, 2)
        assert new or holds(found, 1), number
        outcomes.add(new)
        save_step(run_dir, 3, keep_last=1)
        assert holds(find(run_dir), 3), number
        assert [name for name in steps(run_dir) if name not in damaged] == ["step_00000003"], number
    assert outcomes == ({True, False} if dying == 0 else {False})


def test_processes_that_really_die(tmp_path: Path) -> None:
    """The same with `os._exit` in a forked process: not even a `finally` runs."""
    save_step(tmp_path, 1)
    for number in (3, 8, 15, 22, 28):
        child = os.fork()
        if child == 0:
            storage = Storage(lambda seen, name, path, number=number: os._exit(9) if seen == number else None)
            save_step_without_threads(tmp_path, 2, storage)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert holds(find(tmp_path, report=lambda _: None), 1)


def save_step_without_threads(run_dir: Path, step: int, storage: Storage) -> None:
    save(
        run_dir, pieces(step, 0, 1), state(step), config_yaml=CONFIG, tokenizer_files=[], keep_last=1,
        rank=0, world_size=1, first_problem=lambda problem: problem, storage=storage,
    )  # fmt: skip


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_operation_is_a_storage_error_and_leaves_nothing(tmp_path: Path, code: int) -> None:
    (total,) = count_operations(tmp_path / "count", one_older)
    for number in range(1, total + 1):
        run_dir = tmp_path / str(number)
        one_older(run_dir)
        (result,) = save_step(run_dir, 2, keep_last=1, storages=[at_operation(number, OSError(code, "broken"))])
        assert isinstance(result, StorageError), number
        assert "broken" in str(result)
        assert not any("step_00000002.partial" in name for name in steps(run_dir)), number
        found = find(run_dir, report=lambda _: None)
        assert holds(found, 1) or holds(found, 2)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_error_on_one_rank_is_an_error_on_all(tmp_path: Path, rank: int) -> None:
    save_step(tmp_path, 1, world_size=3)

    def full(number: int, name: str, path: Path) -> None:
        if name == "write" and path.name.startswith("state-"):
            raise OSError(errno.ENOSPC, "No space left on device")

    storages = [Storage(full) if r == rank else None for r in range(3)]
    for result in save_step(tmp_path, 2, world_size=3, storages=storages):
        assert isinstance(result, StorageError)
        assert f"rank {rank}: [Errno 28] No space left on device" in str(result)
    assert steps(tmp_path) == ["step_00000001"]
    assert holds(find(tmp_path), 1)


def test_nothing_there_is_a_fresh_start(tmp_path: Path) -> None:
    assert find(tmp_path / "never") is None
    (tmp_path / "checkpoints").mkdir()
    assert find(tmp_path) is None
    (tmp_path / "checkpoints" / "step_00000001.partial").mkdir()  # the very first save died
    assert find(tmp_path) is None


@pytest.mark.parametrize(
    "content", [None, "", "step_00000001", "step_00000009", "../../elsewhere", "\0\0", b"\xff\xfe", "directory"]
)
def test_the_newest_is_found_whatever_latest_says(saved: Path, content: str | bytes | None) -> None:
    latest = saved / "checkpoints" / "latest"
    latest.unlink()
    if content == "directory":
        latest.mkdir()
    elif content is not None:
        latest.write_bytes(content if isinstance(content, bytes) else content.encode())
    said: list[str] = []
    found = find(saved, said.append)
    assert found and found.path.name == "step_00000002"
    assert len(said) == 1
    assert "latest" in said[0]


def test_a_damaged_newest_is_reported_and_passed_over(saved: Path) -> None:
    os.truncate(saved / "checkpoints" / "step_00000002" / "state-00001-of-00002.safetensors", 100)
    said: list[str] = []
    found = find(saved, said.append)
    assert found and found.path.name == "step_00000001"
    assert "state-00001-of-00002.safetensors" in said[0]
    assert [c.path.name for c in candidates(saved, said.append)] == ["step_00000001"]


def test_files_but_none_valid_is_an_error_with_every_reason(saved: Path) -> None:
    (saved / "checkpoints" / "step_00000001" / "manifest.json").unlink()
    os.truncate(saved / "checkpoints" / "step_00000002" / "config.yaml", 1)
    with pytest.raises(CheckpointError) as error:
        find(saved)
    assert "step_00000001/manifest.json is missing" in str(error.value)
    assert "step_00000002/config.yaml is damaged" in str(error.value)


def test_foreign_files_or_a_lonely_latest_are_not_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "a" / "checkpoints" / "iter_0001000").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="iter_0001000 is not a checkpoint"):
        find(tmp_path / "a")
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    (tmp_path / "b" / "checkpoints" / "latest").write_text("step_00000004")
    with pytest.raises(CheckpointError, match="'step_00000004', which is not there"):
        find(tmp_path / "b")


def test_open_checkpoint_says_what_it_did_not_find(saved: Path, tmp_path: Path) -> None:
    assert open_checkpoint(saved).path.name == "step_00000002"
    assert open_checkpoint(saved / "checkpoints").path.name == "step_00000002"
    assert open_checkpoint(saved / "checkpoints" / "step_00000001").state.step == 1
    with pytest.raises(CheckpointError, match=r"no such checkpoint directory: .*misspelt"):
        open_checkpoint(tmp_path / "misspelt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(tmp_path / "empty")
    (saved / "checkpoints" / "step_00000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        open_checkpoint(saved / "checkpoints" / "step_00000001")


def test_reading_what_is_not_there_names_it(saved: Path) -> None:
    checkpoint = open_checkpoint(saved)
    with pytest.raises(CheckpointError, match=r"no exp_avg_sq of norm\.weight"):
        checkpoint.read("norm.weight", kind="exp_avg_sq")
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \[8\], wanted \[4:9\]"):
        checkpoint.read("norm.weight", Rectangle((4,), (5,)))


def test_a_checkpoint_of_another_model_is_refused_with_a_list(saved: Path) -> None:
    checkpoint = open_checkpoint(saved)
    checkpoint.require(SHAPES)
    with pytest.raises(CheckpointError, match="another model") as error:
        checkpoint.require({**SHAPES, "head.weight": (2, 2), "norm.weight": (9,)})
    assert "head.weight: missing" in str(error.value)
    assert "norm.weight: shape [8], expected [9]" in str(error.value)


def read_all(checkpoint_dir: Path) -> None:
    checkpoint = open_checkpoint(checkpoint_dir)
    for kind in KINDS:
        for name in SHAPES:
            checkpoint.read(name, kind=kind)


FILES = [
    "manifest.json", "config.yaml", "tokenizer/tok.model",
    "state-00000-of-00002.safetensors", "state-00001-of-00002.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mutation", ["truncate", "extend", "zero", "remove", "directory", "foreign"])
def test_every_mutation_is_an_error_that_names_the_file(saved: Path, name: str, mutation: str) -> None:
    checkpoint_dir = saved / "checkpoints" / "step_00000002"
    path = checkpoint_dir / name
    content = path.read_bytes()
    path.unlink()
    if mutation == "directory":
        path.mkdir()
    elif mutation == "foreign":  # the same file of the other checkpoint: same names, same sizes, other content
        path.write_bytes((saved / "checkpoints" / "step_00000001" / name).read_bytes())
        if name in ("config.yaml", "tokenizer/tok.model"):
            path.write_bytes(bytes(reversed(content)))
    elif mutation != "remove":
        path.write_bytes({"truncate": content[:-1], "extend": content + b"\0", "zero": bytes(len(content))}[mutation])
    with pytest.raises(CheckpointError, match=r"state-|manifest" if mutation == "foreign" else path.name):
        read_all(checkpoint_dir)


def test_every_flipped_byte_of_a_shard_is_found(saved: Path) -> None:
    checkpoint_dir = saved / "checkpoints" / "step_00000002"
    path = checkpoint_dir / "state-00001-of-00002.safetensors"
    content = path.read_bytes()
    for position in range(0, len(content), 9):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"state-00001-of-00002\.safetensors"):
            read_all(checkpoint_dir)
        with pytest.raises(CheckpointError, match=r"state-00001-of-00002\.safetensors"):
            open_checkpoint(checkpoint_dir).verify()
    path.write_bytes(content)
    read_all(checkpoint_dir)


def test_swapped_shards_are_found(saved: Path) -> None:
    checkpoint_dir = saved / "checkpoints" / "step_00000002"
    first, second = (checkpoint_dir / f"state-0000{rank}-of-00002.safetensors" for rank in range(2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(CheckpointError, match="state-0000"):
        read_all(checkpoint_dir)


def test_a_shard_with_the_right_bytes_in_other_shapes_is_found(saved: Path) -> None:
    checkpoint_dir = saved / "checkpoints" / "step_00000002"
    path = checkpoint_dir / "state-00000-of-00002.safetensors"
    content = path.read_bytes()
    assert content.count(b'"shape":[16,8]') == 2
    path.write_bytes(content.replace(b'"shape":[16,8]', b'"shape":[8,16]'))
    with pytest.raises(CheckpointError, match=r"state-00000-of-00002\.safetensors does not hold what"):
        read_all(checkpoint_dir)


def test_the_model_section_of_an_otherwise_empty_config_is_enough(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"config\.yaml: no usable model section"):
        assert open_checkpoint(tmp_path).model


def test_a_family_that_this_release_does_not_know(tmp_path: Path) -> None:
    model = {**PRESETS["tiny"], "family": "gpt5"}
    save_step(tmp_path, 1, config_yaml=json.dumps({"model": model}))
    with pytest.raises(CheckpointError, match=r"no usable model section: model\.family = 'gpt5' is unknown"):
        assert open_checkpoint(tmp_path).model
