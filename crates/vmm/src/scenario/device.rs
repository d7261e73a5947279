//! Work for the device, through the bounce buffer and past it.

use polder_units::{Gpa, PAGE_SIZE};

use super::area::{Area, len};
use super::generate::Conversions;
use super::layout::Layout;
use super::op::{HostAccess, Op, Outcome, Pattern, Visibility, WORD};
use super::random::Random;
use super::virtqueue;

/// Offset in the payload, offset in the answer, length: words, pages, and neither.
const TRANSFERS: [(u64, u64, u64); 6] = [
    (0, 0, WORD),
    (0, 0, PAGE_SIZE),
    (PAGE_SIZE - 24, 8, 48),
    (0x1008, 0x2ff8, 0x1010),
    (PAGE_SIZE, 0, 4 * PAGE_SIZE),
    (0, 0, 8 * PAGE_SIZE),
];

/// The bounce buffer while the ops are written.
struct Bounce<'a> {
    layout: &'a Layout,
    payload: Area,
    response: Area,
    conversions: Conversions,
    id: u64,
}

/// Shares the bounce buffer, has the device transform payloads, has it refuse what it may not
/// reach, takes the buffer back, and shares it again for good, as a guest with a device does.
pub(super) fn transfers(
    ops: &mut Vec<Op>,
    layout: &Layout,
    (conversions, virtqueue): (Conversions, bool),
    random: &mut Random,
) {
    let area = |all| Area::new(all, conversions);
    let [payload, response] = [layout.payload, layout.response].map(area);
    let mut bounce = Bounce { layout, payload, response, conversions, id: 1 };
    if conversions.initial() == Visibility::Private {
        bounce.refused_request(ops);
    }
    bounce.convert(ops, Visibility::Shared);
    for (from, to, len) in TRANSFERS {
        bounce.transfer(ops, (from, to, len), random);
    }
    // The last answer stands among what was around it.
    let all = 0..bounce.response.len();
    bounce.response.fill_unchecked(ops, all, random.word());
    if conversions.initial() == Visibility::Private {
        bounce.refused_memory(ops);
    }
    if virtqueue {
        let areas = (&mut bounce.payload, &mut bounce.response);
        virtqueue::chains(ops, layout, areas, conversions, random);
    }
    bounce.convert(ops, Visibility::Private);
    bounce.convert(ops, Visibility::Shared);
}

impl Bounce<'_> {
    fn convert(&mut self, ops: &mut Vec<Op>, to: Visibility) {
        let (gpa, pages) = (self.layout.request.start().gpa(), self.layout.request.count().get());
        let outcome = self.conversions.outcome(to);
        ops.push(Op::Convert { gpa, pages, to, expect: outcome });
        let expect = match (to, outcome) {
            (Visibility::Private, Outcome::Done) => HostAccess::Denied,
            _ => HostAccess::Readable,
        };
        ops.push(Op::Probe { gpa, pages, expect });
        let all = 0..self.payload.len();
        self.payload.convert(ops, all.clone(), to);
        self.response.convert(ops, all, to);
    }

    fn device(&mut self, ops: &mut Vec<Op>, [from, to]: [Gpa; 2], len: u64, expect: Outcome) {
        let request = self.layout.request.start().gpa();
        ops.push(Op::Device { request, id: self.id, source: from, len, destination: to, expect });
        self.id += 1;
    }

    /// A request in private memory: the device may not even read it.
    fn refused_request(&mut self, ops: &mut Vec<Op>) {
        let addresses = [self.payload.gpa(0), self.response.gpa(0)];
        self.device(ops, addresses, PAGE_SIZE, Outcome::Fault);
        self.payload.check(ops);
        self.response.check(ops);
    }

    /// One transfer: the answer is the payload's complement, the rest of the response buffer and
    /// the payload are as before.
    fn transfer(
        &mut self,
        ops: &mut Vec<Op>,
        (from, to, len): (u64, u64, u64),
        random: &mut Random,
    ) {
        let all = 0..self.payload.len();
        let seed = random.word();
        self.payload.fill_unchecked(ops, all.clone(), seed);
        let around = random.word();
        self.response.fill_unchecked(ops, all, around);
        let [source, buffer] = [&self.payload, &self.response].map(|area| area.gpa(0).get());
        let (source, destination) = (source + from, buffer + to);
        self.device(ops, [source, destination].map(Gpa::new), len, Outcome::Done);

        let offset = source.wrapping_sub(destination);
        let end = buffer + self.response.len() * PAGE_SIZE;
        let around = Pattern::Seeded { seed: around };
        let answer = Pattern::Complement { seed, offset };
        for (start, end, pattern) in [
            (buffer, destination, around),
            (destination, destination + len, answer),
            (destination + len, end, around),
        ] {
            if start < end {
                ops.push(Op::Check { gpa: Gpa::new(start), len: end - start, pattern });
            }
        }
        self.payload.check(ops);
    }

    /// A payload in private memory, an answer to private memory, and a payload of which only the
    /// last page is private: each is refused and nothing is written.
    fn refused_memory(&mut self, ops: &mut Vec<Op>) {
        let all = 0..self.payload.len();
        let (payload, response) = (self.payload.gpa(0), self.response.gpa(0));
        let flags = self.layout.flags.start().gpa();
        self.device(ops, [flags, response], PAGE_SIZE, Outcome::Fault);
        self.response.check(ops);
        self.device(ops, [payload, flags], PAGE_SIZE, Outcome::Fault);
        self.device(ops, [self.layout.end(), response], PAGE_SIZE, Outcome::Fault);
        let last = all.end - 1;
        self.payload.convert(ops, last..all.end, Visibility::Private);
        self.device(ops, [payload, response], len(self.layout.payload), Outcome::Fault);
        self.response.check(ops);
        self.payload.convert(ops, last..all.end, Visibility::Shared);
        self.payload.check(ops);
    }
}
