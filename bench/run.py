#!/usr/bin/env python3
"""Measures the CPU time that a request costs in the proxies on its path, Sheer beside its peers, in one run.

The proxies run on core 0; load generator, backend and control plane on core 1; everything on loopback. The figure is the
CPU time of all proxies on the path (user and system) divided by the requests; requests per second and latency stand
beside it. Contenders take turns within each round, and medians with their range are reported, so that a noisy machine
hurts all alike. Only ratios mean anything elsewhere.

usage: run.py [--cases h1,h1-mesh,h2,h2-mesh,tcp,tcp-mesh] [--contenders sheer,envoy,haproxy,nginx,forwarder,direct]
              [--rounds 3] [--seconds 4] [--write]
ENVOY names the Envoy binary, SHEER the sheer binary; a contender that is missing is left out and said so.
"""
import argparse
import glob
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import contenders
import sheer
from contenders import FRONT, TOOLS, Case

CASES = {"h1": Case("h1", False), "h1-mesh": Case("h1", True), "h2": Case("h2", False), "h2-mesh": Case("h2", True),
         "tcp": Case("tcp", False), "tcp-mesh": Case("tcp", True)}
CONTENDERS = {"sheer": sheer.contender, "envoy": contenders.envoy, "haproxy": contenders.haproxy,
              "nginx": contenders.nginx, "forwarder": contenders.forwarder, "direct": contenders.direct}
PROXY_CORE, LOAD_CORE = "0", "1"
# What Sheer's CPU per request may be, in the other's.
GOALS = {"h1": {"haproxy": 1.0}, "h1-mesh": {"haproxy": 0.85, "envoy": 0.25}, "h2": {"haproxy": 1.4},
         "h2-mesh": {"haproxy": 1.0, "envoy": 0.18}, "tcp": {"envoy": 0.8}, "tcp-mesh": {"envoy": 1.0}}
IDLE = 2  # seconds that a contender is left alone before its memory is read
HEADERS = ["User-Agent: bench/1.0", "Accept: application/json", "Accept-Encoding: gzip",
           "X-Request-Id: 5b8a3c1e-9d7f-4e6a-8b2c-0f1e2d3c4b5a",
           "Authorization: Bearer abcdefghijklmnopqrstuvwxyz0123456789"]


