"""A model on disk, read tensor by tensor: the newest checkpoint of a run folder, a checkpoint or an export."""

import torch
from torch import Tensor, nn

from emma_train.checkpoint import dcp, verify
from emma_train.checkpoint import folder as folders
from emma_train.checkpoint.dcp_reader import CheckpointTensors
from emma_train.config.load import load_stored_yaml
from emma_train.config.stored import from_stored
from emma_train.errors import UserError
from emma_train.export import export
from emma_train.model.emma import Emma
from emma_train.storage.paths import StoragePath, parse_path, storage_of
from emma_train.storage.safetensors_io import Spec, Tensors


class StoredModel:
    """Raises UserError where `path` holds no complete model."""

    def __init__(self, path: str | StoragePath, use_ema: bool = True, dtype: torch.dtype | None = None) -> None:
        """`use_ema`: read averaged weights where they are stored. `dtype`: round to it; None: as they are stored."""
        self.folder = parse_path(path)
        self._exported = export.is_export(self.folder)
        self._tensors: Tensors | CheckpointTensors
        if export.is_export(self.folder):
            self.meta = export.read_export_meta(self.folder)
            recipe = self.folder / export.RECIPE_FILE
            self.recipe = from_stored(load_stored_yaml(recipe), str(recipe))
            export.locate_parts(self.recipe, self.folder)
            self._tensors = Tensors(self.folder)
        else:
            self.folder = verify.find_verified(newest_stage(self.folder), "MODEL")
            self.meta = folders.read_meta(self.folder) or {}
            self.recipe = from_stored(self.meta["config"], str(self.folder))
            self._tensors = CheckpointTensors(dcp.dcp_folders(self.folder))
        with torch.device("meta"):
            names = [name for name, _ in Emma(self.recipe.model).named_parameters()]
        self._names = {name: self._stored_name(name, use_ema) for name in names}
        specs = {name: self._tensors.specs[stored] for name, stored in self._names.items()}
        self.specs = {name: Spec.of(dtype, spec.shape) for name, spec in specs.items()} if dtype else specs
        """Type and shape of every parameter, by its name in the model."""
        self._dtype = dtype

    def read(self, name: str) -> Tensor:
        """A parameter, in the type of `specs`."""
        value = self._tensors.read(self._names[name])
        return value if self._dtype is None else value.to(self._dtype)

    def load(self, model: nn.Module) -> None:
        """Fill a model's parameters in place."""
        weights = dict(model.named_parameters())
        if export.is_export(self.folder):
            names = {name: f"model.{stored}" for name, stored in self._names.items()}
            export.load_export_weights(self.folder, names, weights)
        else:
            dcp.load_checkpoint_weights(self.folder, self._names, weights)

    def _stored_name(self, name: str, use_ema: bool) -> str:
        wanted = [name] if self._exported else [f"ema.{name}"] * use_ema + [f"model.{name}"]
        stored = next((stored for stored in wanted if stored in self._tensors.specs), None)
        if stored is None:
            raise UserError(f"{self.folder}: lacks {name}; it is not a complete EMMA model")
        return stored


def newest_stage(path: StoragePath) -> StoragePath:
    """The last stage with a checkpoint of a pipeline's run folder, or of the pipeline's folder in train.checkpoints.
    Any other path is returned as it is."""
    storage = storage_of(path)
    stages = [p for p in storage.listdir(path) if p.name.startswith("stage")] if path.is_dir() else []
    started = [p for p in stages if _has_checkpoint(p)]
    return max(started, key=lambda p: p.name) if started else path


def _has_checkpoint(stage: StoragePath) -> bool:
    folder = folders.checkpoints_of_run(stage)
    return any(storage_of(path).exists(path / folders.LATEST) for path in (folder, stage))
