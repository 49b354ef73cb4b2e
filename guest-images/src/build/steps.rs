//! The steps of a build. Each leaves its result in the build's folder and may run again on its own leftovers.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use super::command::{command, isolated};
use super::{Build, BuildError, io_error, kernel, set_mode};
use crate::digest::sha256_file;
use crate::manifest::{
    DISK_FILE, FileEntry, INITRD_FILE, KERNEL_FILE, MANIFEST_FILE, MANIFEST_FORMAT, Manifest, Package,
};
use crate::modules::lines;
use crate::recipe;
use crate::store::mtime_ns;

/// Size of the root disk: so large that a larger disk is never a reason to leave the template. It is sparse.
const DISK_BYTES: u64 = 64 << 30;
/// Times that the download of packages is tried.
const DOWNLOAD_TRIES: u32 = 3;

/// One step: does its work or says what failed.
type Step = fn(&mut Build<'_>) -> Result<(), BuildError>;

/// All steps, in order.
pub(super) const STEPS: &[(&str, Step)] = &[
    ("packages", packages),
    ("system", system),
    ("containers", containers),
    ("kernel", kernel::kernel),
    ("disk", disk),
    ("manifest", manifest),
    ("micro", micro),
];

/// Installs Debian in `root/`.
fn packages(build: &mut Build<'_>) -> Result<(), BuildError> {
    let root = build.work.join("root");
    for (file, content) in
        [("packages-before.sh", recipe::PACKAGES_BEFORE), ("packages-after.sh", recipe::PACKAGES_AFTER)]
    {
        let path = build.work.join(file);
        fs::write(&path, content).map_err(io_error("write", &path))?;
    }
    let mut tried = 1;
    loop {
        keep_packages(&root, &build.cache)?;
        remove_tree(&root)?;
        match build.command(mmdebstrap(build)) {
            Err(error) if tried < DOWNLOAD_TRIES && is_download_error(&error) => {
                tried += 1;
                build.say(&format!("download failed, attempt {tried} of {DOWNLOAD_TRIES}"), None);
            }
            result => return result,
        }
    }
}

fn mmdebstrap(build: &Build<'_>) -> Command {
    let packages: Vec<_> = lines(recipe::PACKAGES).collect();
    let mut command = isolated(&[], "mmdebstrap");
    command
        .env("CATALYST_CACHE", &build.cache)
        .env("CATALYST_WORK", &build.work)
        .args(["--mode=root", "--variant=apt", "--format=directory", "--architectures=amd64"])
        .arg(format!("--include={}", packages.join(",")))
        .args(["--skip=download/empty", "--skip=essential/unlink", "--skip=cleanup/apt/cache"])
        .args(["--aptopt=Acquire::Languages \"none\"", "--aptopt=APT::Install-Recommends \"false\""])
        .arg("--aptopt=Acquire::Retries \"3\"")
        .arg("--dpkgopt=force-unsafe-io");
    for path in ["doc", "man", "locale", "info", "lintian", "bash-completion"] {
        command.arg(format!("--dpkgopt=path-exclude=/usr/share/{path}/*"));
    }
    // Licences stay where their packages put them.
    command.arg("--dpkgopt=path-include=/usr/share/doc/*/copyright");
    for setting in proxies() {
        command.arg(format!("--aptopt={setting}"));
    }
    command
        .arg("--setup-hook=sh \"$CATALYST_WORK/packages-before.sh\" \"$1\"")
        .arg("--customize-hook=sh \"$CATALYST_WORK/packages-after.sh\" \"$1\"")
        .arg(&build.sources.suite)
        .arg(build.work.join("root"));
    command.args(build.sources.entries.iter().map(|source| source.line(true)));
    command
}

/// The host's apt settings that name a proxy, in the form of apt.conf(5).
fn proxies() -> Vec<String> {
    let Ok(output) = Command::new("apt-config").arg("dump").output() else { return Vec::new() };
    let text = String::from_utf8_lossy(&output.stdout);
    let names = ["Acquire::http::Proxy", "Acquire::https::Proxy"];
    let is_proxy = |line: &&str| names.iter().any(|name| line.starts_with(name)) && !line.contains("\"\"");
    text.lines().filter(is_proxy).map(|line| line.trim_end_matches(';').to_owned()).collect()
}

/// Whether a proxy setting only works on the host itself.
fn is_local(setting: &str) -> bool {
    ["//localhost", "//127.", "//[::1]"].iter().any(|host| setting.contains(host))
}

fn is_download_error(error: &BuildError) -> bool {
    let text = error.to_string();
    ["Failed to fetch", "Unable to fetch", "Hash Sum mismatch", "apt-get update", "apt-get download"]
        .iter()
        .any(|part| text.contains(part))
}

/// Keeps the packages that an interrupted installation in `root` had downloaded.
fn keep_packages(root: &Path, cache: &Path) -> Result<(), BuildError> {
    let Ok(entries) = fs::read_dir(root.join("var/cache/apt/archives")) else { return Ok(()) };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_some_and(|kind| kind == "deb")
            && let Some(name) = path.file_name()
        {
            fs::rename(&path, cache.join(name)).map_err(io_error("keep", &path))?;
        }
    }
    Ok(())
}

