//! The page at `/ui` and Swagger UI, used in Chromium by `ui/test/page.mjs`.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use catalyst_tests::{Checks, World, skip};
use serde_json::Value;

use crate::common::healthy;

/// Against hanging, in seconds.
const LIMIT: &str = "900";

/// What the script tells last.
const END: &str = "the end";

/// The group.
pub fn ui(checks: &mut Checks) {
    let script = script();
    let mut world = World::new();
    world.warm();
    let mut command = world.command("timeout");
    command.args(["-k", "5", LIMIT, "node"]).arg(script).env("CATALYST_UI_PARTNER", "1");
    let browser = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("node starts");
    let told = partner(&mut world, browser);
    assert!(!told.is_empty(), "the script told nothing");
    for result in told.iter().filter(|result| result["name"] != END) {
        checks.check(result["name"].as_str().unwrap(), || {
            assert!(result["error"].is_null(), "{}", result["error"].as_str().unwrap_or_default());
        });
    }
    checks.check("all of it was tried, and the daemon is well", || {
        assert!(told.iter().any(|result| result["name"] == END), "it ended early: {told:?}");
        healthy(&world);
    });
}

fn script() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ui");
    if !folder.join("node_modules/playwright-core").exists() {
        skip("playwright-core is not there: make ui-tools");
    }
    for program in ["chromium", "node"] {
        if Command::new(program).arg("--version").stdout(Stdio::null()).status().is_err() {
            skip(format!("{program} is not there: make setup-tests"));
        }
    }
    folder.join("test/page.mjs")
}

/// Does to the daemon what the script asks for, until it ends; what its checks told.
fn partner(world: &mut World, mut browser: Child) -> Vec<Value> {
    let (input, output) = (browser.stdin.take(), browser.stdout.take());
    let (mut input, output) = (input.expect("a pipe"), output.expect("a pipe"));
    let mut told = Vec::new();
    for line in BufReader::new(output).lines().map_while(Result::ok) {
        let line: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        match line["please"].as_str() {
            Some("kill") => world.kill_daemon(),
            Some("start") => world.start_daemon(),
            Some(other) => panic!("it asks for '{other}'"),
            None => {
                told.push(line);
                continue;
            }
        }
        // A script that has ended meanwhile is seen to have.
        let _ = input.write_all(b"done\n");
    }
    browser.wait().expect("node ends");
    told
}
