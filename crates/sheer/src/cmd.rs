//! The verbs of the command line, one file each.

pub(crate) mod apply;
pub(crate) mod check;
pub(crate) mod clean;
pub(crate) mod control;
pub(crate) mod dashboard;
pub(crate) mod delete;
pub(crate) mod demo;
pub(crate) mod diff;
pub(crate) mod edges;
pub(crate) mod exec;
pub(crate) mod get;
pub(crate) mod identity;
pub(crate) mod lint;
pub(crate) mod proxy;
pub(crate) mod run;
pub(crate) mod sources;
pub(crate) mod stat;
pub(crate) mod token;
pub(crate) mod up;
pub(crate) mod upgrade;

use std::ffi::{OsStr, OsString};
use std::process::ExitCode;

/// Runs one of the hidden commands that only our own processes start; `None` for any other name.
pub(crate) fn hidden(name: &OsStr, arguments: &[OsString]) -> Option<anyhow::Result<ExitCode>> {
    match name.to_str()? {
        "__proxy" => {
            called(c"sheer-proxy");
            Some(proxy::hidden())
        }
        "__keeper" => {
            called(c"sheer-keeper");
            Some(crate::keeper::main(arguments))
        }
        "__namespace" => Some(check::try_namespace()),
        "__demo-child" => Some(demo::become_child(arguments)),
        "__demo-service" => Some(sheer_demo::main(arguments).map(|()| ExitCode::SUCCESS)),
        _ => None,
    }
}

/// What `ps`, `top` and `ss` call this process; it was started through /proc/self/exe and would be `exe`.
fn called(name: &std::ffi::CStr) {
    // Without the name it only reads worse.
    let _ = nix::sys::prctl::set_name(name);
}
