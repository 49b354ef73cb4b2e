//! A daemon that was killed leaves a network that serves on, and the next daemon takes it over.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use catalyst_daemon::network::{Network, NetworkConfig};

use crate::namespace::{Host, cannot_run, comes_to};

/// Folder of the network that [`daemon_that_is_killed`] is to bring up.
const FOLDER: &str = "CATALYST_TEST_NETWORK_FOLDER";

/// The daemon of [`a_killed_daemons_network_is_taken_over`], in a process of its own.
#[test]
#[ignore = "a process that another test starts and kills"]
fn daemon_that_is_killed() {
    let Some(folder) = std::env::var_os(FOLDER).map(std::path::PathBuf::from) else { return };
    let config = NetworkConfig { run_dir: folder.join("run"), ..NetworkConfig::new(folder.join("state")) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let network = Network::load(config).await.unwrap();
        let lease = network.lease_for("web1", None).unwrap();
        network.up().await.unwrap();
        println!("READY {} {}", lease.mac, lease.address);
        std::future::pending::<()>().await;
    });
}

/// The command line of that process.
fn daemon_command() -> String {
    let test = std::env::current_exe().unwrap();
    format!("exec {} --ignored --exact restart::daemon_that_is_killed --nocapture", test.display())
}

#[test]
fn a_killed_daemons_network_is_taken_over() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let mut daemon = host
        .namespace
        .command(&daemon_command())
        .env(FOLDER, host.folder())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(daemon.stdout.take().unwrap()).lines();
    let ready = lines.find_map(|line| Some(line.unwrap().split_once("READY ")?.1.to_owned())).unwrap();
    let (mac, address) = ready.split_once(' ').unwrap();
    let wanted = (mac.parse().unwrap(), address.parse().unwrap());
    daemon.kill().unwrap();
    daemon.wait().unwrap();

    host.block_on(|| async {
        let network = Network::load(host.config("state")).await.unwrap();
        let before = network.status().await;
        assert!(before.up && before.dnsmasq_pid.is_some(), "{before:?}");
        let web1 = network.lease_for("web1", Some(wanted)).unwrap();
        assert_eq!((web1.mac, web1.address, &web1.changed), (wanted.0, wanted.1, &None));
        let guest = host.guest(&network, "port1", &web1);
        assert!(host.dhcp(&guest, "").is_some(), "it serves with no daemon at all");
        let web2 = network.lease_for("web2", None).unwrap();
        let began = Instant::now();
        network.up().await.unwrap();
        println!("up of a network that another daemon left: {:?}", began.elapsed());
        let began = Instant::now();
        network.up().await.unwrap();
        println!("up of a network that is up: {:?}", began.elapsed());
        let after = network.status().await;
        assert_eq!(after.dnsmasq_pid, before.dnsmasq_pid, "the same dnsmasq");
        for lease in [&web1, &web2] {
            let name = format!("{}.catalyst", lease.name);
            comes_to(&guest, lease.dns, &name, Some(&lease.address.to_string())).await;
        }
        host.namespace.run("ip link delete port1");
        network.down().await.unwrap();
        assert!(host.namespace.processes().is_empty());
    });
}

#[test]
fn a_daemon_killed_while_it_brings_the_network_up_leaves_nothing_that_the_next_does_not_find() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    let before = host.traces();
    let daemon = daemon_command();
    for milliseconds in (4..60).step_by(4) {
        let mut daemon = host.namespace.command(&daemon).env(FOLDER, host.folder()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(milliseconds));
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        host.block_on(|| async {
            let network = Network::load(host.config("state")).await.unwrap();
            // Both ways on: taken away as it is, or made whole first.
            if milliseconds % 8 == 0 {
                network.up().await.unwrap();
                assert!(network.status().await.up, "killed after {milliseconds} ms");
            }
            network.down().await.unwrap();
            assert_eq!(host.traces(), before, "killed after {milliseconds} ms");
        });
    }
}

#[test]
fn a_dnsmasq_that_died_or_runs_with_another_configuration_is_started_anew() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    host.block_on(|| async {
        let network = Network::load(host.config("state")).await.unwrap();
        network.up().await.unwrap();
        let first = network.status().await;
        let config = first.dnsmasq_log.with_file_name("dnsmasq.conf");
        let text = fs::read_to_string(&config).unwrap();
        fs::write(&config, text.replace("cache-size=1000", "cache-size=10")).unwrap();
        network.up().await.unwrap();
        let second = network.status().await;
        assert_ne!(second.dnsmasq_pid, first.dnsmasq_pid, "an older daemon's configuration");
        assert_eq!(host.namespace.processes().len(), 1);

        host.namespace.run(&format!("kill -9 {}", second.dnsmasq_pid.unwrap()));
        while network.status().await.dnsmasq_pid.is_some() {
            tokio::task::yield_now().await;
        }
        network.up().await.unwrap();
        assert!(network.status().await.up);
        // A pid file that names some other process: it is neither taken for dnsmasq nor ended.
        let mut bystander = host.namespace.command("exec sleep 1000").spawn().unwrap();
        fs::write(config.with_file_name("dnsmasq.pid"), bystander.id().to_string()).unwrap();
        let third = network.status().await;
        assert!(third.up && third.dnsmasq_pid != Some(bystander.id().cast_signed()));
        network.down().await.unwrap();
        assert_eq!(bystander.try_wait().unwrap(), None, "it lives on");
        bystander.kill().unwrap();
        bystander.wait().unwrap();
        assert!(host.namespace.processes().is_empty());
    });
}

#[test]
fn a_log_that_is_full_stops_neither_names_nor_the_finding_of_dnsmasq() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    host.block_on(|| async {
        let network = Network::load(host.config("state")).await.unwrap();
        network.up().await.unwrap();
        let before = network.status().await;
        let log = fs::OpenOptions::new().write(true).open(&before.dnsmasq_log).unwrap();
        log.set_len(8 << 20).unwrap();
        let lease = network.lease_for("web1", None).unwrap();
        let tap = network.open_tap(&lease).await.unwrap();
        let guest = host.guest(&network, "port1", &lease);
        assert!(host.dhcp(&guest, "").is_some());
        comes_to(&guest, lease.dns, "web1.catalyst", Some(&lease.address.to_string())).await;
        assert_eq!(log.metadata().unwrap().len(), 8 << 20, "nothing was added");
        network.up().await.unwrap();
        assert_eq!(network.status().await.dnsmasq_pid, before.dnsmasq_pid);
        drop(tap);
    });
}

#[test]
fn a_watched_dnsmasq_that_is_killed_comes_back_and_one_that_down_ended_does_not() {
    if cannot_run() {
        return;
    }
    let host = Host::new();
    host.block_on(|| async {
        let network = Network::load(host.config("state")).await.unwrap();
        let watching = network.clone();
        let watch = tokio::spawn(async move { watching.keep_serving().await });
        network.up().await.unwrap();
        let first = network.status().await.dnsmasq_pid.unwrap();
        tokio::task::yield_now().await;
        host.namespace.run(&format!("kill -9 {first}"));
        let back = async {
            loop {
                // The watcher pauses for a second.
                tokio::time::sleep(Duration::from_millis(100)).await;
                match network.status().await.dnsmasq_pid {
                    Some(pid) if pid != first => return,
                    _ => {}
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), back).await.unwrap();
        network.down().await.unwrap();
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert!(host.namespace.processes().is_empty());
        assert!(!watch.is_finished());
        watch.abort();
    });
}
