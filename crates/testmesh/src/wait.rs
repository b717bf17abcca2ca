//! Waiting on conditions with a limit, instead of sleeping and hoping.

use anyhow::{Context, Result, bail};
use std::time::{Duration, Instant};

/// How often a condition is looked at.
const PERIOD: Duration = Duration::from_millis(20);

/// Looks at a condition until it holds, and returns what it gave.
///
/// # Errors
/// The last failure, when it does not hold within the limit.
pub fn until<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match condition() {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() > limit => {
                return Err(error).with_context(|| format!("not within {limit:?}: {what}"));
            }
            Err(_) => std::thread::sleep(PERIOD),
        }
    }
}

/// Holds when the flag does.
///
/// # Errors
/// When it does not hold within the limit.
pub fn until_true(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) -> Result<()> {
    until(what, limit, || if condition() { Ok(()) } else { bail!("it does not hold") })
}
