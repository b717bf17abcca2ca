"""How each contender is configured for each case: as its operator would for this work.

A contender is a function from a Case and a working directory to a list of Process: nearest the client first. Every
contender keeps upstream connections alive, writes no access log, and between two proxies speaks TLS 1.3 with P-256
certificates on both sides and session reuse.
"""
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

FRONT, MIDDLE = 10010, 10011  # the port the load goes to; the port between two proxies
BACKENDS = {"h1": 9000, "h2": 9001, "tcp": 9002}
BACKEND_PROGRAMS = {"h1": ["http1-backend"], "h2": ["http2-backend"], "tcp": ["bytes", "serve"]}
TOOLS = Path(__file__).parent / "tools" / "target" / "release"


@dataclass
class Case:
    """What is carried: protocol h1, h2 or tcp, over one plain hop or over two proxies with mutual TLS between them."""
    protocol: str
    mesh: bool

    @property
    def backend(self):
        return BACKENDS[self.protocol]


@dataclass
class Process:
    """A program to start; `port` is listened on when it is ready. Only a measured one runs on the proxies' core."""
    argv: list
    port: int
    measured: bool = True
    env: dict = field(default_factory=dict)


def direct(case, work):
    return None if case.mesh else []


def forwarder(case, work):
    return None if case.mesh else [Process([str(TOOLS / "forwarder"), str(FRONT), str(case.backend)], FRONT)]


def chain(case, hop):
    """One plain hop, or two with TLS between them. `hop(listen, upstream, tls_in, tls_out)` makes a Process."""
    if case.mesh:
        return [hop(FRONT, MIDDLE, False, True), hop(MIDDLE, case.backend, True, False)]
    return [hop(FRONT, case.backend, False, False)]


def haproxy(case, work):
    certificates = make_certificates(work)
    tcp = case.protocol == "tcp"
    proto = " proto h2" if case.protocol == "h2" else ""
    alpn = {"h1": " alpn http/1.1", "h2": " alpn h2", "tcp": ""}[case.protocol]

    def hop(listen, upstream, tls_in, tls_out):
        tls = f"crt {certificates}/full.pem ca-file {certificates}/ca.pem verify required ssl-min-ver TLSv1.3"
        bind = f" ssl {tls}{alpn}" if tls_in else proto
        server = f" ssl {tls} sni str(mesh.local){alpn}" if tls_out else proto
        return Process(["haproxy", "-db", "-f", write(work, f"haproxy-{listen}.cfg", f"""
global
  nbthread 1
  maxconn {2000 if tcp else 9950}
defaults
  mode {"tcp" if tcp else "http"}
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  {"option splice-auto" if tcp else "http-reuse always"}
frontend front
  bind 127.0.0.1:{listen}{bind}
  default_backend back
backend back
  server one 127.0.0.1:{upstream}{server}{"" if tcp else " pool-purge-delay 1h"}
""")], listen)
    return chain(case, hop)


