//! Lines with sequence numbers over TCP, each of which must come back unchanged before the next is sent.

use super::Context;
use super::http1::first_sequence;
use super::tally::Outcome;
use crate::echo::BYE;
use std::io::{Error, ErrorKind};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::sync::watch;

/// One connection after another.
pub(super) async fn lines(context: Context, index: usize, mut stopped: watch::Receiver<bool>) {
    let mut pace = context.pace(index);
    let mut sequence = first_sequence(index);
    let mut link: Option<BufReader<TcpStream>> = None;
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

async fn exchange(context: &Context, link: &mut Option<BufReader<TcpStream>>, sequence: u64) -> Outcome {
    // A server that is going away says so after an answer, or closes between two.
    if let Some(open) = link
        && ended(open)
    {
        *link = None;
    }
    let stream = match link {
        Some(open) => open,
        None => match TcpStream::connect(&context.load.address).await {
            Ok(stream) => {
                let _ = stream.set_nodelay(true);
                link.insert(BufReader::new(stream))
            }
            Err(error) => return Outcome::Connect(format!("{}: {error}", context.load.address)),
        },
    };
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
