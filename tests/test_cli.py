"""The command line in this process: exit codes, sentences, what is written, and the wheel that carries conf/."""

import errno
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from omegaconf import DictConfig, OmegaConf

from privzoo.cli import exit_on_error, read_arguments, run_hydra
from privzoo.composition import build
from privzoo.errors import RunLost, Stopped, UserError

REPOSITORY = Path(__file__).resolve().parents[1]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str
    configs: list[DictConfig]


@pytest.fixture
def command(monkeypatch, capsys, tmp_path) -> Callable[..., Outcome]:
    """Runs a Hydra application with these arguments from an empty folder; `does` is called with each job's cfg."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # is set by run_hydra; this puts it back afterwards
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, does: Callable[[DictConfig], None] = lambda cfg: None) -> Outcome:
        configs: list[DictConfig] = []

        def task_function(cfg: DictConfig) -> None:
            configs.append(cfg)
            does(cfg)

        monkeypatch.setattr(sys, "argv", ["privzoo", *argv])
        code = 0
        try:
            run_hydra(task_function, "train")
        except SystemExit as end:
            code = int(end.code or 0)
        return Outcome(code, *capsys.readouterr(), configs)

    return run


def fail_with(error: BaseException) -> Callable[[DictConfig], None]:
    def fail(cfg: DictConfig) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["bachsize=3"], ["Unknown key 'bachsize'", "'batch_size'", "--cfg job"]),
        (["epsilon=3"], ["Unknown key 'epsilon'", "'eps'"]),
        (["trainer.device=1"], ["Unknown key 'trainer.device'", "'trainer.devices'"]),
        (["trainer.gradient_clip_val=1"], ["'trainer.gradient_clip_val'", "'clip_norm'"]),
        (["progress=false"], ["Unknown key 'progress'", "'trainer.progress'"]),
        (["trainer.oops=1"], ["'trainer.oops': trainer takes accelerator, precision"]),
        (["zzz=1"], ["Unknown key 'zzz'. ", "--cfg job"]),
        (["task=toy_lm", "model.pooling=mean"], ["'model.pooling': it exists, but not for the model that is chosen"]),
        (["task=sst3"], ["task 'sst3' does not exist", "sst2, sst2_1k, sst2_few_shot, sst5", "Did you mean 'sst5'?"]),
        (["method=dp_ful"], ["method 'dp_ful' does not exist", "'dp_full'"]),
        (["logger=[wandb,tensorbord]"], ["logger 'tensorbord' does not exist", "'tensorboard'"]),
        (["task=[sst2,toy_text]"], ["one task and one method", "-m"]),
        (["task=3"], ["the name of a choice"]),
        (["eps=3,8"], ["eps=3,8 names several values", "-m"]),
        (["eps=0"], ["eps=0"]),
        (["eps=nan"], ["eps=nan"]),
        (["delta=2"], ["delta=2", "1/N"]),
        (["x=What's new?"], ["Cannot read", "What's new?"]),
        (["eps"], ["Cannot read", "eps"]),
        (["--nosuchflag"], ["--nosuchflag", "--help"]),
        (["--config-dir", "/no/such/folder"], ["/no/such/folder"]),
        (["-m", "--cfg", "job"], ["Only one of"]),
        (["+eps=3"], ["eps"]),
        (["method.optimizer.weight_decy=1"], ["'method.optimizer.weight_decay'"]),
    ],
)
def test_a_mistake_costs_one_sentence_and_exit_code_2(argv, parts, command):
    outcome = command(*argv)
    assert outcome.code == 2
    assert outcome.configs == [], "the task function must not be reached"
    assert outcome.err.startswith("privzoo: ")
    assert outcome.err.count("\n") == 1
    for part in parts:
        assert part in outcome.err
    assert outcome.out == ""


def test_a_single_run_writes_nothing_by_itself(command, tmp_path):
    outcome = command("eps=3")
    assert (outcome.code, len(outcome.configs)) == (0, 1)
    assert outcome.configs[0].choices == {"task": "toy_text", "method": "dp_bitfit", "model": "tiny_encoder"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [["-m", "eps=3,8"], ["eps=3,8", "-m"], ["eps=3,8", "--multirun", "seed=0"]])
def test_a_sweep_runs_each_and_hides_hydras_notes(argv, command, tmp_path):
    outcome = command(*argv)
    assert outcome.code == 0
    assert [cfg.eps for cfg in outcome.configs] == [3, 8]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".multirun"]


def test_a_failing_job_leaves_the_others_alone(command):
    def fail(cfg: DictConfig) -> None:
        if cfg.seed == 1:
            raise UserError("seed 1 is unlucky.")

    outcome = command("-m", "seed=0,1,2", "eps=3,0", does=fail)
    assert [(cfg.seed, cfg.eps) for cfg in outcome.configs] == [(0, 3), (1, 3), (2, 3)]
    assert outcome.err.count("privzoo: seed 1 is unlucky.") == 1
    assert outcome.err.count("Expected eps=0") == 3
    assert outcome.code == 2


def test_a_choice_that_does_not_exist_stops_a_sweep_before_its_first_run(command):
    outcome = command("-m", "task=toy_text,nowhere")
    assert (outcome.code, outcome.configs) == (2, [])
    assert "task 'nowhere' does not exist" in outcome.err


def test_a_bug_in_a_sweep_shows_its_traceback_and_the_others_run(command):
    def fail(cfg: DictConfig) -> None:
        if cfg.seed == 0:
            raise ZeroDivisionError("a bug")

    outcome = command("-m", "seed=0,1", does=fail)
    assert len(outcome.configs) == 2
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert "ZeroDivisionError: a bug" in outcome.err


def test_a_bug_keeps_its_traceback(command):
    with pytest.raises(ZeroDivisionError):
        command(does=fail_with(ZeroDivisionError("a bug")))


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UserError("two\n lines"), 2, "privzoo: two lines\n"),
        (RunLost("kept until release 25."), 1, "privzoo: kept until release 25.\n"),
        (OSError(errno.ENOSPC, "No space left", "last.ckpt"), 1, "last.ckpt"),
        (KeyboardInterrupt(), 130, "Ctrl-C"),
        (Stopped("checkpoint written.", signal.SIGTERM), 143, "privzoo: checkpoint written.\n"),
    ],
)
def test_exit_codes(error, code, sentence, command):
    outcome = command(does=fail_with(error))
    assert outcome.code == code
    assert sentence in outcome.err
    assert "Traceback" not in outcome.err


def test_an_interrupt_ends_a_sweep(command):
    outcome = command("-m", "seed=0,1", does=fail_with(KeyboardInterrupt()))
    assert (outcome.code, len(outcome.configs)) == (130, 1)


class Picky:
    def __init__(self, error: Exception | None = None, name: str = "") -> None:
        if name == "user":
            raise UserError("name=user is taken.")
        if name == "bug":
            raise ZeroDivisionError("a bug")


def construct(**keywords: str) -> Callable[[DictConfig], None]:
    target = f"{__name__}.Picky"
    sys.modules[__name__].Picky = Picky  # type: ignore[attr-defined]
    return lambda cfg: build(OmegaConf.create({"_target_": target, **keywords}))


def test_what_a_constructor_refuses_is_a_sentence_and_what_breaks_in_it_a_bug(command):
    outcome = command(does=construct(name="user"))
    assert (outcome.code, outcome.err) == (2, "privzoo: name=user is taken.\n")
    outcome = command(does=construct(nmae="x"))
    assert outcome.code == 2
    assert "nmae" in outcome.err
    outcome = command(does=lambda cfg: build(OmegaConf.create({"_target_": "privzoo.nowhere.Thing"})))
    assert outcome.code == 2
    assert "privzoo.nowhere.Thing" in outcome.err
    with pytest.raises(Exception, match="a bug"):
        command(does=construct(name="bug"))


def test_a_bug_while_handling_a_users_mistake_is_a_bug():
    def clumsy() -> None:
        try:
            raise UserError("a mistake")
        except UserError:
            raise ZeroDivisionError("a bug")  # noqa: B904 - the context is the point

    with pytest.raises(ZeroDivisionError), exit_on_error():
        clumsy()


def test_help_and_cfg_show_and_run_nothing(command):
    shown = command("--help")
    assert (shown.code, shown.configs, shown.err) == (0, [], "")
    for part in ("toy_text", "dp_bitfit", "eps: 8", "--multirun"):
        assert part in shown.out
    shown = command("--cfg", "job", "task=sst2", "eps=inf")
    assert (shown.code, shown.configs) == (0, [])
    assert "eps: .inf" in shown.out
    assert "nyu-mll/glue" in shown.out


def test_a_users_folder_is_found(command, tmp_path):
    (tmp_path / "user" / "task").mkdir(parents=True)
    (tmp_path / "user" / "task" / "mine.yaml").write_text("defaults: [sst2, _self_]\nname: mine\n")
    outcome = command("task=mine", "--config-dir", "user")
    assert outcome.code == 0
    assert outcome.configs[0].choices == {"task": "mine", "method": "dp_bitfit", "model": "minilm"}


def test_a_wrong_train_command_never_imports_torch(tmp_path):
    script = """
