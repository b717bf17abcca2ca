use super::*;
use crate::ca::{Authority, requested_key};
use crate::clock::Clock;
use rustls_pki_types::CertificateDer;
use sheer_core::identity::SpiffeId;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

fn attested(root: u64, not_after: i64, left: bool) -> Attested {
    Attested {
        identity: "spiffe://mesh.internal/ns/default/sa/web".into(),
        key_sha256: String::new(),
        not_after,
        uid: None,
        token: None,
        enrollment: None,
        addresses: Vec::new(),
        root,
        left,
    }
}

fn follower(connected: bool, in_force: Option<(u64, u8)>, attested: Option<Attested>) -> Follower {
    let in_force = in_force.map(|(sequence, root)| InForce { sequence, root_sha256: vec![root; 32] });
    Follower { uid: "local/host/default/web-1".into(), in_force, connected, attested }
}

/// The steps of a rotation without any proxy, each with what is told in it.
fn steps() -> [Trust; 5] {
    let first = Trust::default();
    let spread = first.began(Rotate::default(), 1000);
    let renew = spread.advanced(1010, HOUR, DAY);
    let drop = renew.advanced(1020, HOUR, DAY);
    let ended = drop.advanced(1030, HOUR, DAY);
    [first, spread, renew, drop, ended]
}

#[test]
fn a_rotation_tells_the_new_root_before_it_issues_and_issues_before_it_drops() {
    let [first, spread, renew, drop, ended] = steps();
    let told = |trust: &Trust| (trust.issuing, trust.trusted.clone());
    assert_eq!(told(&first), (1, vec![1]));
    assert_eq!(told(&spread), (1, vec![1, 2]));
    assert_eq!(told(&renew), (2, vec![1, 2]));
    assert_eq!(told(&drop), (2, vec![2]));
    assert_eq!(told(&ended), (2, vec![2]));
    let sequences = [&first, &spread, &renew, &drop].map(|trust| trust.sequence);
    assert!(sequences.is_sorted_by(|one, next| one < next), "{sequences:?}");
    assert_eq!(ended.sequence, drop.sequence, "nothing that proxies are told is different");
    let until =
        |trust: &Trust| trust.retired.iter().map(|it| (it.number, it.connections_until, it.until)).collect::<Vec<_>>();
    assert_eq!(until(&ended), [(1, 1020 + 3600, 1020 + 3600 + 86_400)]);
    assert_eq!(ended.forgotten(1020 + 3600), None);
    assert_eq!(ended.forgotten(1020 + 3600 + 86_400).map(|it| it.numbers()), Some(vec![2]));
}

#[test]
fn an_abort_goes_back_from_each_step() {
    let [first, spread, renew, drop, ended] = steps();
    assert!(matches!(first.aborted(2000), Err(RotationError::None)));
    assert!(matches!(ended.aborted(2000), Err(RotationError::None)));
    let back = spread.aborted(2000).unwrap();
    assert_eq!((back.issuing, back.trusted.as_slice(), &back.rotation), (1, &[1][..], &None));
    assert_eq!(back.last.map(|it| (it.from, it.to)), Some((1, 1)));
    for late in [renew, drop] {
        let back = late.aborted(2000).unwrap();
        // Both are trusted while certificates under either are in use.
        assert_eq!((back.issuing, back.trusted.as_slice()), (1, &[1, 2][..]));
        assert!(back.retired.is_empty() && back.sequence > late.sequence);
        assert!(matches!(back.aborted(2001), Err(RotationError::GoingBack)));
        let dropped = back.advanced(2010, HOUR, DAY);
        assert_eq!((dropped.issuing, dropped.trusted.as_slice()), (1, &[1][..]));
        let ended = dropped.advanced(2020, HOUR, DAY);
        assert_eq!(ended.last.clone().map(|it| (it.from, it.to, it.ended)), Some((1, 1, 2020)));
        // The next one is another.
        assert_eq!(ended.began(Rotate::default(), 3000).trusted, [1, 3]);
    }
}

