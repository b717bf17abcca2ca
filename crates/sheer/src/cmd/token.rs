//! `sheer token`: how workloads of other hosts join.

use crate::client::{Absent, Connect};
use crate::dirs::Dirs;
use crate::{duration, output};
use sheer_core::api::{TokenRequest, TokenView};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Commands of `sheer token`.
#[derive(clap::Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Print a join token for one identity
    Create(Create),
}

/// Flags of `sheer token create`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sheer token create --service-account web > web.token
  sheer token create -n shop --service-account web --ttl 1h --uses 20 --from 10.0.0.0/8 -o json

On the other host:
  sheer run shop/web --port 8080 --join-token-file web.token -- ./web")]
struct Create {
    /// The namespace of the workloads that may join with it
    #[arg(short, long, default_value = sheer_core::name::DEFAULT_NAMESPACE)]
    namespace: String,

    /// Their service account (a workload's is its service's name unless it says otherwise)
    #[arg(long)]
    service_account: String,

    /// How long it lasts
    #[arg(long, value_parser = duration::parse, default_value = "10m")]
    ttl: Duration,

    /// How many workloads may use it
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    uses: u32,

    /// Only from these addresses
    #[arg(long, value_name = "CIDR")]
    from: Vec<ipnet::IpNet>,

    /// The control plane's address to write into it [default: what it knows of itself]
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Vec<String>,

    /// When no control plane runs: the state directory to make the token in (give --advertise too)
    #[arg(long, value_name = "DIR", requires = "advertise")]
    state: Option<PathBuf>,

    /// How to print
    #[arg(short, long, default_value = "text")]
    output: Format,

    #[command(flatten)]
    connect: Connect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// The token alone.
    Text,
    /// The token with its public part and end.
    Json,
}

/// Prints the token on standard output, and nothing else there.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Command::Create(args) = args.command;
    let request = TokenRequest {
        namespace: args.namespace,
        service_account: args.service_account,
        ttl_s: args.ttl.as_secs(),
        uses: args.uses,
        from: args.from.iter().map(ToString::to_string).collect(),
        control: args.advertise,
    };
    let token = match (args.connect.client()?.post("/api/v1/tokens", &request), &args.state) {
        (Err(error), Some(state)) if error.is::<Absent>() => offline(state, &request)?,
        (answer, _) => answer?,
    };
    match args.output {
        Format::Json => output::json(&token)?,
        Format::Text => output::print(&token.token)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes into the state of a control plane that does not run.
fn offline(state: &Path, request: &TokenRequest) -> anyhow::Result<TokenView> {
    if !state.join("sheer.redb").exists() {
        anyhow::bail!(
            "{} is no control plane's state; name the --state that 'sheer control' was given",
            state.display()
        );
    }
    Ok(sheer_control::create_token(state, &Dirs::of_user()?.config, request)?)
}
