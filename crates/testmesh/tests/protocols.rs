//! Protocols through two proxies, spoken by programs that others wrote and that nobody told of the mesh.

use anyhow::{Context as _, Result, bail, ensure};
use sheer_testmesh::one_host::Mesh;
use sheer_testmesh::program::{run, sheer};
use std::path::PathBuf;
use std::process::Command;

/// The system's own, which has the gRPC package; another may come first on the PATH.
const PYTHON: &str = "/usr/bin/python3";

#[test]
fn redis_works_with_a_declared_and_a_detected_protocol() -> Result<()> {
    let mut mesh = Mesh::new()?;
    for (service, port, number) in [("detected", "6379", "6379"), ("declared", "7000/tcp", "7000")] {
        let server = ["redis-server", "--port", number, "--save", "", "--protected-mode", "no", "--bind", "0.0.0.0"];
        mesh.serve(service, &["--port", port, "--user", "nobody"], &server)?;
        let cli = |command: &[&str]| {
            mesh.client_at_last(&[&["redis-cli", "-e", "-h", service, "-p", number], command].concat())
        };
        assert_eq!(cli(&["ping"])?.trim(), "PONG");
        assert_eq!(cli(&["set", "greeting", "hello"])?.trim(), "OK");
        assert_eq!(cli(&["get", "greeting"])?.trim(), "hello");
        cli(&["eval", "redis.call('set', 'large', string.rep('x', 10485760)) return 1", "0"])?;
        assert_eq!(cli(&["get", "large"])?.trim().len(), 10 << 20);
        let many = format!("redis-benchmark -h {service} -p {number} -t set,get,lpush -n 5000 -c 20 -P 8 --csv");
        let measured = mesh.client(&["sh", "-c", &many])?;
        ensure!(measured.contains("\"GET\"") && measured.contains("\"LPUSH\""), "redis-benchmark printed {measured}");
        assert_eq!(cli(&["llen", "mylist"])?.trim(), "5000");
    }
    // A port that the workload never named is not reached, though something listens there.
    let undeclared = ["redis-server", "--port", "6381", "--save", "", "--protected-mode", "no", "--bind", "0.0.0.0"];
    mesh.serve("closed", &["--port", "6379", "--user", "nobody"], &undeclared)?;
    ensure!(mesh.client(&["timeout", "5", "redis-cli", "-e", "-h", "closed", "-p", "6381", "ping"]).is_err());
    Ok(())
}

#[test]
fn postgresql_works() -> Result<()> {
    let mut mesh = Mesh::new()?;
    let programs = newest("/usr/lib/postgresql", "bin")?;
    let data = mesh.home().join("data");
    std::fs::create_dir(&data)?;
    run(Command::new("chown").arg("postgres").arg(&data))?;
    let (data, home) = (data.to_string_lossy().into_owned(), mesh.home().to_owned());
    let as_postgres = |command: &mut Command| {
        command.current_dir("/");
        run(command)
    };
    let initdb = programs.join("initdb");
    let mut prepare = Command::new("setpriv");
    prepare.args(["--reuid=postgres", "--regid=postgres", "--init-groups", "--"]).arg(initdb);
    as_postgres(prepare.args(["--auth=trust", "--no-sync", "-D", &data]))?;
    // Peers come from the mesh's delivery address, which PostgreSQL does not take for the host itself.
    let rules =
        format!("{}\nhost all all 127.0.0.6/32 trust\n", std::fs::read_to_string(home.join("data/pg_hba.conf"))?);
    std::fs::write(home.join("data/pg_hba.conf"), rules)?;
    let postgres = programs.join("postgres");
    let server = [&*postgres.to_string_lossy(), "-D", &data, "-k", &data, "-h", "*", "-p", "5432", "-F"];
    mesh.serve("db", &["--port", "5432/tcp", "--user", "postgres"], &server)?;
    let sql = |text: &str| mesh.client_at_last(&["psql", "-h", "db", "-U", "postgres", "-Atc", text]);
    assert_eq!(sql("select 6 * 7")?.trim(), "42");
    mesh.client(&["pgbench", "-h", "db", "-U", "postgres", "-i", "-q", "-s", "1", "postgres"])?;
    let measured = mesh.client(&["pgbench", "-h", "db", "-U", "postgres", "-c", "4", "-t", "50", "postgres"])?;
    ensure!(measured.contains("actually processed: 200/200"), "pgbench printed {measured}");
    assert_eq!(sql("select count(*) from pgbench_history")?.trim(), "200");
    let large = "select repeat('x', 20000000)";
    assert_eq!(sql(large)?.trim().len(), 20_000_000);
    // Cancelling goes over a second connection.
    let cancelled = "psql -h db -U postgres -c 'select pg_sleep(60)' 2>&1 & \
                     until psql -h db -U postgres -Atc \"select query from pg_stat_activity where state = 'active'\" \
                     | grep -q '^select pg_sleep'; do sleep 0.1; done; kill -INT $!; wait";
    let answer = mesh.client(&["timeout", "20", "bash", "-mc", cancelled])?;
    ensure!(answer.contains("canceling statement due to user request"), "psql printed {answer}");
    Ok(())
}

