//! How long the daemon takes to answer reads while it starts VMs.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};

use crate::World;

const LENGTH: Duration = Duration::from_mins(1);
const PER_SECOND: u32 = 200;
const CLIENTS: u32 = 4;
/// What is read, one after another.
const PATHS: [&str; 10] = [
    "/v1/vms",
    "/v1/vms/web1",
    "/api/vms",
    "/api/vms/web1",
    "/api/vms/power/web1",
    "/v1/vms/web1/ports",
    "/v1/vms/web1/snapshots",
    "/v1/templates",
    "/v1/images",
    "/v1/version",
];

/// The 99th percentile, in ms, of 200 reads a second for a minute while VMs are made, started and deleted. Each time counts from
/// when the request was due, so that what waits behind a slow one is seen as slow as well.
///
/// # Panics
/// If a read fails.
pub fn reads() -> f64 {
    let world = World::new();
    world.warm();
    world.catalyst(&["vm", "create", "web1"]).ok();
    let ended = AtomicBool::new(false);
    let mut times: Vec<f64> = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut started = 0;
            while !ended.load(Ordering::Relaxed) {
                world.catalyst(&["vm", "create", "web2"]).ok();
                world.catalyst(&["vmpower", "on", "web2", "--wait"]).ok();
                world.catalyst(&["vm", "delete", "web2", "--force"]).ok();
                started += 1;
            }
            eprintln!("VMs started meanwhile: {started}");
        });
        let clients: Vec<_> = (0..CLIENTS)
            .map(|n| {
                scope.spawn({
                    let world = &world;
                    move || client(world, n)
                })
            })
            .collect();
        let times = clients.into_iter().flat_map(|client| client.join().unwrap()).collect();
        ended.store(true, Ordering::Relaxed);
        times
    });
    times.sort_by(f64::total_cmp);
    let at = |part: usize| times[times.len() * part / 1000];
    eprintln!(
        "{} reads, ms: median {:.2}, p90 {:.2}, p99 {:.2}, worst {:.2}",
        times.len(),
        at(500),
        at(900),
        at(990),
        at(999)
    );
    at(990)
}

/// One client's times, in ms.
fn client(world: &World, number: u32) -> Vec<f64> {
    // This thread alone.
    let netns = File::open(Path::new("/run/netns").join(world.netns())).unwrap();
    setns(netns, CloneFlags::CLONE_NEWNET).unwrap();
    let stream = TcpStream::connect("127.0.0.1:8080").unwrap();
    stream.set_nodelay(true).unwrap();
    let mut stream = BufReader::new(stream);
    let apart = Duration::from_secs(1) * CLIENTS / PER_SECOND;
    let begun = Instant::now() + apart * number / CLIENTS;
    let mut times = Vec::new();
    for path in PATHS.iter().cycle() {
        let due = begun + apart * u32::try_from(times.len()).unwrap();
        if due - begun >= LENGTH {
            return times;
        }
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        read(&mut stream, path);
        times.push(due.elapsed().as_secs_f64() * 1000.0);
    }
    times
}

fn read(stream: &mut BufReader<TcpStream>, path: &str) {
    write!(stream.get_mut(), "GET {path} HTTP/1.1\r\nHost: localhost:8080\r\n\r\n").unwrap();
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    assert!(line.starts_with("HTTP/1.1 200"), "{path}: {line}");
    let mut length = 0;
    while line != "\r\n" {
        line.clear();
        stream.read_line(&mut line).unwrap();
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    stream.read_exact(&mut vec![0; length]).unwrap();
}
