//! Copies bytes between a listening port and another and looks at nothing: the floor of a user-space hop.
//! Usage: forwarder PORT UPSTREAM-PORT
use tokio::net::{TcpListener, TcpStream};

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let mut ports = std::env::args().skip(1).filter_map(|text| text.parse::<u16>().ok());
    let (Some(port), Some(upstream)) = (ports.next(), ports.next()) else {
        panic!("usage: forwarder PORT UPSTREAM-PORT");
    };
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    loop {
        let (mut near, _) = listener.accept().await?;
        tokio::spawn(async move {
            let mut far = TcpStream::connect(("127.0.0.1", upstream)).await?;
            near.set_nodelay(true)?;
            far.set_nodelay(true)?;
            tokio::io::copy_bidirectional(&mut near, &mut far).await
        });
    }
}
