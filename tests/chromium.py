"""A page in headless Chromium, for tests: what it asks for, what it says of itself, how it looks.

Spoken to by the browser's own protocol over two pipes, so that nothing needs to be installed beside a browser.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.runs import PATIENCE

_NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in _NAMES if (found := shutil.which(name))), None)
WITHOUT_BROWSER = f"needs a browser: install one of {', '.join(_NAMES)}"


class Tab:
    """One tab of a running browser."""

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from = os.fdopen(to_browser, "wb"), os.fdopen(from_browser, "rb")
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        message |= {} if self._session is None else {"sessionId": self._session}
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while (answer := self._read()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._from.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        return json.loads(text)

    def open(self, page: Path, width: int, is_phone: bool) -> None:
        """Load a file in a window of `width` CSS pixels, and wait for all that it asks for."""
        self.events.clear()
        size = {"width": width, "height": 900, "deviceScaleFactor": 2 if is_phone else 1, "mobile": is_phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def says(self, expression: str) -> Any:
        """What JavaScript in the page says."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def requests(self) -> list[str]:
        """The addresses that the page has asked for, pictures inside of it left out."""
        urls = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def opened_tab(profile: Path) -> Iterator[Tab]:
    """A tab of a browser with an empty `profile` folder; both are gone afterwards."""
    assert BROWSER is not None
    # The browser reads its file 3 and writes to its file 4.
    (their_input, to_browser), (from_browser, their_output) = os.pipe(), os.pipe()
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}")
    started = f'exec 3<&{their_input} 4>&{their_output}; exec "$@"'
    browser = subprocess.Popen(
        ["bash", "-c", started, "bash", BROWSER, *options],
        pass_fds=(their_input, their_output),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_input), os.close(their_output)
    try:
        tab = Tab(to_browser, from_browser)
        yield tab
        tab._session = None
        tab.call("Browser.close")
    finally:
        try:
            browser.wait(timeout=PATIENCE / 90)
        except subprocess.TimeoutExpired:
            browser.kill()
            browser.wait()
