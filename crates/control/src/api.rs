//! The HTTP API and the page: on the unix socket `api.sock`, and on a loopback address.
//!
//! Who may do what:
//! - on the socket, the control plane's own user and root: everything;
//! - on loopback, whoever shows the bearer token of `api.token`: everything;
//! - on loopback, a browser with a session (a one-time code that became a cookie): read;
//! - on loopback, a process of the control plane's own user, known by the kernel's table of connections: read.
//!
//! Requests whose `Host` is not this address (DNS rebinding) or whose `Origin` is another one are refused, whoever asks.

mod access;
mod serve;

pub(crate) use access::Access;
pub(crate) use serve::{accept_tcp, accept_unix};

use crate::Control;
use crate::ca::CaError;
use crate::documents;
use crate::rotation::RotationError;
use crate::status;
use crate::telemetry::View;
use access::{Caller, Level};
use axum::Json;
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sheer_core::api::{Apply, Consent, Failure, Link, Rotate, TokenRequest, Version};
use sheer_core::name::{DEFAULT_NAMESPACE, DnsLabel, ServiceName};
use sheer_core::resource::Kind;
use std::sync::Arc;
use std::time::Duration;

/// Largest body: a set of documents to apply.
const MAX_BODY: usize = 8 << 20;
/// Largest body of somebody who has not yet shown who they are: a code.
const MAX_STRANGERS_BODY: usize = 1024;
/// How long such a request may take.
const STRANGER: Duration = Duration::from_secs(10);
/// Windows of `stat` and `edges` that name none.
const WINDOW_S: u64 = 60;

/// The page may load from its own address alone, and nothing in a page of another may frame it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The page's own files: path, type, content.
const PAGE: [(&str, &str, &str); 4] = [
    ("/", "text/html; charset=utf-8", include_str!("api/view.html")),
    ("/view.js", "text/javascript; charset=utf-8", include_str!("api/view.js")),
    ("/view.css", "text/css; charset=utf-8", include_str!("api/view.css")),
    ("/icon.svg", "image/svg+xml", include_str!("api/icon.svg")),
];

/// What all requests share.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) control: Arc<Control>,
    pub(crate) access: Arc<Access>,
}

/// All paths.
pub(crate) fn router(api: Api) -> axum::Router {
    let page = PAGE.iter().fold(axum::Router::new(), |router, (path, kind, content)| {
        router.route(path, get(|| async { ([(header::CONTENT_TYPE, *kind)], *content) }))
    });
    page.route("/api/v1/session", post(session).layer(DefaultBodyLimit::max(MAX_STRANGERS_BODY)))
        .route("/api/v1/version", get(version))
        .route("/api/v1/mesh", get(|State(api): State<Api>| async move { Json(status::mesh(&api.control)) }))
        .route("/api/v1/services", get(services))
        .route("/api/v1/workloads", get(workloads))
        .route("/api/v1/objects", get(objects))
        .route("/api/v1/objects/{kind}/{namespace}/{name}", delete(remove))
        .route("/api/v1/stat", get(stat))
        .route("/api/v1/edges", get(edges))
        .route("/api/v1/check", get(|State(api): State<Api>| async move { Json(status::check(&api.control)) }))
        .route("/api/v1/backup", get(backup))
        .route("/api/v1/apply", post(apply))
        .route("/api/v1/tokens", post(tokens))
        .route("/api/v1/consent", post(consent))
        .route("/api/v1/links", post(links))
        .route("/api/v1/identity", get(|State(api): State<Api>| async move { Json(api.control.identity()) }))
        .route("/api/v1/identity/rotate", post(rotate))
        .route("/api/v1/identity/abort", post(abort_rotation))
        .fallback(|| async { refuse(StatusCode::NOT_FOUND, "there is no such path", "GET /api/v1/version") })
        .layer(axum::middleware::from_fn_with_state(api.clone(), admit))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(api)
}

pub(crate) fn refuse(status: StatusCode, error: impl Into<String>, mend: impl Into<String>) -> Response {
    let failure = Failure { error: error.into(), mend: mend.into(), ..Failure::default() };
    (status, Json(failure)).into_response()
}

