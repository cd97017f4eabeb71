import csv
import json
import os
import pickle
import socket
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only

from privzoo.errors import UserError
from privzoo.run_loggers import build_loggers
from privzoo.run_loggers.base import RunFolderLogger

CONFIG = {"task": {"name": "toy_text", "text": ["a"]}, "eps": float("inf"), "lr": 0.1, "delta": None}
RECORD = {"state": "finished", "steps": 3, "task": "toy_text", "metric/accuracy": 0.875, "epsilon_spent": None}
SECRET = 0.7182818284590452  # of private/loss
PUBLIC = 0.5772156649015329  # of epsilon


def log(loggers, steps=(1, 2, 3)):
    for step in steps:
        for logger in loggers:
            logger.log_metrics({"private/loss": SECRET, "epsilon": PUBLIC, "lr": 0.1, "epoch": 0}, step=step)
            logger.log_metrics({"private/norm": SECRET}, step=step)
            logger.log_hyperparams({"private/loss": SECRET})


def bytes_below(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def names_below(folder):
    return " ".join(str(path.relative_to(folder)) for path in folder.rglob("*"))


def holds(folder, name, value):
    """Whether the name of a curve or its value (as text or as a binary float) lies anywhere in the folder."""
    content = bytes_below(folder)
    forms = [name.encode(), repr(value)[:8].encode(), struct.pack("<f", value), struct.pack("<d", value)]
    return [form for form in forms if form in content] + ([name] if name in names_below(folder) else [])


# ---- who gets private/...


@pytest.mark.parametrize("backend", [{}, {"tensorboard": {}}, {"mlflow": {}}], ids=["csv", "tensorboard", "mlflow"])
@pytest.mark.parametrize("private", [False, True])
def test_private_names_and_values_reach_the_disk_only_on_request(tmp_path, monkeypatch, backend, private):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    loggers = build_loggers(folder, CONFIG, private=private, **backend)
    log(loggers)
    for logger in loggers:
        logger.finalize("success")  # what Lightning calls at the end of a fit
        logger.finish(RECORD)
    assert len(holds(folder, "epsilon", PUBLIC)) >= 2  # else the search itself finds nothing
    found = holds(folder, "private/", SECRET)
    assert len(found) >= 2 if private else found == []
    assert [p.name for p in tmp_path.iterdir()] == ["run"]  # and nothing is left beside the run folder


def test_lightnings_epoch_is_no_curve(tmp_path):
    log(build_loggers(tmp_path, CONFIG))
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "step,epsilon,lr"


# ---- metrics.csv


def test_metrics_csv_is_there_without_any_backend_and_goes_on_after_a_resume(tmp_path):
    log(build_loggers(tmp_path, CONFIG), steps=(1, 2, 3))
    log(build_loggers(tmp_path, CONFIG, resume_step=1), steps=(2, 3, 4))
    with (tmp_path / "metrics.csv").open(newline="") as stream:
        assert [row["step"] for row in csv.DictReader(stream)] == ["1", "2", "3", "4"]


def test_another_rank_writes_nothing_and_drops_nothing(tmp_path, monkeypatch):
    log(build_loggers(tmp_path, CONFIG))
    before = (tmp_path / "metrics.csv").read_bytes()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    loggers = build_loggers(tmp_path, CONFIG, resume_step=0, tensorboard={}, mlflow={})
    log(loggers, steps=(9,))
    for logger in loggers:
        logger.finish(RECORD)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_loggers_can_be_sent_to_a_spawned_process(tmp_path):
    loggers = build_loggers(tmp_path, CONFIG, tensorboard={}, mlflow={}, wandb={"mode": "offline"})
    log(loggers[:2])
    assert [type(x) for x in pickle.loads(pickle.dumps(loggers))] == [type(x) for x in loggers]
    loggers[1].finish(RECORD)


# ---- TensorBoard


def scalars(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events, [(event.step, round(event.value, 6)) for event in events.Scalars(name)]


def test_tensorboard_is_readable_at_once_and_drops_what_a_resume_recomputes(tmp_path):
    logger = build_loggers(tmp_path, CONFIG, tensorboard={})[1]
    for step in range(1, 101):
        logger.log_metrics({"epsilon": step / 100}, step=step)
    assert scalars(tmp_path, "epsilon")[1] == [(step, step / 100) for step in range(1, 101)]  # though nothing was closed
    resumed = build_loggers(tmp_path, CONFIG, tensorboard={}, resume_step=1)[1]
    for step in (2, 3):
        resumed.log_metrics({"epsilon": step / 5}, step=step)
    resumed.finish(RECORD)
    events, curve = scalars(tmp_path, "epsilon")
    assert curve == [(1, 0.01), (2, 0.4), (3, 0.6)]
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "| task.name | toy_text |" in texts["config/text_summary"]
    assert "| metric/accuracy | 0.875 |" in texts["result/text_summary"]


# ---- MLflow


def mlflow_run(folder):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    [run] = client.search_runs([client.get_experiment_by_name("privzoo").experiment_id])
    return client, run


def test_mlflow_has_config_curves_result_and_one_run_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    first = build_loggers(tmp_path, CONFIG, mlflow={})[1]
    first.log_metrics({"epsilon": 0.1, "validation/f1@5": 0.5}, step=1)
    first.finish(RECORD | {"state": "interrupted"})
    client, run = mlflow_run(tmp_path)
    assert run.info.status == "KILLED"
    resumed = build_loggers(tmp_path, CONFIG, mlflow={}, resume_step=1)[1]
    resumed.log_metrics({"epsilon": 0.2}, step=2)
    assert mlflow_run(tmp_path)[1].info.status == "RUNNING"
    resumed.finish(RECORD)
    client, run = mlflow_run(tmp_path)
    assert run.info.run_name == tmp_path.name
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "task.name": "toy_text", "task.text": "['a']", "eps": "inf", "lr": "0.1", "delta": "None",
    }  # fmt: skip
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "epsilon")] == [(1, 0.1), (2, 0.2)]
    assert run.data.metrics["validation/f1_5"] == 0.5
    assert run.data.metrics["result/metric/accuracy"] == 0.875
    assert run.data.tags["result/task"] == "toy_text"


