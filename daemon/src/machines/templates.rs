//! Templates: what there is of their warm states, and making more, asked for or because they were missed.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError};

use catalyst_api::{ErrorCode, Task, TemplateInfo, WarmInfo, WarmRequest};
use catalyst_images::Image;

use super::{Context, Machines};
use crate::engine::Fit;
use crate::http::error::{Refusal, chain};
use crate::images::{BUNDLED, disk_gib, is_diskless};
use crate::privilege::{as_root, as_root_blocking};
use crate::store::VmConfig;
use crate::store::config::{DEFAULT_CPUS, DEFAULT_MEMORY_MIB, MICRO, MIN_MEMORY_MIB, check_size};
use crate::tasks::Running;
use crate::warm::make::{self, Size};
use crate::warm::{Warm, WarmStates};

/// Another size than the usual one is made warm when it was asked for this often.
const ASKED: u32 = 2;

/// What VMs of `image` are made with where nothing else is said.
fn usual(image: &Image) -> Size {
    let memory_mib = if is_diskless(image) { MIN_MEMORY_MIB } else { DEFAULT_MEMORY_MIB };
    Size { cpus: u32::try_from(DEFAULT_CPUS).unwrap_or(1), memory_mib }
}

/// What VMs asked for and did not find: how often, by version of the image and size.
#[derive(Debug, Default)]
pub(super) struct Missed(Mutex<HashMap<(String, Size), u32>>);

impl Missed {
    /// Counts once more; true when it is time to make one.
    fn again(&self, version: &str, size: Size, usual: Size) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.entry((version.to_owned(), size)).or_default();
        *count += 1;
        // Once only: what failed would fail again.
        *count == if size == usual { 1 } else { ASKED }
    }
}

impl Context {
    /// A VM booted for want of a warm state of its size: after a while there will be one.
    pub(super) fn missed(self: &Arc<Self>, image: &Image, config: &VmConfig) {
        let size = Size { cpus: config.cpus, memory_mib: config.memory_mib };
        if !self.warms_by_itself || !self.missed.again(&image.version, size, usual(image)) {
            return;
        }
        self.begin_warming(image, &config.template, size);
    }

    fn begin_warming(self: &Arc<Self>, image: &Image, template: &str, size: Size) {
        match self.tasks.begin(&title(template, size)) {
            Ok(task) => make_warm(Arc::clone(self), image.clone(), size, task),
            Err(id) => tracing::debug!(id, "a warm state of that size is being made already"),
        }
    }
}

fn title(template: &str, size: Size) -> String {
    format!("template warm {template} --cpus {} --memory {}", size.cpus, size.memory_mib)
}

fn make_warm(context: Arc<Context>, image: Image, size: Size, task: Running) {
    tokio::spawn(async move {
        let made = make::make(&context, &image, size, |percent, message| task.step(percent, message)).await;
        task.end(match made {
            Ok(warm) => Ok(format!("made {}", warm.name)),
            Err(error) => Err(chain(&error).join(": ")),
        });
    });
}

impl Machines {
    /// All templates, and their warm states.
    pub async fn templates(&self) -> Result<Vec<TemplateInfo>, Refusal> {
        let store = self.0.images.clone();
        let images = as_root_blocking(move || store.list()).await?;
        let mut all = Vec::new();
        for image in images.into_iter().filter(|image| image.current) {
            if let Ok(template) = self.template(&image.name).await {
                all.push(template);
            }
        }
        Ok(all)
    }

    /// One template.
    pub async fn template(&self, name: &str) -> Result<TemplateInfo, Refusal> {
        let image = self.image(name).await?;
        let fit = self.0.engines.chosen().fit().await;
        let (warm, damaged) = WarmStates::of(&image).list();
        for error in damaged {
            tracing::warn!(reason = chain(&error).join(": "), "a warm state cannot be used");
        }
        let warm = warm.iter().map(|warm| self.warm_info(warm, fit.as_ref().ok())).collect();
        let used = self.template_versions(name);
        Ok(TemplateInfo {
            name: name.to_owned(),
            made_from: image.manifest.made_from.clone(),
            foreign: image.manifest.machine.is_some(),
            disk_gib: disk_gib(&image),
            used_by: used.iter().filter(|version| **version == image.version).count(),
            version: image.version,
            warm,
        })
    }

