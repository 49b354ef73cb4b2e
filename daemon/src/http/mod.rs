//! REST: handlers that parse and answer, without logic of their own.

mod body;
mod describe;
pub mod error;
mod legacy;
mod shape;
mod swagger;
mod ui;
mod v1;

use std::sync::Arc;

use axum::Router;
use axum::routing::get;
use tokio::sync::Notify;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::OpenApi;
use utoipa_swagger_ui::{SwaggerUi, Url};

use crate::docker::Docker;
use crate::images::Images;
use crate::machines::Machines;
use crate::settings::Settings;
use crate::usage::Usage;

/// What handlers work with.
#[derive(Clone, Debug)]
pub struct App {
    /// The VMs.
    pub machines: Machines,
    /// Docker's daemon.
    pub docker: Docker,
    /// Images and their tasks.
    pub images: Images,
    /// What VMs take.
    pub usage: Arc<Usage>,
    /// How the daemon was started.
    pub settings: Arc<Settings>,
    /// Told to stop the daemon.
    pub stop: Arc<Notify>,
}

#[derive(OpenApi)]
#[openapi(
    info(title = "Catalyst", description = "A desktop hypervisor for developers. [The VMs in a page](/ui)."),
    tags(
        (name = "AppCatalyst", description = "The contract of VMware AppCatalyst, as its clients use it"),
        (name = "VMs", description = "Virtual machines"),
        (name = "Ports", description = "Ports of guests on the host"),
        (name = "Guest", description = "Inside a VM"),
        (name = "Images", description = "Templates that VMs are made from"),
        (name = "Docker", description = "Docker's daemon whose containers are VMs"),
        (name = "Daemon", description = "The daemon and its host"),
    )
)]
struct Description;

/// All routes. Who may use them is decided by the layers around (see [`crate::access`]).
pub fn router(app: App) -> Router {
    let (legacy, legacy_description) = legacy::routes().split_for_parts();
    let (v1, v1_description) = v1::routes().split_for_parts();
    let mut description = Description::openapi();
    description.merge(legacy_description);
    description.merge(v1_description);
    describe::complete(&mut description);
    let page = SwaggerUi::new("/swagger").url(Url::new("Catalyst", "/v1/openapi.json"), description);
    let documents = Router::new()
        .merge(swagger::add_to(page))
        .layer(axum::middleware::map_response(swagger::stays_here))
        .merge(ui::routes())
        .route("/", get(|| async { axum::response::Redirect::temporary("/swagger/") }));
    let legacy = Router::new()
        .merge(legacy)
        .layer(CatchPanicLayer::new())
        .layer(axum::middleware::from_fn(shape::legacy_errors));
    let rest = Router::new()
        .merge(v1)
        .merge(documents)
        .fallback(shape::no_such_path)
        .layer(CatchPanicLayer::new())
        .layer(axum::middleware::from_fn(shape::v1_errors));
    legacy.merge(rest).layer(axum::middleware::from_fn(shape::log)).with_state(app)
}
