//! The recipe of lumen and of micro: the files below `lumen/` and `micro/`, carried inside the program so that it needs nothing
//! beside it. Both are made in one build, of one kernel and one agent, and have one key.

use sha2::{Digest, Sha256};

use crate::digest::hex;
use crate::sources::Sources;

/// Changed whenever the builder makes something else out of the same recipe.
pub const BUILDER_FORMAT: u32 = 2;
/// Name of the image.
pub const NAME: &str = "lumen";
/// Name of the image for containers, which has no disk.
pub const MICRO: &str = "micro";
/// Hexadecimal digits of the recipe's key that make a version.
const VERSION_DIGITS: usize = 12;

/// Packages that are installed, one a line.
pub const PACKAGES: &str = include_str!("../lumen/packages.txt");
/// Modules that the initrd loads.
pub const MODULES_INITRD: &str = include_str!("../lumen/modules-initrd.txt");
/// Modules that the image keeps.
pub const MODULES_ROOT: &str = include_str!("../lumen/modules-root.txt");
/// First program of the initrd.
pub const INITRD_INIT: &str = include_str!("../lumen/initrd/init");
/// Hook of mmdebstrap before packages are downloaded.
pub const PACKAGES_BEFORE: &str = include_str!("../lumen/packages-before.sh");
/// Hook of mmdebstrap after packages are installed.
pub const PACKAGES_AFTER: &str = include_str!("../lumen/packages-after.sh");
/// Script that turns a fresh Debian into lumen.
pub const CONFIGURE: &str = include_str!("../lumen/configure.sh");
/// Script that leaves a container image and Docker's AppArmor profile.
pub const CONTAINERS: &str = include_str!("../lumen/containers.sh");
/// Arguments of the kernel, one a line.
const COMMAND_LINE: &str = include_str!("../lumen/cmdline.txt");
/// Arguments of the kernel where the CPU is emulated in software, one a line.
const COMMAND_LINE_SOFTWARE_CPU: &str = include_str!("../lumen/cmdline-software-cpu.txt");

/// Modules that micro's first process loads.
pub const MICRO_MODULES: &str = include_str!("../micro/modules.txt");
/// Arguments of micro's kernel, one a line.
const MICRO_COMMAND_LINE: &str = include_str!("../micro/cmdline.txt");
/// Arguments of micro's kernel where the CPU is emulated in software, one a line.
const MICRO_COMMAND_LINE_SOFTWARE_CPU: &str = include_str!("../micro/cmdline-software-cpu.txt");

/// A file that the image gets as it is.
#[derive(Debug)]
pub struct RecipeFile {
    /// Path below the image's root.
    pub path: &'static str,
    /// Content.
    pub content: &'static str,
}

macro_rules! files {
    ($folder:literal: $($path:literal),* $(,)?) => {
        &[$(RecipeFile { path: $path, content: include_str!(concat!("../", $folder, "/files/", $path)) }),*]
    };
}

/// The files that the image gets as they are.
pub const FILES: &[RecipeFile] = files!["lumen":
    "etc/apt/apt.conf.d/90catalyst",
    "etc/containerd/config.toml",
    "etc/docker/daemon.json",
    "etc/hosts",
    "etc/modules-load.d/catalyst.conf",
    "etc/ssh/sshd_config.d/catalyst.conf",
    "etc/sudoers.d/catalyst",
    "etc/sysctl.d/50-catalyst.conf",
    "etc/systemd/journald.conf.d/catalyst.conf",
    "etc/systemd/system.conf.d/catalyst.conf",
    "etc/systemd/system/apparmor.service",
    "etc/systemd/system/catalyst-agent.service",
    "etc/systemd/system/containerd.service",
    "etc/systemd/system/docker.service",
    "etc/systemd/system/ssh.service",
    "etc/systemd/system/systemd-journald.service.d/catalyst.conf",
    "etc/systemd/system/systemd-udev-trigger.service",
    "etc/systemd/system/systemd-udevd.service",
    "usr/bin/vmhgfs-fuse",
];

/// The files that micro's initial RAM disk gets as they are.
pub const MICRO_FILES: &[RecipeFile] = files!["micro": "etc/group", "etc/passwd"];

/// The kernel's command line that the recipe asks for.
pub fn command_line() -> String {
    joined(COMMAND_LINE)
}

/// What to add to it where the CPU is emulated in software.
pub fn command_line_software_cpu() -> String {
    joined(COMMAND_LINE_SOFTWARE_CPU)
}

/// The command line of micro's kernel.
pub fn micro_command_line() -> String {
    joined(MICRO_COMMAND_LINE)
}

