"""Runs small enough to be computed again by hand, through a real Lightning Trainer."""

from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from lightning.pytorch import Callback, Trainer

from privzoo.methods.directions import SeededSGD
from privzoo.methods.first_order import FirstOrder
from privzoo.methods.zeroth_order import ZerothOrder
from privzoo.privacy.clipping import BookKeeping
from privzoo.privacy.noise import NoiseMechanism
from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.ranks import ALONE
from privzoo.privacy.replicas import over_ranks
from privzoo.privacy.sampling import PoissonBatches, PoissonDraws, private_loader
from privzoo.privacy.streams import RunKey
from privzoo.tasks.base import pad_right, padding_mask

N = 40
GENERATOR = torch.Generator().manual_seed(0)
ROWS = [
    {"ids": torch.randint(2, 13, (2 + i % 4,), generator=GENERATOR).numpy(), "label": i % 3} for i in range(N)
]  # lengths 2 to 5
ADAM = partial(torch.optim.AdamW, weight_decay=0.0, fused=True)  # as in conf/method
HEAD = ("classifier.weight", "classifier.bias")


class Texts:
    """What FirstOrder asks of a task; a row may have a `strength`, by which its loss is multiplied."""

    rows_of_unit = None

    def collate(self, rows):
        ids = [row["ids"] for row in rows]
        return {
            "input_ids": pad_right(ids, 0),
            "attention_mask": padding_mask(ids),
            "labels": torch.tensor([row["label"] for row in rows]),
            "strength": torch.tensor([row.get("strength", 1.0) for row in rows]),
        }

    def losses(self, model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits, batch["labels"], reduction="none") * batch["strength"].to(logits.dtype)


class Hungry(Texts):
    """Out of memory with more than two rows, but not in the first micro-batch of a release. A GPU's error stands here for
    itself: there is none in tests."""

    def __init__(self, fits):
        self.fits, self.calls = fits, 0

    def losses(self, model, batch):
        self.calls += 1
        if len(batch["labels"]) > self.fits and self.calls % 2 == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().losses(model, batch)


def encoder(dropout=0.0):
    """A float64 BERT of two narrow layers, every parameter of it drawn (a bias that is 0 hides mistakes)."""
    torch.manual_seed(4)
    config = hf.BertConfig(
        vocab_size=13, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, num_labels=3,
        max_position_embeddings=6, hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    )  # fmt: skip
    model = hf.BertForSequenceClassification(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def bert():
    """`bert(dropout=0.5)`: the same encoder, with dropout of its hidden states."""
    return encoder


class Recorder(Callback):
    """The trained weights after each release, and the micro-batches of each; a checkpoint on the way, if asked for."""

    def __init__(self):
        self.weights, self.sizes, self.examples = [], [], []
        self.save_after, self.save_to = None, None
        self.looks = False  # whether it takes losses after each release, as a validation does

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        dealt = pl_module.dealt
        now = {name: dealt.whole_of(name) if dealt else p.detach() for name, p in pl_module.trainable.items()}
        self.weights.append({name: value.clone() for name, value in now.items()})
        self.sizes.append([len(next(iter(m.values()))) for m in batch.micro_batches])
        self.examples.append([int(each) for m in batch.micro_batches for each in m.examples])
        if self.looks:
            with torch.no_grad():
                pl_module.task.losses(pl_module.model, pl_module.task.collate(ROWS[:2]))
        if trainer.global_step == self.save_after:
            trainer.save_checkpoint(self.save_to)


@dataclass
class Run:
    """A method with its loader, before it is trained."""

    method: FirstOrder
    draws: PoissonDraws
    batches: PoissonBatches
    recorder: Recorder

    def fit(self, start=0, checkpoint=None, accelerator="cpu", callbacks=(), precision=None):
        """All releases from `start` on, which begin from a checkpoint unless it is 0."""
        trainer = Trainer(
            accelerator=accelerator, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            use_distributed_sampler=False, precision=precision, callbacks=[*callbacks, self.recorder],
            **over_ranks(self.method.ranks),
        )  # fmt: skip
        trainer.fit(self.method, private_loader(self.batches, start), ckpt_path=checkpoint)
        return trainer

    def fit_and_save(self, release, path):
        """A run with a checkpoint of the middle of it."""
        self.recorder.save_after, self.recorder.save_to = release, path
        return self.fit()


def run_of(
    plan, trainable="all", seed=0, microbatch_size=100, rows=ROWS, model=None, new_head=HEAD, engine=BookKeeping,
    optimizer=ADAM, lr=1e-2, task=None, kind=FirstOrder, units=None, ranks=ALONE, **options,
):  # fmt: skip
    """A run over ROWS, by default DP-Adam on everything."""
    key, task = RunKey.for_tests(seed), task or Texts()
    if units is not None:  # rows beyond the first N are those again
        task.rows_of_unit, rows = units, [*rows, *rows][: sum(map(len, units))]
    options |= {"engine": engine} if kind is FirstOrder else {}
    mechanism = NoiseMechanism(plan, key, "digest")
    method = kind(model or encoder(), task, mechanism, trainable, new_head, optimizer, lr, ranks=ranks, **options)
    draws = PoissonDraws(plan, key, "digest")
    batches = PoissonBatches(
        rows, draws, task.collate, lambda row: len(row["ids"]), microbatch_size, task.rows_of_unit, ranks
    )
    return Run(method.train(), draws, batches, Recorder())


@pytest.fixture
def hungry():
    """`hungry(2)`: the texts' task, which has memory for so many rows."""
    return Hungry


@pytest.fixture
def make_run():
    """`make_run(plan, trainable="biases", …)`: see `run_of`."""
    return run_of


@pytest.fixture
def make_walk(make_run):
    """`make_walk(plan, directions=3, …)`: the same run with DPZero."""
    return partial(make_run, kind=ZerothOrder, optimizer=SeededSGD)


@pytest.fixture(scope="session")
def plans():
    """`plans(batch_size=8, epochs=1, private=True)`: plans over N = 40 rows at C = 0.5 and sigma = 1."""

    @cache  # reckoning epsilon takes a while
    def make(batch_size=8, epochs=1.0, private=True, clip_norm=0.5):
        chosen = {"noise_multiplier": 1.0} if private else {"epsilon": float("inf")}
        return PrivacyPlan(num_examples=N, batch_size=batch_size, epochs=epochs, delta=1e-3, clip_norm=clip_norm, **chosen)

    return make
