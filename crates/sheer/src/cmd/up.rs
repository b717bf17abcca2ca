//! `sheer up`: a control plane for this user, in one terminal.

use crate::cmd::control;
use crate::output;
use owo_colors::OwoColorize as _;
use std::net::SocketAddr;
use std::process::ExitCode;

/// Flags of `sheer up`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sheer up
  sheer up --api-listen 127.0.0.1:0              # any free port
  sheer up --proxy-listen 192.168.1.5:15012      # other machines may join, with a token")]
pub(crate) struct Args {
    #[command(flatten)]
    place: control::Place,

    /// Where proxies of other hosts connect [default: nowhere; those of this host use a socket]
    #[arg(long, value_name = "ADDR:PORT")]
    proxy_listen: Vec<SocketAddr>,

    /// Where the API and its page listen; port 0 picks a free one
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:15080")]
    api_listen: SocketAddr,

    /// How other hosts reach this control plane, written into join tokens [default: this host's address]
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Vec<String>,
}

/// Runs until Ctrl-C or SIGTERM.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let options = args.place.options(args.proxy_listen, args.api_listen, args.advertise)?;
    control::serve(options, |plane, options| {
        let mut rows = Vec::new();
        if let Some(address) = plane.api_address() {
            let page = plane.link().unwrap_or_else(|| format!("http://{address}/"));
            rows.push((
                "page",
                page,
                "for a browser, once and within a minute; 'sheer dashboard' prints another".to_owned(),
            ));
            rows.push((
                "api",
                format!("http://{address}/api/v1/"),
                format!("token in {}", plane.api_token_file().display()),
            ));
        }
        for address in plane.proxy_addresses() {
            rows.push(("proxies", address.to_string(), "other hosts join with 'sheer token create'".to_owned()));
        }
        rows.push(("config", options.config.display().to_string(), "a saved change is in force at once".to_owned()));
        rows.push(("state", options.state.display().to_string(), "the root key is here".to_owned()));
        let mut text = format!("{}\n", "Sheer is up.".green().bold());
        for (name, value, remark) in rows {
            text.push_str(&format!("  {name:8} {value}\n           {}\n", remark.dimmed()));
        }
        text.push_str(&next(&output::typed_program()));
        output::print(&text)
    })
}

/// What to type next.
fn next(sheer: &str) -> String {
    let line = |command: &str, remark: &str| format!("  {:72} {}\n", format!("{sheer} {command}"), remark.dimmed());
    [
        "\nNext, in other terminals:\n".to_owned(),
        line("run api --port 8081 -- python3 -m http.server 8081", ""),
        line("run web --port 8080 --publish 8080 -- python3 -m http.server 8080", "calls http://api/"),
        line("stat", "who talks to whom, how well"),
        "Ctrl-C ends the control plane; running services go on without it.".to_owned(),
    ]
    .concat()
}
