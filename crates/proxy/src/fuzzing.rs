//! Fuzz targets of what the proxy reads: one input each, and everything that must hold of it. They lie beside what they
//! check. See `fuzz/README.md`.

mod hello;

pub use crate::dns::fuzzing::{answer, question};
pub use crate::h1::fuzzing::{authority, chunks, path, request, response};
pub use crate::h2::fuzzing::{conversation, fields};
pub use crate::sync::fuzzing::{discovery, kept};
pub use crate::upstream::tls::fuzzing::leaf;
pub use hello::hello;

#[cfg(test)]
mod tests {
    use sheer_fuzzing::replay;

    macro_rules! replays {
        ($($target:ident)*) => { $(#[test] fn $target() { replay(stringify!($target), super::$target); })* };
    }

    replays! { answer authority chunks conversation discovery fields hello kept leaf path question request response }
}
