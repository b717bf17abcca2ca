//! Certificates that are none of a workload of this mesh, presented by callers and by endpoints: the handshake fails in
//! both directions, nobody gets a byte, and the cause is counted. What TLS sessions remember ends with trust.

use super::framing::count_panics;
use super::*;
use crate::upstream::tls::Carried;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose as Usage, IsCa, KeyPair, SanType};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientSessionMemoryCache, Resumption};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, DigitallySignedStruct, HandshakeKind, ServerConfig, SignatureScheme};
use sheer_core::cause::Cause;
use time::OffsetDateTime;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// The first port of the workload that strangers call.
pub(super) const NAME: &str = "p1.web.default.svc.mesh.internal";

/// Somebody who speaks the mesh's TLS and keeps to none of its rules.
pub(super) struct Stranger {
    client: ClientConfig,
    server: Option<ServerConfig>,
}

/// Takes everybody for whom they say they are.
#[derive(Debug)]
struct Gullible(CryptoProvider);

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _above: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

impl Stranger {
    fn new(chain: Vec<CertificateDer<'static>>, key: &KeyPair) -> Self {
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let key = aws_lc_rs::sign::any_supported_type(&key).unwrap();
        // Whether the key belongs to the certificate is not asked.
        let resolver = Arc::new(SingleCertAndKey::from(CertifiedKey::new(chain, key)));
        let mut server = ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
            .with_no_client_auth()
            .with_cert_resolver(resolver.clone());
        server.alpn_protocols = vec![Carried::Http1.alpn().to_vec()];
        let mut stranger = Self::anonymous();
        stranger.client.client_auth_cert_resolver = resolver;
        stranger.server = Some(server);
        stranger
    }

    /// One without a certificate, who can only call.
    pub(super) fn anonymous() -> Self {
        let gullible = Arc::new(Gullible(aws_lc_rs::default_provider()));
        let builder = ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13]).dangerous();
        let mut client = builder.with_custom_certificate_verifier(gullible).with_no_client_auth();
        client.alpn_protocols = vec![Carried::Http1.alpn().to_vec()];
        client.enable_early_data = true;
        client.resumption = Resumption::store(Arc::new(ClientSessionMemoryCache::new(8)));
        Self { client, server: None }
    }

    /// One whose certificate an authority signed, and which differs from a good one as told.
    pub(super) fn signed(by: &Authority, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let (leaf, key) = by.sign(change);
        Self::new(vec![leaf], &key)
    }

    /// Makes a request of whoever answers there: what came back, and `None` when nothing did.
    pub(super) async fn call(&self, address: SocketAddr, server_name: &str) -> Option<String> {
        self.talk(address, server_name).await.map(|(answer, _)| answer)
    }

    /// The same, with how the handshake was made.
    async fn talk(&self, address: SocketAddr, server_name: &str) -> Option<(String, HandshakeKind)> {
        let stream = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from(server_name.to_owned()).unwrap();
        let connector = TlsConnector::from(Arc::new(self.client.clone()));
        let mut stream = connector.connect(name, stream).await.ok()?;
        assert!(stream.get_mut().1.early_data().is_none(), "bytes are taken before the handshake");
        let request = b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n";
        let mut answer = Vec::new();
        // A connection that is refused may end in any way.
        let _ = stream.write_all(request).await;
        let _ = stream.flush().await;
        let _ = stream.read_to_end(&mut answer).await;
        let kind = stream.get_ref().1.handshake_kind()?;
        (!answer.is_empty()).then(|| (String::from_utf8_lossy(&answer).into_owned(), kind))
    }

    /// Takes calls and counts the bytes that they tell.
    pub(super) async fn listen(&self) -> (SocketAddr, Rc<Cell<usize>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, heard) = (listener.local_addr().unwrap(), Rc::new(Cell::new(0)));
        let acceptor = TlsAcceptor::from(Arc::new(self.server.clone().expect("a certificate")));
        let count = heard.clone();
        spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                let mut buffer = [0; 4096];
                while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                    count.set(count.get() + read);
                }
            }
        });
        (address, heard)
    }
}

