"""Nodes of a Ray cluster on loopback addresses, each a session of processes that can be killed like a machine."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
READY_SECONDS = 300


class RayCluster:
    """`with RayCluster(folder) as cluster: ...`; `environment` is what a driver needs to reach it.

    `nodes[0]` is the head. Ray listens on all interfaces, so that a token protects it.
    """

    def __init__(self, folder: Path, n_nodes: int = 2, n_cpus: int = 2):
        self.folder, self.n_nodes, self.n_cpus, self.nodes = folder, n_nodes, n_cpus, []
        self.sessions = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a path of sockets must be short
        self.port = 20_000 + secrets.randbelow(10_000)
        self.environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep),
            "RAY_ADDRESS": f"127.0.0.2:{self.port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_raylet_start_wait_time_s": str(READY_SECONDS),
            "RAY_health_check_timeout_ms": "60000",  # tests may be slow; a killed process is noticed at once
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "300",
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
            "RAY_worker_niceness": "0",  # 15 otherwise: on a busy machine they would wait for all others
        }

    def __enter__(self):
        try:
            for number in range(self.n_nodes):
                self._start(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for node in reversed(self.nodes):
            self.kill(node)
        shutil.rmtree(self.sessions, ignore_errors=True)

    def kill(self, node: subprocess.Popen) -> None:
        """End all processes of a node at once, as when its machine is lost."""
        for pid in [node.pid, *self.processes(node)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()

    def processes(self, node: subprocess.Popen, name: str = "") -> list[int]:
        """Ids of the processes of a node whose command line has a name, as Ray writes it there."""
        listed = subprocess.run(["ps", "-wweo", "pid,sid,args"], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 2) for line in listed.splitlines()[1:]]  # Ray's workers have groups of their own
        return [int(pid) for pid, session, command in rows if int(session) == node.pid and name in command]

    def _start(self, number: int) -> None:
        log = self.folder / f"node-{number}.log"
        place = ["--head", f"--port={self.port}", "--include-dashboard=false", f"--temp-dir={self.sessions}"]
        if number:
            place = [f"--address={self.environment['RAY_ADDRESS']}"]
        options = [f"--node-ip-address=127.0.0.{number + 2}", f"--num-cpus={self.n_cpus}", "--memory=8000000000"]
        options += ["--object-store-memory=100000000", "--disable-usage-stats", "--block"]
        command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", *place, *options]
        environment = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}
        with open(log, "wb") as output:
            node = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.nodes.append(node)
        for _ in range(2 * READY_SECONDS):
            if "Ray runtime started" in log.read_text(errors="replace"):
                return
            if node.poll() is not None:
                break
            time.sleep(0.5)
        raise RuntimeError(f"node {number} did not start: {log.read_text(errors='replace')[-2000:]}")
