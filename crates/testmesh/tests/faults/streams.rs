//! F10: a WebSocket and gRPC calls are open when their workload is told to stop.

use crate::site::{Ground, caller, join};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use sheer_testmesh::faults::row;
use sheer_testmesh::mesh::PATIENCE;
use sheer_testmesh::program::Program;
use std::time::{Duration, Instant};

/// The system's own, which has gRPC; another may come first on the PATH.
const PYTHON: &str = "/usr/bin/python3";

/// How long the streams go on after SIGTERM: beyond the time for which a leaving workload takes new requests, within the grace.
const GO_ON: Duration = Duration::from_secs(12);

/// Serves a WebSocket that echoes at 8080 and gRPC at 8082, and when it is told to stop finishes what is open.
const SERVE: &str = r#"
import base64, concurrent.futures, grpc, hashlib, signal, socket, sys, threading, time
stopping, open_ones = threading.Event(), []

def exactly(peer, count):
    data = b""
    while len(data) < count:
        some = peer.recv(count - len(data))
        assert some, "cut off"
        data += some
    return data

def websocket(peer):
    head = b""
    while not head.endswith(b"\r\n\r\n"): head += exactly(peer, 1)
    key = next(line[19:].strip() for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key: "))
    accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    peer.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                 b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n")
    while True:
        first, second = exactly(peer, 2)
        mask, data = exactly(peer, 4), exactly(peer, second & 0x7f)
        data = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
        peer.sendall(bytes([first, len(data)]) + data)
        if first & 0xf == 8: return peer.close()

def listen():
    door = socket.create_server(("0.0.0.0", 8080))
    while True:
        peer, _ = door.accept()
        thread = threading.Thread(target=websocket, args=[peer], daemon=True)
        open_ones.append(thread)
        thread.start()

def count(request, context):
    number = 0
    while context.is_active() and number < int(request):
        yield b"%d" % number
        number += 1
        time.sleep(0.05)

def both(requests, context):
    for request in requests: yield b"got " + request

kinds = {"Count": grpc.unary_stream_rpc_method_handler(count), "Both": grpc.stream_stream_rpc_method_handler(both)}
server = grpc.server(concurrent.futures.ThreadPoolExecutor(32))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Calls", kinds),))
server.add_insecure_port("0.0.0.0:8082")
server.start()
threading.Thread(target=listen, daemon=True).start()
signal.signal(signal.SIGTERM, lambda *_: stopping.set())
stopping.wait()
server.stop(30).wait()
for thread in open_ones: thread.join(30)
print("finished what was open", flush=True)
"#;

/// Keeps a WebSocket, a stream of answers and a call with streams both ways open for some seconds, and ends each in order.
const CALL: &str = r#"
import base64, grpc, os, socket, sys, threading, time
seconds, failed, begun = float(sys.argv[1]), [], threading.Semaphore(0)
told = {}

def exactly(peer, count):
    data = b""
    while len(data) < count:
        some = peer.recv(count - len(data))
        assert some, "cut off"
        data += some
    return data

def websocket():
    peer = socket.create_connection(("127.0.0.1", 9000), timeout=20)
    key = base64.b64encode(os.urandom(16)).decode()
    peer.sendall(f"GET / HTTP/1.1\r\nHost: calls\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                 f"Sec-WebSocket-Key: {key}\r\n\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"): head += exactly(peer, 1)
    assert head.startswith(b"HTTP/1.1 101"), head
    def say(kind, data):
        mask = os.urandom(4)
        peer.sendall(bytes([0x80 | kind, 0x80 | len(data)]) + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(data)))
        assert exactly(peer, 2 + len(data)) == bytes([0x80 | kind, len(data)]) + data
    number, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        say(2, b"message %d" % number)
        number += 1
        if number == 1: begun.release()
        time.sleep(0.05)
    say(8, b"\x03\xe8")
    assert peer.recv(1) == b"", "more than the end"
    told["messages"] = number

def stream():
    wanted, got = int(seconds / 0.05), []
    for answer in channel.unary_stream("/test.Calls/Count")(str(wanted).encode(), timeout=60):
        if not got: begun.release()
        got.append(int(answer))
    assert got == list(range(wanted)), (wanted, len(got))
    told["streamed"] = wanted

def both():
    answered, end = threading.Semaphore(1), time.monotonic() + seconds
    def requests():
        number = 0
        while time.monotonic() < end:
            assert answered.acquire(timeout=20)
            yield b"%d" % number
            number += 1
            time.sleep(0.05)
    got = 0
    for answer in channel.stream_stream("/test.Calls/Both")(requests(), timeout=60):
        assert answer == b"got %d" % got, answer
        got += 1
        if got == 1: begun.release()
        answered.release()
    told["answered"] = got

def one(work):
    try: work()
    except BaseException as error:
        failed.append("%s: %r" % (work.__name__, error))
        begun.release()

channel = grpc.insecure_channel("127.0.0.1:9001")
works = [websocket, stream, both]
threads = [threading.Thread(target=one, args=[work]) for work in works]
for thread in threads: thread.start()
for _ in works: assert begun.acquire(timeout=20)
print("all are open", flush=True)
for thread in threads: thread.join()
assert not failed, failed
print("%(messages)d WebSocket messages, %(streamed)d and %(answered)d gRPC messages" % told, flush=True)
"#;

#[test]
#[ignore = "takes half a minute, nearly all of it waiting: `make faults`"]
fn open_streams_are_finished() -> Result<()> {
    let done = format!(
        "SIGTERM to a workload with a WebSocket, a gRPC stream and a gRPC call with streams both ways open, which go on for {} s",
        GO_ON.as_secs()
    );
    row("F10", &done, "each goes on to its own end; ended within 31 s", finish())
}

fn finish() -> Result<String> {
    let ground = Ground::new()?;
    let (host, control) = (&ground.near, ground.control()?);
    let (serve, call) = (ground.net.directory().join("serve.py"), ground.net.directory().join("call.py"));
    std::fs::write(&serve, SERVE)?;
    std::fs::write(&call, CALL)?;
    let flags = ["--name", "calls-1", "--port", "8080/http", "--port", "8082/grpc"];
    let command = [PYTHON, &serve.to_string_lossy()];
    let mut leaving = join(&control, host, &ground.home("calls")?, "calls", &flags, &command)?;
    let _caller = caller(&control, host, &ground.home("caller")?, &["calls:8080", "calls:8082"])?;
    control.serves("calls", 1)?;
    let seconds = GO_ON.as_secs().to_string();
    let mut calls = Program::start("calls", ground.net.directory(), host.command(PYTHON).arg(&call).arg(&seconds))?;
    calls.prints("all are open", PATIENCE)?;
    leaving.signal(Signal::SIGTERM)?;
    let told = Instant::now();
    let status = calls.wait(GO_ON + PATIENCE)?;
    ensure!(status.success(), "{}\n---\n{}", calls.output(), leaving.output());
    let status = leaving.wait(Duration::from_secs(31).saturating_sub(told.elapsed()))?;
    ensure!(status.success() && leaving.output().contains("finished what was open"), "{status}: {}", leaving.output());
    let output = calls.output();
    let said = output.lines().last().context("nothing was said")?;
    Ok(format!("{said}, all to their ends; ended {:.1} s after SIGTERM", told.elapsed().as_secs_f64()))
}