    fn warm_info(&self, warm: &Warm, fit: Option<&Fit>) -> WarmInfo {
        let manifest = &warm.manifest;
        let engine = self.0.engines.name();
        let reason = match fit {
            _ if manifest.engine != engine => Some(format!("VMs are started on engine {engine} here")),
            Some(fit) => fit.refuses(&manifest.fit).map(|misfit| misfit.to_string()),
            None => Some("the engine does not say what it fits".to_owned()),
        };
        let used_by = self
            .list(&[])
            .into_iter()
            .filter(|vm| vm.dir().chain().is_ok_and(|chain| chain.warm.as_deref() == Some(&warm.name)));
        WarmInfo {
            name: warm.name.clone(),
            engine: manifest.engine,
            cpus: manifest.cpus,
            memory_mib: manifest.memory_mib,
            created: manifest.created,
            memory_bytes: manifest.memory_bytes,
            allocated_bytes: allocated(warm),
            fits: reason.is_none(),
            reason,
            used_by: used_by.count(),
        }
    }

    async fn image(&self, name: &str) -> Result<Image, Refusal> {
        let (store, name) = (self.0.images.clone(), name.to_owned());
        Ok(as_root_blocking(move || store.current(&name)).await?)
    }

    /// Makes the current version of a template warm for VMs of the usual size, unless it is; `tell` hears how far it is.
    pub async fn warm_usual(&self, name: &str, tell: impl Fn(u8, &str)) -> Result<(), Refusal> {
        let image = self.image(name).await?;
        let engine = self.0.engines.chosen();
        let failed =
            |error: &dyn std::error::Error| Refusal::new(ErrorCode::Internal, chain(error).join(": "));
        let fit = engine.fit().await.map_err(|error| failed(&error))?;
        let size = usual(&image);
        if WarmStates::of(&image).find(engine.name(), &fit, size.cpus, size.memory_mib).is_none() {
            make::make(&self.0, &image, size, tell).await.map_err(|error| failed(&error))?;
        }
        Ok(())
    }

    /// Begins to make the bundled image warm for VMs of the usual size where nobody has made it so yet.
    pub async fn warm_at_first(&self) {
        if !self.0.warms_by_itself {
            return;
        }
        for name in [BUNDLED, MICRO] {
            // Without an image there is nothing to make warm; whoever creates a VM is told.
            let Ok(image) = self.image(name).await else { continue };
            let (warm, damaged) = WarmStates::of(&image).list();
            let size = usual(&image);
            if warm.is_empty() && damaged.is_empty() && self.0.missed.again(&image.version, size, size) {
                self.0.begin_warming(&image, name, size);
            }
        }
    }

    /// Begins to make a warm state.
    pub async fn warm(&self, name: &str, request: WarmRequest) -> Result<Task, Refusal> {
        let image = self.image(name).await?;
        let size = Size {
            cpus: request.cpus.unwrap_or(usual(&image).cpus),
            memory_mib: request.memory_mib.unwrap_or(usual(&image).memory_mib),
        };
        check_size(size.cpus, size.memory_mib)
            .map_err(|error| Refusal::new(ErrorCode::InvalidRequest, error.to_string()))?;
        let (task, told) = self.0.tasks.begin_told(&title(name, size))?;
        make_warm(Arc::clone(&self.0), image, size, task);
        Ok(told)
    }
}

/// Bytes on disk of a warm state.
fn allocated(warm: &Warm) -> u64 {
    as_root(|| {
        let files = fs::read_dir(warm.path()).into_iter().flatten().flatten();
        files.filter_map(|file| Some(file.metadata().ok()?.blocks() * 512)).sum()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_size_is_made_at_once_and_another_when_it_was_missed_twice_and_each_only_once() {
        let missed = Missed::default();
        let usual = Size { cpus: 1, memory_mib: 1024 };
        let times = |size| (0..4).map(|_| missed.again("v1", size, usual)).collect::<Vec<_>>();
        assert_eq!(times(Size { cpus: 1, memory_mib: 1024 }), [true, false, false, false]);
        assert_eq!(times(Size { cpus: 2, memory_mib: 1024 }), [false, true, false, false]);
        assert!(missed.again("v2", usual, usual));
    }
}
