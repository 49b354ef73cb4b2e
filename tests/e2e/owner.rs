//! An unprivileged owner with a daemon of root's.

use catalyst_tests::world::{programs, ran};
use catalyst_tests::{Checks, World};

/// A user that every Debian has (`backup`), and that no service of this machine runs as.
const UID: u32 = 34;

pub fn owner(checks: &mut Checks) {
    let world = World::owned_by(UID);
    checks.check("the demo passes as an unprivileged user", || {
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/demo");
        let mut command = world.command("setpriv");
        let uid = UID.to_string();
        command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "--", demo]).arg(programs());
        command.env("HOME", world.path("home"));
        let ran = ran(command);
        assert!(ran.ok().contains("hello from a container"), "{}{}", ran.stdout, ran.stderr);
        println!("{}", ran.stdout.lines().map(|line| format!("    {line}\n")).collect::<String>());
    });
}
