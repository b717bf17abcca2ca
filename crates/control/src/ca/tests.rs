use super::*;
use std::sync::atomic::{AtomicI64, Ordering};

fn id() -> SpiffeId {
    SpiffeId::parse("spiffe://mesh.internal/ns/default/sa/web").unwrap()
}

fn request(change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
    let mut params = CertificateParams::default();
    change(&mut params);
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

#[test]
fn a_leaf_has_the_granted_name_alone() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::open(directory.path(), "mesh.internal", Clock::default(), &Trust::default()).unwrap();
    let key = requested_key(&request(|_| {}), &id()).unwrap();
    let issued = authority.issue(&key, &id(), Duration::from_secs(60)).unwrap();
    assert_eq!(issued.chain.len(), 2);
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical);
    let wanted = id().to_string();
    assert_eq!(names.value.general_names, [GeneralName::URI(&wanted)]);
    assert!(leaf.subject().iter().next().is_none());
    assert!(!leaf.is_ca());
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && usage.server_auth);
    assert!(leaf.key_usage().unwrap().unwrap().value.digital_signature());
    assert!(leaf.raw_serial().len() >= 8);
    let life = leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp();
    assert_eq!(life, 60 + 15 * 60);
    assert_eq!(leaf.validity().not_after.timestamp(), issued.not_after);
}

#[test]
fn the_root_stays_and_its_files_are_private() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let open = || Authority::open(directory.path(), "mesh.internal", Clock::default(), &Trust::default()).unwrap();
    assert_eq!(open().root_sha256(), open().root_sha256());
    for name in ["root.pem", "issuing.pem"] {
        let mode = directory.path().join(name).metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

#[test]
fn the_issuing_certificate_rotates_at_half_of_its_life() {
    let directory = tempfile::tempdir().unwrap();
    let offset = Arc::new(AtomicI64::new(0));
    let clock = Clock::shifted(offset.clone());
    let authority = Authority::open(directory.path(), "mesh.internal", clock, &Trust::default()).unwrap();
    let first = authority.issuing_not_after();
    authority.rotate().unwrap();
    assert_eq!(authority.issuing_not_after(), first);
    offset.store(50 * 24 * 3600, Ordering::Relaxed);
    authority.rotate().unwrap();
    assert!(authority.issuing_not_after() > first + 40 * 24 * 3600);
}

#[test]
fn requests_that_ask_for_more_than_a_key_are_refused() {
    let granted = id().to_string();
    let good = |csr: &[u8]| requested_key(csr, &id()).is_ok();
    assert!(good(&request(|params| params.subject_alt_names = vec![uri(&granted)])));
    let wrong: Vec<Vec<SanType>> = vec![
        vec![uri("spiffe://mesh.internal/ns/other/sa/web")],
        vec![uri(&granted), uri("spiffe://mesh.internal/ns/other/sa/web")],
        vec![uri(&granted), SanType::DnsName("control.mesh.internal".try_into().unwrap())],
        vec![uri("spiffe://mesh.internal/*")],
    ];
    for names in wrong {
        let csr = request(|params| params.subject_alt_names = names.clone());
        assert!(matches!(requested_key(&csr, &id()), Err(CsrError::Names(_))), "{names:?}");
    }
    let csr = request(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    assert_eq!(requested_key(&csr, &id()).err(), Some(CsrError::Authority));
}

#[test]
fn damaged_and_oversized_requests_are_refused() {
    let csr = request(|_| {});
    assert_eq!(requested_key(&vec![0x30; 1 << 20], &id()).err(), Some(CsrError::TooLong));
    for cut in 0..csr.len() {
        assert!(requested_key(&csr[..cut], &id()).is_err());
    }
    let mut flipped = csr.clone();
    let last = flipped.len() - 1;
    flipped[last] ^= 1;
    assert!(matches!(requested_key(&flipped, &id()), Err(CsrError::Signature | CsrError::Malformed)));
    let mut longer = csr;
    longer.push(0);
    assert_eq!(requested_key(&longer, &id()).err(), Some(CsrError::Malformed));
}

#[test]
fn other_kinds_of_keys() {
    let with = |key: KeyPair| CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
    for algorithm in [&rcgen::PKCS_ED25519, &rcgen::PKCS_ECDSA_P384_SHA384] {
        let csr = with(KeyPair::generate_for(algorithm).unwrap());
        assert!(requested_key(&csr, &id()).is_ok(), "{algorithm:?}");
    }
    let rsa = KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
    assert!(requested_key(&with(rsa), &id()).is_ok());
}
