//! Which modules a kernel has, and what it takes to load them (kmod's modules.dep(5) and modules.builtin).

use std::collections::{BTreeMap, BTreeSet};

/// What a kernel has of a driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Driver {
    /// It is part of the kernel.
    BuiltIn,
    /// It is a module: the files below the folder of modules, in the order in which they are loaded.
    Module(Vec<String>),
    /// Nothing.
    Missing,
}

/// What a kernel's folder of modules says of them.
#[derive(Debug, Default)]
pub struct Modules {
    built_in: BTreeSet<String>,
    /// Of each module its file, and those that it needs.
    files: BTreeMap<String, (String, Vec<String>)>,
}

impl Modules {
    /// From the texts `modules.builtin` and `modules.dep`.
    pub fn parse(built_in: &str, dependencies: &str) -> Self {
        let files = dependencies.lines().filter_map(|line| {
            let (file, needs) = line.split_once(':')?;
            let needs = needs.split_whitespace().map(str::to_owned).collect();
            Some((name(file), (file.to_owned(), needs)))
        });
        Self { built_in: built_in.lines().map(name).collect(), files: files.collect() }
    }

    /// From the text of a kernel's configuration, where its modules cannot be seen; a driver that is a module is missing
    /// then, but for those in `later`, which nothing needs before the root file system is there.
    pub fn of_config(config: &str, later: &[&str]) -> Self {
        let mut modules = Self::default();
        for line in config.lines() {
            let Some((key, value)) = line.split_once('=') else { continue };
            let Some(driver) = key.strip_prefix("CONFIG_").map(str::to_ascii_lowercase) else { continue };
            if value == "y" || (value == "m" && later.contains(&driver.as_str())) {
                modules.built_in.insert(driver);
            }
        }
        modules
    }

    /// What there is of a driver. A file that leads out of the folder of modules is none.
    pub fn driver(&self, driver: &str) -> Driver {
        if self.built_in.contains(driver) {
            return Driver::BuiltIn;
        }
        let Some((file, needs)) = self.files.get(driver) else { return Driver::Missing };
        // What a module needs stands behind it, and what that needs behind that.
        let files: Vec<String> = needs.iter().rev().chain([file]).cloned().collect();
        if files.iter().all(|file| is_plain(file)) { Driver::Module(files) } else { Driver::Missing }
    }
}

/// A module's name: its file's without endings, with `_` for `-`, as the kernel has it.
fn name(file: &str) -> String {
    let file = file.trim().rsplit('/').next().unwrap_or_default();
    file.split('.').next().unwrap_or_default().replace('-', "_")
}

/// A path below the folder of modules, of letters that mean nothing to a shell.
fn is_plain(path: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
    path.len() <= 255
        && path.chars().all(letter)
        && path.split('/').all(|part| !["", ".", ".."].contains(&part))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "\
kernel/drivers/virtio/virtio_ring.ko:
kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/virtio/virtio_mmio.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/block/virtio-blk.ko.xz: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/a/evil.ko: ../../../../etc/shadow
kernel/a/shell.ko: kernel/a/$(x).ko
";

    #[test]
    fn modules_come_after_what_they_need() {
        let modules = Modules::parse("kernel/fs/ext4/ext4.ko\nkernel/x/virtio-rng.ko\n", DEPENDENCIES);
        let loaded = ["virtio/virtio_ring.ko", "virtio/virtio.ko", "virtio/virtio_mmio.ko"];
        let loaded = loaded.map(|file| format!("kernel/drivers/{file}"));
        assert_eq!(modules.driver("virtio_mmio"), Driver::Module(loaded.into()));
        assert!(
            matches!(modules.driver("virtio_blk"), Driver::Module(files) if files[2].ends_with(".ko.xz"))
        );
        assert_eq!(modules.driver("ext4"), Driver::BuiltIn);
        assert_eq!(modules.driver("virtio_rng"), Driver::BuiltIn);
        for missing in ["virtio_net", "", "evil", "shell"] {
            assert_eq!(modules.driver(missing), Driver::Missing, "{missing}");
        }
    }

    #[test]
    fn a_configuration_tells_what_is_built_in() {
        let config = "CONFIG_VIRTIO_MMIO=y\nCONFIG_VIRTIO_BLK=m\nCONFIG_VIRTIO_NET=m\n# CONFIG_X is not set\nCONFIG_\n=\n";
        let modules = Modules::of_config(config, &["virtio_net"]);
        assert_eq!(modules.driver("virtio_mmio"), Driver::BuiltIn);
        assert_eq!(modules.driver("virtio_net"), Driver::BuiltIn);
        assert_eq!(modules.driver("virtio_blk"), Driver::Missing);
    }
}
