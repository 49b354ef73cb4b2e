//! What the daemon is asked: REST over its Unix socket. One request a connection, in HTTP/1.1 of RFC 9112.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

use crate::failure::{Outcome, Tried, said};
use crate::metadata::Metadata;

/// Longest answer that is read, in bytes.
const LONGEST: u64 = 1 << 20;
/// How long an answer may take: a VM that starts cold on a software CPU is slow.
const LIMIT: Duration = Duration::from_mins(5);
/// How long the daemon may take to delete a VM of itself, when its shim has ended: meanwhile it is not to be deleted again.
const DELETE_LIMIT: Duration = Duration::from_secs(5);

/// The daemon.
#[derive(Clone, Debug)]
pub struct Daemon {
    socket: PathBuf,
}

/// An answer.
#[derive(Debug, PartialEq)]
struct Answer {
    status: u16,
    body: Value,
}

/// The VM that a container is to be.
#[derive(Debug, Serialize)]
pub struct Wanted {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The container.
    pub container: WantedContainer,
}

/// The container in it.
#[derive(Debug, Serialize)]
pub struct WantedContainer {
    /// The shim.
    pub pid: u32,
    /// The container's ID.
    pub id: String,
    /// What its engine knows.
    #[serde(flatten)]
    pub metadata: Metadata,
    /// Its first address.
    pub address: Option<String>,
}

/// Why a VM that is being deleted is off, in the daemon's words.
const BEING_DELETED: &str = "it is being deleted";

/// What has become of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It has a process, as far as the daemon knows.
    Runs,
    /// It has none, and is soon not there any more.
    BeingDeleted,
    /// There is none.
    Deleted,
    /// It has ended otherwise.
    Ended,
}

/// A VM that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vm {
    /// Its ID.
    pub id: String,
    /// The folder of its sockets.
    pub run: PathBuf,
}

