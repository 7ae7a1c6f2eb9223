"""vLLM in a process of its own, from the environment that CLARA_VLLM names; `make test-slow` says how to make one."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

READY_SECONDS = 1200


@contextlib.contextmanager
def serve(environment: Path, folder: Path, *options: str, log: Path):
    """The address of vLLM's API while it serves a folder; it is ended afterwards with all of its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [environment / "bin" / "vllm", "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "2048", "--enforce-eager", *options]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    settings |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, **settings},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url, log)
        yield f"{url}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):  # its workers are of its session
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen, url: str, log: Path) -> None:
    for _ in range(READY_SECONDS):
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended with status {process.returncode}: {log.read_text()[-2000:]}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health"):
            return
        time.sleep(1)
    raise RuntimeError(f"vLLM was not ready after {READY_SECONDS} s: {log.read_text()[-2000:]}")


def demo_questions() -> tuple[list[dict], list[str]]:
    """The packaged passages and a question of each."""
    import modeling_clara.cli as cli

    lines = (Path(cli.__file__).parent / "demo_passages.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    documents = [{name: row[name] for name in ("id", "title", "text")} for row in rows]
    return documents, [row["questions"][0]["question"] for row in rows]
