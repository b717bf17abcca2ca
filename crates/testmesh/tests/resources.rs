//! Bodies larger than memory, with a reader slower than the network: they pass, and the proxies stay as small as they were.
//!
//! `make resources` runs the same with 4 GiB each way at 10 MB/s.

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Pid;
use sheer_testmesh::mesh::{Control, PATIENCE, Workload};
use sheer_testmesh::net::{Net, beside};
use sheer_testmesh::program::Processes;
use sheer_testmesh::wait;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// By how much a proxy may grow meanwhile.
const GROWTH: u64 = 16 * MIB;

const PORT: u16 = 8080;
const DOOR: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 9000);

/// A figure of the long form, or the short one's.
fn figure(variable: &str, short: u64) -> Result<u64> {
    match std::env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable}={text}")),
        Err(_) => Ok(short),
    }
}

/// The byte at a place of a body: no two neighbouring blocks of any usual size are alike.
fn byte_at(place: u64) -> u8 {
    (place ^ place >> 8 ^ place >> 16 ^ place >> 24).to_le_bytes()[0]
}

fn block_at(place: u64, block: &mut [u8]) {
    block.iter_mut().zip(place..).for_each(|(byte, place)| *byte = byte_at(place));
}

/// Writes a body, or what a reader leaves of it.
fn write_body(stream: &mut TcpStream, size: u64) -> Result<()> {
    let mut block = [0; 65536];
    for place in (0..size).step_by(block.len()) {
        let count = (size - place).min(block.len() as u64) as usize;
        block_at(place, &mut block[..count]);
        stream.write_all(&block[..count])?;
    }
    Ok(())
}

/// Reads a body at no more than this rate, and compares each byte.
fn read_body(stream: &mut impl Read, size: u64, bytes_a_second: u64) -> Result<()> {
    let (begin, mut place) = (Instant::now(), 0);
    let (mut block, mut expected) = ([0; 65536], [0; 65536]);
    while place < size {
        let count = stream.read(&mut block)?;
        ensure!(count > 0, "cut off after {place} of {size} bytes");
        block_at(place, &mut expected[..count]);
        ensure!(block[..count] == expected[..count], "other bytes than were sent, from {place} on");
        place += count as u64;
        let due = begin + Duration::from_secs_f64(place as f64 / bytes_a_second as f64);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    ensure!(place == size, "{place} bytes instead of {size}");
    Ok(())
}

/// The lines of a head; the rest stays in the reader.
fn head(reader: &mut impl BufRead) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        ensure!(reader.read_line(&mut line)? > 0, "closed in the head after {lines:?}");
        match line.trim_end() {
            "" => return Ok(lines),
            line => lines.push(line.to_owned()),
        }
    }
}

/// Answers GET with a body and reads that of POST, slowly.
fn serve(stream: TcpStream, size: u64, rate: u64) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    loop {
        let request = head(&mut reader)?;
        if request[0].starts_with("POST") {
            read_body(&mut reader, size, rate)?;
            writer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
        } else if request[0].starts_with("GET /body") {
            write!(writer, "HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n")?;
            write_body(&mut writer, size)?;
        } else {
            writer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
        }
    }
}

/// A request; the reader stands behind the head of its answer.
fn ask(request: &str, size: Option<u64>) -> Result<BufReader<TcpStream>> {
    let mut stream = TcpStream::connect(DOOR)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.write_all(request.as_bytes())?;
    if let Some(size) = size {
        write_body(&mut stream, size)?;
    }
    let mut reader = BufReader::new(stream);
    let answer = head(&mut reader)?;
    ensure!(answer[0].starts_with("HTTP/1.1 200"), "{answer:?}");
    Ok(reader)
}

/// Bytes that a process holds and no file does.
fn memory(process: Pid) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024)
}

#[test]
fn bodies_larger_than_memory_pass_both_ways() -> Result<()> {
    let size = figure("SHEER_BODY_MIB", 128)? * MIB;
    let rate = figure("SHEER_BODY_MB_A_SECOND", 40)? * 1_000_000;
    let net = Net::new()?;
    let home = net.directory();
    let host = net.host("host")?;
    let control = Control::start(&host, &home.join("control"))?;
    let web = Workload::new(&host, "web", home)?
        .flags(&["--port", &format!("{PORT}/http"), "--user", "root"])
        .start(&["sleep", "infinity"])?;
    let client = Workload::new(&host, "client", home)?
        .flags(&["--capture", "none", "--upstream", "127.0.0.1:9000=web:80", "--user", "root"])
        .start(&["sleep", "infinity"])?;
    let processes = |supervisor: Pid| wait::until("it runs", PATIENCE, || Processes::of(supervisor));
    let (web, client) = (processes(web.pid())?, processes(client.pid())?);
    let listener = beside(web.keeper, || Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // It ends with its client.
            std::thread::spawn(move || serve(stream, size, rate));
        }
    });
    control.serves("web", 1)?;
    let small = "GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n";
    wait::until("it answers", PATIENCE, || host.inside(|| ask(small, None).map(drop)))?;

    let before = [memory(client.proxy)?, memory(web.proxy)?];
    let up = format!("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: {size}\r\n\r\n");
    let down = "GET /body HTTP/1.1\r\nHost: web\r\n\r\n";
    let peak = std::thread::scope(|scope| -> Result<[u64; 2]> {
        let ways = [
            scope.spawn(|| host.inside(|| ask(&up, Some(size)).map(drop)).context("up")),
            scope.spawn(|| host.inside(|| read_body(&mut ask(down, None)?, size, rate)).context("down")),
        ];
        let mut peak = before;
        while !ways.iter().all(|way| way.is_finished()) {
            for (peak, process) in peak.iter_mut().zip([client.proxy, web.proxy]) {
                *peak = memory(process)?.max(*peak);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        for way in ways {
            match way.join() {
                Ok(passed) => passed?,
                Err(_) => bail!("a client panicked"),
            }
        }
        Ok(peak)
    })?;
    for (side, (before, peak)) in ["client", "web"].iter().zip(before.iter().zip(peak)) {
        let grown = (peak - before) as f64 / MIB as f64;
        eprintln!("{side}: {:.1} MiB before, grown by at most {grown:.1} MiB", *before as f64 / MIB as f64);
        ensure!(peak - before <= GROWTH, "the proxy of {side} grew by {grown:.1} MiB");
    }
    Ok(())
}
