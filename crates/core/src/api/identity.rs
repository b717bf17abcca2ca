//! Whom the mesh trusts: the roots, and a rotation of them.

use serde::{Deserialize, Serialize};

/// Whom the mesh trusts, and how far a rotation of its root has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityView {
    /// The version of the trust bundle; it grows with every change.
    pub sequence: u64,
    /// The roots, oldest first.
    pub roots: Vec<RootView>,
    /// The rotation that is under way.
    pub rotation: Option<RotationView>,
    /// The one that ended last.
    pub last: Option<RotatedView>,
}

/// A root of the mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootView {
    /// Its number: the first root of a control plane is 1.
    pub number: u64,
    /// SHA-256 of its public key, in hex.
    pub sha256: String,
    /// When it ends, in unix seconds.
    pub expires: i64,
    /// What it is good for.
    pub state: RootState,
    /// Until when it is known at all, in unix seconds; 0: no end is set.
    pub until: i64,
}

/// What a root is good for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RootState {
    /// Certificates are issued under it.
    Issuing,
    /// Certificates under it are accepted.
    #[default]
    Trusted,
    /// It was replaced: a certificate under it can be renewed, and nothing else.
    Retired,
}

/// A rotation of the root that is under way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationView {
    /// The number of the root that goes.
    pub from: u64,
    /// The number of the root that comes.
    pub to: u64,
    /// The step.
    pub step: RotationStep,
    /// Whether it was aborted and goes back.
    pub back: bool,
    /// Whether nobody is waited for who is not connected, and for the others only for a moment.
    pub now: bool,
    /// When it began, in unix seconds.
    pub began: i64,
    /// When the step began, in unix seconds.
    pub step_began: i64,
    /// Workloads that have done this step.
    pub done: usize,
    /// Workloads that are to do it.
    pub of: usize,
    /// Those who have not, at most 100.
    pub waiting: Vec<WaitingView>,
}

/// The steps of a rotation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RotationStep {
    /// Proxies are told to trust the new root beside the old one.
    #[default]
    Spread,
    /// Certificates are issued under the new root, and renewed.
    Renew,
    /// Proxies are told to trust the old root no longer.
    Drop,
}

/// A workload that a rotation waits for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingView {
    /// Its uid.
    pub workload: String,
    /// What it has not done.
    pub why: String,
    /// Until when it is waited for at the longest, in unix seconds; 0: until it has.
    pub until: i64,
}

/// A rotation that has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotatedView {
    /// The number of the root before.
    pub from: u64,
    /// The number of the root since; the same where it was aborted.
    pub to: u64,
    /// When it began, in unix seconds.
    pub began: i64,
    /// When it ended, in unix seconds.
    pub ended: i64,
}

/// How the root is to be rotated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rotate {
    /// The old root is not to be trusted a moment longer than the connected proxies need.
    pub now: bool,
    /// Nobody is waited for who is not connected.
    pub without_absent: bool,
}
