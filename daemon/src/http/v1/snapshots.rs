//! Snapshots of VMs.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use catalyst_api::{ApiError, CreateSnapshot, RestoreSnapshot, Snapshot, Vm};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::App;
use super::super::body::JsonBody;
use super::super::error::Refusal;

const TAG: &str = "Snapshots";

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list, create)).routes(routes!(delete)).routes(routes!(restore))
}

/// The snapshots of a VM, the oldest first.
#[utoipa::path(get, path = "/v1/vms/{id}/snapshots", tag = TAG, params(("id" = String, Path)),
    responses((status = 200, body = [Snapshot]), (status = 404, body = ApiError)))]
async fn list(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Vec<Snapshot>>, Refusal> {
    Ok(Json(app.machines.snapshots(&id)?))
}

/// Makes a snapshot: of disk and memory where the VM runs, is paused or suspended, of its disk where it is off.
#[utoipa::path(post, path = "/v1/vms/{id}/snapshots", tag = TAG, params(("id" = String, Path)),
    request_body = CreateSnapshot,
    responses((status = 201, body = Snapshot), (status = 400, body = ApiError), (status = 404, body = ApiError),
        (status = 409, body = ApiError), (status = 507, body = ApiError)))]
async fn create(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(request): JsonBody<CreateSnapshot>,
) -> Result<(StatusCode, Json<Snapshot>), Refusal> {
    Ok((StatusCode::CREATED, Json(app.machines.create_snapshot(&id, request).await?)))
}

/// Makes the VM what it was; what it is now is lost. One that ran then goes on from there, unless it is not to start.
#[utoipa::path(post, path = "/v1/vms/{id}/snapshots/{name}/restore", tag = TAG,
    params(("id" = String, Path), ("name" = String, Path)), request_body = RestoreSnapshot,
    responses((status = 200, body = Vm), (status = 404, body = ApiError), (status = 409, body = ApiError),
        (status = 503, body = ApiError), (status = 507, body = ApiError)))]
async fn restore(
    State(app): State<App>,
    Path((id, name)): Path<(String, String)>,
    JsonBody(request): JsonBody<RestoreSnapshot>,
) -> Result<Json<Vm>, Refusal> {
    let vm = app.machines.restore_snapshot(&id, name, request.start).await?;
    Ok(Json(vm.view()))
}

/// Deletes a snapshot; what no other needs of its disk is given back.
#[utoipa::path(delete, path = "/v1/vms/{id}/snapshots/{name}", tag = TAG,
    params(("id" = String, Path), ("name" = String, Path)),
    responses((status = 204), (status = 404, body = ApiError), (status = 409, body = ApiError)))]
async fn delete(
    State(app): State<App>,
    Path((id, name)): Path<(String, String)>,
) -> Result<StatusCode, Refusal> {
    app.machines.delete_snapshot(&id, name).await?;
    Ok(StatusCode::NO_CONTENT)
}
