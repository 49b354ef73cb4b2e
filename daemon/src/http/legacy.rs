//! `/api/…`: the AppCatalyst contract to the letter (AppCatalyst reference sections 1.1 to 1.6).

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use catalyst_api::legacy::{CodeMessage, CreateBody, CreatedVm, FolderObject, VmObject};
use catalyst_api::words::{PowerWord, Switch};
use catalyst_api::{CreateFolder, CreateVm, Folder, PowerOp, VmState};
use serde::Deserialize;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::App;
use super::body::Raw;
use super::error::LegacyRefusal;
use crate::machines::error::{FolderError, GuestError, PowerError};
use crate::store::config::split_tags;

type Answer<T> = Result<Json<T>, LegacyRefusal>;

const TAG: &str = "AppCatalyst";

/// The routes.
pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(get, delete))
        .routes(routes!(power, set_power))
        .routes(routes!(ip_address))
        .routes(routes!(folders, folders_enable, folder_add))
        .routes(routes!(folder, folder_update, folder_delete))
}

#[derive(Deserialize)]
struct ListQuery {
    tags: Option<String>,
}

/// The ids of all VMs.
#[utoipa::path(get, path = "/api/vms", tag = TAG,
    params(("tags" = Option<String>, Query, description = "Only VMs with one of these tags, separated by commas")),
    responses((status = 200, body = [String])))]
async fn list(State(app): State<App>, Query(query): Query<ListQuery>) -> Json<Vec<String>> {
    let tags = split_tags(&query.tags.unwrap_or_default());
    Json(app.machines.list(&tags).iter().map(|vm| vm.dir().id().to_string()).collect())
}

/// Clones the default template, or the VM `parentId`; or registers the VMX `sourceReference` where it is.
#[utoipa::path(post, path = "/api/vms", tag = TAG, request_body = CreateBody,
    responses((status = 200, body = CreatedVm), (status = 500, body = CodeMessage)))]
async fn create(State(app): State<App>, Raw(body): Raw) -> Answer<CreatedVm> {
    let body: CreateBody = serde_json::from_slice(&body).map_err(|error| {
        LegacyRefusal::new(StatusCode::BAD_REQUEST, format!("The body is not a VM: {error}"))
    })?;
    let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let request = CreateVm {
        id: body.id.clone(),
        name: given(&body.name),
        parent: given(&body.parent_id),
        source: given(&body.source_reference),
        tags: split_tags(body.tag.as_deref().unwrap_or_default()),
        ..CreateVm::default()
    };
    let vm = app.machines.create(request).await?.view();
    Ok(Json(CreatedVm {
        id: vm.id,
        parent_id: body.parent_id.unwrap_or_default(),
        name: vm.name,
        tag: vm.tags.join(","),
        source_reference: body.source_reference.unwrap_or_default(),
    }))
}

/// One VM.
#[utoipa::path(get, path = "/api/vms/{id}", tag = TAG, params(("id" = String, Path)),
    responses((status = 200, body = VmObject), (status = 404, body = CodeMessage)))]
async fn get(State(app): State<App>, Path(id): Path<String>) -> Answer<VmObject> {
    let vm = app.machines.show(&id)?;
    Ok(Json(VmObject { id: vm.id, name: vm.name, tag: vm.tags.join(",") }))
}

/// Deletes a VM in whatever state, with its files. A body is not looked at.
#[utoipa::path(delete, path = "/api/vms/{id}", tag = TAG, params(("id" = String, Path)),
    responses((status = 204), (status = 404, body = CodeMessage)))]
async fn delete(State(app): State<App>, Path(id): Path<String>) -> Result<StatusCode, LegacyRefusal> {
    app.machines.delete(&id, true).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The power state as a word.
#[utoipa::path(get, path = "/api/vms/power/{id}", tag = TAG, params(("id" = String, Path)),
    responses((status = 200, body = CodeMessage), (status = 404, body = CodeMessage)))]
async fn power(State(app): State<App>, Path(id): Path<String>) -> Answer<CodeMessage> {
    let word = match app.machines.get(&id)?.state() {
        VmState::Blocked => "blocked on msg",
        state => state.as_str(),
    };
    Ok(ok(word))
}

