//! What the groups share: a tiny image whose guest halts at once, and how errors must look.

use std::fs;
use std::io::Seek;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub use catalyst_tests::world::wait_until;
use catalyst_tests::world::{HANG, image_dir, programs, ran, run, vm_name};
use catalyst_tests::{Answer, World, skip};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The folder of the source.
pub const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Version of the tiny image.
pub const VERSION: &str = "0123456789ab";
/// The statuses that clients of the original understand (AppCatalyst reference section 1.2).
const LEGACY: [u16; 12] = [400, 401, 403, 404, 405, 406, 408, 409, 415, 500, 503, 504];

/// A world whose image is the tiny one, without a daemon. A VM of it is a real VM process that costs
/// no processor time: what these groups test are processes, not guests.
pub fn quiet() -> World {
    let mut world = World::empty();
    world.images = world.path("images");
    tiny_store(&world.images);
    world
}

/// The same with a daemon.
pub fn running() -> World {
    let mut world = quiet();
    world.start_daemon();
    world
}

/// Makes an image store with one small `lumen`: a whole one, for all that the daemon can see.
pub fn tiny_store(store: &Path) -> PathBuf {
    let folder = store.join("lumen").join(VERSION);
    fs::create_dir_all(&folder).expect("a store");
    fs::write(folder.join("disk.raw"), vec![7_u8; 1 << 20]).expect("a disk");
    fs::write(folder.join("initrd"), vec![9_u8; 4096]).expect("an initrd");
    fs::write(folder.join("vmlinux"), halting_kernel()).expect("a kernel");
    let files: serde_json::Map<String, Value> = ["disk.raw", "initrd", "vmlinux"]
        .into_iter()
        .map(|name| (name.to_owned(), file_entry(&folder.join(name))))
        .collect();
    let manifest = json!({
        "format": 1, "name": "lumen", "version": VERSION, "recipe_key": VERSION, "created": 1_700_000_000,
        "build_command": ["none"], "suite": "bookworm", "sources": [], "kernel": "6.1.0-halt",
        "kernel_package": {"name": "halt", "version": "1"}, "command_line": "quiet",
        "command_line_software_cpu": "mitigations=off", "files": files,
        "packages": [{"name": "halt", "version": "1"}],
    });
    fs::write(folder.join("manifest.json"), manifest.to_string()).expect("a manifest");
    let current = store.join("lumen/current");
    if current.symlink_metadata().is_err() {
        std::os::unix::fs::symlink(VERSION, current).expect("a link");
    }
    folder
}

fn file_entry(path: &Path) -> Value {
    let found = path.metadata().expect("the file is there");
    let digest = Sha256::digest(fs::read(path).expect("the file is there"));
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    json!({"size": found.len(), "allocated": found.blocks() * 512, "sparse": false, "sha256": digest,
        "mtime_ns": found.mtime() * 1_000_000_000 + found.mtime_nsec()})
}

/// An ELF file with a PVH entry (Xen's docs/misc/pvh.pandoc) at 1 MiB, where `cli; hlt; jmp` stands.
fn halting_kernel() -> Vec<u8> {
    const LOAD: u64 = 0x10_0000;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let put16 = |elf: &mut Vec<u8>, values: &[u16]| values.iter().for_each(|v| elf.extend(v.to_le_bytes()));
    let put32 = |elf: &mut Vec<u8>, values: &[u32]| values.iter().for_each(|v| elf.extend(v.to_le_bytes()));
    let put64 = |elf: &mut Vec<u8>, values: &[u64]| values.iter().for_each(|v| elf.extend(v.to_le_bytes()));
    // ET_EXEC, EM_X86_64; entry, program headers right behind, no sections; two program headers.
    put16(&mut elf, &[2, 62]);
    put32(&mut elf, &[1]);
    put64(&mut elf, &[LOAD + 0x100, 64, 0]);
    put32(&mut elf, &[0]);
    put16(&mut elf, &[64, 56, 2, 64, 0, 0]);
    // PT_LOAD of the first 4 KiB, PT_NOTE at 0xc0 in it.
    put32(&mut elf, &[1, 7]);
    put64(&mut elf, &[0, LOAD, LOAD, 0x1000, 0x1000, 0x1000]);
    put32(&mut elf, &[4, 4]);
    put64(&mut elf, &[0xc0, LOAD + 0xc0, LOAD + 0xc0, 20, 20, 4]);
    elf.resize(0xc0, 0);
    // Name of 4 bytes, value of 4, XEN_ELFNOTE_PHYS32_ENTRY.
    put32(&mut elf, &[4, 4, 18]);
    elf.extend(b"Xen\0");
    put32(&mut elf, &[0x10_0100]);
    elf.resize(0x100, 0);
    elf.extend([0xfa, 0xf4, 0xeb, 0xfc]);
    elf.resize(0x1000, 0);
    elf
}

