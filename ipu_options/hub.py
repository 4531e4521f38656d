"""Whether the Hugging Face hub can be reached, found out in seconds and before it is needed."""
from __future__ import annotations

import os
import socket
import sys
import threading
from urllib.parse import urlsplit

_SECONDS = 3.0
_OFF = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def offline_unless_reachable(needed: bool = True) -> None:
    """Have the Hugging Face libraries use only what is cached if the hub does not answer.

    needed: whether anything may have to be fetched or sent; if not, nothing is tried.

    They would try again and again for half a minute. Must run before they are imported, since they
    read their environment once. Where a variable of theirs says what to do, it stands.
    """
    if not needed or any(os.environ.get(name) for name in _OFF):
        return
    found = []
    search = threading.Thread(target=lambda: found.append(_connects()), daemon=True)
    search.start()  # a name server that does not answer takes longer than any time limit
    search.join(_SECONDS)
    if not any(found):
        os.environ.update(dict.fromkeys(_OFF, "1"))
        print(f"note: {_endpoint()} does not answer; only what is cached can be used",
              file=sys.stderr)


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _connects() -> bool:
    """Return whether a connection to the hub, or to the proxy on the way to it, can be made."""
    kind = urlsplit(_endpoint()).scheme
    proxy = next((os.environ[name] for name in (f"{kind}_proxy", f"{kind}_proxy".upper(),
                                                "all_proxy", "ALL_PROXY") if os.environ.get(name)),
                 None)
    goal = urlsplit(proxy if proxy and "://" in proxy else f"http://{proxy}" if proxy
                    else _endpoint())
    try:
        port = goal.port or (443 if goal.scheme == "https" else 80)
        socket.create_connection((goal.hostname, port), _SECONDS).close()
        return True
    except (OSError, ValueError):
        return False
