"""What all methods share: a training step is one release, and how lr, optimizer and checkpoints follow the plan."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from privzoo.errors import UserError
from privzoo.methods.average import ExponentialAverage, weights_to_publish
from privzoo.methods.contents import pack, unpack
from privzoo.methods.optimizers import has_modes, make_optimizer, refuse_by_shape, refuse_on_parts
from privzoo.methods.rows import refuse_other_contract, require_loss_per_row, that_fits, unit_of_row
from privzoo.methods.schedule import LearningRate
from privzoo.methods.trainable import select_trainable
from privzoo.privacy.dropout import DropoutByExample
from privzoo.privacy.noise import NoiseMechanism, Part, fingerprint
from privzoo.privacy.plan import ReleaseSetting
from privzoo.privacy.ranks import ALONE, Ranks, held_here
from privzoo.privacy.sampling import LogicalBatch, MicroBatch
from privzoo.privacy.sharding import DealtOut
from privzoo.tasks.base import Task

Adapter = Callable[[nn.Module, tuple[str, ...]], tuple[nn.Module, tuple[str, ...]]]


class Interrupted(Exception):
    """The run was asked to stop; raised where weights and optimizer are whole."""


class PrivateMethod(LightningModule):
    """One release a training step: query, noise, update.

    A method that clips by another norm than L2 as well says for which noises in `noises`.

    Formal guarantee: private data are touched in `query` alone, whose result moves by at most the plan's clip_norm when one
    unit comes or goes; everything after `mechanism.release` is post-processing.

    Args:
        model: the pretrained model.
        task: gives losses (R,) and says which rows are of one unit.
        mechanism: holds plan and noise.
        trainable: what to train, see `select_trainable`.
        new_head: names of freshly initialised parameters.
        optimizer: partial of a torch optimizer, completed with parameters and lr.
        lr: learning rate at its highest.
        schedule, warmup: how lr rises and falls, see `LearningRate`.
        head_lr_factor: the new head learns at so many times `lr`.
        adapter: partial that gives the model parameters of its own (peft), or None; see `privzoo.models.adapters`.
        phases: one mapping for every phase of the plan, whose `trainable` and `lr` replace those above; None: none does. In
            each, schedule and optimizer state begin anew.
        average: makes an average of the weights what is scored and saved; None: the last weights.
        ranks: the processes that share each draw.
    """

    noises: ClassVar[tuple[str, ...]] = ("gaussian",)
    asks_again: ClassVar[bool] = True  # whether a query that broke off leaves nothing behind, and may be made once more

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        mechanism: NoiseMechanism,
        trainable: str,
        new_head: Iterable[str],
        optimizer: Callable[..., torch.optim.Optimizer],
        lr: float,
        schedule: str = "linear",
        warmup: float = 0.0,
        head_lr_factor: float = 1.0,
        adapter: Adapter | None = None,
        phases: Sequence[Mapping[str, Any]] | None = None,
        average: ExponentialAverage | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold the trained part; on_load_checkpoint checks it
        if not isinstance(head_lr_factor, (int, float)) or not 0 < head_lr_factor < math.inf:
            raise UserError(f"Expected method.head_lr_factor={head_lr_factor} to be a number above 0.")
        if mechanism.plan.noise not in self.noises:
            raise UserError(
                f"Expected privacy.noise={mechanism.plan.noise} to be {' or '.join(self.noises)} for this method: it bounds "
                "contributions by their L2 norm; method=dpzero takes laplace."
            )
        refuse_other_contract(task)
        new_head = tuple(new_head)
        self.model, self.new_head = adapter(model, new_head) if adapter else (model, new_head)
        self.task = task
        self.mechanism = mechanism
        self.dealt: DealtOut | None = None
        self.dropout = DropoutByExample(self.model, mechanism.key, mechanism.digest)
        phases = phases or [{}] * len(mechanism.plan.phases)
        if len(phases) != len(mechanism.plan.phases):
            raise UserError(f"The plan has {len(mechanism.plan.phases)} phases, the method {len(phases)}: give it the same.")
        chosen = [select_trainable(self.model, each.get("trainable", trainable), self.new_head) for each in phases]
        self.trained_in = [tuple(names) for names in chosen]  # by phase
        self.trainable = {n: p for n, p in self.model.named_parameters() if any(n in names for names in chosen)}
        self.start_phase(0)
        self.average = average
        if average is not None:
            average.follow(self.trainable)
        self.make_optimizer = optimizer
        self.made: torch.optim.Optimizer | None = None
        self.lr = LearningRate(mechanism.plan, [each.get("lr", lr) for each in phases], schedule, warmup)
        self.head_lr_factor = head_lr_factor
        self.weights = ""
        self.private_metrics: dict[str, float] = {}
        self.ranks = ranks
        self.stop_requested = False

    # ---- one release

    def training_step(self, batch: LogicalBatch, batch_idx: int) -> None:
        """One release: the query's sum over all ranks, noise, update. Raises Interrupted where the run was asked to stop."""
        if self.ranks.any_stops(self.stop_requested, self.weights):
            raise Interrupted
        setting = self.mechanism.plan.at(batch.release)
        if setting.index == 0 and setting.phase > 0:
            self.start_phase(setting.phase)
            self.forget_moments()
        # A query is not asked again where other ranks would have to go along, or if one that broke off leaves traces.
        sums = that_fits(self.query, batch, again=self.asks_again and not self.level)
        if self.dealt is not None:
            sums = self.dealt.divided(sums)
        self.ranks.add_up(sums)
        # ---- private data end here ----
        self.mechanism.release(sums, batch.release, self.weights, self.parts(batch.release))
        self.update(sums, setting)

    @abstractmethod
    def query(self, batch: LogicalBatch) -> dict[str, Tensor]:
        """Clipped sum over the logical batch; zeros for an empty draw.

        Raises:
            Interrupted: if this process `stops_here`.
        """

    @property
    def stops_here(self) -> bool:
        """Whether to end in the middle of a query: one of several processes does not, as the others wait for its share."""
        return self.stop_requested and self.ranks.count == 1

    def parts(self, release: int) -> list[Part] | None:
        """Sensitivity and noise of each part of the query; None: one part, of the plan's clip_norm."""
        return None

    @abstractmethod
    def update(self, noisy_sums: dict[str, Tensor], setting: ReleaseSetting) -> None:
        """One optimizer step with released sums, divided by the expected batch size. It gets no data."""

    def trial(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """What an answer is made of, for a few rows that all ranks hold alike: with parts of a model the same as with all.

        Of what is dealt out it is this rank's part. A method that trains most weights can be dealt out if it says this.
        """
        raise UserError(
            f"trainer.strategy cannot deal out what {type(self).__name__} trains: nothing shows that it would be as before; "
            "take trainer.strategy=replicas."
        )

    @abstractmethod
    def preflight(self, rows: Sequence[Any]) -> None:
        """Try the query on a few encoded examples before the first release; the weights are afterwards what they were.

        Raises:
            UserError: if the bound on one example's contribution would not hold for this model and task.
        """

    def unit_of_row(self, micro_batch: MicroBatch) -> Tensor | None:
        """The unit of privacy of each row, (R,), on the model's device; None: every row is one. See `rows.unit_of_row`."""
        return unit_of_row(self.task, micro_batch, self.device)

    def losses(self, micro_batch: MicroBatch) -> Tensor:
        """The task's losses (R,) of a micro-batch, which is moved to the model's device.

        Raises:
            UserError: for another number of losses than of rows.
        """
        on_device = {name: value.to(self.device) for name, value in micro_batch.items()}
        with self.dropout.of(micro_batch):
            losses = self.task.losses(self.model, on_device)
        require_loss_per_row(losses, micro_batch)
        return losses

    @property
    def active(self) -> dict[str, nn.Parameter]:
        """What the phase at hand trains, by name; the rest of `trainable` rests."""
        return {name: p for name, p in self.trainable.items() if p.requires_grad}

    @property
    def dealt_out(self) -> bool:
        """Whether each rank holds a part of the model or of its update, so that all ranks score and save together."""
        return self.dealt is not None

    @property
    def level(self) -> bool:
        """Whether all ranks have to make the same passes."""
        return self.dealt is not None and self.dealt.level

    def take_over(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Train these in the place of those that they were before, by name; no optimizer has been made yet."""
        self.trainable = {name: parameters[name] for name in self.trainable}
        if self.average is not None:
            self.average.follow(self.trainable)

    def fingerprint_of_the_rest(self) -> str:
        """SHA-256 of all parameters that no phase trains, and of all buffers: the same at the end as at the beginning. Of
        dealt-out ones it is of this rank's part."""
        here = self.dealt.here if self.dealt else lambda parameter: parameter
        rest = ((name, here(p)) for name, p in self.model.named_parameters() if name not in self.trainable)
        return fingerprint([*rest, *self.model.named_buffers()])

    def start_phase(self, number: int) -> None:
        """Let the parameters of this phase learn, and no others."""
        for name, parameter in self.trainable.items():
            for each in (parameter, self.dealt.copied.get(name, parameter)) if self.dealt else (parameter,):
                each.requires_grad_(name in self.trained_in[number])

    def forget_moments(self) -> None:
        """Between phases: they are of gradients of other parameters, clipped otherwise."""
        self._optimizer().state.clear()

    def finish_step(self) -> None:
        """One step of optimizer and schedule, whose count is Lightning's global_step."""
        optimizer = self._optimizer()
        optimizer.step()
        if self.average is not None:
            self.average.update(self.trainable)
        if self.dealt is not None:
            self.dealt.spread()
        optimizer.zero_grad(set_to_none=True)
        self.lr_schedulers().step()  # type: ignore[union-attr]
        self.weights = self._fingerprint()

    def _fingerprint(self) -> str:
        """Of the weights, and of the method's own state (a clip norm that adapts): what the next sum is taken at. No sum is
        taken at an average."""
        own = [(name, value) for name, value in self._own_state().items() if not name.startswith("average.")]
        copied = self.dealt.copied if self.dealt else {}
        items = [*(self.trainable | copied).items(), *own, *self._exact_copies()]
        parts = [(name, value) for name, value in items if held_here(value) is not value]
        alike = fingerprint((name, value) for name, value in items if held_here(value) is value)
        return self.ranks.together(alike, fingerprint(parts)) if parts else alike

    def _exact_copies(self) -> list[tuple[str, Tensor]]:
        """What an optimizer keeps of weights that are its rounding: `exact.<number of the parameter in it>`."""
        return []

    def _own_state(self) -> dict[str, Tensor]:
        """State of every part but the model (whose own would be packed anew each time if it is quantised)."""
        parts = [part.state_dict(prefix=f"{name}.") for name, part in self.named_children() if part is not self.model]
        return {name: value for part in parts for name, value in part.items()}

    @contextmanager
    def published(self) -> Iterator[None]:
        """Meanwhile the model holds the weights that are scored and saved, see `weights_to_publish`."""
        spread = self.dealt.spread if self.dealt else lambda: None
        with weights_to_publish(self.trainable, self.made, self.average):
            spread()
            yield
        spread()

    def _optimizer(self) -> Any:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        return optimizer

    @property
    def exact(self) -> Mapping[str, Tensor]:
        """What is trained, by name: the parameters, but where a method keeps more exact copies of them."""
        return self.trainable

    @property
    def contribution(self) -> str:
        """What one example adds to a release and what bounds it, in words for the privacy card."""
        return f"the query of {type(self).__name__}, of a norm of at most clip_norm"

    @property
    def public_metrics(self) -> dict[str, float]:
        """Figures of the last release that are made of former releases alone, for the curves."""
        return {}

    # ---- learning rate

    def configure_optimizers(self) -> Any:
        optimizer = self.new_optimizer()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda release: self.lr.at(release) / self.lr.highest[0])
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def new_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of a fit."""
        phases = len(self.mechanism.plan.phases)
        if self.dealt is not None and self.dealt.flat:
            refuse_by_shape(self.make_optimizer, self.lr.highest[0])
        if self.dealt is not None and (self.dealt.flat or self.dealt.wholes):
            refuse_on_parts(self.make_optimizer, self.lr.highest[0], self.dealt.some_part())
        self.made = make_optimizer(self.make_optimizer, self._parameter_groups(), self.lr.highest[0], phases)
        if self.average is not None and has_modes(self.made):
            raise UserError(f"{type(self.made).__name__} averages the weights already: leave method.average=null.")
        return self.made

    def _parameter_groups(self) -> list[dict[str, Any]]:
        body = [parameter for name, parameter in self.trainable.items() if name not in self.new_head]
        head = [self.trainable[name] for name in self.new_head]
        lr = self.lr.highest[0]
        groups = [{"params": body, "lr": lr}, {"params": head, "lr": lr * self.head_lr_factor}]
        return [group for group in groups if group["params"]]

    # ---- Lightning

    def on_train_start(self) -> None:
        start = self.global_step
        if start:
            self.start_phase(self.mechanism.plan.at(min(start, self.mechanism.plan.steps - 1)).phase)
        self._take_over_lr()
        self.weights = self._fingerprint()

    def _take_over_lr(self) -> None:
        """A resumed run may have another lr; the optimizer's state brought the old one along."""
        schedule, optimizer = self.lr_schedulers(), self.optimizers()
        parts = [group["lr"] / self.lr.highest[0] for group in self._parameter_groups()]
        schedule.base_lrs = [self.lr.highest[0] * part for part in parts]  # type: ignore[union-attr]
        for group, part in zip(optimizer.param_groups, parts, strict=True):  # type: ignore[union-attr]
            group["initial_lr"], group["lr"] = self.lr.highest[0] * part, self.lr.at(self.global_step) * part

    def transfer_batch_to_device(self, batch: LogicalBatch, device: torch.device, dataloader_idx: int) -> LogicalBatch:
        return batch  # micro-batches move one at a time, in query

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's, on every rank; the first one writes."""
        wanted = {f"model.{name}" for name in self.trainable} | self._own_state().keys()
        pack(checkpoint, wanted, self._fingerprint(), self.mechanism.key, self.dealt)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError unless the checkpoint holds exactly what this method trains, in the same groups."""
        now = {f"model.{name}": parameter for name, parameter in self.trainable.items()} | self._own_state()
        unpack(checkpoint, now, self._parameter_groups(), self.dealt)
        if self.made is None and has_modes(self.new_optimizer()):  # a run that is over is scored without training again
            self.made.load_state_dict(checkpoint["optimizer_states"][0])  # type: ignore[attr-defined]
