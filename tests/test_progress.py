import io
import math
import re
from types import SimpleNamespace

import pytest
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console

from privzoo import progress
from privzoo.progress import Progress


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def drive(clock, *, steps=100, start=0, until=None, seconds=1.0, epsilon=8.0, terminal=False, width=100, **options):
    """Drives the callback through releases start+1 ... until, `seconds` each; returns what it printed."""
    out = io.StringIO()
    asked = []

    def epsilon_at(t):
        asked.append(t)
        clock.now += options.get("epsilon_cost", 0.0)
        return 8.0 * t / steps

    bar = Progress(
        SimpleNamespace(steps=steps, expected_examples=lambda count: 400 * count, epsilon=epsilon),
        epsilon_at,
        metric=options.get("metric"),
        console=Console(file=out, force_terminal=terminal, width=width, color_system=None, _environ={}),
    )
    trainer = SimpleNamespace(
        is_global_zero=options.get("rank", 0) == 0, global_step=start, callback_metrics=options.get("metrics", {})
    )
    module = SimpleNamespace(private_metrics={})
    bar.on_train_start(trainer, module)
    for step in range(start + 1, (until or steps) + 1):
        clock.now += seconds
        trainer.global_step = step
        module.private_metrics["private/loss"] = options.get("loss", lambda step: 0.5)(step)
        bar.on_train_batch_end(trainer, module, None, None, step)
    end = options.get("end", lambda: bar.on_train_end(trainer, module))
    if options.get("error"):
        bar.on_exception(trainer, module, KeyboardInterrupt())
    else:
        end()
    return SimpleNamespace(text=out.getvalue(), lines=out.getvalue().splitlines(), asked=asked, bar=bar)


def last_frame(text):
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    return [frame for frame in re.split(r"[\r\n]+", plain) if "release" in frame][-1]


# ---- without a terminal


def test_lines_at_each_tenth_when_releases_are_quick(clock):
    seen = drive(clock, steps=200, seconds=0.01)
    assert [line.split(" · ")[0] for line in seen.lines] == [f"release {t}/200" for t in range(0, 201, 20)]


def test_lines_each_half_minute_when_releases_are_slow(clock):
    seen = drive(clock, steps=1000, until=50, seconds=12.0)
    assert [line.split(" · ")[0] for line in seen.lines[:4]] == [
        "release 0/1,000", "release 3/1,000", "release 6/1,000", "release 9/1,000",
    ]  # fmt: skip


def test_a_line_says_epsilon_time_left_and_speed_from_the_expected_batch(clock):
    seen = drive(clock, steps=100, until=50, seconds=2.0, metrics={"lr": 1.0, "validation/accuracy": 0.81239})
    assert seen.lines[-1] == "release 50/100 · ε 4.00/8 · 1m40s left · accuracy 0.8124 · 200 ex/s"


def test_lines_hold_no_control_codes_and_no_private_figure(clock):
    seen = drive(clock, loss=lambda step: 0.7182818)
    assert "\x1b" not in seen.text
    assert "\r" not in seen.text
    assert "private" not in seen.text
    assert "0.718" not in seen.text


def test_a_resumed_run_starts_where_it_was_and_counts_its_own_speed(clock):
    seen = drive(clock, steps=100, start=60, until=70, seconds=3.0)
    assert seen.lines[0] == "release 60/100 · ε 4.80/8"
    assert seen.lines[-1] == "release 70/100 · ε 5.60/8 · 1m30s left · 133 ex/s"


def test_a_run_without_privacy_says_so_and_asks_for_no_epsilon(clock):
    seen = drive(clock, epsilon=math.inf)
    assert seen.lines[0] == "release 0/100 · non-private"
    assert seen.asked == []


@pytest.mark.parametrize("terminal", [False, True])
def test_another_rank_shows_nothing(clock, terminal):
    assert drive(clock, rank=1, terminal=terminal).text == ""


def test_the_metric_can_be_named(clock):
    metrics = {"validation/accuracy": 0.5, "validation/f1": 0.25}
    assert "f1 0.25" in drive(clock, metrics=metrics, metric="validation/f1").lines[-1]
    assert "accuracy" not in drive(clock, metrics=metrics, metric="validation/absent").lines[-1]


# ---- on a terminal


def test_the_bar_shows_everything_in_100_columns(clock):
    seen = drive(clock, steps=1000, until=600, terminal=True, metrics={"validation/accuracy": 0.81239})
    frame = last_frame(seen.text)
    assert "━" in frame
    shown = "release 600/1,000 · ε 4.80/8 · 6m40s left · accuracy 0.8124 · private/loss 0.500 · 400 ex/s"
    assert frame.endswith(shown)


def test_private_loss_is_smoothed(clock):
    seen = drive(clock, steps=10, until=3, terminal=True, loss=lambda step: {1: 1.0, 2: 2.0, 3: 0.0}[step])
    assert "private/loss 0.990" in last_frame(seen.text)  # 0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 0


def test_a_narrow_terminal_loses_the_least_wanted_part(clock):
    frame = last_frame(drive(clock, steps=1000, until=600, terminal=True, width=60).text)
    assert "release 600/1,000 · ε 4.80/8 · " in frame
    assert "ex/s" not in frame


@pytest.mark.parametrize("error", [False, True])
def test_the_cursor_comes_back_and_the_last_state_stays(clock, error):
    seen = drive(clock, steps=100, until=37, seconds=0.001, terminal=True, error=error)
    assert "release 37/100" in last_frame(seen.text)
    assert seen.text.rindex("\x1b[?25h") > seen.text.rindex("\x1b[?25l")


def test_a_slow_epsilon_takes_a_twentieth_of_the_time(clock):
    seen = drive(clock, steps=1000, seconds=0.3, terminal=True, epsilon_cost=0.5)
    assert 0.5 * len(seen.asked) < 0.06 * 1000 * 0.3
    assert len(seen.asked) > 20
    assert "ε 8.00/8" in last_frame(seen.text)  # the last figure is not an old one


# ---- in a real trainer


def test_it_follows_a_trainer_through_a_fit_and_an_error(tmp_path):
    import torch

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.layer = torch.nn.Linear(1, 1)
            self.private_metrics = {"private/loss": 0.5}

        def training_step(self, batch, batch_idx):
            if batch_idx == 7:
                raise RuntimeError("lost")
            self.optimizers().step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    out = io.StringIO()
    bar = Progress(
        SimpleNamespace(steps=10, expected_examples=lambda count: 4 * count, epsilon=math.inf),
        lambda t: math.inf,
        console=Console(file=out, force_terminal=True, width=100, color_system=None, _environ={}),
    )
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[bar], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="lost"):
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.zeros(10, 1)))
    assert "release 7/10" in last_frame(out.getvalue())
    assert "private/loss 0.500" in last_frame(out.getvalue())
    assert bar._bar is None