#[test]
fn websockets_echo() -> Result<()> {
    let mut mesh = Mesh::new()?;
    let script = mesh.script("websocket.py", WEBSOCKET)?;
    for (service, port) in [("detected", "8080"), ("declared", "8080/http")] {
        mesh.serve(service, &["--port", port, "--user", "root"], &[PYTHON, &script, "serve", "8080"])?;
        assert_eq!(mesh.client_at_last(&[PYTHON, &script, "call", service])?.trim(), "echoed");
    }
    Ok(())
}

#[test]
fn http1_keeps_its_promises() -> Result<()> {
    let mut mesh = Mesh::new()?;
    let script = mesh.script("http1.py", HTTP1)?;
    let body = mesh.home().join("body");
    run(Command::new("sh").args(["-c", &format!("head -c 200000000 /dev/urandom > {}", body.display())]))?;
    let body = body.to_string_lossy().into_owned();
    mesh.serve("web", &["--port", "8080", "--user", "root"], &[PYTHON, &script, "8080", &body])?;
    let checksum = run(Command::new("sha256sum").arg(&body))?;
    let checksum = checksum.split(' ').next().context("no checksum")?;
    let curl = |arguments: &str| {
        let answer = mesh.client(&["sh", "-c", &format!("curl -sS --max-time 120 {arguments}")]);
        answer.map_err(|error| mesh.explain(error))
    };
    mesh.client_at_last(&["curl", "-sS", "--fail", "http://web/hello"])?;

    let reused = curl("-w '%{num_connects}\\n' http://web/hello http://web/chunked http://web/hello")?;
    assert_eq!(reused, "hello1\nsome pieces0\nhello0\n");
    let head = curl("-I http://web/length/12345 --next -w '%{num_connects}' http://web/hello")?;
    ensure!(head.to_lowercase().contains("content-length: 12345"), "{head}");
    ensure!(head.ends_with("hello1") || head.ends_with("hello0"), "{head}");
    let expected = curl(&format!("-v --stderr - -H 'Expect: 100-continue' -T {script} http://web/sum"))?;
    ensure!(expected.contains("100 Continue") && expected.contains("HTTP/1.1 200"), "{expected}");
    let refused = curl(&format!(
        "-o /dev/null -w '%{{http_code}} %{{size_upload}}' -H 'Expect: 100-continue' -T {body} http://web/refused"
    ))?;
    assert_eq!(refused, "413 0");
    let empty = curl("-w '%{http_code}' http://web/nothing")?;
    assert_eq!(empty, "204");

    for upload in
        [format!("-T {body}"), format!("-H 'Transfer-Encoding: chunked' -T {body}"), format!("-H Expect: -T {body}")]
    {
        assert_eq!(curl(&format!("{upload} http://web/sum"))?, format!("200000000 {checksum}"), "{upload}");
    }
    for download in ["http://web/body", "http://web/body-chunked", "--http1.0 http://web/body"] {
        assert_eq!(curl(&format!("{download} | sha256sum"))?, format!("{checksum}  -\n"), "{download}");
    }
    // Both ways at once.
    assert_eq!(curl(&format!("-T {body} http://web/echo | sha256sum"))?, format!("{checksum}  -\n"));
    Ok(())
}

