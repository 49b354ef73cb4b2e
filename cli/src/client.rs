//! The daemon's REST API, `/v1/…`, as calls.

use std::io::{self, Read};
use std::net::ToSocketAddrs;
use std::time::Duration;

use catalyst_api::legacy::CodeMessage;
use catalyst_api::{
    Address, ApiError, CloneVm, CreateFolder, CreateSnapshot, CreateTemplate, CreateVm, DockerInfo, Doctor,
    ErrorCode, ExportVm, Folder, ImageInfo, ImportImage, MemoryInfo, NetworkInfo, Port, PortName,
    PowerRequest, PublishPort, RestoreSnapshot, Snapshot, SshInfo, Task, TemplateInfo, UpdateVm, Version, Vm,
    WarmRequest,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use ureq::http::{Method, Response};
use ureq::{Agent, Body, BodyReader};

use crate::error::PlainIo;
use crate::events::Events;
use crate::host::Host;
use crate::names::encode;

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest wait for an answer that needs no guest.
const ANSWER: Duration = Duration::from_mins(1);
/// Longest wait for a change of power: the daemon gives a guest 50 s to shut down, and
/// suspending writes the whole memory.
const POWER: Duration = Duration::from_mins(5);
/// Largest answer that is read whole, in bytes.
const MAX_ANSWER: u64 = 64 << 20;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens, or nobody can be reached.
    #[error("no daemon answers at {host}")]
    NoAnswer {
        /// Where.
        host: Host,
        /// Why.
        source: PlainIo,
    },
    /// The name has no address.
    #[error("no host is named '{0}'")]
    Unknown(String),
    /// Too slow.
    #[error("no answer from {host} within {seconds} s")]
    Slow {
        /// Where.
        host: Host,
        /// How long was waited.
        seconds: u64,
    },
    /// The connection broke.
    #[error("lost the connection to the daemon at {host}")]
    Lost {
        /// Where.
        host: Host,
        /// Why.
        source: PlainIo,
    },
    /// Another program listens there.
    #[error(
        "{host} is served by {program}, not by a Catalyst daemon; stop it, or let a daemon listen \
             elsewhere (catalyst daemon start --listen 127.0.0.1:PORT) and name it by --host"
    )]
    Foreign {
        /// Where.
        host: Host,
        /// What is known of the other program.
        program: String,
    },
    /// The answer is not what it should be.
    #[error(
        "cannot understand the answer of {host} to {request}; daemon and command line may be of \
             different versions (see catalyst version)"
    )]
    Garbled {
        /// Where.
        host: Host,
        /// Method and path.
        request: String,
    },
    /// The daemon serves somebody else: told before it looks at what is asked, in the words of `/api`.
    #[error("the daemon at {host} refuses this user: {reason}")]
    Refused {
        /// Where.
        host: Host,
        /// What it says.
        reason: String,
    },
    /// The daemon said no.
    #[error(transparent)]
    Api(#[from] ApiError),
}

impl ClientError {
    /// Whether the daemon answered with this code.
    pub fn is(&self, code: ErrorCode) -> bool {
        matches!(self, Self::Api(error) if error.code == code)
    }
}

/// How long a call may take.
#[derive(Clone, Copy, Debug)]
enum Patience {
    /// The whole answer within this time.
    Whole(Duration),
    /// Headers soon, the body for as long as it comes.
    Stream,
    /// Headers soon, the body for as long as it comes within this time.
    StreamFor(Duration),
}

impl Patience {
    /// What to call the longest wait for the headers.
    const fn seconds(self) -> u64 {
        match self {
            Self::Whole(limit) | Self::StreamFor(limit) => limit.as_secs(),
            Self::Stream => ANSWER.as_secs(),
        }
    }
}

/// A connection to one daemon.
#[derive(Clone, Debug)]
pub struct Client {
    agent: Agent,
    host: Host,
}

