//! `sheer.v1.Identity/Certify`: attests who asks, checks the request, issues, records.

use crate::Control;
use crate::attest::{AttestError, Attested, Origin, Peer, TokenUse, local_enrollment, use_token};
use crate::ca::requested_key;
use crate::fleet::uid_of;
use crate::store::{StoreError, Table};
use sheer_core::identity::SpiffeId;
use sheer_core::name::{DEFAULT_NAMESPACE, DnsLabel};
use sheer_core::token::JoinToken;
use sheer_core::wire::v1::{CertifyRequest, CertifyResponse};
use std::sync::Arc;
use tonic::{Request, Response, Status};

#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub(crate) mod service {
    tonic::include_proto!("sheer.v1.Identity");
}

/// Serves `sheer.v1.Identity`.
pub struct Identity {
    /// The control plane.
    pub control: Arc<Control>,
}

#[tonic::async_trait]
impl service::identity_server::Identity for Identity {
    async fn certify(&self, request: Request<CertifyRequest>) -> Result<Response<CertifyResponse>, Status> {
        let peer = Peer::of(&request)?;
        let request = request.into_inner();
        let asked = format!("{}/{}", request.namespace, request.service_account);
        match self.certify_for(&peer, request).await {
            Ok((response, uid)) => {
                tracing::info!(%uid, identity = %asked, from = %peer.from(), "certificate issued");
                Ok(Response::new(response))
            }
            Err(status) => {
                let asked: String = asked.chars().take(130).flat_map(char::escape_default).collect();
                if let Some(left_out) = self.control.refusals.admit() {
                    let reason = status.message();
                    tracing::warn!(identity = %asked, from = %peer.from(), reason, left_out, "certificate refused");
                }
                Err(status)
            }
        }
    }
}

/// Who may be what, before anything is written.
enum Grant {
    Local { uid: u32, enrollment: Option<String> },
    Token(JoinToken),
    Renewal(Attested),
}

impl Identity {
    async fn certify_for(&self, peer: &Peer, request: CertifyRequest) -> Result<(CertifyResponse, String), Status> {
        let control = &self.control;
        // Before the request's signature is looked at, which costs more than a guess.
        let is_guess = matches!(peer.origin, Origin::Remote { .. }) && !request.token.is_empty();
        if is_guess && control.guesses.exhausted(peer.ip()) {
            return Err(AttestError::Guessing(peer.from()).status());
        }
        let label = |text: &str| DnsLabel::parse(text).map_err(|error| Status::invalid_argument(error.to_string()));
        let (namespace, name) = (label(&request.namespace)?, label(&request.workload)?);
        let compiled = control.state.compiled();
        let id = SpiffeId::new(&compiled.mesh.trust_domain, namespace.clone(), label(&request.service_account)?)
            .map_err(|error| Status::internal(error.to_string()))?;
        let uid = uid_of(&namespace, &name);
        let key = requested_key(&request.csr, &id).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let now = control.clock.unix();
        let grant = self.grant(peer, &request.token, &id, &uid, &key.sha256).map_err(|error| error.status())?;
        self.refuse_taken_name(&uid, &id, &key.sha256)?;
        let issued = control
            .authority
            .issue(&key, &id, compiled.mesh.certificate_lifetime)
            .map_err(|error| Status::unavailable(error.to_string()))?;
        let attested = Attested {
            identity: id.to_string(),
            key_sha256: key.sha256.clone(),
            not_after: issued.not_after,
            uid: None,
            token: None,
            enrollment: None,
            addresses: Vec::new(),
            root: issued.number,
            left: false,
        };
        let record = match grant {
            Grant::Local { uid, enrollment } => Attested { uid: Some(uid), enrollment, ..attested },
            // Where it came from stays what it was.
            Grant::Renewal(before) => before.renewed(attested),
            Grant::Token(token) => {
                let wanted = TokenUse { token, id: id.clone(), source: peer.ip(), key_sha256: key.sha256, now };
                self.redeem(wanted, attested, peer).await?
            }
        };
        self.record(&uid, record).await.map_err(|error| Status::unavailable(error.to_string()))?;
        let response = CertifyResponse {
            chain: issued.chain.into_iter().map(|certificate| certificate.to_vec().into()).collect(),
            trust: Some(control.trust_bundle()),
            mesh: Some(sheer_core::compile::mesh_of(&compiled)),
            uid: uid.clone(),
            control: control.advertised().to_vec(),
        };
        Ok((response, uid))
    }

    fn grant(&self, peer: &Peer, token: &str, id: &SpiffeId, uid: &str, key: &str) -> Result<Grant, AttestError> {
        match &peer.origin {
            Origin::Local { uid: user } => self.grant_local(*user, id),
            Origin::Remote { certificate: Some(certificate) } if token.is_empty() => {
                self.grant_renewal(certificate, id, uid, key)
            }
            Origin::Remote { .. } if token.is_empty() => Err(AttestError::Nobody {
                namespace: id.namespace().to_string(),
                account: id.service_account().to_string(),
            }),
            Origin::Remote { .. } => {
                let token = JoinToken::parse(token).inspect_err(|_| self.control.guesses.count(peer.ip()))?;
                if !self.control.authority.is_pinned(&token.root_sha256) {
                    self.control.guesses.count(peer.ip());
                    return Err(AttestError::Foreign);
                }
                Ok(Grant::Token(token))
            }
        }
    }

