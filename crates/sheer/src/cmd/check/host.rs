//! What `sheer check` finds out about the machine that it runs on, without a control plane: could a workload start here,
//! and would it last?

use super::{Obstacle, TRY_NAMESPACE};
use crate::descriptors;
use crate::dirs::Dirs;
use crate::output::{bytes, counted};
use crate::supervise::{hierarchy, rundir};
use sheer_core::api::{Finding, Level};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

/// What every finding here is about.
const TOPIC: &str = "host";
/// Less than this on a disk is said; certificates and configuration of a workload take some tens of kilobytes.
const LITTLE_SPACE: u64 = 64 << 20;
/// What one state directory needs to be written anew.
const NO_SPACE: u64 = 1 << 20;
/// Fewer open files than this a proxy uses up in an ordinary day.
const FEW_FILES: u64 = 4096;
/// A clock may be this much behind the making of this program, which somebody else's clock told.
const CLOCK_SLACK: Duration = Duration::from_secs(24 * 3600);

/// What was found out; the judging is [`findings`].
#[derive(Clone, Debug)]
struct Facts {
    root: bool,
    /// A container: what it may not do is its owner's choice, and `--capture here` is made for it.
    container: bool,
    /// Where nft is, or why it is nowhere.
    nft: Result<PathBuf, String>,
    /// What keeps a workload from having a network of its own.
    namespace: Option<Obstacle>,
    /// The unified control group hierarchy, or why there is none.
    groups: Result<PathBuf, String>,
    now: SystemTime,
    /// When this program was made.
    made: Option<SystemTime>,
    /// Whether a time service keeps the clock right, where the kernel tells.
    clock_kept: Option<bool>,
    /// Where state is kept, and how many bytes are free there.
    space: Vec<(PathBuf, u64)>,
    files: Option<u64>,
    /// Workloads that were killed and left something.
    dead: Vec<String>,
}

/// Looks at this machine.
pub(super) fn look() -> anyhow::Result<Vec<Finding>> {
    let dirs = Dirs::of_user()?;
    let made = std::env::current_exe().and_then(|path| path.metadata()).and_then(|found| found.modified());
    Ok(findings(&Facts {
        root: nix::unistd::geteuid().is_root(),
        container: is_container(),
        nft: crate::nft::find().map_err(|error| error.to_string()),
        namespace: obstacle(),
        groups: hierarchy().map_err(|error| error.to_string()),
        now: SystemTime::now(),
        made: made.ok(),
        clock_kept: sheer_proxy::platform::clock_is_kept(),
        space: [&dirs.state, &dirs.runtime].into_iter().filter_map(|path| Some((path.clone(), free(path)?))).collect(),
        files: descriptors::most(),
        dead: rundir::dead(&rundir::runs(&dirs)),
    }))
}

/// Whether this is a container, by the signs that Docker, Podman and Kubernetes leave in one.
fn is_container() -> bool {
    ["/.dockerenv", "/run/.containerenv"].iter().any(|sign| Path::new(sign).exists())
        || std::env::var_os("KUBERNETES_SERVICE_HOST").is_some()
}

/// What keeps a workload from having a network of its own. Another process of this program tries, and what it
/// makes ends with it.
pub(crate) fn obstacle() -> Option<Obstacle> {
    let lost = |why: String| Some(Obstacle { why, mend: String::new() });
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return lost(format!("cannot find the running binary: {error}")),
    };
    let tried = Command::new(program).arg(TRY_NAMESPACE).stdin(Stdio::null()).stderr(Stdio::null()).output();
    match tried {
        Err(error) => lost(format!("cannot start another process: {error}")),
        Ok(output) => serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|_| lost(format!("the attempt ended without a word ({})", output.status))),
    }
}

/// Bytes that this user may still write where `path` is or would be made.
fn free(path: &Path) -> Option<u64> {
    let there = path.ancestors().find(|above| above.is_dir())?;
    let found = nix::sys::statvfs::statvfs(there).ok()?;
    Some(found.blocks_available().saturating_mul(found.fragment_size()))
}

