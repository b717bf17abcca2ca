//! `sheer identity`: the root above all identities, and how it is replaced.

use crate::client::Connect;
use crate::output::{self, Format};
use sheer_core::api::{IdentityView, RootState, Rotate, RotationStep, RotationView};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Commands of `sheer identity`.
#[derive(clap::Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Replace the root by a new one, without a failed request
    Rotate(Rotation),
    /// Show the roots, and how far a rotation has come
    #[command(after_help = "Examples:
  sheer identity status
  sheer identity status -o json")]
    Status(Plain),
    /// Take a rotation back, at any step
    #[command(after_help = "Examples:
  sheer identity abort       # then `sheer identity status` until it has gone back")]
    Abort(Plain),
}

/// Flags of `sheer identity rotate`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sheer identity rotate                    # returns at once; the rest goes by itself
  sheer identity status                    # which step, and for whom it waits
  sheer identity rotate --without-absent   # while one waits: not for those who are not connected
  sheer identity rotate --now              # the root's key is known to somebody else")]
struct Rotation {
    /// The old root is to be distrusted as soon as the connected proxies can: connections under it are cut, and whoever
    /// is not connected has to join again. Also hurries a rotation that is under way
    #[arg(long)]
    now: bool,

    /// Wait for nobody who is not connected. Also for a rotation that is under way
    #[arg(long)]
    without_absent: bool,

    #[command(flatten)]
    plain: Plain,
}

#[derive(clap::Args)]
struct Plain {
    /// How to print
    #[arg(short, long, default_value = "table")]
    output: Format,

    #[command(flatten)]
    connect: Connect,
}

/// Prints how things stand after the command.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (view, format): (IdentityView, Format) = match args.command {
        Command::Rotate(Rotation { now, without_absent, plain }) => {
            let how = Rotate { now, without_absent };
            (plain.connect.client()?.post("/api/v1/identity/rotate", &how)?, plain.output)
        }
        Command::Status(plain) => (plain.connect.client()?.get("/api/v1/identity")?, plain.output),
        Command::Abort(plain) => (plain.connect.client()?.post("/api/v1/identity/abort", &())?, plain.output),
    };
    match format {
        Format::Json => output::json(&view)?,
        Format::Table => output::print(&describe(&view, unix_now()))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// For people.
fn describe(view: &IdentityView, now: i64) -> String {
    let mut lines = Vec::new();
    for root in &view.roots {
        let state = match root.state {
            RootState::Issuing => "issues".to_owned(),
            RootState::Trusted => "trusted".to_owned(),
            RootState::Retired => format!("replaced, renews for {} more", in_words(root.until - now)),
        };
        let short = root.sha256.get(..16).unwrap_or(&root.sha256);
        lines.push(format!("root {}  {short}  {state}, ends in {}", root.number, in_words(root.expires - now)));
    }
    match (&view.rotation, &view.last) {
        (Some(rotation), _) => lines.extend(progress(rotation, now)),
        (None, Some(last)) => {
            let what = match last.from == last.to {
                true => format!("a rotation was aborted, root {} stayed", last.to),
                false => format!("root {} was replaced by root {}", last.from, last.to),
            };
            let (ago, took) = (in_words(now - last.ended), in_words(last.ended - last.began));
            lines.push(format!("no rotation is under way; {ago} ago {what}, within {took}"));
        }
        (None, None) => lines.push("no rotation is under way".to_owned()),
    }
    lines.join("\n")
}

fn progress(rotation: &RotationView, now: i64) -> Vec<String> {
    let (number, step) = match rotation.step {
        RotationStep::Spread => (1, "telling proxies of the new root"),
        RotationStep::Renew => (2, "renewing certificates"),
        RotationStep::Drop => (3, "telling proxies to drop the old root"),
    };
    let way = if rotation.back { "going back" } else { "rotating" };
    let hurry = if rotation.now { ", now" } else { "" };
    let mut lines = vec![format!(
        "{way} from root {} to root {}{hurry}: step {number} of 3, {step}, {} of {} done, since {}",
        rotation.from,
        rotation.to,
        rotation.done,
        rotation.of,
        in_words(now - rotation.step_began)
    )];
    for waiting in &rotation.waiting {
        let until = match waiting.until {
            0 => String::new(),
            until => format!(", for {} at the longest", in_words(until - now)),
        };
        lines.push(format!("  waits for {}: {}{until}", waiting.workload, waiting.why));
    }
    lines
}

fn in_words(seconds: i64) -> String {
    let seconds = u64::try_from(seconds).unwrap_or_default();
    match Duration::from_secs(seconds).as_secs() {
        seconds @ ..120 => format!("{seconds} s"),
        seconds @ ..7_200 => format!("{} min", seconds / 60),
        seconds @ ..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheer_core::api::{RootView, RotatedView, WaitingView};

    #[test]
    fn a_rotation_is_told_in_a_few_lines() {
        let root = |number, state| RootView {
            number,
            sha256: format!("{number:064x}"),
            expires: 10_000 + 86_400 * 3650,
            state,
            until: 13_600,
        };
        let mut view = IdentityView {
            sequence: 4,
            roots: vec![root(1, RootState::Trusted), root(2, RootState::Issuing)],
            rotation: Some(RotationView {
                from: 1,
                to: 2,
                step: RotationStep::Renew,
                step_began: 9_970,
                done: 19,
                of: 20,
                waiting: vec![WaitingView {
                    workload: "local/host/default/web-1".into(),
                    why: "it is not connected, and holds a valid certificate under the old root".into(),
                    until: 20_000,
                }],
                ..RotationView::default()
            }),
            last: None,
        };
        assert_eq!(
            describe(&view, 10_000),
            "root 1  0000000000000000  trusted, ends in 3650 days\n\
             root 2  0000000000000000  issues, ends in 3650 days\n\
             rotating from root 1 to root 2: step 2 of 3, renewing certificates, 19 of 20 done, since 30 s\n  \
             waits for local/host/default/web-1: it is not connected, and holds a valid certificate under the old root, \
             for 2 h at the longest"
        );
        view.rotation = None;
        view.roots[0].state = RootState::Retired;
        view.last = Some(RotatedView { from: 1, to: 2, began: 9_900, ended: 9_990 });
        let told = describe(&view, 10_000);
        assert!(told.contains("root 1  0000000000000000  replaced, renews for 60 min more"), "{told}");
        assert!(told.ends_with("10 s ago root 1 was replaced by root 2, within 90 s"), "{told}");
    }
}