#[test]
fn now_keeps_nothing_of_the_old_root_also_when_it_comes_late() {
    let now = Rotate { now: true, without_absent: false };
    let trust = Trust::default().began(now, 1000).advanced(1001, HOUR, DAY).advanced(1002, HOUR, DAY);
    assert!(trust.retired.is_empty());
    let [.., drop, _] = steps();
    let hurried = drop.hurried(&drop.rotation.clone().unwrap(), now, 2000);
    assert!(hurried.retired.is_empty() && hurried.sequence > drop.sequence);
}

#[test]
fn only_a_few_replaced_roots_are_remembered() {
    let mut trust = Trust::default();
    for round in 0..40 {
        let now = 1000 + round * 10;
        trust = trust.began(Rotate::default(), now);
        for _ in 0..3 {
            trust = trust.advanced(now, HOUR, DAY);
        }
    }
    assert_eq!(trust.numbers(), (9..=41).collect::<Vec<u64>>());
}

#[test]
fn who_is_waited_for() {
    let [_, spread, renew, drop, _] = steps();
    let without =
        Trust { rotation: renew.rotation.clone().map(|it| Rotation { without_absent: true, ..it }), ..renew.clone() };
    let hurried = Trust { rotation: spread.rotation.clone().map(|it| Rotation { now: true, ..it }), ..spread.clone() };
    let waits = |trust: &Trust, follower: Follower, now: i64| {
        let (waiting, _) = waiting(trust, [2; 32], &[follower], now);
        waiting.first().map(|it| it.until)
    };
    // Connected: until it works with what is told, and in the second step with a certificate under the new root.
    for (trust, root, expected) in [(&spread, 1, None), (&renew, 1, Some(0)), (&renew, 2, None), (&drop, 2, None)] {
        let told = Some((trust.sequence, root));
        assert_eq!(waits(trust, follower(true, told, None), 1100), expected, "{trust:?}");
        let before = Some((trust.sequence - 1, root));
        assert_eq!(waits(trust, follower(true, before, None), 1100), Some(0));
        assert_eq!(waits(trust, follower(true, None, None), 1100), Some(0));
    }
    assert_eq!(waits(&hurried, follower(true, None, None), 1014), Some(0));
    assert_eq!(waits(&hurried, follower(true, None, None), 1015), None);
    // Not connected: in the second step, for as long as a certificate under the old root is valid and somebody has it.
    for (trust, held, expected) in [
        (&renew, attested(1, 5000, false), Some(5000)),
        (&renew, attested(1, 1100, false), None),
        (&renew, attested(2, 5000, false), None),
        (&renew, attested(1, 5000, true), None),
        (&without, attested(1, 5000, false), None),
        (&spread, attested(1, 5000, false), None),
        (&drop, attested(1, 5000, false), None),
    ] {
        assert_eq!(waits(trust, follower(false, None, Some(held)), 1100), expected, "{trust:?}");
    }
}

/// A state directory on which a rotation is made step by step.
struct Site {
    directory: tempfile::TempDir,
    clock: Clock,
}

impl Site {
    fn open(&self, trust: &Trust) -> Authority {
        Authority::open(self.directory.path(), "mesh.internal", self.clock.clone(), trust).unwrap()
    }

    fn issue(&self, authority: &Authority) -> Vec<CertificateDer<'static>> {
        let id = SpiffeId::parse("spiffe://mesh.internal/ns/default/sa/web").unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
        authority.issue(&requested_key(csr.der(), &id).unwrap(), &id, HOUR).unwrap().chain
    }
}

fn verifies(roots: &[CertificateDer<'_>], chain: &[CertificateDer<'_>]) -> bool {
    let now = Clock::default().unix();
    crate::tls::verify(roots, &chain[0], &chain[1..], now, Duration::ZERO).is_ok()
}

