"""What the loop asks of a parallel model: gradients, losses, logits, the same for every layout."""

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from regrow.models.config import DecoderConfig
from regrow.models.documents import Documents
from regrow.models.moe import MixtureOfExperts
from regrow.trainer.config import PipelineSchedule, PrecisionName
from regrow.trainer.data.loader import MicroBatch
from regrow.trainer.data.windows import IGNORE
from regrow.trainer.gradient_sum import GradientSum
from regrow.trainer.loss import RowLosses
from regrow.trainer.loss_kernels import LossKernels
from regrow.trainer.optimizer import global_grad_norm
from regrow.trainer.parallel.apply import ParallelModel, reshard
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.parallel.label_scores import LabelScores
from regrow.trainer.parallel.output_loss import TrainingLoss
from regrow.trainer.parallel.pipeline import Pipeline, StageInput
from regrow.trainer.parallel.sequence_chunks import positions_of
from regrow.trainer.parallel.stages import SPLIT_BACKWARD
from regrow.trainer.parallel.vocabulary import VocabularyShard
from regrow.trainer.precision import compute_dtype
from regrow.trainer.reduction import StepReduction

__all__ = ["Engine"]


def _within_documents(documents: Documents, positions_T: Tensor | None, device: torch.device) -> Tensor:
    """Each position's distance from its document's first, int64 `(B, T)`.

    Args:
        documents: of whole sequences.
        positions_T: those of this rank; None: all.
        device: where they are wanted.
    """
    starts_BS = documents.starts.to(device, non_blocking=True)
    if positions_T is None:
        positions_T = torch.arange(starts_BS.shape[1], device=device)
    return positions_T - starts_BS[:, positions_T]


