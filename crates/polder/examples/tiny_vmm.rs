//! A VMM in a page: a guest on KVM whose memory is Polder's, and who shares a page of it.
//!
//! ```text
//! cargo run -p polder --example tiny_vmm
//! ```
//!
//! The guest lays out a virtqueue with a greeting on a page of its own, which the host can't read;
//! asks by a port for the page to be shared, and notifies the device. The device takes the greeting
//! from the queue and puts its reply there; the page can't be taken away from it meanwhile. The
//! guest prints the reply by another port, and takes the page back.

use std::error::Error;
use std::io::{Read, Write};
use std::sync::Arc;

use polder::guest_memory::GuestMemory;
use polder::kvm_ioctls::{self, Kvm, VcpuExit, VcpuFd};
use polder::units::{ByteSize, Gfn, GfnRange, Gpa};
use polder::{Contents, Holder, Memory, OnBusy, Refusal, Slot, Visibility, VmId};
use virtio_queue::{DescriptorChain, Queue, QueueT};

/// The guest's requests: each is a byte written to a port.
const SHARE: u8 = 0x10;
const PRINT: u8 = 0x11;
const UNSHARE: u8 = 0x12;
const NOTIFY: u8 = 0x13;

/// Where the guest's code is loaded, and where it starts.
const CODE: Gpa = Gpa::new(0x1000);
/// The page that it shares: a split virtqueue of two descriptors (virtio 1.2, 2.7) and its buffers.
const QUEUE: Gpa = Gpa::new(0x2000);
const DESCRIPTORS: u64 = 0x2000;
const AVAILABLE: u64 = 0x2020;
const USED: u64 = 0x2030;

/// The guest, in 16-bit code.
#[rustfmt::skip]
const GUEST: &[u8] = &[
    0xfc,                               // cld
    0xbe, 0x40, 0x10,                   // mov si, 0x1040      ; LAID_OUT
    0xbf, 0x00, 0x20,                   // mov di, 0x2000
    0xb9, 0x55, 0x00,                   // mov cx, 0x55
    0xf3, 0xa4,                         // rep movsb
    0xb0, 0x02,                         // mov al, 2
    0xe6, SHARE,                        // out SHARE, al       ; frame 2, please
    0xe6, NOTIFY,                       // out NOTIFY, al
    0xbe, 0x60, 0x20,                   // mov si, 0x2060      ; the reply
    0xac,                               // next: lodsb
    0x08, 0xc0,                         // or al, al
    0x74, 0x04,                         // jz done
    0xe6, PRINT,                        // out PRINT, al
    0xeb, 0xf7,                         // jmp next
    0xb0, 0x02,                         // done: mov al, 2
    0xe6, UNSHARE,                      // out UNSHARE, al     ; mine again
    0xf4,                               // hlt
];

/// What it copies to its page.
#[rustfmt::skip]
const LAID_OUT: &[u8] = &[
    // Descriptors: address, length, flags, next. To read 5 bytes at 0x2050, then to write 32.
    0x50, 0x20, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 1, 0, 1, 0,
    0x60, 0x20, 0, 0, 0, 0, 0, 0, 32, 0, 0, 0, 2, 0, 0, 0,
    // The available ring: flags; one chain so far; it begins with descriptor 0.
    0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    // The used ring, where nothing is yet.
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    b'h', b'e', b'l', b'l', b'o',
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
    let memory = Arc::new(Memory::builder(size.pages()?).owed().build()?);
    let id = memory.attach(Arc::clone(&vm))?;
    memory.bind(id, Slot(0), Gfn::from(0), memory.all_pages())?;
    let code = memory.pages_of(id, GfnRange::one(CODE.gfn()))?;
    let mut image = GUEST.to_vec();
    image.resize(0x40, 0);
    image.extend(LAID_OUT);
    memory.populate(code[0], &image)?;
    memory.settle()?;
    let guest = memory.guest_memory(id, Holder::new("greeter"), OnBusy::Wait)?;
    let mut device = Greeter { memory: Arc::clone(&memory), vm: id, guest, queue: queue()? };

    let mut vcpu = vm.create_vcpu(0)?;
    start(&vcpu)?;
    let mut console = String::new();
    loop {
        match vcpu.run()? {
            VcpuExit::IoOut(port, bytes) => {
                let byte = bytes.first().copied().unwrap_or_default();
                match u8::try_from(port) {
                    Ok(SHARE) => share(&memory, id, byte)?,
                    Ok(UNSHARE) => convert(&memory, id, byte, Visibility::Private)?,
                    Ok(NOTIFY) => device.notified()?,
                    Ok(PRINT) => console.push(char::from(byte)),
                    // What the guest says to nobody is lost.
                    _ => {}
                }
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

/// Converts a frame for the guest. Its number is an allegation: memory refuses what is none.
fn convert(memory: &Memory, vm: VmId, frame: u8, to: Visibility) -> Result<(), polder::Error> {
    let frame = GfnRange::one(Gfn::from(u32::from(frame)));
    memory.convert_gfns(vm, frame, to, Contents::Preserve, OnBusy::Wait).map(drop)
}

fn share(memory: &Memory, vm: VmId, frame: u8) -> Result<(), polder::Error> {
    let refused = memory.read(vm, QUEUE, &mut [0; 5]);
    assert!(
        matches!(refused, Err(polder::Error::Refused(Refusal::Private { .. }))),
        "a private page was read"
    );
    convert(memory, vm, frame, Visibility::Shared)
}

/// A device: answers the greetings that it finds in its queue.
struct Greeter {
    memory: Arc<Memory>,
    vm: VmId,
    guest: GuestMemory,
    queue: Queue,
}

/// Where the guest's driver says that the queue is; a real one says so by the device's registers.
fn queue() -> Result<Queue, virtio_queue::Error> {
    let address = polder::vm_memory::GuestAddress;
    let mut queue = Queue::new(2)?;
    queue.try_set_desc_table_address(address(DESCRIPTORS))?;
    queue.try_set_avail_ring_address(address(AVAILABLE))?;
    queue.try_set_used_ring_address(address(USED))?;
    queue.set_ready(true);
    Ok(queue)
}

impl Greeter {
    /// Does what is in the queue. An error ends this VMM; a real one stops the device
    /// (`DEVICE_NEEDS_RESET`).
    fn notified(&mut self) -> Result<(), Box<dyn Error>> {
        while let Some(chain) = self.queue.pop_descriptor_chain(&self.guest) {
            let head = chain.head_index();
            let written = self.answer(chain)?;
            self.queue.add_used(&self.guest, head, written)?;
        }
        Ok(())
    }

    /// Answers one greeting; returns how many bytes that took. What the chain names is pinned here,
    /// until it has been read and written; nothing is any more when the guest learns that it is
    /// done.
    fn answer(&self, chain: DescriptorChain<&GuestMemory>) -> Result<u32, Box<dyn Error>> {
        let mut reader = chain.clone().reader(&self.guest)?;
        let mut writer = chain.writer(&self.guest)?;
        let taken = convert(&self.memory, self.vm, 2, Visibility::Private);
        assert!(taken.is_err_and(|why| why.to_string().contains("greeter")), "it is in use");
        let mut greeting = String::new();
        reader.read_to_string(&mut greeting)?;
        writer.write_all(format!("{greeting} to you, too\n\0").as_bytes())?;
        Ok(u32::try_from(writer.bytes_written())?)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    print!("{}", run()?);
    Ok(())
}
