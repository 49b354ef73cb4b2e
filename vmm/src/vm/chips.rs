//! The interrupt controllers and the timer in the kernel, as plain data.

use std::fmt;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};
use serde::{Deserialize, Serialize};

use super::{Vm, VmError, call};

/// PIC, IOAPIC and PIT.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChipsState {
    /// The first PIC.
    pub master: kvm_irqchip,
    /// The second PIC.
    pub slave: kvm_irqchip,
    /// The IOAPIC, with what it has not delivered yet.
    pub ioapic: kvm_irqchip,
    /// The timer.
    pub pit: kvm_pit_state2,
}

impl fmt::Debug for ChipsState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChipsState").finish_non_exhaustive()
    }
}

impl Vm {
    /// What is saved of the chips; virtual CPUs and devices must stand.
    pub fn save_chips(&self) -> Result<ChipsState, VmError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd.get_irqchip(&mut chip).map_err(call("KVM_GET_IRQCHIP")).map(|()| chip)
        };
        Ok(ChipsState {
            master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            pit: self.fd.get_pit2().map_err(call("KVM_GET_PIT2"))?,
        })
    }

    /// Makes fresh chips into these. The local APICs must be there: what the IOAPIC has not delivered it delivers now.
    pub fn restore_chips(&self, state: &ChipsState) -> Result<(), VmError> {
        let chips = [
            (KVM_IRQCHIP_PIC_MASTER, state.master),
            (KVM_IRQCHIP_PIC_SLAVE, state.slave),
            (KVM_IRQCHIP_IOAPIC, state.ioapic),
        ];
        for (chip_id, chip) in chips {
            let chip = kvm_irqchip { chip_id, ..chip };
            self.fd.set_irqchip(&chip).map_err(call("KVM_SET_IRQCHIP"))?;
        }
        self.fd.set_pit2(&state.pit).map_err(call("KVM_SET_PIT2"))
    }
}
