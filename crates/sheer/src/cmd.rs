//! The verbs of the command line, one file each.

use std::ffi::{OsStr, OsString};
use std::process::ExitCode;

/// Runs one of the hidden commands that only our own processes start; `None` for any other name.
pub(crate) fn hidden(_name: &OsStr, _arguments: &[OsString]) -> Option<anyhow::Result<ExitCode>> {
    None
}
