import math
import re
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from privzoo.composition import compose
from privzoo.config import run_id, run_name, validate
from privzoo.errors import UserError


@pytest.fixture(scope="module")
def plain_config() -> dict:
    """The default run, resolved: composing costs a tenth of a second, which the table below would pay 80 times."""
    content = OmegaConf.to_container(compose(), resolve=True)
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize(
    "override",
    [
        *(f"eps={v}" for v in ("0", "-1", "nan", "abc", "true", "null", "[1]", "-inf")),
        *(f"delta={v}" for v in ("0", "1", "-1e-5", "nan", "small", "true")),
        *(f"epochs={v}" for v in ("0", "-1", "inf", "nan", "many", "null")),
        *(f"batch_size={v}" for v in ("0", "-5", "2.5", "1e3", "big", "null", "true")),
        *(f"microbatch_size={v}" for v in ("0", "1.5", "null")),
        *(f"lr={v}" for v in ("0", "-1", "inf", "nan", "fast", "null")),
        *(f"clip_norm={v}" for v in ("0", "-0.1", "inf", "nan", "null")),
        *(f"seed={v}" for v in ("-1", "0.5", "x", "null")),
        *(f"trainer.devices={v}" for v in ("-1", "0", "auto", "true")),
        *(f"trainer.strategy={v}" for v in ("ddp", "null", "fsdp")),  # the last one, as there is one process
        *(f"trainer.precision={v}" for v in ("16-mixed", "32")),
        "trainer.accelerator=abacus",
        "trainer.checkpoint_every=0",
        "trainer.validate_every=-1",
        "trainer.progress=1",
        "privacy.accountant=gdp",
        "privacy.noise_seed=-1",
        "privacy.noise_multiplier=0.5",  # eps is given as well
        "logger.private=1",
        "data_root=/no/such/folder",
        "output_dir=/dev/null/runs",
        "resume=/no/such/run",
        "+surprise=1",
    ],
)
def test_a_wrong_value_is_refused_by_one_sentence_that_names_key_and_value(override, plain_config):
    key, value = override.lstrip("+").split("=", 1)
    parsed = OverridesParser.create().parse_override(override)
    cfg = OmegaConf.create(plain_config)
    OmegaConf.update(cfg, parsed.key_or_group, parsed.value())
    with pytest.raises(UserError) as caught:
        validate(cfg)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert key in sentence
    if not override.startswith("+") and value not in ("true", "null", "1e3", "-1e-5"):  # Python writes these otherwise
        assert value in sentence


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["eps=0.1"],
        ["eps=inf"],
        ["eps=inf", "clip_norm=inf"],
        ["delta=1e-5", "epochs=0.5", "batch_size=1", "microbatch_size=1", "lr=1", "clip_norm=100", "seed=7"],
        ["eps=null", "privacy.noise_multiplier=1"],
        ["trainer.precision=bf16-mixed", "trainer.accelerator=cpu", "privacy.noise_seed=0"],
    ],
)
def test_a_right_value_passes(overrides, run_config):
    validate(run_config(*overrides))


@pytest.mark.parametrize("sigma", ["0", "-1", "inf", "x"])
def test_noise_multiplier_alone_is_checked_too(sigma, run_config):
    with pytest.raises(UserError, match="noise_multiplier"):
        validate(run_config("eps=null", f"privacy.noise_multiplier={sigma}"))


def test_resume_wants_a_run_folder(tmp_path, run_config):
    with pytest.raises(UserError, match=r"no config\.yaml and no ledger\.jsonl"):
        validate(run_config(f"resume={tmp_path}"))
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"has no ledger\.jsonl"):
        validate(run_config(f"resume={tmp_path}"))
    (tmp_path / "ledger.jsonl").write_text("")
    validate(run_config(f"resume={tmp_path}"))


def test_id_ignores_what_cannot_change_the_result(tmp_path, run_config):
    assert {
        run_id(run_config(*same))
        for same in (
            [],
            ["microbatch_size=3"],
            ["output_dir=elsewhere"],
            [f"data_root={tmp_path}"],
            [f"resume={tmp_path}"],
            ["logger=[wandb,mlflow]"],
            ["trainer.progress=true"],
            ["trainer.checkpoint_every=3"],
            ["eps=8.0"],
            ["epochs=2.0"],
        )
    } == {run_id(run_config())}


def test_id_changes_with_what_can(run_config):
    different = [
        [],
        ["eps=3"],
        ["eps=inf"],
        ["delta=1e-6"],
        ["epochs=3"],
        ["batch_size=300"],
        ["lr=0.01"],
        ["clip_norm=1"],
        ["seed=1"],
        ["task=toy_images"],
        ["method=dp_full"],
        ["model.path=/elsewhere"],
        ["trainer.precision=bf16-mixed"],
        ["privacy.noise_seed=1"],
        ["method.optimizer.weight_decay=0.1"],
        ["task=jsonl", "data.path=a.jsonl"],
        ["task=jsonl", "data.path=b.jsonl"],
        ["task=jsonl", "data.path=b.jsonl", "data.on_error=skip"],
    ]
    assert len({run_id(run_config(*overrides)) for overrides in different}) == len(different)


def test_id_survives_the_configuration_file_of_the_run_folder(tmp_path: Path, run_config):
    cfg = run_config("eps=inf", "delta=1e-5", "lr=1e-7")
    OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
    again = OmegaConf.load(tmp_path / "config.yaml")
    assert run_id(again) == run_id(cfg)
    assert run_name(again) == run_name(cfg)


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["eps=8"], "toy_text-dp_bitfit-eps8-s0-"),
        (["eps=8.0"], "toy_text-dp_bitfit-eps8-s0-"),
        (["eps=0.5", "seed=12"], "toy_text-dp_bitfit-eps0.5-s12-"),
        (["eps=inf"], "toy_text-dp_bitfit-epsinf-s0-"),
        (["eps=null", "privacy.noise_multiplier=1.5"], "toy_text-dp_bitfit-sigma1.5-s0-"),
    ],
)
def test_name_of_a_run(overrides, start, run_config):
    cfg = run_config(*overrides)
    assert re.fullmatch(re.escape(start) + "[0-9a-f]{8}", run_name(cfg))
    assert run_name(cfg).endswith(run_id(cfg))


def test_name_is_a_plain_file_name_whatever_a_user_calls_a_task(run_config):
    cfg = run_config()
    with open_dict(cfg):
        cfg.choices.task = "mine/a=b, c"
    assert re.fullmatch(r"[\w.+-]+", run_name(cfg))


def test_infinite_epsilon_is_a_float(run_config):
    assert run_config("eps=inf").eps == math.inf
