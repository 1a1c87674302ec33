"""The endpoint in its own process, with HTTP requests to it; for tests and benchmarks."""

import gzip
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import mlflow
import orjson
import requests

from scgpt_batch.io.rows import PAYLOAD_COLUMNS

COMMAND = Path(sys.executable).with_name("scgpt-batch")


class EndpointProcess:
    """`scgpt-batch serve` on a free port of 127.0.0.1; killed at the end of the context if it still runs."""

    def __init__(self, model_uri: str, folder: Path, *flags: str, token: str = "", path: str = "") -> None:
        """Start it; its Python processes search `path`, a folder, for modules first."""
        self.table, self.log = folder / "payload", folder / "serve.log"
        environment = os.environ | {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(), "OMP_NUM_THREADS": "1"}
        environment |= {"SCGPT_BATCH_TOKEN": token} if token else {}
        if path:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
        command = [COMMAND, "serve", "--model-uri", model_uri, "--port", "0"]
        command += ["--inference-table", f"delta.`{self.table}`", "--flush-seconds", "0.2", *flags]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        self.session = requests.Session()
        if token:
            self.session.headers["Authorization"] = f"Bearer {token}"
        self.url = self._wait_until_up()

    def _wait_until_up(self, seconds: float = 600) -> str:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and self.process.poll() is None:
            said = re.search(r"at (http://\S+)/invocations", self.log.read_text())
            if said:
                requests.get(said[1] + "/ping", timeout=seconds).raise_for_status()
                return said[1]
            time.sleep(0.1)
        raise RuntimeError(f"the endpoint did not start:\n{self.log.read_text()}")

    def post(self, body: Any, *, packed: bool = False, **headers: str) -> requests.Response:
        """POST to /invocations: bytes unchanged, anything else as JSON."""
        content = body if isinstance(body, bytes) else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        sent = {"Content-Type": "application/json"} | ({"Content-Encoding": "gzip"} if packed else {}) | headers
        content = gzip.compress(content, 1) if packed else content
        return self.session.post(f"{self.url}/invocations", data=content, headers=sent, timeout=60)

    def metric(self, name: str) -> float:
        """Return a value of /metrics, by its name with labels."""
        text = self.session.get(f"{self.url}/metrics", timeout=10).text
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])

    def stop(self) -> tuple[int, str]:
        """Ask it to stop; its exit code and what it printed."""
        self.process.send_signal(signal.SIGTERM)
        printed, _ = self.process.communicate(timeout=60)
        return self.process.returncode, printed

    def kill(self) -> None:
        """End it without a chance to do anything."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
        self.process.stdout.close()


def wait_until(condition: Callable[[], Any], seconds: float = 300) -> None:
    """Return once the condition holds; fail when it does not within a time that no machine needs."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, f"not within {seconds:g} s"
        time.sleep(0.01)


def payload(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that a row gives, as they are sent."""
    return {name: row[name] for name in PAYLOAD_COLUMNS if row[name] is not None}