impl Client {
    /// A client of `host`; nothing is sent yet.
    pub fn new(host: Host) -> Self {
        let config = Agent::config_builder()
            // The daemon is on this machine or behind a tunnel: never through http_proxy.
            .proxy(None)
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_connect(Some(CONNECT))
            .user_agent(concat!("catalyst/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { agent: config.into(), host }
    }

    /// Where the daemon is.
    pub const fn host(&self) -> &Host {
        &self.host
    }

    /// `GET /v1/version`. Makes sure that it is Catalyst that listens there, without trusting it to answer well.
    pub fn probe(&self) -> Result<Version, ClientError> {
        let foreign = |server: Option<&str>| ClientError::Foreign {
            host: self.host.clone(),
            program: crate::holder::describe(&self.host, server),
        };
        // The resolver's failures cannot be told from others once they are the HTTP library's.
        if !self.host.is_loopback() && (self.host.name.as_str(), self.host.port).to_socket_addrs().is_err() {
            return Err(ClientError::Unknown(self.host.name.clone()));
        }
        let target = path(&["version"]);
        let mut response = match self.send(&Method::GET, &target, None, Patience::Whole(ANSWER / 6)) {
            Err(ClientError::Garbled { .. }) => return Err(foreign(None)),
            other => other?,
        };
        let header = response.headers().get("server").and_then(|value| value.to_str().ok());
        let server = header.map(ToOwned::to_owned);
        let success = response.status().is_success();
        let text = response.body_mut().with_config().limit(1 << 16).read_to_string().unwrap_or_default();
        if !success && let Some(error) = self.told(text.as_bytes()) {
            return Err(error);
        }
        match serde_json::from_str::<Version>(&text) {
            Ok(version) if success && version.product == "catalyst" => Ok(version),
            _ => Err(foreign(server.as_deref())),
        }
    }

    /// `GET /v1/doctor`.
    pub fn doctor(&self) -> Result<Doctor, ClientError> {
        self.get(&path(&["doctor"]))
    }

    /// `GET /v1/vms`, all or those with a tag.
    pub fn vms(&self, tag: Option<&str>) -> Result<Vec<Vm>, ClientError> {
        let mut target = path(&["vms"]);
        if let Some(tag) = tag {
            target.push_str("?tag=");
            target.push_str(&encode(tag));
        }
        self.get(&target)
    }

    /// `GET /v1/vms/{id}`.
    pub fn vm(&self, id: &str) -> Result<Vm, ClientError> {
        self.get(&path(&["vms", id]))
    }

    /// `POST /v1/templates`.
    pub fn create_template(&self, body: &CreateTemplate) -> Result<Task, ClientError> {
        self.call(&Method::POST, &path(&["templates"]), Some(body), ANSWER)
    }

    /// `DELETE /v1/templates/{name}`.
    pub fn delete_template(&self, name: &str) -> Result<(), ClientError> {
        self.discard(&Method::DELETE, &path(&["templates", name]))
    }

    /// `POST /v1/images/import`.
    pub fn import(&self, body: &ImportImage) -> Result<Task, ClientError> {
        self.call(&Method::POST, &path(&["images", "import"]), Some(body), ANSWER)
    }

    /// `POST /v1/vms/{id}/export`.
    pub fn export(&self, id: &str, body: &ExportVm) -> Result<Task, ClientError> {
        self.call(&Method::POST, &path(&["vms", id, "export"]), Some(body), ANSWER)
    }

    /// `POST /v1/vms`.
    pub fn create(&self, body: &CreateVm) -> Result<Vm, ClientError> {
        self.call(&Method::POST, &path(&["vms"]), Some(body), ANSWER)
    }

    /// `PATCH /v1/vms/{id}`.
    pub fn update(&self, id: &str, body: &UpdateVm) -> Result<Vm, ClientError> {
        self.call(&Method::PATCH, &path(&["vms", id]), Some(body), ANSWER)
    }

    /// `GET /v1/vms/{id}/memory`.
    pub fn memory(&self, id: &str) -> Result<MemoryInfo, ClientError> {
        self.get(&path(&["vms", id, "memory"]))
    }

    /// `POST /v1/vms/{id}/clones`.
    pub fn clone_all(&self, id: &str, request: &CloneVm) -> Result<Vec<Vm>, ClientError> {
        self.call(&Method::POST, &path(&["vms", id, "clones"]), Some(request), POWER)
    }

    /// `GET /v1/vms/{id}/snapshots`.
    pub fn snapshots(&self, id: &str) -> Result<Vec<Snapshot>, ClientError> {
        self.get(&path(&["vms", id, "snapshots"]))
    }

    /// `POST /v1/vms/{id}/snapshots`.
    pub fn create_snapshot(&self, id: &str, body: &CreateSnapshot) -> Result<Snapshot, ClientError> {
        self.call(&Method::POST, &path(&["vms", id, "snapshots"]), Some(body), POWER)
    }

    /// `POST /v1/vms/{id}/snapshots/{name}/restore`.
    pub fn restore_snapshot(&self, id: &str, name: &str, body: RestoreSnapshot) -> Result<Vm, ClientError> {
        let target = path(&["vms", id, "snapshots", name, "restore"]);
        self.call(&Method::POST, &target, Some(&body), POWER)
    }

    /// `DELETE /v1/vms/{id}/snapshots/{name}`.
    pub fn delete_snapshot(&self, id: &str, name: &str) -> Result<(), ClientError> {
        self.discard_within(&Method::DELETE, &path(&["vms", id, "snapshots", name]), POWER)
    }

    /// `GET /v1/vms/{id}/folders`.
    pub fn folders(&self, id: &str) -> Result<Vec<Folder>, ClientError> {
        self.get(&path(&["vms", id, "folders"]))
    }

    /// `POST /v1/vms/{id}/folders`; returns when it is mounted, if the guest is up.
    pub fn add_folder(&self, id: &str, body: &CreateFolder) -> Result<Folder, ClientError> {
        self.call(&Method::POST, &path(&["vms", id, "folders"]), Some(body), POWER)
    }

    /// `DELETE /v1/vms/{id}/folders/{name}`.
    pub fn remove_folder(&self, id: &str, name: &str) -> Result<(), ClientError> {
        self.discard_within(&Method::DELETE, &path(&["vms", id, "folders", name]), POWER)
    }

    /// `GET /v1/vms/{id}/ports`.
    pub fn ports(&self, id: &str) -> Result<Vec<Port>, ClientError> {
        self.get(&path(&["vms", id, "ports"]))
    }

    /// `POST /v1/vms/{id}/ports`.
    pub fn publish(&self, id: &str, body: &PublishPort) -> Result<Port, ClientError> {
        self.call(&Method::POST, &path(&["vms", id, "ports"]), Some(body), ANSWER)
    }

    /// `DELETE /v1/vms/{id}/ports/{port}`.
    pub fn unpublish(&self, id: &str, port: &PortName) -> Result<(), ClientError> {
        self.discard(&Method::DELETE, &path(&["vms", id, "ports", &port.to_string()]))
    }

    /// `DELETE /v1/vms/{id}`.
    pub fn delete(&self, id: &str, force: bool) -> Result<(), ClientError> {
        let query = if force { "?force=true" } else { "" };
        self.discard(&Method::DELETE, &(path(&["vms", id]) + query))
    }

    /// `POST /v1/vms/{id}/power`; returns when the VM is in its end state.
    pub fn power(&self, id: &str, request: PowerRequest) -> Result<Vm, ClientError> {
        self.call(&Method::POST, &path(&["vms", id, "power"]), Some(&request), POWER)
    }

    /// `GET /v1/vms/{id}/address`.
    pub fn address(&self, id: &str) -> Result<Address, ClientError> {
        self.get(&path(&["vms", id, "address"]))
    }

    /// `GET /v1/vms/{id}/ssh`.
    pub fn ssh(&self, id: &str) -> Result<SshInfo, ClientError> {
        self.get(&path(&["vms", id, "ssh"]))
    }

    /// `GET /v1/vms/{id}/console`: what the serial console printed, and what it prints.
    pub fn console_log(&self, id: &str, follow: bool) -> Result<Stream, ClientError> {
        self.stream(&format!("{}?follow={follow}", path(&["vms", id, "console"])), Patience::Stream)
    }

    /// `GET /v1/vms/{id}/log`: the log of the VM's process, and what it logs.
    pub fn engine_log(&self, id: &str, follow: bool) -> Result<Stream, ClientError> {
        self.stream(&format!("{}?follow={follow}", path(&["vms", id, "log"])), Patience::Stream)
    }

    /// `GET /v1/events`, all or those of one VM; the stream breaks off after `limit`.
    pub fn events(&self, vm: Option<&str>, limit: Option<Duration>) -> Result<Events, ClientError> {
        let mut target = path(&["events"]);
        if let Some(vm) = vm {
            target.push_str("?vm=");
            target.push_str(&encode(vm));
        }
        let patience = limit.map_or(Patience::Stream, Patience::StreamFor);
        Ok(Events::new(self.stream(&target, patience)?))
    }

    /// `GET /v1/images`.
    pub fn images(&self) -> Result<Vec<ImageInfo>, ClientError> {
        self.get(&path(&["images"]))
    }

    /// `GET /v1/images/{name}`: all versions.
    pub fn image(&self, name: &str) -> Result<Vec<ImageInfo>, ClientError> {
        self.get(&path(&["images", name]))
    }

    /// `GET /v1/images/{name}/manifest`.
    pub fn manifest(&self, name: &str) -> Result<serde_json::Value, ClientError> {
        self.get(&path(&["images", name, "manifest"]))
    }

    /// `POST /v1/images/{name}/build` or `…/verify`.
    pub fn image_task(&self, name: &str, verb: &str) -> Result<Task, ClientError> {
        self.call::<(), _>(&Method::POST, &path(&["images", name, verb]), None, ANSWER)
    }

    /// `GET /v1/templates`.
    pub fn templates(&self) -> Result<Vec<TemplateInfo>, ClientError> {
        self.get(&path(&["templates"]))
    }

    /// `GET /v1/templates/{name}`.
    pub fn template(&self, name: &str) -> Result<TemplateInfo, ClientError> {
        self.get(&path(&["templates", name]))
    }

    /// `POST /v1/templates/{name}/warm`.
    pub fn warm(&self, name: &str, request: WarmRequest) -> Result<Task, ClientError> {
        self.call(&Method::POST, &path(&["templates", name, "warm"]), Some(&request), ANSWER)
    }

    /// `DELETE /v1/images/{name}`.
    pub fn remove_image(&self, name: &str) -> Result<(), ClientError> {
        self.discard(&Method::DELETE, &path(&["images", name]))
    }

    /// `GET /v1/tasks/{id}`.
    pub fn task(&self, id: u64) -> Result<Task, ClientError> {
        self.get(&path(&["tasks", &id.to_string()]))
    }

    /// `GET /v1/docker`.
    pub fn docker(&self) -> Result<DockerInfo, ClientError> {
        self.get(&path(&["docker"]))
    }

    /// `POST /v1/docker`; returns when it is up.
    pub fn docker_up(&self) -> Result<DockerInfo, ClientError> {
        self.call::<(), _>(&Method::POST, &path(&["docker"]), None, POWER)
    }

    /// `DELETE /v1/docker`; returns when it has ended.
    pub fn docker_down(&self) -> Result<(), ClientError> {
        self.discard_within(&Method::DELETE, &path(&["docker"]), POWER)
    }

    /// `GET /v1/network`.
    pub fn network(&self) -> Result<NetworkInfo, ClientError> {
        self.get(&path(&["network"]))
    }

    /// `DELETE /v1/network`.
    pub fn network_down(&self) -> Result<(), ClientError> {
        self.discard(&Method::DELETE, &path(&["network"]))
    }

    /// `POST /v1/daemon/stop`.
    pub fn stop(&self, vms: bool) -> Result<(), ClientError> {
        let target = path(&["daemon", "stop"]);
        self.discard(&Method::POST, &if vms { target + "?vms=true" } else { target })
    }

    fn get<R: DeserializeOwned>(&self, target: &str) -> Result<R, ClientError> {
        self.call::<(), R>(&Method::GET, target, None, ANSWER)
    }

    fn call<B: Serialize, R: DeserializeOwned>(
        &self,
        method: &Method,
        target: &str,
        body: Option<&B>,
        limit: Duration,
    ) -> Result<R, ClientError> {
        let garbled = || self.garbled(method, target);
        let body = body.map(serde_json::to_vec).transpose().map_err(|_| garbled())?;
        let mut response = self.checked(method, target, body, Patience::Whole(limit))?;
        let data = self.read_whole(&mut response, limit)?;
        serde_json::from_slice(&data).map_err(|_| garbled())
    }

    fn discard(&self, method: &Method, target: &str) -> Result<(), ClientError> {
        self.discard_within(method, target, ANSWER)
    }

    fn discard_within(&self, method: &Method, target: &str, limit: Duration) -> Result<(), ClientError> {
        let mut response = self.checked(method, target, None, Patience::Whole(limit))?;
        self.read_whole(&mut response, limit).map(drop)
    }

    fn stream(&self, target: &str, patience: Patience) -> Result<Stream, ClientError> {
        let response = self.checked(&Method::GET, target, None, patience)?;
        Ok(Stream { reader: response.into_body().into_reader(), host: self.host.clone() })
    }

    /// Sends, and turns every answer that is no success into the error it tells.
    fn checked(
        &self,
        method: &Method,
        target: &str,
        body: Option<Vec<u8>>,
        patience: Patience,
    ) -> Result<Response<Body>, ClientError> {
        let mut response = self.send(method, target, body, patience)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let data = self.read_whole(&mut response, ANSWER)?;
        Err(self.told(&data).unwrap_or_else(|| self.garbled(method, target)))
    }

    /// The error in the body of a reply, if it is one of the daemon's.
    fn told(&self, body: &[u8]) -> Option<ClientError> {
        if let Ok(error) = serde_json::from_slice::<ApiError>(body) {
            return Some(error.into());
        }
        let refusal = serde_json::from_slice::<CodeMessage>(body).ok().filter(|answer| answer.code == 403)?;
        Some(ClientError::Refused { host: self.host.clone(), reason: refusal.message })
    }

    fn send(
        &self,
        method: &Method,
        target: &str,
        body: Option<Vec<u8>>,
        patience: Patience,
    ) -> Result<Response<Body>, ClientError> {
        let uri = format!("{}{target}", self.host.base());
        let builder = ureq::http::Request::builder().method(method).uri(uri);
        let has_body = body.is_some() || matches!(*method, Method::POST | Method::PATCH);
        let result = if has_body {
            let data = body.unwrap_or_default();
            let request = builder.header("content-type", "application/json").body(data);
            request.map_err(ureq::Error::from).and_then(|request| self.run(request, patience))
        } else {
            let request = builder.body(());
            request.map_err(ureq::Error::from).and_then(|request| self.run(request, patience))
        };
        result.map_err(|error| self.failure(error, method, target, patience))
    }

    fn run<B: ureq::AsSendBody>(
        &self,
        request: ureq::http::Request<B>,
        patience: Patience,
    ) -> Result<Response<Body>, ureq::Error> {
        let config = self.agent.configure_request(request);
        let request = match patience {
            Patience::Whole(limit) | Patience::StreamFor(limit) => config.timeout_global(Some(limit)),
            Patience::Stream => config.timeout_recv_response(Some(ANSWER)),
        };
        self.agent.run(request.build())
    }

    fn read_whole(&self, response: &mut Response<Body>, limit: Duration) -> Result<Vec<u8>, ClientError> {
        let body = response.body_mut().with_config().limit(MAX_ANSWER).read_to_vec();
        body.map_err(|error| self.failure(error, &Method::GET, "it", Patience::Whole(limit)))
    }

    fn failure(&self, error: ureq::Error, method: &Method, target: &str, patience: Patience) -> ClientError {
        let host = self.host.clone();
        match error {
            ureq::Error::Timeout(ureq::Timeout::Connect) => {
                ClientError::Slow { host, seconds: CONNECT.as_secs() }
            }
            ureq::Error::Timeout(_) => ClientError::Slow { host, seconds: patience.seconds() },
            ureq::Error::HostNotFound => ClientError::Unknown(host.name),
            ureq::Error::ConnectionFailed => ClientError::NoAnswer {
                host,
                source: PlainIo(io::Error::from(io::ErrorKind::ConnectionRefused)),
            },
            ureq::Error::Io(error) if before_connection(&error) => {
                ClientError::NoAnswer { host, source: PlainIo(error) }
            }
            ureq::Error::Io(error) => ClientError::Lost { host, source: PlainIo(error) },
            _ => self.garbled(method, target),
        }
    }

    fn garbled(&self, method: &Method, target: &str) -> ClientError {
        ClientError::Garbled { host: self.host.clone(), request: format!("{method} {target}") }
    }
}

/// Whether the failure is one of making a connection, so that nothing was sent.
fn before_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::AddrNotAvailable
    )
}

