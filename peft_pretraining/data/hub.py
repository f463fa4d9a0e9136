"""The Hugging Face hub: whether it can be reached is found out once, in seconds, before anything is loaded from it.

Its clients try again for a minute where there is no network. What is in the cache is then used at once, and what is not
is refused at once, as with HF_HUB_OFFLINE=1. Nothing here imports the clients.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import urllib.error
import urllib.request

log = logging.getLogger("peft_pretraining")

ENDPOINT = "https://huggingface.co"
_PATIENCE = 6.0
"""Seconds for the hub's first answer, name resolution included."""
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE = ("1", "ON", "YES", "TRUE")


def is_offline() -> bool:
    """Whether the environment says that the hub is not to be asked."""
    return any(os.environ.get(name, "").upper() in _TRUE for name in _OFFLINE[::2])


def work_offline_if_unreachable(patience: float = _PATIENCE) -> bool:
    """Ask the hub once, and work from its cache alone if it does not answer. Returns whether it is to be asked.

    An answer of any kind will do. Proxies and HF_ENDPOINT are those of the environment.
    """
    if is_offline():
        return False
    reason: list[str] = []

    def ask() -> None:
        endpoint = os.environ.get("HF_ENDPOINT") or ENDPOINT
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=patience).close()
        except urllib.error.HTTPError as error:
            reason.append(f"HTTP {error.code}" if error.code in (407, 502, 503, 504) else "")
        except Exception as error:  # sockets, TLS, name resolution, a bad address: each has exceptions of its own
            reason.append(" ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__)
        else:
            reason.append("")

    # A thread, for name resolution knows no limit of time; it must not keep the process from ending.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience + 1)
    why = reason[0] if reason else f"no answer for {patience:g} seconds"
    if not why:
        return True
    log.warning("the Hugging Face hub cannot be reached (%s): only what is in its cache is used", why)
    _work_offline()
    return False


def _work_offline() -> None:
    """For clients that are still to be imported, and for those that are already."""
    os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    for module, names in (("huggingface_hub.constants", ("HF_HUB_OFFLINE",)), ("datasets.config", _OFFLINE[:2])):
        if module in sys.modules:
            for name in names:
                if hasattr(sys.modules[module], name):
                    setattr(sys.modules[module], name, True)
