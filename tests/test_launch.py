"""`trainer.devices=2`: one command, two processes, one run folder."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from privzoo.models.pretrain import TINY_FOLDER

RUN = ("task=toy_text", "method=dp_full", "eps=8", "trainer.devices=2", "trainer.accelerator=cpu", "epochs=0.6",
       "batch_size=100", "lr=1e-3", "trainer.checkpoint_every=2", "trainer.progress=false")  # fmt: skip
SEEDED = (*RUN, "privacy.noise_seed=5")


@pytest.fixture(scope="module")
def whole(privzoo_on_few_rows, tmp_path_factory):
    """A run of six releases that nothing disturbs: its folder and what it said."""
    out = tmp_path_factory.mktemp("whole")
    code, output = privzoo_on_few_rows(*SEEDED, f"output_dir={out}")
    assert code == 0, output
    (folder,) = out.iterdir()
    return folder, output


def ledger_of(folder):
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def weights_of(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def test_one_run_of_two_processes(whole):
    folder, output = whole
    record = json.loads((folder / "result.json").read_text())
    assert (record["state"], record["devices"], record["steps"]) == ("finished", 2, 6)
    assert [line["release"] for line in ledger_of(folder)] == list(range(6))
    assert output.count("2 × cpu") == 1
    assert "Warning" not in output
    assert not (folder / "run.key").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_which_goes_on(rank, whole, privzoo_on_few_rows, tmp_path):
    """PRIVACY 35: what was lost is computed again, pays once, and comes to the same weights."""
    kill = {"at": "draw rows", "count": 4, "when": "before"}
    code, output = privzoo_on_few_rows(*SEEDED, f"output_dir={tmp_path}", kill=kill, kill_rank=rank)
    (folder,) = tmp_path.iterdir()
    assert code == 1, output
    assert f"privzoo: Rank {rank} of 2 was ended by signal 9 (SIGKILL): go on with resume={folder}." in output
    assert "Traceback" not in output
    assert len(ledger_of(folder)) >= 3
    code, output = privzoo_on_few_rows(f"resume={folder}", "trainer.progress=false")
    assert code == 0, output
    assert [line["release"] for line in ledger_of(folder)] == list(range(6))
    assert weights_of(folder) == weights_of(whole[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_both_with_a_checkpoint(number, whole, second_zygote, privzoo_on_few_rows, tmp_path):
    answers = []

    def command():
        request = {"rows": {"train": 1000, "validation": 100}, "started": str(tmp_path / "pid")}
        answers.append(second_zygote(*SEEDED, f"output_dir={tmp_path}/runs", **request))

    thread = threading.Thread(target=command)
    thread.start()
    folder = wait_for(lambda: next((tmp_path / "runs").glob("toy*"), None))
    wait_for(lambda: len(ledger_of(folder)) >= 2)
    os.kill(int((tmp_path / "pid").read_text()), number)
    if number == signal.SIGTERM:  # as where both the command and its ranks get it
        os.kill(int((tmp_path / "pid").read_text()), number)
    thread.join()
    code, output = answers[0]
    assert code == 128 + number, output
    assert f"go on with: python -m privzoo.train resume={folder}" in output
    assert json.loads((folder / "result.json").read_text())["state"] == "interrupted"
    code, output = privzoo_on_few_rows(f"resume={folder}", "trainer.progress=false")
    assert code == 0, output
    assert weights_of(folder) == weights_of(whole[0])


def test_ranks_end_with_the_command(second_zygote, tmp_path):
    """A command that is killed leaves no process behind; the run can go on."""
    thread = threading.Thread(
        target=lambda: second_zygote(*SEEDED, "epochs=200", f"output_dir={tmp_path}/runs", started=str(tmp_path / "pid"))
    )
    thread.start()
    folder = wait_for(lambda: next((tmp_path / "runs").glob("toy*"), None))
    wait_for(lambda: len(ledger_of(folder)) >= 1)
    command = int((tmp_path / "pid").read_text())
    ranks = [int(each) for each in Path(f"/proc/{command}/task/{command}/children").read_text().split()]
    assert len(ranks) == 2
    os.kill(command, signal.SIGKILL)
    thread.join()
    wait_for(lambda: not any(running(rank) for rank in ranks))
    assert json.loads((folder / "result.json").read_text())["state"] == "interrupted"


def test_a_mistake_is_told_once(privzoo, tmp_path):
    code, output = privzoo(*RUN, "clip_norm=1e-30", f"output_dir={tmp_path}", "model.path=/nowhere")
    assert code == 2
    assert output.count("privzoo: ") == 1
    assert not list(tmp_path.iterdir())


def test_another_number_of_ranks_draws_and_pays_anew(privzoo_on_few_rows, tmp_path):
    """PRIVACY 35: of a release that was lost on two ranks and made on one, both are paid for, within epsilon."""
    kill = {"at": "draw rows", "count": 4, "when": "before"}
    code, _ = privzoo_on_few_rows(*RUN, f"output_dir={tmp_path}", kill=kill, kill_rank=1)
    assert code == 1
    (folder,) = tmp_path.iterdir()
    made = len(ledger_of(folder))
    code, output = privzoo_on_few_rows(f"resume={folder}", "trainer.devices=1", "trainer.progress=false")
    assert code == 0, output
    lines, record = ledger_of(folder), json.loads((folder / "result.json").read_text())
    assert len({line["digest"] for line in lines}) == 2
    assert lines[made]["release"] == 2, "the first one after the checkpoint"
    assert record["state"] == "stopped_at_epsilon"
    assert record["epsilon_spent"] <= 8


def test_processes_of_torchrun(privzoo_on_few_rows, tmp_path):
    """Each is the command itself, as srun starts it, too; in a sweep they go from run to run together."""
    few = [each for each in RUN if not each.startswith(("eps=", "task="))]
    command = ("-m", "task=toy_text", "eps=3,8", *few, f"output_dir={tmp_path}")
    code, output = privzoo_on_few_rows(*command, ranks=2)
    assert code == 0, output
    assert output.count("2 × cpu") == 2
    for folder in tmp_path.glob("toy*"):
        assert json.loads((folder / "result.json").read_text())["state"] == "finished"
        assert len(ledger_of(folder)) == 6
    code, output = privzoo_on_few_rows(*command, ranks=2)
    assert code == 0, output
    assert output.count("is finished already") == 2
    code, output = privzoo_on_few_rows(*RUN, "trainer.devices=3", f"output_dir={tmp_path}", ranks=2)
    assert code == 2
    assert "Expected trainer.devices=3 to be 2, the processes that were started." in output
    code, output = privzoo_on_few_rows(*command[:2], "eps=-1,8", *command[3:], ranks=2)
    assert code == 2
    assert "Expected eps=-1" in output
    assert "run 2" not in output, "a run that fails ends the sweep: the other rank may be elsewhere"
    (folder,) = tmp_path.glob("*eps8*")
    (folder / "result.json").write_text((folder / "result.json").read_text().replace("finished", "interrupted"))
    code, output = privzoo_on_few_rows(*RUN, f"output_dir={tmp_path}", ranks=2)
    assert code == 2
    assert output.count("holds an unfinished run of this configuration") == 2, "a sentence of each process"


@pytest.mark.parametrize(
    ("strategy", "task", "method"),
    [
        ("fsdp", "toy_text", "dp_bitfit"),
        ("zero3", "toy_text", "dp_full"),
        pytest.param("fsdp", "toy_lm", "dp_qlora", marks=pytest.mark.sweep),
        pytest.param("fsdp", "toy_lm", "dp_full", marks=pytest.mark.sweep),  # its output layer is its table
        pytest.param("zero1", "toy_text", "dp_bitfit", marks=pytest.mark.sweep),
        pytest.param("zero2", "toy_text", "dpzero", marks=pytest.mark.sweep),  # of which nothing is dealt out
        pytest.param("zero3", "toy_lm", "dp_qlora", marks=pytest.mark.sweep),
        pytest.param("zero3", "toy_lm", "dp_full", marks=pytest.mark.sweep),
    ],
)
def test_weights_are_dealt_out(strategy, task, method, privzoo_on_few_rows, tmp_path):
    """Trained, scored and saved by both ranks together; another program loads them, the frozen ones as they were before."""
    given = (f"task={task}", f"method={method}", "eps=8", "trainer.devices=2", f"trainer.strategy={strategy}", "epochs=0.3",
             "batch_size=100", "trainer.accelerator=cpu", "trainer.progress=false", "trainer.validate_every=2")  # fmt: skip
    code, output = privzoo_on_few_rows(*given, f"output_dir={tmp_path}")
    assert code == 0, output
    (folder,) = tmp_path.iterdir()
    record = json.loads((folder / "result.json").read_text())
    assert record["state"] == "finished"
    code, output = privzoo_on_few_rows(f"run={folder}", module="privzoo.evaluate")
    assert code == 0, output
    if task == "toy_text":
        began = AutoModelForSequenceClassification.from_pretrained(TINY_FOLDER / "tiny_encoder").state_dict()
        saved = AutoModelForSequenceClassification.from_pretrained(folder / "model").state_dict()
        same = {name for name in began if torch.equal(began[name], saved[name])}
        assert {name for name in began if name not in same} == {
            name for name in began if method != "dp_bitfit" or name.endswith("bias") or name.startswith("classifier")
        }


@pytest.mark.parametrize("strategy", ["zero3", *(pytest.param(each, marks=pytest.mark.sweep) for each in ("fsdp", "zero2"))])
def test_a_run_that_is_dealt_out_goes_on_from_its_checkpoint(strategy, privzoo_on_few_rows, tmp_path):
    """PRIVACY 35: weights and moments of both ranks lie in one checkpoint, whole, and come back to the same bits."""
    average = "method.average={_target_:privzoo.methods.average.ExponentialAverage}"
    given = (*SEEDED, f"trainer.strategy={strategy}", average)
    code, output = privzoo_on_few_rows(*given, f"output_dir={tmp_path}/whole")
    assert code == 0, output
    kill = {"at": "draw rows", "count": 4, "when": "before"}
    code, output = privzoo_on_few_rows(*given, f"output_dir={tmp_path}/killed", kill=kill, kill_rank=1)
    assert code == 1, output
    (straight,), (folder,) = (tmp_path / "whole").iterdir(), (tmp_path / "killed").iterdir()
    held = torch.load(folder / "last.ckpt", weights_only=True)
    shapes = {name: value.shape for name, value in held["state_dict"].items()}
    assert shapes["model.classifier.weight"] == (2, shapes["model.classifier.weight"][1])
    code, output = privzoo_on_few_rows(f"resume={folder}", "trainer.progress=false")
    assert code == 0, output
    assert [line["release"] for line in ledger_of(folder)] == list(range(6))
    assert weights_of(folder) == weights_of(straight)


@pytest.mark.sweep
@pytest.mark.parametrize(("before", "after"), [("zero3", "replicas"), ("fsdp", "zero2")])
def test_a_run_goes_on_with_another_strategy(before, after, privzoo_on_few_rows, tmp_path):
    """What it lost it pays again: other sums at the same weights must have other noise. Moments fit, flat or not."""
    given = (*SEEDED, f"trainer.strategy={before}", f"output_dir={tmp_path}")
    code, output = privzoo_on_few_rows(*given, kill={"at": "draw rows", "count": 4, "when": "before"}, kill_rank=1)
    assert code == 1, output
    (folder,) = tmp_path.iterdir()
    start, lost = torch.load(folder / "last.ckpt", weights_only=True)["global_step"], ledger_of(folder)[-1]
    assert start == 2
    other = (f"trainer.strategy={after}", "trainer.devices=2")
    code, output = privzoo_on_few_rows(f"resume={folder}", *other, "trainer.progress=false")
    assert code == 0, output
    lines = ledger_of(folder)
    of_lost = [line for line in lines if line["release"] == lost["release"]]
    assert len({line["digest"] for line in of_lost}) == 2
    assert (folder / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [
                "method=dp_full",
                "trainer.strategy=zero2",
                "method.optimizer._target_=torch.optim.Adafactor",
                "~method.optimizer.fused",
            ],
            "Adafactor looks at the shape of what it trains",
        ),
        (
            [
                "method=dp_bitfit",
                "trainer.strategy=zero1",
                "method.optimizer._target_=bitsandbytes.optim.AdamW8bit",
                "~method.optimizer.fused",
            ],
            "AdamW8bit cannot step what trainer.strategy deals out",
        ),
        (["method=dp_full", "+method.engine.groups=layer"], "cannot deal out gradients that are clipped by layer"),
        (["method=dp_bitfit", "method.engine._target_=privzoo.privacy.clipping.Loop"], "those of Loop hang on the rows"),
    ],
)
def test_what_cannot_be_dealt_out_is_told_once(overrides, message, privzoo_on_few_rows, tmp_path):
    given = ("task=toy_text", "eps=8", "trainer.devices=2", "trainer.accelerator=cpu")
    given += () if any("strategy" in each for each in overrides) else ("trainer.strategy=fsdp",)
    code, output = privzoo_on_few_rows(*given, *overrides, f"output_dir={tmp_path}")
    assert code == 2, output
    assert output.count("privzoo: ") == 1
    assert message in output
    assert not list(tmp_path.iterdir())


def test_ranks_that_see_other_data(privzoo, tmp_path):
    script = f"""
