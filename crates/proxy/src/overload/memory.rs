//! How much memory a process holds, and how much it may.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often the limit itself is read: it may be changed under a running process.
const LIMIT_READ: Duration = Duration::from_secs(5);

/// How much of the memory is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// There is enough.
    Calm,
    /// Nothing new is begun.
    Pressed,
    /// What was begun last ends.
    Critical,
}

impl Level {
    pub(super) fn of(number: u8) -> Self {
        match number {
            0 => Level::Calm,
            1 => Level::Pressed,
            _ => Level::Critical,
        }
    }

    /// The level of `own` bytes under a limit. Once pressed it stays so until a tenth less is in use, so that nothing
    /// swings between the two. What was begun before it is noticed may still come to hold what is left free here: of the
    /// smallest limit that is any use, 64 MiB, that is a hundred requests of 256 KiB.
    fn judge(now: Level, own: u64, group: &Use, limit: u64) -> Self {
        let (held, all, limit) = (u128::from(own) + u128::from(group.kernel), u128::from(group.all), u128::from(limit));
        let pressed = if now == Level::Calm { 60 } else { 50 };
        // What others of the group use is theirs to give up, as long as this process is a small part of it.
        let is_crowded = all * 100 >= limit * 95 && u128::from(own) * 100 >= limit * 25;
        if held * 100 >= limit * 75 {
            Level::Critical
        } else if held * 100 >= limit * pressed || is_crowded {
            Level::Pressed
        } else {
            Level::Calm
        }
    }
}

/// What was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// How much is in use.
    pub level: Level,
    /// What the process itself holds, in bytes.
    pub own: u64,
    /// What it may hold, together with those it shares the limit with.
    pub limit: u64,
}

/// The memory of a process.
pub struct Memory {
    own: Own,
    /// The files of control groups that set limits, narrowest last; none where only the machine does.
    groups: Vec<Group>,
    machine: u64,
    limit: u64,
    read: Instant,
}

enum Own {
    /// /proc/self/statm.
    Process(File),
    /// What a test says.
    #[cfg(test)]
    Told(std::sync::Arc<std::sync::atomic::AtomicU64>),
}

/// A control group's files.
#[derive(Clone, Debug)]
struct Group {
    limit: PathBuf,
    usage: PathBuf,
    stat: PathBuf,
    /// What the group's use counts that can be given up at once: files that were read.
    reclaimable: &'static str,
    /// What the kernel holds for the group, where it has a file of its own: for the most part, sockets.
    kernel: Option<PathBuf>,
}

/// What a control group uses, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Use {
    /// All that cannot be given up at once.
    all: u64,
    /// Of it, what the kernel holds for the group's processes.
    kernel: u64,
}

impl Memory {
    /// The memory of this process and the limits it runs under; `None` where /proc is not there.
    pub fn of_this_process() -> Option<Self> {
        let own = Own::Process(File::open("/proc/self/statm").ok()?);
        let groups =
            groups(&std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default(), Path::new("/sys/fs/cgroup"));
        let machine = field(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")? * 1024;
        Some(Self::with(own, groups, machine))
    }

    fn with(own: Own, groups: Vec<Group>, machine: u64) -> Self {
        let mut memory = Self { own, groups, machine, limit: machine, read: Instant::now() };
        memory.read_limit();
        memory
    }

    /// As much as is told, under this limit.
    #[cfg(test)]
    pub(crate) fn told(own: std::sync::Arc<std::sync::atomic::AtomicU64>, limit: u64) -> Self {
        Self::with(Own::Told(own), vec![], limit)
    }

    pub(super) fn look(&mut self, now: Level) -> Seen {
        if self.read.elapsed() >= LIMIT_READ {
            self.read_limit();
        }
        let own = self.own();
        // The rest takes longer to read, and matters only then.
        let group = if own > self.limit / 4 { self.group() } else { Use::default() };
        Seen { level: Level::judge(now, own, &group, self.limit), own, limit: self.limit }
    }

    fn read_limit(&mut self) {
        self.read = Instant::now();
        let limits = self.groups.iter().filter_map(|group| number(&group.limit));
        self.limit = limits.fold(self.machine, u64::min);
    }

    /// Memory that only this process holds: code and other files' pages are given up by the kernel when it needs them.
    fn own(&self) -> u64 {
        match &self.own {
            Own::Process(file) => {
                let mut text = [0; 128];
                let read = file.read_at(&mut text, 0).unwrap_or_default();
                let text = std::str::from_utf8(&text[..read]).unwrap_or_default();
                let mut pages = text.split_ascii_whitespace().skip(1).map_while(|it| it.parse::<u64>().ok());
                let (resident, shared) = (pages.next().unwrap_or_default(), pages.next().unwrap_or_default());
                resident.saturating_sub(shared) * PAGE
            }
            #[cfg(test)]
            Own::Told(bytes) => bytes.load(std::sync::atomic::Ordering::Relaxed),
        }
    }

    /// What the group with the limit in force uses.
    fn group(&self) -> Use {
        let in_force = |group: &&Group| number(&group.limit) == Some(self.limit);
        let Some(group) = self.groups.iter().find(in_force) else { return Use::default() };
        let stat = std::fs::read_to_string(&group.stat).unwrap_or_default();
        let of_stat = |name| field(&stat, name).unwrap_or_default();
        Use {
            all: number(&group.usage).unwrap_or_default().saturating_sub(of_stat(group.reclaimable)),
            kernel: match &group.kernel {
                Some(file) => number(file).unwrap_or_default(),
                None => of_stat("kernel") + of_stat("sock"),
            },
        }
    }
}

/// The size of a page on the machines that Sheer is built for.
const PAGE: u64 = 4096;

/// The groups of a process, by what /proc/PID/cgroup says: its own and those above it. In a container the path may be
/// one of the host, of which only the root is to be seen.
fn groups(of_process: &str, mounted: &Path) -> Vec<Group> {
    let mut groups = Vec::new();
    for line in of_process.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let roots: &[&str] = match controllers {
            "" => &["", "unified"],
            list if list.split(',').any(|it| it == "memory") => &["memory"],
            _ => continue,
        };
        for root in roots {
            let root = mounted.join(root);
            let own = root.join(path.trim_start_matches('/'));
            for directory in own.ancestors().take_while(|it| it.starts_with(&root)) {
                let stat = directory.join("memory.stat");
                groups.push(match controllers {
                    "" => Group {
                        limit: directory.join("memory.max"),
                        usage: directory.join("memory.current"),
                        stat,
                        reclaimable: "inactive_file",
                        kernel: None,
                    },
                    _ => Group {
                        limit: directory.join("memory.limit_in_bytes"),
                        usage: directory.join("memory.usage_in_bytes"),
                        stat,
                        reclaimable: "total_inactive_file",
                        kernel: Some(directory.join("memory.kmem.usage_in_bytes")),
                    },
                });
            }
        }
    }
    groups.retain(|group| group.limit.exists());
    groups
}

