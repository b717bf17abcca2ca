//! Lines with sequence numbers over TCP, each of which must come back unchanged before the next is sent.

use super::Context;
use super::http1::first_sequence;
use super::tally::Outcome;
use crate::echo::BYE;
use std::io::{Error, ErrorKind};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::sync::watch;

/// A connection and how many lines have come back over it.
struct Link {
    stream: BufReader<TcpStream>,
    lines: u64,
}

/// One connection after another.
pub(super) async fn lines(context: Context, index: usize, mut stopped: watch::Receiver<bool>) {
    let mut pace = context.pace(index);
    let mut sequence = first_sequence(index);
    let mut link: Option<Link> = None;
    while pace.next(&mut stopped).await {
        sequence += 1;
        let sent = context.tally.sent();
        let exchange = tokio::time::timeout(context.patience, exchange(&context, &mut link, sequence)).await;
        let outcome = exchange.unwrap_or(Outcome::Late);
        if outcome != Outcome::Ok {
            link = None;
        }
        sent.end(outcome);
    }
}

async fn exchange(context: &Context, link: &mut Option<Link>, sequence: u64) -> Outcome {
    // A server that is going away says so after an answer, or closes between two.
    if let Some(open) = link
        && ended(&mut open.stream)
    {
        *link = None;
    }
    let open = match link {
        Some(open) => open,
        None => match TcpStream::connect(&context.load.address).await {
            Ok(stream) => {
                let _ = stream.set_nodelay(true);
                link.insert(Link { stream: BufReader::new(stream), lines: 0 })
            }
            Err(error) => return Outcome::Connect(format!("{}: {error}", context.load.address)),
        },
    };
    let outcome = echoed(&mut open.stream, sequence).await;
    open.lines += 1;
    if outcome == Outcome::Ok
        && context.load.lines.is_some_and(|most| open.lines >= most)
        && let Some(Link { stream, .. }) = link.take()
    {
        return finish(stream).await;
    }
    outcome
}

/// Sends a line, which must come back as it was.
async fn echoed(stream: &mut BufReader<TcpStream>, sequence: u64) -> Outcome {
    let line = format!("{sequence} abcdefghijklmnopqrstuvwxyz0123456789\n");
    let mut answer = Vec::with_capacity(line.len());
    let result = async {
        stream.get_mut().write_all(line.as_bytes()).await?;
        match stream.read_until(b'\n', &mut answer).await? {
            0 => Err(Error::from(ErrorKind::UnexpectedEof)),
            _ => Ok(()),
        }
    }
    .await;
    match result {
        Err(error) => Outcome::Reset(error.to_string()),
        Ok(()) if answer == line.as_bytes() => Outcome::Ok,
        Ok(()) if !answer.ends_with(b"\n") => Outcome::Short(format!("{} of {} bytes", answer.len(), line.len())),
        Ok(()) => {
            let got = String::from_utf8_lossy(&answer).chars().take(80).collect::<String>();
            Outcome::Reordered(format!("sent line {sequence}, got {got:?}"))
        }
    }
}

/// Ends a connection in order: after the own end must come the server's, and nothing else but its goodbye.
async fn finish(mut stream: BufReader<TcpStream>) -> Outcome {
    let mut rest = Vec::new();
    let result = async {
        stream.get_mut().shutdown().await?;
        stream.read_to_end(&mut rest).await
    }
    .await;
    match result {
        Err(error) => Outcome::Reset(format!("at the end: {error}")),
        Ok(_) if rest.is_empty() || rest == BYE => Outcome::Ok,
        Ok(more) => Outcome::Reordered(format!("{more} bytes after the last line")),
    }
}

/// Whether the server has said goodbye or closed, seen without waiting.
fn ended(stream: &mut BufReader<TcpStream>) -> bool {
    if stream.buffer() == BYE {
        return true;
    }
    let mut bytes = [0; BYE.len()];
    match stream.get_ref().try_read(&mut bytes) {
        Ok(0) => true,
        Ok(length) => bytes.get(..length) == Some(BYE),
        Err(error) => error.kind() != ErrorKind::WouldBlock,
    }
}