/// A body that comes for as long as it comes.
pub struct Stream {
    reader: BodyReader<'static>,
    host: Host,
}

impl Stream {
    /// The next bytes; 0 at the end.
    pub fn next(&mut self, buffer: &mut [u8]) -> Result<usize, ClientError> {
        self.read(buffer).map_err(|error| self.lost(error))
    }

    /// The error for a stream that broke.
    pub fn lost(&self, error: io::Error) -> ClientError {
        ClientError::Lost { host: self.host.clone(), source: PlainIo(error) }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buffer).map_err(|error| {
            // What is not the kernel's comes wrapped, in words of the HTTP library.
            match error.get_ref().and_then(|inner| inner.downcast_ref::<ureq::Error>()) {
                Some(ureq::Error::Timeout(_)) => io::ErrorKind::TimedOut.into(),
                Some(_) => io::ErrorKind::UnexpectedEof.into(),
                None => error,
            }
        })
    }
}

/// `/v1/` and the segments, each percent-encoded.
pub fn path(segments: &[&str]) -> String {
    let mut path = String::from("/v1");
    for segment in segments {
        path.push('/');
        path.push_str(&encode(segment));
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_encoded_by_segment() {
        assert_eq!(path(&["vms", "a/../b", "power"]), "/v1/vms/a%2F..%2Fb/power");
    }

    #[test]
    fn a_refused_connection_names_the_host_and_the_cause() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let client = Client::new(Host::parse(&format!("127.0.0.1:{port}")).unwrap());
        let error = client.probe().unwrap_err();
        assert!(matches!(error, ClientError::NoAnswer { .. }), "{error:?}");
        assert_eq!(
            crate::error::chain(&error),
            format!("no daemon answers at 127.0.0.1:{port}: connection refused")
        );
    }
}
