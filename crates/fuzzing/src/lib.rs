//! What fuzz targets share.
//!
//! A target is a function of one input that panics when something does not hold. It lies beside what it checks, in a
//! module `fuzzing` that only tests and the feature `fuzzing` have. libFuzzer calls it (`make fuzz`), and an ordinary
//! test calls [`replay`], which plays the kept corpus, all inputs that ever failed, and mutations of both.

mod choices;
mod replay;

pub use choices::Choices;
pub use replay::replay;