from pathlib import Path
from privzoo.identity import digest_on_ranks
from privzoo.privacy.ledger import Ledger, Replica
from privzoo.privacy.ranks import join_ranks, leave_ranks
ranks = join_ranks()
path = Path({str(tmp_path)!r}, "ledger.jsonl")
ledger = Ledger(path) if ranks.first else Replica(path)
if ranks.first:
    ledger.branch("a test")
assert digest_on_ranks(ranks, ledger, lambda: "digest of " + ledger.branches[0]).startswith("digest of ")
try:
    digest_on_ranks(ranks, ledger, lambda: f"of data on rank {{ranks.rank}}")
except ValueError as error:
    print(error)
leave_ranks()
"""
    code, output = privzoo(script=script, ranks=2)
    assert code == 0, output
    assert output.count("Expected the same configuration, data, weights, code and versions on every rank") == 2


def test_ranks_that_count_other_units(privzoo, tmp_path):
    """The same rows, of other owners on one rank: it is told before anything is made."""
    for rank in (0, 1):
        rows = [{"text": f"row {i}", "label": "yn"[i % 2], "who": i % 120 if rank else i // 2} for i in range(240)]
        (tmp_path / f"{rank}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = f"""
from privzoo.composition import compose
from privzoo.privacy.ranks import join_ranks, leave_ranks
from privzoo.run import run
from privzoo.run_folder import open_folder
ranks = join_ranks()
cfg = compose([
    "task=jsonl", "task.kind=classification", "task.data.owner=who", "task.data.rows_per_owner=4", "task.label_names=[y,n]",
    "task.max_length=64", "method=dp_head", "model=tiny_encoder", "eps=8", "batch_size=16",
    f"data.path={tmp_path}/{{ranks.rank}}.jsonl", "output_dir={tmp_path}/runs",
])
try:
    run(open_folder(cfg), ranks)
except ValueError as error:
    print(error)
leave_ranks()
"""
    code, output = privzoo(script=script, ranks=2)
    assert code == 0, output
    assert output.count("Expected the same units of privacy on every rank, found others on rank 1 than on rank 0.") == 2
    assert not (tmp_path / "runs").exists()


def wait_for(found):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if value := found():
                return value
        except OSError:
            pass
        time.sleep(0.02)
    raise AssertionError("it did not come to pass")


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
