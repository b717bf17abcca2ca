//! Returns each line it gets, over TCP.
//!
//! When it is asked to stop it adds a line `BYE` after the next echo and waits for its client to close, so that no line
//! is lost on the way.

use crate::server;
use std::future::Future;
use std::io::Result;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What tells a client to close its connection and open another one.
pub(crate) const BYE: &[u8] = b"BYE\n";

pub(crate) async fn serve(listener: TcpListener, stop: impl Future<Output = ()>) {
    server::connections(listener, stop, async |stream, ending| drop(connection(stream, ending).await)).await;
}

async fn connection(stream: TcpStream, ending: watch::Receiver<bool>) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    let mut said_bye = false;
    let mut line = Vec::new();
    loop {
        line.clear();
        if stream.read_until(b'\n', &mut line).await? == 0 {
            return Ok(());
        }
        if !said_bye && *ending.borrow() {
            said_bye = true;
            line.extend_from_slice(BYE);
        }
        stream.get_mut().write_all(&line).await?;
    }
}