fn findings(facts: &Facts) -> Vec<Finding> {
    let mut found = vec![rules(facts), network(facts), clock(facts)];
    // Only root adopts what runs already.
    if facts.root && !facts.container {
        found.push(groups(facts));
    }
    found.extend(facts.space.iter().filter_map(|(path, free)| space(path, *free)));
    found.extend(facts.files.filter(|most| *most < FEW_FILES).map(few_files));
    found.extend(left_behind(&facts.dead));
    found
}

fn finding(level: Level, subject: &str, what: impl Into<String>) -> Finding {
    let subject = format!("this host, {subject}");
    Finding { level, topic: TOPIC.to_owned(), subject, what: what.into(), ..Finding::default() }
}

fn rules(facts: &Facts) -> Finding {
    match &facts.nft {
        Ok(path) => finding(Level::Ok, "nft", format!("is there ({})", path.display())),
        Err(_) => Finding {
            why: "rules of the kernel take a workload's traffic to its proxy; without them '--capture env' and \
                  '--capture none' are left"
                .to_owned(),
            mend: "install nftables (Debian, Ubuntu: 'sudo apt install nftables', Fedora: 'sudo dnf install nftables')"
                .to_owned(),
            ..finding(Level::Warn, "nft", "the program 'nft' is missing")
        },
    }
}

fn network(facts: &Facts) -> Finding {
    let subject = "namespaces";
    match &facts.namespace {
        None if facts.root => finding(Level::Ok, subject, "a workload can have a network of its own"),
        None => finding(Level::Ok, subject, "a workload can have a network of its own, without root"),
        Some(_) if facts.container => {
            finding(Level::Ok, subject, "this is a container, whose own network '--capture here' takes as a whole")
        }
        Some(Obstacle { why, mend }) => Finding {
            why: why.clone(),
            mend: format!("{mend}; or use '--capture env', which needs no privileges but captures less")
                .trim_start_matches("; or ")
                .to_owned(),
            ..finding(Level::Warn, subject, "a workload cannot have a network of its own ('--capture netns')")
        },
    }
}

fn groups(facts: &Facts) -> Finding {
    let subject = "control groups";
    match &facts.groups {
        Ok(path) => finding(Level::Ok, subject, format!("units can be adopted ({})", path.display())),
        Err(mend) => Finding {
            why: "rules tell the traffic of a unit by its control group in the unified hierarchy (cgroup v2)"
                .to_owned(),
            mend: mend.clone(),
            ..finding(Level::Warn, subject, "units cannot be adopted ('--unit', '--cgroup')")
        },
    }
}

fn clock(facts: &Facts) -> Finding {
    let subject = "clock";
    if facts.made.is_some_and(|made| facts.now + CLOCK_SLACK < made) {
        return Finding {
            why: "certificates that begin in what this host takes for the future are refused".to_owned(),
            mend: "set the clock ('timedatectl', or 'date -s'), and let a time service keep it".to_owned(),
            ..finding(Level::Error, subject, "stands before the day on which this program was made")
        };
    }
    finding(
        Level::Ok,
        subject,
        match facts.clock_kept {
            Some(true) => "is kept right by a time service",
            Some(false) => {
                "no time service keeps it that the kernel knows of; hosts of a mesh must agree to 15 minutes"
            }
            None => "is later than this program; the kernel does not tell whether a time service keeps it",
        },
    )
}

fn space(path: &Path, free: u64) -> Option<Finding> {
    let level = match free {
        ..NO_SPACE => Level::Error,
        NO_SPACE..LITTLE_SPACE => Level::Warn,
        _ => return None,
    };
    Some(Finding {
        why: "what cannot be stored is lost with the process: certificates, registrations, the last configuration"
            .to_owned(),
        mend: format!("make room on the file system of {} ('df -h {}')", path.display(), path.display()),
        ..finding(level, "disk", format!("{} are free for {}", bytes(free), path.display()))
    })
}

fn few_files(most: u64) -> Finding {
    Finding {
        why: "a proxy needs two for each connection, and refuses further ones when they are used up".to_owned(),
        mend: "raise the hard limit ('ulimit -Hn', LimitNOFILE= of a unit, nofile in /etc/security/limits.conf)"
            .to_owned(),
        ..finding(Level::Warn, "open files", format!("a process may have {most} files and connections open"))
    }
}

