"""privzoo: fine-tuning of pretrained models under differential privacy.

`privzoo.finetune` is the command line in Python. Every other name is imported from the module that defines it; this package
re-exports nothing else, so that importing one part (a plan, a table) does not pull in torch.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "finetune":
        from privzoo.notebook import finetune

        return finetune
    raise AttributeError(f"module 'privzoo' has no attribute {name!r}")
