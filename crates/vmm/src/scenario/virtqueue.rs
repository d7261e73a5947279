//! Work for the device on a virtqueue: a split ring, written by the guest word by word.
//!
//! ```text
//! descriptor   address, 8 bytes | length, 4 | flags, 2 | next, 2
//! available    flags, 2 | index, 2 | heads, 2 each
//! used         flags, 2 | index, 2 | head, 4 and length, 4, each
//! ```

use polder_units::{Gpa, PAGE_SIZE};

use super::area::Area;
use super::generate::Conversions;
use super::layout::Layout;
use super::op::{Op, Outcome, Pattern, Visibility, WORD};
use super::random::Random;

/// Descriptors of the queue.
const SIZE: u64 = 8;
/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;

/// Flags of a descriptor: another one follows; the device writes.
const NEXT: u64 = 1;
const WRITE: u64 = 2;

/// What a chain reads, by offset in the payload and length; where in the answer it writes to. The
/// answer to two pieces is one.
const CHAINS: [(&[(u64, u64)], u64); 4] = [
    (&[(0, WORD)], 0),
    (&[(PAGE_SIZE - 24, 48)], 8),
    (&[(0x100, 0x80), (0x180, 2 * PAGE_SIZE)], 0x2000 - 16),
    (&[(PAGE_SIZE, 3 * PAGE_SIZE), (4 * PAGE_SIZE, PAGE_SIZE)], 0),
];

/// The queue while the ops are written.
struct Queue<'a> {
    ops: &'a mut Vec<Op>,
    base: u64,
    /// Heads made available, and lengths used, all of them.
    heads: Vec<u64>,
    used: Vec<(u64, u64)>,
}

/// Shares a queue, has the device do chains and refuse one, and takes the queue back. Payload and
/// answer are shared.
pub(super) fn chains(
    ops: &mut Vec<Op>,
    layout: &Layout,
    (payload, response): (&mut Area, &mut Area),
    conversions: Conversions,
    random: &mut Random,
) {
    let (gpa, pages) = (layout.queue.start().gpa(), layout.queue.count().get());
    let convert = |to| Op::Convert { gpa, pages, to, expect: conversions.outcome(to) };
    ops.push(convert(Visibility::Shared));
    let mut queue = Queue { ops, base: gpa.get(), heads: Vec::new(), used: Vec::new() };
    // More chains than descriptors: the ring goes round.
    for chain in CHAINS.iter().cycle().take(3 * CHAINS.len()) {
        queue.answered(chain, (payload, response), random);
    }
    response.fill_unchecked(queue.ops, 0..payload.len(), random.word());
    let is_private = conversions.initial() == Visibility::Private;
    let private = is_private.then(|| layout.flags.start().gpa().get());
    queue.refused((private, layout.end().get()), (payload, response));
    // A queue that is none.
    let notify = |queue, size, expect| Op::Notify { queue, size, expect };
    ops.push(notify(gpa, 3, Outcome::Invalid));
    ops.push(notify(Gpa::new(gpa.get() + 8), SIZE, Outcome::Invalid));
    ops.push(convert(Visibility::Private));
    if is_private {
        ops.push(notify(gpa, SIZE, Outcome::Fault));
    }
}