import sys
sys.argv = ["privzoo.train", "eps=0"]
from privzoo.train import main
try:
    main()
except SystemExit as end:
    print(end.code, "torch" in sys.modules, "lightning" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "2 False False\n"
    assert done.stderr.startswith("privzoo: Expected eps=0")


def test_values_of_plain_commands_are_verbatim():
    text = "What's new, a=b? [1,2] #3 "
    assert read_arguments([f"prompt={text}", "run="], {"prompt": "", "run": ""}) == {"prompt": text, "run": ""}
    assert read_arguments([], {"run": ""}) == {}


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["runs/x"], ["'runs/x'", "run, prompt"]),
        (["rum=x"], ["'rum'", "did you mean 'run'"]),
        (["zzzz=x"], ["'zzzz'", "run, prompt"]),
        (["run=a", "run=b"], ["'run'", "twice"]),
        (["prompt=x"], ["run=<run folder>"]),
    ],
)
def test_plain_commands_refuse(argv, parts):
    with pytest.raises(UserError) as caught:
        read_arguments(argv, {"run": "run folder", "prompt": "text"}, required=["run"])
    for part in parts:
        assert part in str(caught.value)


def test_plain_help(capsys):
    with pytest.raises(SystemExit) as end:
        read_arguments(["--help"], {"run": "a run folder"}, required=["run"])
    assert end.value.code == 0
    assert "run=  a run folder (required)" in capsys.readouterr().out


def test_a_wheel_carries_conf_and_works_anywhere_without_torch(tmp_path):
    build_it = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build_it, str(REPOSITORY)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    shipped = {str(file.relative_to(site / "privzoo" / "conf")) for file in (site / "privzoo" / "conf").rglob("*.yaml")}
    assert shipped == {str(file.relative_to(REPOSITORY / "conf")) for file in (REPOSITORY / "conf").rglob("*.yaml")}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = (
        "import sys; sys.argv = ['privzoo-plan', 'task=sst2', 'eps=inf'];"
        "import privzoo.plan, privzoo.composition; print(privzoo.composition.conf_dir()); privzoo.plan.main();"
        "print('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(site / "privzoo" / "conf"))
    assert "67,349" in done.stdout
    assert done.stdout.endswith("False\n")
    assert list(elsewhere.iterdir()) == []


def test_a_reader_that_has_seen_enough() -> None:
    """`privzoo-train --help | head -1` ends without a traceback."""
    command = f"{sys.executable} -m privzoo.train --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=REPOSITORY)
    assert found.returncode in (0, 141)  # 0 where all of it fitted into the pipe
    assert "Fine-tunes" in found.stdout
    assert found.stderr == ""
