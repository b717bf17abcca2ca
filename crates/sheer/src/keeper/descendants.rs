//! The end of a process tree. Its root is a subreaper, so that whoever loses a parent becomes its child.

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use std::fs;

/// Kills all children of this process, then those who become its children by that, until none is left.
pub(crate) fn kill_all() {
    loop {
        for child in children_of(std::process::id().cast_signed()) {
            // One that ended meanwhile is what is wanted.
            let _ = kill(Pid::from_raw(child), Signal::SIGKILL);
        }
        match waitpid(None::<Pid>, None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}

/// The processes whose parent is `parent`.
fn children_of(parent: i32) -> Vec<i32> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let numbers = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    numbers.filter(|pid| stat_field(*pid, PARENT) == Some(parent.cast_unsigned().into())).collect()
}

/// When a process began, in clock ticks after the machine did: tells it from a later one with the same number.
pub(crate) fn began(pid: i32) -> Option<u64> {
    stat_field(pid, BEGAN)
}

/// Fields of /proc/PID/stat, counted behind the name in parentheses, which may contain anything.
const PARENT: usize = 1;
const BEGAN: usize = 19;

fn stat_field(pid: i32, field: usize) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(field)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_found_by_its_parent() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id().cast_signed();
        assert!(children_of(std::process::id().cast_signed()).contains(&pid));
        assert!(began(pid).unwrap() >= began(std::process::id().cast_signed()).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(began(pid), None);
    }
}