/// The message of an error of `/api`, which must have its form and one of `statuses`.
#[track_caller]
pub fn legacy_error(answer: &Answer, statuses: &[u16]) -> String {
    let body = answer.json();
    assert!(LEGACY.contains(&answer.status) && statuses.contains(&answer.status), "{answer:?}");
    assert_eq!(body["code"], answer.status, "{answer:?}");
    one_line(body["message"].as_str().expect("a message"))
}

/// The message of an error of `/v1`, which must have its form and the word `code`.
#[track_caller]
pub fn v1_error(answer: &Answer, code: &str) -> String {
    let body = answer.json();
    assert!(answer.status >= 400, "{answer:?}");
    assert_eq!(body["code"], code, "{answer:?}");
    let mut message = one_line(body["message"].as_str().expect("a message"));
    for cause in body["causes"].as_array().into_iter().flatten() {
        message = message + ": " + &one_line(cause.as_str().expect("a cause"));
    }
    message
}

#[track_caller]
fn one_line(text: &str) -> String {
    assert!(!text.is_empty() && !text.contains('\n'), "{text:?}");
    for rust in ["panicked", "unwrap", "Err(", "Some(", "Os {"] {
        assert!(!text.contains(rust), "{text:?}");
    }
    text.to_owned()
}

/// The daemon answers, and has not panicked.
#[track_caller]
pub fn healthy(world: &World) {
    assert_eq!(world.curl("GET", "/v1/version", None).status, 200, "the daemon does not answer");
    let log = world.daemon_log();
    assert!(!log.contains("panicked"), "{log}");
}

/// Makes a VM through `/v1`, with the least memory.
#[track_caller]
pub fn create(world: &World, id: &str) {
    let answer = world.curl("POST", "/v1/vms", Some(&json!({"id": id, "memory_mib": 128}).to_string()));
    assert_eq!(answer.status, 201, "{answer:?}");
}

/// Does a power operation through `/v1`, which must succeed.
#[track_caller]
pub fn power(world: &World, id: &str, op: &str) {
    let answer = try_power(world, id, op);
    assert_eq!(answer.status, 200, "{answer:?}");
}

/// Does a power operation through `/v1`.
pub fn try_power(world: &World, id: &str, op: &str) -> Answer {
    world.curl("POST", &format!("/v1/vms/{id}/power"), Some(&json!({ "op": op }).to_string()))
}

/// A VM as `/v1` tells it.
#[track_caller]
pub fn vm(world: &World, id: &str) -> Value {
    let answer = world.curl("GET", &format!("/v1/vms/{id}"), None);
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

/// A VM's state, when it is in none that it only passes through, such as while a new daemon finds its process.
#[track_caller]
pub fn settled(world: &World, id: &str) -> String {
    let state = || vm(world, id)["state"].as_str().expect("a state").to_owned();
    wait_until(&format!("'{id}' is in a state that lasts"), HANG, || !state().ends_with("ing"));
    state()
}

/// The guest's clock is the host's: it is set right after the guest knows who it is, or goes on. On a busy machine that takes a moment.
#[track_caller]
pub fn clock_is_right(world: &World, vm: &str) {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    wait_until(&format!("the clock of '{vm}' is right"), HANG, || {
        let before = now();
        let told: f64 = guest(world, vm, "date +%s.%N").parse().unwrap();
        before - 0.05 < told && told < now() + 0.05
    });
}

/// What `took` is not longer than the limit, in one of several tries at least: others have the processors at times.
#[track_caller]
pub fn within(limit: Duration, mut took: impl FnMut() -> Duration) {
    const TRIES: usize = 5;
    let mut all = Vec::new();
    while all.len() < TRIES {
        all.push(took());
        if all.last().is_some_and(|last| *last < limit) {
            return;
        }
    }
    panic!("never within {limit:?}: {all:?}");
}

/// Whether a process lives: it is there and no zombie.
pub fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// Arguments of a process.
pub fn arguments(pid: u32) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// VM processes in the world's network namespace, by the VM's name.
pub fn vm_processes(world: &World) -> Vec<(u32, String)> {
    let pids = world.command("ip").args(["netns", "pids", world.netns()]).output().expect("ip runs");
    String::from_utf8_lossy(&pids.stdout)
        .lines()
        .filter_map(|line| line.trim().parse().ok())
        .filter(|pid| lives(*pid))
        .filter_map(|pid| Some((pid, vm_name(pid)?)))
        .collect()
}

/// Sends a signal to a process.
#[track_caller]
pub fn signal(pid: u32, signal: nix::sys::signal::Signal) {
    assert!(try_signal(pid, signal), "there is no process {pid} that can be signalled");
}

/// The same to one that may have ended by itself; whether it was there.
pub fn try_signal(pid: u32, signal: nix::sys::signal::Signal) -> bool {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).expect("a pid"));
    nix::sys::signal::kill(pid, signal).is_ok()
}

