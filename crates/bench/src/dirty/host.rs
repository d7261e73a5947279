//! The host's writes of 64 bytes, with the log on and off. `polder bench access` has them next to a
//! bare mapping.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use polder::guest_memory::GuestMemory;
use polder::units::{PAGE_SIZE, PageCount};
use polder::{Holder, Memory, OnBusy, Slot, VmId};
use polder_vmm::Vm;
use vm_memory::{Bytes, GuestAddress};

use crate::turns::compare;
use crate::{BenchError, Row};

const PAGES: u32 = 1024;
const BYTES: [u8; 64] = [7; 64];
const OFF: &str = "the same, log off";

/// Memory of Polder's, and the ways to write to it.
struct Written {
    memory: Arc<Memory>,
    vm: VmId,
    through_traits: GuestMemory,
    // The memory goes first.
    _of: Vm,
}

impl Written {
    fn new(log: bool) -> Result<Self, BenchError> {
        let of = Vm::new(polder::HostKind::Memfd)?;
        let memory = Arc::new(Memory::builder(PageCount::from(PAGES)).shared().build()?);
        let vm = of.attach(&memory)?;
        memory.bind(vm, Slot(0), Vm::RAM.gfn(), memory.all_pages())?;
        if log {
            memory.start_dirty_log()?;
        }
        let through_traits = memory.guest_memory(vm, Holder::new("a device"), OnBusy::Wait)?;
        Ok(Self { memory, vm, through_traits, _of: of })
    }
}

type Write = fn(&Written, u64);

const WAYS: [(&str, Write); 3] = [
    ("Memory::write", |it, at| {
        it.memory.write(it.vm, super::on(Vm::RAM, at), &BYTES).expect("it is shared");
    }),
    ("HostView::touch_write", |it, at| {
        it.memory.host_view().touch_write(at, &BYTES).expect("it is shared");
    }),
    ("the vm-memory traits", |it, at| {
        it.through_traits
            .write_slice(&BYTES, GuestAddress(Vm::RAM.get() + at))
            .expect("it is shared");
    }),
];

pub(super) fn rows(turn: Duration) -> Result<Vec<Row>, BenchError> {
    let (off, on) = (Written::new(false)?, Written::new(true)?);
    let mut rows = Vec::new();
    for (name, write) in WAYS {
        let costs = compare(turn, &mut |count| repeat(count, |at| write(&off, at)), &mut |count| {
            repeat(count, |at| write(&on, at))
        });
        super::check(on.memory.take_dirty_log()?.count().get(), 1)?;
        rows.push(Row::of_costs(format!("64-byte write, {name}"), OFF, "ns", costs));
    }
    Ok(rows)
}

/// Writes that take turns among all pages.
fn repeat(count: u32, mut write: impl FnMut(u64)) {
    for at in 0..u64::from(count) {
        write(black_box(at * 67 % u64::from(PAGES) * PAGE_SIZE));
    }
}
