//! What a client may take of a proxy: connections, memory, series of metrics.

use super::*;
use crate::overload::memory::{Level, Memory};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A proxy under these limits, with a door for anybody before an application.
async fn limited(descriptors: usize, memory: Option<Memory>) -> (Beside, SocketAddr) {
    let port = application("hello").await;
    let mut web = beside(&Authority::new("mesh.internal"), "web", &[port], Mode::Strict);
    let old = &web.proxy;
    let proxy = Arc::new(Proxy {
        plan: old.plan.clone(),
        snapshot: old.snapshot.clone(),
        demand: old.demand.clone(),
        credentials: old.credentials.clone(),
        metrics: old.metrics.clone(),
        endpoints: old.endpoints.clone(),
        overload: Overload::new(old.metrics.clone(), descriptors, memory),
        drain: old.drain.clone(),
        inside: None,
        listening: None,
        clients: old.clients.clone(),
    });
    web.worker = Rc::new(Worker::new(proxy.clone(), None).unwrap());
    web.proxy = proxy;
    let door = web.door(Traffic::Published(port)).await;
    (web, door)
}

impl Beside {
    fn sample(&self, name: &str) -> u64 {
        let text = self.proxy.metrics.exposition();
        let found = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        found.unwrap_or_default()
    }
}

/// Asks over a connection that is kept; whether it was answered.
async fn ask(stream: &mut TcpStream) -> bool {
    if stream.write_all(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n").await.is_err() {
        return false;
    }
    let mut answer = Vec::new();
    while !answer.ends_with(b"hello\n") {
        match stream.read_buf(&mut answer).await {
            Ok(0) | Err(_) => return false,
            Ok(_) if answer.len() > 12 && !answer.starts_with(b"HTTP/1.1 200") => return false,
            Ok(_) => {}
        }
    }
    true
}

async fn is_served(door: SocketAddr) -> bool {
    // The reset of who has no room may come before the connect is told of.
    match TcpStream::connect(door).await {
        Ok(mut stream) => ask(&mut stream).await,
        Err(_) => false,
    }
}

