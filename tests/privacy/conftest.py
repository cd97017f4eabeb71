"""The smallest private run there is, with sums that can be checked by hand."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from privzoo.methods.first_order import FirstOrder
from privzoo.privacy.callback import PrivacyCallback
from privzoo.privacy.clipping import Loop
from privzoo.privacy.ledger import Ledger
from privzoo.privacy.noise import NoiseMechanism
from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.sampling import PoissonBatches, PoissonDraws, private_loader
from privzoo.privacy.streams import RunKey

DIGEST = "d" * 64


class Scores(nn.Module):
    """A linear score. The loss of a row is its score, so that the gradient of a row is the row itself."""

    def __init__(self, width: int, unused: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, dtype=torch.float64))
        if unused:
            self.unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class ScoreTask:
    """What FirstOrder asks of a task."""

    rows_of_unit = None

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"])


class Watch(Callback):
    """Records what a release did: realised sizes, and the weights before the first and after each release."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.micro_batches: list[int] = []
        self.weights: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.weights.append(pl_module.model.weight.detach().clone())

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.sizes.append(sum(len(m["x"]) for m in batch.micro_batches))
        self.micro_batches.append(len(batch.micro_batches))
        self.weights.append(pl_module.model.weight.detach().clone())

    def moves(self) -> list[Tensor]:
        """Weights before minus weights after, by release: with lr 1 that is (clipped sum + noise) / B."""
        return [before - after for before, after in zip(self.weights, self.weights[1:], strict=False)]


@dataclass
class TinyRun:
    """A run over `rows` (N, d) with SGD at lr 1, kept in parts so that a test can replace any of them.

    `trainer` holds options of the Lightning Trainer beside those of train.py, `others` callbacks beside ours.
    """

    folder: Path
    plan: PrivacyPlan
    rows: Tensor
    key: RunKey = field(default_factory=lambda: RunKey.for_tests(0))
    microbatch_size: int = 1000
    digest: str = DIGEST
    unused: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)
    others: list[Callback] = field(default_factory=list)
    method_class: type = FirstOrder

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.folder / "ledger.jsonl")
        self.mechanism = NoiseMechanism(self.plan, self.key, self.digest)
        self.draws = PoissonDraws(self.plan, self.key, self.digest)
        self.batches = PoissonBatches(self.rows, self.draws, self.collate, lambda row: 1, self.microbatch_size)
        self.loader: Any = private_loader(self.batches)
        self.guard = PrivacyCallback(self.plan, self.ledger, self.digest)
        self.method = self.method_class(
            Scores(self.rows.shape[1], self.unused), ScoreTask(), self.mechanism, "all", (), torch.optim.SGD,
            lr=1.0, schedule="constant", engine=Loop,
        )  # fmt: skip
        self.watch = Watch()

    @staticmethod
    def collate(rows: list[Tensor]) -> dict[str, Tensor]:
        return {"x": torch.stack(rows)}

    def make_trainer(self) -> Trainer:
        """A Trainer as train.py makes it, but for the options of this run."""
        options = {
            "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
            "use_distributed_sampler": False, "default_root_dir": self.folder,
        }  # fmt: skip
        return Trainer(**{**options, "callbacks": [self.guard, self.watch, *self.others], **self.trainer})

    def fit(self) -> Trainer:
        """Run it."""
        trainer = self.make_trainer()
        try:
            trainer.fit(self.method, self.loader)
        finally:
            self.ledger.close()
        return trainer


@pytest.fixture
def tiny_run(tmp_path: Path):
    """`tiny_run(plan, rows, key=…)`: a TinyRun in a folder of its own; every call makes another one."""
    made = []

    def make(plan: PrivacyPlan, rows: Tensor, **options: Any) -> TinyRun:
        folder = tmp_path / f"run{len(made)}"
        folder.mkdir()
        made.append(TinyRun(folder, plan, rows, **options))
        return made[-1]

    return make
