//! A guest: what it writes into its memory and into its registers.

use kvm_bindings::kvm_regs;
use polder::units::{Gpa, PAGE_BYTES, PAGE_SIZE, PageCount, PageIndex, PageRange};
use polder::{HostKind, Memory, Slot, Visibility, Vm};
use polder_vmm::guest::{DeviceRequest, PORT, Request, number};
use polder_vmm::{Accepting, Accesses, Next, Requests};

use crate::bytes::Bytes;
use crate::oracle::{HALF, Oracle, PAGES, SLOTS};

/// Steps at most: more show no more.
const STEPS: usize = 200;

/// Where an address is made to lie as a rule: at memory, around it, and nowhere near.
const PLACES: [u64; 6] =
    [SLOTS[0].0, SLOTS[1].0, SLOTS[0].0 + HALF - 1, SLOTS[1].0 + HALF - 1, SLOTS[0].0 - 1, 0];

/// What a vCPU's exit may be of besides an IN of 4 bytes from the port of requests.
const ACCESSES: [(bool, u16, usize); 4] =
    [(false, 0xe0, 4), (true, 0xe1, 4), (true, 0xe0, 1), (true, 0xe0, 400)];

/// Has a guest do what bytes say: write, read, and request anything.
///
/// # Panics
/// If an answer, a page or a byte is not as the oracle has it.
pub fn guest(bytes: &[u8]) {
    let memory = memory();
    let vm = memory.bindings()[0].0;
    let requests = Requests::new(&memory, vm).expect("/dev/zero is there");
    let accepting = Accepting::default();
    let vcpu = memory.machine_vcpu(vm).expect("a VM of the machine's");
    let guest = Accesses::new(vcpu, (&memory, vm), &accepting);
    let mut oracle = Oracle::new();
    let mut bytes = Bytes(bytes);
    for _ in 0..STEPS {
        if bytes.is_empty() {
            break;
        }
        match bytes.byte() % 4 {
            0 => write(&guest, &mut oracle, &mut bytes),
            1 => write_request(&guest, &mut oracle, &mut bytes),
            _ => ask(&requests, &mut oracle, &mut bytes),
        }
        compare_visibility(&memory, &oracle);
    }
    compare_bytes(&memory, &guest, &oracle);
}

fn memory() -> Memory {
    let pages = PageCount::new(PAGES).expect("a few");
    let memory = Memory::builder(pages).host(HostKind::Machine).build().expect("small");
    let vm = memory.attach(Vm::Machine).expect("the machine has VMs");
    for ((slot, (gfn, page)), count) in (0..).zip(SLOTS).zip([HALF; 2]) {
        let range = PageRange::between(page, page + count).expect("some");
        let gfn = polder::units::Gfn::new(gfn).expect("low");
        memory.bind(vm, Slot(slot), gfn, range).expect("nothing is there yet");
    }
    memory
}

/// An address that often makes sense.
fn address(bytes: &mut Bytes<'_>) -> u64 {
    match bytes.byte() % 8 {
        0 => bytes.word(),
        1 => bytes.of(&PLACES) * PAGE_SIZE + u64::from(bytes.byte()),
        _ => (bytes.of(&PLACES) + u64::from(bytes.byte() % 8)) * PAGE_SIZE,
    }
}

fn count(bytes: &mut Bytes<'_>) -> u64 {
    match bytes.byte() % 8 {
        0 => bytes.word(),
        1 => 1 << (bytes.byte() % 64),
        few => u64::from(few - 1),
    }
}

/// Writes a few bytes, where there is memory.
fn write(guest: &Accesses<'_>, oracle: &mut Oracle, bytes: &mut Bytes<'_>) {
    let gpa = Gpa::new(address(bytes));
    write_at(guest, oracle, gpa, &[bytes.byte(); 8]);
}