/// Changes the power state; the body is the bare word.
#[utoipa::path(patch, path = "/api/vms/power/{id}", tag = TAG, params(("id" = String, Path)),
    request_body(content = PowerWord, content_type = "text/plain", description = "on, off, shutdown, suspend, pause or unpause"),
    responses((status = 200, body = CodeMessage), (status = 500, body = CodeMessage)))]
async fn set_power(State(app): State<App>, Path(id): Path<String>, Raw(body): Raw) -> Answer<CodeMessage> {
    app.machines.get(&id)?;
    let op: PowerOp = bare_word(&body).parse().map_err(|()| {
        let words = PowerOp::ALL.map(PowerOp::as_str).join(", ");
        LegacyRefusal::new(
            StatusCode::BAD_REQUEST,
            format!("The op name is not supported. Use one of {words}."),
        )
    })?;
    app.machines.power(&id, op, false).await.map_err(|error| match error {
        PowerError::State { .. } => LegacyRefusal::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        error => error.into(),
    })?;
    Ok(ok(match op {
        PowerOp::On => "The VM is powered on.",
        PowerOp::Off => "The VM is powered off.",
        PowerOp::Shutdown => "The VM is shut down.",
        PowerOp::Suspend => "The VM is suspended.",
        PowerOp::Pause => "The VM is paused.",
        PowerOp::Unpause => "The VM is unpaused.",
    }))
}

/// The guest's address. Until it holds it, an error: clients ask again by themselves.
#[utoipa::path(get, path = "/api/vms/{id}/ipaddress", tag = TAG, params(("id" = String, Path)),
    responses((status = 200, body = CodeMessage), (status = 408, body = CodeMessage)))]
async fn ip_address(State(app): State<App>, Path(id): Path<String>) -> Answer<CodeMessage> {
    let address = app.machines.address(&id).await.map_err(|error| match error {
        GuestError::NotReady { .. } => LegacyRefusal::new(StatusCode::REQUEST_TIMEOUT, error.to_string()),
        GuestError::State { .. } => LegacyRefusal::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        error => error.into(),
    })?;
    Ok(ok(&address.to_string()))
}

/// Names of the shared folders.
#[utoipa::path(get, path = "/api/vms/{id}/folders", tag = TAG, params(("id" = String, Path)),
    responses((status = 200, body = [String]), (status = 404, body = CodeMessage)))]
async fn folders(State(app): State<App>, Path(id): Path<String>) -> Answer<Vec<String>> {
    Ok(Json(app.machines.folders(&id)?.into_iter().map(|folder| folder.name).collect()))
}

/// Enables or disables sharing: the body is the bare word. Folders are shared as long as there are any, so both are answered, and
/// neither does anything.
#[utoipa::path(patch, path = "/api/vms/{id}/folders", tag = TAG, params(("id" = String, Path)),
    request_body(content = Switch, content_type = "text/plain", description = "true or false"),
    responses((status = 200, body = CodeMessage), (status = 400, body = CodeMessage), (status = 404, body = CodeMessage)))]
async fn folders_enable(
    State(app): State<App>,
    Path(id): Path<String>,
    Raw(body): Raw,
) -> Answer<CodeMessage> {
    app.machines.get(&id)?;
    match bare_word(&body).as_str() {
        "true" => Ok(ok("Shared folders are enabled.")),
        "false" => Ok(ok("Shared folders are disabled.")),
        _ => Err(LegacyRefusal::new(StatusCode::BAD_REQUEST, "The body is 'true' or 'false'.".to_owned())),
    }
}

/// Shares a folder. `guestPath` is its name; bit 2 (the value 4) of `flags` lets the guest write.
#[utoipa::path(post, path = "/api/vms/{id}/folders", tag = TAG, params(("id" = String, Path)),
    request_body = FolderObject,
    responses((status = 200, body = FolderObject), (status = 400, body = CodeMessage), (status = 404, body = CodeMessage)))]
