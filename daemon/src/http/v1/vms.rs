//! VMs: made, told, changed, powered, deleted.

use axum::Json;
use axum::extract::{ConnectInfo, Path, Query, State};
use axum::http::StatusCode;
use catalyst_api::{ApiError, CloneVm, CreateVm, ErrorCode, MemoryInfo, PowerRequest, UpdateVm, Vm};
use serde::Deserialize;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::App;
use super::super::body::JsonBody;
use super::super::error::Refusal;
use crate::access::peer::Peer;
use crate::machines::error::CreateError;

const TAG: &str = "VMs";
/// Most clones that are made at once.
const MOST_CLONES: usize = 256;

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(show, update, delete))
        .routes(routes!(power))
        .routes(routes!(clone_all))
        .routes(routes!(memory))
}

#[derive(Deserialize)]
struct ListQuery {
    tag: Option<String>,
}

/// All VMs, ordered by id.
#[utoipa::path(get, path = "/v1/vms", tag = TAG,
    params(("tag" = Option<String>, Query, description = "Only VMs with this tag")),
    responses((status = 200, body = [Vm])))]
async fn list(State(app): State<App>, Query(query): Query<ListQuery>) -> Json<Vec<Vm>> {
    let tags: Vec<String> = query.tag.into_iter().collect();
    Json(app.machines.list(&tags).iter().map(|vm| vm.view()).collect())
}

/// Makes a VM.
#[utoipa::path(post, path = "/v1/vms", tag = TAG, request_body = CreateVm,
    responses((status = 201, body = Vm), (status = 400, body = ApiError), (status = 409, body = ApiError)))]
async fn create(
    State(app): State<App>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    JsonBody(mut request): JsonBody<CreateVm>,
) -> Result<(StatusCode, Json<Vm>), Refusal> {
    if let Some(container) = &mut request.container {
        match peer {
            // The process that asks is the container, by its number here.
            Peer::Unix { uid: 0, pid: Some(pid) } => container.pid = pid,
            _ => return Err(CreateError::Container.into()),
        }
    }
    let vm = app.machines.create(request).await?;
    Ok((StatusCode::CREATED, Json(vm.view())))
}

/// One VM.
#[utoipa::path(get, path = "/v1/vms/{id}", tag = TAG, params(("id" = String, Path)),
    responses((status = 200, body = Vm), (status = 404, body = ApiError)))]
async fn show(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Vm>, Refusal> {
    Ok(Json(app.machines.show(&id)?))
}

/// Changes name, tags, and, from the next power-on, CPUs and memory.
#[utoipa::path(patch, path = "/v1/vms/{id}", tag = TAG, params(("id" = String, Path)), request_body = UpdateVm,
    responses((status = 200, body = Vm), (status = 400, body = ApiError), (status = 404, body = ApiError)))]
async fn update(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(request): JsonBody<UpdateVm>,
) -> Result<Json<Vm>, Refusal> {
    let vm = app.machines.update(&id, request).await?;
    Ok(Json(vm.view()))
}

#[derive(Deserialize)]
struct DeleteQuery {
    #[serde(default)]
    force: bool,
}

/// Deletes a VM and its files.
#[utoipa::path(delete, path = "/v1/vms/{id}", tag = TAG,
    params(("id" = String, Path), ("force" = Option<bool>, Query, description = "Also one that runs")),
    responses((status = 204), (status = 404, body = ApiError), (status = 409, body = ApiError)))]
async fn delete(
    State(app): State<App>,
    Path(id): Path<String>,
    Query(query): Query<DeleteQuery>,
) -> Result<StatusCode, Refusal> {
    app.machines.delete(&id, query.force).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Changes the power state; answers when it is reached.
#[utoipa::path(post, path = "/v1/vms/{id}/power", tag = TAG, params(("id" = String, Path)),
    request_body = PowerRequest,
    responses((status = 200, body = Vm), (status = 404, body = ApiError), (status = 409, body = ApiError),
        (status = 501, body = ApiError), (status = 504, body = ApiError)))]
async fn power(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(request): JsonBody<PowerRequest>,
) -> Result<Json<Vm>, Refusal> {
    let vm = app.machines.power(&id, request.op, request.cold).await?;
    Ok(Json(vm.view()))
}

/// Clones a VM with its disk. One that runs is cloned with its memory as well, and the clones run. All of them are made, or
/// none.
#[utoipa::path(post, path = "/v1/vms/{id}/clones", tag = TAG, params(("id" = String, Path)), request_body = CloneVm,
    responses((status = 201, body = [Vm]), (status = 400, body = ApiError), (status = 404, body = ApiError),
        (status = 409, body = ApiError)))]
async fn clone_all(
    State(app): State<App>,
    Path(id): Path<String>,
    JsonBody(request): JsonBody<CloneVm>,
) -> Result<(StatusCode, Json<Vec<Vm>>), Refusal> {
    if !(1..=MOST_CLONES).contains(&request.ids.len()) {
        let message = format!("'ids' has {} ids: 1 to {MOST_CLONES} are possible", request.ids.len());
        return Err(Refusal::new(ErrorCode::InvalidRequest, message));
    }
    let made = app.machines.clone_all(&id, request.ids).await?;
    Ok((StatusCode::CREATED, Json(made.iter().map(|vm| vm.view()).collect())))
}

/// Where the memory of a VM that is on is: its own, shared, untouched.
#[utoipa::path(get, path = "/v1/vms/{id}/memory", tag = TAG, params(("id" = String, Path)),
    responses((status = 200, body = MemoryInfo), (status = 404, body = ApiError), (status = 409, body = ApiError)))]
async fn memory(State(app): State<App>, Path(id): Path<String>) -> Result<Json<MemoryInfo>, Refusal> {
    Ok(Json(app.machines.usage(&id).await?.0))
}
