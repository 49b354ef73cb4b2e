//! Templates that are made from VMs. A VM that is off is copied, started once where nobody reaches it, and forgets who it is;
//! one that runs is frozen, and the copy of it does so and is saved with its memory: new VMs go on from there.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use catalyst_api::{CreateTemplate, ErrorCode, Task};
use catalyst_images::{Image, Origin};
use catalyst_vmm::description::Format;

use super::clones::with_memory;
use super::disks::{FLAT, Making, blocking, end, still, take_disk};
use super::freeze::Frozen;
use super::shared::Shared;
use super::{Context, Machines, start};
use crate::engine::Layer;
use crate::http::error::{Refusal, chain};
use crate::images::Images;
use crate::privilege::as_root;
use crate::store::flatten::{self, Source};
use crate::store::{Chain, StoreError, VmConfig, VmDir, disk, files};
use crate::tasks::Running;
use crate::warm::make::{Begins, Size, Template, WarmError, warm_name};
use crate::warm::{DISK, FOLDER};

fn refused(error: &WarmError) -> Refusal {
    Refusal::new(ErrorCode::Internal, chain(error).join(": "))
}

/// What a template is made from.
struct Made {
    image: Image,
    config: VmConfig,
    size: Size,
    /// What its disk stands on.
    chain: Chain,
    /// The VM as it is frozen, if it runs.
    frozen: Option<Arc<Frozen>>,
}

impl Machines {
    /// Begins to make a template of a VM.
    pub fn create_template(&self, request: &CreateTemplate) -> Result<Task, Refusal> {
        let (shared, _) = self.find(&request.vm)?;
        let id = shared.dir().id().clone();
        if shared.is_foreign() {
            let message = format!(
                "The VM '{id}' was registered in place, or is of an imported image: its guest has no agent that could \
                 forget who it is; export its disk and import that: catalyst image export {id} FILE.qcow2"
            );
            return Err(Refusal::new(ErrorCode::NotYet, message));
        }
        if let Some(special) = shared.special() {
            return Err(Refusal::new(
                ErrorCode::NotYet,
                format!("The VM '{id}' {special}, and becomes no template"),
            ));
        }
        if !shared.dir().folders()?.is_empty() {
            let message = format!(
                "The VM '{id}' has folders of this machine; remove them first: catalyst folder list {id}"
            );
            return Err(Refusal::new(ErrorCode::WrongState, message));
        }
        let state = shared.state();
        if !with_memory(state) && state != catalyst_api::VmState::PoweredOff {
            let message = format!("The VM '{id}' is {state}; a template is made from a VM that is on or off");
            return Err(Refusal::new(ErrorCode::WrongState, message));
        }
        let template = Making::begin(&self.0, &request.name)?;
        let (task, told) = self.0.tasks.begin_told(&format!("template create {} from {id}", request.name))?;
        let machines = self.clone();
        tokio::spawn(async move {
            let (task, done) = machines.make_template(&shared, template, task).await;
            end(task, done);
        });
        Ok(told)
    }

    async fn make_template(
        &self,
        shared: &Arc<Shared>,
        template: Making,
        task: Running,
    ) -> (Running, Result<String, Refusal>) {
        let dir = shared.dir().clone();
        let prepared = async {
            let (_, config) = dir.read()?;
            let image = start::image(&self.0, &dir, &config)?;
            if with_memory(shared.state()) {
                task.step(10, "freezing the VM, which goes on");
                let frozen = self.freeze(dir.id().as_str()).await?;
                start::same_engine(&self.0, &dir, frozen.engine)?;
                let size = Size { cpus: frozen.began.cpus, memory_mib: frozen.began.memory_mib };
                let copy = self.0.store.scratch()?;
                let chain = frozen.chain.clone();
                return Ok((Made { image, config, size, chain, frozen: Some(frozen) }, copy));
            }
            task.step(10, "copying the disk");
            let (_, commands) = self.find(dir.id().as_str())?;
            let size = Size { cpus: config.cpus, memory_mib: config.memory_mib };
            let copy = self.0.store.scratch()?;
            let to = copy.path().to_owned();
            let copied = still(&commands, move |dir| copy_disk(&dir, &to)).await;
            let chain = copied.map_err(|state| {
                let message = format!(
                    "The VM '{}' is {state}; a template is made from a VM that is on or off",
                    dir.id()
                );
                Refusal::new(ErrorCode::WrongState, message)
            })??;
            Ok::<_, Refusal>((Made { image, config, size, chain, frozen: None }, copy))
        };
        let (made, copy) = match prepared.await {
            Ok(prepared) => prepared,
            Err(refusal) => return (task, Err(refusal)),
        };
        let done = self.forget(&made, copy.path(), &template, &task).await;
        drop(copy);
        if let Err(error) = done {
            return (task, Err(refused(&error)));
        }
        task.step(90, "putting the template into place");
        let origin = format!("VM '{}'", shared.dir().id());
        blocking(task, move || template.finish(&Origin::Vm(&made.image, origin))).await
    }