def test_a_tracking_server_that_is_not_there_is_told_at_once(tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{unused.getsockname()[1]}")
    with pytest.raises(UserError, match=r"no server answers at http://127\.0\.0\.1:\d+ \(Connection refused\)"):
        build_loggers(tmp_path, CONFIG, mlflow={})


# ---- missing packages


@pytest.mark.parametrize(
    ("package", "command"),
    [("wandb", "pip install wandb"), ("tensorboard", "privzoo[tensorboard]"), ("mlflow", "privzoo[mlflow]")],
)
def test_a_missing_package_is_told_with_the_command_that_installs_it(tmp_path, monkeypatch, package, command):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as caught:
        build_loggers(tmp_path, CONFIG, **{package: {}})
    assert command in str(caught.value)
    assert f"logger={package}" in str(caught.value)


# ---- W&B, in processes of its own: it keeps state per process, reads the environment and looks for a terminal


_WANDB = """
import json, sys, time
from pathlib import Path
from privzoo.errors import UserError
from privzoo.run_loggers import build_loggers, wandb_logger
CONFIG = {"eps": float("inf"), "task": {"name": "toy_text"}}
RECORD = {"state": "finished", "steps": 3, "metric/accuracy": 0.875}
wandb_logger.INIT_TIMEOUT_S = 2
def run(folder, steps, finish=True, **options):
    Path(folder).mkdir(exist_ok=True)
    logger = build_loggers(Path(folder), CONFIG, wandb={"mode": options.pop("mode", "auto")}, **options)[1]
    for step in steps:
        logger.log_metrics({"private/loss": SECRET, "epsilon": PUBLIC}, step=step)
        print("private/loss", SECRET)  # what the progress bar does
        sys.stderr.write(f"private/loss {SECRET}\\n")
    logger.finalize("success")
    if finish:
        logger.finish(RECORD)
    return logger
"""
_WANDB = f"SECRET, PUBLIC = {SECRET!r}, {PUBLIC!r}\n" + _WANDB


def wandb_process(zygote, folder, code, terminal="", **environment):
    """Exit code and output of `code` after _WANDB."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "NETRC"}
    clean |= {"HOME": str(home), "CI": ""} | environment
    return zygote(script=_WANDB + code, folder=str(folder), environment=clean, terminal=terminal)


def on_a_terminal(zygote, folder, code):
    """What `code` prints whose input and output are a terminal."""
    ours, theirs = os.openpty()
    exit_code, _ = wandb_process(zygote, folder, code, terminal=os.ttyname(theirs))
    os.set_blocking(ours, False)  # nothing printed is an error, not a wait
    text = os.read(ours, 65536).decode()
    os.close(theirs)
    os.close(ours)
    assert exit_code == 0, text
    return text


@pytest.fixture(scope="module")
def without_a_server(second_zygote, tmp_path_factory):
    """A run that looks for a server in vain, started before the other test with W&B: both wait more than they reckon."""
    folder = tmp_path_factory.mktemp("without_a_server")
    code = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "began = time.monotonic(); run('plain', (1,)); print('seconds', time.monotonic() - began)\n"
    )
    server = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    with ThreadPoolExecutor(1) as pool:
        yield folder, pool.submit(wandb_process, second_zygote, folder, code, **server)


def segments(folder):
    return sorted((Path(folder) / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.usefixtures("without_a_server")
def test_wandb_offline_never_asks_is_quiet_and_keeps_private_names_and_output_out(zygote, tmp_path):
    printed = on_a_terminal(
        zygote,
        tmp_path,
        "run('plain', (1, 2), finish=False)\n"  # breaks off; the next run must not be handed its W&B run
        "run('open', (1, 2), private=True)\n"
        "run('plain', (2, 3), resume_step=1)\n"
        "run('off', (1,), mode='disabled')\n"
        "for mode in ('online', 'sometimes'):\n"
        "    try: run('none', (1,), mode=mode)\n"
        "    except UserError as error: print(error)\n",
    )
    assert printed.replace("\r", "").splitlines() == [  # no word from W&B, and no question
        *[f"private/loss {SECRET}"] * 14,
        "logger.wandb.mode=online needs a login: run `wandb login`, or choose mode=auto.",
        "Expected logger.wandb.mode=sometimes to be one of auto, online, offline, disabled.",
    ]
    assert not (tmp_path / "off" / "wandb").exists()
    assert holds(tmp_path / "plain", "private/", SECRET) == []
    assert len(holds(tmp_path / "plain", "epsilon", PUBLIC)) >= 2
    assert len(holds(tmp_path / "open", "private/", SECRET)) >= 2
    plain = segments(tmp_path / "plain")
    assert len(plain) == 2  # a second segment ...
    assert {path.name for path in plain} == {
        f"run-{json.loads((tmp_path / 'plain/loggers.json').read_text())['wandb']}.wandb"
    }
    assert plain[0].name != segments(tmp_path / "open")[0].name  # ... of the same run and of no other
    assert b"metric/accuracy" in bytes_below(tmp_path / "plain")  # the summary
    assert b"toy_text" in bytes_below(tmp_path / "plain")  # the configuration
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "none", "off", "open", "plain"]


def test_wandb_without_a_server_goes_on_offline(without_a_server):
    folder, running = without_a_server
    code, printed = running.result(timeout=120)
    assert code == 0, printed
    assert "going on offline" in printed
    assert float(printed.split("seconds ")[1].split()[0]) < 20
    assert len(segments(folder / "plain")) == 1


def test_the_run_folder_logger_is_a_lightning_logger(tmp_path):
    from lightning.pytorch import Trainer

    logger = RunFolderLogger(tmp_path, CONFIG)
    trainer = Trainer(logger=[logger], accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)
    assert trainer.loggers == [logger]
    assert trainer.log_dir == str(tmp_path)
