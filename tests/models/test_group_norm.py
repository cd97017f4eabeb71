"""A ResNet with group norms in the place of batch norms: only on request, and then no image sees another."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import dynamic_module_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from privzoo.errors import UserError
from privzoo.models import loading
from privzoo.models.loading import load
from privzoo.privacy.clipping import BookKeeping, Loop

TINY = Path(loading.__file__).parent / "tiny" / "tiny_vit"
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> str:
    """A folder as ResNet-18's on the hub, but small: random weights, scales that are not 1, three labels."""
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias)
    model.save_pretrained(folder)
    shutil.copy(TINY / "preprocessor_config.json", folder)
    return str(folder)


def replaced(path: str, num_labels: int = 3):
    return load(path, "image_classification", num_labels, replace_batchnorm=True)


def test_batch_norms_are_refused(resnet: str) -> None:
    with pytest.raises(UserError, match=r"batch norms.*set model\.replace_batchnorm=true"):
        load(resnet, "image_classification", 3)


def test_only_resnets_can_have_them_replaced() -> None:
    with pytest.raises(UserError, match=r"is for ResNets, but 'tiny_vit' is of type 'vit'"):
        load("tiny_vit", "image_classification", 4, replace_batchnorm=True)


def test_scales_and_shifts_are_kept_and_statistics_are_not(resnet: str) -> None:
    loaded = replaced(resnet)
    before = transformers.ResNetForImageClassification.from_pretrained(resnet)
    assert {n: p.shape for n, p in loaded.model.named_parameters()} == {n: p.shape for n, p in before.named_parameters()}
    for (name, found), expected in zip(loaded.model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert not list(loaded.model.buffers())
    assert loaded.new_head == ()
    groups = {m.num_groups for m in loaded.model.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {8, 4}, "of 8 channels, and of 12"


def test_an_image_alone_and_among_others(resnet: str) -> None:
    model = replaced(resnet).model.double().train()
    together = model(pixel_values=IMAGES.double()).logits
    alone = torch.cat([model(pixel_values=image[None].double()).logits for image in IMAGES])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


def test_in_half_precision(resnet: str) -> None:
    loaded = load(resnet, "image_classification", 3, dtype="bfloat16", replace_batchnorm=True)
    whole = replaced(resnet).model(pixel_values=IMAGES).logits
    torch.testing.assert_close(loaded.model(pixel_values=IMAGES).logits.float(), whole, rtol=0.1, atol=0.1)


def test_its_clipped_sums_are_those_of_the_definition(resnet: str) -> None:
    model = replaced(resnet).model.double()

    def losses(rows=slice(None)):
        return model(pixel_values=IMAGES[rows].double()).logits.square().sum(1)

    clip_norm = float(Loop(model)(losses, float("inf")).norms.mean())
    found, expected = BookKeeping(model)(losses, clip_norm), Loop(model)(losses, clip_norm)
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-9, atol=1e-12)


def test_transformers_loads_it_without_privzoo(resnet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would come back as a ResNet with batch norms and their untrained statistics needs leave to run its own code."""
    model = replaced(resnet).model
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, model.config.model_type)
    monkeypatch.delitem(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING._extra_content, type(model.config))
    with pytest.raises(ValueError, match="custom code"):
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "model", trust_remote_code=False)
    found = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert type(found).__module__.startswith("transformers_modules.")
    lines = Path(inspect.getfile(type(found))).read_text().splitlines()
    assert "privzoo" not in [line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))]
    with torch.no_grad():
        assert torch.equal(found.eval()(pixel_values=IMAGES).logits, model(pixel_values=IMAGES).logits)


@pytest.mark.parametrize(
    "method",
    ["dp_full", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("dp_head", "dp_bitfit", "dp_lora", "dpzero"))],
)
def test_end_to_end(method: str, resnet: str, privzoo, tmp_path: Path) -> None:
    """Three releases, and the saved model scores as it did."""
    targets = ["method.adapter.targets=[convolution]", "method.merge=true"] if method == "dp_lora" else []
    code, output = privzoo(
        *targets, "task=toy_images", f"method={method}", "model=resnet18", f"model.path={resnet}",
        "model.replace_batchnorm=true", "eps=8", "batch_size=64", "epochs=0.048", "microbatch_size=64",
        "trainer.accelerator=cpu", f"output_dir={tmp_path}",
    )  # fmt: skip
    assert code == 0, output
    (run,) = tmp_path.iterdir()
    record = json.loads((run / "result.json").read_text())
    assert (record["state"], record["steps"]) == ("finished", 3)
    code, output = privzoo(f"run={run}", module="privzoo.evaluate")
    assert code == 0, output
    row = next(line for line in output.splitlines() if "accuracy" in line)
    now, before = (float(cell) for cell in row.strip("│ ").split("│")[1:])
    assert now == before == pytest.approx(record["metric/accuracy"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["method=dp_lora"], "method.merge=False to be true beside model.replace_batchnorm=true"),
        (["method=dp_bitfit", "method.add_bias=true"], "method.add_bias=True to be false"),
    ],
)
def test_an_adapter_alone_would_be_put_on_batch_norms(argv, words, resnet: str, privzoo, tmp_path: Path) -> None:
    code, output = privzoo(
        *argv, "task=toy_images", "model=resnet18", f"model.path={resnet}", "model.replace_batchnorm=true", "eps=8",
        f"output_dir={tmp_path}",
    )  # fmt: skip
    assert code == 2
    assert words in output


def test_without_the_request_a_run_ends_before_it_begins(resnet: str, privzoo, tmp_path: Path) -> None:
    code, output = privzoo("task=toy_images", "model=resnet18", f"model.path={resnet}", "eps=8", f"output_dir={tmp_path}")
    assert code == 2
    assert "model.replace_batchnorm=true" in output
    assert not list(tmp_path.iterdir())
