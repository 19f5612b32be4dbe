"""A headless Chromium, driven through a pipe: the DevTools protocol, one JSON message after another."""

import json
import os
import shutil
import subprocess

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """`with Browser(profile) as browser: browser.open(path); browser.run("document.title")`.

    profile: an empty folder. errors: what pages wrote to the console as a warning or an error, refusals of the
    content-security policy and exceptions among it.
    """

    def __init__(self, profile):
        self.errors, self._number = [], 0
        (there, self._out), (self._in, back) = os.pipe(), os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            # it reads from 3 and writes to 4
            ["bash", "-c", f'exec 3<&{there} 4>&{back}; exec "$@"', "_", CHROMIUM, *options, "--remote-debugging-pipe"],
            pass_fds=(there, back),
            stderr=subprocess.DEVNULL,
        )
        os.close(there)
        os.close(back)
        self._answers = os.fdopen(self._in, "rb")
        target = self._send("Target.createTarget", {"url": "about:blank"}, None)["targetId"]
        self._session = self._send("Target.attachToTarget", {"targetId": target, "flatten": True}, None)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        return self._send(method, parameters, self._session)

    def _send(self, method, parameters, session):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self):
        data = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            data += byte
        event = json.loads(data)
        said = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(said["exceptionDetails"]["text"])
        if event.get("method") == "Log.entryAdded" and said["entry"]["level"] in ("warning", "error"):
            self.errors.append(said["entry"]["text"])
        if event.get("method") == "Runtime.consoleAPICalled" and said["type"] in ("warning", "error"):
            self.errors.append(str(said["args"]))
        return event

    def open(self, path):
        self.send("Page.navigate", url=path.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def run(self, script):
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def look(self, width, dark=False, media=""):
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", media=media, features=features)
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )

    def screenshot(self):
        """PNG, base64, of the whole page."""
        return self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait()
        os.close(self._out)
        self._answers.close()