fn write_at(guest: &Accesses<'_>, oracle: &mut Oracle, gpa: Gpa, what: &[u8]) {
    // An access is of one page here.
    if gpa.page_offset() + what.len() as u64 > PAGE_SIZE {
        return;
    }
    let written = guest.write(gpa, what);
    let place = oracle.place(gpa, what.len() as u64, false);
    assert_eq!(written.is_ok(), place.is_some(), "write at {gpa}: {written:?}");
    for (at, byte) in place.into_iter().flatten().zip(what) {
        oracle.bytes[at] = *byte;
    }
}

/// Writes a request to the device.
fn write_request(guest: &Accesses<'_>, oracle: &mut Oracle, bytes: &mut Bytes<'_>) {
    let at = Gpa::new(address(bytes));
    let words = match bytes.byte() % 4 {
        0 => std::array::from_fn(|_| bytes.word()),
        _ => {
            let len = u64::from(bytes.byte()) * 8 * (1 + u64::from(bytes.byte() % 8));
            let (source, destination) = (Gpa::new(address(bytes)), Gpa::new(address(bytes)));
            DeviceRequest { id: 1, source, len, destination }.words()
        }
    };
    for (offset, word) in (0..).step_by(8).zip(words) {
        let Some(at) = at.checked_add(offset) else { break };
        write_at(guest, oracle, at, &word.to_le_bytes());
    }
}

/// Makes a request.
fn ask(requests: &Requests<'_>, oracle: &mut Oracle, bytes: &mut Bytes<'_>) {
    let access = match bytes.byte() % 16 {
        0 => bytes.of(&ACCESSES),
        _ => (true, PORT, 4),
    };
    let known =
        [12, 12, 12, number::PROBE, number::DOORBELL, number::DONE, number::FAILED, number::NOTIFY];
    let mut registers = kvm_regs {
        rax: if bytes.byte().is_multiple_of(16) { bytes.word() } else { bytes.of(&known) },
        rbx: address(bytes),
        rcx: count(bytes),
        rdx: bytes.of(&[0, 0x10, 0, 0x10, 1, 2, 0x11]),
        ..Default::default()
    };
    if bytes.byte().is_multiple_of(16) {
        registers.rdx = bytes.word();
    }
    let request = Request::from_port(access, &registers);
    let answered = requests.answer(0, request);
    let expected = match request {
        Err(error) => Some(i64::from(error.errno())),
        Ok(request) => oracle.answer(request),
    };
    match (answered, expected) {
        (Next::Answer(answer), Some(expected)) => assert_eq!(answer, expected, "{request:?}"),
        (Next::Done { .. } | Next::Failed { .. }, None) => {}
        (answered, expected) => panic!("{request:?}: {answered:?}, not {expected:?}"),
    }
}

fn compare_visibility(memory: &Memory, oracle: &Oracle) {
    let all = PageRange::between(0, PAGES).expect("some");
    let facts = memory.facts(all).expect("all of it");
    let found: Vec<bool> = facts
        .iter()
        .flat_map(|(run, facts)| run.frames().map(|_| facts.visibility == Visibility::Private))
        .collect();
    assert_eq!(found, oracle.private, "private pages");
    assert_eq!(memory.quarantined(), [], "nothing fails here");
}

/// The guest reads what the oracle has; so does the host where pages are shared, and nothing else.
fn compare_bytes(memory: &Memory, guest: &Accesses<'_>, oracle: &Oracle) {
    for (slot, (gfn, page)) in SLOTS.into_iter().enumerate() {
        for offset in 0..HALF {
            let (gpa, page) = (Gpa::new((gfn + offset) * PAGE_SIZE), page + offset);
            let at = PageIndex::new(page).expect("some").offset();
            let expected = oracle.page_bytes(page);
            let (mut by_guest, mut by_host) = ([0xee; PAGE_BYTES], [0xee; PAGE_BYTES]);
            guest.read(gpa, &mut by_guest).expect("it is bound");
            assert!(by_guest == expected, "slot {slot}, {gpa}: the guest reads otherwise");
            let touched = memory.host_view().touch_read(at, &mut by_host).is_ok();
            assert_eq!(touched, !oracle.is_private(page), "a touch of page {page}");
            assert!(!touched || by_host == expected, "page {page}: the host reads otherwise");
        }
    }
}
