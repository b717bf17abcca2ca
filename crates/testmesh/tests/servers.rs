//! Servers whose protocol is not HTTP, through two proxies: those that speak first, those with a TLS of their own, and
//! what becomes of their connections' ends; over both families of addresses.

use anyhow::{Result, ensure};
use sheer_testmesh::faults::row;
use sheer_testmesh::one_host::Mesh;
use sheer_testmesh::program::run;
use std::process::Command;

/// The system's own, which has the packages; another may come first on the PATH.
const PYTHON: &str = "/usr/bin/python3";

/// With a port that nobody declared, and with one that is declared.
const BOTH: [(&str, &str); 2] = [("detected", ""), ("declared", "/tcp")];

#[test]
fn servers_may_speak_first_with_and_without_a_declared_protocol() -> Result<()> {
    let mut mesh = Mesh::new()?;
    mariadb(&mut mesh)?;
    mail(&mut mesh)?;
    files(&mut mesh)
}

fn mariadb(mesh: &mut Mesh) -> Result<()> {
    let home = mesh.home().join("mariadb");
    std::fs::create_dir(&home)?;
    let first = home.join("detected");
    let data = format!("--datadir={}", first.display());
    run(Command::new("mariadb-install-db").args(["--no-defaults", "--user=root", "--skip-test-db", &data]))?;
    let users = mesh.script(
        "users.sql",
        "FLUSH PRIVILEGES;\nCREATE USER app@'%' IDENTIFIED BY 'secret';\nGRANT ALL ON *.* TO app@'%';\nCREATE DATABASE app;\n",
    )?;
    let bootstrap = format!("mariadbd --no-defaults --user=root {data} --bootstrap < {users}");
    run(Command::new("sh").args(["-c", &bootstrap]))?;
    run(Command::new("cp").arg("-r").arg(&first).arg(home.join("declared")))?;
    for (kind, protocol) in BOTH {
        let service = format!("db-{kind}");
        let (data, socket) =
            (format!("--datadir={}/{kind}", home.display()), format!("--socket={}/{kind}.sock", home.display()));
        let server = [
            "mariadbd",
            "--no-defaults",
            "--user=root",
            &data,
            &socket,
            "--port=7306",
            "--bind-address=*",
            "--skip-name-resolve",
        ];
        mesh.serve(&service, &["--port", &format!("7306{protocol}"), "--user", "root"], &server)?;
    }
    for (kind, _) in BOTH {
        let service = format!("db-{kind}");
        let sql = |text: &str| {
            let client = [
                "mariadb",
                "--no-defaults",
                "-h",
                &service,
                "-P",
                "7306",
                "-u",
                "app",
                "-psecret",
                "-BNe",
                text,
                "app",
            ];
            mesh.client_at_last(&client)
        };
        assert_eq!(sql("select 6 * 7")?.trim(), "42", "{service}");
        sql("create table if not exists numbers as select seq from seq_1_to_100000")?;
        assert_eq!(sql("select sum(seq) from numbers")?.trim(), "5000050000");
        assert_eq!(sql("select repeat('x', 10000000)")?.trim().len(), 10_000_000);
        assert_eq!(sql("select seq from numbers")?.lines().count(), 100_000);
    }
    Ok(())
}

/// SMTP in the clear, and after STARTTLS with the server's own certificate.
fn mail(mesh: &mut Mesh) -> Result<()> {
    let (key, certificate) = certificate(mesh, "mail", "DNS:mail-detected,DNS:mail-declared")?;
    let script = mesh.script("mail.py", MAIL)?;
    for (kind, protocol) in BOTH {
        let (service, box_) =
            (format!("mail-{kind}"), mesh.home().join(format!("box-{kind}")).to_string_lossy().into_owned());
        let server = [PYTHON, &script, "serve", &key, &certificate, &box_];
        mesh.serve(&service, &["--port", &format!("2525{protocol}"), "--user", "root"], &server)?;
    }
    for (kind, _) in BOTH {
        let box_ = mesh.home().join(format!("box-{kind}")).to_string_lossy().into_owned();
        let sent = mesh.client_at_last(&[PYTHON, &script, &format!("mail-{kind}"), &key, &certificate, &box_])?;
        assert_eq!(sent.trim(), "two letters arrived");
    }
    Ok(())
}

