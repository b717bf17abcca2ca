//! The command line: the tree of commands and the flags that all of them share.

use crate::cmd;
use clap::builder::styling::{AnsiColor, Styles};
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

/// A service mesh you don't see
///
/// Services keep talking plain HTTP, gRPC or TCP to a service's name. Sheer stands beside them: it finds, balances,
/// encrypts, authenticates and records every call.
#[derive(Parser)]
#[command(
    name = "sheer",
    version,
    styles = STYLES,
    max_term_width = 110,
    after_help = "Begin here:
  sheer up                                          # one terminal: control plane
  sheer run api --port 8081 -- python3 -m http.server 8081
  sheer run web --port 8080 --publish 8080 -- ./web # 'web' calls http://api/
  sheer stat                                        # who talks to whom, how well"
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,

    #[command(flatten)]
    pub(crate) shared: Shared,
}

/// Flags of every command.
#[derive(Args)]
#[command(next_help_heading = "Flags of every command")]
pub(crate) struct Shared {
    /// A YAML file whose keys are flag names; flags and SHEER_* variables win over it
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) settings: Option<PathBuf>,

    /// Print the effective settings and where each came from, and do nothing else
    #[arg(id = "print-settings", long, global = true)]
    pub(crate) print_settings: bool,

    /// What to log on standard error: error, warn, info, debug, or TARGET=LEVEL,... [default: warn; info for
    /// sheer control]
    #[arg(long, value_name = "FILTER", global = true)]
    pub(crate) log: Option<String>,

    /// How to log
    #[arg(long, value_name = "FORMAT", global = true, default_value = "text", hide_default_value = true)]
    pub(crate) log_format: crate::logging::Format,
}

/// One variant a verb; each verb is a file in `cmd/`.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Start a control plane for this user
    Up(cmd::up::Args),
    /// Run a command with its proxy beside it
    Run(Box<cmd::run::Args>),
    /// Stand beside something that runs already
    Proxy(Box<cmd::proxy::Args>),
    /// Run a command inside a workload's network
    Exec(cmd::exec::Args),
    /// Replace running proxies by this version's, without losing a connection
    Upgrade(cmd::upgrade::Args),
    /// Remove what a killed sheer left on this host
    Clean(cmd::clean::Args),
    /// Bring objects into the running configuration
    Apply(cmd::apply::Args),
    /// Show what apply would change
    Diff(cmd::diff::Args),
    /// Remove an object that apply wrote
    Delete(cmd::delete::Args),
    /// Show services, workloads and written objects
    Get(cmd::get::Args),
    /// Check configuration files; needs no control plane
    Lint(cmd::lint::Args),
    /// Say whether the installation is healthy, and how to mend it
    Check(cmd::check::Args),
    /// Show how well services answer, and who calls them
    Stat(cmd::stat::Args),
    /// Show who calls whom, by which route and protocol
    Edges(cmd::edges::Args),
    /// Print a link that opens the page of edges and rates, once
    Dashboard(cmd::dashboard::Args),
    /// Run a control plane as a service
    Control(cmd::control::Args),
    /// The whole thing on one machine, with sample services and load
    Demo(cmd::demo::Args),
    /// Make join tokens for workloads of other hosts
    Token(cmd::token::Args),
    /// Replace the root above all identities, or see how far that is
    Identity(cmd::identity::Args),
}

impl Command {
    /// What it logs unless told: a service's log is all there is to see of it, a terminal belongs to the application.
    pub(crate) fn default_log(&self) -> &'static str {
        match self {
            Self::Control(_) => "info",
            _ => "warn",
        }
    }

    /// Runs the command; its exit status is the process's.
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Up(args) => cmd::up::run(args),
            Self::Run(args) => cmd::run::run(*args),
            Self::Proxy(args) => cmd::proxy::run(*args),
            Self::Exec(args) => cmd::exec::run(args),
            Self::Upgrade(args) => cmd::upgrade::run(args),
            Self::Clean(args) => cmd::clean::run(args),
            Self::Apply(args) => cmd::apply::run(args),
            Self::Diff(args) => cmd::diff::run(args),
            Self::Delete(args) => cmd::delete::run(args),
            Self::Get(args) => cmd::get::run(args),
            Self::Lint(args) => cmd::lint::run(args),
            Self::Check(args) => cmd::check::run(args),
            Self::Stat(args) => cmd::stat::run(args),
            Self::Edges(args) => cmd::edges::run(args),
            Self::Dashboard(args) => cmd::dashboard::run(args),
            Self::Control(args) => cmd::control::run(args),
            Self::Demo(args) => cmd::demo::run(args),
            Self::Token(args) => cmd::token::run(args),
            Self::Identity(args) => cmd::identity::run(args),
        }
    }
}
