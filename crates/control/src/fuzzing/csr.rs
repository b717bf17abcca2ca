use crate::ca::{Authority, CsrError, MAX_CSR, requested_key};
use crate::clock::Clock;
use crate::rotation::Trust;
use crate::tls;
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, DnType, KeyPair, SanType};
use sheer_core::identity::SpiffeId;
use sheer_core::token::JoinToken;
use sheer_fuzzing::Choices;
use std::sync::LazyLock;
use std::time::Duration;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate, X509CertificationRequest};

static GRANTED: LazyLock<SpiffeId> =
    LazyLock::new(|| SpiffeId::parse("spiffe://mesh.internal/ns/default/sa/web").expect("an identity"));

static KEYS: LazyLock<[KeyPair; 2]> = LazyLock::new(|| {
    [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ED25519].map(|kind| KeyPair::generate_for(kind).expect("a key"))
});

static AUTHORITY: LazyLock<Authority> = LazyLock::new(|| {
    let directory = std::env::temp_dir().join(format!("sheer-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory");
    let authority =
        Authority::open(&directory, "mesh.internal", Clock::default(), &Trust::default()).expect("an authority");
    // It has read what it needs.
    let _ = std::fs::remove_dir_all(&directory);
    authority
});

/// What asks for a certificate: of a request nothing is believed but its key, and that only with its signature; one that
/// asks for more than was granted is refused; what is issued names the granted identity alone. And join tokens, which
/// have one spelling.
///
/// # Panics
/// When that does not hold.
pub fn csr(input: &[u8]) {
    let mut choices = Choices::of(input);
    match choices.below(4) {
        0 => raw(choices.rest()),
        1 => token(&String::from_utf8_lossy(choices.rest())),
        _ => made(&mut choices),
    }
}

fn raw(bytes: &[u8]) {
    match requested_key(bytes, &GRANTED) {
        Ok(key) => is_issued_to(&key),
        Err(CsrError::TooLong) => assert!(bytes.len() > MAX_CSR),
        Err(refusal) => assert!(refusal.to_string().len() < 1_000),
    }
}

fn token(text: &str) {
    let Ok(token) = JoinToken::parse(text) else { return };
    let again = JoinToken::parse(&token.encode()).expect("what was written");
    assert_eq!(again.encode(), token.encode());
    assert_eq!((again.id_text(), again.root_sha256), (token.id_text(), token.root_sha256));
    assert!(!format!("{token:?}").contains(text.trim()), "a secret is shown");
}

/// A request made of choices.
fn made(choices: &mut Choices<'_>) {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    if choices.flag() {
        params.distinguished_name.push(DnType::CommonName, "spiffe://mesh.internal/ns/ops/sa/admin");
    }
    let mut asks_for_more = false;
    let names = [0, 0, 1, 1, 2][choices.below(5)];
    for _ in 0..names {
        let name = match choices.below(5) {
            0 => SanType::DnsName(choices.one_of(&["web.example", "*"]).try_into().expect("a name")),
            1 => SanType::IpAddress([127, 0, 0, 1].into()),
            2 => {
                let text = choices.text();
                let Ok(text) = text.into_owned().try_into() else { return };
                SanType::URI(text)
            }
            _ => SanType::URI(GRANTED.to_string().try_into().expect("a name")),
        };
        asks_for_more |= !matches!(&name, SanType::URI(uri) if uri.as_str() == GRANTED.to_string());
        params.subject_alt_names.push(name);
    }
    asks_for_more |= names > 1;
    if choices.byte() > 200 {
        // Basic constraints: an authority or not (RFC 5280, section 4.2.1.9).
        let is_authority = choices.flag();
        let content = if is_authority { vec![0x30, 3, 1, 1, 0xff] } else { vec![0x30, 0] };
        params.custom_extensions.push(CustomExtension::from_oid_content(&[2, 5, 29, 19], content));
        asks_for_more |= is_authority;
    }
    let Ok(request) = params.serialize_request(&KEYS[choices.below(2)]) else { return };
    let mut der = request.der().to_vec();
    let (mut is_changed, mut is_other) = (false, false);
    if choices.byte() > 200 {
        // Around what is signed, the parser forgives a tag that is not quite right.
        let (_, whole) = X509CertificationRequest::from_der(request.der()).expect("a request");
        let signed = whole.certification_request_info.raw;
        let start = signed.as_ptr().addr() - request.der().as_ptr().addr();
        let (at, mask) = (choices.below(der.len().min(65_536)), choices.byte());
        der[at] ^= mask;
        is_other = mask != 0;
        is_changed = is_other && (start..start + signed.len()).contains(&at);
    }
    match requested_key(&der, &GRANTED) {
        Ok(key) => {
            assert!(!is_changed, "the signature holds for other bytes than were signed");
            assert!(!asks_for_more, "it asks for more than was granted");
            is_issued_to(&key);
        }
        Err(refusal) => assert!(is_other || asks_for_more, "a good request is refused: {refusal}"),
    }
}

fn is_issued_to(key: &crate::ca::RequestedKey) {
    let issued = AUTHORITY.issue(key, &GRANTED, Duration::from_secs(60)).expect("a certificate");
    let (leaf, rest) = issued.chain.split_first().expect("a leaf");
    let (after, parsed) = X509Certificate::from_der(leaf).expect("a certificate");
    assert!(after.is_empty() && !parsed.is_ca() && parsed.subject().iter().next().is_none());
    let names = parsed.subject_alternative_name().expect("names").expect("names");
    assert_eq!(names.value.general_names, [GeneralName::URI(&GRANTED.to_string())]);
    let now = issued.not_after - 30;
    let peer = tls::verify(&AUTHORITY.roots(), leaf, rest, now, Duration::ZERO).expect("our own certificate");
    assert_eq!((&peer.id, &peer.key_sha256), (&*GRANTED, &key.sha256));
}