/// Who may present a certificate that is good for one side alone.
#[derive(Clone, Copy, PartialEq)]
enum As {
    Both,
    Caller,
    Endpoint,
}

type Change = Box<dyn FnOnce(&mut CertificateParams)>;

fn changed(change: impl FnOnce(&mut CertificateParams) + 'static) -> Change {
    Box::new(change)
}

fn named(uris: &[&str]) -> Change {
    let names: Vec<_> = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
    changed(move |params| params.subject_alt_names = names)
}

/// What is presented, what is wrong with it, and the cause.
fn strangers(ca: &Authority) -> Vec<(String, Stranger, As, Cause)> {
    let now = OffsetDateTime::now_utc();
    let seconds = time::Duration::seconds;
    let mut all = Vec::new();
    let mut add = |what: &str, stranger, side, cause| all.push((what.to_owned(), stranger, side, cause));
    let signed = |change: Change| Stranger::signed(ca, change);
    add("ended a second ago", signed(changed(move |it| it.not_after = now - seconds(1))), As::Both, Cause::PeerExpired);
    let later = changed(move |it| it.not_before = now + seconds(61));
    add("begins in 61 s", signed(later), As::Both, Cause::PeerNotYetValid);
    let authority = changed(|it| it.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    add("an authority's", signed(authority), As::Both, Cause::PeerNoWorkload);
    add("without a name", signed(named(&[])), As::Both, Cause::PeerNoWorkload);
    let host = changed(|it| it.subject_alt_names = vec![SanType::DnsName(NAME.try_into().unwrap())]);
    add("of a host", signed(host), As::Both, Cause::PeerNoWorkload);
    let good = "spiffe://mesh.internal/ns/default/sa/web";
    add(
        "two names",
        signed(named(&[good, "spiffe://mesh.internal/ns/default/sa/api"])),
        As::Both,
        Cause::PeerNoWorkload,
    );
    add("one name twice", signed(named(&[good, good])), As::Both, Cause::PeerNoWorkload);
    for odd in [
        "spiffe://other.example/ns/default/sa/web",
        "spiffe://mesh.internal.other.example/ns/default/sa/web",
        "spiffe://MESH.internal/ns/default/sa/web",
        "SPIFFE://mesh.internal/ns/default/sa/web",
        "spiffe://mesh.internal/ns/default/sa/web/",
        "spiffe://mesh.internal//ns/default/sa/web",
        "spiffe://mesh.internal/ns/default/sa/%77eb",
        "spiffe://mesh.internal/ns/default/sa/web%2f",
        "spiffe://mesh.internal/ns/%2e%2e/sa/web",
        "spiffe://mesh.internal/ns/../sa/web",
        "spiffe://mesh.internal:443/ns/default/sa/web",
        "spiffe://a@mesh.internal/ns/default/sa/web",
        "spiffe://mesh.internal/ns/default/sa/web?a",
        "spiffe://mesh.internal/ns/default/sa/web#a",
        "spiffe://mesh.internal/ns/default/sa/*",
        "spiffe://mesh.internal/ns/default",
        "spiffe://mesh.internal",
        "https://mesh.internal/ns/default/sa/web",
        "",
    ] {
        add(&format!("named '{odd}'"), signed(named(&[odd])), As::Both, Cause::PeerNoWorkload);
    }
    for (usages, side) in [
        (vec![Usage::ClientAuth], As::Endpoint),
        (vec![Usage::ServerAuth], As::Caller),
        (vec![Usage::TimeStamping], As::Both),
    ] {
        let what = format!("for {usages:?} alone");
        add(&what, signed(changed(move |it| it.extended_key_usages = usages)), side, Cause::PeerNoWorkload);
    }

    let namesake = Authority::new("mesh.internal");
    add("another root's of our name", Stranger::signed(&namesake, |_| {}), As::Both, Cause::PeerUntrusted);
    let (issuer, above) = namesake.intermediate(|_| {});
    let (leaf, key) = ca.sign_by(&issuer, |_| {});
    add("another root's issuer's", Stranger::new(vec![leaf, above], &key), As::Both, Cause::PeerUntrusted);
    let own_key = KeyPair::generate().unwrap();
    let mut own = CertificateParams::default();
    own.distinguished_name.push(rcgen::DnType::CommonName, "myself");
    named(&[good])(&mut own);
    let itself = own.self_signed(&own_key).unwrap().der().clone();
    add("signed by itself", Stranger::new(vec![itself], &own_key), As::Both, Cause::PeerUntrusted);
    let (stolen, _) = ca.sign(|_| {});
    add("with another key", Stranger::new(vec![stolen], &own_key), As::Both, Cause::PeerUntrusted);

    let ended = |params: &mut CertificateParams| params.not_after = now - seconds(1);
    let (issuer, above) = ca.intermediate(ended);
    let (leaf, key) = ca.sign_by(&issuer, |_| {});
    add("whose issuer's has ended", Stranger::new(vec![leaf, above], &key), As::Both, Cause::PeerExpired);
    // A workload makes itself an authority and signs somebody else's name.
    let (leaf_params, leaf_key) = {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, "a workload");
        named(&["spiffe://mesh.internal/ns/default/sa/thief"])(&mut params);
        (params, KeyPair::generate().unwrap())
    };
    let (thief_issuer, thief) = ca.intermediate(|params| {
        *params = leaf_params;
        params.is_ca = IsCa::NoCa;
    });
    drop(leaf_key);
    let (forged, key) = ca.sign_by(&thief_issuer, |params| named(&[good])(params));
    add("signed by a workload", Stranger::new(vec![forged, thief], &key), As::Both, Cause::PeerNoWorkload);
    // Each under the one before, down from our root: a hundred in all.
    let mut above = Vec::new();
    let (mut issuer, first) = ca.intermediate(|_| {});
    above.push(first);
    for number in 2..100 {
        let (next, certificate) = Authority::intermediate_by(&issuer, |params| {
            params.distinguished_name.push(rcgen::DnType::CommonName, format!("issuer {number}"));
        });
        above.insert(0, certificate);
        issuer = next;
    }
    let (leaf, key) = ca.sign_by(&issuer, |_| {});
    let chain: Vec<_> = std::iter::once(leaf).chain(above).collect();
    assert_eq!(chain.len(), 100);
    add("under 99 issuers", Stranger::new(chain, &key), As::Both, Cause::PeerNoWorkload);
    // RUSTSEC-2023-0053: each may be the issuer of each, and none is.
    let (leaf, key) = ca.sign_by(&namesake.intermediate(|_| {}).0, |_| {});
    let alike = (0..99).map(|_| namesake.intermediate(|_| {}).1);
    let chain = std::iter::once(leaf).chain(alike).collect();
    add("under 99 of one name", Stranger::new(chain, &key), As::Both, Cause::PeerUntrusted);
    add("nobody's", Stranger::anonymous(), As::Caller, Cause::PeerAnonymous);
    all
}

