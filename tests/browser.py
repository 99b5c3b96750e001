"""A headless Chromium, driven over the protocol of its own driver, so that no package is needed for it."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import urllib.request

ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]


class Browser:
    """One session of a running driver."""

    def __init__(self, port):
        self.address = f"http://127.0.0.1:{port}/session"
        options = {"binary": shutil.which("chromium"), "args": ARGUMENTS}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.session = self._send("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _send(self, method, path, content=None):
        data = None if content is None else json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def _command(self, path, **content):
        return self._send("POST", f"/{self.session}/{path}", content)

    def open(self, path, width, height, scheme):
        """Opens a file in a window of this size and colour scheme."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._command("goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=size)
        media = {"media": "", "features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self._command("goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params=media)
        self._command("url", url=path.resolve().as_uri())

    def print_media(self):
        """Shows the open page as it is printed."""
        self._command("goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params={"media": "print"})

    def run(self, script):
        """What a script on the page returns."""
        return self._command("execute/sync", script=script, args=[])

    def complaints(self):
        """What the console has said since the last call."""
        return [line["message"] for line in self._command("se/log", type="browser")]

    def picture(self, path):
        """Keeps a picture of the whole page, to be looked at."""
        params = {"captureBeyondViewport": True}
        shot = self._command("goog/cdp/execute", cmd="Page.captureScreenshot", params=params)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        """Ends the session and its Chromium."""
        self._send("DELETE", f"/{self.session}")


@contextlib.contextmanager
def browser():
    """A browser, and nothing left of it afterwards."""
    command = [shutil.which("chromedriver"), "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as driver:
        try:
            lines = iter(driver.stdout.readline, "")
            port = next(found[1] for line in lines if (found := re.search(r"successfully on port (\d+)", line)))
            session = Browser(port)
            with contextlib.closing(session):
                yield session
        finally:
            driver.terminate()