/// FTP: its control connection. A port that listens for one transfer only is no endpoint.
fn files(mesh: &mut Mesh) -> Result<()> {
    let script = mesh.script("files.py", FILES)?;
    for (kind, protocol) in BOTH {
        let directory = mesh.home().join(format!("files-{kind}"));
        std::fs::create_dir(&directory)?;
        std::fs::write(directory.join("letter"), "12345")?;
        let server = [PYTHON, "-m", "pyftpdlib", "-p", "2121", "-w", "-d", &directory.to_string_lossy()];
        let flags = ["--port", &format!("2121{protocol}"), "--user", "root"];
        mesh.serve(&format!("files-{kind}"), &flags, &server)?;
    }
    for (kind, _) in BOTH {
        let service = format!("files-{kind}");
        assert_eq!(mesh.client_at_last(&[PYTHON, &script, &service])?.trim(), "all was answered");
        let head = mesh.client(&["curl", "-sSI", "--max-time", "20", &format!("ftp://{service}:2121/kept")])?;
        ensure!(head.contains("Content-Length: 5"), "curl printed {head}");
    }
    Ok(())
}

#[test]
fn tls_of_the_application_and_both_families_of_addresses_work() -> Result<()> {
    let mut mesh = Mesh::new()?;
    let (key, certificate) = certificate(&mesh, "tls", "DNS:tls-detected,DNS:tls-declared")?;
    let script = mesh.script("tls.py", TLS)?;
    for (kind, protocol) in [("detected", ""), ("declared", "/tls")] {
        let server = [PYTHON, &script, &key, &certificate, "8443"];
        mesh.serve(&format!("tls-{kind}"), &["--port", &format!("8443{protocol}"), "--user", "root"], &server)?;
    }
    let script = mesh.script("families.py", FAMILIES)?;
    let families = ["0.0.0.0", "::", "both"];
    for (number, bound) in families.iter().enumerate() {
        let server = [PYTHON, &script, bound, "8080"];
        mesh.serve(&format!("family-{number}"), &["--port", "8080", "--user", "root"], &server)?;
    }
    for kind in ["detected", "declared"] {
        let service = format!("tls-{kind}");
        let address = format!("https://{service}:8443/");
        let curl = ["curl", "-sS", "--max-time", "20", "--cacert", &certificate, "--cert", &certificate, "--key", &key];
        let answer = mesh.client_at_last(&[&curl[..], &[&address]].concat())?;
        // The server saw its own handshake: the name, the protocol, and the certificate of the client.
        assert_eq!(answer.trim(), format!("sni={service} alpn=http/1.1 client=tls TLSv1.3"));
        let older = mesh.client(&[&curl[..], &["--tls-max", "1.2", "--http2", &address]].concat())?;
        assert_eq!(older.trim(), format!("sni={service} alpn=http/1.1 client=tls TLSv1.2"));
        let strange = mesh.client(&["curl", "-sS", "--max-time", "20", "--cacert", &certificate, &address]);
        ensure!(strange.is_err(), "a client without a certificate was answered: {strange:?}");
    }
    for number in 0..families.len() {
        let service = format!("family-{number}");
        for family in ["-4", "-6"] {
            let address = format!("http://{service}/");
            let answer = mesh.client_at_last(&["curl", "-sS", "--fail", "--max-time", "20", family, &address])?;
            assert_eq!(answer.trim(), "here", "{service} {family}");
        }
        let found = mesh.client(&["getent", "ahosts", &service])?;
        let is_v6 = |line: &&str| line.contains("STREAM") && line.contains(':');
        let is_v4 = |line: &&str| line.contains("STREAM") && !line.contains(':');
        ensure!(found.lines().any(|it| is_v6(&it)) && found.lines().any(|it| is_v4(&it)), "{service}: {found}");
    }
    Ok(())
}

#[test]
fn connections_end_as_they_were_ended() -> Result<()> {
    let done = "TCP and HTTP/1 connections of others' clients and servers end by half, by both halves at once, before the answer, and by \
                reset, of open and of ended sides; urgent bytes";
    row("F23", done, "each end arrives alone, the other way goes on; a reset within 100 ms; byte-exact", ends())
}

fn ends() -> Result<String> {
    let mut mesh = Mesh::new()?;
    let script = mesh.script("ends.py", ENDS)?;
    let home = mesh.home().to_string_lossy().into_owned();
    mesh.serve("ends", &["--port", "9000", "--user", "root"], &[PYTHON, &script, "serve", &home])?;
    mesh.wait_for("ends")?;
    let answer =
        mesh.client(&["timeout", "60", PYTHON, &script, "call", &home]).map_err(|error| mesh.explain(error))?;
    ensure!(answer.starts_with("all ended as they should"), "{answer}");
    Ok(answer.trim().to_owned())
}

