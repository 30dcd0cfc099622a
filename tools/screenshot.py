"""Pictures of a report as a browser shows it, and what the browser complained about.

    python -m tools.screenshot report.html docs/report.png --width 1240 --height 900
    python -m tools.screenshot report.html dark.png --dark --full
    python -m tools.screenshot report.html opened.png --click '.item.block' --to '#network'

The picture in the README, of `spa prune efficientnet-lite0.onnx -o small.onnx --threads 1 --report report.html`:

    python -m tools.screenshot report.html docs/report.png --height 1720 --colours 200 --script "
        document.querySelectorAll('#groups tbody tr').forEach((r, i) => i > 4 && r.remove());
        document.querySelector('.view').scrollTop = 130;
        document.querySelectorAll('.item.node')[7].dispatchEvent(new MouseEvent('click', {bubbles: true}))"

Needs Chromium (`apt install chromium`); it is driven through a pipe, as its own tools do, so nothing else is needed.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-extensions",
         "--disable-background-networking", "--remote-debugging-pipe", "--force-color-profile=srgb")


def browser() -> str | None:
    """The path of a Chromium, None where there is none."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


class Page:
    """One page of a browser, and what it complained about since it was opened."""

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int) -> None:
        self.process, self.write, self.read = process, write, read
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._events: list[str] = []
        self._number, self._session, self._rest = 0, "", b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the browser's protocol, and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **({"sessionId": self._session} if self._session else {})}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']['message']}")
                result: dict[str, Any] = found["result"]
                return result

    def _next(self) -> dict[str, Any]:
        """The next message; events are noted."""
        while b"\0" not in self._rest:
            piece = os.read(self.read, 1 << 20)
            if not piece:
                raise RuntimeError("the browser has ended")
            self._rest += piece
        text, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(text)
        event, told = found.get("method", ""), found.get("params", {})
        self._events.append(event)
        if event == "Runtime.exceptionThrown":
            self.complaints.append(told["exceptionDetails"].get("exception", {}).get("description") or told["exceptionDetails"]["text"])
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(str([a.get("value") for a in told["args"]]))
        elif event == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        return found

    def show(self, file: Path, *, width: int = 1240, height: int = 900, dark: bool = False, scale: float = 1.0) -> None:
        """Opens a file and waits until it is there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self._events.clear()
        self.call("Page.navigate", url=file.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._next()

    def run(self, script: str) -> Any:
        """What a script gives on the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", "the script failed"))
        return found["result"].get("value")

    def picture(self, *, full: bool = False) -> bytes:
        """What is seen, or the page in full length, as PNG."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full, **self._clip(full))["data"])

    def _clip(self, full: bool) -> dict[str, Any]:
        if not full:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}


@contextmanager
def page(program: str) -> Iterator[Page]:
    """A page of a new headless browser, which ends with the block."""
    to_browser, write = os.pipe()
    read, from_browser = os.pipe()

    def descriptors() -> None:  # the browser reads from 3 and writes to 4; ours may themselves be 3 or 4
        spare = os.dup(from_browser), os.dup(to_browser)
        os.dup2(spare[1], 3)
        os.dup2(spare[0], 4)

    with tempfile.TemporaryDirectory(prefix="spa-browser-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen([program, *FLAGS, f"--user-data-dir={folder}", "about:blank"], close_fds=False, preexec_fn=descriptors,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        try:
            yield Page(process, write, read)
        finally:
            os.close(write)
            process.terminate()
            process.wait(20)
            os.close(read)


def compressed(png: bytes, colours: int) -> bytes:
    """The picture with a palette of so many colours, which is a third of the size."""
    from PIL import Image

    file = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def main() -> int:
    """Takes one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1240)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--full", action="store_true", help="the whole length of the page")
    parser.add_argument("--click", action="append", default=[], metavar="SELECTOR", help="clicked before; repeatable")
    parser.add_argument("--to", metavar="SELECTOR", help="scrolled into sight before")
    parser.add_argument("--script", help="run before the picture is taken")
    parser.add_argument("--colours", type=int, default=0, help="of a palette, for a small file (needs pillow)")
    given = parser.parse_args()
    program = browser()
    if program is None:
        print("there is no Chromium; `apt install chromium` brings one", file=sys.stderr)
        return 2
    with page(program) as shown:
        shown.show(given.report, width=given.width, height=given.height, dark=given.dark, scale=given.scale)
        for selector in given.click:
            shown.run(f"document.querySelector({json.dumps(selector)}).dispatchEvent(new MouseEvent('click', {{bubbles: true}}))")
        if given.script:
            shown.run(given.script)
        if given.to:
            shown.run(f"document.querySelector({json.dumps(given.to)}).scrollIntoView({{behavior: 'instant'}})")
        picture = shown.picture(full=given.full)
        complaints = shown.complaints
    given.picture.write_bytes(compressed(picture, given.colours) if given.colours else picture)
    for line in complaints:
        print(line, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
