"""Sheer as a contender: a real control plane and one or two real proxies, with everything on that is on by default."""
import base64
import os
import re
import shutil
import socket
import ssl
import time
import urllib.request
from pathlib import Path

from contenders import BACKENDS, FRONT, MIDDLE, Process, write
from processes import LOAD_CORE, start, stop

BINARY = os.environ.get("SHEER", str(Path(__file__).parent.parent / "target" / "release" / "sheer"))
API = 15980
METRICS = {"client": 15020, "bench": 15021}
SHORT = {"h1": "http", "h2": "grpc", "tcp": "tcp"}

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


def contender(case, work, binary=BINARY):
    """The proxy of a client with one declared upstream; on the mesh path also the proxy of the backend."""
    if not Path(binary).exists():
        return None
    home = make_home(work)
    # Only HTTP has port 80 by itself.
    port = case.backend if case.mesh and case.protocol == "tcp" else 80
    client = proxy(binary, home, "client", FRONT, "--upstream", f"127.0.0.1:{FRONT}=bench:{port}")
    if case.mesh:
        return [client, proxy(binary, home, "bench", MIDDLE, "--port", f"{case.backend}/{SHORT[case.protocol]}",
                              "--inbound-port", str(MIDDLE)), control_plane(binary, home)]
    protocol = {"h1": "http", "h2": "kubernetes.io/h2c", "tcp": "tcp"}[case.protocol]
    (home / "config" / "bench.yaml").write_text(
        PLAIN.format(port=case.backend, protocol=protocol, short=SHORT[case.protocol]))
    return [client, control_plane(binary, home)]


def all_protocols(fronts, work, binary=BINARY):
    """The mesh path with all protocols at once; `fronts` has the port of each."""
    home = make_home(work)
    upstreams = [part for name, front in fronts.items()
                 for part in ("--upstream", f"127.0.0.1:{front}=bench:{BACKENDS[name]}")]
    ports = [part for name in fronts for part in ("--port", f"{BACKENDS[name]}/{SHORT[name]}")]
    return [proxy(binary, home, "client", FRONT, *upstreams), proxy(binary, home, "bench", MIDDLE, *ports, "--inbound-port", str(MIDDLE)),
            control_plane(binary, home)]


def peer(plan, case, work, group, limit=15):
    """What a workload shows to another: key exchange, ALPN, server name, certificates, key. The client's proxy gets them
    from the control plane and leaves them here."""
    home = Path(work) / "sheer"
    process, end = start(plan[0].argv, LOAD_CORE), time.time() + limit
    try:
        while time.time() < end:
            key, chain = identity(next(home.glob("client/*/*/identity"), home))
            if chain:
                break
            time.sleep(0.05)
        else:
            raise RuntimeError(f"no certificate after {limit} s")
    finally:
        stop([process])
    write(home, "chain.pem", "".join(map(ssl.DER_cert_to_PEM_cert, chain)))
    write(home, "key.pem", f"-----BEGIN PRIVATE KEY-----\n{base64.encodebytes(key).decode()}-----END PRIVATE KEY-----\n")
    name = f"p{case.backend}.bench.default.svc.mesh.internal"
    return [group, "sheer/1+h1", name, home / "chain.pem", home / "key.pem"]


def identity(path):
    """Key and certificates of a proxy's state (`Stored` in crates/proxy/src/identity/held.rs: fields 1 and 2)."""
    data, place, found = (path.read_bytes() if path.is_file() else b"")[40:], 0, {1: [], 2: []}

    def number():
        nonlocal place
        value, shift = 0, 0
        while True:
            byte, place, shift = data[place], place + 1, shift + 7
            value |= (byte & 127) << (shift - 7)
            if byte < 128:
                return value

    while place < len(data):
        field, length = number() >> 3, number()
        found.get(field, []).append(data[place:place + length])
        place += length
    return (found[1] or [b""])[0], found[2]


def counters(service):
    """The counters of a proxy that have no labels."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{METRICS[service]}/metrics", timeout=5).read().decode()
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.M)}


def make_home(work):
    home = Path(work) / "sheer"
    shutil.rmtree(home, ignore_errors=True)
    for part in ("config", "sockets"):
        (home / part).mkdir(parents=True)
    os.chmod(home, 0o755)
    os.chmod(work, 0o755)
    # Root's proxies are another user; one's own are nobody else's business.
    os.chmod(home / "sockets", 0o700 if os.geteuid() else 0o755)
    return home


def proxy(binary, home, service, port, *flags):
    return Process([binary, "proxy", service, "--capture", "none", "--control", f"unix:{home}/sockets/control.sock",
                    "--mode", "strict", "--metrics", f"127.0.0.1:{METRICS[service]}", "--state", f"{home}/{service}",
                    *flags], port)


def control_plane(binary, home):
    return Process([binary, "control", "--config", f"{home}/config", "--state", f"{home}/state",
                    "--sockets", f"{home}/sockets", "--proxy-listen", "127.0.0.1:15912",
                    "--api-listen", f"127.0.0.1:{API}"], API, measured=False)


def ready(case, port=FRONT, limit=15):
    """Waits until a connection to the front is served: names, routes and endpoints are known."""
    hello, good = {"h1": (b"GET / HTTP/1.1\r\nhost: bench\r\n\r\n", b"HTTP/1.1 200"),
                   "h2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", b"\0\0"),
                   "tcp": (b"D", b"x")}[case.protocol]
    end, answer = time.time() + limit, b""
    while time.time() < end:
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as stream:
                stream.settimeout(2)
                stream.sendall(hello)
                answer = stream.recv(4096)
                if answer.startswith(good):
                    return
        except OSError as error:
            answer = repr(error).encode()
        time.sleep(0.05)
    raise RuntimeError(f"no good answer from sheer after {limit} s, but {answer[:300]!r}")
