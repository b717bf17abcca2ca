"""The load generators: what each is told, and what of its answer counts."""
import json
import re

import contenders
from contenders import TOOLS
from processes import on_load_core

HEADERS = ["User-Agent: bench/1.0", "Accept: application/json", "Accept-Encoding: gzip",
           "X-Request-Id: 5b8a3c1e-9d7f-4e6a-8b2c-0f1e2d3c4b5a",
           "Authorization: Bearer abcdefghijklmnopqrstuvwxyz0123456789"]


def http1(port, seconds, work):
    headers = [part for header in HEADERS for part in ("-H", header)]
    output = on_load_core(["wrk", "-t1", "-c64", f"-d{seconds}s", "--latency", *headers, f"http://127.0.0.1:{port}/"])
    errors = re.search(r"Non-2xx or 3xx responses: (\d+)", output)
    if "Socket errors" in output or errors:
        raise RuntimeError(f"failed requests:\n{output}")
    return {"requests": int(re.search(r"(\d+) requests in", output).group(1)),
            "rps": float(re.search(r"Requests/sec:\s+([\d.]+)", output).group(1)),
            "p50_us": micros(re.search(r"\n\s+50%\s+(\S+)", output).group(1)),
            "p99_us": micros(re.search(r"\n\s+99%\s+(\S+)", output).group(1))}


def http2(port, seconds, work):
    body = contenders.write(work, "body", "x" * 64)
    output = on_load_core(["h2load", "-t1", "-c8", "-m32", "-D", str(seconds), "-d", body,
                           "-H", "content-type: application/grpc", "-H", "te: trailers", "-H", "user-agent: bench/1.0",
                           f"http://127.0.0.1:{port}/echo.Echo/Unary"])
    good = int(re.search(r"status codes: (\d+) 2xx, 0 3xx, 0 4xx, 0 5xx", output).group(1))
    mean = re.search(r"time for request:\s+\S+\s+\S+\s+(\S+)", output).group(1)
    return {"requests": good, "rps": float(re.search(r", ([\d.]+) req/s", output).group(1)), "mean_us": micros(mean)}


def tcp(port, seconds, work):
    """A request is a mebibyte here."""
    output = on_load_core([TOOLS / "bytes", "load", port, seconds])
    mebibytes = int(output.split()[0]) / 2**20
    return {"requests": mebibytes, "rps": mebibytes / seconds}


FLAT_OUT = {"h1": http1, "h2": http2, "tcp": tcp}


def paced(port, seconds, rate):
    """HTTP/1.1 at a fixed rate; latencies count from when a request was to be sent."""
    result = json.loads(on_load_core([TOOLS / "paced", "h1", port, rate, seconds, 64]))
    if result["failed"]:
        raise RuntimeError(f"{result['failed']} failed requests: {result['why']}")
    return result


def handshakes(port, seconds, kind, peer):
    """`kind` is full or resumed; a connection carries one request."""
    result = json.loads(on_load_core([TOOLS / "handshakes", port, seconds, kind, 8, *peer]))
    # The first of each of the eight has nothing to resume.
    expected = result["requests"] - 8 if kind == "resumed" else 0
    if abs(result["resumed"] - expected) > 0.01 * result["requests"] + 8:
        raise RuntimeError(f"{result['resumed']} of {result['requests']} sessions were resumed")
    return result


def micros(text):
    number, unit = re.match(r"([\d.]+)(us|ms|s|m)", text).groups()
    return float(number) * {"us": 1, "ms": 1e3, "s": 1e6, "m": 6e7}[unit]
