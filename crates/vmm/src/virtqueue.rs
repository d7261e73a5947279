//! A device on a virtqueue: a split ring in the guest's shared memory, driven by the `virtio-queue`
//! crate through Polder's `vm-memory` traits.
//!
//! Of each chain the device reads what is readable, and writes it back with every bit flipped to
//! what is writable. A chain that it can't reach all of is given back with nothing written: a page
//! of it is private, or lies outside memory.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use polder::guest_memory::GuestMemory;
use polder::units::{Gpa, PAGE_SIZE};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

use crate::guest::DEVICE_LEN_MAX;
use crate::scenario::Outcome;

/// The most descriptors of a queue.
const SIZE_MAX: u16 = 256;

/// What a virtqueue's device has done.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct VirtqueueStatistics {
    /// Chains that it did.
    pub chains: u64,
    /// Bytes that it wrote for them.
    pub bytes: u64,
    /// Chains that it gave back undone.
    pub refused: u64,
}

/// The device. It has one queue: the one that it was notified of last.
pub(crate) struct Virtqueue {
    guest: GuestMemory,
    queue: Mutex<Option<(Gpa, Queue)>>,
    chains: AtomicU64,
    bytes: AtomicU64,
    refused: AtomicU64,
}

impl Virtqueue {
    pub(crate) fn new(guest: GuestMemory) -> Self {
        let [chains, bytes, refused] = [(); 3].map(|()| AtomicU64::new(0));
        Self { guest, queue: Mutex::default(), chains, bytes, refused }
    }

    pub(crate) fn statistics(&self) -> VirtqueueStatistics {
        VirtqueueStatistics {
            chains: self.chains.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
        }
    }

    /// Does all chains that are available in the queue of `size` descriptors at `base`.
    pub(crate) fn notify(&self, base: Gpa, size: u64) -> Outcome {
        let mut kept = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let known =
            kept.as_ref().filter(|(at, queue)| (*at, u64::from(queue.size())) == (base, size));
        if known.is_none() {
            let Some(queue) = queue_at(base, size) else { return Outcome::Invalid };
            *kept = Some((base, queue));
        }
        let Some((_, queue)) = kept.as_mut() else { return Outcome::Invalid };
        if !queue.is_valid(&self.guest) {
            return Outcome::Fault;
        }
        // What is there now, and not what comes meanwhile.
        let Ok(end) = queue.avail_idx(&self.guest, Ordering::Acquire) else {
            return Outcome::Fault;
        };
        while queue.next_avail() != end.0 {
            // (`pop_descriptor_chain` takes a ring that it can't read for an empty one.)
            let Some(chain) = queue.iter(&self.guest).ok().and_then(|mut chains| chains.next())
            else {
                return Outcome::Fault;
            };
            let head = chain.head_index();
            let written = self.complement(chain);
            if queue.add_used(&self.guest, head, written).is_err() {
                return Outcome::Fault;
            }
        }
        Outcome::Done
    }

    /// Does one chain; returns how many bytes it wrote.
    fn complement(&self, chain: DescriptorChain<&GuestMemory>) -> u32 {
        let done = self.transfer(chain);
        match done {
            Some(written) => {
                self.chains.fetch_add(1, Ordering::Relaxed);
                self.bytes.fetch_add(u64::from(written), Ordering::Relaxed);
            }
            None => {
                self.refused.fetch_add(1, Ordering::Relaxed);
            }
        }
        done.unwrap_or(0)
    }

    /// All of a chain is pinned from before its first byte is read until its last is written.
    fn transfer(&self, chain: DescriptorChain<&GuestMemory>) -> Option<u32> {
        let mut reader = chain.clone().reader(&self.guest).ok()?;
        let mut writer = chain.writer(&self.guest).ok()?;
        let count = reader.available_bytes();
        if count as u64 > DEVICE_LEN_MAX || writer.available_bytes() < count {
            return None;
        }
        let mut payload = vec![0; count];
        reader.read_exact(&mut payload).ok()?;
        payload.iter_mut().for_each(|byte| *byte = !*byte);
        writer.write_all(&payload).ok()?;
        u32::try_from(count).ok()
    }
}

