//! What to say when KVM cannot go on with a virtual CPU.

use kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;
use kvm_ioctls::VcpuFd;

/// Flag of an emulation failure: the instruction's bytes are there (api.rst, KVM_EXIT_INTERNAL_ERROR).
const INSTRUCTION_BYTES: u64 = 1;

/// Tells of KVM_EXIT_INTERNAL_ERROR, with the instruction where KVM gives it.
pub(super) fn internal_error(vcpu: &mut VcpuFd) -> String {
    let position = vcpu.get_regs().map_or(0, |registers| registers.rip);
    // SAFETY: the exit was KVM_EXIT_INTERNAL_ERROR, for which the kernel fills this member; it is plain data.
    let details = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    if details.suberror != KVM_INTERNAL_ERROR_EMULATION {
        return format!("KVM failed inside (suberror {}) at {position:#x}", details.suberror);
    }
    let bytes = instruction(details.ndata, &details.data);
    format!(
        "KVM could not emulate an instruction at {position:#x}{bytes}: this machine's KVM does not run this guest; \
         see: catalyst doctor"
    )
}

/// The data are flags, the number of bytes and the bytes themselves.
fn instruction(ndata: u32, data: &[u64]) -> String {
    if ndata < 3 || data[0] & INSTRUCTION_BYTES == 0 {
        return String::new();
    }
    let bytes: Vec<u8> = data[1..4].iter().flat_map(|word| word.to_le_bytes()).collect();
    let length = usize::from(bytes[0]).min(15);
    let text: Vec<String> = bytes[1..=length].iter().map(|byte| format!("{byte:02x}")).collect();
    format!(", bytes {}", text.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_instruction_is_told_where_kvm_gives_it() {
        let mut data = [0; 16];
        data[0] = 1;
        data[1] = u64::from_le_bytes([3, 0xf0, 0x0f, 0xc7, 0, 0, 0, 0]);
        assert_eq!(instruction(4, &data), ", bytes f0 0f c7");
        data[0] = 0;
        assert_eq!(instruction(4, &data), "");
        data[0] = 1;
        data[1] = u64::MAX;
        assert_eq!(instruction(4, &data).split(' ').count(), 2 + 15);
        assert_eq!(instruction(1, &data), "");
    }
}