#[test]
fn who_knows_one_root_alone_can_follow_until_the_old_one_is_dropped() {
    let site = Site { directory: tempfile::tempdir().unwrap(), clock: Clock::default() };
    let [first, spread, renew, drop, ended] = steps();
    let authority = site.open(&first);
    let (old, old_pin) = (authority.roots(), authority.pin());
    authority.make_successor(2, false).unwrap();
    authority.adopt(&spread).unwrap();
    let before = site.issue(&authority);
    authority.adopt(&renew).unwrap();
    // Killed at any point: the same from the disk.
    let authority = site.open(&renew);
    let new = [authority.root()];
    assert_ne!(old, new);
    let during = site.issue(&authority);
    assert!(verifies(&old, &before) && !verifies(&new, &before));
    assert!(
        verifies(&old, &during) && verifies(&new, &during),
        "it is under the new root, which the old one certified"
    );
    let number = |chain: &[CertificateDer<'_>]| authority.line_of(&chain[0], &chain[1..]);
    assert_eq!((number(&before), number(&during)), (Some((1, true)), Some((2, true))));
    assert_eq!(authority.pin(), old_pin, "tokens outlive an abort");

    authority.adopt(&drop).unwrap();
    let after = site.issue(&authority);
    assert!(verifies(&new, &after) && !verifies(&old, &after));
    assert_eq!(authority.line_of(&before[0], &before[1..]), Some((1, false)));
    assert_eq!(authority.line_of(&during[0], &during[1..]), Some((2, true)));
    // Aborted as late as this, both are there again.
    let back = site.open(&drop.aborted(2000).unwrap());
    assert_eq!((back.root(), back.roots().len()), (old[0].clone(), 2));

    authority.adopt(&ended).unwrap();
    authority.tidy(&ended).unwrap();
    let authority = site.open(&ended);
    assert!(authority.is_pinned(&old_pin) && authority.pin() != old_pin);
    let text = std::fs::read_to_string(site.directory.path().join("root.pem")).unwrap();
    assert!(text.contains("CERTIFICATE") && !text.contains("PRIVATE KEY"), "the key of the old root is gone");
    assert!(!site.directory.path().join("issuing.pem").exists());
    let (door, _) = authority.issue_server("control.mesh.internal").unwrap();
    assert!(door.chain.contains(&old[0]), "who knows the old root alone finds the way from it");
    let forgotten = ended.forgotten(i64::MAX).unwrap();
    authority.adopt(&forgotten).unwrap();
    authority.tidy(&forgotten).unwrap();
    assert!(!site.directory.path().join("root.pem").exists() && !authority.is_pinned(&old_pin));
    let (door, _) = authority.issue_server("control.mesh.internal").unwrap();
    assert_eq!(door.chain.len(), 3);
}

#[test]
fn an_aborted_root_leaves_no_file() {
    let site = Site { directory: tempfile::tempdir().unwrap(), clock: Clock::default() };
    let [first, spread, ..] = steps();
    let authority = site.open(&first);
    authority.make_successor(2, false).unwrap();
    authority.adopt(&spread).unwrap();
    let back = spread.aborted(2000).unwrap();
    authority.adopt(&back).unwrap();
    authority.tidy(&back).unwrap();
    let names = std::fs::read_dir(site.directory.path()).unwrap().map(|it| it.unwrap().file_name());
    let mut names: Vec<_> = names.filter_map(|it| it.into_string().ok()).collect();
    names.sort();
    assert_eq!(names, ["issuing.pem", "root.pem"]);
}

#[test]
fn a_root_whose_key_is_away_is_replaced_only_at_once() {
    let site = Site { directory: tempfile::tempdir().unwrap(), clock: Clock::default() };
    drop(site.open(&Trust::default()));
    let path = site.directory.path().join("root.pem");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, &text[..text.find("-----BEGIN PRIVATE").unwrap()]).unwrap();
    let authority = site.open(&Trust::default());
    assert!(matches!(authority.make_successor(2, false), Err(CaError::NoCross(_))));
    authority.make_successor(2, true).unwrap();
}

#[test]
fn a_lost_store_finds_the_roots_by_their_files() {
    let site = Site { directory: tempfile::tempdir().unwrap(), clock: Clock::default() };
    let [first, spread, ..] = steps();
    let authority = site.open(&first);
    authority.make_successor(2, false).unwrap();
    drop((authority, spread));
    let store = Store::open(site.directory.path()).unwrap();
    let trust = Trust::open_now(&store, site.directory.path(), 5000).unwrap();
    assert_eq!((trust.issuing, trust.trusted.as_slice(), trust.next), (1, &[1, 2][..], 3));
    assert_eq!(Trust::open_now(&store, site.directory.path(), 6000).unwrap(), trust, "it is kept");
    assert_eq!(site.open(&trust).roots().len(), 2);
}
