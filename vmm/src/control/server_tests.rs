use std::io::{BufRead, BufReader, Read};
use std::sync::mpsc;
use std::time::Duration;

use super::super::protocol::{Cause, RunState};
use super::*;

struct Machine {
    told: mpsc::Sender<String>,
}

impl Commanded for Machine {
    fn command(&mut self, command: Command, _: Option<std::fs::File>) -> Result<Answer, String> {
        match command {
            Command::State => Ok(Answer::State(RunState::Running)),
            Command::Pause => Err("It does not want to".into()),
            _ => Ok(Answer::Done),
        }
    }
    fn attach_console(&mut self, mut stream: UnixStream) -> Result<(), String> {
        stream.write_all(b"login: ").map_err(|error| error.to_string())
    }
    fn can_attach(&mut self) -> Result<(), String> {
        Ok(())
    }
    fn quit(&mut self) {
        self.told.send("quit".into()).unwrap();
    }
}

struct World {
    path: std::path::PathBuf,
    server: Arc<Mutex<Server>>,
    told: mpsc::Receiver<String>,
    _reactor: Reactor,
    _folder: tempfile::TempDir,
}

fn world() -> World {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let (tell, told) = mpsc::channel();
    let reactor = Reactor::spawn("test", || ()).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    let server = Server::start(listener, Box::new(Machine { told: tell }), &reactor).unwrap();
    World { path, server, told, _reactor: reactor, _folder: folder }
}

fn connect(world: &World) -> BufReader<UnixStream> {
    let stream = UnixStream::connect(&world.path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    BufReader::new(stream)
}

fn line(client: &mut BufReader<UnixStream>) -> String {
    let mut line = String::new();
    client.read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

#[test]
fn requests_are_answered_in_order_however_they_are_cut() {
    let world = world();
    let mut client = connect(&world);
    client.get_mut().write_all(b"{\"id\":1,\"command\":\"state\"}\n{\"id\":2,\"comma").unwrap();
    assert_eq!(line(&mut client), r#"{"id":1,"ok":{"state":"running"}}"#);
    client.get_mut().write_all(b"nd\":\"pause\"}\n").unwrap();
    assert_eq!(line(&mut client), r#"{"id":2,"error":"It does not want to"}"#);
}

#[test]
fn quit_is_answered_and_events_are_told_to_all() {
    let world = world();
    let (mut one, mut other) = (connect(&world), connect(&world));
    for client in [&mut one, &mut other] {
        client.get_mut().write_all(b"{\"id\":9,\"command\":\"quit\"}\n").unwrap();
        assert_eq!(line(client), r#"{"id":9,"ok":"done"}"#);
        assert_eq!(world.told.recv_timeout(Duration::from_secs(10)).unwrap(), "quit");
    }
    world.server.lock().unwrap().announce(Event::Exit { cause: Cause::Quit });
    for client in [&mut one, &mut other] {
        assert_eq!(line(client), r#"{"event":"exit","cause":"quit"}"#);
    }
}

#[test]
fn a_connection_can_become_the_console() {
    let world = world();
    let mut client = connect(&world);
    client.get_mut().write_all(b"{\"id\":3,\"command\":\"attach-console\"}\n").unwrap();
    assert_eq!(line(&mut client), r#"{"id":3,"ok":"done"}"#);
    let mut rest = String::new();
    client.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "login: ");
}

#[test]
fn half_a_message_blocks_nobody() {
    let world = world();
    let mut half = connect(&world);
    half.get_mut().write_all(b"{\"id\":1").unwrap();
    let mut client = connect(&world);
    client.get_mut().write_all(b"{\"id\":1,\"command\":\"state\"}\n").unwrap();
    assert!(line(&mut client).contains("running"));
}

#[test]
fn garbage_and_a_gigabyte_without_an_end_are_refused() {
    let world = world();
    for garbage in [&b"nonsense\n"[..], b"{\"id\":1,\"command\":\"state\",\"x\":1}\n", &[0xff, b'\n']] {
        let mut client = connect(&world);
        client.get_mut().write_all(garbage).unwrap();
        assert!(line(&mut client).contains("This is no request"));
        assert_eq!(line(&mut client), "", "the connection is closed");
    }
    let mut client = connect(&world);
    let megabyte = vec![b'x'; 1 << 20];
    let sent = (0..1024).take_while(|_| client.get_mut().write_all(&megabyte).is_ok()).count();
    assert!(sent < 1024, "the connection is closed long before");
}

#[test]
fn clients_are_bounded_and_one_that_does_not_read_is_closed() {
    let world = world();
    let clients: Vec<_> = (0..MAX_CLIENTS).map(|_| connect(&world)).collect();
    let mut late = connect(&world);
    assert_eq!(line(&mut late), "");
    drop(clients);
    let deaf = UnixStream::connect(&world.path).unwrap();
    deaf.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
    let request = b"{\"id\":1,\"command\":\"state\"}\n".repeat(1 << 12);
    let closed = (0..1024).any(|_| (&deaf).write_all(&request).is_err());
    assert!(closed);
}
