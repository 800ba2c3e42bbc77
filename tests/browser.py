"""A page in headless Chromium, told what to do over a pipe by the DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe", "--mute-audio")


class Browser:
    """One tab.

    Attributes:
        errors: what its console and its scripts complained of.
        requested: addresses that were asked for.
    """

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._rest, self._number = read, write, b"", 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.requested: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command's answer; what happened before it came is noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError("the browser is gone")
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(text)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        method, told = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(told["exceptionDetails"])[:600])
        elif method == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(told["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requested.append(told["request"]["url"])

    def size(self, width: int, height: int = 900, dark: bool = False) -> None:
        """The window's size in pixels, and whether the system is dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a file; returns when it is loaded."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=path.as_uri() + fragment)
        self.until("document.readyState === 'complete' && location.protocol === 'file:'")

    def run(self, script: str) -> Any:
        """The value of an expression, awaited; a script's error is one here."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:600])
        return answer["result"].get("value")

    def until(self, condition: str, seconds: float = 120) -> None:
        """Wait for a condition, looked at in every frame of the page."""
        wait = (
            "new Promise((done, fail) => { const end = performance.now() + %d; const look = () => (%s) ? done() : "
            "performance.now() > end ? fail(new Error('waited in vain')) : setTimeout(look, 20); look(); })"
        )
        for attempt in range(3):
            try:
                self.run(wait % (1000 * seconds, condition))
                return
            except RuntimeError as error:  # the page that was asked has gone for another
                if "waited in vain" in str(error) or attempt == 2:
                    raise RuntimeError(f"waited in vain for {condition}") from error

    def point(self, script: str, click: bool = True) -> None:
        """Move the mouse to the middle of an element, given by an expression, and click there."""
        box = f"const e = {script}; e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
        x, y = self.run(f"(() => {{ {box} return [r.x + r.width / 2, r.y + r.height / 2]; }})()")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, key: str, code: int) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, path: Path, whole: bool = False) -> None:
        """A screenshot: PNG, of what is in sight or of the whole page."""
        told = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(told["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A running Chromium with a profile of its own in a folder."""
    assert CHROMIUM is not None
    (orders, own_write), (own_read, answers) = os.pipe(), os.pipe()
    # The protocol's pipes are the descriptors 3 and 4.
    words = ["bash", "-c", f'exec "$@" 3<&{orders} 4>&{answers}', "-", CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
    null = subprocess.DEVNULL
    # A browser that is told to end leaves its socket there; a longer path would be too long for one.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        environment = os.environ | {"TMPDIR": temporary}
        process = subprocess.Popen(
            words, pass_fds=(orders, answers), stdin=null, stdout=null, stderr=null, env=environment
        )
        os.close(orders)
        os.close(answers)
        try:
            yield Browser(own_read, own_write)
        finally:
            os.close(own_write)
            os.close(own_read)
            process.terminate()
            process.wait(timeout=120)
