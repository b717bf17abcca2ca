//! Whose user ids the processes of a workload have.

use anyhow::{Context, Result, bail};
use nix::unistd::{Gid, Group, Uid, User, geteuid, getgrouplist};
use sheer_proxy::plan::PROXY_USER;
use std::ffi::CString;

/// Whom the command runs as, and what of the environment says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    /// User, group, supplementary groups; unset: as the supervisor does.
    pub(crate) ids: Option<(u32, u32, Vec<u32>)>,
    /// Variables to set.
    pub(crate) set: Vec<(String, String)>,
    /// A remark for the person who starts it.
    pub(crate) remark: Option<String>,
}

/// Whom the command runs as. It is never root unless that was asked for: without `--user` it is who called sudo,
/// otherwise `nobody`.
///
/// # Errors
/// When there is no such user or group, or this process may not become it.
pub(crate) fn command(user: Option<&str>, group: Option<&str>) -> Result<Chosen> {
    if !geteuid().is_root() {
        return own(user, group);
    }
    let (found, remark) = match user {
        Some(name) => (look_up(name)?, None),
        None => {
            let caller = std::env::var("SUDO_UID").ok().and_then(|text| text.parse().ok());
            let caller =
                caller.filter(|uid| *uid != 0).and_then(|uid| User::from_uid(Uid::from_raw(uid)).ok().flatten());
            let found = match caller {
                Some(user) => user,
                None => look_up("nobody").context("there is no user to run the command as; name one by --user")?,
            };
            let remark = format!("the command runs as user '{}'; choose another by --user", found.name);
            (found, Some(remark))
        }
    };
    let gid = match group {
        Some(name) => group_id(name)?,
        None => found.gid,
    };
    let name = CString::new(found.name.clone()).context("a user name with a null byte")?;
    let groups = getgrouplist(&name, gid).unwrap_or_else(|_| vec![gid]);
    let set = vec![
        ("USER".into(), found.name.clone()),
        ("LOGNAME".into(), found.name),
        ("HOME".into(), found.dir.display().to_string()),
        ("SHELL".into(), found.shell.display().to_string()),
    ];
    let ids = (found.uid.as_raw(), gid.as_raw(), groups.into_iter().map(Gid::as_raw).collect());
    Ok(Chosen { ids: Some(ids), set, remark })
}

/// Without root nobody can be chosen but oneself.
fn own(user: Option<&str>, group: Option<&str>) -> Result<Chosen> {
    if let Some(name) = user
        && look_up(name)?.uid != geteuid()
    {
        bail!("only root can run a command as user '{name}'; leave out --user, or use sudo");
    }
    if let Some(name) = group
        && group_id(name)? != nix::unistd::getegid()
    {
        bail!("only root can run a command as group '{name}'; leave out --group, or use sudo");
    }
    Ok(Chosen { ids: None, set: Vec::new(), remark: None })
}

/// The user that proxies run as: `None` without root (then they run as the person who starts them).
pub(crate) fn proxy() -> Option<(u32, u32)> {
    if !geteuid().is_root() {
        return None;
    }
    match User::from_name("sheer") {
        Ok(Some(user)) => Some((user.uid.as_raw(), user.gid.as_raw())),
        _ => Some((PROXY_USER, PROXY_USER)),
    }
}

/// A user by name or number. A number need not have an account, as in containers: its group is then the same number.
///
/// # Errors
/// When there is none of this name.
pub(crate) fn look_up(name: &str) -> Result<User> {
    let found = match name.parse() {
        Ok(number) => {
            let known = User::from_uid(Uid::from_raw(number)).ok().flatten();
            Some(known.unwrap_or_else(|| User {
                name: number.to_string(),
                passwd: CString::default(),
                uid: Uid::from_raw(number),
                gid: Gid::from_raw(number),
                gecos: CString::default(),
                dir: "/".into(),
                shell: "/bin/sh".into(),
            }))
        }
        Err(_) => User::from_name(name).ok().flatten(),
    };
    found.with_context(|| format!("there is no user '{name}' on this machine"))
}

fn group_id(name: &str) -> Result<Gid> {
    let found = match name.parse() {
        Ok(gid) => Group::from_gid(Gid::from_raw(gid)),
        Err(_) => Group::from_name(name),
    };
    Ok(found.ok().flatten().with_context(|| format!("there is no group '{name}' on this machine"))?.gid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_by_name_and_number() {
        assert_eq!(look_up("root").unwrap().uid, look_up("0").unwrap().uid);
        assert_eq!(look_up("4242424").unwrap().gid.as_raw(), 4_242_424);
        assert!(look_up("no-such-user").unwrap_err().to_string().contains("no-such-user"));
    }
}