/// Puts the recipe's files and the agent in place and runs the script that does the rest.
fn system(build: &mut Build<'_>) -> Result<(), BuildError> {
    let root = build.work.join("root");
    for file in recipe::FILES {
        put(&root.join(file.path), file.content.as_bytes(), 0o644)?;
    }
    put(&root.join("usr/lib/catalyst/catalyst-agent"), &build.agent, 0o755)?;
    let sources: String = build.sources.entries.iter().map(|source| source.line(false) + "\n").collect();
    put(&root.join("etc/apt/sources.list"), sources.as_bytes(), 0o644)?;
    let mut proxy = String::new();
    for setting in proxies().iter().filter(|setting| !is_local(setting)) {
        proxy += setting;
        proxy += ";\n";
    }
    put(&root.join("etc/apt/apt.conf.d/80proxy"), proxy.as_bytes(), 0o644)?;
    let script = build.work.join("configure.sh");
    fs::write(&script, recipe::CONFIGURE).map_err(io_error("write", &script))?;
    let mut shell = command("sh");
    shell.arg(script).arg(root);
    build.command(shell)
}

/// Lets a dockerd in the new system, without a network, take in the container image busybox.
fn containers(build: &mut Build<'_>) -> Result<(), BuildError> {
    let root = build.work.join("root");
    let aside = root.join("build");
    remove_tree(&aside)?;
    put(&aside.join("containers.sh"), recipe::CONTAINERS.as_bytes(), 0o755)?;
    let mut shell = isolated(&["--net"], "sh");
    // runc needs a root that is a mount.
    shell
        .args(["-euc", "mount --bind \"$1\" \"$1\"; cd \"$1\"; mount -t proc proc proc; mount --rbind /dev dev; exec chroot . /bin/sh /build/containers.sh", "sh"])
        .arg(&root);
    build.command(shell)?;
    let docker = root.join("var/lib/docker");
    remove_tree(&docker)?;
    fs::rename(aside.join("docker"), &docker).map_err(io_error("create", &docker))?;
    let profile = root.join("usr/lib/catalyst/docker-default.apparmor");
    fs::rename(aside.join("docker-default.apparmor"), &profile).map_err(io_error("create", &profile))?;
    remove_tree(&aside)
}

/// Makes the root disk out of `root/`.
fn disk(build: &mut Build<'_>) -> Result<(), BuildError> {
    let out = build.work.join("out");
    let disk = out.join(DISK_FILE);
    let _ = fs::remove_file(&disk);
    let file = File::create(&disk).map_err(io_error("create", &disk))?;
    file.set_len(DISK_BYTES).map_err(io_error("enlarge", &disk))?;
    let mut mke2fs = command("mke2fs");
    mke2fs
        .args(["-q", "-F", "-t", "ext4", "-L", recipe::NAME, "-m", "1", "-J", "size=64"])
        // The new file is all zeros: neither mke2fs nor, later, every VM has to write zeros over inode tables.
        .args(["-E", "assume_storage_prezeroed=1,root_owner=0:0", "-d"])
        .arg(build.work.join("root"))
        .arg(&disk);
    build.command(mke2fs)
}

/// Writes the manifest with the digest of every file and puts all on disk.
fn manifest(build: &mut Build<'_>) -> Result<(), BuildError> {
    let out = build.work.join("out");
    let files = entries(build, &out, &[DISK_FILE, KERNEL_FILE, INITRD_FILE])?;
    let mut packages = installed(build)?;
    packages.sort_by(|a, b| a.name.cmp(&b.name));
    let manifest = Manifest { files, packages, ..common(build)? };
    write_manifest(&out, &manifest)
}

/// Makes the image for containers, of the same kernel and the agent.
fn micro(build: &mut Build<'_>) -> Result<(), BuildError> {
    let micro = build.work.join(recipe::MICRO);
    remove_tree(&micro)?;
    fs::create_dir(&micro).map_err(io_error("create", &micro))?;
    let kernel = micro.join(KERNEL_FILE);
    fs::hard_link(build.work.join("out").join(KERNEL_FILE), &kernel).map_err(io_error("create", &kernel))?;
    kernel::micro_initrd(build, &micro.join(INITRD_FILE))?;
    let files = entries(build, &micro, &[KERNEL_FILE, INITRD_FILE])?;
    let manifest = Manifest {
        name: recipe::MICRO.to_owned(),
        command_line: recipe::micro_command_line(),
        command_line_software_cpu: recipe::micro_command_line_software_cpu(),
        diskless: true,
        files,
        ..common(build)?
    };
    write_manifest(&micro, &manifest)
}

