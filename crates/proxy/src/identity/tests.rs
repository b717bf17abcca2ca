use super::*;
use crate::control::fake::Fake;
use crate::control::{Line, Machine};
use futures::future::BoxFuture;
use std::path::Path;
use std::time::SystemTime;

/// A machine whose clock is this much ahead.
#[derive(Debug)]
struct Later(Duration);

impl Outside for Later {
    fn connect<'a>(&'a self, address: &'a Address) -> BoxFuture<'a, std::io::Result<Box<dyn Line>>> {
        Machine.connect(address)
    }

    fn now(&self) -> SystemTime {
        Machine.now() + self.0
    }
}

struct Scene {
    directory: tempfile::TempDir,
    fake: Fake,
    published: Arc<ArcSwapOption<Credentials>>,
    trust: watch::Sender<Option<v1::TrustBundle>>,
}

impl Scene {
    fn new() -> Self {
        let trust = watch::channel(None).0;
        let directory = tempfile::tempdir().unwrap();
        Self { directory, fake: Fake::new(), published: Arc::default(), trust }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("control.sock")
    }

    fn keeper(&self) -> Keeper {
        self.keeper_of("default", "web")
    }

    fn keeper_of(&self, namespace: &str, account: &str) -> Keeper {
        let wanted = Wanted {
            namespace: namespace.into(),
            service_account: account.into(),
            workload: "web-1".into(),
            control: vec![Address::Unix(self.socket())],
            token_file: None,
        };
        let directory = Directory::open(&self.directory.path().join("state")).unwrap();
        Keeper::new(
            wanted,
            directory,
            self.published.clone(),
            self.trust.subscribe(),
            Arc::default(),
            Arc::new(Machine),
        )
    }

    fn certified(&self) -> usize {
        self.fake.script.lock().certified.len()
    }
}

async fn until(mut condition: impl FnMut() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.expect("it happens within 20 s");
}

#[tokio::test]
async fn a_certificate_is_got_kept_and_found_again() {
    let scene = Scene::new();
    let keeper = scene.keeper();
    let mut held = keeper.held();
    let task = tokio::spawn(keeper.run());
    // The control plane comes later than the proxy.
    let (_, running) = scene.fake.serve(&scene.socket());
    held.wait_for(Option::is_some).await.unwrap();
    let id = scene.published.load().as_ref().map(|it| it.id().to_string());
    assert_eq!(id.as_deref(), Some("spiffe://mesh.internal/ns/default/sa/web"));
    assert_eq!(held.borrow().as_ref().map(|it| it.uid().to_owned()).as_deref(), Some("local/host/default/web-1"));
    until(|| Path::new(&scene.directory.path().join("state/identity")).exists()).await;
    let saved = || Directory::open(&scene.directory.path().join("state")).unwrap().load(IDENTITY).unwrap();
    until(|| Stored::decode(saved().unwrap_or_default().as_slice()).is_ok_and(|it| !it.chain.is_empty())).await;
    task.abort();
    drop(running);

    // Without the control plane, from disk.
    scene.published.store(None);
    let keeper = scene.keeper();
    assert!(scene.published.load().is_some());
    assert!(keeper.held().borrow().is_some());
    assert_eq!(scene.certified(), 1);

    // For another workload it is no use.
    scene.published.store(None);
    let other = scene.keeper_of("default", "api");
    assert!(other.held().borrow().is_none() && scene.published.load().is_none());
}

#[tokio::test]
async fn it_is_renewed_with_the_same_key_before_it_ends() {
    let scene = Scene::new();
    scene.fake.script.lock().lifetime = Duration::from_secs(3);
    let (_, _running) = scene.fake.serve(&scene.socket());
    let keeper = scene.keeper();
    let held = keeper.held();
    let task = tokio::spawn(keeper.run());
    until(|| held.borrow().is_some()).await;
    let first = held.borrow().as_ref().map(|it| it.not_after());
    until(|| held.borrow().as_ref().map(|it| it.not_after()) != first).await;
    assert!(held.borrow().as_ref().is_some_and(|it| it.holds_at(SystemTime::now())));
    let keys: Vec<_> = scene.fake.script.lock().certified.iter().map(|it| public_key(&it.csr)).collect();
    assert!(keys.len() >= 2 && keys.iter().all(|it| *it == keys[0]));
    task.abort();
}

