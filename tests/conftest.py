"""Shared fixtures. The environment is set before any Hugging Face library is imported, which read it once."""

import os
import socket
import tempfile


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


HUB_PORT = _free_port()  # the Hub server of tests/hub/server.py listens here, one per pytest worker
os.environ.update(
    HF_ENDPOINT=f"http://127.0.0.1:{HUB_PORT}",
    HF_HOME=tempfile.mkdtemp(prefix="hf_home_"),
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_TOKEN="hf_test",
    TOKENIZERS_PARALLELISM="false",
)
