//! Entry point of the `sheer` binary.
fn main() {}
