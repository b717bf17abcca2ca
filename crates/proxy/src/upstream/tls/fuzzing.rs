use super::{Leaf, Workloads, provider};
use crate::certificate::Verifier;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType,
};
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use sheer_core::identity::SpiffeId;
use sheer_fuzzing::Choices;
use std::sync::LazyLock;
use std::time::Duration;
use time::OffsetDateTime;

const TRUST_DOMAIN: &str = "mesh.internal";

/// When all certificates here are looked at, in seconds.
const NOW: i64 = 1_800_000_000;

struct Scene {
    key: KeyPair,
    /// The mesh's own, another of the same name, and one under the first.
    issuers: [(Issuer<'static, KeyPair>, CertificateDer<'static>); 3],
    verifier: Verifier<Workloads>,
}

static SCENE: LazyLock<Scene> = LazyLock::new(|| {
    let key = || KeyPair::generate().expect("a key");
    let authority = |name: &str| {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params
    };
    let root = || {
        let (params, key) = (authority("root"), key());
        let certificate = params.self_signed(&key).expect("a root").der().clone();
        (Issuer::new(params, key), certificate)
    };
    let (own, other) = (root(), root());
    let (params, under) = (authority("issuing"), key());
    let certificate = params.signed_by(&under, &own.0).expect("an issuer").der().clone();
    let workloads = Workloads::of(TRUST_DOMAIN, std::slice::from_ref(&own.1)).expect("a rule");
    let verifier = Verifier::new(workloads, &provider());
    Scene { key: key(), issuers: [own, other, (Issuer::new(params, under), certificate)], verifier }
});

/// Identities and certificates of peers: a text is an identity exactly when it has the one form; a certificate is read
/// as the library that checks its chain reads it; and one is admitted exactly when everything about it is right.
///
/// # Panics
/// When that does not hold.
pub fn leaf(input: &[u8]) {
    let mut choices = Choices::of(input);
    match choices.below(3) {
        0 => identity(&String::from_utf8_lossy(choices.rest())),
        1 => certificate(choices.rest()),
        _ => peer(&mut choices),
    }
}

fn identity(text: &str) {
    let parsed = SpiffeId::parse(text).ok();
    assert_eq!(parsed.is_some(), is_identity(text), "{text}");
    let Some(id) = parsed else { return };
    assert_eq!(id.to_string(), text, "an identity has one spelling");
    assert_eq!(SpiffeId::new(id.trust_domain(), id.namespace().clone(), id.service_account().clone()), Ok(id));
}