fn public_key(csr: &[u8]) -> Vec<u8> {
    let (_, parsed) = x509_parser::certification_request::X509CertificationRequest::from_der(csr).unwrap();
    parsed.certification_request_info.subject_pki.raw.to_vec()
}

use x509_parser::prelude::FromDer;

#[tokio::test]
async fn an_ended_certificate_is_renewed_at_once_after_a_sleep() {
    let scene = Scene::new();
    scene.fake.script.lock().lifetime = Duration::from_secs(3600);
    let (_, running) = scene.fake.serve(&scene.socket());
    let keeper = scene.keeper();
    let mut held = keeper.held();
    let task = tokio::spawn(keeper.run());
    held.wait_for(Option::is_some).await.unwrap();
    let saved = || Directory::open(&scene.directory.path().join("state")).unwrap().load(IDENTITY).unwrap();
    until(|| Stored::decode(saved().unwrap_or_default().as_slice()).is_ok_and(|it| !it.chain.is_empty())).await;
    task.abort();
    drop(running);
    // Wakes a day and a half later; the certificate it gets then holds for two days more.
    scene.fake.script.lock().lifetime = Duration::from_secs(3 * 86_400);
    let (_, _running) = scene.fake.serve(&scene.socket());
    let mut keeper = scene.keeper();
    keeper.outside = Arc::new(Later(Duration::from_secs(36 * 3600)));
    let held = keeper.held();
    assert!(held.borrow().as_ref().is_some_and(|it| !it.holds_at(SystemTime::now() + Duration::from_secs(36 * 3600))));
    let task = tokio::spawn(keeper.run());
    until(|| held.borrow().as_ref().is_some_and(|it| it.holds_at(SystemTime::now() + Duration::from_secs(36 * 3600))))
        .await;
    task.abort();
}

#[tokio::test]
async fn a_refusal_is_passed_on_in_the_control_planes_words() {
    let scene = Scene::new();
    scene.fake.script.lock().refuse = Some(tonic::Status::unauthenticated("the token was used already"));
    let (_, _running) = scene.fake.serve(&scene.socket());
    let error = scene.keeper().run().await.to_string();
    assert!(error.contains("the token was used already"), "{error}");
    // The same key is used for the next attempt.
    let _ = scene.keeper().run().await;
    let keys: Vec<_> = scene.fake.script.lock().certified.iter().map(|it| public_key(&it.csr)).collect();
    assert_eq!(keys[0], keys[1]);
}

#[tokio::test]
async fn a_refused_renewal_keeps_the_certificate_in_use() {
    let scene = Scene::new();
    scene.fake.script.lock().lifetime = Duration::from_secs(4);
    let (_, _running) = scene.fake.serve(&scene.socket());
    let keeper = scene.keeper();
    let held = keeper.held();
    let task = tokio::spawn(keeper.run());
    until(|| held.borrow().is_some()).await;
    scene.fake.script.lock().refuse = Some(tonic::Status::permission_denied("evicted"));
    until(|| scene.certified() >= 2).await;
    assert!(!task.is_finished() && scene.published.load().is_some());
    task.abort();
}

