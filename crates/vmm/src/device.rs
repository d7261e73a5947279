//! A device: reads its request and a payload from shared memory, writes an answer there.
//!
//! It is what a device model is to Polder: a party on the host that moves bytes by the API, of
//! addresses that a guest chose. Anything but shared memory is refused by the API itself.

use polder::units::Gpa;
use polder::{Memory, VmId};

use crate::guest::{DeviceRequest, STATUS_OFFSET};
use crate::scenario::Outcome;

/// Looks at the request at `gpa` and does it. Returns what the doorbell answers.
pub(crate) fn ring(memory: &Memory, vm: VmId, gpa: Gpa) -> Outcome {
    let mut bytes = [0; size_of::<[u64; 5]>()];
    let Some(status_at) = gpa.checked_add(STATUS_OFFSET) else { return Outcome::Invalid };
    if memory.read(vm, gpa, &mut bytes).is_err() {
        return Outcome::Fault;
    }
    let mut words = [0; 5];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(size_of::<u64>())) {
        *word = u64::from_le_bytes(bytes.try_into().expect("a chunk of a word's length"));
    }
    let status = match DeviceRequest::parse(words) {
        Ok(request) => complement(memory, vm, &request),
        Err(_) => Outcome::Invalid,
    };
    let status = i64::from(status.code()).to_le_bytes();
    match memory.write(vm, status_at, &status) {
        Ok(()) => Outcome::Done,
        // The guest took the page back meanwhile.
        Err(_) => Outcome::Fault,
    }
}

/// The work itself: the answer is the payload with every bit flipped.
fn complement(memory: &Memory, vm: VmId, request: &DeviceRequest) -> Outcome {
    let len = usize::try_from(request.len).expect("a parsed length is at most 1M");
    let mut payload = vec![0; len];
    if memory.read(vm, request.source, &mut payload).is_err() {
        return Outcome::Fault;
    }
    for byte in &mut payload {
        *byte = !*byte;
    }
    match memory.write(vm, request.destination, &payload) {
        Ok(()) => Outcome::Done,
        Err(_) => Outcome::Fault,
    }
}
