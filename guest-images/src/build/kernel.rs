//! What is taken from Debian's kernel package: for lumen the kernel, its modules, an initrd; for micro an initrd of the agent.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::command::command;
use super::steps::{put, remove_tree};
use super::{Build, BuildError, io_error};
use crate::bzimage;
use crate::cpio::CpioWriter;
use crate::manifest::{INITRD_FILE, KERNEL_FILE, Package};
use crate::modules::{Dependencies, unsigned};
use crate::recipe;

/// Files beside the modules that tools read: what is built in, and the order for modules with one alias.
const TABLES: [&str; 3] = ["modules.order", "modules.builtin", "modules.builtin.modinfo"];

/// Unpacks the kernel, installs the chosen modules in `root/`, writes the initrd.
pub(super) fn kernel(build: &mut Build<'_>) -> Result<(), BuildError> {
    let release = release(&build.work)?;
    let out = build.work.join("out");
    fs::create_dir_all(&out).map_err(io_error("create", &out))?;
    let packed = build.work.join("kernel/boot").join(format!("vmlinuz-{release}"));
    build.say(&format!("unpacking Linux {release}"), None);
    bzimage::unpack(&packed, &out.join(KERNEL_FILE))
        .map_err(|source| BuildError::Kernel { path: packed.clone(), source })?;

    depmod(build, "kernel", &release)?;
    let from = modules_folder(&build.work).join(&release);
    let dependencies = Dependencies::parse(&read_text(&from.join("modules.dep"))?);
    let built_in = read_text(&from.join("modules.builtin"))?;
    let list = [recipe::MODULES_INITRD, recipe::MODULES_ROOT, recipe::MICRO_MODULES].join("\n");
    let chosen = dependencies.select(&list, &built_in)?;
    build.say(&format!("{} modules", chosen.len()), None);
    let modules = build.work.join("root/usr/lib/modules");
    remove_tree(&modules)?;
    let to = modules.join(&release);
    for path in &chosen {
        put(&to.join(path), unsigned(&read(&from.join(path))?), 0o644)?;
    }
    for table in TABLES {
        put(&to.join(table), &read(&from.join(table))?, 0o644)?;
    }
    depmod(build, "root", &release)?;

    let order = dependencies.load_order(recipe::MODULES_INITRD, &built_in)?;
    let path = out.join(INITRD_FILE);
    write_initrd(&path, &build.work.join("root/bin/busybox"), &to, &order)
}

/// Release of the kernel in the build's folder (`6.1.0-56-amd64`).
pub(super) fn release(work: &Path) -> Result<String, BuildError> {
    let folder = modules_folder(work);
    let names: Vec<_> = fs::read_dir(&folder)
        .map_err(io_error("read", &folder))?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    match names.as_slice() {
        [release] => Ok(release.clone()),
        _ => Err(BuildError::Unexpected {
            step: "kernel",
            message: format!("the kernel package has modules for {} kernels instead of 1", names.len()),
        }),
    }
}

/// The kernel's package, as the installation noted it.
pub(super) fn package(work: &Path) -> Result<Package, BuildError> {
    let text = read_text(&work.join("kernel/package"))?;
    let (name, version) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
    Ok(Package { name: name.to_owned(), version: version.to_owned() })
}

/// The kernel's timer interrupts a second, as its configuration says; 0 if it does not.
pub(super) fn ticks(work: &Path) -> Result<u32, BuildError> {
    let config = read_text(&work.join("kernel/boot").join(format!("config-{}", release(work)?)))?;
    let ticks = config.lines().find_map(|line| line.strip_prefix("CONFIG_HZ="));
    Ok(ticks.and_then(|ticks| ticks.parse().ok()).unwrap_or(0))
}

/// Where the package keeps modules: below `lib`, or below `usr/lib` in newer ones.
fn modules_folder(work: &Path) -> PathBuf {
    let folders = ["kernel/lib/modules", "kernel/usr/lib/modules"].map(|folder| work.join(folder));
    folders.iter().find(|folder| folder.is_dir()).unwrap_or(&folders[0]).clone()
}

fn depmod(build: &mut Build<'_>, folder: &str, release: &str) -> Result<(), BuildError> {
    let mut depmod = command("depmod");
    depmod.arg("--basedir").arg(build.work.join(folder)).arg(release);
    build.command(depmod)
}

/// Writes micro's initrd: the agent is its first program.
pub(super) fn micro_initrd(build: &mut Build<'_>, path: &Path) -> Result<(), BuildError> {
    let from = modules_folder(&build.work).join(release(&build.work)?);
    let dependencies = Dependencies::parse(&read_text(&from.join("modules.dep"))?);
    let order = dependencies.load_order(recipe::MICRO_MODULES, &read_text(&from.join("modules.builtin"))?)?;
    let failed = |source| io_error("write", path)(source);
    let mut archive = new_archive(path, &["dev", "etc", "modules", "proc", "root", "run", "sys"])?;
    archive.file("init", 0o755, &build.agent).map_err(failed)?;
    for file in recipe::MICRO_FILES {
        archive.file(file.path, 0o644, file.content.as_bytes()).map_err(failed)?;
    }
    let modules = build.work.join("root/usr/lib/modules").join(release(&build.work)?);
    end_archive(archive, path, &modules, &order)
}

fn write_initrd(path: &Path, busybox: &Path, modules: &Path, order: &[String]) -> Result<(), BuildError> {
    let failed = |source| io_error("write", path)(source);
    let mut archive = new_archive(path, &["bin", "dev", "modules", "root"])?;
    archive.file("init", 0o755, recipe::INITRD_INIT.as_bytes()).map_err(failed)?;
    archive.file("bin/busybox", 0o755, &read(busybox)?).map_err(failed)?;
    end_archive(archive, path, modules, order)
}

type Archive = CpioWriter<BufWriter<File>>;

fn new_archive(path: &Path, folders: &[&str]) -> Result<Archive, BuildError> {
    let failed = |source| io_error("write", path)(source);
    let mut archive = CpioWriter::new(BufWriter::new(File::create(path).map_err(failed)?));
    for folder in folders {
        archive.folder(folder, 0o755).map_err(failed)?;
    }
    Ok(archive)
}

/// Adds the modules and the file that says in which order they are loaded.
fn end_archive(
    mut archive: Archive,
    path: &Path,
    modules: &Path,
    order: &[String],
) -> Result<(), BuildError> {
    let failed = |source| io_error("write", path)(source);
    let mut names = String::new();
    for module in order {
        let name = module.rsplit('/').next().unwrap_or(module);
        archive.file(&format!("modules/{name}"), 0o644, &read(&modules.join(module))?).map_err(failed)?;
        names.push_str(name);
        names.push('\n');
    }
    archive.file("modules/order", 0o644, names.as_bytes()).map_err(failed)?;
    archive.finish().and_then(|mut output| output.flush()).map_err(failed)
}

fn read(path: &Path) -> Result<Vec<u8>, BuildError> {
    fs::read(path).map_err(io_error("read", path))
}

fn read_text(path: &Path) -> Result<String, BuildError> {
    fs::read_to_string(path).map_err(io_error("read", path))
}
