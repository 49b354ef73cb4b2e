//! Images as the daemon uses them: told, verified, removed; built by a process of their own.
//!
//! The image folder belongs to root and is shared between daemons. Which daemons there are is
//! noted in its `.users` folder, so that no image is removed under the VMs of another.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use catalyst_api as api;
use catalyst_images::manifest::DISK_FILE;
use catalyst_images::{Image, ImageState, ImageStore};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::Command;

use crate::http::error::{Refusal, chain};
use crate::machines::Machines;
use crate::privilege::{as_root, as_root_blocking};
use crate::settings::sibling;
use crate::store::Store;
use crate::store::files;
use crate::tasks::{Running, Tasks};

/// Images this version knows how to build.
pub(crate) const BUNDLED: &str = "lumen";
const USERS: &str = ".users";

/// See the module.
#[derive(Clone, Debug)]
pub struct Images {
    store: ImageStore,
    tasks: Tasks,
    state_dir: PathBuf,
}

/// One line of the builder's progress.
#[derive(Debug, Deserialize)]
struct Progress {
    step: u32,
    of: u32,
    name: String,
    #[serde(default)]
    percent: Option<u8>,
    #[serde(default)]
    message: Option<String>,
}

/// Size of an image's disk in GiB, rounded up: no VM's disk is smaller.
pub fn disk_gib(image: &Image) -> u64 {
    image.manifest.files.get(DISK_FILE).map_or(0, |disk| disk.size.div_ceil(1 << 30))
}

/// Whether VMs of it have no disk: it is for containers.
pub fn is_diskless(image: &Image) -> bool {
    !image.manifest.files.contains_key(DISK_FILE)
}

impl Images {
    /// The images in `store`, used by the daemon of `state_dir`.
    pub fn new(store: ImageStore, tasks: Tasks, state_dir: PathBuf) -> Self {
        Self { store, tasks, state_dir }
    }

    /// Notes that the VMs of this state folder stand on the images.
    pub fn register(&self) -> io::Result<()> {
        let folder = self.store.root().join(USERS);
        let path = self.state_dir.to_string_lossy();
        let name: String =
            Sha256::digest(path.as_bytes()).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        as_root(|| {
            std::fs::create_dir_all(&folder)?;
            files::write_atomically(&folder.join(name), path.as_bytes(), 0o644)
        })
    }

    /// The long tasks.
    pub fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    /// All versions of all images.
    pub async fn list(&self, machines: &Machines) -> Result<Vec<api::ImageInfo>, Refusal> {
        let store = self.store.clone();
        let images = as_root_blocking(move || store.list()).await?;
        Ok(images
            .into_iter()
            .map(|image| {
                let (state, reason) = match image.state {
                    ImageState::Ok => (api::ImageState::Ok, None),
                    ImageState::Damaged(reason) => (api::ImageState::Damaged, Some(reason)),
                    ImageState::Incomplete => (api::ImageState::Incomplete, None),
                };
                let used = machines.template_versions(&image.name);
                api::ImageInfo {
                    used_by: used.iter().filter(|version| **version == image.version).count(),
                    name: image.name,
                    version: image.version,
                    current: image.current,
                    state,
                    reason,
                    kernel: Some(image.kernel).filter(|kernel| !kernel.is_empty()),
                    packages: image.packages,
                    allocated_bytes: image.allocated,
                    virtual_bytes: image.size_virtual,
                    created: image.created,
                }
            })
            .collect())
    }

    /// The manifest of the current version, as JSON text.
    pub async fn manifest(&self, name: &str) -> Result<String, Refusal> {
        let (store, name) = (self.store.clone(), name.to_owned());
        let image = as_root_blocking(move || store.current(&name)).await?;
        serde_json::to_string_pretty(&image.manifest).map_err(|error| {
            Refusal::new(api::ErrorCode::Internal, format!("Cannot write the manifest: {error}"))
        })
    }

    /// Removes the versions of an image; one that VMs of this or another daemon stand on is an error.
    pub async fn remove(&self, machines: &Machines, name: &str) -> Result<(), Refusal> {
        let mut used = machines.template_versions(name);
        let (images, template) = (self.clone(), name.to_owned());
        used.extend(as_root_blocking(move || images.used_elsewhere(&template)).await);
        let (store, name) = (self.store.clone(), name.to_owned());
        let removal = as_root_blocking(move || {
            let used: Vec<&str> = used.iter().map(String::as_str).collect();
            store.remove(&name, &used)
        })
        .await?;
        match removal.in_use.as_slice() {
            [] => Ok(()),
            versions => Err(Refusal::new(
                api::ErrorCode::InUse,
                format!("VMs stand on version {} of the image; delete them first", versions.join(", ")),
            )),
        }
    }

