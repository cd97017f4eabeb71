"""The contract of conf/: every yaml composes, every choice is read, and what overrides what."""

import math
import re
from itertools import product

import pytest
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from privzoo.cli import explain
from privzoo.composition import build, compose, compose_sweep, conf_dir
from privzoo.config import epochs_of_phases, plan_arguments, validate
from privzoo.errors import UserError
from privzoo.privacy.plan import PrivacyPlan


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))


PAIRS = [
    pytest.param(task, method, marks=() if task == "sst2" else pytest.mark.sweep)
    for task, method in product(choices("task"), choices("method"))
]


def targets(content: object) -> list[tuple[str, set[str]]]:
    """All (target, keywords) of a resolved configuration, nested ones too."""
    found = []
    if isinstance(content, dict):
        if "_target_" in content:
            found.append((content["_target_"], {key for key in content if not key.startswith("_")}))
        for value in content.values():
            found += targets(value)
    return found


@pytest.mark.parametrize(("task", "method"), PAIRS)
def test_every_pair_composes_resolves_and_is_valid(task, method, run_config, tmp_path):
    (tmp_path / "own.jsonl").touch()
    own = [f"data.path={tmp_path}/own.jsonl"] if task == "jsonl" else []
    for eps in ("8", "inf"):
        cfg = run_config(f"task={task}", f"method={method}", f"eps={eps}", *own)
        OmegaConf.resolve(cfg)
        validate(cfg)
        assert (cfg.choices.task, cfg.choices.method) == (task, method)
        assert cfg.choices.model in choices("model")


@pytest.mark.parametrize("group", ["model", "privacy", "trainer", "logger"])
def test_every_choice_of_the_other_groups_composes(group, run_config):
    assert choices(group)
    for name in choices(group):
        validate(run_config(f"{group}={name}"))


def test_every_recipe_belongs_to_a_pair():
    """A recipe whose name fits no pair would never be read, without a word."""
    assert set(choices("recipe")) <= {f"{task}_{method}" for task, method in product(choices("task"), choices("method"))}


@pytest.mark.parametrize("group", ["task", "method", "model"])
def test_every_target_exists_and_takes_its_keywords(group):
    for name in choices(group):
        node = OmegaConf.to_container(compose([f"{group}={name}"])[group], resolve=True)
        assert isinstance(node, dict)
        for key in [key for key in node if key.startswith("default_") or key == "num_examples"]:
            del node[key]
        assert targets(node), f"{group} {name} names no _target_"
        for target, keywords in targets(node):
            build(OmegaConf.create({"_target_": target, "_partial_": True, **dict.fromkeys(keywords)}))


def test_recipe_beats_default_and_the_command_line_beats_the_recipe():
    assert compose(["task=sst2", "method=dp_full"]).batch_size == 1000
    assert compose(["task=sst2", "method=dp_full", "batch_size=7", "lr=0.125"]).batch_size == 7
    assert compose(["lr=0.125", "task=sst2", "method=dp_full"]).lr == 0.125


def test_non_private_twin_has_its_own_published_rate():
    rates = {
        (method, eps): compose(["task=sst2", f"method={method}", f"eps={eps}"]).lr
        for method in ("dp_full", "dp_bitfit")
        for eps in ("8", "inf")
    }
    assert rates[("dp_full", "inf")] != rates[("dp_full", "8")]
    assert compose(["eps=inf"]).eps == math.inf


def test_default_model_is_the_tasks_and_an_explicit_one_wins():
    assert compose(["task=sst2"]).choices.model == "minilm"
    assert compose(["task=sst2", "model=tiny_encoder"]).choices.model == "tiny_encoder"
    assert compose(["task=sst2", "model.path=/somewhere"]).model.path == "/somewhere"


