"""The proxies that scripts/framing, conformance, floods and websocket compare, each with its default settings.

A `Door` is a way through a proxy to an application of ours; a contender opens the doors that it is given. ENVOY,
HAPROXY and MESH_PATH name the programs; what cannot be found is left out.
"""

import asyncio
import ctypes
import os
import pathlib
import re
import shutil
import socket
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Door:
    """A way to the application at a port of loopback; `address` is where clients of it connect."""

    def __init__(self, port, http2=False, protocol="detect"):
        self.port, self.http2, self.protocol = port, http2, protocol
        self.address = None
        # Sheer's alone: its process, and the server side's own entrance, where mesh peers come in.
        self.pid, self.peers, self.keys = None, None, None


def die_with_parent():
    ctypes.CDLL(None).prctl(1, 9)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


async def listening(port, limit=15):
    for _ in range(limit * 20):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            return writer.close()
        except OSError:
            await asyncio.sleep(0.05)
    raise RuntimeError(f"nothing listens on {port}")


def address_of(text):
    host, port = text.rsplit(":", 1)
    return host, int(port)


async def start_sheer(doors, work):
    """Two proxies with mutual TLS between them for each door: the example `mesh_path`."""
    binary = os.environ.get("MESH_PATH", str(ROOT / "target/debug/examples/mesh_path"))
    if not pathlib.Path(binary).exists():
        return None
    running = []
    for at, door in enumerate(doors):
        door.keys = pathlib.Path(work) / f"keys{at}"
        door.keys.mkdir()
        argv = [binary, str(door.port), door.protocol, str(door.keys)]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent)
        running.append(process)
        told = process.stdout.readline().split()
        door.address, door.pid, door.peers = address_of(told[0]), int(told[2]), address_of(told[4])
    return running


async def start_haproxy(doors, work):
    binary = os.environ.get("HAPROXY") or shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if not binary:
        return None
    config = "global\n  nbthread 1\ndefaults\n  mode http\n  timeout connect 2s\n  timeout client 5s\n  timeout server 5s\n  timeout tunnel 1h\n"
    for at, door in enumerate(doors):
        door.address = ("127.0.0.1", free_port())
        http2 = " proto h2" if door.http2 else ""
        config += f"frontend f{at}\n  bind 127.0.0.1:{door.address[1]}{http2}\n  default_backend b{at}\n"
        config += f"backend b{at}\n  server s 127.0.0.1:{door.port}{http2}\n"
    file = pathlib.Path(work) / "haproxy.cfg"
    file.write_text(config)
    process = subprocess.Popen([binary, "-db", "-f", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent)
    await listening(doors[-1].address[1])
    for door in doors:
        door.pid = process.pid
    return [process]


ENVOY_LISTENER = """
  - name: {name}
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: http
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: {name}
          {upgrade}
          route_config: {{virtual_hosts: [{{name: all, domains: ["*"], routes: [{{match: {{prefix: "/"}}, route: {{cluster: {name}}}}}]}}]}}
          http_filters: [{{name: router, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]
"""
ENVOY_CLUSTER = """
  - name: {name}
    connect_timeout: 2s
    {http2}
    load_assignment: {{cluster_name: {name}, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]}}
"""
ENVOY_HTTP2 = """typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {"@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}}"""


def envoy_binary():
    fetch = [str(ROOT / "scripts/envoy"), str(ROOT / "target")]
    return os.environ.get("ENVOY") or subprocess.run(fetch, capture_output=True, text=True).stdout.strip()


async def start_envoy(doors, work, upgrade=""):
    binary = envoy_binary()
    if not binary:
        return None
    listeners, clusters = "", ""
    for at, door in enumerate(doors):
        door.address = ("127.0.0.1", free_port())
        listeners += ENVOY_LISTENER.format(name=f"f{at}", port=door.address[1], upgrade=upgrade)
        clusters += ENVOY_CLUSTER.format(name=f"f{at}", port=door.port, http2=ENVOY_HTTP2 if door.http2 else "")
    file = pathlib.Path(work) / "envoy.yaml"
    file.write_text(f"static_resources:\n  listeners:{listeners}\n  clusters:{clusters}\n")
    argv = [binary, "-c", str(file), "--concurrency", "1", "--use-dynamic-base-id", "--disable-hot-restart", "-l", "off"]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent)
    await listening(doors[-1].address[1])
    for door in doors:
        door.pid = process.pid
    return [process]


CONTENDERS = {"Sheer": start_sheer, "Envoy": start_envoy, "HAProxy": start_haproxy}


def versions():
    """The version of each other contender."""
    def first(argv, pattern):
        try:
            out = subprocess.run(argv, capture_output=True, text=True).stdout
            return re.search(pattern, out)[1]
        except (OSError, TypeError):
            return "?"
    return {"Sheer": "", "Envoy": first([envoy_binary() or "envoy", "--version"], r"/(\d+\.\d+\.\d+)"),
            "HAProxy": first([os.environ.get("HAPROXY", "/usr/sbin/haproxy"), "-v"], r"version (\d+\.\d+\.\d+)")}
