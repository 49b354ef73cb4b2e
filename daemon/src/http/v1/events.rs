//! Events as server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::response::sse::{self, KeepAlive, Sse};
use catalyst_api::{Event, EventKind};
use futures_util::future::ready;
use futures_util::{Stream, StreamExt, stream};
use serde::Deserialize;
use tokio::sync::broadcast::{Receiver, error::RecvError};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::super::App;
use crate::events::now_ms;

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(events))
}

#[derive(Deserialize)]
struct EventsQuery {
    vm: Option<String>,
    #[serde(default)]
    usage: bool,
}

/// What happens from now on, one JSON object an event.
#[utoipa::path(get, path = "/v1/events", tag = "Daemon",
    params(("vm" = Option<String>, Query, description = "Only events of this VM"),
        ("usage" = Option<bool>, Query, description = "Tell memory and CPU of VMs that are on as well, every two seconds")),
    responses((status = 200, body = Event, content_type = "text/event-stream")))]
async fn events(
    State(app): State<App>,
    Query(query): Query<EventsQuery>,
) -> Sse<impl Stream<Item = Result<sse::Event, Infallible>>> {
    let listener = app.machines.context().events.listen();
    // The first line goes out at once, so that a client knows that it listens before it acts.
    let hello = stream::once(async { Ok(sse::Event::default().comment("listening")) });
    let usage = query.usage.then(|| stream::unfold((app.usage.listen(), query.vm.clone()), next));
    let usage = stream::iter(usage).flatten();
    let events = stream::unfold((listener, query.vm), next);
    // It ends with the events; what VMs take is told beside them.
    let events = stream::select(events.map(Some).chain(stream::iter([None])), usage.map(Some));
    let stream = hello.chain(events.take_while(|event| ready(event.is_some())).filter_map(ready));
    Sse::new(stream).keep_alive(KeepAlive::new().interval(Duration::from_secs(30)))
}

type Listener = (Receiver<Event>, Option<String>);

async fn next((mut listener, vm): Listener) -> Option<(Result<sse::Event, Infallible>, Listener)> {
    loop {
        let event = match listener.recv().await {
            Ok(event) => event,
            Err(RecvError::Lagged(count)) => Event { at_ms: now_ms(), kind: EventKind::Lost { count } },
            Err(RecvError::Closed) => return None,
        };
        if vm.as_deref().is_some_and(|vm| !concerns(&event.kind, vm)) {
            continue;
        }
        // The types of the API always serialize.
        let data = sse::Event::default().json_data(&event).unwrap_or_default();
        return Some((Ok(data), (listener, vm)));
    }
}

fn concerns(kind: &EventKind, vm: &str) -> bool {
    match kind {
        EventKind::VmCreated { id }
        | EventKind::VmDeleted { id }
        | EventKind::VmState { id, .. }
        | EventKind::VmChanged { id }
        | EventKind::VmUsage { id, .. }
        | EventKind::VmGuest { id, .. }
        | EventKind::VmSetUp { id, .. } => id == vm,
        EventKind::Task { .. } => false,
        EventKind::Lost { .. } => true,
    }
}
