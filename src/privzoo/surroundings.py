"""The machine and the libraries that a run finds itself on."""

import logging
import os
import warnings

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from omegaconf import DictConfig
from transformers.utils import logging as transformers_logging

from privzoo.errors import UserError, first_line


def device_of(cfg: DictConfig) -> torch.device:
    """Where this process (of several the one with this LOCAL_RANK) computes.

    Raises:
        UserError: if the accelerator is not to be had, or has too few devices.
    """
    try:
        probe = Trainer(
            accelerator=cfg.trainer.accelerator, devices=1, logger=False, enable_checkpointing=False,
            plugins=[LightningEnvironment()],
        )  # fmt: skip
    except MisconfigurationException as error:
        raise UserError(
            f"trainer.accelerator={cfg.trainer.accelerator} is not to be had here ({first_line(error)}): take auto or cpu."
        ) from None
    device = probe.strategy.root_device
    if device.type != "cuda":
        return device
    place = int(os.environ.get("LOCAL_RANK", 0))
    if place >= torch.cuda.device_count():
        raise UserError(
            f"Expected a GPU for each of trainer.devices={cfg.trainer.devices}, found {torch.cuda.device_count()}: lower it."
        )
    return torch.device("cuda", place)


def quiet_libraries() -> None:
    """Our own lines tell what matters; these would tell a user of a private run to change what must not change."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing(_enable)?` is deprecated")  # peft asks for it
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # and sets what GPT-2 needs
    warnings.filterwarnings("ignore", message="Adapter .* LoRA tensor.* have invalid shape")  # of the biases of BiTFiT-Add
    warnings.filterwarnings("ignore", message="`lora_bias=True` was passed")
    warnings.filterwarnings("ignore", message="`torch.distributed.all_gather_into_tensor` is deprecated")  # DeepSpeed's
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
