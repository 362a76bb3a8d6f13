"""Sends what a run tells of to a URL, without ever keeping the run waiting."""

from __future__ import annotations

import json
import logging
import queue
import threading
import urllib.request
from typing import Any

log = logging.getLogger(__name__)

# Seconds for one message, and for those that are left at the end of a run.
_PATIENCE = 10.0


class Webhook:
    """Messages go out one after another, from a thread. One that does not arrive is logged, and not sent again."""

    def __init__(self, url: str):
        self._url = url
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send_all, name="webhook", daemon=True)
        self._thread.start()

    def send(self, message: dict[str, Any]) -> None:
        """Send a JSON object."""
        self._messages.put(message)

    def close(self) -> None:
        """Wait until everything is sent, for some seconds at most."""
        self._messages.put(None)
        self._thread.join(_PATIENCE)

    def _send_all(self) -> None:
        while (message := self._messages.get()) is not None:
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(self._url, json.dumps(message).encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=_PATIENCE):
                    pass
            # The address may be a secret: neither it nor what the library says of it is logged.
            except (OSError, ValueError) as error:
                log.warning("a message to the webhook of alerts did not arrive (%s)", type(error).__name__)