impl Daemon {
    /// The daemon at that socket.
    pub fn at(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Makes a VM, with the first of the IDs that is free.
    pub fn create(&self, ids: &[String], wanted: &Wanted) -> Outcome<Vm> {
        let what = || "write down the VM".to_owned();
        let mut body = serde_json::to_value(wanted).map_err(io::Error::from).tried(what)?;
        body["template"] = json!("micro");
        let mut last = None;
        for id in ids {
            body["id"] = json!(id);
            let answer = self.ask("POST", "/v1/vms", Some(&body))?;
            if answer.status == 409 {
                last = Some(answer);
                continue;
            }
            let answer = done(answer, "make a VM")?;
            let path = answer["vmx"].as_str().map(Path::new).and_then(Path::parent);
            let Some(folder) = path.filter(|path| path.is_absolute()) else {
                return said("The Catalyst daemon made a VM and did not tell where it is");
            };
            return Ok(Vm { id: id.clone(), run: folder.join("run") });
        }
        match last {
            Some(answer) => done(answer, "make a VM").and_then(|_| said("No VM was made")),
            None => said("There is no ID that a VM could have"),
        }
    }

    /// Does a power operation.
    pub fn power(&self, id: &str, operation: &str) -> Outcome {
        let answer = self.ask("POST", &format!("/v1/vms/{id}/power"), Some(&json!({"op": operation})))?;
        done(answer, &format!("do '{operation}' to the VM {id}")).map(|_| ())
    }

    /// Deletes a VM; one that is not there is no error. One that is being deleted is waited for.
    pub fn delete(&self, id: &str) -> Outcome {
        let started = Instant::now();
        loop {
            let answer = self.ask("DELETE", &format!("/v1/vms/{id}?force=true"), None)?;
            if answer.status == 404 || answer.status < 300 {
                return Ok(());
            }
            if started.elapsed() > DELETE_LIMIT {
                return done(answer, &format!("delete the VM {id}")).map(|_| ());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What has become of a VM.
    pub fn fate(&self, id: &str) -> Outcome<Fate> {
        let answer = self.ask("GET", &format!("/v1/vms/{id}"), None)?;
        if answer.status == 404 {
            return Ok(Fate::Deleted);
        }
        let vm = done(answer, &format!("tell of the VM {id}"))?;
        Ok(match vm["state"].as_str() {
            Some("powered off") if vm["reason"] != BEING_DELETED => Fate::Ended,
            // Its files go first.
            Some("powered off" | "blocked") => Fate::BeingDeleted,
            _ => Fate::Runs,
        })
    }

    fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Outcome<Answer> {
        let socket = self.socket.display();
        let stream = connect(&self.socket).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => io::Error::new(
                error.kind(),
                format!("{error}; start catalyst-daemon as root, or name its socket by --socket or CATALYST_SOCKET"),
            ),
            _ => error,
        });
        let stream = stream.tried(|| format!("reach the Catalyst daemon at {socket}"))?;
        exchange(&stream, method, path, body).tried(|| format!("speak with the Catalyst daemon at {socket}"))
    }
}

/// A socket's path may be longer than its address (unix(7)).
fn connect(socket: &Path) -> io::Result<UnixStream> {
    let (Some(folder), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(io::ErrorKind::NotFound.into());
    };
    let folder = File::open(if folder.as_os_str().is_empty() { Path::new(".") } else { folder })?;
    UnixStream::connect(Path::new(&format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name))
}

fn exchange(mut stream: &UnixStream, method: &str, path: &str, body: Option<&Value>) -> io::Result<Answer> {
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAccept: application/json\r\n\
         Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    );
    stream.write_all(&[head.as_bytes(), body.as_bytes()].concat())?;
    let mut bytes = Vec::new();
    stream.take(LONGEST).read_to_end(&mut bytes)?;
    parse(&bytes).ok_or_else(|| io::Error::other("its answer is not HTTP"))
}

/// An answer that was read to its end.
fn parse(bytes: &[u8]) -> Option<Answer> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    let mut lines = head.split("\r\n");
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let chunked = lines.filter_map(|line| line.split_once(':')).any(|(name, value)| {
        name.eq_ignore_ascii_case("transfer-encoding") && value.trim().eq_ignore_ascii_case("chunked")
    });
    let body = &bytes[end + 4..];
    let body = if chunked { join_chunks(body)? } else { body.to_vec() };
    // An answer without a body has nothing to say.
    Some(Answer { status, body: serde_json::from_slice(&body).unwrap_or(Value::Null) })
}

/// RFC 9112, section 7.1.
fn join_chunks(mut body: &[u8]) -> Option<Vec<u8>> {
    let mut whole = Vec::new();
    loop {
        let line = body.windows(2).position(|window| window == b"\r\n")?;
        let size = std::str::from_utf8(&body[..line]).ok()?;
        let size = usize::from_str_radix(size.split(';').next()?.trim(), 16).ok()?;
        body = &body[line + 2..];
        if size == 0 {
            return Some(whole);
        }
        whole.extend(body.get(..size)?);
        body = body.get(size.checked_add(2)?..)?;
    }
}

