//! An application that writes down every byte that reaches it, and answers a request with what it was told.

use anyhow::Result;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often it is looked at whether the test is over.
const PERIOD: Duration = Duration::from_millis(5);

/// The running application. It ends when this is dropped.
pub struct Recorder {
    heard: Arc<Heard>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Heard {
    connections: AtomicUsize,
    bytes: Mutex<Vec<u8>>,
    end: AtomicBool,
}

impl Recorder {
    /// Answers on a listener, which is where it was made.
    ///
    /// # Errors
    /// When the listener cannot be waited upon.
    pub fn answer(listener: TcpListener) -> Result<Self> {
        listener.set_nonblocking(true)?;
        let heard = Arc::new(Heard::default());
        let own = heard.clone();
        let thread = std::thread::spawn(move || {
            while !own.end.load(SeqCst) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        own.connections.fetch_add(1, SeqCst);
                        let own = own.clone();
                        std::thread::spawn(move || own.serve(stream));
                    }
                    Err(_) => std::thread::sleep(PERIOD),
                }
            }
        });
        Ok(Self { heard, thread: Some(thread) })
    }

    /// How many bytes it has had, over all connections.
    pub fn bytes(&self) -> usize {
        self.heard.bytes.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// How many connections were made to it.
    pub fn connections(&self) -> usize {
        self.heard.connections.load(SeqCst)
    }

    /// What it has had from the given byte on.
    pub fn since(&self, at: usize) -> String {
        let bytes = self.heard.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(bytes.get(at..).unwrap_or_default()).into_owned()
    }
}

impl Heard {
    /// Every head is answered with itself.
    fn serve(&self, mut stream: TcpStream) {
        let (mut head, mut buffer) = (Vec::new(), [0; 16 * 1024]);
        if stream.set_nonblocking(false).is_err() {
            return;
        }
        while let Ok(read @ 1..) = stream.read(&mut buffer) {
            self.bytes.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..read]);
            head.extend_from_slice(&buffer[..read]);
            if head.windows(4).any(|it| it == b"\r\n\r\n") {
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", head.len());
                if stream.write_all(&[answer.as_bytes(), &head].concat()).is_err() {
                    return;
                }
                head.clear();
            }
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.heard.end.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
