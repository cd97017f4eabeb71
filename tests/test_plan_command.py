import math
import sys

import pytest

from privzoo import plan as plan_command
from privzoo.composition import compose_sweep
from privzoo.errors import UserError
from privzoo.plan import plan_rows


def rows(*overrides: str, config_dir: str | None = None) -> list[plan_command.Row]:
    return plan_rows(compose_sweep(overrides, config_dir))


def test_reference_figures_of_sst2():
    """Noise multipliers by PLD at N = 67,349, B = 1,000, delta 1e-5, published for 204 releases; tolerance 0.5 %."""
    found = rows("task=sst2", "batch_size=1000", "epochs=3", "delta=1e-5", "eps=1,3,8")
    assert [row.eps for row in found] == [1, 3, 8]
    assert [row.sigma for row in found] == pytest.approx([1.1544, 0.7547, 0.5397], rel=0.005)
    for row in found:
        assert (row.N, row.B, row.steps) == (67_349, 1_000, 203)
        assert row.q == pytest.approx(1_000 / 67_349)
        assert 0.99 * row.eps <= row.epsilon <= row.eps


def test_sigma_given_epsilon_is_computed():
    (row,) = rows("task=sst2", "batch_size=1000", "epochs=3", "delta=1e-5", "eps=null", "privacy.noise_multiplier=1")
    assert row.eps is None
    assert row.sigma == 1
    assert row.epsilon == pytest.approx(1.3785, rel=0.005)


def test_without_privacy():
    (row,) = rows("task=sst2", "eps=inf")
    assert (row.sigma, row.epsilon, row.delta) == (0, math.inf, 7e-6)


def test_equal_numbers_are_calibrated_once(monkeypatch):
    seen = []
    calibrate = plan_command._calibrate
    monkeypatch.setattr(plan_command, "_calibrate", lambda numbers: seen.append(numbers) or calibrate(numbers))
    found = rows("task=sst2", "method=dp_full,dp_bitfit", "eps=8", "seed=0,1")
    assert [row.method for row in found] == ["dp_full", "dp_full", "dp_bitfit", "dp_bitfit"]
    assert len(seen) == 1
    assert len({row.sigma for row in found}) == 1


def test_all_are_checked_before_one_is_calibrated(monkeypatch):
    monkeypatch.setattr(plan_command, "_calibrate", lambda numbers: pytest.fail("calibrated too early"))
    with pytest.raises(UserError, match="eps=0"):
        rows("task=sst2", "eps=8,0")


def test_data_at_hand_count_and_else_what_the_yaml_says(tmp_path, monkeypatch):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text("defaults: [sst2, _self_]\nname: mine\nnum_examples: null\n")
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    for split in ("train", "validation"):
        lines = "".join(f'{{"sentence": "{split} {i}", "label": {i % 2}}}\n' for i in range(30))
        (tmp_path / "data" / "sst2" / f"{split}.jsonl").write_text(lines)
    monkeypatch.setenv("PRIVZOO_DATA", str(tmp_path / "data"))
    (row,) = rows("task=mine", "eps=inf", "batch_size=10", "epochs=2", config_dir=str(tmp_path))
    assert (row.task, row.N, row.steps) == ("mine", 30, 6)
    read, build = [], plan_command.build
    monkeypatch.setattr(plan_command, "build", lambda node: read.append(node) or build(node))
    found = rows("task=sst2", "eps=inf", "batch_size=10", "seed=0,1,2")
    assert {row.N for row in found} == {30}  # not the 67,349 of its yaml
    assert len(read) == 1
    monkeypatch.delenv("PRIVZOO_DATA")
    assert rows("task=sst2", "eps=inf")[0].N == 67_349
    assert len(read) == 1


def run_main(monkeypatch, capsys, *argv: str) -> tuple[int, str, str]:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["plan", *argv])
    code = 0
    try:
        plan_command.main()
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


@pytest.mark.parametrize("argv", [["eps=inf,8"], ["eps=inf,8", "-m"], ["-m", "eps=inf,8"]])
def test_one_table_and_no_figure_cut_in_a_pipe(argv, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_main(monkeypatch, capsys, "task=sst2", "batch_size=1000", "epochs=3", "delta=1e-5", *argv)
    assert (code, err) == (0, "")
    assert out.count("sigma") == 1
    body = [line for line in out.splitlines() if "dp_bitfit" in line]
    assert [[cell.strip() for cell in line.strip("│").split("│")][2:] for line in body] == [
        ["inf", "1e-05", "67,349", "1,000", "0.014848", "203", "0.0000", "inf"],
        ["8", "1e-05", "67,349", "1,000", "0.014848", "203", *body[1].replace("│", " ").split()[-2:]],
    ]
    assert float(body[1].replace("│", " ").split()[-2]) == pytest.approx(0.5397, rel=0.005)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["eps=8,0"], "eps=0"),
        (["task=sst2", "delta=0.1"], "delta=0.1"),
        (["batch_size=100000"], "batch_size=100000"),
        (["bachsize=3"], "'batch_size'"),
        (["--nosuchflag"], "--nosuchflag"),
    ],
)
def test_mistakes(argv, part, monkeypatch, capsys):
    code, out, err = run_main(monkeypatch, capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("privzoo: ")
    assert err.count("\n") == 1
    assert part in err


def test_help_and_cfg(monkeypatch, capsys):
    code, out, _ = run_main(monkeypatch, capsys, "--help")
    assert (code, "toy_text" in out) == (0, True)
    code, out, _ = run_main(monkeypatch, capsys, "--cfg", "job", "eps=3")
    assert (code, "eps: 3\n" in out) == (0, True)