/// Decides who may go on, and puts the headers on every answer.
async fn admit(State(api): State<Api>, mut request: Request, next: Next) -> Response {
    let caller = request.extensions_mut().remove::<Caller>();
    let is_open = is_open(&request);
    let mut response = match refusal(&api, caller.as_ref(), &request) {
        Some(refused) => refused,
        None if is_open => tokio::time::timeout(STRANGER, next.run(request)).await.unwrap_or_else(|_| {
            refuse(StatusCode::REQUEST_TIMEOUT, "the request took longer than 10 s", "send it at once")
        }),
        None => next.run(request).await,
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

fn refusal(api: &Api, caller: Option<&Caller>, request: &Request) -> Option<Response> {
    let Some(caller) = caller else {
        return Some(refuse(StatusCode::FORBIDDEN, "the caller is not known", ""));
    };
    if !caller.addresses_us(request.headers()) {
        let mend = "call it by its loopback address, from no other page";
        return Some(refuse(StatusCode::FORBIDDEN, "the Host or Origin of the request is another one", mend));
    }
    let reads = request.method() == Method::GET && request.uri().path() != "/api/v1/backup";
    let needed = if is_open(request) {
        Level::Nobody
    } else if reads {
        Level::Reader
    } else {
        Level::Admin
    };
    if api.access.level(caller, request.headers()) >= needed {
        return None;
    }
    let mend = format!(
        "use the unix socket as the control plane's own user, or send 'Authorization: Bearer' with the content of {}; \
         a browser gets a link from `sheer dashboard`",
        api.access.token_file().display()
    );
    Some(refuse(StatusCode::UNAUTHORIZED, "not allowed", mend))
}

/// Whether anybody may ask: the page's own files hold nothing of the mesh, and a session begins with a code.
fn is_open(request: &Request) -> bool {
    let path = request.uri().path();
    PAGE.iter().any(|(own, ..)| path == *own) || path == "/api/v1/session"
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Filter {
    namespace: Option<String>,
    kind: Option<String>,
    name: Option<String>,
    window_s: Option<u64>,
    side: Option<String>,
}

impl Filter {
    fn matches(&self, namespace: &str) -> bool {
        self.namespace.as_ref().is_none_or(|wanted| wanted == namespace)
    }
}

async fn version(State(api): State<Api>) -> Response {
    let version = Version { version: env!("CARGO_PKG_VERSION").to_owned(), api: 1, started: api.control.started };
    Json(version).into_response()
}

async fn services(State(api): State<Api>, Query(filter): Query<Filter>) -> Response {
    let mut services = status::services(&api.control);
    services.retain(|service| filter.matches(&service.namespace));
    Json(services).into_response()
}

async fn workloads(State(api): State<Api>, Query(filter): Query<Filter>) -> Response {
    let mut workloads = api.control.workloads();
    workloads.retain(|workload| filter.matches(&workload.namespace));
    Json(workloads).into_response()
}

async fn objects(State(api): State<Api>, Query(filter): Query<Filter>) -> Response {
    let kind = match filter.kind.as_deref().map(|kind| (kind, Kind::parse(kind))) {
        None => None,
        Some((_, Some(kind))) => Some(kind),
        Some((kind, None)) => {
            let kind: String = kind.chars().take(80).collect();
            return refuse(StatusCode::BAD_REQUEST, format!("'{kind}' is no kind"), known_kinds());
        }
    };
    let mut objects = documents::objects(&api.control.state.compiled());
    objects.retain(|object| {
        kind.is_none_or(|kind| kind.name() == object.kind)
            && (object.namespace.is_empty() || filter.matches(&object.namespace))
            && filter.name.as_ref().is_none_or(|name| *name == object.name)
    });
    Json(objects).into_response()
}

fn known_kinds() -> String {
    let names: Vec<&str> = Kind::ALL.into_iter().map(Kind::name).collect();
    format!("one of {}", names.join(", "))
}

async fn stat(State(api): State<Api>, Query(filter): Query<Filter>) -> Response {
    let window = filter.window_s.unwrap_or(WINDOW_S);
    Json(status::stat(&api.control, filter.namespace.as_deref(), window)).into_response()
}

async fn edges(State(api): State<Api>, Query(filter): Query<Filter>) -> Response {
    let view = match filter.side.as_deref() {
        None | Some("best") => View::Best,
        Some("outbound") => View::Outbound,
        Some("inbound") => View::Inbound,
        Some("all") => View::All,
        Some(_) => return refuse(StatusCode::BAD_REQUEST, "there is no such side", "best, outbound, inbound or all"),
    };
    let (control, window) = (&api.control, filter.window_s.unwrap_or(WINDOW_S));
    Json(control.telemetry.edges(filter.namespace.as_deref(), window, view, &control.clock)).into_response()
}

/// A JSON body, or why it is none.
fn body<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Refused> {
    serde_json::from_slice(bytes).map_err(|error| {
        refused(
            StatusCode::BAD_REQUEST,
            format!("the body is not what this path takes: {error}"),
            "see docs/control-plane.md",
        )
    })
}

/// A response that says no. Boxed, since it is rare and large.
type Refused = Box<Response>;

fn refused(status: StatusCode, error: impl Into<String>, mend: impl Into<String>) -> Refused {
    Box::new(refuse(status, error, mend))
}

/// Runs a call whose refusal is a response.
async fn answer(call: impl Future<Output = Result<Response, Refused>>) -> Response {
    call.await.unwrap_or_else(|refused| *refused)
}

fn documented(refusal: documents::Refusal) -> Refused {
    let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    Box::new((status, Json(refusal.failure)).into_response())
}

async fn apply(State(api): State<Api>, bytes: bytes::Bytes) -> Response {
    answer(async {
        let request: Apply = body(&bytes)?;
        let applied =
            api.control.change_documents(|root, sources, named| documents::apply(root, sources, &request, named));
        Ok(Json(applied.map_err(documented)?).into_response())
    })
    .await
}

async fn remove(State(api): State<Api>, Path((kind, namespace, name)): Path<(String, String, String)>) -> Response {
    answer(async {
        let wrong = |error: String, mend: String| refused(StatusCode::BAD_REQUEST, error, mend);
        let kind = Kind::parse(&kind).ok_or_else(|| wrong("there is no such kind".to_owned(), known_kinds()))?;
        // A Mesh is in no namespace; a path needs a part nevertheless.
        let namespace = if namespace == "-" { DEFAULT_NAMESPACE } else { &namespace };
        let label = |text: &str| DnsLabel::parse(text).map_err(|error| wrong(error.to_string(), String::new()));
        let name = ServiceName { namespace: label(namespace)?, name: label(&name)? };
        let applied =
            api.control.change_documents(|root, sources, named| documents::delete(root, sources, kind, &name, named));
        Ok(Json(applied.map_err(documented)?).into_response())
    })
    .await
}

async fn tokens(State(api): State<Api>, bytes: bytes::Bytes) -> Response {
    use crate::attest::TokenRefused;
    answer(async {
        let request: TokenRequest = body(&bytes)?;
        match api.control.create_token(&request).await {
            Ok(view) => Ok(Json(view).into_response()),
            Err(error) => {
                let text = error.to_string();
                Err(match error {
                    TokenRefused::Malformed(_) => refused(StatusCode::BAD_REQUEST, text, ""),
                    TokenRefused::TooWide { mend, .. } => refused(StatusCode::UNPROCESSABLE_ENTITY, text, mend),
                    TokenRefused::Store(_) => refused(StatusCode::INSUFFICIENT_STORAGE, text, "look at the disk"),
                })
            }
        }
    })
    .await
}

async fn consent(State(api): State<Api>, bytes: bytes::Bytes) -> Response {
    answer(async {
        let request: Consent = body(&bytes)?;
        let wrong = |error: sheer_core::name::NameError| refused(StatusCode::BAD_REQUEST, error.to_string(), "");
        let namespace = DnsLabel::parse(&request.namespace).map_err(wrong)?;
        let service = ServiceName { namespace, name: DnsLabel::parse(&request.name).map_err(wrong)? };
        let accounts = request.accounts.iter().map(|it| DnsLabel::parse(it)).collect::<Result<Vec<_>, _>>();
        let accounts = accounts.map_err(wrong)?;
        if accounts.is_empty() {
            return Err(refused(StatusCode::BAD_REQUEST, "no account is named", "name at least one"));
        }
        let failed = |error: crate::store::StoreError| {
            refused(StatusCode::INSUFFICIENT_STORAGE, error.to_string(), "look at the disk")
        };
        api.control.consent(&service, accounts).await.map_err(failed)?;
        let view = status::services(&api.control)
            .into_iter()
            .find(|view| view.namespace == service.namespace.as_str() && view.name == service.name.as_str());
        Ok(Json(view.unwrap_or_default()).into_response())
    })
    .await
}

async fn backup(State(api): State<Api>) -> Response {
    match api.control.backup().await {
        Ok(bytes) => ([(header::CONTENT_TYPE, "application/octet-stream")], bytes).into_response(),
        Err(error) => refuse(StatusCode::INTERNAL_SERVER_ERROR, error.to_string(), ""),
    }
}

async fn links(State(api): State<Api>) -> Response {
    match api.access.link() {
        Some(url) => Json(Link { url }).into_response(),
        None => refuse(StatusCode::CONFLICT, "the API listens on no TCP address", "start it with --api-listen"),
    }
}

async fn rotate(State(api): State<Api>, bytes: bytes::Bytes) -> Response {
    answer(async {
        let how: Rotate = body(&bytes)?;
        api.control.rotate_root(how).await.map_err(unrotated)?;
        Ok(Json(api.control.identity()).into_response())
    })
    .await
}

async fn abort_rotation(State(api): State<Api>) -> Response {
    answer(async {
        api.control.abort_rotation().await.map_err(unrotated)?;
        Ok(Json(api.control.identity()).into_response())
    })
    .await
}

fn unrotated(error: RotationError) -> Refused {
    let status = match &error {
        RotationError::UnderWay
        | RotationError::GoingBack
        | RotationError::None
        | RotationError::Ca(CaError::NoCross(_)) => StatusCode::CONFLICT,
        RotationError::Ca(_) | RotationError::Store(_) => StatusCode::INSUFFICIENT_STORAGE,
    };
    refused(status, error.to_string(), "")
}

#[derive(Deserialize)]
struct Code {
    code: String,
}

async fn session(State(api): State<Api>, headers: HeaderMap, bytes: bytes::Bytes) -> Response {
    answer(async {
        // A page of another address cannot send this type without being asked for first.
        let json = headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
        let Code { code } = body(&bytes)?;
        match api.access.open_session(&code).filter(|_| json) {
            Some(cookie) => Ok(([(header::SET_COOKIE, cookie)], StatusCode::NO_CONTENT).into_response()),
            None => Err(refused(StatusCode::UNAUTHORIZED, "the link was used or is too old", "open a new one")),
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use sheer_core::api;

    /// The page stands alone: it works without a way to the internet, and what workloads are called cannot become markup.
    #[test]
    fn the_page_loads_nothing_of_others_and_makes_no_markup() {
        for (path, _, content) in PAGE {
            let own =
                content.replace("http://www.w3.org/2000/svg", "").replace("http://api/", "").replace("http://${", "");
            for foreign in ["http://", "https://", "url(", "@import"] {
                assert!(!own.contains(foreign), "{path} has {foreign}");
            }
        }
        let [(_, _, html), (_, _, script), ..] = PAGE;
        for way in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("] {
            assert!(!script.contains(way), "view.js uses {way}");
        }
        assert!(!POLICY.contains("unsafe"), "{POLICY}");
        // The policy forbids both, so they would be dead.
        assert!(!html.contains("style=") && !html.contains(" onclick"));
        let named = |attribute: &str| {
            let parts = html.split(attribute).skip(1).filter_map(|rest| rest.split('"').next());
            parts.map(str::to_owned).collect::<Vec<_>>()
        };
        for file in [named("src=\""), named("href=\"")].concat() {
            assert!(PAGE.iter().any(|(path, ..)| *path == file), "view.html wants {file}");
        }
    }

    /// Every field that the page reads is one that the API writes.
    #[test]
    fn the_page_reads_what_the_api_writes() {
        let value = |it: Result<Value, serde_json::Error>| it.expect("JSON");
        let known = [
            ("mesh", value(serde_json::to_value(api::MeshView::default()))),
            ("edges", value(serde_json::to_value(api::Edges::default()))),
            ("edge", value(serde_json::to_value(api::EdgeRow::default()))),
            ("figures", value(serde_json::to_value(api::Figures::default()))),
            ("edge.window", value(serde_json::to_value(api::Figures::default()))),
            ("edge.total", value(serde_json::to_value(api::Figures::default()))),
            ("outcome", value(serde_json::to_value(api::Outcome::default()))),
            ("service", value(serde_json::to_value(api::ServiceView::default()))),
            ("workload", value(serde_json::to_value(api::WorkloadView::default()))),
            ("port", value(serde_json::to_value(api::PortView::default()))),
            ("check", value(serde_json::to_value(api::Check::default()))),
            ("finding", value(serde_json::to_value(api::Finding::default()))),
        ];
        let (_, _, script) = PAGE[1];
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let mut read = 0;
        for (name, fields) in &known {
            for (at, _) in script.match_indices(&format!("{name}.")) {
                let inside = script[..at].ends_with(|c: char| word(c) || matches!(c, '.' | '/' | '"'));
                let field: String = script[at + name.len() + 1..].chars().take_while(|c| word(*c)).collect();
                if !inside && !field.is_empty() {
                    assert!(fields.get(&field).is_some(), "view.js reads {name}.{field}");
                    read += 1;
                }
            }
        }
        assert!(read > 50, "{read}: the names in view.js have changed");
    }
}
