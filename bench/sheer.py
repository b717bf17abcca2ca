"""Sheer as a contender: a real control plane and one or two real proxies, with everything on that is on by default."""
import os
import shutil
import socket
import time
from pathlib import Path

from contenders import FRONT, MIDDLE, Process

BINARY = os.environ.get("SHEER", str(Path(__file__).parent.parent / "target" / "release" / "sheer"))
API = 15980

# A host without a proxy of its own: the plain hop.
PLAIN = """
apiVersion: v1
kind: Service
metadata: {{name: bench}}
spec: {{selector: {{app: bench}}, ports: [{{port: 80, targetPort: {port}, appProtocol: {protocol}}}]}}
---
apiVersion: sheer.dev/v1alpha1
kind: Workload
metadata: {{name: bench-1, labels: {{app: bench}}}}
spec: {{addresses: [127.0.0.1], ports: [{{port: {port}, protocol: {short}}}], proxied: false}}
"""


def contender(case, work):
    """The proxy of a client with one declared upstream; on the mesh path also the proxy of the backend."""
    if not Path(BINARY).exists():
        return None
    home = Path(work) / "sheer"
    shutil.rmtree(home, ignore_errors=True)
    for part in ("config", "sockets"):
        (home / part).mkdir(parents=True)
    os.chmod(home, 0o755)
    os.chmod(work, 0o755)
    control = f"unix:{home}/sockets/control.sock"
    short = {"h1": "http", "h2": "grpc", "tcp": "tcp"}[case.protocol]

    def proxy(service, port, *flags):
        return Process([BINARY, "proxy", service, "--capture", "none", "--control", control, "--mode", "strict",
                        "--metrics", "127.0.0.1:0", "--state", f"{home}/{service}", *flags], port)

    # Only HTTP has port 80 by itself.
    port = case.backend if case.mesh and case.protocol == "tcp" else 80
    client = proxy("client", FRONT, "--upstream", f"127.0.0.1:{FRONT}=bench:{port}")
    plane = Process([BINARY, "control", "--config", f"{home}/config", "--state", f"{home}/state",
                     "--sockets", f"{home}/sockets", "--proxy-listen", "127.0.0.1:15912",
                     "--api-listen", f"127.0.0.1:{API}"], API, measured=False)
    if case.mesh:
        backend = proxy("bench", MIDDLE, "--port", f"{case.backend}/{short}", "--inbound-port", str(MIDDLE))
        return [client, backend, plane]
    protocol = {"h1": "http", "h2": "kubernetes.io/h2c", "tcp": "tcp"}[case.protocol]
    (home / "config" / "bench.yaml").write_text(PLAIN.format(port=case.backend, protocol=protocol, short=short))
    return [client, plane]


def ready(case, work, limit=15):
    """Waits until a connection to the front is served: names, routes and endpoints are known."""
    hello, good = {"h1": (b"GET / HTTP/1.1\r\nhost: bench\r\n\r\n", b"HTTP/1.1 200"),
                   "h2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", b"\0\0"),
                   "tcp": (b"D", b"x")}[case.protocol]
    end, answer = time.time() + limit, b""
    while time.time() < end:
        try:
            with socket.create_connection(("127.0.0.1", FRONT), 1) as stream:
                stream.settimeout(2)
                stream.sendall(hello)
                answer = stream.recv(4096)
                if answer.startswith(good):
                    return
        except OSError as error:
            answer = repr(error).encode()
        time.sleep(0.05)
    raise RuntimeError(f"no good answer from sheer after {limit} s, but {answer[:300]!r}")
