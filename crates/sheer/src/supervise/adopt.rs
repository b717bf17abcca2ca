//! Capture in a network that others share: the rules of one workload, put there when its proxy is ready and taken away
//! when it stops, and put anew when the control group of its unit is made anew.

use anyhow::{Context, Result, bail};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use sheer_proxy::capture::rules::{OtherUdp, Scope, Shared};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where nft looks for control groups.
const NFT_ROOT: &str = "/sys/fs/cgroup";

/// Whose traffic is taken.
#[derive(Clone, Debug)]
pub(super) enum Whose {
    /// Everybody's.
    All,
    /// A user's.
    User(u32),
    /// A control group's.
    Cgroup(Cgroup),
}

/// A control group of the unified hierarchy; it need not exist yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cgroup {
    /// Where the hierarchy is mounted.
    mount: PathBuf,
    /// The group, relative to it.
    path: PathBuf,
}

impl Cgroup {
    /// The group of a systemd unit.
    pub(super) fn of_unit(unit: &str) -> Result<Self> {
        if unit.is_empty() || unit.contains('/') {
            bail!("--unit {unit}: give a unit's name, such as nginx.service");
        }
        let unit = if unit.contains('.') { unit.to_owned() } else { format!("{unit}.service") };
        let mount = hierarchy()?;
        // systemd is not asked, so that this works where its socket is out of reach; groups bear their units' names.
        let path = search(&mount, &unit, 5).unwrap_or_else(|| mount.join("system.slice").join(&unit));
        let path = path.strip_prefix(&mount).unwrap_or(&path).to_owned();
        Ok(Self { mount, path })
    }

    /// The group at a path, as in /proc/PID/cgroup or below the mount.
    pub(super) fn of_path(path: &str) -> Result<Self> {
        let mount = hierarchy()?;
        let plain = Path::new(path).strip_prefix(&mount).unwrap_or(Path::new(path));
        let plain: PathBuf = plain.strip_prefix("/").unwrap_or(plain).to_owned();
        let normal = plain.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        if plain.as_os_str().is_empty() || !normal || plain.to_string_lossy().contains(['"', '\n', '\\']) {
            bail!(
                "--cgroup {path}: give the path of a control group other than the root, such as system.slice/nginx.service"
            );
        }
        Ok(Self { mount, path: plain })
    }

    fn full(&self) -> PathBuf {
        self.mount.join(&self.path)
    }

    /// The group's number, which is another one when it is made anew.
    fn number(&self) -> Option<u64> {
        fs::metadata(self.full()).ok().filter(fs::Metadata::is_dir).map(|found| found.ino())
    }

    fn scope(&self) -> Scope {
        let full = self.full();
        let path = full.strip_prefix(NFT_ROOT).unwrap_or(&full);
        Scope::Cgroup { path: path.display().to_string(), level: self.path.components().count() as u32 }
    }
}

/// Where the unified control group hierarchy is.
pub(crate) fn hierarchy() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    let unified = mounts.lines().filter_map(|line| {
        let (front, back) = line.split_once(" - ")?;
        back.starts_with("cgroup2 ").then(|| PathBuf::from(front.split(' ').nth(4).unwrap_or_default()))
    });
    // Another mount may hide one; only the unified hierarchy has this file.
    let usable = |mount: &PathBuf| mount.starts_with(NFT_ROOT) && mount.join("cgroup.controllers").exists();
    unified.into_iter().find(usable).with_context(|| {
        format!(
            "there is no unified control group hierarchy below {NFT_ROOT}; mount one ('mount -t cgroup2 none \
             {NFT_ROOT}/unified'), or choose the workload by --user"
        )
    })
}

/// A directory of this name, not deeper than `depth`.
fn search(below: &Path, name: &str, depth: u32) -> Option<PathBuf> {
    let candidate = below.join(name);
    if candidate.is_dir() {
        return Some(candidate);
    }
    if depth == 0 {
        return None;
    }
    let children =
        fs::read_dir(below).ok()?.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    children.into_iter().find_map(|child| search(&child.path(), name, depth - 1))
}

/// What the rules are made of, all but the scope.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) table: String,
    pub(super) proxy_user: u32,
    pub(super) outbound: u16,
    pub(super) dns: Option<u16>,
    pub(super) inbound: u16,
    pub(super) ports: Vec<u16>,
    pub(super) other_udp: OtherUdp,
}

/// A workload whose traffic is taken in a shared network.
pub(super) struct Adopted {
    whose: Whose,
    facts: Facts,
    active: bool,
    /// The control group that the rules in force name.
    number: Option<u64>,
    inotify: Option<Inotify>,
    watch: Option<WatchDescriptor>,
    /// Datagrams refused so far, by the rules in force.
    refused: u64,
}