fn is_identity(text: &str) -> bool {
    let parts: Vec<&str> = text.split('/').collect();
    let ["spiffe:", "", trust_domain, "ns", namespace, "sa", account] = parts[..] else { return false };
    let domain = trust_domain.bytes().all(|it| matches!(it, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_'));
    let label = |text: &str| {
        let inner = text.bytes().all(|it| matches!(it, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        inner && (1..=63).contains(&text.len()) && !text.starts_with('-') && !text.ends_with('-')
    };
    domain && (1..=255).contains(&trust_domain.len()) && label(namespace) && label(account)
}

/// Any bytes: whatever is read in them was there, and the other library reads the same names.
fn certificate(bytes: &[u8]) {
    let der = CertificateDer::from(bytes);
    let Ok(read) = Leaf::read(&der) else { return };
    let uri = read.id.to_string();
    assert!(bytes.windows(uri.len()).any(|part| part == uri.as_bytes()), "a name that is not in the certificate");
    if let Ok(other) = webpki::EndEntityCert::try_from(&der) {
        assert_eq!(other.valid_uri_names().collect::<Vec<_>>(), [uri.as_str()]);
    }
}

/// A certificate made of choices, as a client's and as a server's.
fn peer(choices: &mut Choices<'_>) {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let names: Vec<String> = (0..[1, 1, 1, 0, 2, 3][choices.below(6)]).map(|_| name(choices)).collect();
    let uris: Vec<SanType> =
        names.iter().filter_map(|name| Some(SanType::URI(name.as_str().try_into().ok()?))).collect();
    if uris.len() != names.len() {
        return;
    }
    params.subject_alt_names = uris;
    if choices.byte() > 200 {
        // Names of other kinds may stand beside (X.509-SVID, section 2).
        let other = choices.one_of(&["web.example", "*.example"]);
        params.subject_alt_names.push(SanType::DnsName(other.try_into().expect("a name")));
    }
    let is_authority = choices.byte() > 220;
    params.is_ca = if is_authority { IsCa::Ca(BasicConstraints::Unconstrained) } else { IsCa::ExplicitNoCa };
    let (client, server) = match choices.below(6) {
        0 => (true, false),
        1 => (false, true),
        2 => (false, false),
        _ => (true, true),
    };
    params.extended_key_usages.extend(client.then_some(ExtendedKeyUsagePurpose::ClientAuth));
    params.extended_key_usages.extend(server.then_some(ExtendedKeyUsagePurpose::ServerAuth));
    if !client && !server {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::EmailProtection);
    }
    let at = |offset: i64| OffsetDateTime::from_unix_timestamp(NOW + offset).expect("a time");
    let (begins, ends) = match choices.below(6) {
        0 => (60, 3600),
        1 => (-3600, -1),
        2 => (0, 0),
        3 => (-1, 1),
        _ => (-3600, 3600),
    };
    (params.not_before, params.not_after) = (at(begins), at(ends));
    let by = [0, 0, 0, 2, 2, 1][choices.below(6)];
    let (issuer, issuing) = &SCENE.issuers[by];
    let Ok(certificate) = params.signed_by(&SCENE.key, issuer) else { return };
    let mut der = certificate.der().to_vec();
    let mut is_changed = false;
    if choices.byte() > 220 {
        let (at, mask) = (choices.below(der.len()), choices.byte());
        der[at] ^= mask;
        is_changed = mask != 0;
    }
    let leaf = CertificateDer::from(der);
    let intermediates = if choices.byte() < 230 { vec![issuing.clone()] } else { vec![] };

    let is_named = match names.as_slice() {
        [name] => SpiffeId::parse(name).is_ok_and(|id| id.trust_domain() == TRUST_DOMAIN),
        _ => false,
    };
    let chains = by == 0 || by == 2 && !intermediates.is_empty();
    let is_right = is_named && !is_authority && begins <= 0 && ends >= 0 && chains && !is_changed;
    let now = UnixTime::since_unix_epoch(Duration::from_secs(NOW.unsigned_abs()));
    let as_client = SCENE.verifier.verify_client_cert(&leaf, &intermediates, now);
    assert_eq!(as_client.is_ok(), is_right && client, "as a client's: {as_client:?}");
    let asked = ServerName::try_from("p80.web.default.svc.mesh.internal").expect("a name");
    let as_server = SCENE.verifier.verify_server_cert(&leaf, &intermediates, &asked, &[], now);
    assert_eq!(as_server.is_ok(), is_right && server, "as a server's: {as_server:?}");
    if as_client.is_ok() || as_server.is_ok() {
        let read = Leaf::read(&leaf).unwrap_or_else(|error| panic!("an admitted one is not read: {error}"));
        assert_eq!(read.id.to_string(), names[0]);
    }
}

fn name(choices: &mut Choices<'_>) -> String {
    let whole = "spiffe://mesh.internal/ns/default/sa/web";
    match choices.below(12) {
        0 => choices.text().into_owned(),
        1 => format!("spiffe://mesh.internal/ns/{}/sa/web", choices.text()),
        2 => format!("spiffe://{}/ns/default/sa/web", choices.text()),
        3 => {
            choices.one_of(&["spiffe://MESH.internal/ns/default/sa/web", "spiffe://other/ns/default/sa/web"]).to_owned()
        }
        4 => format!("{whole}{}", choices.one_of(&["/", "?a", ":80", "%2e", "#", " "])),
        _ => whole.to_owned(),
    }
}
