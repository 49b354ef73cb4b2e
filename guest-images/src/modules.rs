//! Which kernel modules go into the image: patterns, and the closure over what modules depend on.

use std::collections::{BTreeMap, BTreeSet};

/// Mark at the end of a signed module (Linux, Documentation/admin-guide/module-signing.rst).
const SIGNATURE_MARK: &[u8] = b"~Module signature appended~\n";
/// Length of `struct module_signature`, whose last 4 bytes are the signature's length (big endian).
const SIGNATURE_INFO: usize = 12;

/// What `modules.dep` says: each module's path below the kernel's folder, and the paths of all it depends on,
/// those that must be loaded first at the end (depmod(8), modules.dep(5)).
#[derive(Debug, Default)]
pub struct Dependencies(BTreeMap<String, Vec<String>>);

/// A line of a module list to which no module belongs.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the kernel has no module '{0}', which the recipe wants: has it been renamed or built in?")]
pub struct NoSuchModule(pub String);

impl Dependencies {
    /// Parses the text of `modules.dep`.
    pub fn parse(text: &str) -> Self {
        let split = |line: &str| {
            let (module, needs) = line.split_once(':')?;
            Some((module.to_owned(), needs.split_whitespace().map(str::to_owned).collect()))
        };
        Self(text.lines().filter_map(split).collect())
    }

    /// Paths of the modules that the patterns of `list` name and of all that these need.
    ///
    /// A pattern is a module's name (`-` and `_` are the same), may hold `*`, or is a folder below `kernel/`
    /// and ends in `/`. Names in `built_in` are no modules but are there.
    pub fn select(&self, list: &str, built_in: &str) -> Result<BTreeSet<String>, NoSuchModule> {
        let mut chosen = BTreeSet::new();
        for pattern in lines(list) {
            let before = chosen.len();
            let mut matched = false;
            for (path, needs) in self.0.iter().filter(|(path, _)| matches(pattern, path)) {
                matched = true;
                chosen.insert(path.clone());
                chosen.extend(needs.iter().cloned());
            }
            let there = matched || built_in.lines().any(|path| matches(pattern, path));
            if !there && chosen.len() == before {
                return Err(NoSuchModule(pattern.to_owned()));
            }
        }
        Ok(chosen)
    }

    /// Paths of the modules in `list` in the order in which they can be loaded one by one.
    pub fn load_order(&self, list: &str, built_in: &str) -> Result<Vec<String>, NoSuchModule> {
        let mut order: Vec<String> = Vec::new();
        for pattern in lines(list) {
            let found = self.0.iter().find(|(path, _)| matches(pattern, path));
            let Some((path, needs)) = found else {
                if built_in.lines().any(|path| matches(pattern, path)) {
                    continue;
                }
                return Err(NoSuchModule(pattern.to_owned()));
            };
            for next in needs.iter().rev().chain([path]) {
                if !order.contains(next) {
                    order.push(next.clone());
                }
            }
        }
        Ok(order)
    }
}

/// The lines of a list without comments and empty ones.
pub fn lines(list: &str) -> impl Iterator<Item = &str> {
    list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

fn matches(pattern: &str, path: &str) -> bool {
    if pattern.ends_with('/') {
        return path.strip_prefix("kernel/").is_some_and(|path| path.starts_with(pattern));
    }
    let file = path.rsplit('/').next().unwrap_or(path);
    let name = file.split('.').next().unwrap_or(file);
    glob(pattern.replace('-', "_").as_bytes(), name.replace('-', "_").as_bytes())
}

/// Whether `name` matches `pattern`, in which `*` stands for any bytes.
fn glob(pattern: &[u8], name: &[u8]) -> bool {
    match pattern.split_first() {
        None => name.is_empty(),
        Some((b'*', rest)) => (0..=name.len()).any(|skip| glob(rest, &name[skip..])),
        Some((first, rest)) => {
            name.split_first().is_some_and(|(byte, name)| byte == first && glob(rest, name))
        }
    }
}

/// A module without its signature. Debian's kernels do not enforce signatures, and checking one costs an RSA
/// operation and a hash over the module at every load.
pub fn unsigned(module: &[u8]) -> &[u8] {
    let Some(body) = module.strip_suffix(SIGNATURE_MARK) else { return module };
    let signature = body
        .len()
        .checked_sub(4)
        .and_then(|at| body[at..].try_into().ok())
        .and_then(|length| usize::try_from(u32::from_be_bytes(length)).ok());
    signature
        .and_then(|length| body.len().checked_sub(SIGNATURE_INFO)?.checked_sub(length))
        .map_or(module, |end| &module[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/fs/ext4/ext4.ko: kernel/lib/crc16.ko kernel/fs/jbd2/jbd2.ko\n\
        kernel/fs/jbd2/jbd2.ko:\nkernel/lib/crc16.ko:\n\
        kernel/drivers/char/hw_random/virtio-rng.ko: kernel/drivers/virtio/virtio.ko\n\
        kernel/drivers/virtio/virtio.ko:\nkernel/net/netfilter/xt_mark.ko:\nkernel/net/sched/sch_fq.ko:\n";

    #[test]
    fn needed_modules_come_along_and_first() {
        let order = Dependencies::parse(DEP).load_order("ext4\n# no\nvirtio_rng\n", "").unwrap();
        assert_eq!(
            order,
            [
                "kernel/fs/jbd2/jbd2.ko",
                "kernel/lib/crc16.ko",
                "kernel/fs/ext4/ext4.ko",
                "kernel/drivers/virtio/virtio.ko",
                "kernel/drivers/char/hw_random/virtio-rng.ko"
            ]
        );
    }

    #[test]
    fn patterns_name_folders_and_families() {
        let chosen = Dependencies::parse(DEP).select("net/netfilter/\nvirtio*\n", "").unwrap();
        assert_eq!(chosen.len(), 3);
        assert!(!chosen.contains("kernel/net/sched/sch_fq.ko"));
    }

    #[test]
    fn a_module_that_is_not_there_is_named_unless_it_is_built_in() {
        let dependencies = Dependencies::parse(DEP);
        assert_eq!(dependencies.select("btrfs", ""), Err(NoSuchModule("btrfs".into())));
        assert_eq!(dependencies.load_order("btrfs", ""), Err(NoSuchModule("btrfs".into())));
        assert!(dependencies.select("btrfs", "kernel/fs/btrfs/btrfs.ko\n").unwrap().is_empty());
    }

    #[test]
    fn only_a_whole_signature_is_cut_off() {
        let mut module = b"module".to_vec();
        module.extend_from_slice(&[9; 5]);
        module.extend_from_slice(&[0; 8]);
        module.extend_from_slice(&5_u32.to_be_bytes());
        module.extend_from_slice(SIGNATURE_MARK);
        assert_eq!(unsigned(&module), b"module");
        assert_eq!(unsigned(b"module"), b"module");
        let garbled = [&b"x"[..], &u32::MAX.to_be_bytes(), SIGNATURE_MARK].concat();
        assert_eq!(unsigned(&garbled), garbled);
        assert_eq!(unsigned(SIGNATURE_MARK), SIGNATURE_MARK);
    }
}