/// A queue laid out as a legacy device's (virtio 1.2, 2.7.2): descriptors, available ring, and on
/// the next page the used ring. `None` if there is no such size, or no such address.
fn queue_at(base: Gpa, size: u64) -> Option<Queue> {
    let mut queue = Queue::new(SIZE_MAX).ok()?;
    queue.try_set_size(u16::try_from(size).ok()?).ok()?;
    let available = base.checked_add(16 * size)?;
    // Flags, index, a ring of words of 2 bytes, and an event.
    let end = available.checked_add(2 * (3 + size))?;
    let used = end.get().checked_next_multiple_of(PAGE_SIZE)?;
    let address = |gpa: u64| polder::vm_memory::GuestAddress(gpa);
    queue.try_set_desc_table_address(address(base.get())).ok()?;
    queue.try_set_avail_ring_address(address(available.get())).ok()?;
    queue.try_set_used_ring_address(address(used)).ok()?;
    queue.set_ready(true);
    Some(queue)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use polder::units::{Gfn, PageCount, PageRange};
    use polder::{Contents, Holder, Memory, OnBusy, Slot, Visibility};
    use polder_require::{Facility, require};
    use proptest::prelude::*;

    use super::*;

    /// Four pages, of which the last is private; and of them as a device sees them.
    fn memory() -> Option<(Arc<Memory>, Virtqueue)> {
        let memory = Memory::builder(PageCount::from(4)).shared().build();
        let memory = Arc::new(require(Facility::Userfault, memory)?);
        let vm = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm());
        let vm = memory.attach(Arc::new(require(Facility::Kvm, vm)?)).unwrap();
        let pages = |start, end| PageRange::between(start, end).unwrap();
        memory.bind(vm, Slot(0), Gfn::from(0), pages(0, 4)).unwrap();
        let private = (pages(3, 4), Visibility::Private);
        memory.convert(private.0, private.1, Contents::Preserve, OnBusy::Wait).unwrap();
        let guest = memory.guest_memory(vm, Holder::new("a device"), OnBusy::Wait).unwrap();
        Some((memory, Virtqueue::new(guest)))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever a guest writes to its ring, the device comes to an end, and holds nothing.
        #[test]
        fn a_ring_of_any_words_ends(
            words in prop::collection::vec(
                prop_oneof![0..0x5000_u64, any::<u64>(), (0..4_u64, 0..8_u64).prop_map(|(flags, next)|
                    64 | flags << 32 | next << 48)],
                40,
            ),
            (base, size) in prop_oneof![Just((0, 8)), Just((0, 16)), any::<(u64, u64)>()],
            again in 1..4,
        ) {
            let Some((memory, device)) = memory() else { return Ok(()) };
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let vm = memory.bindings()[0].0;
            memory.write(vm, Gpa::new(0), &bytes).unwrap();
            for _ in 0..again {
                let _ = device.notify(Gpa::new(base), size);
            }
            let all = PageRange::between(0, 4).unwrap();
            let private = Visibility::Private;
            let pages = memory.convert(all, private, Contents::Preserve, OnBusy::Refuse);
            prop_assert_eq!(pages, Ok(PageCount::from(3)));
        }
    }

    #[test]
    fn a_queue_is_of_a_size_and_at_an_address_that_a_guest_can_have() {
        assert!(queue_at(Gpa::new(0x1000), 8).is_some());
        for (base, size) in [(0x1000, 0), (0x1000, 3), (0x1000, 512), (0x1000, 1 << 40)] {
            assert!(queue_at(Gpa::new(base), size).is_none(), "{size}");
        }
        for base in [0x1001, u64::MAX - 7, u64::MAX - 0x100] {
            assert!(queue_at(Gpa::new(base), 8).is_none(), "{base:#x}");
        }
        let queue = queue_at(Gpa::new(0x1000), 256).unwrap();
        assert_eq!((queue.avail_ring(), queue.used_ring()), (0x2000, 0x3000));
    }
}