def start(argv, core, env=None):
    return subprocess.Popen(["taskset", "-c", core, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env={**os.environ, **(env or {})}, start_new_session=True)


def stop(processes):
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    for process in processes:
        process.wait()


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


def resident_mb(pid):
    """Resident memory of each of its processes, the started one first."""
    sizes = (Path(f"/proc/{member}/status").read_text() for member in family(pid))
    return [round(int(re.search(r"VmRSS:\s+(\d+)", size).group(1)) / 1024, 1) for size in sizes]


def micros(text):
    number, unit = re.match(r"([\d.]+)(us|ms|s|m)", text).groups()
    return float(number) * {"us": 1, "ms": 1e3, "s": 1e6, "m": 6e7}[unit]


def load_h1(port, seconds, work):
    headers = [part for header in HEADERS for part in ("-H", header)]
    output = on_load_core(["wrk", "-t1", "-c64", f"-d{seconds}s", "--latency", *headers, f"http://127.0.0.1:{port}/"])
    errors = re.search(r"Non-2xx or 3xx responses: (\d+)", output)
    if "Socket errors" in output or errors:
        raise RuntimeError(f"failed requests:\n{output}")
    return {"requests": int(re.search(r"(\d+) requests in", output).group(1)),
            "rps": float(re.search(r"Requests/sec:\s+([\d.]+)", output).group(1)),
            "p50_us": micros(re.search(r"\n\s+50%\s+(\S+)", output).group(1)),
            "p99_us": micros(re.search(r"\n\s+99%\s+(\S+)", output).group(1))}


def load_h2(port, seconds, work):
    body = contenders.write(work, "body", "x" * 64)
    output = on_load_core(["h2load", "-t1", "-c8", "-m32", "-D", str(seconds), "-d", body,
                           "-H", "content-type: application/grpc", "-H", "te: trailers", "-H", "user-agent: bench/1.0",
                           f"http://127.0.0.1:{port}/echo.Echo/Unary"])
    good = int(re.search(r"status codes: (\d+) 2xx, 0 3xx, 0 4xx, 0 5xx", output).group(1))
    mean = re.search(r"time for request:\s+\S+\s+\S+\s+(\S+)", output).group(1)
    return {"requests": good, "rps": float(re.search(r", ([\d.]+) req/s", output).group(1)), "mean_us": micros(mean)}


def load_tcp(port, seconds, work):
    """A request is a mebibyte here."""
    output = on_load_core([str(TOOLS / "bytes"), "load", str(port), str(seconds)])
    mebibytes = int(output.split()[0]) / 2**20
    return {"requests": mebibytes, "rps": mebibytes / seconds}


LOADS = {"h1": load_h1, "h2": load_h2, "tcp": load_tcp}


def on_load_core(argv):
    return subprocess.run(["taskset", "-c", LOAD_CORE, *argv], capture_output=True, text=True, check=True).stdout


def measure(case, contender, seconds, work):
    """One contender in one case; None when it does not take part."""
    plan = CONTENDERS[contender](case, work)
    if plan is None:
        return None
    backend = {"h1": ["http1-backend"], "h2": ["http2-backend"], "tcp": ["bytes", "serve"]}[case.protocol]
    running = [start([str(TOOLS / backend[0]), *backend[1:], str(case.backend)], LOAD_CORE)]
    try:
        wait_for(case.backend)
        measured = []
        # The last hop first, so that each finds what it dials.
        for process in reversed(plan):
            running.append(start(process.argv, PROXY_CORE if process.measured else LOAD_CORE, process.env))
            if process.measured:
                measured.append(running[-1].pid)
            wait_for(process.port)
        time.sleep(IDLE if measured else 0)
        idle = [resident_mb(pid) for pid in measured]
        if contender == "sheer":
            sheer.ready(case, work)
        port = FRONT if plan else case.backend
        load = LOADS[case.protocol]
        load(port, 1, work)
        before = [cpu_seconds(pid) for pid in measured]
        result = load(port, seconds, work)
        spent = sum(cpu_seconds(pid) - start for pid, start in zip(measured, before))
        result["cpu_us"] = spent * 1e6 / result["requests"] if measured else None
        result["idle_mb"], result["loaded_mb"] = idle, [resident_mb(pid) for pid in measured]
        return result
    finally:
        stop(running)


def processes(sizes):
    """The processes of each hop: `a + b + c; a + b + c`."""
    return "; ".join(" + ".join(map(str, hop)) for hop in sizes) or "-"


def table(case, results):
    unit = ("MiB", "MiB/s") if case.startswith("tcp") else ("request", "requests/s")
    rows = [f"### {case}", "", f"| contender | CPU us/{unit[0]} | range | {unit[1]} | latency us | MB resident idle | MB after load |",
            "|---|---|---|---|---|---|---|"]
    for contender, rounds in results.items():
        costs = [it["cpu_us"] for it in rounds if it["cpu_us"]]
        cost = f"{statistics.median(costs):.1f}" if costs else "-"
        spread = f"{min(costs):.1f}-{max(costs):.1f}" if costs else "-"
        rps = f"{statistics.median(it['rps'] for it in rounds):.0f}"
        names = {"p50_us": "p50", "mean_us": "mean"}
        latency = "".join(f"{name} {statistics.median(it[key] for it in rounds):.0f}" for key, name in names.items() if key in rounds[0])
        if "p99_us" in rounds[0]:
            latency += f", p99 {statistics.median(it['p99_us'] for it in rounds):.0f}"
        rows.append(f"| {contender} | {cost} | {spread} | {rps} | {latency} | "
                    f"{processes(rounds[-1]['idle_mb'])} | {processes(rounds[-1]['loaded_mb'])} |")
    if results.get("sheer"):
        own = statistics.median(it["cpu_us"] for it in results["sheer"])
        ratios = []
        for contender, rounds in results.items():
            if contender == "sheer" or not rounds[0]["cpu_us"]:
                continue
            goal = GOALS.get(case, {}).get(contender)
            ratio = own / statistics.median(it["cpu_us"] for it in rounds)
            ratios.append(f"{ratio:.2f}x {contender}" + (f" (goal: at most {goal:.2f}x)" if goal else ""))
        rows += ["", f"Sheer's CPU per {unit[0]}: " + ", ".join(ratios) + "."]
    return "\n".join(rows) + "\n"


def versions():
    def first(argv):
        try:
            done = subprocess.run(argv, capture_output=True, text=True)
            return (done.stdout + done.stderr).strip().splitlines()[0].split("version: ")[-1]
        except (OSError, IndexError):
            return "not installed"
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return [f"- machine: {model.group(1) if model else platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
            f"- sheer: {first([sheer.BINARY, '--version'])}", f"- envoy: {first([os.environ.get('ENVOY', 'envoy'), '--version'])}",
            f"- haproxy: {first(['haproxy', '-v'])}", f"- nginx: {first(['nginx', '-v'])}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--write", action="store_true", help="put the result into bench/RESULTS.md")
    arguments = parser.parse_args()
    names, text = arguments.contenders.split(","), []
    with tempfile.TemporaryDirectory() as work:
        for name in arguments.cases.split(","):
            results = {}
            for turn in range(arguments.rounds):
                for contender in names:
                    result = measure(CASES[name], contender, arguments.seconds, work)
                    if result is None:
                        continue
                    results.setdefault(contender, []).append(result)
                    print(f"{name} round {turn + 1}/{arguments.rounds} {contender}: {json.dumps(result)}", file=sys.stderr, flush=True)
            text.append(table(name, results))
            print(text[-1], flush=True)
    if arguments.write:
        head = ["# Results", "", "Written by `make bench`; see `bench/README.md` for what is measured and how.", "",
                f"{time.strftime('%Y-%m-%d', time.gmtime())}, {arguments.rounds} rounds of {arguments.seconds} s, medians.", "", *versions(), "", ""]
        Path(__file__).with_name("RESULTS.md").write_text("\n".join(head) + "\n".join(text))


if __name__ == "__main__":
    main()
