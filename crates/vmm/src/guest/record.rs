//! Ops as the interpreter reads them: records of eight words.
//!
//! | op | word 0 | 1 | 2 | 3 | 4 | 5 | 6 |
//! |---|---|---|---|---|---|---|---|
//! | fill, check | code | gpa | len | offset | seed | factor | invert |
//! | convert, notify, probe | code | gpa | pages | third argument | expected answer | number | |
//! | device | code | request | id | source | len | destination | expected outcome |
//! | churn | code | gpa | len | seed | until | | |
//! | roam | code | gpa | mask | count | seed | | |
//! | digest | code | gpa | len | | | | |
//! | load, store | code | gpa | value | | | | |
//! | time, stand still | code | gpa | bytes | log | until | | |
//! | set flag, wait flag | code | gpa | | | | | |
//!
//! The word of a pattern at `a` is `((a + offset) ^ seed) * factor ^ invert`, whichever it is.

use polder_units::{Gpa, PAGE_SIZE};

use super::request::{DeviceRequest, KVM_HC_MAP_GPA_RANGE, MAP_GPA_RANGE_ENCRYPTED, number};
use crate::scenario::{HostAccess, Op, Outcome, PATTERN_FACTOR, Pattern, Visibility};

/// Bytes of a record.
pub(super) const BYTES: i32 = 64;

/// Word 0 of a record.
pub(super) mod code {
    pub(in crate::guest) const FILL: i32 = 1;
    pub(in crate::guest) const CHECK: i32 = 2;
    pub(in crate::guest) const REQUEST: i32 = 3;
    pub(in crate::guest) const DEVICE: i32 = 4;
    pub(in crate::guest) const LOAD: i32 = 5;
    pub(in crate::guest) const STORE: i32 = 6;
    pub(in crate::guest) const CHURN: i32 = 7;
    pub(in crate::guest) const SET_FLAG: i32 = 8;
    pub(in crate::guest) const WAIT_FLAG: i32 = 9;
    pub(in crate::guest) const DONE: i32 = 10;
    pub(in crate::guest) const ROAM: i32 = 11;
    pub(in crate::guest) const TIME: i32 = 12;
    pub(in crate::guest) const STAND_STILL: i32 = 13;
    pub(in crate::guest) const DIGEST: i32 = 14;
    pub(in crate::guest) const TIME_REQUEST: i32 = 15;
}

/// The record of an op.
pub(super) fn encode(op: &Op) -> [u64; 8] {
    let (code, words) = match *op {
        Op::Fill { gpa, len, pattern } => (code::FILL, piece(gpa, len, pattern)),
        Op::Check { gpa, len, pattern } => (code::CHECK, piece(gpa, len, pattern)),
        Op::Convert { gpa, pages, to, expect } => {
            let (number, expect) = (KVM_HC_MAP_GPA_RANGE, answer(expect));
            (code::REQUEST, [gpa.get(), pages, attributes(to), expect, number, 0, 0])
        }
        Op::TimeConvert { gpa, pages, to, log } => {
            let (number, expect) = (KVM_HC_MAP_GPA_RANGE, answer(Outcome::Done));
            (code::TIME_REQUEST, [gpa.get(), pages, attributes(to), expect, number, log.get(), 0])
        }
        Op::Probe { gpa, pages, expect } => {
            let expect = match expect {
                HostAccess::Denied => 0,
                HostAccess::Readable => 1,
            };
            let done = answer(Outcome::Done);
            (code::REQUEST, [gpa.get(), pages, expect, done, number::PROBE, 0, 0])
        }
        Op::Notify { queue, size, expect } => {
            (code::REQUEST, [queue.get(), size, 0, answer(expect), number::NOTIFY, 0, 0])
        }
        Op::Device { request, id, source, len, destination, expect } => {
            let [id, source, len, destination, _] =
                DeviceRequest { id, source, len, destination }.words();
            (code::DEVICE, [request.get(), id, source, len, destination, answer(expect), 0])
        }
        Op::Load { gpa, expect } => (code::LOAD, [gpa.get(), expect, 0, 0, 0, 0, 0]),
        Op::Store { gpa, value } => (code::STORE, [gpa.get(), value, 0, 0, 0, 0, 0]),
        Op::Churn { gpa, len, seed, until } => {
            (code::CHURN, [gpa.get(), len, seed, until.get(), 0, 0, 0])
        }
        Op::Roam { gpa, len, count, seed } => {
            (code::ROAM, [gpa.get(), mask(len), count, seed, 0, 0, 0])
        }
        Op::SetFlag { gpa } => (code::SET_FLAG, [gpa.get(), 0, 0, 0, 0, 0, 0]),
        Op::WaitFlag { gpa } => (code::WAIT_FLAG, [gpa.get(), 0, 0, 0, 0, 0, 0]),
        Op::Time { gpa, pages, log } => {
            (code::TIME, [gpa.get(), pages.saturating_mul(PAGE_SIZE), log.get(), 0, 0, 0, 0])
        }
        Op::StandStill { gpa, pages, log, until } => {
            let bytes = pages.saturating_mul(PAGE_SIZE);
            (code::STAND_STILL, [gpa.get(), bytes, log.get(), until.get(), 0, 0, 0])
        }
        Op::Digest { gpa, len } => (code::DIGEST, [gpa.get(), len, 0, 0, 0, 0, 0]),
        Op::Done => (code::DONE, [0; 7]),
    };
    let [a, b, c, d, e, f, g] = words;
    [u64::from(code.cast_unsigned()), a, b, c, d, e, f, g]
}

/// Where words may be in a length that is a power of two.
pub(crate) const fn mask(len: u64) -> u64 {
    len.wrapping_sub(1) & !7
}

fn piece(gpa: Gpa, len: u64, pattern: Pattern) -> [u64; 7] {
    let (offset, seed, factor, invert) = match pattern {
        Pattern::Zero => (0, 0, 0, 0),
        Pattern::Seeded { seed } => (0, seed, PATTERN_FACTOR, 0),
        Pattern::Complement { seed, offset } => (offset, seed, PATTERN_FACTOR, u64::MAX),
    };
    [gpa.get(), len, offset, seed, factor, invert, 0]
}

/// The hypercall's attributes.
fn attributes(to: Visibility) -> u64 {
    match to {
        Visibility::Private => MAP_GPA_RANGE_ENCRYPTED,
        Visibility::Shared => 0,
    }
}

fn answer(outcome: Outcome) -> u64 {
    i64::from(outcome.code()).cast_unsigned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_a_pattern_follow_from_its_record() {
        let patterns = [
            Pattern::Zero,
            Pattern::Seeded { seed: 77 },
            Pattern::Complement { seed: 77, offset: 0u64.wrapping_sub(0x1008) },
        ];
        for pattern in patterns {
            let gpa = Gpa::new(0x20_0040);
            let [_, _, _, offset, seed, factor, invert, _] =
                encode(&Op::Check { gpa, len: 8, pattern });
            let word = (gpa.get().wrapping_add(offset) ^ seed).wrapping_mul(factor) ^ invert;
            assert_eq!(word, pattern.word(gpa));
        }
    }
}
