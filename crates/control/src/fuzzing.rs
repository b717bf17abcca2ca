//! Fuzz targets of what the control plane reads of proxies: one input each, and everything that must hold of it. See
//! `fuzz/README.md`.

mod csr;

pub use csr::csr;

#[cfg(test)]
mod tests {
    #[test]
    fn csr() {
        sheer_fuzzing::replay("csr", super::csr);
    }
}
