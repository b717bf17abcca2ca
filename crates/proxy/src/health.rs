//! Which of the workload's declared ports are ready.
//!
//! A port is ready when something listens on it, seen in the kernel's tables: nothing is connected to, so that an
//! application sees no connection that nobody made. With `--health PATH` the first HTTP port must also answer a GET of
//! that path with a status below 400.

use crate::capture::listening::Ports;
use crate::capture::netns::AttachedSource;
use crate::plan::{PlannedPort, Protocol};
use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;

/// How often is looked while a declared port is not ready, and when all are.
const SOON: Duration = Duration::from_millis(100);
const LATER: Duration = Duration::from_millis(250);

/// How often a passing probe is repeated, how long one may take, and how many in a row must fail.
const PROBE_AGAIN: Duration = Duration::from_secs(1);
const PROBE_LASTS: Duration = Duration::from_secs(1);
const PROBE_FAILURES: u32 = 3;

/// Looks after the declared ports.
pub struct Watcher {
    tables: Ports,
    declared: Vec<u16>,
    probe: Option<Probe>,
    ready: watch::Sender<BTreeSet<u16>>,
}

struct Probe {
    port: u16,
    path: String,
    inside: Option<AttachedSource>,
    passing: bool,
    failures: u32,
    next: tokio::time::Instant,
}

impl Watcher {
    /// A watcher of these ports. `inside` makes sockets in the workload's namespace, where it has one of its own.
    pub fn new(
        tables: Ports,
        ports: &[PlannedPort],
        health: Option<&str>,
        inside: Option<AttachedSource>,
        ready: watch::Sender<BTreeSet<u16>>,
    ) -> Self {
        let http = |it: &&PlannedPort| matches!(it.protocol, Protocol::Detect | Protocol::Http);
        let probe = health.zip(ports.iter().find(http)).map(|(path, port)| Probe {
            port: port.port,
            path: path.to_owned(),
            inside,
            passing: false,
            failures: 0,
            next: tokio::time::Instant::now(),
        });
        Self { tables, declared: ports.iter().map(|it| it.port).collect(), probe, ready }
    }

    /// Whether what the health path said before is taken for well until it fails several times.
    pub fn trusting(mut self, well: bool) -> Self {
        if let Some(probe) = &mut self.probe {
            probe.passing = well;
        }
        self
    }

    /// Looks until the future is dropped.
    pub async fn run(mut self) {
        if self.declared.is_empty() {
            return std::future::pending().await;
        }
        loop {
            let mut ready = BTreeSet::new();
            match self.tables.look() {
                Ok(listening) => {
                    ready.extend(self.declared.iter().copied().filter(|port| listening.contains(*port)));
                    if let Some(probe) = &mut self.probe
                        && let Some(address) = listening.address(probe.port)
                        && !probe.passes(address).await
                    {
                        ready.remove(&probe.port);
                    }
                }
                Err(error) => tracing::warn!(%error, "cannot read which ports listen"),
            }
            let all = ready.len() == self.declared.len();
            self.ready.send_if_modified(|before| {
                let changed = *before != ready;
                *before = ready;
                changed
            });
            tokio::time::sleep(if all { LATER } else { SOON }).await;
        }
    }
}

impl Probe {
    /// Whether the path answers, as of the last few times.
    async fn passes(&mut self, address: IpAddr) -> bool {
        let now = tokio::time::Instant::now();
        if self.passing && now < self.next {
            return true;
        }
        self.next = now + PROBE_AGAIN;
        let answered = tokio::time::timeout(PROBE_LASTS, self.ask((address, self.port).into())).await;
        if answered.is_ok_and(|status| status.is_ok_and(|status| (100..400).contains(&status))) {
            (self.passing, self.failures) = (true, 0);
        } else {
            self.failures += 1;
            self.passing &= self.failures < PROBE_FAILURES;
        }
        self.passing
    }

    async fn ask(&self, address: SocketAddr) -> io::Result<u16> {
        let mut stream = match &self.inside {
            Some(inside) => inside.connect(address).await?,
            None => TcpStream::connect(address).await?,
        };
        let (path, port) = (&self.path, self.port);
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\nUser-Agent: sheer-health\r\nAccept: */*\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        // "HTTP/1.1 200": the rest does not matter.
        let mut start = [0; 12];
        stream.read_exact(&mut start).await?;
        let status = start.strip_prefix(b"HTTP/1.").and_then(|rest| rest.get(2..)).unwrap_or_default();
        std::str::from_utf8(status).ok().and_then(|it| it.parse().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    fn watch_port(port: u16, health: Option<&str>) -> (watch::Receiver<BTreeSet<u16>>, tokio::task::JoinHandle<()>) {
        let (sender, receiver) = watch::channel(BTreeSet::new());
        let ports = [PlannedPort { port, protocol: Protocol::Http }];
        let watcher = Watcher::new(Ports::here().unwrap(), &ports, health, None, sender);
        (receiver, tokio::spawn(watcher.run()))
    }

    async fn becomes(ready: &mut watch::Receiver<BTreeSet<u16>>, expected: &[u16]) {
        let expected: BTreeSet<u16> = expected.iter().copied().collect();
        let wait = ready.wait_for(|it| *it == expected);
        tokio::time::timeout(Duration::from_secs(20), wait).await.expect("within 20 s").unwrap();
    }

    #[tokio::test]
    async fn a_port_is_ready_while_something_listens() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (mut ready, task) = watch_port(listener.local_addr().unwrap().port(), None);
        let port = listener.local_addr().unwrap().port();
        becomes(&mut ready, &[port]).await;
        drop(listener);
        becomes(&mut ready, &[]).await;
        task.abort();
    }

    #[tokio::test]
    async fn a_health_path_must_answer_well() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (status, answered) = watch::channel("503 Unavailable");
        let (asked, mut times) = watch::channel(0);
        let server = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = vec![0; 1024];
                let length = stream.read(&mut request).await.unwrap();
                assert!(request[..length].starts_with(b"GET /healthz HTTP/1.1\r\n"));
                let answer = format!("HTTP/1.1 {}\r\nContent-Length: 0\r\n\r\n", *answered.borrow());
                stream.write_all(answer.as_bytes()).await.unwrap();
                asked.send_modify(|times| *times += 1);
            }
        });
        let (mut ready, task) = watch_port(port, Some("/healthz"));
        times.wait_for(|it| *it >= 2).await.unwrap();
        assert!(ready.borrow().is_empty());
        status.send_replace("200 OK");
        becomes(&mut ready, &[port]).await;
        status.send_replace("500 Broken");
        becomes(&mut ready, &[]).await;
        task.abort();
        server.abort();
    }
}
