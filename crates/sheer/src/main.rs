//! Entry point of the `sheer` binary: reads the command line and dispatches to one verb.

mod cli;
mod client;
mod cmd;
mod descriptors;
mod dirs;
mod duration;
mod keeper;
mod logging;
mod nft;
mod output;
#[cfg(test)]
mod reference;
mod settings;
mod sockets;
mod supervise;

use clap::{CommandFactory as _, FromArgMatches as _};
use std::ffi::OsString;
use std::process::ExitCode;

// glibc's allocator holds on to the memory of bursts; a proxy lives for months.
#[cfg(not(feature = "count-allocations"))]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[cfg(feature = "count-allocations")]
#[global_allocator]
static ALLOCATOR: sheer_proxy::platform::allocations::Counting<mimalloc::MiMalloc> =
    sheer_proxy::platform::allocations::Counting(mimalloc::MiMalloc);

fn main() -> ExitCode {
    let argv: Vec<OsString> = std::env::args_os().collect();
    // The only provider in the binary; an error would mean that one is installed already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    if let Some(result) = argv.get(1).and_then(|name| cmd::hidden(name, &argv[2..])) {
        return exit(result);
    }
    let variables: Vec<(String, OsString)> =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value))).collect();
    match settings::resolve(&cli::Cli::command(), &argv, &variables) {
        Ok(settings::Outcome::Run(resolved)) => exit(run(&resolved)),
        Ok(settings::Outcome::Print(text)) => {
            anstream::print!("{text}");
            ExitCode::SUCCESS
        }
        Err(settings::Refusal::Usage(error)) => {
            // Fails only when the stream is closed, and then nobody reads it.
            let _ = error.print();
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
        }
        Err(settings::Refusal::Settings(error)) => exit(Err(error)),
    }
}

fn run(resolved: &settings::Resolved) -> anyhow::Result<ExitCode> {
    let cli = cli::Cli::from_arg_matches(&resolved.matches)?;
    logging::start(cli.shared.log.as_deref().unwrap_or(cli.command.default_log()), cli.shared.log_format)?;
    for warning in &resolved.warnings {
        tracing::warn!("{warning}");
    }
    cli.command.run()
}

/// The one place where errors become text: what happened, then why, a line each.
fn exit(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        use owo_colors::OwoColorize as _;
        anstream::eprintln!("{} {error}", "error:".red().bold());
        for cause in error.chain().skip(1) {
            anstream::eprintln!("  {} {cause}", "because:".dimmed());
        }
        ExitCode::FAILURE
    })
}