/// How many taps of VMs there are in the world's network.
pub fn taps(world: &World) -> usize {
    let mut ip = world.command("ip");
    ip.args(["-brief", "link"]);
    ran(ip).ok().matches("cattap").count()
}

/// The archives that the image of this machine was built from.
pub fn sources() -> Vec<String> {
    let Ok(manifest) = fs::read(image_dir().join("lumen/current/manifest.json")) else {
        skip("a Debian is built from the archives that the image was built from: make image")
    };
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    manifest["sources"].as_array().unwrap().iter().map(|line| line.as_str().unwrap().to_owned()).collect()
}

/// A folder that `build` fills once and that is kept outside the tree, by what it is made from.
pub fn kept(name: &str, made_from: &str, build: impl FnOnce(&Path)) -> PathBuf {
    let key: String = Sha256::digest(made_from).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    let cache =
        std::env::var_os("CATALYST_TEST_CACHE").map_or_else(|| "/var/cache/catalyst".into(), PathBuf::from);
    let folder = cache.join(format!("{name}-{key}"));
    if folder.exists() {
        return folder;
    }
    // Another run may be building the same: each builds aside, and the first to be done is taken.
    fs::create_dir_all(&cache).unwrap();
    let aside = tempfile::Builder::new().prefix(&format!("{name}-new-")).tempdir_in(&cache).unwrap();
    let begun = Instant::now();
    build(aside.path());
    println!("    {name} was built in {} s", begun.elapsed().as_secs());
    let aside = aside.keep();
    if fs::rename(&aside, &folder).is_err() {
        let _ = fs::remove_dir_all(&aside);
    }
    folder
}

/// Runs what builds a Debian; where its packages cannot be downloaded, the check cannot run.
#[track_caller]
pub fn debian_built(build: Command) {
    let built = ran(build);
    if built.stderr.contains("Failed to fetch") || built.stderr.contains("Unable to fetch") {
        skip("the packages of a Debian cannot be downloaded");
    }
    built.ok();
}

/// A small file system, until it is dropped.
pub struct Room(PathBuf);

impl Room {
    /// One of this size, as mount(8) takes it.
    pub fn in_memory(at: &Path, size: &str) -> Self {
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size},mode=755"), "none"])
            .arg(at));
        Self(at.to_owned())
    }

    /// On a tmpfs reading a hole takes room too, which a VM that goes on from its file on engine kvm does not survive.
    pub fn on_disk(at: &Path, file: &Path, bytes: u64) -> Self {
        fs::File::create_new(file).unwrap().set_len(bytes).unwrap();
        run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-m", "0", "-O", "^has_journal"]).arg(file));
        run(Command::new("mount").args(["-o", "loop"]).arg(file).arg(at));
        let _ = fs::remove_dir(at.join("lost+found"));
        Self(at.to_owned())
    }

    /// Makes it larger.
    pub fn grow(&self, size: &str) {
        run(Command::new("mount").args(["-o", &format!("remount,size={size}")]).arg(&self.0));
    }

    /// Leaves none of it.
    pub fn fill(&self) {
        let mut ballast = fs::File::create(self.0.join("ballast")).unwrap();
        let left = nix::sys::statvfs::statvfs(&self.0).unwrap();
        let bytes = left.blocks_available() * left.fragment_size();
        // It is quicker than writing; what it leaves is written.
        let most = i64::try_from(bytes - bytes / 16).unwrap();
        let _ = nix::fcntl::fallocate(&ballast, nix::fcntl::FallocateFlags::empty(), 0, most);
        ballast.seek(std::io::SeekFrom::End(0)).unwrap();
        let mut all = std::io::repeat(1);
        assert!(std::io::copy(&mut all, &mut &ballast).is_err(), "it has an end");
    }

    /// Gives back what was filled.
    pub fn make(&self) {
        let _ = fs::remove_file(self.0.join("ballast"));
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // Lazily: what still runs in it when a check has failed is ended by its world.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// What a script in a guest prints, which succeeds.
pub fn guest(world: &World, vm: &str, script: &str) -> String {
    world.catalyst(&["guest", "exec", vm, "--timeout", "280", "--", "sh", "-c", script]).ok().to_owned()
}

/// Builds a Debian package of `make deb` into a folder, and prints its path.
pub fn deb(out: &Path, package: &str) -> Command {
    let mut deb = Command::new(format!("{SOURCE}/packaging/deb"));
    deb.arg(programs()).arg(image_dir()).arg(out).arg(package);
    deb
}
