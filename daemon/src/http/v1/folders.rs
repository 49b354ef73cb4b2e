//! Folders of the host in guests.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use catalyst_api::{ApiError, CreateFolder, Folder};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::App;
use super::super::body::JsonBody;
use super::super::error::Refusal;

const TAG: &str = "Folders";

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list, add)).routes(routes!(get, remove))
}

/// The folders of a VM.
#[utoipa::path(get, path = "/v1/vms/{id}/folders", tag = TAG, params(("id" = String, Path)),
    responses((status = 200, body = [Folder]), (status = 404, body = ApiError)))]
async fn list(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Vec<Folder>>, Refusal> {
    Ok(Json(app.machines.folders(&id)?))
}

/// Gives a VM a folder of the host; the same again changes nothing. Where its guest is up it is mounted when the answer comes.
#[utoipa::path(post, path = "/v1/vms/{id}/folders", tag = TAG, params(("id" = String, Path)),
    request_body = CreateFolder,
    responses((status = 201, body = Folder), (status = 400, body = ApiError), (status = 404, body = ApiError),
        (status = 409, body = ApiError), (status = 502, body = ApiError)))]
async fn add(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(request): JsonBody<CreateFolder>,
) -> Result<(StatusCode, Json<Folder>), Refusal> {
    Ok((StatusCode::CREATED, Json(app.machines.add_folder(&id, request).await?)))
}

/// One folder.
#[utoipa::path(get, path = "/v1/vms/{id}/folders/{name}", tag = TAG,
    params(("id" = String, Path), ("name" = String, Path)),
    responses((status = 200, body = Folder), (status = 404, body = ApiError)))]
async fn get(
    State(app): State<App>,
    Path((id, name)): Path<(String, String)>,
) -> Result<Json<Folder>, Refusal> {
    Ok(Json(app.machines.folder(&id, &name)?))
}

/// Takes a folder away; programs of the guest that use it keep it (409, with their names).
#[utoipa::path(delete, path = "/v1/vms/{id}/folders/{name}", tag = TAG,
    params(("id" = String, Path), ("name" = String, Path)),
    responses((status = 204), (status = 404, body = ApiError), (status = 409, body = ApiError),
        (status = 502, body = ApiError)))]
async fn remove(
    State(app): State<App>,
    Path((id, name)): Path<(String, String)>,
) -> Result<StatusCode, Refusal> {
    app.machines.remove_folder(&id, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}
