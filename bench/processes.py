"""Starting and ending what takes part, and reading what it uses."""
import glob
import os
import re
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path

PROXY_CORE, LOAD_CORE = "0", "1"


def start(argv, core, env=None, **options):
    def prepare():
        os.sched_setaffinity(0, {int(core)})
        # As many descriptors as there may be: thousands of connections are held.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **options}
    return subprocess.Popen([str(part) for part in argv], env={**os.environ, **(env or {})}, start_new_session=True,
                            preexec_fn=prepare, **options)


def stop(processes):
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    for process in processes:
        process.wait()


def on_load_core(argv):
    """What a load generator that ends by itself says."""
    done = subprocess.run(["taskset", "-c", LOAD_CORE, *map(str, argv)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{argv[0]} failed: {done.stdout[-500:]} {done.stderr[-500:]}")
    return done.stdout


def wait_until_free(port, limit=15):
    end = time.time() + limit
    while time.time() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            time.sleep(0.01)
        except OSError:
            return
    raise RuntimeError(f"something still listens on port {port} after {limit} s")


def wait_for(port, limit=15):
    end = time.time() + limit
    while time.time() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return
        except OSError:
            time.sleep(0.01)
    raise RuntimeError(f"nothing listens on port {port} after {limit} s")


def family(pid):
    """A process and all that it started: a contender may have a supervisor."""
    children = [child for path in glob.glob(f"/proc/{pid}/task/*/children") for child in Path(path).read_text().split()]
    return [pid, *(member for child in children for member in family(int(child)))]


def cpu_seconds(pid):
    """On-CPU time of all threads of all its processes, in the scheduler's nanoseconds rather than in ticks."""
    total = 0
    for path in (path for member in family(pid) for path in glob.glob(f"/proc/{member}/task/*/schedstat")):
        try:
            total += int(Path(path).read_text().split()[0])
        except OSError:
            pass
    return total / 1e9


def resident_kb(pid):
    """Resident memory of each of its processes, the started one first."""
    return [sum(memory.values()) for memory in map(memory_kb, family(pid))]


def resident_mb(pid):
    return [round(size / 1024, 1) for size in resident_kb(pid)]


def together_mb(pid):
    """Resident memory of all its processes, what they share of files counted once."""
    parts = list(map(memory_kb, family(pid)))
    own = sum(memory["Anon"] + memory["Shmem"] for memory in parts)
    return round((own + max(memory["File"] for memory in parts)) / 1024, 1)


def memory_kb(pid):
    return {kind: int(size) for kind, size in re.findall(r"Rss(Anon|File|Shmem):\s+(\d+)", Path(f"/proc/{pid}/status").read_text())}


def descriptors(pid):
    """Open files and sockets of all its processes."""
    return sum(len(os.listdir(f"/proc/{member}/fd")) for member in family(pid))
