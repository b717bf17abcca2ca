//! What the measuring clients share.

pub mod http1;
pub mod latency;
pub mod pace;
pub mod tls;

/// Ends the program with what was asked of its arguments.
pub fn usage(text: &str) -> ! {
    eprintln!("usage: {text}");
    std::process::exit(2);
}