#[test]
#[ignore = "waits for five minutes: `make long`"]
fn a_reader_may_pause_for_minutes() -> Result<()> {
    let seconds = std::env::var("SHEER_PAUSE").unwrap_or_else(|_| "300".to_owned());
    let done = format!("readers of 64 MiB shut their window for {seconds} s: TCP and HTTP/1, both ways");
    row("F23", &done, "byte-exact", pause(seconds))
}

fn pause(seconds: String) -> Result<String> {
    let mut mesh = Mesh::new()?;
    let script = mesh.script("pause.py", PAUSE)?;
    mesh.serve("pause", &["--port", "9000", "--user", "root"], &[PYTHON, &script, "serve", &seconds])?;
    mesh.wait_for("pause")?;
    let answer = mesh.client(&[PYTHON, &script, "call", &seconds]).map_err(|error| mesh.explain(error))?;
    ensure!(answer.trim() == "every byte arrived", "{answer}");
    Ok("every byte of 4 times 64 MiB arrived".to_owned())
}

/// A key and a certificate that is its own authority.
fn certificate(mesh: &Mesh, name: &str, alternatives: &str) -> Result<(String, String)> {
    let file = |ending: &str| mesh.home().join(format!("{name}.{ending}")).to_string_lossy().into_owned();
    let (key, certificate) = (file("key"), file("crt"));
    run(Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"])
        .args(["-subj", &format!("/CN={name}"), "-addext", &format!("subjectAltName={alternatives}")])
        .args(["-keyout", &key, "-out", &certificate]))?;
    Ok((key, certificate))
}

/// Serves mail with what others wrote; or sends two letters, one of them after STARTTLS, and looks for them in the server's mailbox.
const MAIL: &str = r#"
import asyncio, os, smtplib, ssl, sys, time
host, key, certificate, box = sys.argv[1:5]
if host == "serve":
    from aiosmtpd.handlers import Mailbox
    from aiosmtpd.smtp import SMTP
    own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.load_cert_chain(certificate, key)
    async def serve():
        # Named, so that it does not look for its name for each connection.
        server = await asyncio.get_running_loop().create_server(lambda: SMTP(Mailbox(box), hostname="mail", tls_context=own), "0.0.0.0", 2525)
        await server.serve_forever()
    asyncio.run(serve())
context = ssl.create_default_context(cafile=certificate)
text = "Subject: %s\r\n\r\n" + "0123456789abcdef" * 4 + "\r\n"
for name, secured in ("clear", False), ("secured", True):
    with smtplib.SMTP(host, 2525, local_hostname="client", timeout=20) as server:
        server.ehlo("client")
        if secured:
            server.starttls(context=context)
            server.ehlo("client")
        server.sendmail("a@client", ["b@mesh"], text % name + "line of the letter\r\n" * 50000)
def letters():
    files = [os.path.join(box, "new", name) for name in os.listdir(os.path.join(box, "new"))]
    return [open(file).read() for file in files]
end = time.monotonic() + 10
while not all(any("Subject: " + name in letter and letter.count("line of the letter") == 50000 for letter in letters()) for name in ("clear", "secured")):
    assert time.monotonic() < end, [letter[:200] for letter in letters()]
    time.sleep(0.05)
print("two letters arrived")
"#;

/// Asks all that needs no second connection, as often as it takes to meet every order of bytes.
const FILES: &str = r#"
import ftplib, sys
for number in range(20):
    server = ftplib.FTP(timeout=20)
    assert server.connect(sys.argv[1], 2121).startswith("220")
    server.login()
    assert server.pwd() == "/" and server.voidcmd("NOOP").startswith("200")
    if number == 0: server.rename("letter", "kept")
    server.voidcmd("TYPE I")
    assert server.size("kept") == 5
    assert server.mkd("directory") == "/directory"
    server.cwd("directory")
    assert server.pwd() == "/directory"
    server.cwd("..")
    server.rmd("directory")
    try:
        server.cwd("/nowhere")
        raise AssertionError("there is no such directory")
    except ftplib.error_perm: pass
    assert "STAT" in server.sendcmd("HELP")
    assert server.quit().startswith("221")
