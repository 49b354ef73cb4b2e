//! `/v1/…`: Catalyst's own API.

mod daemon;
mod docker;
mod events;
mod files;
mod folders;
mod guest;
mod images;
mod logs;
mod ports;
mod snapshots;
mod templates;
mod vms;

use utoipa_axum::router::OpenApiRouter;

use super::App;

/// The routes.
pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .merge(vms::routes())
        .merge(guest::routes())
        .merge(files::routes())
        .merge(folders::routes())
        .merge(logs::routes())
        .merge(images::routes())
        .merge(ports::routes())
        .merge(snapshots::routes())
        .merge(templates::routes())
        .merge(events::routes())
        .merge(docker::routes())
        .merge(daemon::routes())
}