fn entries(
    build: &mut Build<'_>,
    folder: &Path,
    names: &[&str],
) -> Result<BTreeMap<String, FileEntry>, BuildError> {
    let mut files = BTreeMap::new();
    for &name in names {
        build.say(&format!("digest of {name}"), None);
        files.insert(name.to_owned(), file_entry(&folder.join(name), name == DISK_FILE)?);
    }
    Ok(files)
}

/// What the manifests of all images of this build have in common; the rest is lumen's, without files.
fn common(build: &Build<'_>) -> Result<Manifest, BuildError> {
    Ok(Manifest {
        made_from: None,
        machine: None,
        diskless: false,
        format: MANIFEST_FORMAT,
        name: recipe::NAME.to_owned(),
        version: build.version.clone(),
        recipe_key: build.key.clone(),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        build_command: build.options.command.clone(),
        suite: build.sources.suite.clone(),
        sources: build.sources.entries.iter().map(|source| source.line(false)).collect(),
        kernel: kernel::release(&build.work)?,
        kernel_hz: kernel::ticks(&build.work)?,
        kernel_package: kernel::package(&build.work)?,
        command_line: recipe::command_line(),
        command_line_software_cpu: recipe::command_line_software_cpu(),
        files: BTreeMap::new(),
        packages: Vec::new(),
    })
}

fn write_manifest(folder: &Path, manifest: &Manifest) -> Result<(), BuildError> {
    let path = folder.join(MANIFEST_FILE);
    let text =
        serde_json::to_vec_pretty(manifest).map_err(io::Error::from).map_err(io_error("write", &path))?;
    put(&path, &text, 0o644)?;
    set_mode(folder, 0o755)
}

fn file_entry(path: &Path, sparse: bool) -> Result<FileEntry, BuildError> {
    set_mode(path, 0o644)?;
    File::open(path).and_then(|file| file.sync_all()).map_err(io_error("sync", path))?;
    let metadata = fs::metadata(path).map_err(io_error("read", path))?;
    Ok(FileEntry {
        size: metadata.len(),
        allocated: metadata.blocks() * 512,
        mtime_ns: mtime_ns(&metadata),
        sha256: sha256_file(path, sparse, |_| ()).map_err(io_error("read", path))?,
        sparse,
    })
}

/// The packages that dpkg knows in `root/`.
fn installed(build: &mut Build<'_>) -> Result<Vec<Package>, BuildError> {
    let mut query = command("dpkg-query");
    query.arg("--admindir").arg(build.work.join("root/var/lib/dpkg")).args([
        "--show",
        "--showformat",
        "${binary:Package} ${Version}\n",
    ]);
    let mut found = Vec::new();
    super::command::run(query, |line| {
        if let Some((name, version)) = line.split_once(' ') {
            found.push(Package { name: name.to_owned(), version: version.to_owned() });
        }
    })
    .map_err(|source| BuildError::Command { step: "manifest", source })?;
    Ok(found)
}

/// Writes a file with its folders.
pub(super) fn put(path: &Path, content: &[u8], mode: u32) -> Result<(), BuildError> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(io_error("create", folder))?;
    }
    fs::write(path, content).map_err(io_error("write", path))?;
    set_mode(path, mode)
}

/// Removes a folder and all in it, if it is there.
pub(super) fn remove_tree(path: &Path) -> Result<(), BuildError> {
    refuse_mounts(path)?;
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Fails if something is mounted below `path`: removing that folder would remove files of the host.
pub(super) fn refuse_mounts(path: &Path) -> Result<(), BuildError> {
    let table = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(table).map_err(io_error("read", table))?;
    match mount_below(&text, path) {
        None => Ok(()),
        Some(mount) => Err(BuildError::Unexpected {
            step: "packages",
            message: format!("{mount} is still mounted: 'umount {mount}', then build again"),
        }),
    }
}

/// A mount at or below `path` in the text of mountinfo (proc(5); the fifth field is the place, with blanks as `\040`).
fn mount_below<'a>(mountinfo: &'a str, path: &Path) -> Option<&'a str> {
    let path = path.to_string_lossy().replace(' ', "\\040");
    mountinfo.lines().filter_map(|line| line.split(' ').nth(4)).find(|place| {
        place.strip_prefix(path.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_inside_the_folder_count() {
        let table = "1 0 8:1 / / rw - ext4 a rw\n2 1 0:5 / /s/root/dev rw - devtmpfs b rw\n3 1 0:5 / /s/my\\040x rw - d b rw\n";
        assert_eq!(mount_below(table, Path::new("/s/root")), Some("/s/root/dev"));
        assert_eq!(mount_below(table, Path::new("/s/roo")), None);
        assert_eq!(mount_below(table, Path::new("/s/my x")), Some("/s/my\\040x"));
    }

    #[test]
    fn a_proxy_on_the_host_itself_stays_out_of_the_image() {
        assert!(is_local("Acquire::http::Proxy \"http://127.0.0.1:3142/\""));
        assert!(!is_local("Acquire::http::Proxy \"http://proxy.example:3128/\""));
    }
}
