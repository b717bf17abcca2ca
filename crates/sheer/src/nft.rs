//! Calls of `nft`, which applies a whole set of rules or nothing.

use anyhow::{Context, Result, bail};
use sheer_proxy::platform::{Birth, prepare};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// The capability to change rules, CAP_NET_ADMIN.
const NET_ADMIN: u32 = 12;

/// Where `nft` is: in the search path, or where system administration tools live, which is not in everybody's path.
///
/// # Errors
/// When it is nowhere, with what to install.
pub(crate) fn find() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from));
    places.map(|place| place.join("nft")).find(|candidate| candidate.is_file()).context(
        "the program 'nft' is missing, without it no traffic can be captured; install it (Debian, Ubuntu: \
         'apt install nftables', Fedora: 'dnf install nftables'), or use '--capture env'",
    )
}

/// Applies rules in the network namespace that this process is in.
///
/// # Errors
/// When nft is missing or refuses them; nothing has changed then.
pub(crate) fn apply(rules: &str) -> Result<()> {
    let mut command = Command::new(find()?);
    command.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let root = nix::unistd::geteuid().is_root();
    // In a group of its own: Ctrl-C at the terminal must not end it halfway.
    let capabilities = if root { 0 } else { 1 << NET_ADMIN };
    prepare(&mut command, Birth { capabilities, group: Some(0), ..Birth::default() });
    let mut child = command.spawn().context("cannot start nft")?;
    if let Some(mut stdin) = child.stdin.take() {
        // When nft dies early its complaint says more than the broken pipe.
        let _ = stdin.write_all(rules.as_bytes());
    }
    let output = child.wait_with_output().context("cannot wait for nft")?;
    if !output.status.success() {
        bail!("nft refuses the rules: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Removes a table, if it is there.
///
/// # Errors
/// When nft is missing or refuses.
pub(crate) fn remove(table: &str) -> Result<()> {
    // Adding an existing table changes nothing, so that deleting it never fails for want of it.
    apply(&format!("add table inet {table}\ndelete table inet {table}\n"))
}
