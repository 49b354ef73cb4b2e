//! Templates and their warm states.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use catalyst_api::words::ImageName;
use catalyst_api::{ApiError, CreateTemplate, Task, TemplateInfo, WarmRequest};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::App;
use super::super::body::JsonBody;
use super::super::error::Refusal;

const TAG: &str = "Templates";

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list, create)).routes(routes!(show, delete)).routes(routes!(warm))
}

/// All templates, with their warm states.
#[utoipa::path(get, path = "/v1/templates", tag = TAG, responses((status = 200, body = [TemplateInfo])))]
async fn list(State(app): State<App>) -> Result<Json<Vec<TemplateInfo>>, Refusal> {
    Ok(Json(app.machines.templates().await?))
}

/// Begins to make a template of a VM: of one that runs with its memory. What is of that VM alone is left out: host keys,
/// authorized keys, ids.
#[utoipa::path(post, path = "/v1/templates", tag = TAG, request_body = CreateTemplate,
    responses((status = 202, body = Task), (status = 400, body = ApiError), (status = 404, body = ApiError),
        (status = 409, body = ApiError), (status = 501, body = ApiError)))]
async fn create(
    State(app): State<App>,
    JsonBody(request): JsonBody<CreateTemplate>,
) -> Result<(StatusCode, Json<Task>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(app.machines.create_template(&request)?)))
}

/// Deletes a template that was made from a VM or imported, and that no VM stands on.
#[utoipa::path(delete, path = "/v1/templates/{name}", tag = TAG, params(("name" = String, Path)),
    responses((status = 204), (status = 404, body = ApiError), (status = 409, body = ApiError)))]
async fn delete(State(app): State<App>, Path(name): Path<String>) -> Result<StatusCode, Refusal> {
    app.images.delete_template(&app.machines, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// One template.
#[utoipa::path(get, path = "/v1/templates/{name}", tag = TAG, params(("name" = ImageName, Path)),
    responses((status = 200, body = TemplateInfo), (status = 404, body = ApiError)))]
async fn show(State(app): State<App>, Path(name): Path<String>) -> Result<Json<TemplateInfo>, Refusal> {
    Ok(Json(app.machines.template(&name).await?))
}

/// Begins to make a warm state, which new VMs of that size go on from instead of booting.
#[utoipa::path(post, path = "/v1/templates/{name}/warm", tag = TAG, params(("name" = ImageName, Path)),
    request_body = WarmRequest,
    responses((status = 202, body = Task), (status = 400, body = ApiError), (status = 404, body = ApiError),
        (status = 409, body = ApiError)))]
async fn warm(
    State(app): State<App>,
    Path(name): Path<String>,
    JsonBody(request): JsonBody<WarmRequest>,
) -> Result<(StatusCode, Json<Task>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(app.machines.warm(&name, request).await?)))
}