#[tokio::test]
async fn a_changed_trust_bundle_is_adopted_and_a_foreign_one_not() {
    let scene = Scene::new();
    let (_, _running) = scene.fake.serve(&scene.socket());
    let keeper = scene.keeper();
    let mut held = keeper.held();
    let task = tokio::spawn(keeper.run());
    held.wait_for(Option::is_some).await.unwrap();
    let before = scene.published.load_full().unwrap();
    let mut bundle = scene.fake.trust();
    bundle.roots.push(Fake::new().trust().roots[0].clone());
    scene.trust.send_replace(Some(v1::TrustBundle { trust_domain: "other".into(), ..bundle.clone() }));
    tokio::task::yield_now().await;
    assert!(scene.published.load_full().is_some_and(|now| Arc::ptr_eq(&now, &before)));
    scene.trust.send_replace(Some(bundle));
    until(|| scene.published.load_full().is_some_and(|now| !Arc::ptr_eq(&now, &before))).await;
    assert_eq!(held.borrow().as_ref().map(|it| it.stored().trust.as_ref().map_or(0, |it| it.roots.len())), Some(2));
    task.abort();
}

#[tokio::test]
async fn under_new_roots_another_certificate_is_asked_for() {
    let scene = Scene::new();
    let (_, running) = scene.fake.serve(&scene.socket());
    let keeper = scene.keeper();
    let mut held = keeper.held();
    let task = tokio::spawn(keeper.run());
    held.wait_for(Option::is_some).await.unwrap();
    drop(running);
    // The control plane lost its state and began anew, with the same name.
    let anew = Fake::new();
    let (_, _running) = anew.serve(&scene.socket());
    scene.trust.send_replace(Some(anew.trust()));
    until(|| held.borrow().as_ref().is_some_and(|it| it.is_rooted() && it.stored().trust == Some(anew.trust()))).await;
    task.abort();
}

#[tokio::test]
async fn a_certificate_is_renewed_in_its_turn_when_another_root_issues() {
    let scene = Scene::new();
    let (_, _running) = scene.fake.serve(&scene.socket());
    let keeper = scene.keeper();
    let mut held = keeper.held();
    let task = tokio::spawn(keeper.run());
    held.wait_for(Option::is_some).await.unwrap();
    let own = held.borrow().as_ref().and_then(|it| it.root_sha256()).unwrap();
    let told = |sequence: u64, issuing: &[u8]| v1::TrustBundle {
        sequence,
        issuing_root_sha256: issuing.to_vec().into(),
        renew_within_ms: 10,
        ..scene.fake.trust()
    };
    let in_force = || held.borrow().as_ref().map_or(0, |it| it.trust_sequence());
    scene.trust.send_replace(Some(told(7, &own)));
    until(|| in_force() == 7).await;
    assert_eq!(scene.certified(), 1, "its own root issues");
    // One of the same control plane that is older came late.
    scene.trust.send_replace(Some(told(6, &[9; 32])));
    scene.trust.send_replace(Some(told(8, &[9; 32])));
    until(|| scene.certified() >= 2).await;
    assert!(in_force() == 8 || in_force() == 0, "{}", in_force());
    task.abort();
}

#[tokio::test]
async fn a_token_that_cannot_be_used_is_explained() {
    let scene = Scene::new();
    let mut keeper = scene.keeper();
    let path = scene.directory.path().join("token");
    keeper.wanted.token_file = Some(path.clone());
    let error = keeper.run().await.to_string();
    assert!(error.contains("cannot read the join token"), "{error}");
    std::fs::write(&path, "sheer1.cut.off").unwrap();
    let mut keeper = scene.keeper();
    keeper.wanted.token_file = Some(path);
    let error = keeper.run().await.to_string();
    assert!(error.contains("sheer token create"), "{error}");
}

#[test]
fn a_certificate_of_a_short_life_is_asked_for_more_than_once_before_it_ends() {
    // Renewed after half of a minute, by whoever is unlucky with every pause.
    let (mut left, mut failures) = (Duration::from_secs(24), 0);
    while !left.is_zero() {
        failures += 1;
        left = left.saturating_sub(FIRST_PAUSE.saturating_mul(1 << (failures - 1)).min(longest_pause(left)));
    }
    assert!(failures > 10, "{failures}");
    assert_eq!(longest_pause(Duration::from_secs(86_400)), LAST_PAUSE);
    assert_eq!(longest_pause(Duration::ZERO), LAST_PAUSE_WITHOUT);
}
