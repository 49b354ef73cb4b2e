//! Figures of containers that are VMs, as a user of Docker's client sees them, and runc's beside.

use std::io::Read;
use std::process::Stdio;
use std::time::Instant;

use crate::docker::Host;

/// Medians are of so many.
const RUNS: usize = 10;
/// Containers that are asked for at once.
const MANY: usize = 10;
/// Seconds that a container may take longer for being a VM, beside twice runc's time.
const EXTRA: f64 = 0.3;

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// `docker run --rm busybox echo hi`, from the client's start to the output and to its own end, in seconds.
fn run_once(host: &Host, runtime: &str) -> (f64, f64) {
    let begun = Instant::now();
    let mut command = host.command(&["run", "--rm", "--runtime", runtime, "busybox", "echo", "hi"]);
    let mut client = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = [0; 3];
    client.stdout.take().unwrap().read_exact(&mut output).expect("it says what it is to say");
    let said = begun.elapsed().as_secs_f64();
    assert!(client.wait().unwrap().success() && &output == b"hi\n");
    (said, begun.elapsed().as_secs_f64())
}

/// From the client's start to the output of `docker run --rm busybox echo hi`, in seconds.
pub fn to_output() -> f64 {
    by_turns().0
}

/// The same without what a VM may take in any case, in times of what runc takes.
pub fn of_runcs_time() -> f64 {
    let (ours, runcs) = by_turns();
    (ours - EXTRA) / runcs
}

/// From the client's start to the output, ours and runc's: medians of runs by turns, which are printed.
fn by_turns() -> (f64, f64) {
    let host = Host::new();
    let mut ours = Vec::new();
    let mut runcs = Vec::new();
    // The first of each has yet to find its files.
    for turn in 0..=RUNS {
        let (one, other) = (run_once(&host, "catalyst"), run_once(&host, "runc"));
        if turn > 0 {
            ours.push(one);
            runcs.push(other);
        }
    }
    let both = |runs: &[(f64, f64)]| {
        (median(runs.iter().map(|run| run.0).collect()), median(runs.iter().map(|run| run.1).collect()))
    };
    let (ours, runcs) = (both(&ours), both(&runcs));
    eprintln!("docker run --rm busybox echo hi, to its output and to the client's end, median of {RUNS}:");
    eprintln!("  catalyst {:.2} s, {:.2} s; runc {:.2} s, {:.2} s", ours.0, ours.1, runcs.0, runcs.1);
    (ours.0, runcs.0)
}

/// Ten `docker run --detach` at once, until all are there, in seconds.
pub fn many() -> f64 {
    let host = Host::new();
    run_once(&host, "catalyst");
    let all_of = |runtime: &str| {
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for number in 0..MANY {
                let name = format!("{runtime}{number}");
                let host = &host;
                scope.spawn(move || host.start(&name, &["--runtime", runtime, "busybox", "sleep", "1000"]));
            }
        });
        let took = begun.elapsed().as_secs_f64();
        let names: Vec<String> = (0..MANY).map(|number| format!("{runtime}{number}")).collect();
        host.remove(&names.iter().map(String::as_str).collect::<Vec<_>>());
        took
    };
    let (ours, runcs) = (all_of("catalyst"), all_of("runc"));
    eprintln!("{MANY} docker run --detach at once: catalyst {ours:.1} s, runc {runcs:.1} s");
    ours
}