/// What to add to it where the CPU is emulated in software.
pub fn micro_command_line_software_cpu() -> String {
    joined(MICRO_COMMAND_LINE_SOFTWARE_CPU)
}

fn joined(list: &str) -> String {
    crate::modules::lines(list).collect::<Vec<_>>().join(" ")
}

/// SHA-256 over all that an image is made from but the packages themselves: recipe, agent, sources.
pub fn key(agent: &[u8], sources: &Sources) -> String {
    let mut hash = Sha256::new();
    let mut part = |name: &str, content: &[u8]| {
        // Lengths keep one part from passing for another.
        for bytes in [name.as_bytes(), content] {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        }
    };
    part("format", &BUILDER_FORMAT.to_le_bytes());
    for (name, content) in [
        ("packages", PACKAGES),
        ("packages-before", PACKAGES_BEFORE),
        ("packages-after", PACKAGES_AFTER),
        ("modules-initrd", MODULES_INITRD),
        ("modules-root", MODULES_ROOT),
        ("init", INITRD_INIT),
        ("configure", CONFIGURE),
        ("containers", CONTAINERS),
        ("cmdline", COMMAND_LINE),
        ("cmdline-software-cpu", COMMAND_LINE_SOFTWARE_CPU),
        ("micro/modules", MICRO_MODULES),
        ("micro/cmdline", MICRO_COMMAND_LINE),
        ("micro/cmdline-software-cpu", MICRO_COMMAND_LINE_SOFTWARE_CPU),
    ] {
        part(name, content.as_bytes());
    }
    for file in FILES {
        part(file.path, file.content.as_bytes());
    }
    for file in MICRO_FILES {
        part(&format!("micro/{}", file.path), file.content.as_bytes());
    }
    part("agent", agent_key(agent));
    part("suite", sources.suite.as_bytes());
    for source in &sources.entries {
        part("source", source.line(false).as_bytes());
    }
    hex(&hash.finalize())
}

/// What stands for an agent's program: the mark of what it was made from, which is the same wherever it was built; the
/// program itself where it has none.
fn agent_key(agent: &[u8]) -> &[u8] {
    const MARK: &[u8] = b"catalyst-agent-sources:";
    const DIGITS: usize = 16;
    let at = agent.windows(MARK.len()).position(|window| window == MARK).map(|at| at + MARK.len());
    at.and_then(|at| agent.get(at..at + DIGITS)).unwrap_or(agent)
}

/// The version that a recipe's key stands for.
pub fn version(key: &str) -> &str {
    &key[..VERSION_DIGITS.min(key.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(suite: &str) -> Sources {
        Sources { suite: suite.to_owned(), entries: Vec::new() }
    }

    #[test]
    fn agent_and_suite_change_the_key() {
        let key_of = |agent: &[u8], suite| key(agent, &sources(suite));
        let first = key_of(b"agent", "bookworm");
        assert_eq!(first, key_of(b"agent", "bookworm"));
        assert_ne!(first, key_of(b"agent2", "bookworm"));
        assert_ne!(first, key_of(b"agent", "trixie"));
        let marked = key_of(b"here catalyst-agent-sources:0123456789abcdef and more", "bookworm");
        assert_eq!(marked, key_of(b"elsewhere catalyst-agent-sources:0123456789abcdef", "bookworm"));
        assert_ne!(marked, key_of(b"here catalyst-agent-sources:fedcba9876543210 and more", "bookworm"));
        assert_eq!(version(&first).len(), VERSION_DIGITS);
    }

    fn files_below(root: &std::path::Path) -> Vec<String> {
        let mut folders = vec![root.to_owned()];
        let mut found = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    found.push(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned());
                }
            }
        }
        found.sort();
        found
    }

    #[test]
    fn every_file_of_the_recipe_is_carried() {
        let top = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        for (image, files) in [(NAME, FILES), (MICRO, MICRO_FILES)] {
            let carried: Vec<_> = files.iter().map(|file| file.path).collect();
            assert_eq!(carried, files_below(&top.join(image).join("files")));
        }
    }

    #[test]
    fn the_command_line_names_the_root_disk_and_the_console_once() {
        let line = command_line();
        assert_eq!(line.matches("root=/dev/vda").count(), 1);
        assert_eq!(line.matches("console=ttyS0").count(), 1);
        assert!(!line.contains('#') && !line.contains('\n'));
    }

    #[test]
    fn a_container_has_no_root_disk_and_does_not_outlive_its_kernel() {
        let line = micro_command_line();
        assert!(!line.contains("root="), "{line}");
        for word in ["console=ttyS0", "panic=-1", "oops=panic"] {
            assert_eq!(line.split(' ').filter(|one| *one == word).count(), 1, "{word}");
        }
    }
}
