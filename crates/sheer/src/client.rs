//! The command line's connection to a control plane: JSON over HTTP/1.1, by unix socket or loopback address.

use crate::dirs::Dirs;
use crate::output::Progress;
use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sheer_core::api::{Failure, Level, Place};
use std::fmt;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// No answer of the API takes longer, also not a backup of a large mesh.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Which control plane to ask. Without a flag: the one that `sheer up` (for root: `sheer control`) runs for this user.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct Connect {
    /// The control plane's API [default: the socket of this user's control plane]
    #[arg(long, value_name = "unix:PATH|http://HOST:PORT", value_parser = Endpoint::parse)]
    pub(crate) api: Option<Endpoint>,

    /// A file with the bearer token for an http:// API
    #[arg(long, value_name = "FILE")]
    pub(crate) api_token_file: Option<PathBuf>,
}

/// Where an API listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// A unix socket; the peer's user id authenticates.
    Unix(PathBuf),
    /// `HOST:PORT`; a bearer token authenticates.
    Http(String),
}

impl Endpoint {
    fn parse(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(path.into()));
        }
        let authority = text.strip_prefix("http://").map(|rest| rest.trim_end_matches('/'));
        match authority.and_then(|authority| authority.parse::<http::uri::Authority>().ok()) {
            Some(authority) => {
                Ok(Self::Http(format!("{}:{}", authority.host(), authority.port_u16().unwrap_or(15080))))
            }
            None => Err(format!("'{text}' is neither unix:PATH nor http://HOST:PORT")),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Http(authority) => write!(f, "http://{authority}"),
        }
    }
}

/// A control plane that can be asked.
pub(crate) struct Client {
    endpoint: Endpoint,
    token: Option<String>,
    runtime: tokio::runtime::Runtime,
}

/// What the control plane answered instead of a result.
#[derive(Debug)]
pub(crate) struct Refused(pub(crate) Failure);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.error)?;
        for place in &self.0.diagnostics {
            write!(f, "\n  {}", show_place(place))?;
        }
        if self.0.mend.is_empty() { Ok(()) } else { write!(f, "\n  {}", self.0.mend) }
    }
}

impl std::error::Error for Refused {}

/// No control plane answers there.
#[derive(Debug)]
pub(crate) struct Absent(String);

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Absent {}

/// One line in the form of compilers.
pub(crate) fn show_place(place: &Place) -> String {
    let mut text = place.file.clone();
    if place.line > 0 {
        text.push_str(&format!(":{}:{}", place.line, place.column));
    }
    text.push_str(if place.level == Level::Error { ": error: " } else { ": warning: " });
    if !place.path.is_empty() {
        text.push_str(&format!("{}: ", place.path));
    }
    text.push_str(&place.message);
    if !place.mend.is_empty() {
        text.push_str(&format!("; {}", place.mend));
    }
    text
}

impl Connect {
    /// Prepares to ask; nothing is sent yet.
    ///
    /// # Errors
    /// When the token file cannot be read or an address has none.
    pub(crate) fn client(&self) -> anyhow::Result<Client> {
        let endpoint = match &self.api {
            Some(endpoint) => endpoint.clone(),
            None => Endpoint::Unix(Dirs::of_user()?.api_socket()),
        };
        let token = match (&endpoint, &self.api_token_file) {
            (Endpoint::Http(_), Some(path)) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read the API's token from {}", path.display()))?;
                Some(text.trim().to_owned())
            }
            (Endpoint::Http(_), None) => {
                bail!(
                    "{endpoint} asks for a token; name its file with --api-token-file ('sheer up' prints where it is)"
                )
            }
            (Endpoint::Unix(_), _) => None,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Client { endpoint, token, runtime })
    }
}

