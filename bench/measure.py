"""What is measured: functions of a case, a contender, the seconds and a working directory.

Each returns its figures by who they are of, and nothing when the contender does not take part.
"""
import os
import socket
import subprocess
import time
from contextlib import contextmanager
from functools import partial

import contenders
import loads
import sheer
from contenders import FRONT, MIDDLE, TOOLS, Case
from processes import (LOAD_CORE, PROXY_CORE, cpu_seconds, resident_kb, resident_mb, start, stop, together_mb, wait_for,
                       wait_until_free)

COUNTING = os.environ.get("COUNTING", "")
CONTENDERS = {"sheer": sheer.contender, "envoy": contenders.envoy, "haproxy": contenders.haproxy,
              "nginx": contenders.nginx, "forwarder": contenders.forwarder, "direct": contenders.direct,
              "sheer-counting": partial(sheer.contender, binary=COUNTING)}
IDLE = 2  # seconds that a contender is left alone before its memory is read
RATE = 5000
HELD = {False: 5000, True: 2000}  # connections that are held, with mutual TLS fewer
STARTS = 5
GROUP, GROUP_OF_SHEER = "x25519", "x25519mlkem768"


@contextmanager
def running(case, contender, work, plan=None):
    """Backend and contender; gives the processes that are measured, those nearest the client first."""
    plan = CONTENDERS[contender](case, work) if plan is None else plan
    program, *arguments = contenders.BACKEND_PROGRAMS[case.protocol]
    everything, measured = [start([TOOLS / program, *arguments, case.backend], LOAD_CORE)], []
    try:
        wait_for(case.backend)
        # The last hop first, so that each finds what it dials.
        for process in reversed(plan):
            everything.append(start(process.argv, PROXY_CORE if process.measured else LOAD_CORE, process.env))
            if process.measured:
                measured.insert(0, everything[-1].pid)
            wait_for(process.port)
        yield measured
    finally:
        stop(everything)
        # A supervisor goes before its proxy, and what comes next must not be taken for ready by the old one's port.
        for port in (case.backend, *(process.port for process in plan)):
            wait_until_free(port)


def spent(pids):
    return sum(map(cpu_seconds, pids))


def takes_part(case, contender, work):
    return CONTENDERS[contender](case, work) is not None


def cost(case, contender, seconds, work, turn):
    """CPU time of a request, flat out."""
    if not takes_part(case, contender, work):
        return {}
    with running(case, contender, work) as pids:
        # Once is enough: it is hardly different the next time.
        time.sleep(IDLE if pids and turn == 0 else 0)
        idle, together = [resident_mb(pid) for pid in pids], [together_mb(pid) for pid in pids]
        if contender == "sheer":
            sheer.ready(case)
        port, load = FRONT if pids else case.backend, loads.FLAT_OUT[case.protocol]
        load(port, 1, work)
        before = spent(pids)
        result = load(port, seconds, work)
        result["cpu_us"] = (spent(pids) - before) * 1e6 / result["requests"] if pids else None
        return {contender: {**result, "idle_mb": idle, "together_mb": together, "loaded_mb": [resident_mb(pid) for pid in pids]}}


def paced(case, contender, seconds, work, turn):
    """Latency at a fixed rate."""
    case = Case("h1", False) if contender == "direct" else case
    if not takes_part(case, contender, work):
        return {}
    with running(case, contender, work) as pids:
        if contender == "sheer":
            sheer.ready(case)
        port = FRONT if pids else case.backend
        loads.paced(port, 1, RATE)
        before = spent(pids)
        result = loads.paced(port, seconds, RATE)
        return {contender: {**result, "cpu_us": (spent(pids) - before) * 1e6 / result["requests"] if pids else None}}


def peer(contender, plan, case, work, group=GROUP):
    """As what a client connects to the last hop of a mesh path, once it is served."""
    if contender == "sheer":
        shown = sheer.peer(plan, case, work, group)
    else:
        home = contenders.make_certificates(work)
        shown = [group, "http/1.1", "mesh.local", home / "leaf.pem", home / "leaf.key"]
    end = time.time() + 15
    while subprocess.run([TOOLS / "idle", str(MIDDLE), "1", *map(str, shown)], stdin=subprocess.DEVNULL, capture_output=True).returncode:
        if time.time() > end:
            raise RuntimeError(f"{contender} serves no peer")
        time.sleep(0.05)
    return shown