#[test]
fn http2_with_prior_knowledge_works() -> Result<()> {
    let mut mesh = Mesh::new()?;
    let binary = sheer()?.to_string_lossy().into_owned();
    for (service, port) in [("detected", "8080"), ("declared", "8080/http2")] {
        let server = [&*binary, "__demo-service", "catalog", "--port", "8080"];
        mesh.serve(service, &["--port", port, "--user", "root"], &server)?;
        let curl = [
            "curl",
            "-sS",
            "--fail",
            "--http2-prior-knowledge",
            "-o",
            "/dev/null",
            "-w",
            "%{size_download} %{http_version}",
        ];
        let bytes = mesh.client_at_last(&[&curl[..], &[&format!("http://{service}/probe/bytes/1000")]].concat())?;
        assert_eq!(bytes, "1000 2");
        let body = mesh.script("upload", &"0123456789abcdef".repeat(1 << 20))?;
        let echoed =
            format!("curl -sS --fail --http2-prior-knowledge -T {body} http://{service}/probe/echo | cmp - {body}");
        mesh.client(&["bash", "-o", "pipefail", "-c", &echoed]).map_err(|error| mesh.explain(error))?;
        let target = format!("http://{service}/probe/bytes/3000");
        let load = mesh.client(&["h2load", "-n", "3000", "-c", "4", "-m", "16", &target])?;
        ensure!(load.contains("3000 succeeded, 0 failed, 0 errored, 0 timeout"), "h2load printed {load}");
        ensure!(load.contains("status codes: 3000 2xx"), "h2load printed {load}");
    }
    Ok(())
}

#[test]
fn grpc_works_in_all_its_kinds() -> Result<()> {
    let mut mesh = Mesh::new()?;
    let script = mesh.script("calls.py", GRPC)?;
    for (service, port) in [("detected", "9000"), ("declared", "9000/grpc")] {
        mesh.serve(service, &["--port", port, "--user", "root"], &[PYTHON, &script, "serve", "9000"])?;
        mesh.wait_for(service)?;
        let answer = mesh.client(&["timeout", "60", PYTHON, &script, "call", &format!("{service}:9000")]);
        assert_eq!(answer.map_err(|error| mesh.explain(error))?.trim(), "all calls answered");
    }
    Ok(())
}

/// A file of the newest version below a directory of versions.
fn newest(directory: &str, name: &str) -> Result<PathBuf> {
    let mut versions: Vec<PathBuf> =
        std::fs::read_dir(directory)?.filter_map(Result::ok).map(|entry| entry.path().join(name)).collect();
    versions.retain(|path| path.exists());
    versions.sort();
    match versions.pop() {
        Some(path) => Ok(path),
        None => bail!("no {name} below {directory}"),
    }
}

/// Serves, or calls, a WebSocket echo (RFC 6455) with nothing but the standard library.
const WEBSOCKET: &str = r#"
import base64, hashlib, os, socket, socketserver, struct, sys

def read(file, count):
    data = file.read(count)
    assert len(data) == count, "closed early"
    return data

