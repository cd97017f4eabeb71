"""privzoo: fine-tuning of pretrained models under differential privacy.

Every name is imported from the module that defines it; this package re-exports nothing, so that
importing one part (a plan, a table) does not pull in torch.
"""

__version__ = "0.1.0"
