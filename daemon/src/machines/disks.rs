//! Disks out of VMs and into templates: export and import.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use catalyst_api::{ErrorCode, ExportVm, ImportImage, Task, VmState};
use catalyst_images::{ImageError, Machine, NewTemplate, Origin};
use catalyst_vmm::description::Format;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use tokio::sync::{mpsc, oneshot};

use super::machine::{self, Command, Work};
use super::start;
use super::{Context, Machines, asked};
use crate::http::error::{Refusal, chain};
use crate::privilege::as_root;
use crate::store::flatten::{self, Source};
use crate::store::foreign::image;
use crate::store::{StoreError, VmDir, files, sparse};
use crate::tasks::Running;

/// Longest path that is taken, in bytes (PATH_MAX).
const MAX_PATH: usize = 4096;
/// What the disk of a template is called while it is the owner's.
pub(super) const FLAT: &str = "flat.raw";

/// Does `work` with the folder of a VM that lies still, and that nothing powers on meanwhile; else gives its state.
pub(super) async fn still<T: Send + 'static>(
    commands: &mpsc::Sender<machine::Asked>,
    work: impl FnOnce(VmDir) -> T + Send + 'static,
) -> Result<T, VmState> {
    let (done, result) = oneshot::channel();
    let work = Work(Box::new(move |dir| drop(done.send(work(dir)))));
    let (reply, answer) = oneshot::channel();
    // A task that is gone is that of a VM which was deleted.
    commands.send(asked(Command::Still { work, reply })).await.map_err(|_| VmState::Blocked)?;
    answer.await.map_err(|_| VmState::Blocked)??;
    result.await.map_err(|_| VmState::Blocked)
}

/// A template that is being made, in a folder of root's.
pub(super) struct Making(Option<NewTemplate>);

impl Making {
    /// Begins it.
    pub fn begin(context: &Context, name: &str) -> Result<Self, ImageError> {
        as_root(|| context.images.begin_template(name)).map(|template| Self(Some(template)))
    }

    /// Its folder.
    pub fn folder(&self) -> PathBuf {
        self.0.as_ref().map(NewTemplate::folder).unwrap_or_default()
    }

    /// Its disk.
    pub fn disk(&self) -> PathBuf {
        self.0.as_ref().map(NewTemplate::disk).unwrap_or_default()
    }

    /// Puts it into its place; what is said of it then.
    pub fn finish(mut self, origin: &Origin<'_>) -> Result<String, Refusal> {
        let made = self.0.take().map(|template| as_root(|| template.finish(origin))).transpose()?;
        Ok(format!("made template {}", made.map(|made| made.name).unwrap_or_default()))
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        // What is left of it is root's.
        as_root(|| drop(self.0.take()));
    }
}

/// Copies a disk of the owner's to where root alone writes. Waits.
pub(super) fn take_disk(raw: &Path, to: &Path) -> io::Result<()> {
    let source = File::open(raw)?;
    as_root(|| {
        let to = File::options().write(true).create_new(true).mode(0o644).open(to)?;
        sparse::copy(&source, &to)?;
        to.sync_all()
    })
}

/// Writes what a VM's disk holds, and all below it, to `to`.
pub(super) fn flatten(context: &Context, dir: &VmDir, to: &Path, format: Format) -> Result<(), Refusal> {
    let (_, config) = dir.read()?;
    let image = start::image(context, dir, &config)?;
    let layers = start::layers(dir, &image, &dir.chain()?)?;
    let owner = (context.owner.uid, context.owner.gid);
    flatten::convert(&Source::of_layers(layers), to, format, owner).map_err(StoreError::from)?;
    Ok(())
}

fn invalid(message: impl Into<String>) -> Refusal {
    Refusal::new(ErrorCode::InvalidRequest, message)
}