impl Queue<'_> {
    /// A chain that the device answers, and what is in payload and answer then.
    fn answered(
        &mut self,
        &(reads, at): &(&[(u64, u64)], u64),
        (payload, response): (&mut Area, &mut Area),
        random: &mut Random,
    ) {
        let (from, to) = (payload.gpa(0).get(), response.gpa(0).get());
        let (all, answer_len) = (0..payload.len(), payload.len() * PAGE_SIZE);
        let seed = random.word();
        payload.fill_unchecked(self.ops, all.clone(), seed);
        let around = random.word();
        response.fill_unchecked(self.ops, all, around);
        let pieces: Vec<(u64, u64)> =
            reads.iter().map(|&(offset, len)| (from + offset, len)).collect();
        let len = pieces.iter().map(|(_, len)| len).sum();
        self.make_available(&pieces, (to + at, len));
        self.notify(len);
        let around = Pattern::Seeded { seed: around };
        let offset = pieces[0].0.wrapping_sub(to + at);
        let answer = Pattern::Complement { seed, offset };
        let pieces = [
            (to, to + at, around),
            (to + at, to + at + len, answer),
            (to + at + len, to + answer_len, around),
        ];
        for (start, end, pattern) in pieces {
            if start < end {
                let (gpa, len) = (Gpa::new(start), end - start);
                self.ops.push(Op::Check { gpa, len, pattern });
            }
        }
        payload.check(self.ops);
    }

    /// Chains that the device refuses: with pages that are private, if there are any, and beyond
    /// the memory. The answer stays as it is.
    fn refused(
        &mut self,
        (private, beyond): (Option<u64>, u64),
        (payload, response): (&mut Area, &mut Area),
    ) {
        let (from, to) = (payload.gpa(0).get(), response.gpa(0).get());
        let mut refuse = |reads: (u64, u64), writes: (u64, u64)| {
            self.make_available(&[reads], writes);
            self.notify(0);
            response.check(self.ops);
        };
        if let Some(private) = private {
            refuse((private, PAGE_SIZE), (to, PAGE_SIZE));
            refuse((from, PAGE_SIZE), (private, PAGE_SIZE));
        }
        refuse((beyond, WORD), (to, WORD));
    }

    fn store(&mut self, gpa: u64, value: u64) {
        self.ops.push(Op::Store { gpa: Gpa::new(gpa), value });
    }

    /// Writes a chain of descriptors to read, and one to write, and makes it available.
    fn make_available(&mut self, reads: &[(u64, u64)], (write, len): (u64, u64)) {
        // Three descriptors at most: the first is 0, 4, 0 and so on.
        let head = (self.heads.len() as u64 % 2) * 4;
        for (at, &(gpa, len)) in (head..).zip(reads) {
            self.descriptor(at, (gpa, len), NEXT, at + 1);
        }
        self.descriptor(head + reads.len() as u64, (write, len), WRITE, 0);
        self.heads.push(head);
        let available = self.base + DESCRIPTOR * SIZE;
        let index = self.heads.len() as u64;
        // In the ring, words are of 2 bytes; the guest writes 8 at once, flags and index with the
        // first two heads. The device looks when it is notified, not before.
        let ring: Vec<u64> = (0..SIZE).map(|place| self.latest(place).unwrap_or(0)).collect();
        let words = [0, index & 0xffff].into_iter().chain(ring).chain([0, 0]);
        for (place, word) in (0..).zip(words.collect::<Vec<_>>().chunks_exact(4)) {
            let word = word.iter().rev().fold(0, |sum, part| sum << 16 | part);
            self.store(available + WORD * place, word);
        }
    }

    /// The head that was put last at a place of the available ring.
    fn latest(&self, place: u64) -> Option<u64> {
        let heads = (0..).zip(&self.heads);
        heads.filter(|(at, _)| at % SIZE == place).map(|(_, head)| *head).last()
    }

    fn descriptor(&mut self, at: u64, (gpa, len): (u64, u64), flags: u64, next: u64) {
        let place = self.base + DESCRIPTOR * at;
        self.store(place, gpa);
        self.store(place + WORD, len | flags << 32 | next << 48);
    }

    /// Notifies the device, and checks what it says that it has used.
    fn notify(&mut self, written: u64) {
        let (queue, expect) = (Gpa::new(self.base), Outcome::Done);
        self.ops.push(Op::Notify { queue, size: SIZE, expect });
        let head = self.heads[self.heads.len() - 1];
        self.used.push((head, written));
        // Flags and index, then pairs of a head and a length, 4 bytes each.
        let index = (self.used.len() as u64 & 0xffff) << 16;
        let latest = |place: u64| {
            let used = (0..).zip(&self.used).filter(|(at, _)| at % SIZE == place);
            used.map(|(_, used)| *used).last().unwrap_or((0, 0))
        };
        let pairs = (0..SIZE).map(latest).flat_map(|(head, len)| [head, len]);
        let halves: Vec<u64> = [index].into_iter().chain(pairs).chain([0]).collect();
        let used = self.base + PAGE_SIZE;
        for (place, halves) in (0..).zip(halves.chunks_exact(2)) {
            let (gpa, expect) = (Gpa::new(used + WORD * place), halves[0] | halves[1] << 32);
            self.ops.push(Op::Load { gpa, expect });
        }
    }
}