def receive(file):
    first, second = read(file, 2)
    length = second & 127
    if length == 126: length, = struct.unpack("!H", read(file, 2))
    elif length == 127: length, = struct.unpack("!Q", read(file, 8))
    mask = read(file, 4) if second & 128 else None
    data = read(file, length)
    if mask:
        whole = (mask * (length // 4 + 1))[:length]
        data = (int.from_bytes(data, "big") ^ int.from_bytes(whole, "big")).to_bytes(length, "big")
    return first & 15, data

def frame(kind, data, masked):
    length, bit = len(data), 128 if masked else 0
    if length < 126: head = struct.pack("!BB", 128 | kind, bit | length)
    elif length < 65536: head = struct.pack("!BBH", 128 | kind, bit | 126, length)
    else: head = struct.pack("!BBQ", 128 | kind, bit | 127, length)
    return head + (bytes(4) + data if masked else data)

def accept(key):
    return base64.b64encode(hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()).decode()

def head(file):
    lines = iter(lambda: file.readline().decode().strip(), "")
    first = next(lines)
    return first, {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        _, fields = head(self.rfile)
        assert fields["upgrade"].lower() == "websocket" and "upgrade" in fields["connection"].lower(), fields
        # The first frame goes with the answer, in one piece.
        self.wfile.write(("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Accept: " + accept(fields["sec-websocket-key"]) + "\r\n\r\n").encode() + frame(1, b"welcome", False))
        while True:
            kind, data = receive(self.rfile)
            if kind == 8: return self.wfile.write(frame(8, data, False))
            self.wfile.write(frame(10 if kind == 9 else kind, data, False))

def serve(port):
    socketserver.ThreadingTCPServer.allow_reuse_address = True
    socketserver.ThreadingTCPServer(("0.0.0.0", port), Echo).serve_forever()

def call(host):
    peer = socket.create_connection((host, 80), timeout=20)
    key = base64.b64encode(os.urandom(16)).decode()
    peer.sendall(f"GET /chat HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
    file = peer.makefile("rb")
    first, fields = head(file)
    assert " 101 " in first and fields["sec-websocket-accept"] == accept(key), (first, fields)
    assert receive(file) == (1, b"welcome")
    for size in [0, 1, 125, 126, 65535, 65536, 3_000_000]:
        data = os.urandom(size)
        peer.sendall(frame(2, data, True))
        assert receive(file) == (2, data), size
    peer.sendall(frame(9, b"are you there", True))
    assert receive(file) == (10, b"are you there")
    peer.sendall(frame(8, b"\x03\xe8", True))
    assert receive(file) == (8, b"\x03\xe8")
    assert file.read() == b"", "open after its close"
    print("echoed")

serve(int(sys.argv[2])) if sys.argv[1] == "serve" else call(sys.argv[2])
"#;

/// An HTTP/1.1 server that uses what the protocol offers.
const HTTP1: &str = r#"
import hashlib, http.server, os, sys
PORT, BODY = int(sys.argv[1]), sys.argv[2]

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, status, length=None, chunked=False):
        self.send_response(status)
        if length is not None: self.send_header("Content-Length", str(length))
        if chunked: self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
    def do_HEAD(self):
        self.answer(200, self.path.rsplit("/", 1)[1])
    def do_GET(self):
        if self.path == "/hello":
            self.answer(200, 5)
            self.wfile.write(b"hello")
        elif self.path == "/chunked":
            self.answer(200, chunked=True)
            for piece in [b"some", b" ", b"pieces", b""]: self.chunk(piece)
        elif self.path == "/nothing":
            self.answer(204)
        elif self.path in ("/body", "/body-chunked"):
            chunked = self.path != "/body" and self.request_version == "HTTP/1.1"
            self.answer(200, None if chunked else os.path.getsize(BODY), chunked)
            with open(BODY, "rb") as file:
                while data := file.read(1 << 18): (self.chunk if chunked else self.wfile.write)(data)
            if chunked: self.chunk(b"")
    def handle_expect_100(self):
        if self.path != "/refused": return super().handle_expect_100()
        self.close_connection = True
        self.answer(413, 0)
        return False
    def pieces(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip(): pass
        else:
            left = int(self.headers["Content-Length"])
            while left:
                data = self.rfile.read(min(left, 1 << 18))
                assert data, "closed early"
                left -= len(data)
                yield data
    def do_PUT(self):
        if self.path == "/echo":
            self.answer(200, chunked=True)
            for data in self.pieces(): self.chunk(data)
            self.chunk(b"")
            return
        total, digest = 0, hashlib.sha256()
        for data in self.pieces():
            total += len(data)
            digest.update(data)
        text = f"{total} {digest.hexdigest()}".encode()
        self.answer(200, len(text))
        self.wfile.write(text)

http.server.ThreadingHTTPServer(("0.0.0.0", PORT), Handler).serve_forever()
"#;

/// A gRPC server and a client of it, on Google's implementation in C.
const GRPC: &str = r#"
import concurrent.futures, grpc, sys, threading, time

cancelled = threading.Semaphore(0)

def echo(request, context):
    context.set_trailing_metadata((("seen", dict(context.invocation_metadata()).get("token", "")),))
    return request

def count(request, context):
    for number in range(int(request)): yield str(number).encode()

def total(requests, context):
    return str(sum(int(number) for number in requests)).encode()

def both(requests, context):
    for request in requests: yield b"got " + request

def fail(request, context):
    context.set_trailing_metadata((("why", "because"),))
    context.abort(grpc.StatusCode.NOT_FOUND, "no such thing: \u00e9")

def late_fail(request, context):
    yield b"first"
    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "enough")

def endless(request, context):
    context.add_callback(cancelled.release)
    while context.is_active():
        yield b"on"
        time.sleep(0.01)

def was_cancelled(request, context):
    return b"yes" if cancelled.acquire(timeout=10) else b"no"

def serve(port):
    kinds = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo), "Count": grpc.unary_stream_rpc_method_handler(count),
        "Total": grpc.stream_unary_rpc_method_handler(total), "Both": grpc.stream_stream_rpc_method_handler(both),
        "Fail": grpc.unary_unary_rpc_method_handler(fail), "LateFail": grpc.unary_stream_rpc_method_handler(late_fail),
        "Endless": grpc.unary_stream_rpc_method_handler(endless),
        "WasCancelled": grpc.unary_unary_rpc_method_handler(was_cancelled),
    }
    options = [("grpc.max_receive_message_length", 1 << 26), ("grpc.max_send_message_length", 1 << 26)]
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(32), options=options)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Calls", kinds),))
    server.add_insecure_port(f"0.0.0.0:{port}")
    server.start()
    server.wait_for_termination()

