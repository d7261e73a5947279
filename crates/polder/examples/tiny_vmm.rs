//! A VMM in a page: a guest on KVM whose memory is Polder's, and who shares a page of it.
//!
//! ```text
//! cargo run -p polder --example tiny_vmm
//! ```
//!
//! The guest writes a greeting on a page of its own, which the host can't read; asks by a port for the
//! page to be shared; reads the host's reply there, prints it by another port, and takes the page back.

use std::error::Error;
use std::sync::Arc;

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use polder::units::{ByteSize, Gfn, GfnRange, Gpa, PageRange};
use polder::{Contents, Memory, OnBusy, Refusal, Slot, Visibility, VmId};

/// The guest's requests: each is a byte written to a port.
const SHARE: u8 = 0x10;
const PRINT: u8 = 0x11;
const UNSHARE: u8 = 0x12;

/// Where the guest's code is loaded, and where it starts.
const CODE: Gpa = Gpa::new(0x1000);
/// The page that it shares.
const MAILBOX: Gpa = Gpa::new(0x2000);

/// The guest, in 16-bit code.
#[rustfmt::skip]
const GUEST: &[u8] = &[
    0xc7, 0x06, 0x00, 0x20, b'h', b'e', // mov word [0x2000], "he"
    0xc7, 0x06, 0x02, 0x20, b'l', b'l', // mov word [0x2002], "ll"
    0xc6, 0x06, 0x04, 0x20, b'o',       // mov byte [0x2004], "o"
    0xb0, 0x02,                         // mov al, 2
    0xe6, SHARE,                        // out SHARE, al       ; frame 2, please
    0xbe, 0x00, 0x20,                   // mov si, 0x2000
    0xac,                               // next: lodsb
    0x08, 0xc0,                         // or al, al
    0x74, 0x04,                         // jz done
    0xe6, PRINT,                        // out PRINT, al
    0xeb, 0xf7,                         // jmp next
    0xb0, 0x02,                         // done: mov al, 2
    0xe6, UNSHARE,                      // out UNSHARE, al     ; mine again
    0xf4,                               // hlt
];

/// Makes memory and a VM, runs the guest to its end, and returns what it printed.
///
/// # Errors
/// Where KVM or userfaultfd can't be used here: the error says what would help.
pub(crate) fn run() -> Result<String, Box<dyn Error>> {
    let kvm = Kvm::new()?;
    let vm = Arc::new(kvm.create_vm()?);

    // One object: private, and owed until the code is there and nothing more is to come.
    let size: ByteSize = "1M".parse()?;
    let memory = Memory::builder(size.pages()?).owed().build()?;
    let id = memory.attach(Arc::clone(&vm))?;
    let all = PageRange::new(0u32.into(), memory.pages())?;
    memory.bind(id, Slot(0), Gfn::from(0), all)?;
    let code = memory.pages_of(id, GfnRange::one(CODE.gfn()))?;
    memory.populate(code[0], GUEST)?;
    memory.settle()?;

    let mut vcpu = vm.create_vcpu(0)?;
    start(&vcpu)?;
    let mut console = String::new();
    loop {
        match vcpu.run()? {
            VcpuExit::IoOut(port, bytes) => {
                let byte = bytes.first().copied().unwrap_or_default();
                request(&memory, id, (port, byte), &mut console)?;
            }
            VcpuExit::Hlt => return Ok(console),
            // Beyond memory: a real VMM asks its devices first.
            VcpuExit::MmioRead(gpa, _) | VcpuExit::MmioWrite(gpa, _) => {
                let fault = memory.guest_fault(id, Gpa::new(gpa), Visibility::Shared)?;
                if let Some(fault) = fault {
                    return Err(format!("the guest went astray: {fault}").into());
                }
            }
            exit => return Err(format!("the guest ended in {exit:?}").into()),
        }
    }
}

/// Real mode, at the code.
fn start(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (CODE.get(), 2);
    vcpu.set_regs(&regs)
}

/// Does what the guest asks for. Its frame number is an allegation: memory refuses what is none.
fn request(
    memory: &Memory,
    vm: VmId,
    (port, byte): (u16, u8),
    console: &mut String,
) -> Result<(), polder::Error> {
    let frame = GfnRange::one(Gfn::from(u32::from(byte)));
    let convert =
        |to| memory.convert_gfns(vm, frame, to, Contents::Preserve, OnBusy::Wait).map(|_| ());
    match u8::try_from(port) {
        Ok(SHARE) => {
            let mut greeting = [0; 5];
            let refused = memory.read(vm, MAILBOX, &mut greeting);
            assert!(
                matches!(refused, Err(polder::Error::Refused(Refusal::Private { .. }))),
                "a private page was read"
            );
            convert(Visibility::Shared)?;
            memory.read(vm, MAILBOX, &mut greeting)?;
            let reply = format!("{} to you, too\n\0", String::from_utf8_lossy(&greeting));
            memory.write(vm, MAILBOX, reply.as_bytes())
        }
        Ok(UNSHARE) => convert(Visibility::Private),
        Ok(PRINT) => {
            console.push(char::from(byte));
            Ok(())
        }
        // What the guest says to nobody is lost.
        _ => Ok(()),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    print!("{}", run()?);
    Ok(())
}
