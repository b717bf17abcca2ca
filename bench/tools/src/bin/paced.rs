//! Asks at a fixed rate and measures each answer from when it was to be asked for (see `pace`).
//! Usage: paced h1|h2|tcp PORT RATE SECONDS CONNECTIONS [EVERY TURNOVER]
//! Prints a line of JSON: answers, latencies, failures, and what was not answered a second after the end. With EVERY a
//! line each so many seconds; with TURNOVER a connection is replaced after so many requests. A request of `tcp` is
//! 64 KiB, down or up in turn.
use bytes::Bytes;
use sheer_bench_tools::latency::Latencies;
use sheer_bench_tools::pace::Schedule;
use sheer_bench_tools::{http1, usage};
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

type Failure = Box<dyn std::error::Error>;

const USAGE: &str = "paced h1|h2|tcp PORT RATE SECONDS CONNECTIONS [EVERY TURNOVER]";
const STREAMS: u64 = 8;
const CHUNK: usize = 64 * 1024;

/// What one connection works by.
#[derive(Clone)]
struct Work {
    port: u16,
    schedule: Rc<Schedule>,
    latencies: Rc<Latencies>,
    turnover: u64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let given: Vec<String> = std::env::args().skip(1).collect();
    let number = |place: usize| given.get(place).and_then(|text| text.parse::<u64>().ok());
    let (Some(protocol), Some(port), Some(rate), Some(seconds), Some(connections)) =
        (given.first().cloned(), number(1), number(2), number(3), number(4))
    else {
        usage(USAGE);
    };
    let (schedule, latencies) = (Rc::new(Schedule::new(rate)), Rc::new(Latencies::default()));
    let turnover = number(6).unwrap_or(u64::MAX);
    let work = Work { port: port as u16, schedule: schedule.clone(), latencies: latencies.clone(), turnover };
    let tasks = tokio::task::LocalSet::new();
    for place in 0..connections {
        tasks.spawn_local(keep_asking(protocol.clone(), place % 2 == 0, work.clone()));
    }
    tasks
        .run_until(async {
            match number(5) {
                Some(every) => report_every(&schedule, &latencies, every, seconds).await,
                None => report_once(&schedule, &latencies, seconds).await,
            }
        })
        .await
}

async fn report_once(schedule: &Schedule, latencies: &Latencies, seconds: u64) -> std::io::Result<()> {
    let time = Duration::from_secs(seconds);
    schedule.run(time).await?;
    let end = Instant::now() + Duration::from_secs(1);
    while latencies.done() < schedule.issued() && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    println!("{}", latencies.report(schedule.issued() - latencies.done(), time));
    Ok(())
}

async fn report_every(schedule: &Schedule, latencies: &Latencies, every: u64, seconds: u64) -> std::io::Result<()> {
    let reports = async {
        let (mut done, each) = (0, Duration::from_secs(every));
        let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + each, each);
        loop {
            ticks.tick().await;
            done += latencies.done();
            println!("{}", latencies.report(schedule.issued() - done, each));
        }
    };
    tokio::select! {
        ended = schedule.run(Duration::from_secs(seconds)) => ended,
        () = reports => Ok(()),
    }
}

async fn keep_asking(protocol: String, first: bool, work: Work) {
    loop {
        let ended = match protocol.as_str() {
            "h1" => ask_http1(&work).await,
            "h2" => ask_http2(&work).await,
            "tcp" if first => download(&work).await,
            "tcp" => upload(&work).await,
            _ => usage(USAGE),
        };
        if let Err(error) = ended {
            work.latencies.failure(&error);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

async fn connect(work: &Work) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", work.port)).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn ask_http1(work: &Work) -> Result<(), Failure> {
    let mut stream = connect(work).await?;
    let mut buffer = Vec::with_capacity(4096);
    for _ in 0..work.turnover {
        let slot = work.schedule.slot().await;
        http1::ask(&mut stream, &mut buffer).await?;
        work.latencies.answer(slot.elapsed());
    }
    Ok(())
}

async fn ask_http2(work: &Work) -> Result<(), Failure> {
    let (sender, connection) = h2::client::handshake(connect(work).await?).await?;
    let driver = tokio::task::spawn_local(connection);
    let streams = (0..STREAMS).map(|_| tokio::task::spawn_local(call_again(sender.clone(), work.clone())));
    let mut ended = Ok(());
    for stream in streams.collect::<Vec<_>>() {
        ended = ended.and(stream.await.expect("it does not panic"));
    }
    driver.abort();
    Ok(ended?)
}

async fn call_again(mut sender: h2::client::SendRequest<Bytes>, work: Work) -> Result<(), String> {
    for _ in 0..work.turnover.div_ceil(STREAMS) {
        let slot = work.schedule.slot().await;
        call(&mut sender).await.map_err(|error| error.to_string())?;
        work.latencies.answer(slot.elapsed());
    }
    Ok(())
}

async fn call(sender: &mut h2::client::SendRequest<Bytes>) -> Result<(), Failure> {
    let request = http::Request::post("http://bench/echo.Echo/Unary")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", "bench/1.0")
        .body(())?;
    std::future::poll_fn(|context| sender.poll_ready(context)).await?;
    let (response, mut body) = sender.send_request(request, false)?;
    body.send_data(Bytes::from_static(&[b'x'; 64]), true)?;
    let (head, mut body) = response.await?.into_parts();
    let mut length = 0;
    while let Some(data) = body.data().await {
        let data = data?;
        length += data.len();
        body.flow_control().release_capacity(data.len())?;
    }
    let trailers = body.trailers().await?.unwrap_or_default();
    match head.status.is_success() && length == 64 && trailers.get("grpc-status").is_some_and(|code| code == "0") {
        true => Ok(()),
        false => Err(format!("not a good answer: {}, {length} bytes", head.status).into()),
    }
}

async fn download(work: &Work) -> Result<(), Failure> {
    let mut stream = connect(work).await?;
    stream.write_u8(b'D').await?;
    let mut chunk = vec![0; CHUNK];
    for _ in 0..work.turnover {
        let slot = work.schedule.slot().await;
        stream.read_exact(&mut chunk).await?;
        work.latencies.answer(slot.elapsed());
    }
    Ok(())
}

async fn upload(work: &Work) -> Result<(), Failure> {
    let mut stream = connect(work).await?;
    stream.write_u8(b'U').await?;
    let chunk = vec![b'x'; CHUNK];
    for _ in 0..work.turnover {
        let slot = work.schedule.slot().await;
        stream.write_all(&chunk).await?;
        work.latencies.answer(slot.elapsed());
    }
    Ok(())
}
