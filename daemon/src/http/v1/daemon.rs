//! The daemon and its host.

use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use catalyst_api::{ApiError, Doctor, ErrorCode, NetworkInfo, Version};
use serde::Deserialize;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::App;
use super::super::error::{Refusal, chain};
use crate::doctor;

const TAG: &str = "Daemon";

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(version))
        .routes(routes!(doctor_report))
        .routes(routes!(network, network_down))
        .routes(routes!(stop))
}

/// What this daemon is.
#[utoipa::path(get, path = "/v1/version", tag = TAG, responses((status = 200, body = Version)))]
async fn version(State(app): State<App>) -> Json<Version> {
    let context = app.machines.context();
    Json(Version {
        product: "catalyst".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        owner: context.owner.name.clone(),
        state_dir: app.settings.state_dir.display().to_string(),
        vm_dir: context.store.path().display().to_string(),
        image_dir: app.settings.image_dir.display().to_string(),
        engine: context.engines.name(),
    })
}

/// What the host has and lacks, each with its figure and remedy.
#[utoipa::path(get, path = "/v1/doctor", tag = TAG, responses((status = 200, body = Doctor)))]
async fn doctor_report(State(app): State<App>) -> Json<Doctor> {
    Json(doctor::examine(&app.settings, app.machines.context()).await)
}

/// The VM network.
#[utoipa::path(get, path = "/v1/network", tag = TAG, responses((status = 200, body = NetworkInfo)))]
async fn network(State(app): State<App>) -> Json<NetworkInfo> {
    let status = app.machines.context().network.status().await;
    Json(NetworkInfo {
        bridge: status.bridge,
        subnet: status.subnet.to_string(),
        gateway: status.gateway.to_string(),
        up: status.up,
        dnsmasq_pid: status.dnsmasq_pid.map(i32::unsigned_abs),
        leases: status.leases.len(),
    })
}

/// Undoes the VM network; the next power-on brings it up again.
#[utoipa::path(delete, path = "/v1/network", tag = TAG,
    responses((status = 204), (status = 409, body = ApiError)))]
async fn network_down(State(app): State<App>) -> Result<StatusCode, Refusal> {
    let running = app.machines.running();
    if let Some(vm) = running.first() {
        let message = format!("VMs use the network, '{}' for one; power them off first", vm.dir().id());
        return Err(Refusal::new(ErrorCode::InUse, message));
    }
    if app.docker.is_up() {
        let message = "Docker's daemon uses the network; take it down first: catalyst docker down";
        return Err(Refusal::new(ErrorCode::InUse, message));
    }
    app.machines.context().network.down().await.map_err(|error| {
        let message = chain(&error).join(": ");
        Refusal::new(ErrorCode::HostUnfit, message)
    })?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
struct StopQuery {
    #[serde(default)]
    vms: bool,
}

/// Stops the daemon; VMs and Docker's daemon go on running, unless they are to end too. Then guests that do not shut down within
/// 50 s are ended, and the network is taken down.
#[utoipa::path(post, path = "/v1/daemon/stop", tag = TAG,
    params(("vms" = Option<bool>, Query, description = "Shut the guests down first")), responses((status = 202)))]
async fn stop(State(app): State<App>, Query(query): Query<StopQuery>) -> StatusCode {
    if query.vms {
        tokio::spawn(async move {
            if let Err(error) = app.docker.down().await {
                tracing::warn!(reason = chain(&error).join(": "), "Docker's daemon stays");
            }
            app.machines.shut_down().await;
            if let Err(error) = app.machines.context().network.down().await {
                tracing::warn!(reason = chain(&error).join(": "), "the VM network stays");
            }
            app.stop.notify_one();
        });
    } else {
        app.stop.notify_one();
    }
    StatusCode::ACCEPTED
}