/// The body, or the daemon's words.
fn done(answer: Answer, what: &str) -> Outcome<Value> {
    if (200..300).contains(&answer.status) {
        return Ok(answer.body);
    }
    let mut words = answer.body["message"].as_str().unwrap_or_default().to_owned();
    for cause in answer.body["causes"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        words = words + ": " + cause;
    }
    said(format!("The Catalyst daemon did not {what} ({}): {}", answer.status, words.replace('\n', " ")))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn answers_are_read_whole_or_in_chunks() {
        let plain = b"HTTP/1.1 201 Created\r\nContent-Length: 7\r\n\r\n{\"a\":1}";
        assert_eq!(parse(plain), Some(Answer { status: 201, body: json!({"a": 1}) }));
        let chunked =
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3;x=y\r\n{\"a\r\n4\r\n\":1}\r\n0\r\n\r\n";
        assert_eq!(parse(chunked), Some(Answer { status: 200, body: json!({"a": 1}) }));
        assert_eq!(
            parse(b"HTTP/1.1 204 No Content\r\n\r\n"),
            Some(Answer { status: 204, body: Value::Null })
        );
        for broken in [
            &b"HTTP/1.1 200 OK\r\n"[..],
            b"x\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nx",
        ] {
            assert_eq!(parse(broken), None);
        }
    }

    /// A daemon that gives these answers, one a connection; what it was asked.
    fn played(
        answers: Vec<&'static str>,
    ) -> (Daemon, tempfile::TempDir, std::thread::JoinHandle<Vec<String>>) {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("d.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let serving = std::thread::spawn(move || {
            let serve = |answer: &str| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut bytes = vec![0; 65536];
                let length = stream.read(&mut bytes).unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
                String::from_utf8(bytes[..length].to_vec()).unwrap()
            };
            answers.into_iter().map(serve).collect()
        });
        (Daemon::at(socket), folder, serving)
    }

    fn wanted() -> Wanted {
        let container =
            WantedContainer { pid: 7, id: "abcdef".into(), metadata: Metadata::default(), address: None };
        Wanted { cpus: 1, memory_mib: 128, container }
    }

    #[test]
    fn a_name_that_is_taken_makes_way_for_the_id() {
        let (daemon, _folder, serving) = played(vec![
            "HTTP/1.1 409 Conflict\r\n\r\n{\"message\":\"taken\"}",
            "HTTP/1.1 201 Created\r\n\r\n{\"id\":\"abc\",\"vmx\":\"/s/vms/abc/abc.vmx\"}",
        ]);
        let made = daemon.create(&["web".into(), "abc".into()], &wanted()).unwrap();
        assert_eq!(made, Vm { id: "abc".into(), run: "/s/vms/abc/run".into() });
        let asked = serving.join().unwrap();
        assert!(asked[0].starts_with("POST /v1/vms HTTP/1.1\r\n") && asked[0].contains(r#""id":"web""#));
        assert!(
            asked[1].contains(r#""template":"micro""#) && asked[1].contains(r#""pid":7"#),
            "{}",
            asked[1]
        );
    }

    #[test]
    fn the_daemon_s_words_are_passed_on_and_a_vm_that_is_gone_is_deleted() {
        let (daemon, _folder, serving) = played(vec![
            "HTTP/1.1 503 Busy\r\n\r\n{\"message\":\"no room\",\"causes\":[\"full\"]}",
            "HTTP/1.1 404 Not Found\r\n\r\n{}",
            "HTTP/1.1 200 OK\r\n\r\n{\"state\":\"powered on\"}",
            "HTTP/1.1 200 OK\r\n\r\n{\"state\":\"powered off\",\"reason\":\"it is being deleted\"}",
            "HTTP/1.1 200 OK\r\n\r\n{\"state\":\"blocked\",\"reason\":\"web.vmx is missing\"}",
            "HTTP/1.1 200 OK\r\n\r\n{\"state\":\"powered off\",\"reason\":\"killed by signal 9\"}",
            "HTTP/1.1 404 Not Found\r\n\r\n{}",
        ]);
        let refused = daemon.power("web", "on").unwrap_err().to_string();
        assert!(refused.contains("no room: full") && refused.contains("503"), "{refused}");
        daemon.delete("web").unwrap();
        for fate in [Fate::Runs, Fate::BeingDeleted, Fate::BeingDeleted, Fate::Ended, Fate::Deleted] {
            assert_eq!(daemon.fate("web").unwrap(), fate);
        }
        assert!(serving.join().unwrap()[1].starts_with("DELETE /v1/vms/web?force=true "));
        let nobody = Daemon::at("/nowhere/d.sock".into()).delete("web").unwrap_err();
        assert!(crate::failure::chain(&nobody).contains("catalyst-daemon"));
    }
}