async fn folder_add(State(app): State<App>, Path(id): Path<String>, Raw(body): Raw) -> Answer<FolderObject> {
    app.machines.get(&id)?;
    let folder = folder_body(&body)?;
    let same = app.machines.folders(&id)?.into_iter().find(|one| one.name == folder.guest_path);
    // A client that was killed shares it once more.
    if same.is_some_and(|one| shown(&one) != folder) {
        app.machines.remove_folder(&id, &folder.guest_path).await?;
    }
    app.machines.add_folder(&id, meant(&folder)).await?;
    Ok(Json(folder))
}

/// One shared folder, by its name or its place in the list.
#[utoipa::path(get, path = "/api/vms/{id}/folders/{folder_id}", tag = TAG,
    params(("id" = String, Path), ("folder_id" = String, Path)),
    responses((status = 200, body = FolderObject), (status = 404, body = CodeMessage)))]
async fn folder(State(app): State<App>, Path((id, folder)): Path<(String, String)>) -> Answer<FolderObject> {
    Ok(Json(shown(&find_folder(&app, &id, &folder)?)))
}

/// Changes a shared folder.
#[utoipa::path(patch, path = "/api/vms/{id}/folders/{folder_id}", tag = TAG,
    params(("id" = String, Path), ("folder_id" = String, Path)), request_body = FolderObject,
    responses((status = 200, body = FolderObject), (status = 400, body = CodeMessage), (status = 404, body = CodeMessage)))]
async fn folder_update(
    State(app): State<App>,
    Path((id, name)): Path<(String, String)>,
    Raw(body): Raw,
) -> Answer<FolderObject> {
    let old = find_folder(&app, &id, &name)?;
    let folder = folder_body(&body)?;
    if shown(&old) != folder {
        app.machines.remove_folder(&id, &old.name).await?;
        app.machines.add_folder(&id, meant(&folder)).await?;
    }
    Ok(Json(folder))
}

/// Stops sharing a folder.
#[utoipa::path(delete, path = "/api/vms/{id}/folders/{folder_id}", tag = TAG,
    params(("id" = String, Path), ("folder_id" = String, Path)),
    responses((status = 204), (status = 404, body = CodeMessage), (status = 409, body = CodeMessage)))]
async fn folder_delete(
    State(app): State<App>,
    Path((id, name)): Path<(String, String)>,
) -> Result<StatusCode, LegacyRefusal> {
    let folder = find_folder(&app, &id, &name)?;
    app.machines.remove_folder(&id, &folder.name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `VIX_SHAREDFOLDER_WRITE_ACCESS`.
const WRITE_ACCESS: i64 = 4;

fn folder_body(body: &[u8]) -> Result<FolderObject, LegacyRefusal> {
    serde_json::from_slice(body).map_err(|error| {
        LegacyRefusal::new(StatusCode::BAD_REQUEST, format!("The body is not a folder: {error}"))
    })
}

fn find_folder(app: &App, id: &str, name: &str) -> Result<Folder, FolderError> {
    match (app.machines.folder(id, name), name.parse::<usize>()) {
        (Err(unknown @ FolderError::Unknown { .. }), Ok(place)) => {
            app.machines.folders(id)?.into_iter().nth(place).ok_or(unknown)
        }
        (found, _) => found,
    }
}

fn shown(folder: &Folder) -> FolderObject {
    FolderObject {
        guest_path: folder.name.clone(),
        host_path: folder.host_path.clone(),
        flags: if folder.read_only { 0 } else { WRITE_ACCESS },
    }
}

fn meant(folder: &FolderObject) -> CreateFolder {
    CreateFolder {
        name: folder.guest_path.clone(),
        host_path: folder.host_path.clone(),
        read_only: folder.flags & WRITE_ACCESS == 0,
        ..CreateFolder::default()
    }
}

fn ok(message: &str) -> Json<CodeMessage> {
    Json(CodeMessage { code: 200, message: message.to_owned() })
}

/// A word as the clients send it: with blanks or quotes around it, under any content type.
fn bare_word(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let text = text.trim();
    let unquoted = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
    unquoted.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_taken_as_any_client_sends_it() {
        for body in ["on", "on\n", " on ", "\"on\"", "\"on\"\n"] {
            assert_eq!(bare_word(body.as_bytes()), "on");
        }
        assert_eq!(bare_word(b"\""), "\"");
        assert_eq!(bare_word(&[0xff]).parse::<PowerOp>(), Err(()));
    }
}