impl Adopted {
    /// Prepares; no rule is there before [`Adopted::begin`].
    pub(super) fn new(whose: Whose, facts: Facts) -> Result<Self> {
        crate::nft::find()?;
        let inotify = match &whose {
            Whose::Cgroup(_) => Some(Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?),
            Whose::All | Whose::User(_) => None,
        };
        Ok(Self { whose, facts, active: false, number: None, inotify, watch: None, refused: 0 })
    }

    /// Puts the rules there; those for a group that does not exist yet, as soon as it does.
    pub(super) fn begin(&mut self) -> Result<()> {
        self.active = true;
        let scope = match &self.whose {
            Whose::All => Scope::All,
            Whose::User(user) => Scope::User(*user),
            Whose::Cgroup(group) => {
                if group.number().is_none() {
                    super::say(&format!(
                        "there is no control group {} yet; its traffic is taken as soon as it is there",
                        group.full().display()
                    ));
                }
                return self.follow();
            }
        };
        self.apply(scope)
    }

    /// What becomes readable when a control group comes or goes.
    pub(super) fn watch(&self) -> Option<BorrowedFd<'_>> {
        self.inotify.as_ref().map(AsFd::as_fd)
    }

    /// Looks whether the group is another one now.
    pub(super) fn look_again(&mut self) {
        if let Some(inotify) = &self.inotify {
            while inotify.read_events().is_ok_and(|events| !events.is_empty()) {}
        }
        if self.active
            && let Err(error) = self.follow()
        {
            super::say(&format!("cannot follow the control group: {error:#}"));
        }
    }

    fn follow(&mut self) -> Result<()> {
        let Whose::Cgroup(group) = self.whose.clone() else { return Ok(()) };
        self.watch_for(&group)?;
        let number = group.number();
        if number.is_some() && number != self.number {
            self.apply(group.scope())?;
            self.number = number;
        }
        Ok(())
    }

    /// Watches the nearest directory above the group; again when one came into being meanwhile.
    fn watch_for(&mut self, group: &Cgroup) -> Result<()> {
        let Some(inotify) = &self.inotify else { return Ok(()) };
        let full = group.full();
        let nearest =
            || full.ancestors().skip(1).find(|directory| directory.is_dir()).unwrap_or(&group.mount).to_owned();
        loop {
            let directory = nearest();
            if let Some(old) = self.watch.take() {
                // Gone already when its directory is.
                let _ = inotify.rm_watch(old);
            }
            let what = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_DELETE_SELF;
            match inotify.add_watch(&directory, what) {
                Ok(watch) => self.watch = Some(watch),
                Err(nix::errno::Errno::ENOENT) => continue,
                Err(errno) => return Err(errno).with_context(|| format!("cannot watch {}", directory.display())),
            }
            if nearest() == directory {
                return Ok(());
            }
        }
    }

    fn apply(&self, scope: Scope) -> Result<()> {
        let Facts { table, proxy_user, outbound, dns, inbound, ports, other_udp } = &self.facts;
        let shared = Shared {
            table,
            scope,
            proxy_user: *proxy_user,
            outbound: *outbound,
            dns: *dns,
            inbound: *inbound,
            ports,
            other_udp: *other_udp,
        };
        // In one step, whatever was there before.
        crate::nft::apply(&format!("add table inet {table}\ndelete table inet {table}\n{}", shared.ruleset()))
    }

    /// Whether there are rules that refuse something.
    pub(super) fn refuses(&self) -> bool {
        self.active && self.facts.other_udp == OtherUdp::Refuse
    }

    /// How many datagrams were refused since this was last asked.
    pub(super) fn newly_refused(&mut self) -> u64 {
        let now = crate::nft::packets(&self.facts.table, "other_udp").unwrap_or_default();
        // Rules that were put anew begin at nothing.
        let new = now.checked_sub(self.refused).unwrap_or(now);
        self.refused = now;
        new
    }

    /// Takes the rules away; connections that were captured stay so.
    pub(super) fn end(&mut self) {
        if std::mem::take(&mut self.active)
            && let Err(error) = crate::nft::remove(&self.facts.table)
        {
            super::say(&format!("{error:#}; remove the rules by 'nft delete table inet {}'", self.facts.table));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_groups() {
        let Ok(mount) = hierarchy() else { return };
        let group = Cgroup::of_path("/system.slice/web.service").unwrap();
        assert_eq!(group, Cgroup { mount: mount.clone(), path: "system.slice/web.service".into() });
        assert!(matches!(group.scope(), Scope::Cgroup { level: 2, .. }));
        let below = mount.join("a/b").display().to_string();
        assert_eq!(Cgroup::of_path(&below).unwrap().path, Path::new("a/b"));
        for bad in ["", "/", "../x", "a/../b", "a\"b"] {
            assert!(Cgroup::of_path(bad).is_err(), "{bad}");
        }
    }
}