def nginx(case, work):
    if case.protocol == "tcp":
        return None  # its stream module is a package of its own
    certificates = make_certificates(work)
    pre = "proxy" if case.protocol == "h1" else "grpc"

    def hop(listen, upstream, tls_in, tls_out):
        home = Path(work) / f"nginx-{listen}"
        home.mkdir(exist_ok=True)
        flags = (" ssl" if tls_in else "") + (" http2" if case.protocol == "h2" else "")
        incoming = f"""ssl_certificate {certificates}/leaf.pem; ssl_certificate_key {certificates}/leaf.key;
      ssl_client_certificate {certificates}/ca.pem; ssl_verify_client on; ssl_verify_depth 2; ssl_protocols TLSv1.3;""" if tls_in else ""
        outgoing = f"""{pre}_ssl_certificate {certificates}/leaf.pem; {pre}_ssl_certificate_key {certificates}/leaf.key;
      {pre}_ssl_trusted_certificate {certificates}/ca.pem; {pre}_ssl_verify on; {pre}_ssl_verify_depth 2; {pre}_ssl_name mesh.local;
      {pre}_ssl_server_name on; {pre}_ssl_protocols TLSv1.3;""" if tls_out else ""
        scheme = {"proxy": "http", "grpc": "grpc"}[pre] + ("s" if tls_out else "")
        keep = 'proxy_http_version 1.1; proxy_set_header Connection "";' if pre == "proxy" else ""
        temporary = " ".join(f"{kind}_temp_path {home}/{kind};" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
        return Process(["nginx", "-p", str(home), "-e", f"{home}/error.log", "-c", write(work, f"nginx-{listen}.conf", f"""
daemon off; master_process off; worker_processes 1; pid {home}/pid; error_log {home}/error.log crit;
events {{ worker_connections 19900; }}
http {{
  access_log off; keepalive_timeout 1h; keepalive_requests 1000000000; client_body_temp_path {home}/body; {temporary}
  upstream back {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 1000000000; keepalive_timeout 1h; }}
  server {{
    listen 127.0.0.1:{listen}{flags};
    {incoming}
    location / {{ {pre}_pass {scheme}://back; {keep} {outgoing} }}
  }}
}}
""")], listen)
    return chain(case, hop)


def envoy(case, work):
    binary = os.environ.get("ENVOY")
    if not binary:
        return None
    certificates = make_certificates(work)

    def context(kind, extra):
        return f"""
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{kind}TlsContext
          {extra}
          common_tls_context:
            tls_params: {{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}}
            alpn_protocols: [{ {"h1": "http/1.1", "h2": "h2", "tcp": "tcp"}[case.protocol] }]
            tls_certificates:
            - {{certificate_chain: {{filename: {certificates}/leaf.pem}}, private_key: {{filename: {certificates}/leaf.key}}}}
            validation_context: {{trusted_ca: {{filename: {certificates}/ca.pem}}}}"""

    def hop(listen, upstream, tls_in, tls_out):
        incoming = "transport_socket:" + context("Downstream", "require_client_certificate: true") if tls_in else ""
        outgoing = "transport_socket:" + context("Upstream", "sni: mesh.local") if tls_out else ""
        http2 = """typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}""" if case.protocol == "h2" else ""
        manager = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
        router = "envoy.extensions.filters.http.router.v3.Router"
        http = f"""name: http
        typed_config:
          "@type": type.googleapis.com/{manager}
          stat_prefix: front
          codec_type: AUTO
          route_config: {{virtual_hosts: [{{name: all, domains: ["*"], routes: [{{match: {{prefix: "/"}}, route: {{cluster: back}}}}]}}]}}
          http_filters: [{{name: router, typed_config: {{"@type": type.googleapis.com/{router}}}}}]"""
        bytes_only = """name: tcp
        typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: front, cluster: back}"""
        limits = "{max_connections: 100000, max_pending_requests: 100000, max_requests: 100000}"
        return Process([binary, "--concurrency", "1", "--disable-hot-restart", "-l", "error", "--base-id", str(listen),
                        "-c", write(work, f"envoy-{listen}.yaml", f"""
static_resources:
  listeners:
  - name: front
    address: {{socket_address: {{address: 127.0.0.1, port_value: {listen}}}}}
    filter_chains:
    - filters:
      - {bytes_only if case.protocol == "tcp" else http}
      {incoming}
  clusters:
  - name: back
    type: STATIC
    connect_timeout: 5s
    circuit_breakers: {{thresholds: [{limits}]}}
    load_assignment: {{cluster_name: back, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {upstream}}}}}}}}}]}}]}}
    {http2}
    {outgoing}
""")], listen)
    return chain(case, hop)


def write(work, name, text):
    path = Path(work) / name
    path.write_text(text)
    return str(path)


def make_certificates(work):
    """A P-256 root, an issuing authority under it, and one leaf that serves both sides: the chain that Sheer's are."""
    home = Path(work) / "certificates"
    if (home / "full.pem").exists():
        return home
    home.mkdir(exist_ok=True)
    (home / "issuing").write_text("basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=critical,keyCertSign\n")
    (home / "extensions").write_text(
        "subjectAltName=critical,DNS:mesh.local,URI:spiffe://mesh.internal/ns/default/sa/bench\n"
        "extendedKeyUsage=serverAuth,clientAuth\nkeyUsage=critical,digitalSignature\n")
    for line in (
        "openssl ecparam -name prime256v1 -genkey -noout -out ca.key",
        "openssl req -x509 -new -key ca.key -sha256 -days 30 -subj /CN=bench -out ca.pem",
        "openssl ecparam -name prime256v1 -genkey -noout -out issuing.key",
        "openssl req -new -key issuing.key -subj /CN=issuing -out issuing.csr",
        "openssl x509 -req -in issuing.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 -sha256 -extfile issuing -out issuing.pem",
        "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out leaf.key",
        "openssl req -new -key leaf.key -subj /O=bench -out leaf.csr",
        "openssl x509 -req -in leaf.csr -CA issuing.pem -CAkey issuing.key -CAcreateserial -days 30 -sha256 -extfile extensions -out own.pem",
    ):
        subprocess.run(line.split(), cwd=home, check=True, capture_output=True)
    (home / "leaf.pem").write_text((home / "own.pem").read_text() + (home / "issuing.pem").read_text())
    (home / "full.pem").write_text((home / "leaf.pem").read_text() + (home / "leaf.key").read_text())
    return home
