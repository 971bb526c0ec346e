"""A real Chromium without a window, told what to do by its DevTools protocol over two pipes."""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["Browser", "Tab", "open_browser"]

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
    "--hide-scrollbars", "--force-color-profile=srgb", "--window-size=1280,900",
)  # fmt: skip


class Browser:
    """One process of Chromium.

    Args:
        to_chromium: its descriptor 3, to write to.
        from_chromium: its descriptor 4, to read from.
    """

    def __init__(self, to_chromium: int, from_chromium: int) -> None:
        self._to, self._from = to_chromium, from_chromium
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def call(
        self, method: str, session: str | None = None, timeout_s: float = 150.0, **params: Any
    ) -> dict[str, Any]:
        """Sends a command and waits for its answer; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        body = json.dumps(message).encode() + b"\0"
        while body:
            body = body[os.write(self._to, body) :]
        deadline = time.monotonic() + timeout_s
        while True:
            answer = self._read(deadline)
            if answer.get("id") != self._number:
                self.events.append(answer)
                continue
            assert "error" not in answer, f"{method}: {answer['error']}"
            result: dict[str, Any] = answer["result"]
            return result

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "Chromium does not answer"
            read = os.read(self._from, 1 << 20)
            assert read, "Chromium has ended"
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def open(self, page: Path, *, hash_: str = "", dark: bool = False) -> "Tab":
        """A tab with a file in it, once its script has drawn it."""
        return Tab(self, page, hash_, dark=dark)


class Tab:
    """A page.

    Args:
        browser: that shows it.
        page: the file.
        hash_: of its address.
        dark: what the reader's system prefers.
    """

    def __init__(self, browser: Browser, page: Path, hash_: str, *, dark: bool) -> None:
        self._browser = browser
        self._target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        begun = time.monotonic()
        self.call("Page.navigate", url=f"{page.absolute().as_uri()}{hash_}")
        self.wait_for("document.documentElement?.dataset.ready === 'true'")
        # The first picture, with everything in it.
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.shown_s = time.monotonic() - begun

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command for this page."""
        return self._browser.call(method, self._session, **params)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page, promises awaited."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait_for(self, condition: str, timeout_s: float = 150.0) -> None:
        """Polls; AssertionError when it takes too long."""
        deadline = time.monotonic() + timeout_s
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, f"{condition} does not come; {self.complaints()}"
            time.sleep(0.01)

    def click(self, selector: str) -> None:
        """Clicks the first element of a selector."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def move(self, x: float, y: float) -> None:
        """Moves the mouse, as a reader does."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def texts(self, selector: str) -> list[str]:
        """What all elements of a selector say."""
        found: list[str] = self.evaluate(
            f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)"
        )
        return found

    def screenshot(self, path: Path, *, height: int = 900, width: int = 1280) -> None:
        """The top of the page as a PNG."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """The tab is gone."""
        self._browser.call("Target.closeTarget", targetId=self._target)

    def complaints(self) -> list[str]:
        """What the page wrote to the console, its errors, and all that it asked the network for."""
        self.evaluate("0")
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            params = event["params"]
            if event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                found.append(json.dumps(params)[:500])
            elif event["method"] == "Network.requestWillBeSent" and not params["request"]["url"].startswith("file:"):
                found.append(f"asked for {params['request']['url']}")
        return found


@contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """Starts Chromium with a profile of its own, and ends it with all its processes.

    Args:
        folder: for the profile; empty.
    """
    program = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    assert program is not None, "there is no Chromium: run tests/report/setup.sh"
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    # Descriptors 3 and 4 are those that Chromium reads and writes; which numbers the pipes have here is by chance.
    shell = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    process = subprocess.Popen(
        ["bash", "-c", shell, program, *_FLAGS, f"--user-data-dir={folder}", "about:blank"],
        pass_fds=(theirs_in, theirs_out),
        env={**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(ours_out, ours_in)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours_out)
        os.close(ours_in)
