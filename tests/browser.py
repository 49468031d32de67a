"""A headless Chromium, driven by the DevTools protocol over a pipe: messages are JSON, each with a zero byte at its end."""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any, Self

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
OPTIONS = (
    "--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-gpu-rasterization", "--in-process-gpu",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--no-zygote", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
SECONDS = 60  # without a message, after which the browser is given up


class Browser:
    """One tab. `errors` has what went wrong in it since they were last read: failed and foreign requests, and errors of scripts."""

    def __init__(self, profile: Path) -> None:
        (reads, self._to), (self._from, writes) = ([_above_4(end) for end in os.pipe()] for _ in range(2))
        pipes = [(os.POSIX_SPAWN_DUP2, reads, 3), (os.POSIX_SPAWN_DUP2, writes, 4), (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
        command = [str(PROGRAM), *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        self._process = os.posix_spawn(command[0], command, os.environ, file_actions=pipes)
        os.close(reads)
        os.close(writes)
        self._count, self._session, self._rest, self._requests = 0, dict[str, str](), b"", dict[str, str]()
        self._loaded, self.errors = set[str](), list[str]()
        (tab,) = (each for each in self("Target.getTargets")["targetInfos"] if each["type"] == "page")
        self._session = {"sessionId": self("Target.attachToTarget", targetId=tab["targetId"], flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self(f"{domain}.enable")
        self("Page.setLifecycleEventsEnabled", enabled=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self._process, signal.SIGTERM)
        os.waitpid(self._process, 0)
        os.close(self._to)
        os.close(self._from)

    def __call__(self, method: str, **params: object) -> dict[str, Any]:
        """The answer to a command."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params} | self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def open(self, url: str, width: int) -> None:
        """Load a page, and wait until all that it loads is there."""
        self.resize(width)
        loader = self("Page.navigate", url=url)["loaderId"]
        while loader not in self._loaded:
            self._read()

    def resize(self, width: int) -> None:
        """Have the tab the width of a screen, in pixels: up to 600 a phone's."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width <= 600)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 10) -> Any:
        """The value of an expression once it is true, or when the time is over."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)) and time.monotonic() < end:
            time.sleep(0.02)
        return value

    def picture(self, path: Path) -> None:
        """Write what the tab shows, as PNG."""
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png", optimizeForSpeed=True)["data"]))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], SECONDS)
            if not ready or not (more := os.read(self._from, 1 << 20)):
                raise RuntimeError("the browser ended" if ready else f"the browser did not answer in {SECONDS} seconds")
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event: str | None, params: dict[str, Any]) -> None:
        match event:
            case "Page.lifecycleEvent" if params["name"] == "load":
                self._loaded.add(params["loaderId"])
            case "Network.requestWillBeSent":
                url = self._requests[params["requestId"]] = params["request"]["url"]
                if not url.startswith(("http://127.0.0.1:", "data:", "blob:")):
                    self.errors.append(f"another host is asked for {url}")
            case "Network.responseReceived" if params["response"]["status"] >= 400:
                self.errors.append(f"status {params['response']['status']} for {params['response']['url']}")
            case "Network.loadingFailed" if not params.get("canceled"):
                self.errors.append(f"{params['errorText']} for {self._requests.get(params['requestId'])}")
            case "Runtime.exceptionThrown":
                self.errors.append(f"exception: {params['exceptionDetails']}")
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
                self.errors.append(f"console: {params['args']}")
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.errors.append(f"log: {params['entry']['text']} {params['entry'].get('url', '')}")


def _above_4(end: int) -> int:
    """The same end of a pipe under another number: 3 and 4 are the browser's."""
    copy = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 5)
    os.close(end)
    return copy
