"""Imported once by the server that ranks are forked from (spawn.py), so that ranks start fast."""

import contextlib
import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"

import diffusers.models.autoencoders.autoencoder_dc  # noqa: F401
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp

import data_pipelines.cli
import data_pipelines.loader.loader
import data_pipelines.loader.requests
import data_pipelines.prepare.importers.import_source  # noqa: F401
import emma_train.cli
import emma_train.generate.samples
import emma_train.report.report
import emma_train.training.loop  # noqa: F401
import tests.distributed.ranks
import tests.object_stores  # noqa: F401

with contextlib.suppress(ModuleNotFoundError):
    import pandas  # noqa: F401 (pyarrow imports it, where it is installed, when it first makes an array)

torch.set_num_threads(1)
# The trainer collects garbage before its first step, which would copy every page of these modules in every rank.
gc.freeze()
