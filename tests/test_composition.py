"""The contract of conf/: every yaml composes, every choice is read, and what overrides what."""

import math
from itertools import product

import pytest
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from privzoo.cli import explain
from privzoo.composition import build, compose, compose_sweep, conf_dir
from privzoo.config import validate
from privzoo.errors import UserError


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))


PAIRS = list(product(choices("task"), choices("method")))


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
def test_every_pair_composes_resolves_and_is_valid(task, method, run_config):
    for eps in ("8", "inf"):
        cfg = run_config(f"task={task}", f"method={method}", f"eps={eps}")
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
    assert set(choices("recipe")) <= {f"{task}_{method}" for task, method in PAIRS}


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


def test_build_finds_a_wrong_keyword_of_a_function_to_call_later():
    with pytest.raises(UserError, match="no argument 'denominatr'"):
        build(node(_target_="fractions.Fraction", _partial_=True, denominatr=1))
    inner = {"_target_": "fractions.Fraction", "_partial_": True, "oops": 1}
    with pytest.raises(UserError, match="no argument 'oops'"):
        build(node(_target_="privzoo.composition.compose", _partial_=True, overrides=inner))
    assert get_object("fractions.Fraction") is build(node(_target_="fractions.Fraction", _partial_=True)).func
