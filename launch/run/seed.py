"""A seed checkpoint: the first weights as step 0, written by one process as a stream; any layout starts from it."""

import logging
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from regrow.checkpoint.convert.conversion_plan import plan_step
from regrow.checkpoint.convert.convert import convert
from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.format.step_name import step_folder_name
from regrow.checkpoint.format.tensor_source import Box, TensorInfo, TensorSource
from regrow.checkpoint.run.catalog import Catalog
from regrow.checkpoint.storage.local import LocalStorage
from regrow.launch.config.errors import UserError
from regrow.launch.run.build import build_model, checkpoint_folder
from regrow.launch.run.labels import run_labels
from regrow.launch.run.rank_spec import Outcome, RankSpec
from regrow.launch.run.run_documents import begin_run
from regrow.models.base import LanguageModel
from regrow.models.init import fill_shard
from regrow.trainer.data.corpus import Corpus
from regrow.trainer.precision import change_parameters

__all__ = ["FirstWeights", "write_seed_checkpoint"]

log = logging.getLogger(__name__)


@final
class FirstWeights(TensorSource):
    """A model's first weights, made when they are asked for; its persistent buffers are held.

    Args:
        model: on the meta device.
        seed: the run's seed.
    """

    def __init__(self, model: LanguageModel, seed: int) -> None:
        self.place = "the model's first weights"
        self._seed, self._rules = seed, model.init_rules()
        model.init_buffers(torch.device("cpu"), 1)
        persistent = model.state_dict().keys()
        self._buffers = {n: b for n, b in model.named_buffers() if n in persistent}
        self.infos: Mapping[str, TensorInfo] = {
            n: TensorInfo(dtype=t.dtype, shape=tuple(t.shape))
            for n, t in {**dict(model.named_parameters()), **self._buffers}.items()
        }

    def read(self, name: str, box: Box) -> Tensor:
        if name in self._buffers:
            return self._buffers[name][tuple(slice(*d) for d in box)].contiguous()
        info = self.infos[name]
        local = torch.empty([stop - start for start, stop in box], dtype=info.dtype)
        fill_shard(
            local,
            name=name,
            rule=self._rules[name],
            global_shape=info.shape,
            offset=[start for start, _ in box],
            seed=self._seed,
        )
        return local


def write_seed_checkpoint(spec: RankSpec) -> Outcome:
    """Writes `step-0`, on one process whatever `parallel` says; one that is there already stays.

    Raises:
        UserError: the run has steps already.
    """
    record, corpus = spec.record, Corpus(spec.data_folders)
    assert record is not None, "the run is opened first"
    catalog = Catalog(checkpoint_folder(spec.config, spec.run_dir))
    entries = catalog.entries(record.lineages)
    if entries and entries[-1].step > 0:
        raise UserError(
            f"checkpoint.create_seed_checkpoint must be false where there are steps, but {catalog.folder.url} has "
            f"step {entries[-1].step}; choose another run.name"
        )
    if not isinstance(catalog.folder, LocalStorage):
        raise UserError(
            f"checkpoint.folder must be local for a seed checkpoint, but is {catalog.folder.url}; use a path and "
            "start from it with checkpoint.initial_load_path"
        )
    path = catalog.folder.path / step_folder_name(0)
    if entries:
        log.info("the seed checkpoint is there already: %s", path)
        return Outcome(kind="finished", step=0)
    with torch.device("meta"):
        model = build_model(spec.config)
    change_parameters(model, spec.config.precision.name)
    manifest = Manifest(
        step=0,
        lineage=record.lineages[-1].id,
        kind="model",
        layout={"world_size": 1},
        **run_labels(spec, corpus.fingerprint),
    )
    begin_run(spec.config_dict, spec.run_dir, corpus, spec.overrides, record)
    try:
        result = convert(
            FirstWeights(model, spec.config.seed),
            lambda infos, _work: plan_step(infos, manifest),
            path,
            identity={"seed": spec.config.seed, "config": manifest.config_hash, "lineage": manifest.lineage},
        )
    except CheckpointError as error:
        raise UserError(str(error)) from error
    log.info("wrote the seed checkpoint %s: %d tensors, %.1f MiB", path, result.tensors, result.nbytes / 2**20)
    return Outcome(kind="finished", step=0)
