//! What a step does, and what it names.

use polder::machine::RmpSize;
use polder::units::Level;
use polder::{Contents, PinKind, Visibility};

use super::{Bytes, Hold, Look, Place, SlotSpec};
use crate::names::VERBS;
use crate::scenario::By;

/// What is done.
#[derive(Clone, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the table of verbs in names.rs says what each is")]
pub enum Verb {
    Convert {
        place: Place,
        to: Visibility,
        contents: Contents,
        wait: bool,
    },
    Want {
        place: Place,
        vm: usize,
        to: Visibility,
    },
    Discard {
        place: Place,
    },
    Move {
        place: Place,
    },
    Preload {
        place: Place,
        bytes: String,
    },
    Relinquish {
        place: Place,
    },
    Populate {
        place: Place,
        bytes: String,
    },
    Fail {
        place: Place,
    },
    Settle,
    Create {
        huge_pages: u64,
        name: String,
    },
    Drop {
        name: String,
    },
    Bind {
        vm: usize,
        slot: SlotSpec,
    },
    Unbind {
        vm: usize,
        slot: u32,
    },
    Prefault {
        place: Place,
        vm: usize,
        by: By,
    },
    Pte {
        place: Place,
        present: bool,
        used: bool,
    },
    Read {
        from: Bytes,
        length: u64,
    },
    Write {
        to: Bytes,
        bytes: String,
    },
    Pin {
        place: Place,
        kind: PinKind,
        name: String,
    },
    Unpin {
        name: String,
    },
    /// Of another memory, if it names one.
    Refer {
        place: Place,
        kind: PinKind,
        name: String,
        of: Option<String>,
    },
    Release {
        name: String,
    },
    GupFast {
        place: Place,
        name: String,
    },
    Pvalidate {
        place: Place,
        size: RmpSize,
        validate: bool,
    },
    Allocate {
        place: Place,
        level: Level,
    },
    NoMemory {
        after: u64,
    },
    Lock {
        place: Place,
    },
    Unlock {
        place: Place,
    },
    Split {
        place: Place,
    },
    Merge {
        place: Place,
        level: Level,
    },
    Map {
        place: Place,
        vm: usize,
        level: Level,
    },
    Zap {
        place: Place,
        vm: usize,
    },
    Rmpupdate {
        place: Place,
        vm: usize,
        size: RmpSize,
        assign: bool,
        immutable: bool,
    },
    Psmash {
        place: Place,
    },
    Unsmash {
        place: Place,
    },
    Reclaim {
        place: Place,
        size: RmpSize,
    },
    RmpHold {
        place: Place,
        size: RmpSize,
    },
    RmpRelease {
        place: Place,
    },
    Resume {
        hold: Option<Hold>,
    },
    Look(Look),
    Explain {
        place: Place,
    },
    Pool,
    Audit,
}

impl Verb {
    /// Its name in a scenario.
    pub fn name(&self) -> &'static str {
        let name = match self {
            Self::Convert { .. } => "convert",
            Self::Create { .. } => "create",
            Self::Drop { .. } => "drop",
            Self::Pool => "pool",
            Self::Want { .. } => "want",
            Self::Discard { .. } => "discard",
            Self::Populate { .. } => "populate",
            Self::Move { .. } => "move",
            Self::Preload { .. } => "preload",
            Self::Relinquish { .. } => "relinquish",
            Self::Fail { .. } => "fail",
            Self::Settle => "settle",
            Self::Bind { .. } => "bind",
            Self::Unbind { .. } => "unbind",
            Self::Prefault { .. } => "prefault",
            Self::Pte { .. } => "pte",
            Self::Read { .. } => "read",
            Self::Write { .. } => "write",
            Self::Pin { .. } => "pin",
            Self::Unpin { .. } => "unpin",
            Self::Refer { .. } => "refer",
            Self::Release { .. } => "release",
            Self::GupFast { .. } => "gup-fast",
            Self::Pvalidate { .. } => "pvalidate",
            Self::Allocate { .. } => "allocate",
            Self::NoMemory { .. } => "no-memory",
            Self::Lock { .. } => "lock",
            Self::Unlock { .. } => "unlock",
            Self::Split { .. } => "split",
            Self::Merge { .. } => "merge",
            Self::Map { .. } => "map",
            Self::Zap { .. } => "zap",
            Self::Rmpupdate { .. } => "rmpupdate",
            Self::Psmash { .. } => "psmash",
            Self::Unsmash { .. } => "unsmash",
            Self::Reclaim { .. } => "reclaim",
            Self::RmpHold { .. } => "rmp-hold",
            Self::RmpRelease { .. } => "rmp-release",
            Self::Resume { .. } => "resume",
            Self::Look(_) => "look",
            Self::Explain { .. } => "explain",
            Self::Audit => "audit",
        };
        debug_assert!(VERBS.iter().any(|verb| verb.name == name), "{name} is in no table");
        name
    }

    /// The pages that it names.
    pub(crate) fn place(&self) -> Option<Place> {
        Some(match self {
            Self::Convert { place, .. }
            | Self::Want { place, .. }
            | Self::Discard { place }
            | Self::Move { place }
            | Self::Relinquish { place }
            | Self::Preload { place, .. }
            | Self::Populate { place, .. }
            | Self::Fail { place }
            | Self::Pin { place, .. }
            | Self::Refer { place, of: None, .. }
            | Self::GupFast { place, .. }
            | Self::Prefault { place, .. }
            | Self::Pte { place, .. }
            | Self::Pvalidate { place, .. }
            | Self::Allocate { place, .. }
            | Self::Lock { place }
            | Self::Unlock { place }
            | Self::Split { place }
            | Self::Merge { place, .. }
            | Self::Map { place, .. }
            | Self::Zap { place, .. }
            | Self::Rmpupdate { place, .. }
            | Self::Psmash { place }
            | Self::Unsmash { place }
            | Self::Reclaim { place, .. }
            | Self::RmpHold { place, .. }
            | Self::Explain { place }
            | Self::RmpRelease { place } => *place,
            Self::Bind { slot, .. } => Place::Pages(slot.pages),
            Self::Read { from: bytes, .. } | Self::Write { to: bytes, .. } => bytes.place,
            Self::Look(look) => look.place,
            Self::Settle | Self::Unbind { .. } | Self::Unpin { .. } | Self::Release { .. } => {
                return None;
            }
            // Of another memory.
            Self::Refer { of: Some(_), .. } => return None,
            Self::NoMemory { .. } | Self::Resume { .. } => return None,
            Self::Create { .. } | Self::Drop { .. } | Self::Pool | Self::Audit => return None,
        })
    }

    /// The VM that it names.
    pub(crate) fn vm(&self) -> Option<usize> {
        match self {
            Self::Bind { vm, .. }
            | Self::Unbind { vm, .. }
            | Self::Want { vm, .. }
            | Self::Prefault { vm, .. }
            | Self::Map { vm, .. }
            | Self::Zap { vm, .. }
            | Self::Rmpupdate { vm, .. } => Some(*vm),
            Self::Look(look) => Some(look.vm),
            _ => None,
        }
    }

    /// The bytes from the start of its first page to the last that it reads or writes.
    pub(crate) fn length(&self) -> Option<u64> {
        match self {
            Self::Read { from, length } => Some(from.at + length),
            Self::Write { to, bytes } => Some(to.at + bytes.len() as u64),
            _ => None,
        }
    }
}