/// The folder and the file's name of a path that a client gives.
fn named(path: &str) -> Result<(PathBuf, String), Refusal> {
    let given = Path::new(path);
    let shown = path.chars().take(200).collect::<String>().escape_debug().to_string();
    let name = given.file_name().and_then(|name| name.to_str());
    match (given.parent(), name) {
        (Some(folder), Some(name))
            if given.is_absolute() && path.len() <= MAX_PATH && !path.contains(char::is_control) =>
        {
            Ok((folder.to_owned(), name.to_owned()))
        }
        _ => Err(invalid(format!("'{shown}' is not the absolute path of a file"))),
    }
}

fn failed(what: &str, path: &Path) -> impl FnOnce(io::Error) -> Refusal {
    let message = format!("Cannot {what} {}", path.display());
    move |error| {
        let full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        let code = if full { ErrorCode::DiskFull } else { ErrorCode::InvalidRequest };
        let mut refusal = Refusal::new(code, message);
        refusal.0.causes = chain(&error);
        refusal
    }
}

/// Ends a task as its work did.
pub(super) fn end(task: Running, done: Result<String, Refusal>) {
    task.end(done.map_err(|refusal| refusal.0.to_string()));
}

/// The first sector of a disk says whether there is a loader on it, and for which machine (UEFI Specification, 5.2).
fn loader(disk: &Path) -> io::Result<Option<Machine>> {
    let file = File::open(disk)?;
    let mut head = [0; 1024];
    if file.metadata()?.len() < head.len() as u64 {
        return Ok(None);
    }
    file.read_exact_at(&mut head, 0)?;
    if head[510..512] != [0x55, 0xaa] {
        return Ok(None);
    }
    let is_gpt = head[512..].starts_with(b"EFI PART");
    let has_code = head[..440].iter().any(|byte| *byte != 0);
    Ok(Some(if is_gpt && !has_code { Machine::Efi } else { Machine::Bios }))
}

impl Machines {
    /// Begins to write the disk of a VM that is off into a qcow2 that stands on nothing.
    pub fn export(&self, id: &str, request: &ExportVm) -> Result<Task, Refusal> {
        let (shared, commands) = self.find(id)?;
        let id = shared.dir().id().clone();
        let (folder, name) = named(&request.path)?;
        let target = folder.join(&name);
        if shared.dir().is_registered() {
            let message = format!(
                "The VM '{id}' was registered in place: its disks lie beside {}",
                shared.view().source.unwrap_or_default()
            );
            return Err(Refusal::new(ErrorCode::NotYet, message));
        }
        let off = |state: VmState| {
            let message =
                format!("The VM '{id}' is {state}; shut it down first: catalyst vmpower shutdown {id}");
            Refusal::new(ErrorCode::WrongState, message)
        };
        if shared.state() != VmState::PoweredOff {
            return Err(off(shared.state()));
        }
        let exists = || {
            let message = format!("{} is there already; overwrite it with --force", target.display());
            Refusal::new(ErrorCode::FileExists, message)
        };
        let about = target.symlink_metadata();
        if about.is_ok() && !request.force {
            return Err(exists());
        }
        if about.is_ok_and(|about| !about.is_file()) {
            return Err(invalid(format!("{} is not a regular file", target.display())));
        }
        fs::read_dir(&folder).map_err(failed("look into the folder", &folder))?;
        let (task, told) = self.0.tasks.begin_told(&format!("image export {id}"))?;
        let (context, force) = (Arc::clone(&self.0), request.force);
        let aside = folder.join(format!(".{name}.catalyst-{}", uuid::Uuid::new_v4().simple()));
        task.step(10, "writing the disk");
        let target = target.clone();
        let (id, state_id) = (id.clone(), id.clone());
        tokio::spawn(async move {
            let work = move |dir: VmDir| {
                let done =
                    flatten(&context, &dir, &aside, Format::Qcow2).and_then(|()| put(&aside, &target, force));
                if done.is_err() {
                    let _ = fs::remove_file(&aside);
                }
                done.map(|()| format!("wrote {}", target.display()))
            };
            let done = still(&commands, work).await.unwrap_or_else(|state| {
                Err(Refusal::new(
                    ErrorCode::WrongState,
                    format!("The VM '{state_id}' is {state}; shut it down first"),
                ))
            });
            tracing::info!(vm = %id, failed = done.is_err(), "exported");
            end(task, done);
        });
        Ok(told)
    }

