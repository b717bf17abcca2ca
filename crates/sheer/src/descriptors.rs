//! How many files and connections a process may have open.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Takes as many as this user may have. What a shell gives, 1024, is a limit for programs that use `select`; a proxy
/// needs two a connection. The workload's own command is another process and keeps what it was given.
pub(crate) fn take_all() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // Going on with fewer is better than not starting.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// How many this user may have.
pub(crate) fn most() -> Option<u64> {
    getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(_, hard)| hard)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_may_be_taken_are_taken() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limits");
        take_all();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE), Ok((hard, hard)));
        assert_eq!(most(), Some(hard));
    }
}