#[tokio::test]
async fn descriptors_are_never_used_up_and_who_is_served_stays_served() {
    let test = async {
        // (64 - 16) / 2, less one for the other direction.
        let (web, door) = limited(64, None).await;
        let mut victim = TcpStream::connect(door).await.unwrap();
        assert!(ask(&mut victim).await);
        let mut attackers = Vec::new();
        for _ in 0..100 {
            if let Ok(mut stream) = TcpStream::connect(door).await {
                let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: w").await;
                attackers.push(stream);
            }
        }
        let refused = "sheer_connections_refused_total{reason=\"overloaded\"}";
        until("all are judged", || web.sample(refused) == 100 - 22).await;
        assert_eq!((web.sample("sheer_clients_open"), web.sample("sheer_clients_limit")), (23, 24));
        assert!(!is_served(door).await);
        assert!(ask(&mut victim).await);
        drop(attackers);
        let recovered = async {
            while !is_served(door).await {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(1), recovered).await.expect("served within a second");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn idle_connections_make_room_for_new_ones() {
    let test = async {
        let (web, door) = limited(64, None).await;
        let mut idle = Vec::new();
        for _ in 0..23 {
            let mut stream = TcpStream::connect(door).await.unwrap();
            assert!(ask(&mut stream).await);
            idle.push(stream);
        }
        // They have just been answered: another request of theirs may be on its way.
        assert!(!is_served(door).await);
        let served = async {
            while !is_served(door).await {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), served).await.expect("room is made");
        let shed = web.sample("sheer_connections_shed_total{what=\"idle\"}");
        assert!((1..=16).contains(&shed), "{shed}");
        let mut left = 0;
        for stream in &mut idle {
            left += u64::from(ask(stream).await);
        }
        assert_eq!(left, 23 - shed);
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn memory_that_ends_is_shed_from_the_youngest_on() {
    let test = async {
        const LIMIT: u64 = 64 << 20;
        let held = Arc::new(AtomicU64::new(10 << 20));
        let (web, _) = limited(1024, Some(Memory::told(held.clone(), LIMIT))).await;
        let open = Open::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let door = listener.local_addr().unwrap();
        let published = Traffic::Published(web.proxy.plan.ports[0].port);
        spawn_local(accept(web.worker.clone(), listener, published, open.clone()));
        spawn_local(crate::listen::keep_within_memory(web.worker.clone(), open));
        let mut clients = Vec::new();
        for _ in 0..64 {
            let mut stream = TcpStream::connect(door).await.unwrap();
            assert!(ask(&mut stream).await);
            // In use, so that it does not go for being idle.
            stream.write_all(b"GET / HT").await.unwrap();
            clients.push(stream);
        }
        held.store(LIMIT * 7 / 10, Relaxed);
        until("it is pressed", || web.proxy.overload.level() == Level::Pressed).await;
        assert!(!is_served(door).await, "nothing new is begun");
        assert_eq!(web.sample("sheer_clients_open"), 64, "what was begun goes on");
        held.store(LIMIT * 9 / 10, Relaxed);
        until("some are ended", || web.sample("sheer_connections_shed_total{what=\"youngest\"}") >= 4).await;
        until("the few that are left are served", || web.sample("sheer_clients_open") <= 32).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(web.sample("sheer_clients_open") > 16);
        let mut anew = TcpStream::connect(door).await.unwrap();
        assert!(ask(&mut anew).await, "memory that does not come back keeps nobody out for ever");
        held.store(LIMIT / 10, Relaxed);
        until("it is calm", || web.proxy.overload.level() == Level::Calm).await;
        let mut first = clients.remove(0);
        first.write_all(b"TP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        first.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let mut last = clients.pop().unwrap();
        assert!(!matches!(last.read(&mut [0]).await, Ok(1..)), "the youngest was ended");
        assert!(is_served(door).await);
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn who_is_full_is_asked_last() {
    let test = async {
        let port = application("hello").await;
        let ca = Authority::new("mesh.internal");
        let (full, free) = (beside(&ca, "web", &[port], Mode::Strict), beside(&ca, "web", &[port], Mode::Strict));
        let doors = [full.door(Traffic::Inbound).await, free.door(Traffic::Inbound).await];
        let api = beside(&ca, "api", &[], Mode::Strict);
        api.knows("default/web", Protocol::Http, &doors.map(|door| (door, port)));
        let door = api.door(upstream("web")).await;
        // Both are connected to before one of them fills.
        let both = |side: &Beside| side.sample("sheer_clients_open") > 0;
        while !(both(&full) && both(&free)) {
            assert!(get(door, "/").await.starts_with("HTTP/1.1 200"));
        }
        full.proxy.overload.set_level(Level::Pressed);
        let refused = || full.counted().iter().any(|(_, _, reason, _)| reason == "overloaded");
        let asked = async {
            while !refused() {
                let answer = get(door, "/").await;
                assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            }
        };
        tokio::time::timeout(Duration::from_secs(10), asked).await.expect("it is asked at last");
        free.proxy.overload.set_level(Level::Pressed);
        let answer = get(door, "/").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("x-sheer-reason: overloaded;"), "{answer}");
    };
    LocalSet::new().run_until(test).await;
}

/// Whatever callers and applications choose freely is no label.
#[tokio::test]
async fn series_do_not_grow_with_what_callers_invent() {
    let test = async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        // Answers with every status there is, in turn.
        spawn_local(async move {
            let status = Rc::new(Cell::new(200));
            while let Ok((mut stream, _)) = listener.accept().await {
                let status = status.clone();
                spawn_local(async move {
                    let mut head = Vec::new();
                    while stream.read_buf(&mut head).await.unwrap_or(0) > 0 {
                        if head.ends_with(b"\r\n\r\n") {
                            head.clear();
                            let next = if status.get() == 999 { 200 } else { status.get() + 1 };
                            let answer = format!("HTTP/1.1 {} X\r\nContent-Length: 0\r\n\r\n", status.replace(next));
                            if stream.write_all(answer.as_bytes()).await.is_err() {
                                return;
                            }
                        }
                    }
                });
            }
        });
        let (api, web, door) = two(Protocol::Http, port).await;
        let mut stream = TcpStream::connect(door).await.unwrap();
        let mut answer = Vec::new();
        for number in 0..2000 {
            let request = format!(
                "M{number} /{number}/{{}}?q={number} HTTP/1.1\r\nHost: h{number}.example\r\nUser-Agent: u{number}\r\n\
                 X-Request-Id: {number}\r\ngrpc-status: {number}\r\n\r\n"
            );
            stream.write_all(request.as_bytes()).await.unwrap();
            answer.clear();
            while !answer.ends_with(b"\r\n\r\n") {
                assert!(stream.read_buf(&mut answer).await.unwrap() > 0, "{}", String::from_utf8_lossy(&answer));
            }
        }
        for side in [&api, &web] {
            let text = side.proxy.metrics.exposition();
            let series = text.lines().filter(|line| !line.starts_with('#')).count();
            assert!(series < 400, "{series} series:\n{text}");
            assert!(!text.contains("h7.example") && !text.contains("M7"));
        }
    };
    LocalSet::new().run_until(test).await;
}
