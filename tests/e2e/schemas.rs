//! Both descriptions of the API, asked of the daemon by schemathesis: what it sends by them, right and wrong, is answered as they say.

use catalyst_tests::world::{engine, programs, ran};
use catalyst_tests::{Checks, World, skip};

/// Hang limit of one run, in seconds.
const LIMIT: &str = "900";
/// Most requests of an operation in each of its ways of asking.
const EXAMPLES: &str = "8";
const CONFIG: &str = include_str!("schemas/schemathesis.toml");
/// Debian's `news`, who owns nothing: folders of the host are among what is asked for.
const OWNER: u32 = 9;

/// The group.
pub fn schemas(checks: &mut Checks) {
    let mut world = World::owned_by(OWNER);
    world.start_daemon_with(&["--engine", &engine(), "--no-warming"]);
    checks.check("what schemathesis sends by our description is answered as that says", || {
        run(&world, "/v1/openapi.json", &[], "");
    });
    checks.check("what it sends by AppCatalyst's is answered as that says", || {
        run(&world, "/json/swagger.json", &[], "");
    });
    checks.check("of VMs that are there, too", || {
        for vm in ["there", "also"] {
            world.catalyst(&["vm", "create", vm]).ok();
        }
        world.catalyst(&["vmpower", "on", "there"]).ok();
        let of_vms = ["--include-path-regex", "vms.*\\{id\\}", "--phases", "fuzzing"];
        run(&world, "/v1/openapi.json", &of_vms, "[parameters]\n\"path.id\" = \"there\"\n");
        run(&world, "/json/swagger.json", &of_vms, "[parameters]\n\"path.id\" = \"also\"\n");
    });
    checks.check("the daemon is well, and said nothing of a fault of its own", || {
        world.catalyst(&["vm", "list"]).ok();
        let log = world.daemon_log();
        assert!(!log.contains("panicked") && !log.contains("\"internal\""), "{log}");
    });
}

/// Asks by the description at `path`.
fn run(world: &World, path: &str, args: &[&str], more: &str) {
    let library = programs().join("schemathesis");
    if !library.is_dir() {
        skip("schemathesis is not there: make setup-tests");
    }
    let config = world.path("schemathesis.toml");
    std::fs::write(&config, format!("{CONFIG}\n{more}")).unwrap();
    let host = world.host.as_deref().unwrap_or("localhost:8080");
    let mut command = world.command("timeout");
    command.args(["-k", "5", LIMIT, "python3", "-m", "schemathesis.cli", "--config-file"]).arg(&config);
    command.args(["run", "--max-examples", EXAMPLES, "--seed", "1", "--no-color"]).args(args);
    command.arg(format!("http://{host}{path}"));
    command.env("PYTHONPATH", library).current_dir(world.path("."));
    let ran = ran(command);
    let told: Vec<&str> = ran.stdout.lines().filter(|line| line.contains("generated")).collect();
    println!("    {}", told.join(""));
    assert_eq!(ran.code(), 0, "{}{}", ran.stdout, ran.stderr);
}
