//! Ports of guests on the host: published through the CLI and REST, used as any client would.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use catalyst_tests::world::HANG;
use catalyst_tests::{Checks, World};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};

use super::common::{healthy, v1_error, wait_until};

const VM: &str = "web1";
/// A user that every machine has: nobody.
const OWNER: u32 = 65534;
/// Connections that are there at once.
const CONNECTIONS: u16 = 1000;
/// How long a client waits for one answer of a guest on a software CPU.
const PATIENCE: Duration = HANG;
/// What the guest serves: 7001 sends back what comes, 7002 speaks first and then listens, 7003 runs a `cat` for each
/// connection, 7004 answers datagrams in capitals.
const SERVER: &str = r"
use strict; use IO::Socket::INET; use IO::Select;
$SIG{CHLD} = 'IGNORE'; $SIG{PIPE} = 'IGNORE';
my %port;
my $all = IO::Select->new;
for my $number (7001 .. 7003) {
    my $listener = IO::Socket::INET->new(LocalPort => $number, Listen => 4096, ReuseAddr => 1) or die $@;
    $port{$listener} = $number; $all->add($listener);
}
my $udp = IO::Socket::INET->new(LocalPort => 7004, Proto => 'udp') or die $@;
$all->add($udp);
my %first; my %got;
while (1) { for my $one ($all->can_read) {
    if ($one == $udp) { my $from = $udp->recv(my $text, 65536); $udp->send(uc $text, 0, $from) if defined $from; next }
    if (my $number = $port{$one}) {
        my $client = $one->accept or next;
        if ($number == 7003 && fork == 0) { open STDIN, '<&', $client; open STDOUT, '>&', $client; exec 'cat' }
        if ($number == 7003) { close $client; next }
        if ($number == 7002) { syswrite $client, 'hello'; shutdown $client, 1; $first{$client} = 1 }
        $all->add($client); next;
    }
    my $length = sysread $one, my $text, 65536;
    if ($length) { if ($first{$one}) { $got{$one} .= $text } else { syswrite $one, $text } next }
    if (delete $first{$one}) { open my $file, '>', '/run/got'; print $file delete $got{$one}; close $file }
    $all->remove($one); close $one;
} }
";

pub fn ports(checks: &mut Checks) {
    let mut world = World::new();
    world.warm();
    let chosen = made(checks, &world);
    absent(checks, &world, chosen);
    present(checks, &world, chosen);
    through(checks, &world, chosen);
    changed(checks, &world, chosen);
    killed(checks, &mut world);
    taken(checks, &mut world);
    others(checks, &world);
    wrong(checks, &world);
    freed(checks, &world);
    drop(world);
    owned(checks);
}

/// Runs `work` in the world's network.
fn inside<T: Send>(world: &World, work: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(format!("/run/netns/{}", world.netns())).unwrap();
    std::thread::scope(|scope| {
        let there = scope.spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        // What is wrong has been told by the thread that panicked.
        there.join().expect("the work in the world's network failed")
    })
}

