"""safetensors files: what we write is what the library reads, and the other way round."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emma_train.errors import UserError
from emma_train.storage.safetensors_io import Spec, Tensors, write_safetensors, write_sharded

TENSORS = {
    "odd": torch.arange(3, dtype=torch.bfloat16),
    "flag": torch.tensor([True, False, True]),
    "matrix": torch.randn(5, 7),
    "scalar": torch.tensor(3),
    "half": torch.randn(3, 1, 2).half(),
    "none": torch.zeros(0, 4),
}
NAMES = {"odd": "BF16", "flag": "BOOL", "matrix": "F32", "scalar": "I64", "half": "F16", "none": "F32"}
SPECS = {name: Spec(NAMES[name], tuple(value.shape)) for name, value in TENSORS.items()}


def same(read: dict[str, torch.Tensor]) -> bool:
    return read.keys() == TENSORS.keys() and all(
        torch.equal(v, TENSORS[k]) and v.dtype == TENSORS[k].dtype for k, v in read.items()
    )


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "ours.safetensors", SPECS, TENSORS.__getitem__)
    assert same(load_file(tmp_path / "ours.safetensors"))


@pytest.mark.parametrize("shards", [1, 2])
def test_we_read_what_the_library_writes_whole_and_in_slices(tmp_path: Path, shards: int) -> None:
    if shards == 1:
        save_file(TENSORS, tmp_path / "model.safetensors")
    else:
        where = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(TENSORS)}
        for file in set(where.values()):
            save_file({k: v for k, v in TENSORS.items() if where[k] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    tensors = Tensors(tmp_path)
    assert tensors.specs == SPECS
    assert same({name: tensors.read(name) for name in TENSORS})
    assert torch.equal(tensors.read("matrix", (slice(1, 3), slice(0, 7))), TENSORS["matrix"][1:3])
    assert torch.equal(tensors.read("half", (slice(2, 3), slice(0, 1), slice(1, 2))), TENSORS["half"][2:, :, 1:])


def test_a_crash_while_writing_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, SPECS, TENSORS.__getitem__)
    before = path.read_bytes()

    def dies(name: str) -> torch.Tensor:
        if name == "odd":
            raise KeyboardInterrupt
        return TENSORS[name] * 0

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, SPECS, dies)
    assert path.read_bytes() == before and same(load_file(path))


@pytest.mark.parametrize(("limit", "files"), [(169, 1), (168, 2), (20, 3), (1, 6)])
def test_files_keep_to_a_limit_and_no_tensor_is_cut(tmp_path: Path, limit: float, files: int) -> None:
    """They have 6, 3, 140, 8, 12 and 0 bytes."""
    write_sharded(tmp_path, SPECS, TENSORS.__getitem__, limit)
    read = Tensors(tmp_path)
    assert same({name: read.read(name) for name in read.specs})
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    assert (tmp_path / "model.safetensors.index.json").exists() == (files > 1)


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_a_cut_file_is_named_in_one_line(tmp_path: Path, size: int) -> None:
    save_file(TENSORS, path := tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=f"^{path}: not a complete safetensors file .*; copy or download it again$"):
        Tensors(tmp_path)


def test_a_type_that_no_weight_of_ours_has_is_named(tmp_path: Path) -> None:
    save_file({"small": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="holds small as F8_E4M3"):
        Tensors(tmp_path)


def test_a_folder_without_weights_and_a_broken_index_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither model.safetensors nor model.safetensors.index.json"):
        Tensors(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for content, said in (("{", "not valid JSON"), ("[]", "expected a JSON object, found list")):
        index.write_text(content)
        with pytest.raises(UserError, match=f"{index}: {said}"):
            Tensors(tmp_path)
    index.write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(UserError, match="gone.safetensors: not a complete"):
        Tensors(tmp_path)