def error_of(work):
    try: work()
    except grpc.RpcError as error: return error
    raise AssertionError("no error")

def call(target):
    options = [("grpc.max_receive_message_length", 1 << 26), ("grpc.max_send_message_length", 1 << 26)]
    channel = grpc.insecure_channel(target, options=options)
    unary = lambda name: channel.unary_unary(f"/test.Calls/{name}")
    stream = lambda name: channel.unary_stream(f"/test.Calls/{name}")
    assert unary("Echo")(b"hello", timeout=20) == b"hello"
    answer, metadata = unary("Echo").with_call(b"", metadata=(("token", "t-1"),), timeout=20)
    assert answer == b"" and ("seen", "t-1") in [tuple(pair) for pair in metadata.trailing_metadata()]
    large = bytes(range(256)) * 80_000
    assert unary("Echo")(large, timeout=60) == large
    calls = [unary("Echo").future(str(number).encode(), timeout=20) for number in range(200)]
    assert [int(future.result()) for future in calls] == list(range(200))
    assert [int(number) for number in stream("Count")(b"1000", timeout=20)] == list(range(1000))
    numbers = (str(number).encode() for number in range(1000))
    assert channel.stream_unary("/test.Calls/Total")(numbers, timeout=20) == b"499500"

    # Each answer is awaited before the next request is sent: nothing may be held back on the way.
    answered = threading.Semaphore(1)
    def in_turn():
        for number in range(100):
            assert answered.acquire(timeout=20)
            yield str(number).encode()
    got = []
    for answer in channel.stream_stream("/test.Calls/Both")(in_turn(), timeout=40):
        got.append(answer)
        answered.release()
    assert got == [b"got %d" % number for number in range(100)], got

    error = error_of(lambda: unary("Fail")(b"", timeout=20))
    assert error.code() == grpc.StatusCode.NOT_FOUND and error.details() == "no such thing: \u00e9", error
    assert ("why", "because") in [tuple(pair) for pair in error.trailing_metadata()]
    error = error_of(lambda: unary("NoSuchMethod")(b"", timeout=20))
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED, error
    late = stream("LateFail")(b"", timeout=20)
    assert next(late) == b"first"
    error = error_of(lambda: next(late))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and error.details() == "enough", error

    endless = stream("Endless")(b"")
    for _ in range(3): next(endless)
    endless.cancel()
    assert unary("WasCancelled")(b"", timeout=20) == b"yes", "the cancellation did not arrive"
    error = error_of(lambda: list(stream("Endless")(b"", timeout=0.5)))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error
    assert unary("WasCancelled")(b"", timeout=20) == b"yes", "the end at the deadline did not arrive"
    print("all calls answered")

serve(sys.argv[2]) if sys.argv[1] == "serve" else call(sys.argv[2])
"#;