fn left_behind(dead: &[String]) -> Option<Finding> {
    (!dead.is_empty()).then(|| Finding {
        why: "they were killed before they could clean up".to_owned(),
        mend: "'sheer clean' removes it; the next 'sheer run' does so too".to_owned(),
        ..finding(
            Level::Warn,
            "clean",
            format!("{} left something behind: {}", counted(dead.len(), "workload"), dead.join(", ")),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn well() -> Facts {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        Facts {
            root: true,
            container: false,
            nft: Ok("/usr/sbin/nft".into()),
            namespace: None,
            groups: Ok("/sys/fs/cgroup".into()),
            now,
            made: Some(now - Duration::from_secs(3600)),
            clock_kept: Some(true),
            space: vec![("/var/lib/sheer".into(), 1 << 40)],
            files: Some(1 << 20),
            dead: Vec::new(),
        }
    }

    /// Level, subject and remedy of what is not well.
    fn amiss(facts: &Facts) -> Vec<(Level, String, String)> {
        let open = findings(facts).into_iter().filter(|it| it.level != Level::Ok);
        open.map(|it| {
            assert!(!it.what.is_empty() && !it.why.is_empty() && !it.mend.is_empty(), "{it:?}");
            (it.level, it.subject.trim_start_matches("this host, ").to_owned(), it.mend)
        })
        .collect()
    }

    #[test]
    fn a_fit_host_is_told_in_a_few_lines() {
        let subjects = |facts: &Facts| findings(facts).into_iter().map(|it| it.subject).collect::<Vec<_>>();
        assert!(amiss(&well()).is_empty());
        let own = ["this host, nft", "this host, namespaces", "this host, clock"];
        assert_eq!(subjects(&well()), [&own[..], &["this host, control groups"]].concat());
        // Others do not adopt units, so that their lack is no fault.
        let person = Facts { root: false, groups: Err("there is none".into()), ..well() };
        assert_eq!(subjects(&person), own);
    }

    #[test]
    fn each_lack_has_its_remedy() {
        let lacks = [
            (Facts { nft: Err("missing".into()), ..well() }, Level::Warn, "nft", "apt install nftables"),
            (
                Facts {
                    namespace: Some(Obstacle { why: "EPERM".into(), mend: "run 'sudo sysctl -w x=1'".into() }),
                    ..well()
                },
                Level::Warn,
                "namespaces",
                "sysctl -w x=1'; or use '--capture env'",
            ),
            (Facts { groups: Err("mount one".into()), ..well() }, Level::Warn, "control groups", "mount one"),
            (Facts { now: SystemTime::UNIX_EPOCH, ..well() }, Level::Error, "clock", "timedatectl"),
            (Facts { space: vec![("/s".into(), 5 << 20)], ..well() }, Level::Warn, "disk", "df -h /s"),
            (Facts { space: vec![("/s".into(), 0)], ..well() }, Level::Error, "disk", "df -h /s"),
            (Facts { files: Some(1024), ..well() }, Level::Warn, "open files", "LimitNOFILE="),
            (Facts { dead: vec!["default/web-1".into()], ..well() }, Level::Warn, "clean", "'sheer clean'"),
        ];
        for (facts, level, subject, mend) in lacks {
            let found = amiss(&facts);
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!((found[0].0, found[0].1.as_str()), (level, subject));
            assert!(found[0].2.contains(mend), "{}", found[0].2);
        }
    }

    #[test]
    fn what_a_container_may_not_do_is_no_fault() {
        let refused = Some(Obstacle { why: "EPERM".into(), mend: "give it CAP_SYS_ADMIN".into() });
        let facts = Facts { container: true, namespace: refused, groups: Err("there is none".into()), ..well() };
        assert!(amiss(&facts).is_empty());
        assert!(findings(&facts).iter().any(|it| it.what.contains("--capture here")));
    }

    #[test]
    fn a_clock_that_nobody_keeps_is_said_and_no_fault() {
        let facts = Facts { clock_kept: Some(false), ..well() };
        assert!(amiss(&facts).is_empty());
        assert!(findings(&facts).iter().any(|it| it.what.contains("15 minutes")));
    }

    #[test]
    fn space_is_told_of_a_directory_that_is_not_there_yet() {
        assert!(free(Path::new("/none/of/these")).is_some());
    }
}
