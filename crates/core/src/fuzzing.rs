//! Fuzz targets of what is decided here: one input each, and everything that must hold of it. See `fuzz/README.md`.

mod config;
mod sniff;
mod wire;

pub use config::config;
pub use sniff::sniff;
pub use wire::wire;

#[cfg(test)]
mod tests {
    use sheer_fuzzing::replay;

    #[test]
    fn config() {
        replay("config", super::config);
    }

    #[test]
    fn sniff() {
        replay("sniff", super::sniff);
    }

    #[test]
    fn wire() {
        replay("wire", super::wire);
    }
}