@final
class Engine:
    """Runs a parallel model.

    Args:
        parallel: this rank's part of the model, initialised.
        context: this rank's process groups, meshes and device.
        model_config: the model's dimensions.
        schedule: of the pipeline.
        precision: of the computation.
        z_loss: see `row_losses`.
        reset_positions: positions begin anew with each document, where documents are known.
        loss_kernels: see `row_losses`.
        sources: of the data, whose losses are also told apart where there are several.

    Attributes:
        source_losses: what this rank adds to the summed loss of each source, since `forget_sources` was called or
            a step began; float64 `(sources,)`, on the device.
    """

    def __init__(
        self,
        parallel: ParallelModel,
        context: ParallelContext,
        *,
        model_config: DecoderConfig,
        schedule: PipelineSchedule,
        precision: PrecisionName,
        z_loss: float = 0.0,
        sources: int = 1,
        reset_positions: bool = False,
        loss_kernels: LossKernels | None = None,
    ) -> None:
        self._parallel, self._context, self._model_config = parallel, context, model_config
        self.model, self.names = parallel.model, parallel.names
        self._parameters = dict(parallel.model.named_parameters())
        # Parameters that lie on the first stage and on the last, each with a gradient of its own.
        self._tied_apart = parallel.model.tied_parameters() if context.layout.pp > 1 else ()
        self._mixtures = [m for m in parallel.model.modules() if isinstance(m, MixtureOfExperts)]
        bf16 = precision is PrecisionName.bf16_params
        self._sums = GradientSum(list(self._parameters.values())) if bf16 else None
        self._losses: list[Tensor] = []
        self._told: list[RowLosses | None] = []
        self._busiest: Tensor | None = None
        self._labels = 1
        self._reset_positions = reset_positions
        self.source_losses = torch.zeros(sources, dtype=torch.float64, device=context.device)
        last = parallel.stages.count - 1 in parallel.stages.mine
        # One of the ranks with the same loss reports it.
        self._reports = last and context.coordinate("tp") == 0
        tensor = parallel.tensor
        self._shard: VocabularyShard | None = None
        if tensor is not None:
            self._shard = VocabularyShard.of(model_config.vocab_size, tensor.rank, tensor.ranks, tensor.name)
        splits = context.layout.pp > 1 and schedule in SPLIT_BACKWARD
        self._loss = TrainingLoss(
            parallel.model, shard=self._shard, z_loss=z_loss, splits_backward=splits, kernels=loss_kernels
        )
        self._pipeline: Pipeline | None = None
        if context.layout.pp > 1:
            self._pipeline = Pipeline(
                parallel.parts,
                parallel.stages,
                schedule,
                context.meshes.data.get_group("pp"),
                context.device,
                hidden_shape=self._hidden_shape,
                result=lambda tokens: self._loss.result_of(self._logits_shape(tokens), compute_dtype(precision)),
                dtype=compute_dtype(precision),
                loss=self._pipeline_loss,
            )

    def _logits_shape(self, tokens: Tensor) -> tuple[int, ...]:
        return *tokens.shape, self._model_config.vocab_size if self._shard is None else self._shard.count

    def _hidden_shape(self, tokens: Tensor) -> tuple[int, ...]:
        rows, length = tokens.shape
        tensor = self._parallel.tensor
        parts = tensor.ranks if tensor is not None and tensor.sequence else 1
        return rows, length // parts, self._model_config.dim

    def forget_sources(self) -> None:
        """Begins `source_losses` anew."""
        self.source_losses = torch.zeros_like(self.source_losses)

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], labels: int, seed: Callable[[int], None]
    ) -> Tensor:
        """Gradients of the mean loss over the global batch.

        Args:
            micro_batches: this rank's, as many on every rank.
            labels: of the global batch, at least 1.
            seed: seeds all generators for a micro-batch.

        Returns:
            What this rank adds to the summed loss of the global batch, float64, on the device.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._context.device)
        self._labels = labels
        self._losses.clear()
        self.forget_sources()
        if self._pipeline is not None:
            seed(0)
            self._told = [self._seen(m) for m in micro_batches]
            self._pipeline.train([self._with_loss(m) for m in micro_batches])
        else:
            sums = self._sums if len(micro_batches) > 1 else None
            for index, micro_batch in enumerate(micro_batches):
                seed(index)
                given, options, wanted = self._with_loss(micro_batch)
                loss = self._loss.of(self.model(given, **options), wanted, self._seen(micro_batch))
                (loss / labels).backward()  # type: ignore[no-untyped-call]
                self._losses.append(loss.detach())
                if sums is not None:
                    sums.take()
            if sums is not None:
                sums.give()
        if self._reports:
            for loss in self._losses:
                total += loss
        for name in self._tied_apart:
            if name in self._parameters:
                self._add_tied_gradient(self._parameters[name])
        return total

    @torch.no_grad()
    def losses(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """What this rank adds to the summed loss, without gradients, float64, on the device."""
        total = torch.zeros((), dtype=torch.float64, device=self._context.device)
        for micro_batch in micro_batches:
            given, options, labels = self._with_loss(micro_batch)
            result = self._forward(given, options)
            if result is not None:
                loss = self._loss.of(result, labels, self._seen(micro_batch))
                if self._reports:
                    total += loss
        return total

    @torch.no_grad()
    def label_scores(self, micro_batch: MicroBatch) -> Tensor:
        """What this rank adds to the scores of a micro-batch's rows, without gradients.

        Returns:
            float64 `(rows, 2)`, on the device: the summed natural logarithms of the labels' probabilities, and how
            many labels are not the likeliest token at their place.
        """
        told: list[Tensor] = []
        tokens, options, labels = self._inputs(micro_batch)
        scores = LabelScores(labels, self._shard, told.append)
        if self._loss.in_model:
            options["output_loss"] = scores
        result = self._forward(tokens, options)
        if result is not None and not self._loss.in_model:
            scores.of(result)
        if not told or not self._reports:
            return torch.zeros(len(labels), 2, dtype=torch.float64, device=self._context.device)
        return told[0].view(*labels.shape, 2).sum(1)

    @torch.no_grad()
    def last_logits(self, ids: Tensor) -> Tensor:
        """Logits after the last of `ids`, on every rank.

        Args:
            ids: int64 `(1, seq)`, at most as long as the sequences of training.

        Returns:
            float32 `(vocab,)`.
        """
        layout, device = self._context.layout, self._context.device
        at = ids.shape[1] - 1
        # What comes after the last token changes nothing before it.
        multiple = math.lcm(2 * layout.cp * layout.tp, layout.cp * layout.tp) if layout.cp * layout.tp > 1 else 1
        padded = torch.nn.functional.pad(ids, (0, -ids.shape[1] % multiple))
        micro_batch = MicroBatch(tokens=padded, labels=padded, documents=None)
        given, options, _ = self._inputs(micro_batch)
        logits = self._forward(given, options)
        out = torch.zeros(self._model_config.vocab_size, dtype=torch.float32, device=device)
        positions = options.get("positions", torch.arange(padded.shape[1], device=device))
        here = (positions == at).nonzero().flatten().tolist()
        if logits is not None and here:
            first = 0 if self._shard is None else self._shard.first
            out[first : first + logits.shape[-1]] = logits[0, here[0]].float()
        for axis in ("pp", "cp", "tp"):
            if self._context.meshes.data[axis].size() > 1:
                dist.all_reduce(out, group=self._context.meshes.data.get_group(axis))
        return out

    def reshard(self) -> None:
        """Frees what forward passes without backward passes left gathered."""
        reshard(self._parallel.parts)

    def _with_loss(self, micro_batch: MicroBatch) -> StageInput:
        tokens, options, labels = self._inputs(micro_batch)
        return tokens, {**options, **self._loss.options(labels, self._seen(micro_batch))}, labels

    def _seen(self, micro_batch: MicroBatch) -> RowLosses | None:
        """What adds a micro-batch's losses up by source; None where nobody asks for that."""
        if micro_batch.sources is None or not self._reports:
            return None
        sources_B = micro_batch.sources.to(self._context.device, non_blocking=True)
        kinds_K = torch.arange(len(self.source_losses), device=sources_B.device)
        # A product, whose order is always the same.
        chosen_KB = (kinds_K[:, None] == sources_B).to(torch.float64)

        def add(losses_S: Tensor) -> None:
            self.source_losses += chosen_KB @ losses_S.view(len(sources_B), -1).sum(1)

        return add

    def _forward(self, tokens: Tensor, options: dict[str, Any]) -> Tensor | None:
        if self._pipeline is not None:
            return self._pipeline.forward(tokens, options)
        result: Tensor = self.model(tokens, **options)
        return result

    def _inputs(self, micro_batch: MicroBatch) -> StageInput:
        """This rank's part of a micro-batch, on the device."""
        device = self._context.device
        tokens = micro_batch.tokens.to(device, non_blocking=True)
        labels = micro_batch.labels.to(device, non_blocking=True)
        options: dict[str, Any] = {}
        mask = self._parallel.attention.mask(micro_batch.documents, tokens)
        if mask is not None:
            options["mask"] = mask
        group = self._parallel.sequence
        if group is not None:
            positions = positions_of(group.rank, group.ranks, tokens.shape[1], balance=group.balance, device=device)
            tokens, labels = tokens[:, positions], labels[:, positions]
            options["positions"] = positions
        elif self._pipeline is not None:
            # Later stages cannot tell from their input, which may be split along the sequence.
            options["positions"] = torch.arange(tokens.shape[1], device=device)
        if self._reset_positions and micro_batch.documents is not None:
            options["positions"] = _within_documents(micro_batch.documents, options.get("positions"), device)
        if self._mixtures:
            options["valid"] = labels != IGNORE
        return tokens, options, labels

    def _pipeline_loss(self, result: Tensor, labels: Tensor) -> Tensor:
        # The last stage takes its micro-batches in their order.
        loss = self._loss.of(result, labels, self._told[len(self._losses)])
        self._losses.append(loss.detach())
        return loss / self._labels

    def _add_tied_gradient(self, parameter: nn.Parameter) -> None:
        """Gives the first and the last stage, which both hold this matrix, the sum of their gradients."""
        assert parameter.grad is not None
        own = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        own, other = own.contiguous(), torch.empty_like(own)
        stages = self._parallel.stages
        group, peer = self._context.meshes.data.get_group("pp"), stages.ranks[0]
        if peer == self._context.coordinate("pp"):
            peer = stages.ranks[-1]
        works = [
            dist.P2POp(dist.isend, own, group=group, group_peer=peer),
            dist.P2POp(dist.irecv, other, group=group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(works):
            work.wait()
        own += other

    def grad_norm(self) -> Tensor:
        """The L2 norm of all gradients over all ranks, each parameter counted once; a scalar on the device."""
        context = self._context
        skipped = () if 0 in self._parallel.stages.mine else self._tied_apart
        counted = [p for n, p in self._parameters.items() if n not in skipped]
        return global_grad_norm(counted, context.meshes.data.get_group("pp") if context.layout.pp > 1 else None)

    def register(self, reduction: StepReduction) -> None:
        """Registers what all ranks are to know of a step: with experts, the busiest one's load in any layer, as a
        multiple of the layer's mean.
        """
        if self._model_config.n_experts:
            # A stage of dense layers alone has nothing to tell, but the same slot, on the device as the others.
            none = torch.zeros((), dtype=torch.float64, device=self._context.device)
            reduction.max("expert_load_max", lambda: none if self._busiest is None else self._busiest, in_row=True)

    @torch.no_grad()
    def after_update(self) -> None:
        """Moves the experts' biases by what the step's load was, and forgets the load."""
        if not self._mixtures:
            return
        loads_LE = torch.stack([m.load for m in self._mixtures])
        dense = self._context.meshes.dense
        for axis in ("dp_replicate", "fsdp", "tp"):
            if dense[axis].size() > 1:
                dist.all_reduce(loads_LE, group=dense.get_group(axis))
        means_L1 = loads_LE.to(torch.float64).mean(-1, keepdim=True)
        for mixture, load_E, mean in zip(self._mixtures, loads_LE, means_L1, strict=True):
            mixture.expert_bias += mixture.bias_update_speed * (mean - load_E).sign()
            mixture.load.zero_()
        self._busiest = (loads_LE / means_L1).max()

    def owner_ranks(self, names: Sequence[str]) -> dict[str, list[int]]:
        """The ranks that hold tensors which not all ranks hold, for the checkpoint."""
        if self._context.layout.pp == 1:
            return {}
        mine = self._context.stage_ranks(self._context.coordinate("pp"))
        first = self._context.stage_ranks(self._parallel.stages.ranks[0])
        return {n: first if any(tied in n for tied in self._tied_apart) else mine for n in names}
