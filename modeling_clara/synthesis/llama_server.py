"""llama.cpp's server as a backend: started with a GGUF file, and stopped at the end.
It goes when this process goes, however that ends.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import weakref
from pathlib import Path

from .backends import Endpoint

# Runs a command until it ends or this process closes its standard input, be it by SIGKILL.
GUARD = """
import subprocess, sys, threading
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
threading.Thread(target=lambda: (sys.stdin.read(), server.kill()), daemon=True).start()
sys.exit(server.wait())
"""


class LlamaServer(Endpoint):
    """`llama-server` with a GGUF file on a free loopback port, which ends with this process at the latest.

    Further options of the server are set by its environment variables, such as LLAMA_ARG_THREADS.

    Args:
        path: the GGUF file.
        slots: requests at a time.
        context: tokens of prompt and answer of each of them.
        start_seconds: how long it may take to load.
    """

    def __init__(self, path: str | Path, slots: int = 4, context: int = 4096, start_seconds: float = 300.0):
        binary = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
        if binary is None:
            raise FileNotFoundError(
                "llama-server must be on the PATH to serve a GGUF file, found none. Install llama.cpp, or set "
                "LLAMA_SERVER to the binary."
            )
        if not Path(path).is_file():
            raise FileNotFoundError(f"`model` must be a GGUF file, got {path}, which is not there. Pass its path.")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [binary, "--model", str(path), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--parallel", str(slots), "--ctx-size", str(slots * context)]
        self.log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-c", GUARD, *command],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,  # Ctrl-C is for this process; the server goes after it
        )
        self.stop = weakref.finalize(self, _stop, self.process)
        try:
            self._wait(f"http://127.0.0.1:{port}/health", start_seconds)
        except BaseException:
            self.stop()
            raise
        super().__init__(f"http://127.0.0.1:{port}/v1", "LLAMA_API_KEY")

    def _wait(self, url: str, seconds: float) -> None:
        """Returns when the model is loaded."""
        opener, end = urllib.request.build_opener(urllib.request.ProxyHandler({})), time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                with opener.open(url, timeout=5):
                    return
            except OSError:  # not yet listening, or 503 while it loads
                time.sleep(0.1)
        self.log.seek(0)
        last = self.log.read().decode(errors="replace").strip()[-500:]
        what = f"did not load within {seconds:.0f} s" if self.process.poll() is None else "ended"
        raise RuntimeError(f"llama-server {what}; its last words: {last!r}. Try the file with llama-server by hand.")

    async def close(self) -> None:
        await super().close()
        self.stop()


def _stop(process: subprocess.Popen) -> None:
    process.stdin.close()
    process.wait()
