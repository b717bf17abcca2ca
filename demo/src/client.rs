//! A plain HTTP/1.1 client of one peer: keeps connections, never retries, gives up after five seconds.

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

const PATIENCE: Duration = Duration::from_secs(5);
/// An idle connection older than this is not trusted to be open still.
const MAX_IDLE: Duration = Duration::from_secs(3);
const MAX_BODY_BYTES: usize = 4 << 20;

/// A client of one peer.
pub(crate) struct Client {
    authority: String,
    idle: Mutex<Vec<(Instant, SendRequest<Full<Bytes>>)>>,
}

/// What a peer answered.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// Why there is no answer to use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    #[error("{0} cannot be reached: {1}")]
    Connect(String, std::io::Error),
    #[error("{0} broke off: {1}")]
    Broken(String, Box<dyn std::error::Error + Send + Sync>),
    #[error("{0} did not answer within 5 s")]
    Late(String),
    #[error("{0} answered {1}{2}")]
    Refused(String, StatusCode, String),
}

impl Client {
    /// A client of the peer at `url`; its path is ignored.
    pub(crate) fn new(url: &str) -> Self {
        let authority = url.parse::<Uri>().ok().and_then(|uri| Some(uri.authority()?.to_string()));
        Self { authority: authority.unwrap_or_else(|| url.to_owned()), idle: Mutex::default() }
    }

    /// A GET whose answer must be a success, parsed from JSON.
    pub(crate) async fn get_json(&self, path: &str) -> Result<serde_json::Value, CallError> {
        self.call_json(Method::GET, path).await
    }

    /// A request without a body whose answer must be a success, parsed from JSON.
    pub(crate) async fn call_json(&self, method: Method, path: &str) -> Result<serde_json::Value, CallError> {
        let answer = self.call(method, path).await?;
        if !answer.status.is_success() {
            return Err(CallError::Refused(self.authority.clone(), answer.status, explanation(&answer)));
        }
        serde_json::from_slice(&answer.body).map_err(|error| CallError::Broken(self.authority.clone(), error.into()))
    }

    /// One request and its whole answer, whatever its status.
    pub(crate) async fn call(&self, method: Method, path: &str) -> Result<Answer, CallError> {
        let exchange = self.exchange(method, path);
        tokio::time::timeout(PATIENCE, exchange).await.unwrap_or_else(|_| Err(CallError::Late(self.authority.clone())))
    }

    async fn exchange(&self, method: Method, path: &str) -> Result<Answer, CallError> {
        let broken = |error: Box<dyn std::error::Error + Send + Sync>| CallError::Broken(self.authority.clone(), error);
        let mut sender = self.connection().await?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.authority)
            .body(Full::default())
            .map_err(|error| broken(error.into()))?;
        let response = sender.send_request(request).await.map_err(|error| broken(error.into()))?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, MAX_BODY_BYTES).collect().await.map_err(broken)?.to_bytes();
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), sender));
        Ok(Answer { status: head.status, headers: head.headers, body })
    }

    async fn connection(&self) -> Result<SendRequest<Full<Bytes>>, CallError> {
        while let Some(mut sender) = self.pop_idle() {
            if sender.ready().await.is_ok() {
                return Ok(sender);
            }
        }
        let unreachable = |error| CallError::Connect(self.authority.clone(), error);
        let address = if has_port(&self.authority) { self.authority.clone() } else { format!("{}:80", self.authority) };
        let stream = TcpStream::connect(address).await.map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| CallError::Broken(self.authority.clone(), error.into()))?;
        tokio::spawn(connection);
        Ok(sender)
    }

    fn pop_idle(&self) -> Option<SendRequest<Full<Bytes>>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|(since, sender)| since.elapsed() < MAX_IDLE && !sender.is_closed());
        idle.pop().map(|(_, sender)| sender)
    }
}

fn has_port(authority: &str) -> bool {
    authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok())
}

/// Headers that say why, whoever wrote them, and a short body.
fn explanation(answer: &Answer) -> String {
    let reasons = answer.headers.iter().filter(|(name, _)| name.as_str().ends_with("-reason"));
    let mut text: String =
        reasons.map(|(name, value)| format!("; {name}: {}", String::from_utf8_lossy(value.as_bytes()))).collect();
    let body = String::from_utf8_lossy(&answer.body);
    if text.is_empty() && !body.trim().is_empty() {
        text = format!(": {}", body.trim().chars().take(200).collect::<String>());
    }
    text
}