print("all was answered")
"#;

/// An HTTPS server that wants a client's certificate and says what its handshake was.
const TLS: &str = r#"
import http.server, ssl, sys, threading
key, certificate, port = sys.argv[1:4]
names = {}
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        socket = self.connection
        subject = dict(pair[0] for pair in socket.getpeercert()["subject"])
        text = "sni=%s alpn=%s client=%s %s" % (socket.asked, socket.selected_alpn_protocol(), subject["commonName"], socket.version())
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificate)
context.load_cert_chain(certificate, key)
context.verify_mode = ssl.CERT_REQUIRED
context.set_alpn_protocols(["http/1.1"])
def asked(socket, name, context): socket.asked = name
context.sni_callback = asked
class Server(http.server.ThreadingHTTPServer):
    def finish_request(self, request, address):
        super().finish_request(context.wrap_socket(request, server_side=True), address)
Server(("0.0.0.0", int(port)), Handler).serve_forever()
"#;

/// An HTTP server bound to one family of addresses, or to both.
const FAMILIES: &str = r#"
import http.server, socket, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"here")
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET if sys.argv[1] == "0.0.0.0" else socket.AF_INET6
    def server_bind(self):
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, sys.argv[1] != "both")
        super().server_bind()
Server(("::" if sys.argv[1] == "both" else sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"#;

/// Serves and calls connections that end in every way. What the server saw, and when, is in a file for each.
const ENDS: &str = r#"
import os, select, socket, socketserver, struct, sys, time
home = sys.argv[2]

def saw(name, what):
    with open(os.path.join(home, name + ".new"), "w") as file: file.write("%s %f" % (what, time.time()))
    os.rename(os.path.join(home, name + ".new"), os.path.join(home, name))

def seen(name):
    end = time.monotonic() + 10
    while not os.path.exists(os.path.join(home, name)):
        assert time.monotonic() < end, name + " never happened"
        time.sleep(0.01)
    what, when = open(os.path.join(home, name)).read().split()
    os.remove(os.path.join(home, name))
    return what, float(when)

def reset(peer):
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()

class Server(socketserver.BaseRequestHandler):
    def handle(self):
        peer = self.request
        line = b""
        while not line.endswith(b"\n"): line += peer.recv(1)
        if line.startswith(b"GET /"):
            while not line.endswith(b"\r\n\r\n"): line += peer.recv(1)
            if line.startswith(b"GET /slow"):
                time.sleep(1)
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nslow")
            else:
                assert peer.recv(1) == b""
                saw("left", "closed")
            return
        command, _, name = line[1:].decode().strip().partition(" ")
        if command == "echo":
            while True:
                some = peer.recv(1000)
                if not some: return
                peer.sendall(some)
        if command == "reset": return reset(peer)
        if command in ("half", "both"):
            peer.shutdown(socket.SHUT_WR)
            return saw(name, b"".join(iter(lambda: peer.recv(1000), b"")).decode() or "end")
        peer.sendall(b"ready")
        poll = select.poll()
        if command == "end":
            assert peer.recv(1) == b""
            saw(name, "end")
        # Errors are reported whatever is asked for.
        poll.register(peer, 0)
        while not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(10000)): pass
        saw(name, "reset")

class Threads(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True

def connect(command):
    peer = socket.create_connection(("ends", 9000), timeout=20)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.sendall(command)
    return peer

def ready(command):
    peer = connect(command)
    assert peer.recv(5) == b"ready"
    return peer

def to_end(peer):
    return b"".join(iter(lambda: peer.recv(65536), b""))

def call():
    # Who has only finished speaking gets every answer.
    for requests in 1, 3:
        peer = connect(b"GET /slow HTTP/1.1\r\nHost: ends\r\n\r\n" * requests)
        peer.shutdown(socket.SHUT_WR)
        answers = to_end(peer)
        assert answers.count(b"HTTP/1.1 200") == answers.count(b"slow") == requests, answers
    # Who has left is noticed, and not before.
    peer = connect(b"GET /wait HTTP/1.1\r\nHost: ends\r\n\r\n")
    peer.shutdown(socket.SHUT_WR)
    time.sleep(1)
    closed = time.time()
    peer.close()
    what, when = seen("left")
    assert what == "closed" and 0 <= when - closed < 3, (what, when - closed)
    # A reset is a reset, within a tenth of a second in the best of some tries.
    def best(one): return min(one() for _ in range(3))
    def of_open():
        peer = ready(b"\0wait open\n")
        start = time.time()
        reset(peer)
        what, when = seen("open")
        assert what == "reset"
        return when - start
    def of_ended():
        peer = ready(b"\0end ended\n")
        peer.shutdown(socket.SHUT_WR)
        assert seen("ended")[0] == "end"
        start = time.time()
        reset(peer)
        what, when = seen("ended")
        assert what == "reset"
        return when - start
    def of_server():
        start = time.time()
        peer = connect(b"\0reset\n")
        try:
            peer.recv(1)
            raise AssertionError("no reset")
        except ConnectionResetError: return time.time() - start
    took = [best(one) for one in (of_open, of_ended)]
    assert max(took) <= 0.1, took
    # With the connection's making, and the silence before an undeclared server is asked.
    assert best(of_server) <= 0.3
    # The server's side ends first, and the client goes on speaking; both end at once.
    peer = connect(b"\0half half\n")
    assert to_end(peer) == b""
    peer.sendall(b"later")
    peer.shutdown(socket.SHUT_WR)
    assert seen("half")[0] == "later"
    peer = connect(b"\0both both\n")
    peer.shutdown(socket.SHUT_WR)
    assert to_end(peer) == b"" and seen("both")[0] == "end"
    # Urgent bytes stay in their place.
    peer = connect(b"\0echo\n")
    for _ in range(10):
        peer.sendall(b"before")
        peer.send(b"!", socket.MSG_OOB)
        peer.sendall(b"behind")
        back = b""
        while len(back) < 13: back += peer.recv(100)
        assert back == b"before!behind", back
    peer.shutdown(socket.SHUT_WR)
    assert to_end(peer) == b""
    print("all ended as they should; resets arrived after %.1f and %.1f ms" % tuple(1000 * it for it in took))

Threads(("0.0.0.0", 9000), Server).serve_forever() if sys.argv[1] == "serve" else call()
"#;

/// Sends much to readers that pause until every window is shut: bytes and HTTP/1, both ways.
const PAUSE: &str = r#"
import hashlib, socket, socketserver, sys, threading, time
pause, size = float(sys.argv[2]), 64 << 20
block = hashlib.shake_256(b"block").digest(1 << 20)
whole = hashlib.sha256(block * (size >> 20)).hexdigest().encode()

def line(peer):
    text = b""
    while not text.endswith(b"\n"): text += peer.recv(1)
    return text

def head(peer):
    text = line(peer)
    while not text.endswith(b"\r\n\r\n"): text += peer.recv(1)
    return text

def send(peer):
    for _ in range(size >> 20): peer.sendall(block)

def receive(peer):
    time.sleep(pause)
    digest, left = hashlib.sha256(), size
    while left:
        some = peer.recv(min(left, 65536))
        assert some, "ended early, %d missing" % left
        digest.update(some)
        left -= len(some)
    assert digest.hexdigest().encode() == whole
    return whole

class Server(socketserver.BaseRequestHandler):
    def handle(self):
        peer = self.request
        command = line(peer)
        if command.startswith((b"GET", b"PUT")): head(peer)
        if command.startswith(b"GET"): peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        if command.startswith((b"GET", b"\0give")): send(peer)
        elif command.startswith(b"PUT"): peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n" + receive(peer))
        else: peer.sendall(receive(peer))

class Threads(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True

failed = []
def one(command):
    try:
        peer = socket.create_connection(("pause", 9000))
        peer.sendall(command)
        if command.startswith(b"GET"): assert b" 200 " in head(peer)
        if command.startswith((b"GET", b"\0give")): return receive(peer)
        send(peer)
        if command.startswith(b"PUT"): assert b" 200 " in head(peer)
        back = b""
        while len(back) < 64: back += peer.recv(64)
        assert back == whole
    except BaseException as error: failed.append((command, repr(error)))

def call():
    http = b" / HTTP/1.1\r\nHost: pause\r\nContent-Length: %d\r\n\r\n"
    commands = [b"\0give\n", b"\0take\n", b"GET" + http % 0, b"PUT" + http % size]
    threads = [threading.Thread(target=one, args=[command]) for command in commands]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not failed, failed
    print("every byte arrived")

Threads(("0.0.0.0", 9000), Server).serve_forever() if sys.argv[1] == "serve" else call()
"#;