fn connect(address: impl Into<SocketAddr>) -> TcpStream {
    let stream = TcpStream::connect_timeout(&address.into(), PATIENCE).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn four(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn six(port: u16) -> SocketAddr {
    (Ipv6Addr::LOCALHOST, port).into()
}

/// What comes back for a word that is sent, until the other end closes.
fn exchange(stream: &mut TcpStream, word: &str) -> std::io::Result<String> {
    stream.write_all(word.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn echoes(world: &World, address: impl Into<SocketAddr>) {
    let address = address.into();
    assert_eq!(inside(world, move || exchange(&mut connect(address), "a word")).unwrap(), "a word");
}

/// The client at `address` is reset, and at once: before a guest is given up that does not answer, which takes 10 s.
fn is_reset(world: &World, address: SocketAddr) {
    inside(world, move || {
        let began = Instant::now();
        let asked = || {
            let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            exchange(&mut stream, "a word")
        };
        let error = asked().unwrap_err();
        // Which of these it is depends on what the client was about to do.
        let told = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe, ErrorKind::NotConnected];
        assert!(told.contains(&error.kind()), "{error}");
        assert!(began.elapsed() < Duration::from_secs(9), "only after {:?}", began.elapsed());
    });
}

fn is_refused(world: &World, address: SocketAddr) {
    let error = inside(world, move || TcpStream::connect_timeout(&address, PATIENCE)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}

fn listed(world: &World, vm: &str) -> Value {
    let answer = world.curl("GET", &format!("/v1/vms/{vm}/ports"), None);
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

fn publish(world: &World, vm: &str, body: &Value) -> catalyst_tests::Answer {
    world.curl("POST", &format!("/v1/vms/{vm}/ports"), Some(&body.to_string()))
}

fn made(checks: &mut Checks, world: &World) -> u16 {
    let mut chosen = 0;
    checks.check("a VM is made with published ports, and gets more of them while it is off", || {
        world.catalyst(&["vm", "create", VM, "--publish", "7011:7001", "--publish", "7014:7004/udp"]).ok();
        chosen = world.catalyst(&["port", "add", VM, "0:7001"]).ok().parse().unwrap();
        assert_ne!(chosen, 0);
        let answer = publish(world, VM, &json!({"host_port": 7012, "guest_port": 7002, "host_address": "127.0.0.1"}));
        assert_eq!(answer.status, 201, "{answer:?}");
        let port = json!({"host_address": "127.0.0.1", "host_port": 7012, "guest_port": 7002, "protocol": "tcp",
            "state": "listening"});
        assert_eq!(answer.json(), port);
        assert_eq!(world.catalyst(&["port", "add", VM, "[::1]:7013:7003/tcp"]).ok(), "7013");
    });
    checks.check("they are listed, and shown with the VM", || {
        let all = listed(world, VM);
        assert_eq!(all.as_array().unwrap().len(), 5, "{all}");
        assert_eq!(world.curl("GET", &format!("/v1/vms/{VM}"), None).json()["ports"], all);
        let table = world.catalyst(&["port", "list", VM]).ok().to_owned();
        for text in ["localhost:7011", "[::1]:7013", "127.0.0.1:7012", "7004/udp", &chosen.to_string()] {
            assert!(table.contains(text), "{text}: {table}");
        }
        assert_eq!(world.catalyst(&["port", "list"]).ok(), table);
        let shown = world.catalyst(&["vm", "show", VM]).ok().to_owned();
        assert!(shown.contains("localhost:7011 to 7001/tcp"), "{shown}");
        let json: Value = serde_json::from_str(world.catalyst(&["port", "list", VM, "--json"]).ok()).unwrap();
        assert_eq!(json, all);
    });
    chosen
}

fn absent(checks: &mut Checks, world: &World, chosen: u16) {
    checks.check("while there is no guest a client is reset at once", || {
        for address in [four(7011), six(7011), four(chosen), four(7012), six(7013)] {
            is_reset(world, address);
        }
        // The other family was not asked for.
        is_refused(world, six(7012));
        is_refused(world, four(7013));
    });
    checks.check("nothing is to be reached from another machine", || {
        let here = world.command("ss").args(["-Hltun"]).output().unwrap();
        let here = String::from_utf8(here.stdout).unwrap();
        let wide = here.lines().filter(|line| line.contains(":70") || line.contains(&format!(":{chosen} ")));
        for line in wide {
            let local = line.split_whitespace().nth(4).unwrap();
            assert!(local.starts_with("127.0.0.1:") || local.starts_with("[::1]:"), "{line}");
        }
    });
}

fn serve(world: &World, vm: &str) {
    let server = SERVER.as_bytes();
    let put =
        world.curl_with(&["-X", "PUT"], &format!("/v1/vms/{vm}/files?path=/run/server.pl"), Some(server));
    assert!(put.status < 300, "{put:?}");
    let start = "ulimit -n 8192; echo 8192 >/proc/sys/net/ipv4/tcp_max_syn_backlog; \
        perl /run/server.pl >/run/server.log 2>&1 </dev/null & \
        until ss -Hlun | grep -q :7004; do sleep 0.1; done";
    world.catalyst(&["guest", "exec", vm, "--", "sh", "-c", start]).ok();
}

fn present(checks: &mut Checks, world: &World, chosen: u16) {
    checks.check("once there is one, it is reached by IPv4 and IPv6", || {
        world.catalyst(&["vmpower", "on", VM]).ok();
        world.catalyst(&["guest", "getip", "--wait", VM]).ok();
        // It is there, and nobody listens in it.
        is_reset(world, four(7011));
        serve(world, VM);
        for address in [four(7011), six(7011), four(chosen), six(chosen)] {
            echoes(world, address);
        }
    });
    checks.check("SSH goes through one that is published while the VM runs", || {
        assert_eq!(world.catalyst(&["port", "add", VM, "2222:22"]).ok(), "2222");
        let banner = inside(world, || {
            let mut banner = [0; 4];
            connect(six(2222)).read_exact(&mut banner).unwrap();
            banner
        });
        assert_eq!(&banner, b"SSH-");
    });
    checks.check("datagrams find the guest and their way back, each client its own", || {
        inside(world, || {
            let clients: Vec<UdpSocket> = (0..50)
                .map(|number| {
                    let (own, port): (SocketAddr, _) =
                        if number % 2 == 0 { (four(0), four(7014)) } else { (six(0), six(7014)) };
                    let client = UdpSocket::bind(own).unwrap();
                    client.connect(port).unwrap();
                    client.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
                    client
                })
                .collect();
            for (number, client) in clients.iter().enumerate() {
                let (word, began) = (format!("query {number}"), Instant::now());
                let mut buffer = [0; 64];
                // As a resolver does: datagrams may be lost.
                let length = loop {
                    client.send(word.as_bytes()).unwrap();
                    match client.recv(&mut buffer) {
                        Ok(length) => break length,
                        Err(error) => assert!(began.elapsed() < PATIENCE, "{error}"),
                    }
                };
                assert_eq!(String::from_utf8_lossy(&buffer[..length]), word.to_uppercase());
            }
        });
    });
}

fn through(checks: &mut Checks, world: &World, chosen: u16) {
    checks.check("a thousand connections are there at once, and none is mixed up with another", || {
        inside(world, || {
            let began = Instant::now();
            let mut all: Vec<TcpStream> = (0..CONNECTIONS)
                .map(|number| if number % 2 == 0 { connect(four(7011)) } else { connect(six(chosen)) })
                .collect();
            for (number, stream) in all.iter_mut().enumerate() {
                stream.write_all(&number.to_le_bytes()).unwrap();
            }
            let mut answer = [0; 8];
            for (number, stream) in all.iter_mut().enumerate() {
                stream.read_exact(&mut answer).unwrap();
                assert_eq!(usize::from_le_bytes(answer), number);
            }
            println!("    {CONNECTIONS} connections answered after {:.1} s", began.elapsed().as_secs_f32());
            // Once more, now that all of them stand.
            for (number, stream) in all.iter_mut().enumerate().rev() {
                assert_eq!(
                    exchange(stream, &format!("at last {number}")).unwrap(),
                    format!("at last {number}")
                );
            }
        });
    });
    checks.check("either side can end its half and hear the other's", || {
        // The client first: all its words came back before, and it hears the end.
        echoes(world, four(7011));
        // The guest first.
        inside(world, || {
            let mut stream = connect(four(7012));
            let mut hello = String::new();
            stream.read_to_string(&mut hello).unwrap();
            assert_eq!(hello, "hello");
            std::thread::sleep(Duration::from_millis(300));
            stream.write_all(b"said after the guest's end").unwrap();
        });
        let got = || world.catalyst(&["guest", "exec", VM, "--", "cat", "/run/got"]).stdout;
        wait_until("the guest hears the rest", HANG, || got() == "said after the guest's end");
    });
    checks.check("a gibibyte goes there and back without a byte wrong", || {
        let began = Instant::now();
        inside(world, || there_and_back(six(7013), 1 << 30));
        println!("    through the port: {:.0} MiB/s each way", 1024.0 / began.elapsed().as_secs_f64());
        let address: Ipv4Addr = world.catalyst(&["guest", "getip", VM]).ok().parse().unwrap();
        let began = Instant::now();
        inside(world, || there_and_back((address, 7003).into(), 128 << 20));
        println!("    straight to the guest: {:.0} MiB/s", 128.0 / began.elapsed().as_secs_f64());
    });
}

/// Sends bytes that never repeat, and reads them back.
fn there_and_back(address: SocketAddr, bytes: u32) {
    const PIECE: u32 = 1 << 16;
    let piece = |number: u32| -> Vec<u8> {
        let word = |at: u32| (u64::from(number * (PIECE / 8) + at)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (0..PIECE / 8).flat_map(|at| word(at).to_le_bytes()).collect()
    };
    let mut reading = connect(address);
    let mut writing = reading.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for number in 0..bytes / PIECE {
                writing.write_all(&piece(number)).unwrap();
            }
            writing.shutdown(Shutdown::Write).unwrap();
        });
        let mut buffer = vec![0; PIECE as usize];
        for number in 0..bytes / PIECE {
            reading.read_exact(&mut buffer).unwrap();
            assert!(buffer == piece(number), "piece {number} is another");
        }
        assert_eq!(reading.read(&mut buffer).unwrap(), 0);
    });
}

fn changed(checks: &mut Checks, world: &World, chosen: u16) {
    let removed = chosen.to_string();
    checks.check("a port that is removed is free at once, and what went through it is reset", || {
        let mut open = inside(world, move || connect(four(chosen)));
        world.catalyst(&["port", "remove", VM, &removed]).ok();
        let mut byte = [0];
        assert_eq!(open.read(&mut byte).unwrap_err().kind(), ErrorKind::ConnectionReset);
        inside(world, move || TcpListener::bind(four(chosen)).unwrap());
        let error = world.catalyst(&["port", "remove", VM, &removed]).error(1).to_owned();
        assert!(error.contains(&removed) && error.contains("catalyst port list"), "{error}");
    });
    checks.check(
        "a connection that nobody uses meanwhile outlives a suspend, and ports change during it",
        || {
            let mut open = inside(world, || connect(four(7011)));
            let mut word = [0; 3];
            for text in [b"one", b"two"] {
                open.write_all(text).unwrap();
                open.read_exact(&mut word).unwrap();
                assert_eq!(&word, text);
                if text == b"one" {
                    world.catalyst(&["vmpower", "suspend", VM]).ok();
                    is_reset(world, four(7011));
                    world.catalyst(&["port", "add", VM, "7021:7001"]).ok();
                    world.catalyst(&["port", "remove", VM, "2222/tcp"]).ok();
                    world.catalyst(&["vmpower", "on", VM]).ok();
                    world.catalyst(&["guest", "exec", VM, "--", "true"]).ok();
                }
            }
            echoes(world, six(7021));
            is_refused(world, four(2222));
        },
    );
    checks.check("the guest reaches nothing of the host by them", || {
        let reach = "gateway=$(ip -4 route show default | cut -d' ' -f3); \
            for port in 7011 7012 8080; do timeout 5 bash -c \"</dev/tcp/$gateway/$port\" 2>/dev/null && echo reached; done; true";
        assert_eq!(world.catalyst(&["guest", "exec", VM, "--", "bash", "-c", reach]).ok(), "");
        echoes(world, four(7011));
    });
    checks.check("another address than loopback is there where it is said", || {
        world.catalyst(&["port", "add", VM, "0.0.0.0:7031:7001"]).ok();
        let bridge = world.curl("GET", "/v1/network", None).json()["gateway"].as_str().map(str::to_owned);
        let bridge: Ipv4Addr = bridge.unwrap().parse().unwrap();
        echoes(world, (bridge, 7031));
        is_refused(world, six(7031));
        world.catalyst(&["port", "remove", VM, "0.0.0.0:7031"]).ok();
    });
}

fn killed(checks: &mut Checks, world: &mut World) {
    checks.check("a killed daemon's connections are reset, and the next one has its ports", || {
        let before = listed(world, VM);
        let mut open = inside(world, || connect(four(7011)));
        open.write_all(b"x").unwrap();
        let mut byte = [0];
        open.read_exact(&mut byte).unwrap();
        world.kill_daemon();
        assert_eq!(open.read(&mut byte).unwrap_err().kind(), ErrorKind::ConnectionReset);
        is_refused(world, four(7011));
        world.start_daemon();
        // Late, it would cut what goes through.
        world.wait_for_state(VM, "powered on", HANG);
        assert_eq!(listed(world, VM), before);
        for address in [four(7011), six(7011), six(7021)] {
            echoes(world, address);
        }
    });
    checks.check("a client that rewrites the VM's file, sorted and in lower case, loses none", || {
        let before = listed(world, VM);
        let path = world.vm_dir(VM).join(format!("{VM}.vmx"));
        let text = std::fs::read_to_string(&path).unwrap();
        let mut lines: Vec<String> =
            text.lines().filter(|line| line.contains(" = ")).map(str::to_lowercase).collect();
        lines.sort();
        std::fs::write(&path, lines.join("\n") + "\n").unwrap();
        world.kill_daemon();
        world.start_daemon();
        world.wait_for_state(VM, "powered on", HANG);
        assert_eq!(listed(world, VM), before);
    });
}

fn taken(checks: &mut Checks, world: &mut World) {
    let own = format!("pid {}", std::process::id());
    checks.check("a port that is taken is refused, and its owner named", || {
        let (held, heard) =
            inside(world, || (TcpListener::bind(six(7041)).unwrap(), UdpSocket::bind(four(7042)).unwrap()));
        let answer = publish(world, VM, &json!({"host_port": 7041, "guest_port": 7001}));
        assert_eq!(answer.status, 409, "{answer:?}");
        assert!(v1_error(&answer, "port_taken").contains(&own), "{answer:?}");
        assert!(world.catalyst(&["port", "add", VM, "7041:7001"]).error(1).contains(&own));
        let error = world.catalyst(&["port", "add", VM, "7042:7004/udp"]).error(1).to_owned();
        assert!(error.contains("taken by"), "{error}");
        let error = world.catalyst(&["port", "add", VM, "8080:7001"]).error(1).to_owned();
        assert!(error.contains("this daemon"), "{error}");
        world.catalyst(&["vm", "create", "other"]).ok();
        let answer = publish(world, "other", &json!({"host_port": 7011, "guest_port": 80}));
        assert_eq!(answer.status, 409);
        assert!(v1_error(&answer, "port_taken").contains("VM 'web1'"), "{answer:?}");
        let answer = world.curl(
            "POST",
            "/v1/vms",
            Some(r#"{"id":"none","publish":[{"host_port":7011,"guest_port":80}]}"#),
        );
        assert_eq!(answer.status, 409, "{answer:?}");
        assert_eq!(world.curl("GET", "/v1/vms/none", None).status, 404);
        drop((held, heard));
        world.catalyst(&["port", "add", VM, "7041:7001"]).ok();
        echoes(world, four(7041));
    });
    checks.check(
        "one that a program took while no daemon ran is not lost, but waits and says for whom",
        || {
            world.kill_daemon();
            let held = inside(world, || TcpListener::bind(four(7041)).unwrap());
            world.start_daemon();
            world.wait_for_state(VM, "powered on", HANG);
            let waits = |all: Value| {
                all.as_array().unwrap().iter().find(|port| port["host_port"] == 7041).unwrap().clone()
            };
            let port = waits(listed(world, VM));
            assert_eq!(port["state"], "waiting", "{port}");
            assert!(port["reason"].as_str().unwrap().contains(&own), "{port}");
            assert!(world.catalyst(&["port", "list", VM]).ok().contains(&own));
            let told = world.daemon_log();
            assert!(
                told.lines()
                    .any(|line| line.contains("7041") && line.contains("WARN") && line.contains(&own)),
                "{told}"
            );
            drop(held);
            assert_eq!(waits(listed(world, VM))["state"], "listening");
            echoes(world, four(7041));
        },
    );
}

fn others(checks: &mut Checks, world: &World) {
    checks.check("a clone has none of its source's ports, and its own where it asks for them", || {
        world.catalyst(&["vm", "clone", VM, "copy"]).ok();
        assert_eq!(listed(world, "copy"), json!([]));
        echoes(world, four(7011));
        let body = json!({"id": "copy2", "parent": VM, "publish": [{"host_port": 7051, "guest_port": 7001}]});
        let answer = world.curl("POST", "/v1/vms", Some(&body.to_string()));
        assert_eq!(answer.status, 201, "{answer:?}");
        world.catalyst(&["guest", "getip", "--wait", "copy2"]).ok();
        echoes(world, four(7051));
        world.catalyst(&["vm", "clone", "other", "copy3"]).ok();
        world.catalyst(&["vm", "delete", "--force", "copy", "copy2", "copy3"]).ok();
        is_refused(world, four(7051));
    });
    checks.check("of two who want one port at once, one gets it", || {
        let body = json!({"host_port": 7061, "guest_port": 80});
        let answers: Vec<u16> = std::thread::scope(|scope| {
            let asking: Vec<_> = [VM, "other"]
                .into_iter()
                .cycle()
                .take(8)
                .map(|vm| scope.spawn(|| publish(world, vm, &body).status))
                .collect();
            asking.into_iter().map(|asked| asked.join().unwrap()).collect()
        });
        assert_eq!(answers.iter().filter(|status| **status == 201).count(), 1, "{answers:?}");
        assert_eq!(answers.iter().filter(|status| **status == 409).count(), 7, "{answers:?}");
    });
}

fn wrong(checks: &mut Checks, world: &World) {
    checks.check("wrong ports are refused in one line that says what is right", || {
        for port in
            ["80", "http:80", "8000-8010:80", "70000:80", "80:0", "1:2/sctp", "host:80:80", "::1:80:80", ""]
        {
            world.catalyst(&["port", "add", VM, port]).error(2);
        }
        for port in ["http", "80-90", "1:2:3", "70000", "80/sctp"] {
            world.catalyst(&["port", "remove", VM, port]).error(2);
        }
        world.catalyst(&["vm", "create", "bad", "--publish", "8000-8010:80"]).error(2);
        for body in [
            json!({"host_port": 70000, "guest_port": 80}),
            json!({"host_port": -1, "guest_port": 80}),
            json!({"host_port": "8000", "guest_port": 80}),
            json!({"host_port": 8000}),
            json!({"host_port": 8000, "guest_port": 0}),
            json!({"host_port": 8000, "guest_port": 80, "protocol": "sctp"}),
            json!({"host_port": 8000, "guest_port": 80, "colour": "red"}),
            json!({"host_port": 8000, "guest_port": 80, "host_address": "example.org"}),
            json!({"host_port": 8000, "guest_port": 80, "host_address": "224.0.0.1"}),
            json!({"host_port": 8000, "guest_port": 80, "host_address": "192.0.2.1"}),
            json!([]),
        ] {
            let answer = publish(world, VM, &body);
            assert_eq!(answer.status, 400, "{body}: {answer:?}");
            v1_error(&answer, "invalid_request");
        }
        is_refused(world, four(8000));
    });
    checks.check("unknown VMs and ports are named as such", || {
        for (method, path) in [("GET", "/v1/vms/none/ports"), ("DELETE", "/v1/vms/none/ports/80")] {
            v1_error(&world.curl(method, path, None), "vm_not_found");
        }
        v1_error(&publish(world, "none", &json!({"host_port": 8000, "guest_port": 80})), "vm_not_found");
        world.catalyst(&["port", "add", "none", "8000:80"]).error(1);
        for port in ["8000", "7011-udp", "127.0.0.2:7011"] {
            let answer = world.curl("DELETE", &format!("/v1/vms/{VM}/ports/{port}"), None);
            assert_eq!(answer.status, 404);
            v1_error(&answer, "port_not_found");
        }
        v1_error(&world.curl("DELETE", &format!("/v1/vms/{VM}/ports/http"), None), "invalid_request");
    });
    checks.check("a VM has no more of them than are possible, and all go with it", || {
        world.catalyst(&["vm", "create", "full"]).ok();
        let ask = json!({"host_port": 0, "guest_port": 80});
        let statuses: Vec<u16> = (0..129).map(|_| publish(world, "full", &ask).status).collect();
        assert!(statuses[..128].iter().all(|status| *status == 201), "{statuses:?}");
        assert_eq!(statuses[128], 400);
        world.catalyst(&["vm", "delete", "full"]).ok();
        healthy(world);
    });
    checks.check("they are described", || {
        let paths = world.curl("GET", "/v1/openapi.json", None).json()["paths"].clone();
        for path in ["/v1/vms/{id}/ports", "/v1/vms/{id}/ports/{port}"] {
            assert!(paths.get(path).is_some(), "{path}");
        }
    });
}

fn freed(checks: &mut Checks, world: &World) {
    checks.check(
        "when a VM is off its connections are reset, and when it is deleted its ports are free",
        || {
            let mut open = inside(world, || connect(four(7011)));
            open.write_all(b"x").unwrap();
            let mut byte = [0];
            open.read_exact(&mut byte).unwrap();
            world.catalyst(&["vmpower", "off", VM]).ok();
            assert_eq!(open.read(&mut byte).unwrap_err().kind(), ErrorKind::ConnectionReset);
            is_reset(world, four(7011));
            world.catalyst(&["vm", "delete", VM]).ok();
            inside(world, || TcpListener::bind(four(7011)).unwrap());
            is_refused(world, six(7021));
            healthy(world);
        },
    );
}

fn owned(checks: &mut Checks) {
    let world = World::owned_by(OWNER);
    checks.check(
        "an owner who is not root gets no port of root's, but hears who has one, and serves every user",
        || {
            world.catalyst(&["vm", "create", VM]).ok();
            let error = world.catalyst(&["port", "add", VM, "80:80"]).error(1).to_owned();
            assert!(error.contains("ip_unprivileged_port_start"), "{error}");
            // Nor by writing it into the file, which is the owner's.
            let path = world.vm_dir(VM).join(format!("{VM}.vmx"));
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, text + "catalyst.ports = \"80:80/tcp\"\n").unwrap();
            world.catalyst(&["vmpower", "on", VM]).ok();
            assert_eq!(listed(&world, VM)[0]["state"], "waiting");
            is_refused(&world, four(80));
            let _held = inside(&world, || TcpListener::bind(four(8001)).unwrap());
            let error = world.catalyst(&["port", "add", VM, "8001:80"]).error(1).to_owned();
            assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
            world.catalyst(&["port", "add", VM, "2222:22"]).ok();
            world.catalyst(&["vmpower", "on", "--wait", VM]).ok();
            let mut stranger = world.command("setpriv");
            stranger.args(["--reuid", "4242", "--regid", "4242", "--clear-groups", "--", "bash", "-c"]);
            stranger.arg("read -r -n 4 banner </dev/tcp/127.0.0.1/2222; echo $banner");
            assert_eq!(catalyst_tests::world::ran(stranger).ok(), "SSH-");
            world.catalyst(&["vm", "delete", "--force", VM]).ok();
        },
    );
}
