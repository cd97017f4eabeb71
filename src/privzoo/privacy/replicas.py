"""The Trainer's side of several processes with whole copies of a model."""

import os
from typing import Any

from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from privzoo.privacy.ranks import Ranks


class Replicas(DDPStrategy):
    """DDP without torch's wrapper, which would average gradients in the backward pass, unclipped as they are there.

    What is added up are clipped sums, once a release, by `Ranks.add_up`; nothing else is exchanged. Someone else starts the
    processes, and they have joined one another by `join_ranks` before.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"cluster_environment": TorchElasticEnvironment(), **options})

    def configure_ddp(self) -> None:
        """Leave the module as it is."""


def over_ranks(ranks: Ranks) -> dict[str, Any]:
    """The Trainer's arguments for these processes, of which LOCAL_WORLD_SIZE (or all) are on this machine."""
    if ranks.count == 1:
        return {"devices": 1}
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count))
    return {"devices": here, "num_nodes": ranks.count // here, "strategy": Replicas()}