    /// Begins to make a template of a disk of others, which starts by its own loader.
    pub fn import(&self, request: ImportImage) -> Result<Task, Refusal> {
        let (folder, file) = named(&request.path)?;
        let name = match request.name {
            Some(name) => name,
            None => name_of(&file),
        };
        let image = image::open_or_raw(&folder, &file)
            .map_err(|error| invalid(chain(&StoreError::from(error)).join(": ")))?;
        let template = Making::begin(&self.0, &name)?;
        let (task, told) = self.0.tasks.begin_told(&format!("image import {name}"))?;
        let context = Arc::clone(&self.0);
        tokio::spawn(async move {
            task.step(10, "reading the disk");
            let (task, done) = blocking(task, move || {
                let scratch = context.store.scratch()?;
                let raw = scratch.path().join(FLAT);
                let owner = (context.owner.uid, context.owner.gid);
                let source = Source::of_parts(image.parts).map_err(failed("open", &folder.join(&file)))?;
                flatten::convert(&source, &raw, Format::Raw, owner).map_err(StoreError::from)?;
                let machine = loader(&raw).map_err(failed("read", &raw))?.ok_or_else(|| {
                    invalid(format!(
                        "{file} has no boot sector: a template of others must start by its own loader"
                    ))
                })?;
                take_disk(&raw, &template.disk()).map_err(failed("keep the disk in", &template.folder()))?;
                template.finish(&Origin::Disk(machine, file))
            })
            .await;
            end(task, done);
        });
        Ok(told)
    }
}

/// Does something that waits, beside its task.
pub(super) async fn blocking<T: Send + 'static>(
    task: Running,
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> (Running, Result<T, Refusal>) {
    let stopping = || Err(Refusal::new(ErrorCode::Internal, "The daemon is stopping"));
    (task, tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| stopping()))
}

/// Syncs a file and gives it its name.
fn put(aside: &Path, target: &Path, force: bool) -> Result<(), Refusal> {
    let flags = if force { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
    let named = File::open(aside)
        .and_then(|file| file.sync_all())
        .and_then(|()| renameat_with(CWD, aside, CWD, target, flags).map_err(io::Error::from))
        .and_then(|()| target.parent().map_or(Ok(()), files::sync_folder));
    named.map_err(failed("write", target))
}

/// A template's name out of a file's.
fn name_of(file: &str) -> String {
    let stem = Path::new(file).file_stem().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    stem.chars()
        .map(|c| if plain(c) { c } else { '-' })
        .collect::<String>()
        .trim_matches(['-', '.'])
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_become_names_of_templates() {
        assert_eq!(name_of("Debian 12_generic.qcow2"), "debian-12-generic");
        assert_eq!(name_of(".hidden.img"), "hidden");
    }

    #[test]
    fn a_boot_sector_tells_bios_from_uefi() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let mut disk = vec![0_u8; 4096];
        let told = |disk: &[u8]| {
            fs::write(&path, disk).unwrap();
            loader(&path).unwrap()
        };
        assert_eq!((told(&disk), told(&[])), (None, None));
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(told(&disk), Some(Machine::Bios));
        disk[512..520].copy_from_slice(b"EFI PART");
        assert_eq!(told(&disk), Some(Machine::Efi));
        disk[0] = 0xeb;
        assert_eq!(told(&disk), Some(Machine::Bios));
    }

    #[test]
    fn paths_of_clients_are_absolute_files() {
        assert_eq!(named("/srv/a.qcow2").unwrap(), (PathBuf::from("/srv"), "a.qcow2".to_owned()));
        for bad in ["", "a.qcow2", "/", "/srv/..", "/a\n", &format!("/{}", "a".repeat(5000))] {
            assert!(named(bad).is_err(), "{bad}");
        }
    }
}
