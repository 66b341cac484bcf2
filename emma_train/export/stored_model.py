"""A whole model on disk, tensor by tensor: the newest checkpoint of a run folder, a checkpoint or an export."""

import torch
from torch import Tensor, nn

from emma_train.checkpoint import dcp as store
from emma_train.checkpoint import folder as folders
from emma_train.checkpoint import verify
from emma_train.checkpoint.dcp_reader import Shards
from emma_train.config.load import load_yaml
from emma_train.config.stored import from_stored
from emma_train.errors import UserError
from emma_train.export import export
from emma_train.model.emma import Emma
from emma_train.storage import paths as places
from emma_train.storage.paths import StoragePath
from emma_train.storage.safetensors_io import Spec, Tensors


class StoredModel:
    """Raises UserError where `path` holds no whole model."""

    def __init__(self, path: str | StoragePath, use_ema: bool = True) -> None:
        """`use_ema`: averaged weights where they are stored."""
        self.folder = places.of(path)
        self._exported = export.is_export(self.folder)
        self._tensors: Tensors | Shards
        if export.is_export(self.folder):
            self.recipe = from_stored(load_yaml(self.folder / export.RECIPE), str(self.folder))
            self.meta = export.read_meta(self.folder)
            self.recipe.model.autoencoder.path = str(self.folder / self.recipe.model.autoencoder.path)
            self.recipe.data.tokenizer = str(self.folder / self.recipe.data.tokenizer)
            self._tensors = Tensors(self.folder)
        else:
            self.folder = verify.resolve(newest_stage(self.folder), "MODEL")
            self.meta = folders.read_meta(self.folder) or {}
            self.recipe = from_stored(self.meta["config"], str(self.folder))
            self._tensors = Shards(store.places(self.folder))
        with torch.device("meta"):
            names = [name for name, _ in Emma(self.recipe.model).named_parameters()]
        self._names = {name: self._stored_name(name, use_ema) for name in names}
        self.specs: dict[str, Spec] = {name: self._tensors.specs[stored] for name, stored in self._names.items()}
        """Type and shape of every parameter, by its name in the model."""

    def read(self, name: str) -> Tensor:
        """A parameter, as it is stored."""
        return self._tensors.read(self._names[name])

    def load(self, model: nn.Module) -> None:
        """Fill a model's parameters in place."""
        names = {name: f"model.{stored}" if self._exported else stored for name, stored in self._names.items()}
        (export if self._exported else store).load_weights(self.folder, names, dict(model.named_parameters()))

    def _stored_name(self, name: str, use_ema: bool) -> str:
        wanted = [name] if self._exported else [f"ema.{name}"] * use_ema + [f"model.{name}"]
        found = next((stored for stored in wanted if stored in self._tensors.specs), None)
        if found is None:
            raise UserError(f"{self.folder}: lacks {name}; it is not a whole EMMA model")
        return found


def newest_stage(path: StoragePath) -> StoragePath:
    """The furthest stage of a pipeline's run folder, or of its place in train.checkpoints, that has a checkpoint; any
    other path as it is."""
    stages = [p for p in places.children(path) if p.name.startswith("stage")] if path.is_dir() else []
    begun = [p for p in stages if any(places.there(c / folders.LATEST) for c in (folders.of_run(p), p))]
    return max(begun, key=lambda p: p.name) if begun else path
