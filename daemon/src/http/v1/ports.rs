//! Ports of guests on the host.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use catalyst_api::{ApiError, Port, PublishPort};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::App;
use super::super::body::JsonBody;
use super::super::error::Refusal;

const TAG: &str = "Ports";

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list, publish)).routes(routes!(unpublish))
}

/// The published ports of a VM, by number. Those that could not be had are tried again.
#[utoipa::path(get, path = "/v1/vms/{id}/ports", tag = TAG, params(("id" = String, Path)),
    responses((status = 200, body = [Port]), (status = 404, body = ApiError)))]
async fn list(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Vec<Port>>, Refusal> {
    Ok(Json(app.machines.ports(&id).await?))
}

/// Publishes a port of the guest on the host, for as long as the VM exists, whether it is on or not. Everybody who reaches
/// the address reaches the guest's port.
#[utoipa::path(post, path = "/v1/vms/{id}/ports", tag = TAG, params(("id" = String, Path)),
    request_body = PublishPort,
    responses((status = 201, body = Port), (status = 400, body = ApiError), (status = 404, body = ApiError),
        (status = 409, body = ApiError), (status = 507, body = ApiError)))]
async fn publish(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(request): JsonBody<PublishPort>,
) -> Result<(StatusCode, Json<Port>), Refusal> {
    Ok((StatusCode::CREATED, Json(app.machines.publish(&id, request).await?)))
}

/// Takes a port back, and ends what goes through it.
#[utoipa::path(delete, path = "/v1/vms/{id}/ports/{port}", tag = TAG,
    params(("id" = String, Path),
        ("port" = String, Path, description = "8080, 8080-udp, or with its address: 127.0.0.1:8080")),
    responses((status = 204), (status = 400, body = ApiError), (status = 404, body = ApiError)))]
async fn unpublish(
    State(app): State<App>,
    Path((id, port)): Path<(String, String)>,
) -> Result<StatusCode, Refusal> {
    app.machines.unpublish(&id, &port).await?;
    Ok(StatusCode::NO_CONTENT)
}