    fn grant_local(&self, user: u32, id: &SpiffeId) -> Result<Grant, AttestError> {
        let own = self.control.own_users.contains(&user);
        if own && id.namespace().as_str() == DEFAULT_NAMESPACE {
            return Ok(Grant::Local { uid: user, enrollment: None });
        }
        let compiled = self.control.state.compiled();
        match local_enrollment(&compiled, user, id) {
            Some(it) => Ok(Grant::Local { uid: user, enrollment: Some(it.meta.name.to_string()) }),
            None => Err(AttestError::User { uid: user, id: id.to_string() }),
        }
    }

    fn grant_renewal(
        &self,
        certificate: &crate::tls::Certificate,
        id: &SpiffeId,
        uid: &str,
        key: &str,
    ) -> Result<Grant, AttestError> {
        if certificate.id != *id {
            return Err(AttestError::NotRenewable { has: certificate.id.to_string(), asked: id.to_string() });
        }
        let record: Option<Attested> = self.control.store.read(Table::Certificates, uid)?;
        let record = record.filter(|record| record.identity == id.to_string());
        let ended = certificate.expired(self.control.clock.unix());
        if ended || !certificate.trusted {
            let Some(record) = record else { return Err(AttestError::Ended) };
            // Same key in the old certificate, in its record and in the request.
            if record.key_sha256 != certificate.key_sha256 || record.key_sha256 != key {
                return Err(AttestError::Ended);
            }
            match ended {
                true => {
                    let ended = certificate.not_after;
                    tracing::warn!(%uid, ended, "an ended certificate is renewed within its grace");
                }
                false => tracing::info!(%uid, "a certificate under a former root is renewed"),
            }
            return Ok(Grant::Renewal(record));
        }
        // A new name carries the limits under which its identity joined; none are on record after a restored backup.
        let record = record.or_else(|| self.control.fleet.attested_as(&certificate.id, &certificate.key_sha256));
        Ok(Grant::Renewal(record.unwrap_or_else(|| Attested {
            identity: id.to_string(),
            key_sha256: certificate.key_sha256.clone(),
            not_after: certificate.not_after,
            uid: None,
            token: None,
            enrollment: None,
            addresses: Vec::new(),
            root: self.control.authority.trust().issuing,
            left: false,
        })))
    }

    /// A workload's name belongs to the identity that has it, for as long as that one is registered, and to the key that
    /// has it, for as long as its proxy is connected: two hosts that chose the same name are two workloads.
    fn refuse_taken_name(&self, uid: &str, id: &SpiffeId, key: &str) -> Result<(), Status> {
        let fleet = &self.control.fleet;
        match fleet.identity_of(uid) {
            Some(owner) if owner != *id => Err(Status::already_exists(format!(
                "the workload name is taken: {uid} is registered as {owner}; choose another --name"
            ))),
            _ if fleet.is_connected(uid) && fleet.attested(uid).is_some_and(|held| held.key_sha256 != key) => {
                Err(Status::already_exists(format!(
                    "the workload name is taken: {uid} is connected, with another key; stop it, or choose another --name"
                )))
            }
            _ => Ok(()),
        }
    }

    async fn redeem(&self, wanted: TokenUse, attested: Attested, peer: &Peer) -> Result<Attested, Status> {
        let state = self.control.state.compiled();
        let id = wanted.token.id_text();
        let used = self
            .control
            .store
            .write(move |transaction| {
                use_token(transaction, &wanted, |name| {
                    let name = sheer_core::name::ServiceName::parse(name).ok()?;
                    state.enrollments.get(&name).cloned()
                })
            })
            .await;
        match used {
            Ok(record) => Ok(Attested {
                token: Some(id),
                enrollment: record.enrollment().map(str::to_owned),
                addresses: record.networks().to_vec(),
                ..attested
            }),
            Err(error) => {
                if matches!(error, AttestError::Foreign | AttestError::Secret) {
                    self.control.guesses.count(peer.ip());
                }
                Err(error.status())
            }
        }
    }

    async fn record(&self, uid: &str, record: Attested) -> Result<(), StoreError> {
        let key = uid.to_owned();
        let stored = record.clone();
        self.control.store.write(move |transaction| transaction.put(Table::Certificates, &key, &stored)).await?;
        self.control.fleet.note_certificate(uid, record);
        Ok(())
    }
}

impl Attested {
    fn renewed(self, issued: Attested) -> Self {
        let Attested { identity, key_sha256, not_after, root, left, .. } = issued;
        Self { identity, key_sha256, not_after, root, left, ..self }
    }
}