def test_a_users_folder_adds_tasks_that_inherit(tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text("defaults: [sst2, _self_]\nname: mine\n")
    (tmp_path / "task" / "both.yaml").write_text("default_model: {default: minilm, dp_full: tiny_encoder}\nname: both\n")
    (tmp_path / "task" / "none.yaml").write_text("name: none\n")
    mine = compose(["task=mine"], config_dir=str(tmp_path))
    assert (mine.task.name, mine.task.num_labels, mine.choices.model) == ("mine", 2, "minilm")
    assert compose(["task=both", "method=dp_full"], config_dir=str(tmp_path)).choices.model == "tiny_encoder"
    assert compose(["task=both", "method=dp_bitfit"], config_dir=str(tmp_path)).choices.model == "minilm"
    assert compose(["task=none", "model=minilm"], config_dir=str(tmp_path)).choices.model == "minilm"
    with pytest.raises(HydraException) as caught:
        compose(["task=none"], config_dir=str(tmp_path))
    assert explain(caught.value) == (2, "Task 'none' has no default_model: add the key to its yaml, or give model=.")


def test_dp_qlora_takes_mistral_and_the_published_settings(run_config):
    """SST-2 of dp-transformers' table: model, quantisation, rank, batch, rate and clip norm, and those of the twin."""
    cfg = run_config("task=sst2", "method=dp_qlora", "eps=8")
    assert (cfg.choices.model, cfg.model.path) == ("mistral_7b", "mistralai/Mistral-7B-v0.1")
    assert (cfg.model.quantization, cfg.model.dtype) == ("nf4", "float32")  # all but the linear layers, as peft prepares it
    assert (cfg.method.adapter.tuner.r, cfg.method.adapter.tuner.lora_alpha, cfg.method.adapter.targets) == (4, 32, None)
    assert run_config("task=sst2", "method=dp_lora", "model=mistral_7b").model.dtype == "bfloat16"
    assert (cfg.batch_size, cfg.lr, cfg.clip_norm, cfg.delta, cfg.method.schedule) == (1024, 3e-4, 1.0, 1e-5, "constant")
    assert cfg.method.optimizer.weight_decay == 0.01
    twin = run_config("task=sst2", "method=dp_qlora", "eps=inf")
    assert (twin.batch_size, twin.lr) == (32, 2.5e-5)
    chosen = run_config("task=sst2", "method=dp_qlora", "eps=8", "model=minilm", "lr=1e-3")
    assert (chosen.choices.model, chosen.lr, chosen.model.quantization) == ("minilm", 1e-3, "nf4")


def test_dp_qlora_on_squad_takes_mistral_and_the_published_settings(run_config):
    cfg = run_config("task=squad", "method=dp_qlora", "eps=8")
    assert (cfg.choices.model, cfg.model.path) == ("mistral_7b", "mistralai/Mistral-7B-v0.1")
    assert (cfg.model.quantization, cfg.model.dtype) == ("nf4", "float32")
    assert (cfg.method.adapter.tuner.r, cfg.method.adapter.tuner.lora_alpha, cfg.method.adapter.targets) == (4, 32, None)
    assert (cfg.epochs, cfg.lr, cfg.clip_norm, cfg.delta, cfg.method.schedule) == (10, 3e-4, 1.0, 1e-5, "constant")
    assert (cfg.method.optimizer.weight_decay, cfg.seed) == (0.01, 0)
    assert run_config("task=squad", "method=dp_qlora", "eps=inf").epochs == 3
    assert run_config("task=squad", "method=dp_lora").model.path == "openai-community/gpt2"


def test_a_users_task_without_recipe_takes_the_methods_rate(tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text("defaults: [sst2, _self_]\nname: mine\n")
    cfg = compose(["task=mine", "method=dp_bitfit", "eps=inf"], config_dir=str(tmp_path))
    assert cfg.lr == compose(["method=dp_bitfit", "eps=inf"]).method.default_lr
    assert cfg.batch_size == 256


def test_several_loggers_at_once():
    assert set(compose(["logger=[wandb,tensorboard]"]).logger) == {"private", "wandb", "tensorboard"}
    assert set(compose(["logger=wandb"]).logger) == {"private", "wandb"}
    assert compose(["logger=[wandb,mlflow]", "logger.private=true"]).logger.private is True


def test_sweep_is_the_product_in_order():
    runs = compose_sweep(["method=dp_full,dp_bitfit", "eps=1,inf", "seed=3"])
    assert [(cfg.choices.method, cfg.eps, cfg.seed) for cfg in runs] == [
        ("dp_full", 1, 3),
        ("dp_full", math.inf, 3),
        ("dp_bitfit", 1, 3),
        ("dp_bitfit", math.inf, 3),
    ]


def test_sweep_of_tasks_takes_each_ones_recipe_and_model():
    runs = compose_sweep(["task=sst2,toy_text"])
    assert [cfg.choices.model for cfg in runs] == ["minilm", "tiny_encoder"]
    assert runs[0].batch_size == 1000 != runs[1].batch_size


def test_a_grid_file_is_a_sweep(tmp_path):
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "small.yaml").write_text(
        '# @package _global_\nhydra: {sweeper: {params: {eps: "1,2", seed: "0,1"}}}\n'
    )
    runs = compose_sweep(["+grid=small", "seed=5"], config_dir=str(tmp_path))
    assert [(cfg.eps, cfg.seed) for cfg in runs] == [(1, 5), (2, 5)]
    for cfg in runs:
        validate(cfg)


def test_composing_leaves_a_running_hydra_alone():
    from hydra.core.global_hydra import GlobalHydra

    assert not GlobalHydra.instance().is_initialized()
    compose()
    assert not GlobalHydra.instance().is_initialized()


def test_empty_data_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("PRIVZOO_DATA", "")
    assert compose().data_root is None
    monkeypatch.setenv("PRIVZOO_DATA", "/data")
    assert compose().data_root == "/data"


def node(**content: object) -> DictConfig:
    return OmegaConf.create(content)


def test_build_leaves_out_what_the_configuration_alone_reads():
    made = build(node(_target_="fractions.Fraction", numerator=3, default_model="x", num_examples=5), denominator=4)
    assert str(made) == "3/4"


def test_what_is_built_holds_plain_lists(run_config):
    """peft saves the names of its targets as JSON, after the last release."""
    cfg = run_config("task=toy_text", "method=dp_lora", "method.adapter.targets=[query,key]")
    adapter = build(cfg.method).keywords["adapter"]
    assert type(adapter.keywords["targets"]) is list
    assert adapter.keywords["targets"] == ["query", "key"]


def test_build_finds_a_wrong_keyword_of_a_function_to_call_later():
    with pytest.raises(UserError, match="no argument 'denominatr'"):
        build(node(_target_="fractions.Fraction", _partial_=True, denominatr=1))
    inner = {"_target_": "fractions.Fraction", "_partial_": True, "oops": 1}
    with pytest.raises(UserError, match="no argument 'oops'"):
        build(node(_target_="privzoo.composition.compose", _partial_=True, overrides=inner))
    assert get_object("fractions.Fraction") is build(node(_target_="fractions.Fraction", _partial_=True)).func


def test_phases_must_come_to_the_epochs(run_config):
    two = "method=dp_bitfit_two_phase"
    assert [p.epochs for p in (run_config(two, "epochs=3").method.phases[0],)] == [1]
    assert epochs_of_phases(run_config(two, "epochs=3")) == [1, 2.0]
    assert epochs_of_phases(run_config(two, "epochs=1.3")) == [1, 0.3]
    wrong = {
        "epochs=1": "found 1, open",
        "method.phases=[{epochs: 1},{epochs: 1}]": "epochs=3 in all, found 1, 1",
        "method.phases=[{trainable: all},{trainable: biases}]": "found open, open",
        "method.phases=[{epochs: 1, rate: 2},{trainable: biases}]": "Unknown key 'rate' in method.phases[0]",
        "method.phases=[{epochs: 1, lr: 0},{}]": "method.phases[0].lr=0 to be a number > 0",
        "method.phases=two": "to be a list of phases",
    }
    for override, message in wrong.items():
        with pytest.raises(UserError, match=re.escape(message)):
            validate(run_config(two, "epochs=3", override))


def test_the_plan_of_phases(run_config):
    """Each phase has its batch, epochs and clip norm; the rest is the run's."""
    phases = "method.phases=[{epochs: 1, trainable: all, clip_norm: 1.0, batch_size: 100},{trainable: biases}]"
    arguments = plan_arguments(
        run_config("method=dp_bitfit_two_phase", phases, "epochs=3", "batch_size=200", "clip_norm=0.5"), 1000
    )
    plan = PrivacyPlan(**arguments)
    assert [(p.batch_size, p.epochs, p.clip_norm) for p in plan.phases] == [(100, 1, 1.0), (200, 2.0, 0.5)]
    assert plan.steps == 10 + 10
    assert [plan.at(r).index for r in (0, 9, 10, 19)] == [0, 9, 0, 9]
    assert len({phase.noise_multiplier for phase in plan.phases}) == 1
