//! Images and tasks.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use catalyst_api::words::ImageName;
use catalyst_api::{ApiError, ErrorCode, ExportVm, ImageInfo, ImportImage, Task};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::App;
use super::super::body::JsonBody;
use super::super::error::Refusal;

const TAG: &str = "Images";

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(show, remove))
        .routes(routes!(manifest))
        .routes(routes!(build))
        .routes(routes!(import))
        .routes(routes!(export))
        .routes(routes!(verify))
        .routes(routes!(tasks))
        .routes(routes!(task))
}

/// All versions of all images.
#[utoipa::path(get, path = "/v1/images", tag = TAG, responses((status = 200, body = [ImageInfo])))]
async fn list(State(app): State<App>) -> Result<Json<Vec<ImageInfo>>, Refusal> {
    Ok(Json(app.images.list(&app.machines).await?))
}

/// All versions of one image.
#[utoipa::path(get, path = "/v1/images/{name}", tag = TAG, params(("name" = ImageName, Path)),
    responses((status = 200, body = [ImageInfo]), (status = 404, body = ApiError)))]
async fn show(State(app): State<App>, Path(name): Path<String>) -> Result<Json<Vec<ImageInfo>>, Refusal> {
    let mut images = app.images.list(&app.machines).await?;
    images.retain(|image| image.name == name);
    if images.is_empty() {
        let name = name.chars().take(80).collect::<String>();
        let message = format!("There is no image '{}'; see: catalyst image list", name.escape_debug());
        return Err(Refusal::new(ErrorCode::ImageNotFound, message));
    }
    Ok(Json(images))
}

/// Removes an image that no VM stands on.
#[utoipa::path(delete, path = "/v1/images/{name}", tag = TAG, params(("name" = ImageName, Path)),
    responses((status = 204), (status = 404, body = ApiError), (status = 409, body = ApiError)))]
async fn remove(State(app): State<App>, Path(name): Path<String>) -> Result<StatusCode, Refusal> {
    app.images.remove(&app.machines, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The manifest of the current version: packages, kernel, digests.
#[utoipa::path(get, path = "/v1/images/{name}/manifest", tag = TAG, params(("name" = ImageName, Path)),
    responses((status = 200, body = Object), (status = 404, body = ApiError)))]
async fn manifest(State(app): State<App>, Path(name): Path<String>) -> Result<Response, Refusal> {
    let text = app.images.manifest(&name).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

/// Builds an image; a build that was interrupted goes on where it was.
#[utoipa::path(post, path = "/v1/images/{name}/build", tag = TAG, params(("name" = ImageName, Path)),
    responses((status = 202, body = Task), (status = 404, body = ApiError), (status = 409, body = ApiError)))]
async fn build(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<(StatusCode, Json<Task>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(app.images.build(&app.machines, &name)?)))
}

/// Begins to make a template of a disk of others, which starts by its own loader.
#[utoipa::path(post, path = "/v1/images/import", tag = TAG, request_body = ImportImage,
    responses((status = 202, body = Task), (status = 400, body = ApiError), (status = 409, body = ApiError)))]
async fn import(
    State(app): State<App>,
    JsonBody(request): JsonBody<ImportImage>,
) -> Result<(StatusCode, Json<Task>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(app.machines.import(request)?)))
}

/// Begins to write the disk of a VM that is off into a qcow2 that stands on nothing.
#[utoipa::path(post, path = "/v1/vms/{id}/export", tag = TAG, params(("id" = String, Path)), request_body = ExportVm,
    responses((status = 202, body = Task), (status = 400, body = ApiError), (status = 404, body = ApiError),
        (status = 409, body = ApiError), (status = 501, body = ApiError)))]
async fn export(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(request): JsonBody<ExportVm>,
) -> Result<(StatusCode, Json<Task>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(app.machines.export(&id, &request)?)))
}

/// Compares every file of an image with its digest.
#[utoipa::path(post, path = "/v1/images/{name}/verify", tag = TAG, params(("name" = ImageName, Path)),
    responses((status = 202, body = Task), (status = 404, body = ApiError), (status = 409, body = ApiError)))]
async fn verify(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<(StatusCode, Json<Task>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(app.images.verify(&name)?)))
}

/// The tasks of this daemon, the newest last.
#[utoipa::path(get, path = "/v1/tasks", tag = "Daemon", responses((status = 200, body = [Task])))]
async fn tasks(State(app): State<App>) -> Json<Vec<Task>> {
    Json(app.images.tasks().list())
}

/// One task.
#[utoipa::path(get, path = "/v1/tasks/{id}", tag = "Daemon", params(("id" = u64, Path)),
    responses((status = 200, body = Task), (status = 404, body = ApiError)))]
async fn task(State(app): State<App>, Path(id): Path<u64>) -> Result<Json<Task>, Refusal> {
    app.images
        .tasks()
        .get(id)
        .map(Json)
        .ok_or_else(|| Refusal::new(ErrorCode::TaskNotFound, format!("There is no task {id} in this daemon")))
}
