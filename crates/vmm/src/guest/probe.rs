//! Whether this KVM delivers hypercalls: a guest of one page that tries it once.
//!
//! Some KVMs say that they do (`KVM_CAP_EXIT_HYPERCALL`) and never come back from the instruction.
//! So the VMM runs this on a throw-away vCPU, with a time limit, before it chooses the
//! [`Transport`]. It is real-mode code: no page tables, no long mode, and ring 0 by nature.
//!
//! | first exit | means |
//! |---|---|
//! | `KVM_EXIT_HYPERCALL`, number 12 | hypercalls work |
//! | `KVM_EXIT_IO`, IN of 4 at [`PORT`](super::PORT), RAX marked | answered by KVM: not enabled |
//! | anything else, or none in time | they do not |

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use polder_units::{Gpa, PAGE_SIZE};

use super::code::Transport;
use super::image::Chunk;
use super::request::{KVM_HC_MAP_GPA_RANGE, PORT};

/// RBP at the IN: the hypercall came back (its answer is in RAX).
#[cfg(test)]
const HYPERCALL_PROBE_RETURNED: u64 = 0x5afe;

const CODE: Gpa = Gpa::new(0x1000);

/// The guest that tries the hypercall.
#[derive(Clone, PartialEq, Debug)]
pub struct HypercallProbe {
    /// What to load; the guest has [`HypercallProbe::MEMORY`] bytes from 0 on.
    pub chunk: Chunk,
    /// For `KVM_SET_REGS`.
    pub regs: kvm_regs,
}

impl HypercallProbe {
    /// Bytes of memory that the guest needs: 8 KiB.
    pub const MEMORY: u64 = 2 * PAGE_SIZE;

    /// The guest that tries `transport`'s instruction, to ask that the page at 0 become private;
    /// `None` for [`Transport::Port`].
    pub fn new(transport: Transport) -> Option<Self> {
        let last = match transport {
            Transport::Port => return None,
            Transport::Vmcall => 0xc1,
            Transport::Vmmcall => 0xd9,
        };
        let port = PORT.to_le_bytes()[0];
        #[rustfmt::skip]
        let bytes = vec![
            0x0f, 0x01, last,                     // vmcall or vmmcall
            0xbd, 0xfe, 0x5a,                     // mov bp, 0x5afe
            0x66, 0xe5, port,                     // in eax, PORT
            0xf4,                                 // hlt
            0xeb, 0xfd,                           // jmp to the hlt
        ];
        let regs = kvm_regs {
            rax: KVM_HC_MAP_GPA_RANGE,
            rbx: 0,
            rcx: 1,
            rdx: super::request::MAP_GPA_RANGE_ENCRYPTED,
            rip: CODE.get(),
            rflags: 1 << 1,
            ..Default::default()
        };
        Some(Self { chunk: Chunk { gpa: CODE, bytes }, regs })
    }

    /// For `KVM_SET_SREGS`: `reset`, which `KVM_GET_SREGS` gave, with code from address 0 on.
    pub fn sregs(&self, reset: &kvm_sregs) -> kvm_sregs {
        kvm_sregs { cs: kvm_segment { base: 0, selector: 0, ..reset.cs }, ..*reset }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_and_the_port_are_in_the_code() {
        assert_eq!(HypercallProbe::new(Transport::Port), None);
        let bytes = HypercallProbe::new(Transport::Vmmcall).unwrap().chunk.bytes;
        let mark = u16::from_le_bytes([bytes[4], bytes[5]]);
        assert_eq!((u64::from(mark), u16::from(bytes[8])), (HYPERCALL_PROBE_RETURNED, PORT));
    }
}