    /// Starts what was copied, has it forget who it is, and puts its disk, and memory if it runs, into the template.
    async fn forget(
        &self,
        made: &Made,
        copy: &Path,
        template: &Making,
        task: &Running,
    ) -> Result<(), WarmError> {
        let context = &self.0;
        task.step(20, "starting a copy that nobody reaches");
        let vm =
            Template::start(context, &made.image, made.size, |dir| begins(context, made, copy, dir)).await?;
        let done = tokio::select! {
            done = save(context, made, &vm, template, task) => done,
            () = vm.process.no_room() => Err(WarmError::NoRoom(vm.dir.path().to_owned())),
        };
        vm.end(context).await;
        done
    }
}

/// Copies the disk of a VM that lies still, and what of its own that stands on, into a folder; what that stands on.
fn copy_disk(dir: &VmDir, to: &Path) -> Result<Chain, StoreError> {
    let chain = dir.chain()?;
    for name in &chain.own {
        fs::hard_link(dir.path().join(name), to.join(name)).map_err(StoreError::write(to.join(name)))?;
    }
    disk::copy(&dir.disk(), &to.join(disk_name(dir)))?;
    // A disk that was never written stands on anything.
    let warm = chain.warm.filter(|_| !chain.fresh);
    Ok(Chain { own: chain.own, warm, ..Chain::default() })
}

fn disk_name(dir: &VmDir) -> PathBuf {
    dir.disk().file_name().map(PathBuf::from).unwrap_or_default()
}

/// Fills the folder of the copy, and opens what it begins with.
fn begins(context: &Context, made: &Made, copy: &Path, dir: &VmDir) -> Result<Begins, WarmError> {
    let from = if let Some(frozen) = &made.frozen {
        frozen.fill(dir, (context.owner.uid, context.owner.gid))?;
        Some(frozen.saved()?)
    } else {
        for name in made.chain.own.iter().map(PathBuf::from).chain([disk_name(dir)]) {
            let to = dir.path().join(&name);
            fs::rename(copy.join(&name), &to).map_err(StoreError::write(to))?;
        }
        dir.write_chain(&made.chain)?;
        None
    };
    Ok(Begins { layers: layers(made, dir)?, from })
}

fn layers(made: &Made, dir: &VmDir) -> Result<Vec<Layer>, WarmError> {
    start::layers(dir, &made.image, &made.chain).map_err(|error| WarmError::Layers(Box::new(error)))
}

async fn save(
    context: &Arc<Context>,
    made: &Made,
    vm: &Template,
    template: &Making,
    task: &Running,
) -> Result<(), WarmError> {
    let link = vm.greet().await?;
    task.step(40, "having it forget keys, ids and logs");
    let engine = context.engines.chosen();
    let warm = template.folder().join(FOLDER).join(warm_name(engine.name(), made.size));
    let saved = if made.frozen.is_some() {
        vm.forget_and_rest(link).await?;
        task.step(60, "saving its memory");
        as_root(|| fs::create_dir(template.folder().join(FOLDER)))
            .map_err(|source| WarmError::Io { what: "make the folder of warm states", source })?;
        Some(vm.save(context, made.size, &warm).await?)
    } else {
        vm.forget_and_end(link).await?;
        None
    };
    task.step(75, "making its disk one");
    let flat = vm.dir.path().join(FLAT);
    let failed = |what| move |source| WarmError::Io { what, source };
    let (source, to) = (Source::of_layers(layers(made, &vm.dir)?), template.disk());
    let owner = (context.owner.uid, context.owner.gid);
    // The machine goes on above the disk as it was when it was saved. The tool is root's here, as the folder is.
    let empty = warm.join(DISK);
    let above = saved.is_some().then(|| (empty.clone(), made.config.disk_gib));
    let written = tokio::task::spawn_blocking(move || {
        flatten::convert(&source, &flat, Format::Raw, owner).map_err(StoreError::from)?;
        take_disk(&flat, &to).map_err(failed("keep the template's disk"))?;
        if let Some((empty, gib)) = above {
            // The template takes its place later; nobody follows the name, but the monitor takes a disk without one for a whole one.
            let below = (Path::new("below"), Format::Raw);
            disk::create_overlay(&empty, below, gib, (0, 0)).map_err(StoreError::from)?;
        }
        Ok::<_, WarmError>(())
    });
    written.await.map_err(std::io::Error::other).map_err(failed("flatten the disk"))??;
    let Some((saved, files, machine)) = saved else { return Ok(()) };
    as_root(|| {
        saved.finish(engine.name(), machine, (&files.0, &files.1), None)?;
        fs::set_permissions(&empty, Permissions::from_mode(0o644))
            .and_then(|()| fs::set_permissions(&warm, Permissions::from_mode(0o755)))
            .and_then(|()| files::sync_folder(&warm))
            .map_err(failed("put the warm state into place"))
    })
}

impl Images {
    /// Deletes a template that a user made.
    pub async fn delete_template(&self, machines: &Machines, name: &str) -> Result<(), Refusal> {
        let store = machines.context().images.clone();
        store.check_name(name)?;
        if !as_root(|| store.is_own(name)) {
            // It is there, or its absence is told.
            as_root(|| store.current(name))?;
            let message = format!(
                "The template '{name}' is no user's own; remove it with: catalyst image remove {name}"
            );
            return Err(Refusal::new(ErrorCode::InUse, message));
        }
        self.remove(machines, name).await
    }
}
