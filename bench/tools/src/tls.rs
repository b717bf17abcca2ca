//! A client with a certificate, as a proxy is one towards another. What the server shows is not looked at: the cost that
//! is measured is the server's.
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientSessionMemoryCache, Resumption};
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Who connects, and as what.
#[derive(Clone)]
pub struct Client {
    config: ClientConfig,
    name: ServerName<'static>,
}

impl Client {
    /// Of `GROUP ALPN SERVER-NAME CERTIFICATES KEY`: the key exchange `x25519` or `x25519mlkem768`, the others as names
    /// and PEM files.
    pub fn of(arguments: &[String]) -> Self {
        let [group, alpn, name, certificates, key] = arguments else {
            crate::usage("... GROUP ALPN SERVER-NAME CERTIFICATES KEY");
        };
        let provider = CryptoProvider {
            cipher_suites: vec![cipher_suite::TLS13_AES_128_GCM_SHA256, cipher_suite::TLS13_AES_256_GCM_SHA384],
            kx_groups: match group.as_str() {
                "x25519" => vec![kx_group::X25519],
                "x25519mlkem768" => vec![kx_group::X25519MLKEM768],
                _ => crate::usage("GROUP is x25519 or x25519mlkem768"),
            },
            ..aws_lc_rs::default_provider()
        };
        let verifier = Arc::new(Anybody(provider.signature_verification_algorithms));
        let chain = CertificateDer::pem_file_iter(certificates).expect("a file with certificates");
        let chain = chain.collect::<Result<Vec<_>, _>>().expect("certificates");
        let key = PrivateKeyDer::from_pem_file(key).expect("a file with a key");
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the provider can TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_auth_cert(chain, key)
            .expect("the key is the certificate's");
        config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
        Self { config, name: ServerName::try_from(name.clone()).expect("a server name") }
    }

    /// Another that resumes its own sessions, or never any.
    pub fn resuming(&self, resumes: bool) -> Self {
        let mut config = self.config.clone();
        config.resumption = match resumes {
            true => Resumption::store(Arc::new(ClientSessionMemoryCache::new(1))),
            false => Resumption::disabled(),
        };
        Self { config, name: self.name.clone() }
    }

    /// How connections are made.
    pub fn connector(&self) -> Connector {
        Connector { connector: TlsConnector::from(Arc::new(self.config.clone())), name: self.name.clone() }
    }
}

/// Makes connections of one client.
pub struct Connector {
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl Connector {
    /// A connection to this port.
    pub async fn connect(&self, port: u16) -> std::io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.set_nodelay(true)?;
        self.connector.connect(self.name.clone(), stream).await
    }
}

#[derive(Debug)]
struct Anybody(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 was not offered".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
