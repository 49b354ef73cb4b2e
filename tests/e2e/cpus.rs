//! A VM with several CPUs: all of them work, and it goes down in order.

use catalyst_tests::harness::skip;
use catalyst_tests::world::{HANG, engine, image_dir};
use catalyst_tests::{Checks, World};

use super::common::arguments;

const VM: &str = "web1";
/// Each CPU is kept busy by a process that may run on no other, and all of them finish.
const ALL_BUSY: &str = "n=$(nproc); i=0; while [ $i -lt $n ]; do \
taskset -c $i sh -c 'x=0; while [ $x -lt 20000 ]; do x=$((x + 1)); done; echo done' & i=$((i + 1)); done; wait";
/// Switches a key in the scheduler's code on and off, while other processes keep the scheduler at work.
const CHANGES_CODE: &str = "cd /proc/sys/kernel; for n in 1 2; do while :; do sleep 0.001; done & busy=\"$busy $!\"; done; i=0; \
while [ $i -lt 500 ]; do echo 1 >sched_schedstats; echo 0 >sched_schedstats; i=$((i + 1)); done; kill $busy && echo done";

pub fn cpus(checks: &mut Checks) {
    let world = World::new();
    checks.check("a VM of two CPUs has two, both work, and it shuts down", || {
        world.catalyst(&["vm", "create", VM, "--cpus", "2"]).ok();
        world.catalyst(&["vmpower", "on", VM, "--wait", "--timeout", "280"]).ok();
        assert_eq!(world.catalyst(&["guest", "exec", VM, "--", "nproc"]).ok(), "2");
        assert_eq!(world.catalyst(&["guest", "exec", VM, "--", "sh", "-c", ALL_BUSY]).ok(), "done\ndone");
    });
    checks.check("the kernel changes its code while another CPU runs it", || {
        let ran = world.catalyst(&["guest", "exec", VM, "--timeout", "280", "--", "sh", "-c", CHANGES_CODE]);
        assert_eq!(ran.ok(), "done");
        world.catalyst(&["vmpower", "shutdown", VM]).ok();
        world.wait_for_state(VM, "powered off", HANG);
    });
    checks.check("a guest whose timer Linux has measured wrong starts again", || {
        if engine() == "kvm" {
            skip("guests of engine kvm have a timer that needs no measuring (TSC deadline)");
        }
        let line = kernel_command_line(&world);
        for image in ["lumen", "micro"] {
            // As Linux does that found it far too slow.
            let told = boot(&world, image, &format!("{line} nolapic_timer"));
            assert!(told.contains("starting again"), "{image}: {told}");
        }
    });
}

/// What engine qemu tells a kernel.
fn kernel_command_line(world: &World) -> String {
    world.catalyst(&["vmpower", "on", VM, "--cold"]).ok();
    let arguments = arguments(world.vm_pid(VM).unwrap());
    world.catalyst(&["vmpower", "off", VM]).ok();
    let at = arguments.iter().position(|argument| argument == "-append").unwrap();
    arguments[at + 1].clone()
}

/// Boots an image's kernel and first program without a disk, until it ends or starts again, and gives what they say.
fn boot(world: &World, image: &str, line: &str) -> String {
    let image = image_dir().join(image).join("current");
    let booted = world
        .command("timeout")
        .args([
            "280",
            "qemu-system-x86_64",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args(["-machine", "microvm,acpi=on,pit=off,pic=off,rtc=on,isa-serial=on,x-option-roms=off"])
        .args(["-bios", "qboot.rom"])
        .args(["-accel", "tcg,thread=multi", "-cpu", "max,-la57,-erms,-smap", "-smp", "2", "-m", "256"])
        .args(["-serial", "stdio", "-append", line])
        .arg("-kernel")
        .arg(image.join("vmlinux"))
        .arg("-initrd")
        .arg(image.join("initrd"))
        .output()
        .unwrap();
    format!("{}{}", String::from_utf8_lossy(&booted.stdout), String::from_utf8_lossy(&booted.stderr))
}
