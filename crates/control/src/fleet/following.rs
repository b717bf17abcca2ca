//! How far workloads follow a change of the mesh's roots.

use super::{Fleet, Phase};
use crate::Control;
use crate::rotation::{Follower, InForce};
use crate::store::Table;
use sheer_core::wire::v1::Trust;
use std::collections::BTreeSet;

impl Fleet {
    /// Notes what a workload's proxy works with.
    pub(super) fn note_in_force(&self, uid: &str, session: u64, trust: Trust) {
        let mut members = self.members.lock();
        if let Some(member) = members.get_mut(uid).filter(|member| member.session == session) {
            let root_sha256 = trust.root_sha256.to_vec();
            member.in_force = Some(InForce { sequence: trust.sequence, root_sha256 });
        }
    }

    /// Notes that a workload has ended, so that nobody is there who uses its certificate.
    pub(super) fn note_left(&self, control: &Control, uid: &str) {
        let left = {
            let mut certificates = self.certificates.lock();
            let Some(attested) = certificates.get_mut(uid).filter(|it| !it.left) else { return };
            attested.left = true;
            attested.clone()
        };
        self.store_attested(control, uid, left);
    }

    /// Notes that it is there again.
    pub(super) fn note_here(&self, control: &Control, uid: &str) {
        let here = {
            let mut certificates = self.certificates.lock();
            let Some(attested) = certificates.get_mut(uid).filter(|it| it.left) else { return };
            attested.left = false;
            attested.clone()
        };
        self.store_attested(control, uid, here);
    }

    fn store_attested(&self, control: &Control, uid: &str, attested: crate::attest::Attested) {
        let uid = uid.to_owned();
        control.store.write_later(move |transaction| transaction.put(Table::Certificates, &uid, &attested));
    }

    /// All workloads that are connected or hold a certificate.
    pub(crate) fn followers(&self) -> Vec<Follower> {
        let (members, certificates) = (self.members.lock(), self.certificates.lock());
        let uids: BTreeSet<&String> = members.keys().chain(certificates.keys()).collect();
        let follower = |uid: &String| {
            // Who was connected before this control plane started has a minute to come back.
            let is_there = |member: &&super::Member| matches!(member.phase, Phase::Connected | Phase::Held);
            let member = members.get(uid).filter(is_there);
            Follower {
                uid: uid.clone(),
                connected: member.is_some(),
                in_force: member.and_then(|member| member.in_force.clone()),
                attested: certificates.get(uid).cloned(),
            }
        };
        uids.into_iter().map(follower).collect()
    }
}