    /// Versions that VMs of other state folders stand on.
    fn used_elsewhere(&self, template: &str) -> Vec<String> {
        let folders = state_folders(&self.store).into_iter().map(|(folder, _)| folder);
        folders
            .filter(|folder| *folder != self.state_dir && folder.join("vms").is_dir())
            .filter_map(|folder| Store::open_existing(&folder).scan().ok())
            .flatten()
            .filter_map(|dir| dir.read().ok())
            .filter(|(_, config)| config.template == template)
            .map(|(_, config)| config.version)
            .collect()
    }

    /// Begins to build an image, and to make it warm for VMs of the usual size.
    pub fn build(&self, machines: &Machines, name: &str) -> Result<api::Task, Refusal> {
        if name != BUNDLED {
            let name = name.chars().take(80).collect::<String>();
            let message = format!(
                "There is no recipe for an image '{}'; this version builds '{BUNDLED}'",
                name.escape_debug()
            );
            return Err(Refusal::new(api::ErrorCode::ImageNotFound, message));
        }
        let (task, told) = self.tasks.begin_told(&format!("image build {name}"))?;
        let root = self.store.root().to_owned();
        let (machines, name) = (machines.clone(), name.to_owned());
        tokio::spawn(async move {
            let built = run_builder(&root, &task).await;
            let result = match built {
                Ok(version) => {
                    let warm =
                        machines.warm_usual(&name, |percent, message| task.step(percent, message)).await;
                    // VMs boot then, which is slower and no more.
                    match warm {
                        Ok(()) => Ok(version),
                        Err(error) => Ok(format!("{version}; it is not warm: {}", error.0.message)),
                    }
                }
                failed => failed,
            };
            task.end(result);
        });
        Ok(told)
    }

    /// Begins to compare the files of an image with their digests.
    pub fn verify(&self, name: &str) -> Result<api::Task, Refusal> {
        // Before the name goes into the title of a task.
        self.store.check_name(name)?;
        let (task, told) = self.tasks.begin_told(&format!("image verify {name}"))?;
        let (store, name) = (self.store.clone(), name.to_owned());
        tokio::spawn(async move {
            let (task, result) = as_root_blocking(move || {
                let result = store.verify(&name, None, |progress| {
                    let percent = progress.done * 100 / progress.total.max(1);
                    task.step(u8::try_from(percent).unwrap_or(100), progress.file);
                });
                (task, result)
            })
            .await;
            task.end(match result {
                Ok(ImageState::Ok) => Ok("every file is what the manifest says".to_owned()),
                Ok(ImageState::Incomplete) => {
                    Err("it is half built; go on with: catalyst image build".to_owned())
                }
                Ok(ImageState::Damaged(reason)) => {
                    Err(format!("it is damaged: {reason}; build it again: catalyst image build"))
                }
                Err(error) => Err(chain(&error).join(": ")),
            });
        });
        Ok(told)
    }
}

/// The state folders whose VMs stand on the images in `store`, each with the file that notes it.
pub(crate) fn state_folders(store: &ImageStore) -> Vec<(PathBuf, PathBuf)> {
    let notes = std::fs::read_dir(store.root().join(USERS)).into_iter().flatten().flatten();
    let folder = |note: std::fs::DirEntry| {
        let path = files::read_bounded(&note.path(), 4096).ok()?;
        Some((PathBuf::from(String::from_utf8(path).ok()?), note.path()))
    };
    notes.filter_map(folder).collect()
}

/// Runs the builder and tells its progress; the result is its last line.
async fn run_builder(root: &Path, task: &Running) -> Result<String, String> {
    let program = sibling("catalyst-image");
    let mut child = Command::new(&program)
        .args(["build", "--json", "--store"])
        .arg(root)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("cannot run {}: {error}", program.display()))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let words = tokio::spawn(async move {
        let mut text = Vec::new();
        if let Some(stderr) = stderr {
            // What cannot be read is only missing in the message.
            let _ = stderr.take(64 * 1024).read_to_end(&mut text).await;
        }
        String::from_utf8_lossy(&text).trim().to_owned()
    });
    let mut lines = BufReader::new(stdout.ok_or("the builder has no output")?).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Ok(progress) = serde_json::from_str::<Progress>(&line) {
            let share = u32::from(progress.percent.unwrap_or(0).min(100));
            let done = (progress.step.saturating_sub(1) * 100 + share) / progress.of.max(1);
            let text = progress.message.map_or(progress.name.clone(), |m| format!("{}: {m}", progress.name));
            task.step(u8::try_from(done).unwrap_or(100), text);
        }
    }
    let status = child.wait().await.map_err(|error| error.to_string())?;
    let words = words.await.unwrap_or_default();
    if status.success() {
        Ok("built".to_owned())
    } else {
        Err(words.strip_prefix("Error: ").unwrap_or(&words).to_owned())
    }
}
