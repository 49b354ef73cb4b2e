//! Docker's daemon whose containers are VMs.

use axum::Json;
use axum::extract::{ConnectInfo, State};
use axum::http::StatusCode;
use catalyst_api::{ApiError, DockerInfo};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::App;
use super::super::error::Refusal;
use crate::access::peer::Peer;
use crate::docker::DockerError;

const TAG: &str = "Docker";

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(show, up, down))
}

/// Whether it is up, and where.
#[utoipa::path(get, path = "/v1/docker", tag = TAG, responses((status = 200, body = DockerInfo)))]
async fn show(State(app): State<App>) -> Json<DockerInfo> {
    Json(app.docker.info())
}

/// Brings it up, which takes seconds: 201 if it was down, 200 if it was up. Whoever may use it can do as root does on this
/// machine; so an owner who is neither root nor in the group `docker` is refused, and root may do it for that owner.
#[utoipa::path(post, path = "/v1/docker", tag = TAG,
    responses((status = 200, body = DockerInfo), (status = 201, body = DockerInfo), (status = 400, body = ApiError),
        (status = 403, body = ApiError), (status = 503, body = ApiError), (status = 507, body = ApiError)))]
async fn up(
    State(app): State<App>,
    ConnectInfo(peer): ConnectInfo<Peer>,
) -> Result<(StatusCode, Json<DockerInfo>), Refusal> {
    let by_root = peer.is_root().map_err(DockerError::from)?;
    let status = if app.docker.up(by_root).await? { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(app.docker.info())))
}

/// Takes it down with its containers; images, volumes and containers that have ended stay on disk. What is down stays so.
#[utoipa::path(delete, path = "/v1/docker", tag = TAG, responses((status = 204)))]
async fn down(State(app): State<App>) -> Result<StatusCode, Refusal> {
    app.docker.down().await?;
    Ok(StatusCode::NO_CONTENT)
}
