//! Which engine VMs are started with: what `--engine` names, or what the probe of `/dev/kvm` says.

use std::sync::Arc;

use catalyst_api::EngineName;
use catalyst_vmm::probe::{ProbeReport, Verdict};
use futures_util::future::BoxFuture;
use thiserror::Error;

use super::kvm::KvmEngine;
use super::qemu::QemuEngine;
use super::{Engine, EngineError, VmProcess, process};
use crate::settings::EngineChoice;
use crate::store::VmDir;

/// Why the engine that was asked for cannot be had.
#[derive(Debug, Error)]
#[error(
    "Engine 'kvm' cannot be used here: {why}; leave --engine out, and 'catalyst doctor' says what the machine lacks"
)]
pub struct Unfit {
    why: String,
}

/// The engine that VMs are started with, and all that VMs of earlier daemons may run on.
pub struct Engines {
    chosen: EngineName,
    why: String,
    named: bool,
    kvm: Arc<dyn Engine>,
    qemu: Arc<dyn Engine>,
}

impl std::fmt::Debug for Engines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engines")
            .field("chosen", &self.chosen)
            .field("why", &self.why)
            .finish_non_exhaustive()
    }
}

impl Engines {
    /// Chooses; `probe` is asked for only where its answer counts. It takes some 80 ms.
    pub async fn choose(
        choice: EngineChoice,
        probe: impl Future<Output = Result<ProbeReport, String>>,
    ) -> Result<Self, Unfit> {
        let (chosen, why) = match choice.named() {
            Some(EngineName::Qemu) => (EngineName::Qemu, "--engine qemu names it".to_owned()),
            named => decide(named.is_some(), probe.await)?,
        };
        Ok(Self::new(
            chosen,
            why,
            choice.named().is_some(),
            Arc::new(KvmEngine::default()),
            Arc::new(QemuEngine::default()),
        ))
    }

    /// The engines of both names. `why` is the chosen one's reason, `named` whether `--engine` names it.
    pub fn new(
        chosen: EngineName,
        why: String,
        named: bool,
        kvm: Arc<dyn Engine>,
        qemu: Arc<dyn Engine>,
    ) -> Self {
        Self { chosen, why, named, kvm, qemu }
    }

    /// The one that VMs are started with.
    pub fn chosen(&self) -> &dyn Engine {
        self.of(self.chosen)
    }

    /// Its name.
    pub fn name(&self) -> EngineName {
        self.chosen
    }

    /// Why that one: the end of a sentence for people.
    pub fn why(&self) -> &str {
        &self.why
    }

    /// Whether it was named, not measured.
    pub fn is_named(&self) -> bool {
        self.named
    }

    /// Finds the process that an earlier daemon started for the VM in `dir`, on whatever engine; see
    /// [`Engine::adopt`].
    pub fn adopt(
        &self,
        dir: VmDir,
        user: u32,
    ) -> BoxFuture<'_, Result<Option<Arc<dyn VmProcess>>, EngineError>> {
        self.of(process::noted_engine(&dir.run())).adopt(dir, user)
    }

    /// The engine of that name.
    pub fn of(&self, name: EngineName) -> &dyn Engine {
        match name {
            EngineName::Kvm => self.kvm.as_ref(),
            EngineName::Qemu => self.qemu.as_ref(),
        }
    }
}

/// What the probe makes of it. Who names engine kvm gets it also where KVM is slow: that is a figure, not a lack, and
/// says nothing of small guests such as those of our tests. What KVM cannot do at all is refused by name.
fn decide(named: bool, probe: Result<ProbeReport, String>) -> Result<(EngineName, String), Unfit> {
    let on_qemu = |why: String| Ok((EngineName::Qemu, format!("{why}; VMs run on QEMU's software CPU")));
    match probe {
        Ok(report) => match report.verdict {
            Verdict::Usable => Ok((EngineName::Kvm, report.summary)),
            Verdict::Slow { .. } if named => {
                let why = format!("--engine kvm names it, although {}", report.summary);
                tracing::warn!(why, "engine kvm");
                Ok((EngineName::Kvm, why))
            }
            _ if named => Err(Unfit { why: report.summary }),
            _ => on_qemu(report.summary),
        },
        Err(why) if named => Err(Unfit { why: format!("KVM could not be probed: {why}") }),
        Err(why) => on_qemu(format!("KVM could not be probed: {why}")),
    }
}

#[cfg(test)]
mod tests {
    use catalyst_vmm::probe::Device;

    use super::*;

    fn report(verdict: Verdict) -> ProbeReport {
        ProbeReport {
            device: Device::Opened,
            api_version: Some(12),
            instructions_per_second: None,
            checks: Vec::new(),
            verdict,
            out_of_time: false,
            summary: "KVM is as it is".to_owned(),
        }
    }

    fn slow() -> Verdict {
        Verdict::Slow { instructions_per_second: 1, required: 2 }
    }

    async fn chosen(
        choice: EngineChoice,
        probe: Result<ProbeReport, String>,
    ) -> Result<(EngineName, String), String> {
        let engines = Engines::choose(choice, async { probe }).await.map_err(|error| error.to_string())?;
        assert_eq!(engines.chosen().name(), engines.name());
        Ok((engines.name(), engines.why().to_owned()))
    }

    #[tokio::test]
    async fn measured_it_is_kvm_only_where_that_is_usable() {
        use EngineChoice::Auto;
        assert_eq!(chosen(Auto, Ok(report(Verdict::Usable))).await.unwrap().0, EngineName::Kvm);
        let lack = Verdict::Unusable { reason: "why".to_owned() };
        for probe in
            [Ok(report(slow())), Ok(report(Verdict::Absent)), Ok(report(lack)), Err("no probe".to_owned())]
        {
            let (name, why) = chosen(Auto, probe).await.unwrap();
            assert_eq!(name, EngineName::Qemu);
            assert!(why.starts_with("KVM ") && why.contains("QEMU"), "{why}");
        }
    }

    #[tokio::test]
    async fn a_named_kvm_may_be_slow_but_what_it_cannot_do_is_refused_with_the_reason() {
        use EngineChoice::Kvm;
        assert_eq!(chosen(Kvm, Ok(report(Verdict::Usable))).await.unwrap().0, EngineName::Kvm);
        assert!(chosen(Kvm, Ok(report(slow()))).await.unwrap().1.contains("although KVM is as it is"));
        let refused = chosen(Kvm, Ok(report(Verdict::Absent))).await.unwrap_err();
        assert!(refused.contains("KVM is as it is") && refused.contains("catalyst doctor"), "{refused}");
        assert!(chosen(Kvm, Err("no such file".to_owned())).await.unwrap_err().contains("no such file"));
    }

    #[tokio::test]
    async fn a_named_qemu_asks_no_probe() {
        let never = async { panic!("it was asked") };
        let engines = Engines::choose(EngineChoice::Qemu, never).await.unwrap();
        assert_eq!(engines.name(), EngineName::Qemu);
    }
}