/// How many connections a proxy refused for each cause.
fn refusals(side: &Beside) -> Vec<(Cause, u64)> {
    let text = side.proxy.metrics.exposition();
    let count = |cause: &Cause| {
        let name = format!("sheer_connections_refused_total{{reason=\"{cause}\"}} ");
        text.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).unwrap_or(0)
    };
    Cause::ALL.iter().map(|cause| (*cause, count(cause))).filter(|(_, count)| *count > 0).collect()
}

#[tokio::test]
async fn strangers_certificates_are_refused_in_both_directions() {
    let test = async {
        let panics = count_panics();
        let ca = Authority::new("mesh.internal");
        let port = application("hello").await;
        let web = beside(&ca, "web", &[port], Mode::Strict);
        let inbound = web.door(Traffic::Inbound).await;
        let name = NAME.replace("p1.", &format!("p{port}."));
        let honest = beside(&ca, "api", &[], Mode::Strict);
        honest.knows("default/web", Protocol::Http, &[(inbound, port)]);
        let honest_door = honest.door(upstream("web")).await;
        let (mut wrong, mut expected) = (Vec::new(), std::collections::BTreeMap::new());
        for (what, stranger, side, cause) in strangers(&ca) {
            if side != As::Endpoint {
                if let Some(answer) = stranger.call(inbound, &name).await {
                    wrong.push(format!("{what}: was let in and told {answer}"));
                }
                *expected.entry(cause.reason()).or_insert(0) += 1;
                let counted = || refusals(&web).into_iter().map(|(cause, count)| (cause.reason(), count)).collect();
                let waited = tokio::time::timeout(Duration::from_secs(2), async {
                    while expected != counted() {
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                });
                if waited.await.is_err() {
                    wrong.push(format!("{what}: counted {:?} instead of {expected:?}", counted()));
                    expected = counted();
                }
            }
            if side != As::Caller {
                let (address, heard) = stranger.listen().await;
                let api = beside(&ca, "api", &[], Mode::Strict);
                api.knows("default/web", Protocol::Http, &[(address, port)]);
                let answer = get(api.door(upstream("web")).await, "/").await;
                if !answer.contains(&format!("x-sheer-reason: {cause};")) || heard.get() > 0 {
                    wrong.push(format!("{what}: was told {} bytes, the caller {answer}", heard.get()));
                }
            }
            assert!(get(honest_door, "/").await.starts_with("HTTP/1.1 200"), "after {what}");
        }
        assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
        // The same stranger with a good certificate: it is not the rest of it that is refused.
        let good = Stranger::signed(&ca, |_| {});
        assert!(good.call(inbound, &name).await.is_some_and(|answer| answer.starts_with("HTTP/1.1 200")));
        assert_eq!(panics(), 0, "something panicked");
    };
    LocalSet::new().run_until(test).await;
}

/// A ticket spares the handshake's certificates, but never outlives the trust it was given under, on either side; and
/// nothing is taken before the handshake.
#[tokio::test]
async fn a_session_ends_with_the_trust_it_was_made_under() {
    let test = async {
        let ca = Authority::new("mesh.internal");
        let port = application("hello").await;
        let web = beside(&ca, "web", &[port], Mode::Strict);
        let inbound = web.door(Traffic::Inbound).await;
        let name = NAME.replace("p1.", &format!("p{port}."));
        let peer = Stranger::signed(&ca, |_| {});
        let kind = async || peer.talk(inbound, &name).await.map(|(_, kind)| kind);
        // The second time without certificates, which is also the proof that the test can see it.
        assert_ne!(kind().await, Some(HandshakeKind::Resumed));
        assert_eq!(kind().await, Some(HandshakeKind::Resumed));
        // The root is replaced: who holds a ticket shows a certificate again, and it is of nobody.
        let other = Authority::new("mesh.internal");
        web.proxy.credentials.store(Some(other.credentials("default", "web")));
        assert_eq!(kind().await, None, "a ticket outlives its trust");
        until("the certificate is looked at", || refusals(&web) == [(Cause::PeerUntrusted, 1)]).await;

        // A caller resumes as well, and looks again whether it still wants who answers.
        web.proxy.credentials.store(Some(ca.credentials("default", "web")));
        let api = beside(&ca, "api", &[], Mode::Strict);
        api.knows("default/web", Protocol::Http, &[(inbound, port)]);
        let door = api.door(upstream("web")).await;
        assert!(get(door, "/").await.starts_with("HTTP/1.1 200"));
        let live = api.proxy.endpoints.get(&ServiceName::parse("web").unwrap()).unwrap().load_full().unwrap();
        let moved = SpiffeId::parse("spiffe://mesh.internal/ns/default/sa/moved").unwrap();
        let endpoints = live.of_port(80).iter().map(|it| it.endpoint.clone()).collect();
        let set = EndpointSet::new(vec![moved], endpoints);
        api.proxy.endpoints.set(&ServiceName::parse("web").unwrap(), Arc::new(set));
        let answer = get(door, "/").await;
        assert!(answer.contains("x-sheer-reason: identity-mismatch;"), "{answer}");
    };
    LocalSet::new().run_until(test).await;
}