def handshake(case, contender, seconds, work, turn, kind):
    """CPU time of a connection with mutual TLS and one request, on the side that is connected to."""
    plan = CONTENDERS[contender](case, work)
    if not plan:
        return {}
    results = {}
    with running(case, contender, work, plan[1:]) as pids:
        shown = peer(contender, plan, case, work)
        also = {f"sheer with {GROUP_OF_SHEER}, its default": GROUP_OF_SHEER} if contender == "sheer" else {}
        for label, group in {contender: GROUP, **also}.items():
            shown[0] = group
            loads.handshakes(MIDDLE, 1, kind, shown)
            before = spent(pids)
            result = loads.handshakes(MIDDLE, seconds, kind, shown)
            results[label] = {**result, "cpu_us": (spent(pids) - before) * 1e6 / result["requests"]}
    return results


def held(case, contender, seconds, work, turn):
    """Memory of a connection on which one request was made and none is."""
    plan = CONTENDERS[contender](case, work)
    if not plan:
        return {}
    with running(case, contender, work, plan[1:] if case.mesh else plan) as pids:
        if case.mesh:
            port, shown = MIDDLE, peer(contender, plan, case, work)
            loads.handshakes(port, 1, "full", shown)
        else:
            port, shown = FRONT, []
            if contender == "sheer":
                sheer.ready(case)
            loads.FLAT_OUT["h1"](port, 1, work)
        time.sleep(IDLE)
        before, count = sum(sum(resident_kb(pid)) for pid in pids), HELD[case.mesh]
        holder = start([TOOLS / "idle", port, count, *shown], LOAD_CORE, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            if holder.stdout.readline() != b"open\n":
                raise RuntimeError(f"{contender} does not hold {count} connections")
            time.sleep(IDLE)
            after = sum(sum(resident_kb(pid)) for pid in pids)
        finally:
            stop([holder])
        return {contender: {"kb": (after - before) / count, "before_mb": before / 1024, "after_mb": after / 1024, "connections": count}}


def first_answer(port, limit=15):
    """Asks until there is a good answer."""
    end, got = time.time() + limit, b""
    while time.time() < end:
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as stream:
                stream.settimeout(2)
                stream.sendall(b"GET / HTTP/1.1\r\nhost: bench\r\n\r\n")
                got = stream.recv(4096)
                if got.startswith(b"HTTP/1.1 200"):
                    return
        except OSError as error:
            got = repr(error).encode()
        time.sleep(0.0002)
    raise RuntimeError(f"no good answer after {limit} s, but {got[:300]!r}")


def from_start(case, contender, seconds, work, turn):
    """From the start of the process to the first good answer; what it keeps on disk is there, and so is what it calls."""
    plan = CONTENDERS[contender](case, work)
    if not plan:
        return {}
    beside, proxy, times = [process for process in plan if not process.measured], plan[0], []
    with running(case, contender, work, beside):
        # The first start is another matter: there is no certificate yet.
        for _ in range(STARTS + 1):
            begin = time.perf_counter()
            process = start(proxy.argv, PROXY_CORE, proxy.env)
            try:
                first_answer(proxy.port)
                times.append((time.perf_counter() - begin) * 1000)
            finally:
                stop([process])
            wait_until_free(proxy.port)
    return {contender: {"times_ms": times[1:]}}


def allocations(case, contender, seconds, work, turn):
    """How often a request asks for memory, and for how much, in each hop; by a build that counts."""
    if contender != "sheer" or not COUNTING or turn > 0:
        return {}
    results = {}
    for name, path in {"h1": Case("h1", False), "h1-mesh": Case("h1", True), "h2": Case("h2", False), "h2-mesh": Case("h2", True)}.items():
        hops = ["client", "bench"] if path.mesh else ["client"]
        with running(path, "sheer-counting", work):
            sheer.ready(path)
            load = loads.FLAT_OUT[path.protocol]
            load(FRONT, 1, work)
            before = [sheer.counters(hop) for hop in hops]
            requests = load(FRONT, seconds, work)["requests"]
            after = [sheer.counters(hop) for hop in hops]
            each = lambda what: [(late[what] - early[what]) / requests for early, late in zip(before, after)]
            results[name] = {"times": each("sheer_allocations_total"), "bytes": each("sheer_allocated_bytes_total")}
    return results
