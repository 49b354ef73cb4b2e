//! `/ui`: the page. Its source is in `ui/`; what is built of it is part of this program.

use std::sync::LazyLock;

use axum::Router;
use axum::extract::Path;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use catalyst_images::digest::hex;
use sha2::{Digest, Sha256};

use super::App;

/// Scripts are this daemon's own and no text ever becomes markup; nothing is loaded from or sent to anywhere else. Styles
/// of its own making are what the terminal draws with.
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
     require-trusted-types-for 'script'; trusted-types 'none'",
);

/// A file of the page: its name, its type, its bytes.
type Asset = (&'static str, &'static str, &'static [u8]);

const INDEX: &str = "index.html";
const ASSETS: [Asset; 5] = [
    (INDEX, "text/html; charset=utf-8", include_bytes!("../../../ui/dist/index.html")),
    ("app.js", "text/javascript; charset=utf-8", include_bytes!("../../../ui/dist/app.js")),
    ("app.css", "text/css; charset=utf-8", include_bytes!("../../../ui/dist/app.css")),
    ("icon.svg", "image/svg+xml", include_bytes!("../../../ui/dist/icon.svg")),
    ("licences.txt", "text/plain; charset=utf-8", include_bytes!("../../../ui/dist/licences.txt")),
];

/// What a browser that has them knows them by.
static TAGS: LazyLock<[String; ASSETS.len()]> =
    LazyLock::new(|| ASSETS.map(|(.., bytes)| format!("\"{}\"", hex(&Sha256::digest(bytes)))));

/// The routes. They are no part of the API and so not of its description.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/ui", get(|headers: HeaderMap| async move { asset(INDEX, &headers) }))
        .route("/ui/", get(|| async { axum::response::Redirect::permanent("/ui") }))
        .route(
            "/ui/{name}",
            get(|Path(name): Path<String>, headers: HeaderMap| async move { asset(&name, &headers) }),
        )
}

fn asset(name: &str, headers: &HeaderMap) -> Response {
    let Some(((_, kind, bytes), tag)) =
        ASSETS.iter().zip(TAGS.iter()).find(|((known, ..), _)| *known == name)
    else {
        return (StatusCode::NOT_FOUND, "The page has no such file; it is at /ui").into_response();
    };
    // Another daemon may serve the next request: what a browser keeps is asked for again, and seldom sent.
    let known = headers.get(header::IF_NONE_MATCH).is_some_and(|value| value.as_bytes() == tag.as_bytes());
    let mut response =
        if known { StatusCode::NOT_MODIFIED.into_response() } else { (*bytes).into_response() };
    let set = response.headers_mut();
    set.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    set.insert(header::CONTENT_SECURITY_POLICY, POLICY);
    set.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    set.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    set.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    if let Ok(tag) = HeaderValue::from_str(tag) {
        set.insert(header::ETAG, tag);
    }
    response
}