impl Client {
    /// `GET`, with a JSON answer.
    pub(crate) fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.decode(&self.call(Method::GET, path, Bytes::new())?)
    }

    /// `GET`, with any answer.
    pub(crate) fn get_bytes(&self, path: &str) -> anyhow::Result<Bytes> {
        self.call(Method::GET, path, Bytes::new())
    }

    /// `POST` of JSON, with a JSON answer.
    pub(crate) fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.decode(&self.call(Method::POST, path, serde_json::to_vec(body)?.into())?)
    }

    /// `DELETE`, with a JSON answer.
    pub(crate) fn delete<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.decode(&self.call(Method::DELETE, path, Bytes::new())?)
    }

    fn decode<T: DeserializeOwned>(&self, body: &[u8]) -> anyhow::Result<T> {
        serde_json::from_slice(body).with_context(|| {
            format!("{} did not answer as a control plane does; is it one, and of this release?", self.endpoint)
        })
    }

    fn call(&self, method: Method, path: &str, body: Bytes) -> anyhow::Result<Bytes> {
        let _progress = Progress::of(format!("waiting for the control plane at {}", self.endpoint));
        let answer =
            self.runtime.block_on(async { tokio::time::timeout(TIMEOUT, self.exchange(method, path, body)).await });
        let (status, body) = answer
            .map_err(|_| anyhow::anyhow!("the control plane at {} did not answer in {TIMEOUT:?}", self.endpoint))??;
        if status.is_success() {
            return Ok(body);
        }
        let failure = serde_json::from_slice(&body).unwrap_or_else(|_| Failure {
            error: format!("the control plane at {} answered {status} to {path}", self.endpoint),
            ..Failure::default()
        });
        Err(Refused(failure).into())
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> anyhow::Result<(StatusCode, Bytes)> {
        let (host, io): (&str, Box<dyn Stream>) = match &self.endpoint {
            Endpoint::Unix(path) => {
                ("localhost", Box::new(UnixStream::connect(path).await.map_err(|error| self.absent(&error))?))
            }
            Endpoint::Http(authority) => {
                (authority, Box::new(TcpStream::connect(authority).await.map_err(|error| self.absent(&error))?))
            }
        };
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await?;
        let driver = tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, host)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        if let Some(token) = &self.token {
            let value = format!("Bearer {token}").parse().context("the API's token file holds no token")?;
            request.headers_mut().insert(header::AUTHORIZATION, value);
        }
        let broke = || format!("the control plane at {} broke off; see its log", self.endpoint);
        let response = sender.send_request(request).await.with_context(broke)?;
        let status = response.status();
        let body = response.into_body().collect().await.with_context(broke)?.to_bytes();
        driver.abort();
        Ok((status, body))
    }

    /// What to do when nobody listens.
    fn absent(&self, error: &std::io::Error) -> anyhow::Error {
        let root = nix::unistd::geteuid().is_root();
        match (&self.endpoint, error.kind()) {
            (Endpoint::Unix(path), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                let other = PathBuf::from("/run/sheer/api.sock");
                let hint = if !root && other.exists() {
                    "; one for the whole system runs: ask it with 'sudo sheer ...'"
                } else {
                    ""
                };
                let text = format!(
                    "no control plane runs here ({} does not answer); start one with 'sheer up'{hint}",
                    path.display()
                );
                Absent(text).into()
            }
            (Endpoint::Unix(path), ErrorKind::PermissionDenied) => anyhow::anyhow!(
                "the control plane at {} belongs to another user; become that user, or name another with --api",
                path.display()
            ),
            (endpoint, _) => Absent(format!(
                "no control plane answers at {endpoint}: {error}; is it running, and is the address right?"
            ))
            .into(),
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A path with query parameters; those without a value are left out.
pub(crate) fn query(path: &str, parameters: &[(&str, Option<&str>)]) -> String {
    let mut text = path.to_owned();
    for (name, value) in parameters.iter().filter_map(|(name, value)| Some((name, (*value)?))) {
        text.push(if text.contains('?') { '&' } else { '?' });
        text.push_str(&format!("{name}={}", encode(value)));
    }
    text
}

/// Percent-encodes a segment or value (RFC 3986, section 2.3).
pub(crate) fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            encoded.push(byte as char);
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        assert_eq!(Endpoint::parse("unix:/a/b").map(|e| e.to_string()), Ok("unix:/a/b".to_owned()));
        assert_eq!(
            Endpoint::parse("http://127.0.0.1/").map(|e| e.to_string()),
            Ok("http://127.0.0.1:15080".to_owned())
        );
        assert_eq!(Endpoint::parse("http://[::1]:99"), Ok(Endpoint::Http("[::1]:99".to_owned())));
        for wrong in ["", "localhost:15080", "https://x", "http://", "http://a b"] {
            assert!(Endpoint::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn queries_are_encoded() {
        assert_eq!(query("/a", &[("x", Some("a b&c")), ("y", None), ("z", Some("1"))]), "/a?x=a%20b%26c&z=1");
    }
}
