"""Asks the Hugging Face hub one question, before a library asks it again and again for half a minute."""

import threading
from typing import Literal

from privzoo.errors import first_line

TIMEOUT_S = 8.0


def why_not_to_be_had(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """None if the hub answers for this repository, else the reason in a few words, after at most TIMEOUT_S seconds.

    The question is put from a thread, because the look-up of a host name knows no time limit.
    """
    reason: list[str | None] = [f"timeout: no answer within {TIMEOUT_S:.0f} s"]

    def ask() -> None:
        reason[0] = _asked(name, kind)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    return reason[0]


def _asked(name: str, kind: str) -> str | None:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set"
        HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT_S)
    except GatedRepoError:
        return "it is gated: accept its terms there and log in with `hf auth login`"
    except RepositoryNotFoundError:
        return f"no such {kind}, or a private one"
    except Exception as error:  # the hub's client changes its HTTP library, and with it the type, between versions
        return f"{type(error).__name__}: {first_line(error)}"
    return None