/// The number in a file; `None` for `max` and for what is not there.
fn number(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The number after a name in a table of names and numbers.
fn field(table: &str, name: &str) -> Option<u64> {
    let mut words = table.split_ascii_whitespace();
    words.find(|word| *word == name)?;
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn levels_rise_at_once_and_fall_later() {
        let judge = |now, own, all, kernel| {
            Level::judge(now, own * MIB, &Use { all: all * MIB, kernel: kernel * MIB }, 100 * MIB)
        };
        assert_eq!(judge(Level::Calm, 59, 0, 0), Level::Calm);
        assert_eq!(judge(Level::Calm, 60, 0, 0), Level::Pressed);
        assert_eq!(judge(Level::Pressed, 59, 0, 0), Level::Pressed);
        assert_eq!(judge(Level::Pressed, 49, 0, 0), Level::Calm);
        assert_eq!(judge(Level::Calm, 75, 0, 0), Level::Critical);
        // What the kernel holds for its connections counts as well.
        assert_eq!(judge(Level::Calm, 45, 70, 20), Level::Pressed);
        // Others fill the group: only a proxy that has its part in it gives way.
        assert_eq!(judge(Level::Calm, 20, 99, 5), Level::Calm);
        assert_eq!(judge(Level::Calm, 25, 99, 5), Level::Pressed);
    }

    #[test]
    fn the_narrowest_limit_of_all_groups_counts() {
        let home = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = home.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let limit = |of_process: &str| {
            let own = Own::Told(std::sync::Arc::new((32 * MIB).into()));
            let mut memory = Memory::with(own, groups(of_process, home.path()), 1 << 40);
            (memory.look(Level::Calm).limit, memory.group())
        };
        write("memory.max", "max\n");
        write("a/memory.max", "67108864\n");
        write("a/memory.current", "50000000\n");
        write("a/memory.stat", "anon 1\nfile 2\nkernel 300\nsock 20\ninactive_file 1000000\n");
        write("a/b/memory.max", "max\n");
        assert_eq!(limit("0::/a/b\n"), (64 * MIB, Use { all: 49_000_000, kernel: 320 }));
        assert_eq!(limit("0::/of/the/host\n"), (1 << 40, Use::default()));
        write("memory/x/memory.limit_in_bytes", "33554432\n");
        write("memory/x/memory.kmem.usage_in_bytes", "7\n");
        let of_both = limit("5:cpu:/x\n4:hugetlb,memory:/x\n0::/a/b\n");
        assert_eq!(of_both, (32 * MIB, Use { all: 0, kernel: 7 }));
    }

    #[test]
    fn what_this_process_holds_is_seen() {
        let mut memory = Memory::of_this_process().unwrap();
        let before = memory.look(Level::Calm).own;
        let held = vec![1u8; 64 << 20];
        assert!(memory.look(Level::Calm).own >= before + (48 << 20), "{} bytes more", held.len());
    }
}
